/* Steering a gate to a share of pages. A fixed lambda, or fixed thresholds, keep two or three times
 * as many pages of one kind of prompt as of another. A steered row group starts where the
 * sequence's gate is, and moves its own after every decision, in the order of its walk, so that at
 * its end it has kept what its head is due:
 *
 *   kept:    gate += steer (1 - d)          the gate is ln(lambda) of REL, the threshold of ABS
 *   skipped: gate -= steer d
 *
 * d is the share due of the pages before the diagonal. REL: of the head's density times the
 * reachable pages, what the diagonal pages leave, which are kept in any case. ABS: the pages of the
 * head at its level, times blend. While kept / decided is d the steps cancel; a group that is n
 * pages ahead of that stands n steer above where it started. The CPU kernel decides by these
 * functions; Hopper's takes d from them and adds in its own places, so gates differ by rounding. */
#ifndef ATTENTION_ATTN_STEER_H
#define ATTENTION_ATTN_STEER_H

#include "attention/policy.h"

#ifdef __CUDACC__
#    define ATTN_STEER_FN static __host__ __device__ __forceinline__
#else
#    define ATTN_STEER_FN static inline
#endif

/* d: `pages` of n_visited before the diagonal. */
ATTN_STEER_FN float attn_steer_share(float pages, int n_visited)
{
    if (!(pages > 0.0f))
        return 0.0f;
    return pages < (float)n_visited ? pages / (float)n_visited : 1.0f;
}

/* The same of a density of n_before reachable pages and n_diag diagonal ones. */
ATTN_STEER_FN float attn_steer_due(float density, int n_before, int n_diag, int n_visited)
{
    return attn_steer_share(density * (float)(n_before + n_diag) - (float)n_diag, n_visited);
}

/* Where steering REL is to begin, by the lambda that is right on the mean: half a page ahead, since
 * a group keeps a page before it is due. */
static inline double attn_steer_start(double ln_lambda, double steer)
{
    const double start = ln_lambda + steer / 2;
    return start < ATTN_REL_LN_MAX ? start : ATTN_REL_LN_MAX;
}

/* The gate after a decision. */
static inline float attn_steer_next(float gate, float steer, float due, int kept)
{
    return gate + steer * ((kept ? 1.0f : 0.0f) - due);
}

#endif
