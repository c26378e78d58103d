/* Steering a gate to a number of pages. A fixed lambda, or fixed thresholds, keep two or three
 * times as many pages of one kind of prompt as of another. A steered row group starts where the
 * sequence's gate is, and moves its own after every decision, in the order of its walk, so that at
 * its end it has kept what its head is due:
 *
 *   kept:    gate += gain (1 - rest / left)     the gate is ln(lambda) of REL, the threshold of ABS
 *   skipped: gate -= gain rest / left
 *
 * left are the pages before the diagonal that are still to be decided, this one among them, rest is
 * what is still due of them. So what was kept too much at the beginning is taken off the pages that
 * follow. Due before the first: REL, of the head's density times the reachable pages, what the
 * diagonal pages leave, which are kept in any case; ABS, the pages of the head at its level, times
 * blend. A group that is due all its pages keeps them, without a gate. Lambdas begin near where
 * they end, and the gain is steer. Thresholds begin up to several units off: after n decisions
 * their gain is steer (1/2 + 4 / (n + 1)).
 *
 * The CPU kernel decides by these functions; Hopper's adds the same in its own places, so gates
 * differ by rounding. */
#ifndef ATTENTION_ATTN_STEER_H
#define ATTENTION_ATTN_STEER_H

#include "attention/policy.h"

#ifdef __CUDACC__
#    define ATTN_STEER_FN static __host__ __device__ __forceinline__
#else
#    define ATTN_STEER_FN static inline
#endif

/* The gain is steady + early / (n + 1). */
ATTN_STEER_FN float attn_steer_steady(float steer, int is_absolute)
{
    return is_absolute ? 0.5f * steer : steer;
}
ATTN_STEER_FN float attn_steer_early(float steer, int is_absolute)
{
    return is_absolute ? 4.0f * steer : 0.0f;
}

/* Pages due, of n_visited before the diagonal. */
ATTN_STEER_FN float attn_steer_due(float pages, int n_visited)
{
    if (!(pages > 0.0f))
        return 0.0f;
    return pages < (float)n_visited ? pages : (float)n_visited;
}

/* The same of a density of n_before reachable pages and n_diag diagonal ones. */
ATTN_STEER_FN float attn_steer_due_of(float density, int n_before, int n_diag, int n_visited)
{
    return attn_steer_due(density * (float)(n_before + n_diag) - (float)n_diag, n_visited);
}

/* The row of thresholds that ABS begins with where less than all is due: of the group's block, or
 * of the first that has more pages than the level, since rows before it are not gated (T = -inf). A
 * table that ends before that leaves the sequence dense. */
ATTN_STEER_FN int attn_steer_row(int block, float level_pages, int n_rows)
{
    const int first = (int)level_pages / 2 + 1, row = block < first ? first : block;
    return row < n_rows ? row : n_rows - 1;
}

/* Where steering REL is to begin, by the lambda that is right on the mean: half a page ahead, since
 * a group keeps a page before it is due. */
static inline double attn_steer_start(double ln_lambda, double steer)
{
    const double start = ln_lambda + steer / 2;
    return start < ATTN_REL_LN_MAX ? start : ATTN_REL_LN_MAX;
}

/* A group of a steered sequence. */
struct attn_steering {
    float gate, rest;
    int n, n_visited; /* decisions so far, and in all */
};

/* After a decision; is_absolute: of ABS. */
static inline void attn_steer_next(struct attn_steering *s, float steer, int is_absolute, int kept)
{
    const float early = attn_steer_early(steer, is_absolute) / (float)(s->n + 1);
    const float gain = attn_steer_steady(steer, is_absolute) + early;
    s->gate += gain * ((kept ? 1.0f : 0.0f) - s->rest / (float)(s->n_visited - s->n));
    if (kept)
        s->rest = s->rest > 1.0f ? s->rest - 1.0f : 0.0f;
    s->n++;
}

#endif
