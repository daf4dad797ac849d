// What a page or block must hold. Invariant: pure; two calls with the same arguments give the same
// bytes, on any host, so the host can check a guest's disk with the guest's own program.
#include "survivor.h"
#include <string.h>

enum { MAGIC = 0x6c686c73 }; // "slhl": first word of every page with content

struct claim { uint32_t magic, generation; uint64_t key, index, body; };

// Finaliser of splitmix64: full avalanche in five operations, cheap under emulation.
uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

uint64_t random_next(uint64_t *state) { return mix((*state)++); }

// Whole words only: every caller hashes multiples of eight bytes.
uint64_t hash_bytes(const void *bytes, size_t len, uint64_t seed) {
    const uint64_t *word = bytes;
    uint64_t a = seed, b = ~seed;
    size_t i = 0;
    for (; i + 1 < len / 8; i += 2) {
        a = ((a << 27 | a >> 37) ^ word[i]) * 0x9fb21c651e98df25;
        b = ((b << 31 | b >> 33) ^ word[i + 1]) * 0xd6e8feb86659fd93;
    }
    if (i < len / 8) a = (a ^ mix(word[i])) * 0x9fb21c651e98df25;
    return mix(a ^ mix(b));
}

bool is_zero(const void *page) {
    static const char zeros[PAGE];
    return memcmp(page, zeros, PAGE) == 0;
}

static void fill_lines(uint64_t *words, uint64_t key, uint64_t index, uint32_t generation) {
    static const char dictionary[16][9] = { "longhaul", "window, ", "journal ", "        ", "\0\0\0\0\0\0\0\0",
        "pages or", "blocks; ", "the same", "0000000\n", "guest = ", "target, ", "source: ", "network ",
        "{\"id\": 1", "\xff\xff\xff\xff\xff\xff\xff\xff", "a b c d " };
    for (unsigned line = 1; line < PAGE / LINE; line++) {
        uint64_t *out = words + line * (LINE / 8);
        uint64_t place = mix(key ^ mix(index * 64 + line));
        bool changes = place % 100 < cfg.change_pct;
        uint64_t state = mix(place ^ (changes ? generation : 0));
        if ((place >> 32) % 100 < cfg.entropy_pct)
            for (int i = 0; i < LINE / 8; i++) out[i] = state = state * 0xd1342543de82ef95 + 1;
        else
            for (int i = 0; i < LINE / 8; i++) memcpy(out + i, dictionary[state >> (i * 4) & 15], 8);
    }
}

void content_fill(void *page, uint64_t key, uint64_t index, uint32_t generation, bool duplicates) {
    if (generation % 16 == 0) { memset(page, 0, PAGE); return; }
    if (duplicates && generation % 16 == 8) index %= 8;
    fill_lines(page, key, index, generation);
    struct claim claim = { MAGIC, generation, key, index, 0 };
    claim.body = hash_bytes((char *)page + LINE, PAGE - LINE, generation);
    memset(page, 0, LINE);
    memcpy(page, &claim, sizeof claim);
}

bool content_claims(const void *page, uint64_t key, uint64_t *index, uint32_t *generation) {
    struct claim claim;
    memcpy(&claim, page, sizeof claim);
    *index = claim.index;
    *generation = claim.generation;
    return claim.magic == MAGIC && claim.key == key;
}
