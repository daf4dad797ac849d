// The self-checking memory. Invariant: one thread writes and proves, so a page that does not match
// its generation was changed by nobody inside the guest.
//
// Layout by page index: hot (rewritten 7 of 8 times), cold (the 8th), constant with duplicates,
// and always zero. A rewritten page is now and then a duplicate or zero again: the cases in which
// a receiver that keeps an old version would show.
#include "survivor.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

struct memory memory;
static char *region;
static uint32_t *generation;
static uint64_t key, hot, cold_end, constant_end;

enum { SLICE_NS = 5000000, SLICE_MAX_NS = 50000000, START_GENERATION = 1 };

static uint64_t weight(uint64_t index) { return mix(key ^ mix(index << 32 | generation[index])); }

static void page_write(uint64_t index, uint32_t gen) {
    memory.digest -= weight(index);
    generation[index] = gen;
    memory.digest += weight(index);
    content_fill(region + index * PAGE, key, index, gen, true);
}

static bool page_prove(uint64_t index) {
    static char want[PAGE] __attribute__((aligned(PAGE)));
    const char *have = region + index * PAGE;
    content_fill(want, key, index, generation[index], true);
    if (memcmp(want, have, PAGE) == 0) return true;
    uint64_t claimed_index = 0;
    uint32_t claimed = 0;
    size_t at = 0;
    while (want[at] == have[at]) at++;
    bool ours = content_claims(have, key, &claimed_index, &claimed);
    fail("mem", "page %lu of %lu, generation %u: differs at byte %zu, holds %s index %lu generation %u", index,
        memory.pages, generation[index], at,
        is_zero(have) ? "zeros," : ours ? "a page of" : "foreign content,", claimed_index, claimed);
    return false;
}

static void prove_all(void) {
    uint64_t digest = 0;
    for (uint64_t i = 0; i < memory.pages; i++) {
        if (!page_prove(i)) return;
        digest += weight(i);
    }
    // The mirror itself lives in memory that is moved: the running sum catches its going back.
    if (digest != memory.digest)
        fail("mem", "digest of generations is %016lx, should be %016lx", digest, memory.digest);
}

static void *work(void *unused) {
    (void)unused;
    uint64_t state = mix(cfg.seed ^ 0x6d656d), last = now_ns(), round;
    double write_due = 0, sweep_due = 0;
    uint64_t sweep_at = 0;
    for (;;) {
        struct timespec slice = { 0, SLICE_NS };
        nanosleep(&slice, NULL);
        uint64_t now = now_ns(), passed = now - last;
        last = now;
        if (passed > SLICE_MAX_NS) passed = SLICE_MAX_NS; // time that was lost is not made up for
        if (writing) write_due += cfg.dirty_mib_s * 256.0 * passed / 1e9;
        sweep_due += cfg.sweep_mib_s * 256.0 * passed / 1e9;
        for (; write_due >= 1; write_due--) {
            uint64_t r = random_next(&state);
            bool in_hot = (r & 7) != 0 || cold_end == hot;
            uint64_t i = in_hot ? (r >> 3) % hot : hot + (r >> 3) % (cold_end - hot);
            page_write(i, generation[i] + 1);
            memory.writes++;
        }
        for (; sweep_due >= 1; sweep_due--) {
            page_prove(sweep_at);
            sweep_at = (sweep_at + 1) % memory.pages;
            memory.swept++;
        }
        if (proof_due(&memory.proof, &round)) {
            prove_all();
            proof_done(&memory.proof, round);
            last = now_ns();
        }
    }
    return NULL;
}

void memory_start(void) {
    proof_init(&memory.proof);
    key = mix(cfg.seed ^ 0x6b6579);
    memory.pages = cfg.mem_mib * 256;
    if (memory.pages < 64) memory.pages = 64;
    hot = cfg.hot_mib * 256;
    constant_end = memory.pages - memory.pages / 8;
    cold_end = memory.pages - memory.pages / 4;
    if (hot == 0) hot = memory.pages / 8;
    if (hot > cold_end) hot = cold_end;
    region = mmap(NULL, memory.pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    generation = calloc(memory.pages, sizeof *generation);
    if (region == MAP_FAILED || !generation) {
        fprintf(stderr, "survivor: no memory for %lu MiB\n", cfg.mem_mib);
        exit(1);
    }
    for (uint64_t i = 0; i < memory.pages; i++) memory.digest += weight(i);
    for (uint64_t i = 0; i < memory.pages; i++) {
        memset(region + i * PAGE, 0xa5, PAGE); // present even where it ends up zero
        bool duplicate = i >= cold_end && i % 2 == 0;
        page_write(i, i >= constant_end ? 0 : duplicate ? 8 : START_GENERATION);
    }
    pthread_t thread;
    pthread_create(&thread, NULL, work, NULL);
}
