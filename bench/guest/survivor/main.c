// survivor: proves that a guest lived through a move with heart, memory and disks intact.
// Invariant: a verdict is ok only if nothing has failed since the start and a full proof of the
// memory and of every store ended after it was asked for.
//
// usage: survivor [key=value ...]      settings; `survivor.key=value` on the kernel command line too
//        survivor check FILE|DEVICE    proves a store that nobody writes; exit code 0 or 1
#include "survivor.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <time.h>
#include <unistd.h>

struct settings cfg = {
    .tty = "-", .mem_mib = 32, .dirty_mib_s = 4, .sweep_mib_s = 8, .store_mib = 64, .disk_kib_s = 256,
    .beat_ms = 20, .entropy_pct = 50, .change_pct = 25, .discard = 1, .seed = 1,
};
volatile bool writing = true;

static pthread_mutex_t verdict_lock = PTHREAD_MUTEX_INITIALIZER;

static const struct { const char *key; uint64_t *value; } numbers[] = {
    { "mem_mib", &cfg.mem_mib }, { "hot_mib", &cfg.hot_mib }, { "dirty_mib_s", &cfg.dirty_mib_s },
    { "sweep_mib_s", &cfg.sweep_mib_s }, { "store_mib", &cfg.store_mib },
    { "disk_kib_s", &cfg.disk_kib_s }, { "beat_ms", &cfg.beat_ms }, { "verify_s", &cfg.verify_s },
    { "entropy_pct", &cfg.entropy_pct }, { "change_pct", &cfg.change_pct },
    { "discard", &cfg.discard }, { "seed", &cfg.seed },
};
static const struct { const char *key; const char **value; } texts[] = {
    { "tty", &cfg.tty }, { "stores", &cfg.stores }, { "hook", &cfg.hook }, { "poweroff", &cfg.poweroff },
};

static bool set(const char *setting) {
    const char *equals = strchr(setting, '=');
    if (!equals) return false;
    size_t len = equals - setting;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (strlen(numbers[i].key) == len && strncmp(numbers[i].key, setting, len) == 0) {
            *numbers[i].value = strtoull(equals + 1, NULL, 10);
            return true;
        }
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (strlen(texts[i].key) == len && strncmp(texts[i].key, setting, len) == 0) {
            *texts[i].value = strdup(equals + 1);
            return true;
        }
    if (strncmp(setting, "idle=", 5) == 0) {
        if (equals[1] == '1') cfg.dirty_mib_s = cfg.disk_kib_s = cfg.sweep_mib_s = 0;
        return true;
    }
    return false;
}

static void set_from_kernel(void) {
    char line[4096];
    FILE *file = fopen("/proc/cmdline", "r");
    if (!file) return;
    if (fgets(line, sizeof line, file))
        for (char *rest = line, *word; (word = strsep(&rest, " \n"));)
            if (strncmp(word, "survivor.", 9) == 0) set(word + 9);
    fclose(file);
}

void proof_init(struct proof *p) {
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->changed, &attr);
}

void proof_ask(struct proof *p) {
    pthread_mutex_lock(&p->lock);
    p->asked++;
    pthread_mutex_unlock(&p->lock);
}

bool proof_wait(struct proof *p) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += PROOF_WAIT_S;
    pthread_mutex_lock(&p->lock);
    uint64_t round = p->asked;
    int late = 0;
    while (p->done < round && late == 0) late = pthread_cond_timedwait(&p->changed, &p->lock, &until);
    pthread_mutex_unlock(&p->lock);
    return late == 0;
}

bool proof_due(struct proof *p, uint64_t *round) {
    pthread_mutex_lock(&p->lock);
    *round = p->asked;
    bool due = p->done < p->asked;
    pthread_mutex_unlock(&p->lock);
    return due;
}

