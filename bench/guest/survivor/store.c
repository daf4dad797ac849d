// The checksum chain on disk. Invariant: a record is on the medium (O_DSYNC) before the blocks it
// announces are written, and all reads bypass the page cache: what is proven is what the disk holds.
//
// Layout in 4 KiB blocks: 0 superblock; then the log, a ring of records that each hold the hash of
// the one before; then data blocks, rewritten at random places. A data block that was never
// written, or whose generation is a hole, is zeros.
#include "survivor.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    VERSION = 1,
    RUN_MAX = 4,           // data blocks one record announces, side by side
    READ_BLOCKS = 64,      // 256 KiB per read of a proof
    LOG_SHARE = 16,        // one block of 16 is log
    LOG_MAX = 4096,        // records in the ring
    SLICE_MS = 20,
    STORE_BLOCKS_MIN = 64,
};
static const char SUPER_MAGIC[8] = "LHSTORE1", RECORD_MAGIC[8] = "LHRECORD";

struct super { char magic[8]; uint64_t version, key, blocks, check, entropy_pct, change_pct; };
struct record {
    char magic[8];
    uint64_t key, seq, previous, first, count, up_ms;
    uint32_t generation[RUN_MAX];
    uint64_t filler[PAGE / 8 - 7 - RUN_MAX / 2 - 1];
    uint64_t check; // of everything before it, and the `previous` of the next record
};
_Static_assert(sizeof(struct record) == PAGE, "a record is one block");

struct store stores[STORES_MAX];
int store_count;

static uint64_t record_check(const struct record *r) {
    return hash_bytes(r, offsetof(struct record, check), r->key);
}

static bool block_io(struct store *s, bool write, void *bytes, uint64_t block, uint64_t count) {
    size_t len = count * PAGE;
    ssize_t n = write ? pwrite(s->fd, bytes, len, block * PAGE) : pread(s->fd, bytes, len, block * PAGE);
    if (n == (ssize_t)len) return true;
    fail("disk", "%s: %s of block %lu: %s", s->path, write ? "write" : "read", block,
        n < 0 ? strerror(errno) : "short");
    return false;
}

static void *buffer(uint64_t blocks) {
    void *bytes = NULL;
    if (posix_memalign(&bytes, PAGE, blocks * PAGE) != 0) { fprintf(stderr, "survivor: no memory\n"); exit(1); }
    memset(bytes, 0, blocks * PAGE);
    return bytes;
}

// Proves the ring from its newest record back to the oldest it can still hold.
static bool prove_log(struct store *s, char *bytes) {
    uint64_t have = s->seq < s->log_blocks ? s->seq : s->log_blocks, want = s->head;
    const struct record *r = (const void *)bytes;
    for (uint64_t seq = s->seq; seq > s->seq - have; seq--) {
        if (!block_io(s, false, bytes, 1 + seq % s->log_blocks, 1)) return false;
        if (memcmp(r->magic, RECORD_MAGIC, 8) != 0 || r->key != s->key || r->seq != seq
            || r->check != record_check(r) || r->check != want) {
            fail("disk", "%s: record %lu of %lu is %s, claims to be %lu", s->path, seq, s->seq,
                is_zero(r) ? "zeros" : "not the one that was written", r->seq);
            return false;
        }
        want = r->previous;
        s->proven++;
    }
    return true;
}

// With a mirror every block must be its generation; without one (after a restart) every block must
// be whole, and the mirror is made from what they claim.
static bool prove_data(struct store *s, char *bytes, bool make_mirror) {
    char *want = buffer(1);
    bool ok = true;
    for (uint64_t at = 0; ok && at < s->data_blocks; at += READ_BLOCKS) {
        uint64_t n = s->data_blocks - at < READ_BLOCKS ? s->data_blocks - at : READ_BLOCKS;
        ok = block_io(s, false, bytes, 1 + s->log_blocks + at, n);
        for (uint64_t i = 0; ok && i < n; i++) {
            char *have = bytes + i * PAGE;
            uint64_t index = at + i, claimed_index = 0;
            uint32_t claimed = 0;
            bool ours = content_claims(have, s->key, &claimed_index, &claimed);
            if (make_mirror) s->generation[index] = ours ? claimed : 0;
            content_fill(want, s->key, index, s->generation[index], false);
            ok = memcmp(want, have, PAGE) == 0;
            if (!ok)
                fail("disk", "%s: block %lu, generation %u: holds %s index %lu generation %u", s->path, index,
                    s->generation[index], is_zero(have) ? "zeros," : ours ? "a block of" : "foreign content,",
                    claimed_index, claimed);
        }
        if (ok) s->proven += n;
    }
    free(want);
    return ok;
}

