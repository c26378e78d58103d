/* y = silu(x g^T) * (x u^T) for many rows of x on a Hopper GPU, g and u the halves of w's rows: a
 * product of a prompt's chunk whose results never leave the multiprocessor. gemm_cublas.c times it
 * beside the library's product and nn_cuda_swiglu, of whose roundings it makes the same.
 *
 *   p: x [rows, k], w [n, k] of one 16-bit dtype, y [rows, n / 2]; no bias; queue is not used
 *   n divides by 16, k by 8; 16-byte aligned
 *
 * Equal inputs give equal bits; a row's bits do not depend on other rows. */
#ifndef MODEL_GEMM_SWIGLU_H
#define MODEL_GEMM_SWIGLU_H

#include "model/gemm_map.h"
#include "model/gemm_skinny.h"

#include <stdbool.h>

struct gemm_swiglu {
    gemm_map_fn map;
    int32_t multiprocessors;
};

/* For the current device. */
struct gemm_swiglu gemm_swiglu_open(void);
/* Whether so many rows fill the device's multiprocessors for several rounds of tiles, as it needs
 * to be the faster way. */
bool gemm_swiglu_fills(const struct gemm_swiglu *g, int32_t rows, int32_t n);
/* dtype: 0 bf16, 1 f16. Enqueued on stream (a cudaStream_t); returns a cudaError_t. */
int gemm_swiglu_run(const struct gemm_swiglu *g, const struct gemm_skinny *p, int dtype,
                    void *stream);

#endif
