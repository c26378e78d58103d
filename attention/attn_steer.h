/* Steering the REL gate to a density. A fixed lambda keeps two or three times as many pages of one
 * kind of prompt as of another. A steered row group starts at the sequence's ln(lambda) and moves
 * its own after every decision, in the order of its walk, so that at its end it has kept the share
 * of its reachable pages that its head has at the wanted mean density:
 *
 *   kept:    ln(lambda) += steer (1 - d), at most ATTN_REL_LN_MAX
 *   skipped: ln(lambda) -= steer d
 *
 * d is the share due of the pages that are decided on: of the head's density times the reachable
 * pages, what the diagonal pages leave, which are kept in any case. While kept / decided is d the
 * steps cancel; a group that is n pages ahead of that stands n steer above where it started. Pages
 * whose maximum stands out are kept whatever was spent before.
 * The kernels share these two functions; their gates differ by rounding alone. */
#ifndef ATTENTION_ATTN_STEER_H
#define ATTENTION_ATTN_STEER_H

#include "attention/policy.h"

#ifdef __CUDACC__
#    define ATTN_STEER_FN static __host__ __device__ __forceinline__
#else
#    define ATTN_STEER_FN static inline
#endif

/* d: of n_visited pages before the diagonal among n_before reachable ones, beside n_diag. */
ATTN_STEER_FN float attn_steer_due(float density, int n_before, int n_diag, int n_visited)
{
    const float due = density * (float)(n_before + n_diag) - (float)n_diag;
    if (!(due > 0.0f))
        return 0.0f;
    return due < (float)n_visited ? due / (float)n_visited : 1.0f;
}

/* Where steering is to begin, by the lambda that is right on the mean: half a page ahead, since a
 * group keeps a page before it is due. */
static inline double attn_steer_start(double ln_lambda, double steer)
{
    const double start = ln_lambda + steer / 2;
    return start < ATTN_REL_LN_MAX ? start : ATTN_REL_LN_MAX;
}

/* The gate after a decision, in whatever units steer and most are. */
ATTN_STEER_FN float attn_steer_next(float gate, float steer, float due, int kept, float most)
{
    const float next = gate + steer * ((kept ? 1.0f : 0.0f) - due);
    return next < most ? next : most;
}

#endif
