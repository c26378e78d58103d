/* The end of measuring lost softmax mass on a GPU (attn_lost.h): what the sampled rows' two LSEs
 * say goes into counters. */
#ifndef ATTENTION_ATTN_LOST_CUDA_H
#define ATTENTION_ATTN_LOST_CUDA_H

#include "attention/attn_sm90.h"

#ifdef __cplusplus
extern "C" {
#endif

struct attn_lost_row {
    int32_t row;    /* of the LSEs */
    int32_t counts; /* index of its counters */
};

/* The two LSEs are of kernels that sum in another order: what is lost below this is rounding and
 * counts as nothing. */
#define ATTN_LOST_ROUNDING 0x1p-16f

struct attn_lost_args {
    const struct attn_lost_row *rows; /* device [n_rows] */
    int32_t n_rows, n_heads;
    const float *kept, *dense;  /* device [rows, n_heads] */
    struct sm90_counts *counts; /* lost is added to */
};

/* Returns a cudaError_t as int. */
int attn_lost_launch(const struct attn_lost_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif
