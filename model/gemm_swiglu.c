#include "model/gemm_swiglu.h"

#include "model/gemm_swiglu_args.h"

#include <cuda_runtime_api.h>

enum { LEAST_ROUNDS = 6 /* the last one may be nearly empty */ };

bool gemm_swiglu_fills(int32_t rows, int32_t n, int32_t multiprocessors)
{
    const int64_t tiles =
        ((int64_t)rows + SWIGLU_ROWS - 1) / SWIGLU_ROWS * ((n / 2 + SWIGLU_COLS - 1) / SWIGLU_COLS);
    return tiles >= (int64_t)LEAST_ROUNDS * multiprocessors;
}

int gemm_swiglu_run(gemm_map_fn map, const struct gemm_skinny *p, int dtype, void *stream)
{
    struct swiglu_args s = {.rows = p->rows, .width = p->n / 2, .k = p->k};
    if (p->n % 16 || p->k % 8)
        return (int)cudaErrorInvalidValue;
    int err = gemm_map(map, &s.w, p->w, p->n, p->k, 64, dtype);
    if (err == (int)cudaSuccess)
        err = gemm_map(map, &s.x, p->x, p->rows, p->k, SWIGLU_ROWS, dtype);
    if (err == (int)cudaSuccess)
        err = gemm_map(map, &s.y, p->y, p->rows, s.width, 64, dtype);
    return err == (int)cudaSuccess ? gemm_swiglu_launch(&s, dtype, stream) : err;
}
