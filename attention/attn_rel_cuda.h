/* What the REL gate would do with prompt rows on a GPU, counted beside a dense run (struct
 * attn_rel_counts): QK once more and row maxima, nothing else. */
#ifndef ATTENTION_ATTN_REL_CUDA_H
#define ATTENTION_ATTN_REL_CUDA_H

#include "attention/attn_sm90.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Edges that a launch can have: with one bin more, a bin a lane. */
enum { ATTN_REL_MAX_EDGES = 31 };

/* Consecutive prompt rows of one sequence in one layer; all memory is the device's. */
struct attn_rel_args {
    const void *q; /* [rows, n_heads, head_dim], q_stride elements between rows; not scaled */
    const void *k; /* [n_pages, n_kv_heads, 64, head_dim] */
    int64_t q_stride;
    int32_t row, n_rows, pos;       /* as in struct attn_seq */
    const int32_t *pages;           /* covering pos + n_rows tokens */
    const struct sm90_visit *visit; /* [n_heads] or NULL */
    int32_t n_heads, n_kv_heads;
    int32_t order; /* SM90_ORDER_* */
    float scale;
    const float *edges; /* [n_edges], increasing */
    int32_t n_edges;
    unsigned long long *bins; /* [2, n_heads, n_edges + 1], added to */
};

/* dtype: 0 bf16, 1 f16. Returns a cudaError_t as int. */
int attn_rel_launch(const struct attn_rel_args *args, int head_dim, int dtype, void *stream);

#ifdef __cplusplus
}
#endif
#endif
