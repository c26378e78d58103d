/* The softmax mass that prompt rows lose by the pages they do not use, measured on a sample of
 * them:
 *
 *   lost = 1 - sum over the kept keys of e^s / sum over all visible keys of e^s
 *        = 1 - e^(lse of the gated run - lse without a gate)
 *
 * for each layer, query head and sampled row. Sampled are one position in each stretch of
 * ATTN_SAMPLE_TOKENS, about its middle and at varying places of its block (of which all keys are
 * kept), and the last of the prompt, so that every prompt has one: functions of the absolute
 * position and of the prompt's end, never of chunks or of the batch. Sums are integers, so that
 * they do not depend on an order. */
#ifndef ATTENTION_ATTN_LOST_H
#define ATTENTION_ATTN_LOST_H

#include <math.h>
#include <stdint.h>

enum {
    ATTN_SAMPLE_TOKENS = 1024, /* a multiple of a block */
    ATTN_LOST_ONE = 1 << 24    /* attn_counts.lost of one row that loses everything */
};

/* The sampled position of the n-th stretch. 79 / 128 is near the golden ratio: few places in the
 * block already cover it evenly. */
static inline int32_t attn_sample_at(int32_t n)
{
    return n * ATTN_SAMPLE_TOKENS + ATTN_SAMPLE_TOKENS / 2 - 64 + 79 * (n % 128) % 128;
}

/* The first sampled position from pos on, which is before prompt_end. */
static inline int32_t attn_sample_next(int32_t pos, int32_t prompt_end)
{
    int32_t at = attn_sample_at(pos / ATTN_SAMPLE_TOKENS);
    if (at < pos)
        at = attn_sample_at(pos / ATTN_SAMPLE_TOKENS + 1);
    return at < prompt_end ? at : prompt_end - 1;
}

/* Sampled positions among [pos, pos + n_rows), all of the prompt. */
static inline int32_t attn_sample_count(int32_t pos, int32_t n_rows, int32_t prompt_end)
{
    int32_t n = 0;
    for (int32_t at = pos; at < pos + n_rows; at++) {
        at = attn_sample_next(at, prompt_end);
        n += at < pos + n_rows;
    }
    return n;
}

/* Most that n_rows rows in so many parts can have. */
static inline int32_t attn_sample_most(int32_t n_rows, int32_t n_parts)
{
    return n_rows / (ATTN_SAMPLE_TOKENS - 128) + 2 * n_parts;
}

/* In units of ATTN_LOST_ONE. NaN loses nothing: it keeps pages. */
static inline uint64_t attn_lost_units(float lse_kept, float lse_dense)
{
    return lse_kept < lse_dense
               ? (uint64_t)(-expm1f(lse_kept - lse_dense) * (float)ATTN_LOST_ONE + 0.5f)
               : 0;
}

#endif
