/* The pointwise and row-wise operations of a Llama layer on a CUDA device: the launchers of
 * nn_cuda.cu, asynchronous on `stream` (a cudaStream_t), capturable in a graph. They return a
 * cudaError_t as int. dtype: 0 bf16, 1 f16, of everything that is void *. Arithmetic in f32, one
 * rounding of each result. A row's bits depend on the row alone, not on n. Any width works; widths
 * that divide by 8, over 16-byte aligned memory, are fast. Pointers are device memory; n may be 0.
 */
#ifndef MODEL_NN_CUDA_H
#define MODEL_NN_CUDA_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* out [n, width] = rows ids[i] of table [n_table, width]; zeros where ids[i] is no row of it. */
int nn_cuda_gather(void *out, const void *table, const int32_t *ids, int32_t n, int32_t width,
                   int32_t n_table, int dtype, void *stream);

/* residual += x + more + bias, rounded once; out = residual / sqrt(mean(residual^2) + eps) *
 * weight, from the rounded sum, as transformers does. */
struct nn_cuda_norm {
    void *out;        /* [n, width]; NULL: only the sum */
    void *residual;   /* [*, width], in and out; unchanged where x is NULL */
    const void *x;    /* [*, width]; NULL: nothing is added */
    const void *more; /* added to x, before the residual: row r of share j at r + j * more_rows, j <
                         n_more */
    int32_t n_more;   /* 0: nothing; with x only */
    int64_t more_rows;
    const void *bias;    /* [width] or NULL; with x only */
    const void *weight;  /* [width] */
    const int32_t *rows; /* NULL, or [n] distinct: out[i] comes from row rows[i] of residual and x,
                            and only those rows of residual change (the last norm of a step) */
    int32_t n, width;
    float eps;
    bool early; /* what precedes on the stream is a kernel: begin while it ends (core/early.cuh) */
};
int nn_cuda_residual_norm(const struct nn_cuda_norm *p, int dtype, void *stream);

/* out [n, width] = silu(g) * u, rows of gate_up are g [width], u [width]; bias [2 width] or NULL is
 * added to gate_up first. Begins while a kernel before it ends. */
int nn_cuda_swiglu(void *out, const void *gate_up, const void *bias, int32_t n, int32_t width,
                   int dtype, void *stream);
/* x [n, width] += bias [width] */
int nn_cuda_add_bias(void *x, const void *bias, int32_t n, int32_t width, int dtype, void *stream);
/* Conversions of n elements. */
int nn_cuda_to_f32(float *out, const void *x, int64_t n, int dtype, void *stream);
int nn_cuda_from_f32(void *out, const float *x, int64_t n, int dtype, void *stream);

/* Random weights: element (r, c) of a whole matrix with `pitch` columns is mean + std *
 * normal(seed, r * pitch + c), whichever part of it is filled, so that every sharding has the same
 * model. */
struct nn_cuda_fill {
    void *out; /* [n_rows, n_cols], the part that starts at (row, col) */
    int64_t n_rows, n_cols;
    int64_t row, col, pitch;
    uint64_t seed;
    float mean, std;
};
int nn_cuda_fill_normal(const struct nn_cuda_fill *f, int dtype, void *stream);

#ifdef __cplusplus
}
#endif
#endif