static bool find_head(struct store *s, char *bytes) {
    const struct record *r = (const void *)bytes;
    for (uint64_t i = 0; i < s->log_blocks; i++) {
        if (!block_io(s, false, bytes, 1 + i, 1)) return false;
        bool whole = memcmp(r->magic, RECORD_MAGIC, 8) == 0 && r->key == s->key && r->check == record_check(r);
        if (whole && r->seq > s->seq) { s->seq = r->seq; s->head = r->check; }
    }
    return true;
}

static bool prove_all(struct store *s) {
    char *bytes = buffer(READ_BLOCKS);
    s->proven = 0;
    bool ok = prove_log(s, bytes) && prove_data(s, bytes, false);
    free(bytes);
    return ok;
}

static bool append(struct store *s, uint64_t *state, char *bytes) {
    struct record *r = (void *)bytes;
    uint64_t random = random_next(state);
    uint64_t count = 1 + (random & (RUN_MAX - 1)), first = (random >> 8) % (s->data_blocks - count + 1);
    bool hole = cfg.discard != 0;
    memset(r, 0, PAGE);
    memcpy(r->magic, RECORD_MAGIC, 8);
    r->key = s->key; r->seq = s->seq + 1; r->previous = s->head;
    r->first = first; r->count = count; r->up_ms = now_ns() / 1000000;
    for (uint64_t i = 0; i < count; i++) r->generation[i] = s->generation[first + i] + 1;
    for (uint64_t i = 0; i < PAGE / LINE; i++) r->filler[i] = mix(r->seq + i); // the rest compresses
    r->check = record_check(r);
    if (!block_io(s, true, r, 1 + r->seq % s->log_blocks, 1)) return false;
    s->seq = r->seq;
    s->head = r->check;
    for (uint64_t i = 0; i < count; i++) {
        uint32_t generation = ++s->generation[first + i];
        content_fill(bytes + (1 + i) * PAGE, s->key, first + i, generation, false);
        hole = hole && generation % 16 == 0;
    }
    uint64_t at = 1 + s->log_blocks + first;
    // A hole where the disk can have one: a receiver must bring back zeros there, not old content.
    if (hole && fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at * PAGE, count * PAGE) == 0) {
        if (fdatasync(s->fd) != 0) { fail("disk", "%s: fdatasync: %s", s->path, strerror(errno)); return false; }
    } else if (!block_io(s, true, bytes + PAGE, at, count)) return false;
    s->writes += 1 + count;
    return true;
}

static void *work(void *store) {
    struct store *s = store;
    uint64_t state = mix(s->key ^ s->seq ^ 0x6469736b), last = now_ns(), round;
    char *bytes = buffer(1 + RUN_MAX);
    double due = 0; // blocks
    bool broken = false;
    for (;;) {
        struct timespec slice = { 0, SLICE_MS * 1000000 };
        nanosleep(&slice, NULL);
        uint64_t now = now_ns(), passed = now - last;
        last = now;
        if (passed > 1000000000) passed = 1000000000;
        if (writing && !broken) due += cfg.disk_kib_s / 4.0 * passed / 1e9;
        uint64_t before = s->writes;
        while (writing && !broken && due >= 1) {
            broken = !append(s, &state, bytes);
            due -= s->writes - before;
            before = s->writes;
        }
        if (proof_due(&s->proof, &round)) {
            if (!broken) broken = !prove_all(s);
            proof_done(&s->proof, round);
            last = now_ns();
        }
    }
    return NULL;
}

static uint64_t size_of(int fd) {
    struct stat st;
    uint64_t bytes = 0;
    if (fstat(fd, &st) != 0) return 0;
    if (S_ISBLK(st.st_mode)) return ioctl(fd, BLKGETSIZE64, &bytes) == 0 ? bytes : 0;
    return st.st_size;
}

