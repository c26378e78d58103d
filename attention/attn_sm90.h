/* What the Hopper prefill kernel reads: plain data on the device, filled by attn_sm90_plan.c.
 * The tile list belongs to a step and serves all its layers; maps and arguments belong to a layer.
 */
#ifndef ATTENTION_ATTN_SM90_H
#define ATTENTION_ATTN_SM90_H

#include <cuda.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ABS_MAX: ABS that writes page maxima as well. Of sequences that are steered REL also does what is
 * ABS. */
enum { SM90_GATE_NONE, SM90_GATE_ABS, SM90_GATE_REL, SM90_GATE_ABS_MAX };
enum { SM90_ORDER_DIAG_SINK_R2L, SM90_ORDER_L2R };

/* Two query blocks of one sequence that a thread block computes side by side, with K loaded once
 * for both: either of one head, the second block following the first, or the same block of two
 * heads of one KV head. kv_head follows from head: the kernel has no registers to divide in. */
struct sm90_tile {
    int32_t block[2]; /* absolute position / 128; the second may be -1: none */
    uint16_t head[2], kv_head, seq;
};

struct sm90_seq {
    int32_t row, n_rows, pos; /* as in struct attn_seq */
    int32_t gate_rows;        /* 128 or 64: in what units pages are counted */
    const int32_t *pages;     /* device */
    const float *t;           /* ABS: [n_heads, n_blocks] of this level and layer; NULL: dense */
    /* Steered, [n_heads] of this level and layer. REL: densities, those of the next level
     * keep_level_stride further; ABS: pages. */
    const float *keep;
    float ln_lambda;     /* REL: -inf is dense; ABS that is steered: not that */
    float steer, blend;  /* see struct attn_choice; the kernels of REL alone steer */
    int32_t is_absolute; /* in the kernels of REL: the gate is a threshold, as with ABS */
};

/* Visit of one head: pages [0, sink) and the `local` pages before the diagonal. local < 0: all. */
struct sm90_visit {
    int32_t sink, local;
};

/* See struct attn_counts. The kernels count the first three. */
struct sm90_counts {
    unsigned long long reachable, visited, kept, sampled, lost;
};

/* Boxes: of q 128 rows of half a head (64 elements), of k and v a whole page of a KV head. */
struct sm90_maps {
    CUtensorMap q, k, v;
};

struct sm90_args {
    const struct sm90_tile *tiles;
    int32_t n_tiles;
    uint32_t *queue; /* [2] next tile, finished thread blocks: zero before, zero after */
    const struct sm90_seq *seqs;
    const struct sm90_visit *visit; /* [n_heads] or NULL */
    void *out;
    float *lse; /* or NULL */
    int64_t out_stride;
    int32_t n_heads, n_kv_heads;
    int32_t n_pages;
    int32_t order;
    int32_t gate_rows; /* 128 or 64: of all sequences that have a gate */
    int32_t t_blocks;
    int64_t t_head_stride, keep_level_stride;
    float scale;
    float scale_log2, inv_scale;                  /* filled in by the launch */
    struct sm90_counts *seq_counts, *head_counts; /* or NULL */
    /* ABS_MAX: the largest raw score (before the scale) of a row group's rows in each page before
     * its block, as integers in the order of the floats: bits of one that is not negative, bits ^
     * 0x7fffffff of a negative one, 0x7fffffff of NaN. Group 0 begins with the block of the one
     * sequence's first row. By atomic maximum: set all bytes to 0x80 before. */
    int32_t *page_max; /* [n_heads, max_groups, max_pages] */
    int32_t max_groups, max_pages;
};

/* dtype: 0 bf16, 1 f16. Returns a cudaError_t as int. */
int sm90_prefill_launch(const struct sm90_maps *maps, const struct sm90_args *args, int head_dim,
                        int dtype, int gate, int n_sms, void *stream);

#ifdef __cplusplus
}
#endif
#endif
