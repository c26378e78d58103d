/* y = x w^T for a few rows of x on a Hopper GPU: a product that costs reading w once. gemm_cublas.c
 * times it beside the library.
 *
 *   x [rows, k], w [n, k] of one 16-bit dtype; y [rows, n] of that dtype or f32; rows 1 to 16
 *   k divides by 8; 16-byte aligned
 *
 * f32 accumulation in a fixed order: equal inputs give equal bits, and a row's bits do not depend
 * on the other rows, nor on how many they are, as long as the variant is the same. What follows on
 * the products in a layer can be done at their end, with the same roundings as by the kernels that
 * it stands for.
 *
 * Launched so that it may begin while the kernel before it ends (core/early.cuh): it starts to read
 * w, and waits before it reads x or writes y. w must not be written by kernels.
 *
 * variant: 1 to GEMM_SKINNY_VARIANTS. dtype: 0 bf16, 1 f16. All return a cudaError_t as int. */
#ifndef MODEL_GEMM_SKINNY_H
#define MODEL_GEMM_SKINNY_H

#include "kvcache/kv_store_cuda.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    GEMM_SKINNY_ROWS = 16,
    GEMM_SKINNY_VARIANTS = 2 /* 1: 16 rows of w at a time; 2: 32, less traffic for x */
};

struct gemm_skinny {
    void *y;
    const void *x, *w;
    int32_t rows, n, k;
    const void *bias; /* [n] or NULL; gemm_skinny_swiglu only */
    /* [2] on the device, zeros; left so. Not that of one of the three launches before, which may
     * still be at work. */
    uint32_t *queue;
};

/* y_f32: y is f32. */
int gemm_skinny_launch(const struct gemm_skinny *p, int variant, int dtype, int y_f32,
                       void *stream);
/* y [rows, n / 2] = silu(g) * u of the dtype, where g and u are the halves of x w^T, rounded to it,
 * and bias: nn_cuda_swiglu. n is even. */
int gemm_skinny_swiglu(const struct gemm_skinny *p, int variant, int dtype, void *stream);
/* x w^T is rows of qkv, and kv_append_cuda follows: q of rows that have a slot goes to a->qkv, k
 * and v to their pages. y is not used. n is that of a's heads, rows a->n_rows. */
int gemm_skinny_append(const struct gemm_skinny *p, const struct kv_append *a, int variant,
                       int dtype, void *stream);

#ifdef __cplusplus
}
#endif
#endif