static void lay_out(struct store *s, uint64_t blocks) {
    s->log_blocks = blocks / LOG_SHARE < LOG_MAX ? blocks / LOG_SHARE : LOG_MAX;
    s->data_blocks = blocks - 1 - s->log_blocks;
    s->generation = calloc(s->data_blocks, sizeof *s->generation);
    if (!s->generation) { fprintf(stderr, "survivor: no memory\n"); exit(1); }
}

static int open_direct(const char *path, int flags) {
    int fd = open(path, flags | O_CLOEXEC | O_DIRECT, 0600);
    // tmpfs and a few others refuse O_DIRECT: good enough for a try on a host.
    return fd < 0 && errno == EINVAL ? open(path, flags | O_CLOEXEC, 0600) : fd;
}

// True if the store holds what an earlier run wrote: it is then proven and continued.
static bool resume(struct store *s, char *bytes) {
    struct super super;
    if (!block_io(s, false, bytes, 0, 1)) return false;
    memcpy(&super, bytes, sizeof super);
    uint64_t check = super.check, blocks = size_of(s->fd) / PAGE;
    super.check = 0;
    if (memcmp(super.magic, SUPER_MAGIC, 8) != 0 || super.version != VERSION
        || check != hash_bytes(&super, sizeof super, 0) || super.blocks > blocks
        || super.blocks < STORE_BLOCKS_MIN)
        return false;
    s->key = super.key;
    cfg.entropy_pct = super.entropy_pct; // the content depends on them
    cfg.change_pct = super.change_pct;
    lay_out(s, super.blocks);
    bool ok = find_head(s, bytes) && prove_log(s, bytes) && prove_data(s, bytes, true);
    say("{\"ev\":\"store\",\"path\":\"%s\",\"found\":true,\"ok\":%s,\"records\":%lu,\"head\":\"%016lx\",\"proven\":%lu}",
        s->path, ok ? "true" : "false", s->seq, s->head, s->proven);
    return true;
}

static bool create(struct store *s, char *bytes) {
    uint64_t blocks = size_of(s->fd) / PAGE;
    if (blocks < STORE_BLOCKS_MIN) {
        blocks = cfg.store_mib * 256;
        if (ftruncate(s->fd, blocks * PAGE) != 0) {
            fail("disk", "%s: cannot grow to %lu MiB: %s", s->path, cfg.store_mib, strerror(errno));
            return false;
        }
    }
    lay_out(s, blocks);
    s->key = mix(cfg.seed ^ mix(blocks) ^ mix((uint64_t)(s - stores)));
    struct super super = { .version = VERSION, .key = s->key, .blocks = blocks,
        .entropy_pct = cfg.entropy_pct, .change_pct = cfg.change_pct };
    memcpy(super.magic, SUPER_MAGIC, 8);
    super.check = hash_bytes(&super, sizeof super, 0);
    memset(bytes, 0, PAGE);
    memcpy(bytes, &super, sizeof super);
    if (!block_io(s, true, bytes, 0, 1) || fsync(s->fd) != 0) return false;
    say("{\"ev\":\"store\",\"path\":\"%s\",\"found\":false,\"ok\":true,\"records\":0,\"blocks\":%lu}", s->path, blocks);
    return true;
}

static bool store_open(struct store *s, const char *path, bool read_only) {
    snprintf(s->path, sizeof s->path, "%s", path);
    proof_init(&s->proof);
    s->fd = open_direct(path, read_only ? O_RDONLY : O_RDWR | O_CREAT | O_DSYNC);
    if (s->fd < 0) { fail("disk", "%s: cannot open: %s", path, strerror(errno)); return false; }
    char *bytes = buffer(READ_BLOCKS);
    bool found = size_of(s->fd) >= STORE_BLOCKS_MIN * PAGE && resume(s, bytes);
    bool ok = found || (!read_only && create(s, bytes));
    if (!found && read_only) fail("disk", "%s: holds no store", path);
    free(bytes);
    return ok;
}

bool store_check(const char *path) {
    char why[256];
    return store_open(&stores[0], path, true) && !failed(why, sizeof why);
}

void stores_start(void) {
    char *list = strdup(cfg.stores ? cfg.stores : ""), *rest = list;
    for (char *path; (path = strsep(&rest, ",")) && store_count < STORES_MAX;) {
        if (!*path) continue;
        struct store *s = &stores[store_count];
        if (!store_open(s, path, false)) continue;
        store_count++;
        pthread_t thread;
        pthread_create(&thread, NULL, work, s);
    }
    free(list);
}
