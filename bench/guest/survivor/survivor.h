// What the parts of the survivor share: its settings, the content every page and block must have,
// and the way a worker proves it. Invariant: what a page or block must hold is a pure function of
// (key, index, generation, settings), so it can be proven at any time without a second copy.
#ifndef SURVIVOR_H
#define SURVIVOR_H
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stddef.h>

enum {
    PAGE = 4096,
    LINE = 64,             // unit of change inside a page: one cache line
    STORES_MAX = 4,        // data files or block devices that one survivor writes
    LINE_MAX_BYTES = 4096, // longest line on the serial console
    STACK_BYTES = 1 << 18, // of each thread: all of it is locked in memory
    PROOF_WAIT_S = 600,    // longest wait for one worker's full proof: TCG on a busy host is slow
};

struct settings {
    const char *tty;      // serial console; "-" is standard output
    const char *stores;   // comma-separated files or block devices
    const char *hook;     // command whose one-line JSON answer joins each verdict; NULL: none
    const char *poweroff; // command that stops the machine; NULL: sync and power off directly
    uint64_t mem_mib, hot_mib, dirty_mib_s, sweep_mib_s;
    uint64_t store_mib, disk_kib_s;
    uint64_t beat_ms, verify_s;
    uint64_t entropy_pct; // share of lines with random content, the rest compresses well
    uint64_t change_pct;  // share of lines that a new generation changes
    uint64_t discard;     // 1: some generations of a block are holes, punched through to the disk
    uint64_t seed;
};
extern struct settings cfg;
extern volatile bool writing; // false: workers stop writing and go on proving

// content.c
uint64_t mix(uint64_t x);
uint64_t hash_bytes(const void *bytes, size_t len, uint64_t seed);
uint64_t random_next(uint64_t *state);
bool is_zero(const void *page);
// Fills one page with the content of `generation`: 0 and every 16th are zeros, and with
// `duplicates` every 16th equals the same generation of other indexes.
void content_fill(void *page, uint64_t key, uint64_t index, uint32_t generation, bool duplicates);
// The index and generation a page claims to hold; false if it is no page of `key`.
bool content_claims(const void *page, uint64_t key, uint64_t *index, uint32_t *generation);

// console.c
void console_open(void);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
int console_read(char *byte); // 1: a byte, 0: end of input
// Remembers the first failure for every later verdict, and prints it.
void fail(const char *what, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool failed(char *first, size_t len);

// heart.c
uint64_t now_ns(void);
void heart_start(void);
void heart_reset(void); // starts the longest gap anew
struct heart { uint64_t beats, up_ms, gap_last_ns, gap_max_ns, gap_max_at, tsc_gap_max_ns; long rtc_lag_ms; };
struct heart heart_look(bool new_second);

// A full proof asked of a worker: the worker notices `asked`, proves all it has, sets `done`.
struct proof { pthread_mutex_t lock; pthread_cond_t changed; uint64_t asked, done; };
void proof_init(struct proof *p);
void proof_ask(struct proof *p);
bool proof_wait(struct proof *p);    // false: not done within PROOF_WAIT_S
bool proof_due(struct proof *p, uint64_t *round);
void proof_done(struct proof *p, uint64_t round);

// memory.c
struct memory { struct proof proof; uint64_t pages, writes, swept, digest; };
extern struct memory memory;
void memory_start(void);

// store.c
struct store {
    struct proof proof;
    char path[128];
    int fd;
    uint64_t key, log_blocks, data_blocks; // layout: superblock, log, data
    uint64_t seq, head;                    // newest record of the chain and its hash
    uint64_t writes, proven;               // blocks written; blocks read back by the last proof
    uint32_t *generation;                  // of each data block: the mirror in memory
};
extern struct store stores[STORES_MAX];
extern int store_count;
void stores_start(void);
// Opens an existing store and proves what can be proven without the mirror; prints one line.
bool store_check(const char *path);
#endif
