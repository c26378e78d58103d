/* The random numbers of Python's `random.Random(seed).random()`: Mersenne Twister MT19937, 53 bits
 * a draw. models/needle/make_prompts.py draws from the same sequence, so that both write the same
 * prompts and each can be checked with the other.
 * Source: Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8 (1998); seeding by their
 * init_by_array with the seed's 32-bit words, least first, as CPython's _randommodule.c does. */
#ifndef EVAL_MT_H
#define EVAL_MT_H

#include <stdint.h>

enum { MT_WORDS = 624 };

struct mt {
    uint32_t state[MT_WORDS];
    int32_t at; /* next word; MT_WORDS: all are used */
};

void mt_seed(struct mt *m, uint64_t seed);
/* Uniform in [0, 1). */
double mt_unit(struct mt *m);
/* Uniform in 0 .. n - 1, by one draw. */
int32_t mt_below(struct mt *m, int32_t n);

#endif
