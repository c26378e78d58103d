#include "eval/mt.h"

enum { MT_STEP = 397 };

static void init(struct mt *m, uint32_t seed)
{
    m->state[0] = seed;
    for (uint32_t i = 1; i < MT_WORDS; i++)
        m->state[i] = 1812433253u * (m->state[i - 1] ^ (m->state[i - 1] >> 30)) + i;
    m->at = MT_WORDS;
}

void mt_seed(struct mt *m, uint64_t seed)
{
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t n_key = key[1] ? 2 : 1, i = 1, j = 0;
    uint32_t *s = m->state;
    init(m, 19650218u);
    for (int k = 0; k < MT_WORDS; k++) {
        s[i] = (s[i] ^ ((s[i - 1] ^ (s[i - 1] >> 30)) * 1664525u)) + key[j] + j;
        j = j + 1 < n_key ? j + 1 : 0;
        if (++i == MT_WORDS) {
            s[0] = s[MT_WORDS - 1];
            i = 1;
        }
    }
    for (int k = 0; k < MT_WORDS - 1; k++) {
        s[i] = (s[i] ^ ((s[i - 1] ^ (s[i - 1] >> 30)) * 1566083941u)) - i;
        if (++i == MT_WORDS) {
            s[0] = s[MT_WORDS - 1];
            i = 1;
        }
    }
    s[0] = 0x80000000u;
}

static void refill(struct mt *m)
{
    uint32_t *s = m->state;
    for (int i = 0; i < MT_WORDS; i++) {
        uint32_t y = (s[i] & 0x80000000u) | (s[(i + 1) % MT_WORDS] & 0x7fffffffu);
        s[i] = s[(i + MT_STEP) % MT_WORDS] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0u);
    }
    m->at = 0;
}

static uint32_t word(struct mt *m)
{
    if (m->at == MT_WORDS)
        refill(m);
    uint32_t y = m->state[m->at++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

double mt_unit(struct mt *m)
{
    uint32_t high = word(m) >> 5, low = word(m) >> 6;
    return (high * 67108864.0 + low) / 9007199254740992.0;
}

int32_t mt_below(struct mt *m, int32_t n)
{
    return (int32_t)(mt_unit(m) * n);
}
