/* One thread block a query head and query block: reads the block's page maxima once, sorts them in
 * shared memory, and takes every level's two neighbours. A sort and not a selection: a selection's
 * cost grows with the levels, and all of this is small beside the attention that made the maxima.
 * Bitonic, because it is in place, and 16384 maxima fill 64 KiB. Padding is the least integer,
 * behind every score. */
#include "calibration/select_cuda.h"

#include <cuda_runtime.h>

#define THREADS 256

/* Descending. n is a power of two. Pairs of a stride up to a warp's width stay within the warp. */
__device__ void sort(int32_t *v, int32_t n)
{
    for (int32_t size = 2; size <= n; size *= 2) {
        for (int32_t stride = size / 2; stride > 0; stride /= 2) {
            for (int32_t i = threadIdx.x; i < n / 2; i += THREADS) {
                const int32_t at = 2 * i - (i & (stride - 1));
                const int32_t a = v[at], b = v[at + stride];
                const bool descending = (at & size) == 0;
                if ((a < b) == descending) {
                    v[at] = b;
                    v[at + stride] = a;
                }
            }
            if (stride > 32 || stride == 1)
                __syncthreads();
            else
                __syncwarp();
        }
    }
}

__device__ __forceinline__ float score(int32_t x)
{
    return __int_as_float(x < 0 ? x ^ 0x7fffffff : x);
}

/* Loads a row group's maxima and pads them to a power of two. Whether all of them are numbers. */
__device__ bool load(int32_t *v, const int32_t *row, int32_t available, int32_t n)
{
    bool good = true;
    for (int32_t i = threadIdx.x; i < n; i += THREADS) {
        const int32_t x = i < available ? row[i] : INT32_MIN;
        if (i < available)
            good = good && x != SELECT_CUDA_EMPTY && isfinite(score(x));
        v[i] = x;
    }
    return __syncthreads_and(good);
}

__global__ void __launch_bounds__(THREADS) midpoints(const __grid_constant__ struct select_cuda s)
{
    extern __shared__ int32_t v[];
    const int32_t block = s.first_block + (int32_t)blockIdx.x, head = (int32_t)blockIdx.y;
    const int32_t available = 2 * block, halves = 128 / s.gate_rows;
    int32_t n = 2;
    while (n < available)
        n *= 2;
    double *t = s.t + head * s.head_stride + block;
    for (int32_t half = 0; half < halves; half++) {
        const int64_t group = (int64_t)head * s.max_groups + (int32_t)blockIdx.x * halves + half;
        const bool good = load(v, s.max + group * s.max_pages, available, n);
        sort(v, n);
        for (int32_t i = threadIdx.x; i < s.n_levels; i += THREADS) {
            const int32_t k = s.k[i];
            double mid = good ? -INFINITY : NAN;
            if (good && k < available)
                mid = ((double)(score(v[k - 1]) * s.scale) + (double)(score(v[k]) * s.scale)) / 2 /
                      halves;
            if (half > 0)
                mid += t[i * s.level_stride];
            t[i * s.level_stride] = mid;
        }
        __syncthreads(); /* the next half overwrites what the levels were taken from */
    }
}

int select_cuda_launch(const struct select_cuda *s, void *stream)
{
    const int64_t pages = 2 * ((int64_t)s->first_block + s->n_blocks - 1);
    int32_t n = 2;
    if (s->n_heads < 1 || s->n_heads > 65535 || s->first_block < 0 || s->n_blocks < 0 ||
        s->n_levels < 1 || s->n_levels > SELECT_CUDA_MAX_LEVELS || !(s->scale > 0.0f) ||
        (s->gate_rows != 128 && s->gate_rows != 64))
        return (int)cudaErrorInvalidValue;
    if (s->n_blocks == 0)
        return (int)cudaSuccess;
    if (pages > SELECT_CUDA_MAX_PAGES || pages > s->max_pages ||
        (int64_t)s->n_blocks * (128 / s->gate_rows) > s->max_groups)
        return (int)cudaErrorInvalidValue;
    while (n < pages)
        n *= 2;
    const cudaError_t err =
        cudaFuncSetAttribute(midpoints, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             SELECT_CUDA_MAX_PAGES * (int)sizeof(int32_t));
    if (err != cudaSuccess)
        return (int)err;
    const dim3 grid((unsigned)s->n_blocks, (unsigned)s->n_heads);
    midpoints<<<grid, THREADS, (size_t)n * sizeof(int32_t), (cudaStream_t)stream>>>(*s);
    return (int)cudaGetLastError();
}
