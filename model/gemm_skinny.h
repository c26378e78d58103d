/* y = x w^T for a few rows of x on a Hopper GPU: a product that costs reading w once. cuBLAS is at
 * two thirds of the memory's rate there; gemm_cublas.c times both and takes the faster.
 *
 *   x [rows, k], w [n, k] of one 16-bit dtype; y [rows, n] of that dtype or f32; rows 1 to 16
 *   k divides by 8; 16-byte aligned
 *
 * f32 accumulation in a fixed order: equal inputs give equal bits, and a row's bits do not depend
 * on the other rows, nor on how many they are, as long as the variant is the same.
 *
 * Launched so that it may begin while the kernel before it ends (programmatic dependent launch): it
 * starts to read w, and waits before it reads x or writes y. w must not be written by kernels. */
#ifndef MODEL_GEMM_SKINNY_H
#define MODEL_GEMM_SKINNY_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    GEMM_SKINNY_ROWS = 16,
    GEMM_SKINNY_VARIANTS = 2 /* 1: 16 columns of y a thread block; 2: 32 */
};

struct gemm_skinny {
    void *y;
    const void *x, *w;
    int32_t rows, n, k;
};

/* variant 1 to GEMM_SKINNY_VARIANTS. dtype: 0 bf16, 1 f16; y_f32: y is f32. Returns a cudaError_t
 * as int. */
int gemm_skinny_launch(const struct gemm_skinny *p, int variant, int dtype, int y_f32,
                       void *stream);

#ifdef __cplusplus
}
#endif
#endif
