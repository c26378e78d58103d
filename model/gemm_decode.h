/* y = x w^T for the rows of a decode step, up to 32, on a Hopper GPU: a product that costs reading
 * w once. gemm_cublas.c times it beside the library and gemm_skinny.h.
 *
 *   x [rows, k], w [n, k] of one 16-bit dtype; y [rows, n] of that dtype or f32; rows 1 to 32
 *   k divides by 8; 16-byte aligned
 *
 * f32 accumulation in a fixed order: equal inputs give equal bits, and a row's bits do not depend
 * on the other rows, nor on how many they are. What follows on the products in a layer can
 * be done at their end, with the same roundings as by the kernels that it stands for.
 *
 * Launched so that it may begin while the kernel before it ends (core/early.cuh): it starts to read
 * w, and waits before it reads x or writes y. w must not be written by kernels. */
#ifndef MODEL_GEMM_DECODE_H
#define MODEL_GEMM_DECODE_H

#include "core/err.h"
#include "model/gemm_decode_args.h"

struct gemm_decode;

MUST_CHECK int gemm_decode_open(struct gemm_decode **out, struct err_msg *why);
void gemm_decode_close(struct gemm_decode *g); /* accepts NULL */
/* append: with GEMM_DECODE_APPEND, else NULL. dtype: 0 bf16, 1 f16. Enqueued on stream (a
 * cudaStream_t); returns a cudaError_t. */
int gemm_decode_run(const struct gemm_decode *g, const struct gemm_skinny *p,
                    enum gemm_decode_mode mode, const struct kv_append *append, int dtype,
                    void *stream);

#endif
