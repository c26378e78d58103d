/* Appending to pages and copying them, both limited by memory bandwidth.
 *
 * append: one thread block a row of qkv. A thread takes 16 bytes of a head's first half and the 16
 * bytes of the second half that they rotate with; a V head is the same pair without the rotation.
 * Every byte is read once, q is written in place, K and V go to their pages. The row's cosines and
 * sines (512 bytes for heads of 128) come from L1. Few rows: all pairs of a row at once, for the
 * latency; many: small thread blocks, so that an SM has many rows in different stages.
 *
 * copy: a thread block moves 16 KiB of one pool's page, four 16-byte loads in flight a thread. */
#include "core/early.cuh"
#include "core/pack.cuh"
#include "kvcache/kv_store_cuda.h"
#include "kvcache/kv_tails.cuh"

#include <cuda_runtime.h>

enum {
    APPEND_THREADS = 384,
    APPEND_MANY = 128, /* threads where rows abound */
    APPEND_MANY_ROWS = 1024,
    COPY_THREADS = 256,
    COPY_UNROLL = 4,
    COPY_LAYERS = 128
};

struct row_place {
    int64_t tile; /* element of the pools where the row's page starts, head 0 */
    int in_page;
};

/* W numbers of a head's first half and those that they rotate with. */
template <typename T, int W>
struct pairs {
    pack<T, W> lo, hi;
};

template <typename T, int W>
__device__ __forceinline__ struct pairs<T, W> load_pairs(const T *p, int half) {
    return {*(const pack<T, W> *)p, *(const pack<T, W> *)(p + half)};
}

template <typename T, int W>
__device__ __forceinline__ void append_pairs(const struct kv_append &a, struct pairs<T, W> x,
                                             T *row, const float *table, struct row_place at,
                                             int head, int i)
{
    const int d = a.head_dim, half = d / 2, col = head * d + i;
    float lo[W], hi[W];
#pragma unroll
    for (int j = 0; j < W; j++)
        lo[j] = to_f32(x.lo.v[j]), hi[j] = to_f32(x.hi.v[j]);
    if (a.bias) {
        float b_lo[W], b_hi[W];
        load_pack<W>(b_lo, (const T *)a.bias + col);
        load_pack<W>(b_hi, (const T *)a.bias + col + half);
#pragma unroll
        for (int j = 0; j < W; j++)
            lo[j] += b_lo[j], hi[j] += b_hi[j];
    }
    const int kv_head = head - a.n_heads, v_head = kv_head - a.n_kv_heads;
    if (v_head < 0) {
        float c[W], s[W];
        load_table<W>(c, table + i);
        load_table<W>(s, table + half + i);
#pragma unroll
        for (int j = 0; j < W; j++) {
            const float first = lo[j], second = hi[j];
            lo[j] = first * c[j] - second * s[j];
            hi[j] = second * c[j] + first * s[j];
        }
    }
    T *out = row + col;
    if (kv_head >= 0) {
        T *pool = (T *)(v_head < 0 ? a.k : a.v);
        const int h = v_head < 0 ? kv_head : v_head;
        out = pool + at.tile + ((int64_t)h * KV_PAGE_TOKENS + at.in_page) * d + i;
    }
    store_pack<W>(out, lo);
    store_pack<W>(out + half, hi);
}

template <typename T, int W>
__global__ void __launch_bounds__(APPEND_THREADS, 2)
    append_row(const __grid_constant__ struct kv_append a)
{
    const int n = blockIdx.x, half = a.head_dim / 2, lanes = half / W;
    const int units = (a.n_heads + 2 * a.n_kv_heads) * lanes;
    int u = threadIdx.x, head = u / lanes, i = u % lanes * W;
    T *row = (T *)a.qkv + n * a.stride;
    struct pairs<T, W> x;
    begin_next();
    wait_for_inputs();
    if (u < units) /* asked for before the slot is known */
        x = load_pairs<T, W>(row + head * a.head_dim + i, half);
    const int slot = a.slots[n];
    if (slot < 0)
        return;
    const float *table = a.cos_sin + (int64_t)a.positions[n] * a.head_dim;
    const struct row_place at = {(int64_t)(slot / KV_PAGE_TOKENS) * a.n_kv_heads * KV_PAGE_TOKENS *
                                     a.head_dim,
                                 slot % KV_PAGE_TOKENS};
    while (u < units) {
        append_pairs<T, W>(a, x, row, table, at, head, i);
        u += blockDim.x, head = u / lanes, i = u % lanes * W;
        if (u < units)
            x = load_pairs<T, W>(row + head * a.head_dim + i, half);
    }
    const int tail = a.tails[n];
    for (int h = threadIdx.x / 32; tail > 0 && h < a.n_kv_heads; h += blockDim.x / 32)
        clear_tail<T>(a, slot, tail, h);
}

