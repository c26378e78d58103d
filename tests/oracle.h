/* Attention as the definition in attention/policy.h reads, one score at a time in double precision.
 * Knows nothing of the kernels but their data types. Slow on purpose: no tiles, no online softmax,
 * no order of summation that a kernel might share. */
#ifndef TESTS_ORACLE_H
#define TESTS_ORACLE_H

#include "attention/attention.h"

struct oracle {
    double *out;                     /* [n_rows, n_heads, head_dim], dense rows */
    double *lse;                     /* [n_rows, n_heads] */
    float *out_f32;                  /* the same sums in f32, for the kernels' error bound */
    float *lse_f32;                  /* likewise */
    double *lost;                    /* [n_rows, n_heads] softmax mass of pages not kept; or NULL */
    struct attn_counts *seq_counts;  /* [n_seqs] added to */
    struct attn_counts *head_counts; /* [n_heads] added to */
    double *tile_max;                /* layout of p->tile_max, or NULL */
    double margin; /* smallest distance of a decision from its threshold: near 0 it is a tie */
};

/* All outputs may be NULL but out and lse. Row r of q is row r of out. */
void oracle_attention(struct oracle *o, const struct attn_problem *p, const struct kv_view *kv,
                      const struct attn_policy *policy);

#endif
