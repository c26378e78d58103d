/* Attention of one layer over the paged cache, for a batch of chunks: prefill, decode and any mix
 * in one call.
 *
 *   q, out  [n_rows, n_heads, head_dim] f32 on the CPU (model dtype on a GPU), row strides q_stride
 *           and out_stride; q is rotated and NOT scaled; out may not alias q
 *   lse     [n_rows, n_heads] f32, natural log over the kept keys, or NULL
 *   kv      the pool; K/V of the chunk's own tokens are already written; n_kv_heads divides n_heads
 *   seqs    rows [row, row + n_rows) of q are the tokens at absolute positions pos.. of a sequence
 *
 * Rows at positions < prompt_end are prompt rows: grouped into absolute 128-token blocks and gated
 * by `choice`. A gated chunk starts on a multiple of 128 and ends on one or at prompt_end, so that
 * any chunking of a prompt gives the same gates. Rows at positions >= prompt_end are generated
 * rows: each stands alone and follows the decode gate of `choice`.
 *
 * Row independence (the CPU kernel; tests hold it): with gate NONE a row's output bits depend on
 * its q, its visible K/V and the page order alone; not on the other rows, the chunking, the batch,
 * the thread count, or on whether the row is a prompt row or a generated one. With a gate the same
 * holds given the block's decisions; a generated row's are its own, so that under a gate too it has
 * the same bits alone, in a chunk that computes several again, or beside other sequences. A NaN in
 * one token's q, k or v reaches only the rows that may see that token.
 *
 * Returns 0 or ERR_INVALID (attn_validate says why; a shape outside supports). CPU: synchronous.
 * Source: BSFA (arXiv 2512.07011) section 4; FlashAttention-2 (arXiv 2307.08691) section 3. */
#ifndef ATTENTION_ATTENTION_H
#define ATTENTION_ATTENTION_H

#include "attention/policy.h"
#include "core/dev.h"
#include "core/err.h"
#include "kvcache/kv_view.h"

struct attn_seq {
    int32_t row;    /* first row in q and out */
    int32_t n_rows; /* >= 1 */
    int32_t pos;    /* absolute position of that row */
    int32_t prompt_end;
    const int32_t *pages; /* page table, covering pos + n_rows tokens */
    struct attn_choice choice;
};

/* Consecutive rows of a step; n_rows 0: none. */
struct attn_rows {
    int32_t row, n_rows;
};

/* Page maxima for calibration, written for prompt rows where the problem has one sequence. Values
 * are scaled scores; masked and invisible keys do not vote; unwritten entries are left alone. max
 * [n_heads, n_groups, n_pages]: group g covers rows [g * gate_rows, ...) of the chunk, page p is
 * absolute. The chunk starts on a block, but with gate_rows 1, a group for every row, anywhere; the
 * CPU kernel alone has that, for the gate of generated rows.
 *
 * mass, where it is not NULL, has the same layout and gets the softmax mass of every page before
 * the block: the mean, over the group's rows, of the share of a row's softmax that the page's keys
 * hold. It is known when a row has met all its pages, so the kernel walks the pages a second time
 * (QK, no PV); a run with it costs up to twice the attention, and the outputs keep their bits.
 * Dense sequences and gate_rows of 128 or 64 only, and the CPU kernel alone has it. */
struct attn_tile_max {
    float *max;
    float *mass; /* NULL: none */
    int32_t n_groups, n_pages;
    int32_t gate_rows; /* 128, 64 or 1 */
};

/* What the REL gate would do in this run, for calibration: decisions of prompt rows on the pages
 * before their block, by gap = the largest, over a group's rows, of the page's maximum less the
 * running maximum. The gate skips iff gap < ln(lambda), and skipped pages never raise a maximum, so
 * a dense run knows the decisions at every lambda. A decision with exactly i of the edges <= gap
 * counts in bin i (NaN in the last): at ln(lambda) = edges[e] bins 0 to e are skipped. */
struct attn_rel_counts {
    const float *edges; /* [n_edges], increasing */
    int32_t n_edges;
    uint64_t *bins; /* [2, n_heads, n_edges + 1], added to: groups of 128 rows, of 64 rows */
};

struct attn_problem {
    int layer;
    int32_t n_heads; /* query heads of this rank */
    float scale;     /* usually 1/sqrt(head_dim) */
    const void *q;
    void *out;
    float *lse;
    int64_t q_stride, out_stride; /* elements between rows */
    const struct attn_seq *seqs;
    int32_t n_seqs;
    /* optional outputs, added to (never reset) */
    struct attn_counts *seq_counts;           /* [n_seqs], summed over heads */
    struct attn_counts *head_counts;          /* [n_heads], summed over sequences */
    struct attn_tile_max *tile_max;           /* NULL: none */
    const struct attn_rel_counts *rel_counts; /* NULL: none */
    void *workspace;                          /* attn_workspace_bytes */
};

struct attn_ops {
    const char *name;
    int (*supports)(int32_t n_heads, const struct kv_view *kv);
    size_t (*workspace_bytes)(int32_t n_heads, const struct kv_view *kv, struct dev *d);
    int (*run)(const struct attn_problem *p, const struct kv_view *kv,
               const struct attn_policy *policy, struct dev *d);
};

extern const struct attn_ops attn_cpu;

/* 0 or ERR_INVALID with the field named. */
MUST_CHECK int attn_validate(const struct attn_problem *p, const struct kv_view *kv,
                             const struct attn_policy *policy, struct err_msg *why);
/* The threshold of a block (absolute), clamped to the last row of the table. */
float attn_threshold(const struct attn_thresholds *t, int level, int layer, int head,
                     int64_t block);

#endif
