/* What attn_cuda.c (memory, policy, launches), attn_cuda_plan.c (steps) and attn_cuda_rel.c (counts
 * for calibration) share. */
#ifndef ATTENTION_ATTN_CUDA_INTERNAL_H
#define ATTENTION_ATTN_CUDA_INTERNAL_H

#include "attention/attn_cuda.h"
#include "attention/attn_decode_sm90.h"
#include "attention/attn_lost_cuda.h"
#include "attention/attn_sm90_plan.h"

/* Consecutive rows of one sequence that one kernel takes. */
struct attn_part {
    int32_t seq; /* of the step */
    int32_t row, n_rows, pos;
    bool prompt;        /* under the sequence's gate */
    int32_t sample_end; /* > 0: lost mass is measured on rows of a prompt that ends there */
    const void *pages;  /* device */
};

/* One launch a layer. DECODE is the decode kernel's; those before it are the prefill kernel's, one
 * for each gate and gate_rows that a step has, and for all prompts without a gate the first: those
 * of rows before the cut, and from SECOND on those of the others. */
enum attn_launch { LAUNCH_PREFILL, LAUNCH_SECOND = 4, LAUNCH_DECODE = 8, N_LAUNCHES };

struct attn_group {
    struct attn_part *parts; /* [attn_cuda_max_parts] */
    int32_t n_parts;
    int gate; /* SM90_GATE_*; DECODE: NONE, or ABS where a row has that */
    int32_t gate_rows;
    const struct sm90_seq *seqs; /* device; prefill: layer l's start at l * seq_stride */
    int32_t seq_stride;
    const struct sm90_tile *tiles; /* device */
    int32_t n_tiles;
    const struct sm90_tile *last_tiles; /* of the last layer, where that computes less */
    int32_t n_last_tiles;
    struct sm90_counts *counts; /* device, [n_parts] */
    int32_t first_count;        /* where they are among those of the step */
};

/* Thresholds of the rank's heads, densely, as struct attn_thresholds names their sizes. */
struct attn_table {
    float *t; /* device [n_levels, n_layers, n_heads, n_blocks] or NULL */
    size_t bytes;
};

/* The decode plan of layers whose heads visit alike. */
struct attn_dec_plan {
    int32_t layer;                  /* the first of them */
    const struct dec_piece *pieces; /* device */
    const int32_t *first;
};

/* Rows whose lost mass is measured. The decode kernel computes them without a gate, each a sequence
 * of its own, for their LSE; their output, which the prefill kernel then overwrites, is nobody's.
 */
struct attn_samples {
    int32_t n;
    const struct dec_seq *seqs; /* device, as all that follows */
    const struct dec_piece *pieces;
    const int32_t *first;
    const struct attn_lost_row *rows;
    float *dense, *kept; /* [max_rows, n_heads] LSE */
};

struct attn_cuda {
    struct attn_cuda_config cfg;
    struct sm90_shape shape;
    struct dec_shape dec_shape;
    int n_sms;
    size_t l2_bytes;
    struct sm90_maps *maps; /* [n_layers] */
    /* the policy */
    struct attn_policy policy;
    struct attn_table abs, decode, abs_pages, rel_128, rel_64;
    struct sm90_visit *visit; /* device [n_layers, n_heads] or NULL */
    size_t visit_bytes;
    struct attn_dec_plan *plans; /* [n_plans] */
    int32_t n_plans;
    int32_t *plan_of; /* [n_layers] */
    /* device scratch */
    void *scratch;
    size_t scratch_bytes;
    uint32_t *queue, *arrived;
    float *workspace;
    struct sm90_counts *head_counts; /* [n_layers, n_heads] */
    struct attn_cuda_probe probe;
    struct attn_rel_counts rel; /* bins NULL: nothing is counted */
    struct attn_samples samples;
    /* the step */
    struct attn_group groups[N_LAUNCHES];
    const struct attn_rows *last; /* while it is planned: struct attn_cuda_step; NULL */
    bool narrow;                  /* the last layer has tiles of its own */
    struct sm90_seq *last_seqs;   /* [attn_cuda_max_parts] what it computes, while it is planned */
    const struct dec_seq *dec_seqs; /* device */
    struct sm90_counts *counts;     /* device, of all parts */
    bool cut_runs;                  /* generated rows of one sequence are in several parts */
    int32_t cut;                    /* the first row of the second half; 0: there is none */
    int decode_half; /* where all generated rows are; -1: in both, or there are none */
};

/* attn_cuda_plan.c. Of a step in one launch. */
int32_t attn_cuda_max_parts(const struct attn_cuda *a, int launch);

/* attn_cuda_rel.c. Counts for the prompt rows of a launch of the prefill kernel. */
MUST_CHECK int attn_cuda_count_rel(const struct attn_cuda *a, const struct attn_group *g,
                                   int layer);

#endif
