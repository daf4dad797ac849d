// The heartbeat: a real-time thread that wakes every `beat_ms` and counts. Invariant: it never
// touches the console or a disk, so a gap it sees is a time in which the guest did not run.
// (Under QEMU most guest clocks stop with the guest; the README of this folder says which go on.)
#include "survivor.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/rtc.h>
#include <sched.h>
#include <semaphore.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <x86intrin.h>
#endif

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct heart heart;
static sem_t beaten;
static uint64_t born_ns;

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t tsc(void) {
#ifdef __x86_64__
    return __rdtsc();
#else
    return 0;
#endif
}

static void *beat(void *unused) {
    (void)unused;
    const uint64_t period = cfg.beat_ms * 1000000;
    const uint64_t tsc_born = tsc(), mono_born = now_ns();
    double ns_per_tick = 0;
    uint64_t last = mono_born, last_tsc = tsc_born, next = last + period;
    for (;;) {
        struct timespec until = { next / 1000000000, next % 1000000000 };
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        uint64_t now = now_ns(), ticks = tsc();
        // Calibrated once, over the first second: later the two clocks may part, which is the news.
        if (ns_per_tick == 0 && now - mono_born > 1000000000 && ticks > tsc_born)
            ns_per_tick = (double)(now - mono_born) / (double)(ticks - tsc_born);
        pthread_mutex_lock(&lock);
        heart.beats++;
        heart.up_ms = (now - born_ns) / 1000000;
        uint64_t gap = now - last;
        if (gap > heart.gap_last_ns) heart.gap_last_ns = gap;
        if (gap > heart.gap_max_ns) { heart.gap_max_ns = gap; heart.gap_max_at = heart.beats; }
        if (ns_per_tick > 0 && ticks > last_tsc) {
            uint64_t tsc_gap = (double)(ticks - last_tsc) * ns_per_tick;
            if (tsc_gap > heart.tsc_gap_max_ns) heart.tsc_gap_max_ns = tsc_gap;
        }
        pthread_mutex_unlock(&lock);
        last = now;
        last_tsc = ticks;
        next = now > next + period ? now + period : next + period;
        sem_post(&beaten);
    }
    return NULL;
}

// Milliseconds by which the battery clock ran ahead of CLOCK_MONOTONIC since its first full second:
// the one clock of a PC that goes on while the machine stands. It counts whole seconds, so it is
// looked at with every beat and compared only when it has just stepped.
static void rtc_look(int fd) {
    static int64_t base, last_seconds;
    static int steps;
    struct rtc_time t;
    if (fd < 0 || ioctl(fd, RTC_RD_TIME, &t) != 0) return;
    struct tm tm = { .tm_sec = t.tm_sec, .tm_min = t.tm_min, .tm_hour = t.tm_hour,
        .tm_mday = t.tm_mday, .tm_mon = t.tm_mon, .tm_year = t.tm_year };
    int64_t seconds = timegm(&tm), ahead = seconds * 1000 - (int64_t)(now_ns() / 1000000);
    if (steps > 0 && seconds == last_seconds) return;
    last_seconds = seconds;
    if (++steps <= 2) base = ahead; // the first look is no step, the second is one
    pthread_mutex_lock(&lock);
    heart.rtc_lag_ms = ahead - base;
    pthread_mutex_unlock(&lock);
}

static void *pulse(void *unused) {
    (void)unused;
    int rtc = open("/dev/rtc0", O_RDONLY | O_CLOEXEC);
    uint64_t said_ms = 0, said_beat = 0;
    for (;;) {
        while (sem_wait(&beaten) != 0 && errno == EINTR) {}
        while (sem_trywait(&beaten) == 0) {} // late: one line for all, the number tells
        pthread_mutex_lock(&lock);
        struct heart h = heart;
        pthread_mutex_unlock(&lock);
        // A beat that was counted but not yet posted has already been said: a number comes once.
        if (h.beats == said_beat) continue;
        said_beat = h.beats;
        say("{\"hb\":%lu,\"ms\":%lu}", h.beats, h.up_ms);
        rtc_look(rtc);
        if (h.up_ms < said_ms + 1000) continue;
        said_ms = h.up_ms;
        h = heart_look(true);
        uint64_t seq = 0, blocks = 0;
        for (int i = 0; i < store_count; i++) { seq += stores[i].seq; blocks += stores[i].writes; }
        say("{\"ev\":\"stat\",\"hb\":%lu,\"ms\":%lu,\"gap_ms\":%.1f,\"gap_max_ms\":%.1f,\"gap_max_hb\":%lu,"
            "\"rtc_lag_ms\":%ld,\"mem_writes\":%lu,\"mem_swept\":%lu,\"records\":%lu,\"blocks\":%lu}",
            h.beats, h.up_ms, h.gap_last_ns / 1e6, h.gap_max_ns / 1e6, h.gap_max_at, h.rtc_lag_ms,
            memory.writes, memory.swept, seq, blocks);
    }
    return NULL;
}

struct heart heart_look(bool new_second) {
    pthread_mutex_lock(&lock);
    struct heart h = heart;
    if (new_second) heart.gap_last_ns = 0;
    pthread_mutex_unlock(&lock);
    return h;
}

void heart_reset(void) {
    pthread_mutex_lock(&lock);
    heart.gap_max_ns = heart.gap_max_at = heart.tsc_gap_max_ns = heart.gap_last_ns = 0;
    pthread_mutex_unlock(&lock);
}

static void start_with_priority(void *(*run)(void *), int priority) {
    pthread_attr_t attr;
    struct sched_param param = { priority };
    pthread_t thread;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, STACK_BYTES);
    pthread_attr_setinheritsched(&attr, PTHREAD_EXPLICIT_SCHED);
    pthread_attr_setschedpolicy(&attr, SCHED_FIFO);
    pthread_attr_setschedparam(&attr, &param);
    // Without the right to it (the program tried out on a host) an ordinary thread must do.
    if (pthread_create(&thread, &attr, run, NULL) != 0) pthread_create(&thread, NULL, run, NULL);
}

void heart_start(void) {
    sem_init(&beaten, 0, 0);
    born_ns = now_ns();
    start_with_priority(beat, 20);
    start_with_priority(pulse, 10);
}
