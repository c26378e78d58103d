/* The Hopper decode kernel: 1 to 8 query tokens a sequence over the paged cache, split-KV after a
 * plan (attn_decode_plan.h), gated or not.
 *
 *   q, out  [rows, n_heads, head_dim] in the model dtype, row strides q_stride and out_stride
 *   lse     f32 [rows, n_heads], natural log over the kept keys, or NULL
 *   pools   [n_pages, n_kv_heads, 64, head_dim] behind maps->k and maps->v (sm90_maps_make);
 *           maps->q is not used
 *
 * The row of a token at position t sees keys 0..t. Visit is that of attention.h with block t / 128.
 *
 * A gate skips pages that a row visits, by the row's largest scaled score there:
 *   ABS  each row decides alone. It keeps the page that holds its own token, and those where the
 *        score >= T[head, min(t / 128, t_blocks - 1)]. V is read where any row of the piece (16
 *        packed rows at most) keeps the page; to the others its probabilities are 0.
 *   REL  the rows of a piece decide together. They keep pages from the one that holds the piece's
 *        oldest token on, and those where in any row the score >= its running maximum + ln_lambda.
 * NaN keeps; V of a skipped page is not read. T = -inf and lambda = 0 are the dense kernel bit for
 * bit. Under REL every piece has running maxima of its own: its DEC_WARPS warps each walk every
 * DEC_WARPS-th of its pages, newest first; a warp knows the maxima over the pages it has kept and
 * over those the others had kept two of their pages ago. So the first page of every warp is kept.
 *
 * Counters are added to, in (page, row) units, a row being one query head of one token: reachable,
 * all pages of positions 0..t; visited, those its head visits; kept, those kept for the row.
 *
 * A NaN stays in its sequence. Inside it, a NaN in V of a page reaches every row of a piece that
 * keeps the page and whose own keys include it or precede it in that page; K only rows that see it.
 * Equal inputs and plan give equal bits. No host synchronisation, no allocation: fit for capture.
 */
#ifndef ATTENTION_ATTN_DECODE_SM90_H
#define ATTENTION_ATTN_DECODE_SM90_H

#include "attention/attn_decode_plan.h"
#include "attention/attn_sm90.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Thread blocks a multiprocessor, and warps a thread block. */
#ifndef DEC_BLOCKS
#    define DEC_BLOCKS 1
#endif
#ifndef DEC_WARPS
#    define DEC_WARPS 7
#endif

struct dec_args {
    const struct dec_piece *pieces; /* device copy of the plan */
    const int32_t *first;
    const struct dec_seq *seqs;
    const struct sm90_visit *visit; /* [n_heads], what the plan was made for, or NULL */
    const void *q;
    void *out;
    float *lse;
    int64_t q_stride, out_stride; /* elements between rows */
    int32_t n_heads, n_kv_heads;
    int32_t n_shares;                             /* of the plan; the grid is dec_blocks of them */
    float scale;                                  /* > 0 */
    float *workspace;                             /* dec_workspace_bytes */
    uint32_t *arrived;                            /* [n_shares]: zero before, zero after */
    struct sm90_counts *seq_counts, *head_counts; /* or NULL */
    /* May begin before the kernel ahead of it on the stream has ended (core/early.cuh). What
     * precedes is a kernel then, and the plan and all keys and values before the sequences'
     * positions are of kernels that have ended before that one begins. */
    bool early;
    int32_t t_blocks; /* ABS: >= 1 */
    int64_t t_layer;  /* ABS: where the layer's thresholds begin in a sequence's t */
};

/* n_shares for a device. */
static inline int32_t dec_shares(int32_t n_sms)
{
    return n_sms * DEC_BLOCKS * (1 + DEC_SPARE);
}

/* dtype: 0 bf16, 1 f16; gate: SM90_GATE_*. Returns a cudaError_t as int. */
int decode_sm90_launch(const struct sm90_maps *maps, const struct dec_args *args, int head_dim,
                       int dtype, int gate, void *stream);

#ifdef __cplusplus
}
#endif
#endif
