#include "model/gemm_swiglu.h"

#include "model/gemm_swiglu_args.h"

#include <cuda_runtime_api.h>

enum { LEAST_ROUNDS = 6 /* the last one may be nearly empty */ };

struct gemm_swiglu gemm_swiglu_open(void)
{
    struct gemm_swiglu g = {.map = gemm_map_open(), .multiprocessors = 1};
    int device = 0, n = 0;
    if (cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) == cudaSuccess)
        g.multiprocessors = n;
    return g;
}

static int64_t tiles_of(int32_t rows, int32_t row_tile, int32_t width)
{
    const int64_t down = ((int64_t)rows + row_tile - 1) / row_tile;
    return down * ((width + SWIGLU_COLS - 1) / SWIGLU_COLS);
}

bool gemm_swiglu_fills(const struct gemm_swiglu *g, int32_t rows, int32_t n)
{
    return tiles_of(rows, SWIGLU_ROWS, n / 2) >= (int64_t)LEAST_ROUNDS * g->multiprocessors;
}

int gemm_swiglu_run(const struct gemm_swiglu *g, const struct gemm_skinny *p, int dtype,
                    void *stream)
{
    struct swiglu_args s = {.rows = p->rows, .width = p->n / 2, .k = p->k};
    if (!g->map || p->rows < 1 || p->n < 16 || p->n % 16 || p->k < 8 || p->k % 8)
        return (int)cudaErrorInvalidValue;
    int err = gemm_map(g->map, &s.w, p->w, p->n, p->k, 64, dtype);
    if (err == (int)cudaSuccess)
        err = gemm_map(g->map, &s.x, p->x, p->rows, p->k, SWIGLU_ROWS, dtype);
    if (err == (int)cudaSuccess)
        err = gemm_map(g->map, &s.y, p->y, p->rows, s.width, 64, dtype);
    if (err != (int)cudaSuccess)
        return err;
    const int64_t n = tiles_of(s.rows, SWIGLU_BLOCKS * SWIGLU_ROWS, s.width);
    const int64_t most = g->multiprocessors / SWIGLU_BLOCKS;
    return gemm_swiglu_launch(&s, (int32_t)(n < most ? n : most), dtype, stream);
}