template <typename T>
static cudaError_t launch_append(const struct kv_append *a, cudaStream_t stream)
{
    const bool wide = a->head_dim % (2 * PACK) == 0 && a->stride % PACK == 0 && aligned16(a->qkv) &&
                      aligned16(a->bias) && aligned16(a->cos_sin) && aligned16(a->k) &&
                      aligned16(a->v);
    const int pairs = (a->n_heads + 2 * a->n_kv_heads) * (a->head_dim / 2);
    const int units = wide ? pairs / PACK : pairs;
    const int most = a->n_rows < APPEND_MANY_ROWS ? APPEND_THREADS : APPEND_MANY;
    const int threads = units < most ? (units + 31) / 32 * 32 : most;
    const struct launch l = {dim3((unsigned)a->n_rows), (unsigned)threads, 0, true, stream};
    return wide ? launch_early(append_row<T, PACK>, l, *a) : launch_early(append_row<T, 1>, l, *a);
}

int kv_append_cuda(const struct kv_append *a, int dtype, void *stream)
{
    if (a->head_dim < 2 || a->head_dim % 2 || a->n_heads < 1 || a->n_kv_heads < 1 || a->n_rows < 0)
        return (int)cudaErrorInvalidValue;
    if (a->n_rows == 0)
        return 0;
    return (int)(dtype == 0 ? launch_append<__nv_bfloat16>(a, (cudaStream_t)stream)
                            : launch_append<__half>(a, (cudaStream_t)stream));
}

/* Pools of up to COPY_LAYERS layers, K and V. */
struct copy_args {
    uint4 *pools[2 * COPY_LAYERS];
    const int32_t *pairs;
    int64_t page; /* 16-byte units of one pool's page */
    int blocks;   /* thread blocks that share a page */
};

__global__ void __launch_bounds__(COPY_THREADS)
    copy_pages(const __grid_constant__ struct copy_args a)
{
    const int pair = blockIdx.x / a.blocks;
    uint4 *pool = a.pools[blockIdx.y];
    uint4 *dst = pool + a.pairs[2 * pair] * a.page;
    const uint4 *src = pool + a.pairs[2 * pair + 1] * a.page;
    const int64_t first =
        (int64_t)(blockIdx.x % a.blocks) * COPY_THREADS * COPY_UNROLL + threadIdx.x;
    uint4 x[COPY_UNROLL];
#pragma unroll
    for (int i = 0; i < COPY_UNROLL; i++)
        if (first + i * COPY_THREADS < a.page)
            x[i] = src[first + i * COPY_THREADS];
#pragma unroll
    for (int i = 0; i < COPY_UNROLL; i++)
        if (first + i * COPY_THREADS < a.page)
            dst[first + i * COPY_THREADS] = x[i];
}

int kv_copy_pages_cuda(const struct kv_view *kv, const int32_t *pairs, int32_t n_pairs,
                       void *stream)
{
    struct copy_args a;
    const int64_t per_block = COPY_THREADS * COPY_UNROLL;
    a.pairs = pairs;
    a.page = (int64_t)(kv_tile_offset(kv, 1, 0) * dtype_bytes(kv->dtype) / sizeof(uint4));
    a.blocks = (int)((a.page + per_block - 1) / per_block);
    if (n_pairs == 0)
        return 0;
    for (int32_t first = 0; first < kv->n_layers; first += COPY_LAYERS) {
        const int n = kv->n_layers - first < COPY_LAYERS ? kv->n_layers - first : COPY_LAYERS;
        for (int i = 0; i < n; i++) {
            a.pools[2 * i] = (uint4 *)kv->k[first + i];
            a.pools[2 * i + 1] = (uint4 *)kv->v[first + i];
        }
        const dim3 grid((unsigned)n_pairs * (unsigned)a.blocks, 2 * (unsigned)n);
        copy_pages<<<grid, COPY_THREADS, 0, (cudaStream_t)stream>>>(a);
        cudaError_t e = cudaGetLastError();
        if (e != cudaSuccess)
            return (int)e;
    }
    return 0;
}