void proof_done(struct proof *p, uint64_t round) {
    pthread_mutex_lock(&p->lock);
    p->done = round;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

// The hook's answer, a JSON object on one line; "null" if there is no hook.
static bool ask_hook(char *answer, size_t len) {
    snprintf(answer, len, "null");
    if (!cfg.hook) return true;
    FILE *pipe = popen(cfg.hook, "r");
    bool got = pipe && fgets(answer, len, pipe);
    bool ok = pipe && pclose(pipe) == 0;
    answer[strcspn(answer, "\n")] = 0;
    if (!got || answer[0] != '{') snprintf(answer, len, "null");
    if (!ok) fail("services", "the check of the services failed");
    return ok;
}

static void verdict(void) {
    static uint64_t count;
    char why[256], services[1024], disks[1024] = "";
    pthread_mutex_lock(&verdict_lock);
    uint64_t id = ++count;
    say("{\"ev\":\"verify\",\"id\":%lu}", id);
    proof_ask(&memory.proof);
    for (int i = 0; i < store_count; i++) proof_ask(&stores[i].proof);
    if (!proof_wait(&memory.proof)) fail("mem", "no proof within %d s", PROOF_WAIT_S);
    for (int i = 0; i < store_count; i++) {
        struct store *s = &stores[i];
        size_t used = strlen(disks);
        if (!proof_wait(&s->proof)) fail("disk", "%s: no proof within %d s", s->path, PROOF_WAIT_S);
        snprintf(disks + used, sizeof disks - used,
            "%s{\"path\":\"%s\",\"records\":%lu,\"head\":\"%016lx\",\"proven\":%lu}", i ? "," : "", s->path,
            s->seq, s->head, s->proven);
    }
    ask_hook(services, sizeof services);
    struct heart h = heart_look(false);
    bool bad = failed(why, sizeof why);
    say("{\"ev\":\"verdict\",\"id\":%lu,\"ok\":%s,\"why\":\"%s\",\"hb\":%lu,\"ms\":%lu,\"gap_max_ms\":%.1f,"
        "\"gap_max_hb\":%lu,\"tsc_gap_max_ms\":%.1f,\"rtc_lag_ms\":%ld,\"mem_pages\":%lu,\"mem_writes\":%lu,"
        "\"mem_swept\":%lu,\"mem_digest\":\"%016lx\",\"stores\":[%s],\"services\":%s}",
        id, bad ? "false" : "true", why, h.beats, h.up_ms, h.gap_max_ns / 1e6, h.gap_max_at,
        h.tsc_gap_max_ns / 1e6, h.rtc_lag_ms, memory.pages, memory.writes, memory.swept, memory.digest, disks,
        services);
    pthread_mutex_unlock(&verdict_lock);
}

static void *verify_now_and_then(void *unused) {
    (void)unused;
    for (;;) {
        struct timespec pause = { cfg.verify_s, 0 };
        nanosleep(&pause, NULL);
        verdict();
    }
    return NULL;
}

// An orderly end, so that the host may check the file systems of the images.
static void power_off(void) {
    pthread_mutex_lock(&verdict_lock); // for good: a proof that runs may end, none may begin
    writing = false;
    say("{\"ev\":\"bye\"}");
    if (cfg.poweroff) {
        if (system(cfg.poweroff) != 0) fail("guest", "the command to power off failed");
        return;
    }
    if (getpid() != 1) exit(0);
    usleep(200000); // more than the longest write of a store takes to end
    for (int i = 0; i < store_count; i++) { fsync(stores[i].fd); close(stores[i].fd); }
    if (umount("/data") != 0) say("{\"ev\":\"note\",\"why\":\"the disk is still mounted\"}");
    sync();
    reboot(RB_POWER_OFF);
}

static uint64_t read_number(void) {
    char byte = 0;
    uint64_t number = 0;
    while (console_read(&byte) == 1 && byte >= '0' && byte <= '9' && number < UINT32_MAX)
        number = number * 10 + (byte - '0');
    return number;
}

static void obey(char command) {
    switch (command) {
    case 'v': verdict(); break;
    case 'g': heart_reset(); break;
    case 'p': writing = false; break;
    case 'r': writing = true; break;
    case 'm': cfg.dirty_mib_s = read_number(); break;
    case 'd': cfg.disk_kib_s = read_number(); break;
    case 'o': power_off(); return;
    default: return;
    }
    say("{\"ev\":\"done\",\"command\":\"%c\",\"dirty_mib_s\":%lu,\"disk_kib_s\":%lu,\"writing\":%s}", command,
        cfg.dirty_mib_s, cfg.disk_kib_s, writing ? "true" : "false");
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "check") == 0) return store_check(argv[2]) ? 0 : 1;
    for (int i = 1; i < argc; i++)
        if (!set(argv[i])) { fprintf(stderr, "survivor: unknown setting %s\n", argv[i]); return 2; }
    set_from_kernel(); // last: who starts the guest has the last word
    if (cfg.beat_ms == 0 || cfg.store_mib == 0 || cfg.entropy_pct > 100 || cfg.change_pct > 100) {
        fprintf(stderr, "survivor: beat_ms and store_mib must be above 0, percentages at most 100\n");
        return 2;
    }
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, STACK_BYTES);
    pthread_setattr_default_np(&small);
    console_open();
    say("{\"ev\":\"hello\",\"version\":1,\"mem_mib\":%lu,\"dirty_mib_s\":%lu,\"disk_kib_s\":%lu,\"beat_ms\":%lu,"
        "\"seed\":%lu,\"stores\":\"%s\"}",
        cfg.mem_mib, cfg.dirty_mib_s, cfg.disk_kib_s, cfg.beat_ms, cfg.seed, cfg.stores ? cfg.stores : "");
    stores_start(); // first: an old store brings its own content settings
    memory_start();
    mlockall(MCL_CURRENT | MCL_FUTURE);
    heart_start();
    say("{\"ev\":\"ready\"}");
    pthread_t timer;
    if (cfg.verify_s) pthread_create(&timer, NULL, verify_now_and_then, NULL);
    for (char byte; console_read(&byte) == 1;) obey(byte);
    for (;;) pause(); // no console to listen to: the heartbeat is what counts
}
