/* See gemm_swiglu.h. Bottleneck: the tensor cores, and on a card at its limit of power the energy
 * of all that moves; products and SwiGLU apart move the products to device memory and back.
 *
 * Tile: 128 rows of x by 128 columns of gate and the same 128 of up, hence 256 rows of w, in steps
 * of 64 along k. Two warpgroups multiply 64 rows each (m64n256k16; a thread has a gate and its up
 * in registers i and i + 64); one thread of a third keeps four stages on their way. A cluster of
 * two thread blocks computes tiles above each other: each loads half of w's rows for both. Clusters
 * go through tiles in turn, in bands of BAND pairs of row tiles, so that what they read at a time,
 * a band of x and some columns of w, stays in the L2 cache.
 *
 * Shared memory: 4 stages x (x 16 KiB, w 32 KiB), results 2 x 16 KiB as bulk copies take them
 * (128-byte swizzle), two barriers a stage. A stage is free when the eight multiplying warps of
 * both thread blocks have read it. Registers: 128 sums a thread. */
#include "attention/tile.cuh"
#include "core/ring.cuh"
#include "model/gemm_map.h"
#include "model/gemm_swiglu.cuh"
#include "model/gemm_swiglu_args.h"
#include "model/swiglu.cuh"

#include <cuda_runtime.h>
#include <type_traits>

enum {
    S = SWIGLU_BLOCKS,
    STAGES = 4,
    GROUPS = 2, /* warpgroups that multiply */
    WARPS = 4 * GROUPS,
    THREADS = 128 * (GROUPS + 1),
    BAND = 8, /* pairs of row tiles */
    X_BYTES = SWIGLU_ROWS * GEMM_MAP_COLUMNS * 2,
    BOX_BYTES = 64 * GEMM_MAP_COLUMNS * 2, /* of w, and of y */
    W_BYTES = 4 * BOX_BYTES,
    STAGE_BYTES = X_BYTES + W_BYTES,
    OUT = STAGES * STAGE_BYTES,
    FULL = OUT + GROUPS * 2 * BOX_BYTES,
    EMPTY = FULL + 8 * STAGES,
    BYTES = EMPTY + 8 * STAGES,
    BAR_OUT = 1 /* named barriers of the warpgroups */
};
static_assert((int)BYTES <= 227 * 1024, "");

typedef struct swiglu_args args;

typedef struct ring_place<STAGES> place;

/* ---- tiles ---- */

struct tiles {
    int pairs, cols, n; /* pairs of row tiles, column tiles, their product */
};

__device__ __forceinline__ struct tiles tiles_of(const args &s)
{
    struct tiles t;
    t.pairs = (s.rows + S * SWIGLU_ROWS - 1) / (S * SWIGLU_ROWS);
    t.cols = (s.width + SWIGLU_COLS - 1) / SWIGLU_COLS;
    t.n = t.pairs * t.cols;
    return t;
}

/* Tile i of a cluster: where this thread block's part begins. */
struct tile {
    int row, col;
};

__device__ __forceinline__ struct tile tile_at(const struct tiles &t, int i, int rank)
{
    const int first = i / (BAND * t.cols) * BAND, left = min((int)BAND, t.pairs - first);
    const int in_band = i - first * t.cols;
    return {((first + in_band % left) * S + rank) * SWIGLU_ROWS, in_band / left * SWIGLU_COLS};
}

/* ---- copies ---- */

__device__ __forceinline__ void load_stage(const args &s, uint32_t smem, const place &at,
                                           const struct tile &tile, int k, int rank)
{
    const uint32_t stage = smem + at.slot * STAGE_BYTES, full = smem + FULL + 8 * at.slot;
    mbar_wait(smem + EMPTY + 8 * at.slot, at.parity);
    mbar_arrive_expect_tx(full, STAGE_BYTES);
    tma_load_2d(stage, &s.x, full, k, tile.row, L2_EVICT_LAST);
#pragma unroll
    for (int half = 0; half < 2; half++) /* gate, up */
        tma_load_2d_cluster(stage + X_BYTES + (2 * half + rank) * BOX_BYTES, &s.w, full, k,
                            half * s.width + tile.col + 64 * rank, (1 << S) - 1);
}

__device__ __forceinline__ void feed(const args &s, uint32_t smem, int rank)
{
    const struct tiles t = tiles_of(s);
    place at = {0, 1};
    for (int i = blockIdx.x / S; i < t.n; i += (int)gridDim.x / S) {
        const struct tile tile = tile_at(t, i, rank);
#pragma unroll 1
        for (int k = 0; k < s.k; k += GEMM_MAP_COLUMNS, at.next())
            load_stage(s, smem, at, tile, k, rank);
    }
    for (int i = 0; i < STAGES; i++, at.next()) /* nothing is on its way here when it ends */
        mbar_wait(smem + EMPTY + 8 * at.slot, at.parity);
}

/* ---- products ---- */

/* To both thread blocks: what either loads goes to both. */
__device__ __forceinline__ void give_back(const place &at, uint32_t smem)
{
    const int lane = threadIdx.x % 32;
    if (lane < S)
        mbar_arrive_at(smem + EMPTY + 8 * at.slot, lane);
}

/* A stage is given back a step later, when the products of the next are on their way. */
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[128], place &at, int k, uint32_t smem,
                                         int group)
{
    place last = at;
    wgmma_zero(acc);
#pragma unroll 1
    for (int i = 0; i < k; i += GEMM_MAP_COLUMNS) {
        const uint32_t stage = smem + at.slot * STAGE_BYTES;
        const uint64_t x = desc_k_major(stage + group * (X_BYTES / GROUPS));
        const uint64_t w = desc_k_major(stage + X_BYTES);
        mbar_wait(smem + FULL + 8 * at.slot, at.parity);
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < GEMM_MAP_COLUMNS / 16; j++) /* 32 bytes of a row, in units of 16 */
            wgmma_256(acc, x + 2 * j, w + 2 * j, T());
        wgmma_commit();
        if (i > 0) {
            wgmma_wait<1>();
            give_back(last, smem);
        }
        last = at;
        at.next();
    }
    wgmma_wait<0>();
    wgmma_pin(acc);
    give_back(last, smem);
}

/* ---- results ---- */

template <typename T>
__device__ __forceinline__ float result(float gate, float up)
{
    return swiglu_of(rounded<T>(gate, NULL, 0), rounded<T>(up, NULL, 0));
}

/* A thread's part of a warpgroup's two boxes. */
template <typename T>
__device__ __forceinline__ void leave(const float (&acc)[128], char *out)
{
    constexpr int DT = std::is_same<T, __half>::value ? DT_F16 : DT_BF16;
    const int lane = threadIdx.x % 32, quad = lane % 4;
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4; /* and row + 8 */
#pragma unroll
    for (int i = 0; i < SWIGLU_COLS / 8; i++) {
        char *to = out + i / 8 * BOX_BYTES + ((i % 8) ^ (row % 8)) * 16 + 4 * quad;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float *gate = acc + 4 * i + 2 * r, *up = gate + 64;
            *(uint32_t *)(to + (row + 8 * r) * 128) =
                pack2<DT>(result<T>(gate[0], up[0]), result<T>(gate[1], up[1]));
        }
    }
}

/* A warpgroup's 64 rows, in two boxes of 64 columns. */
template <typename T>
__device__ __forceinline__ void store(const args &s, const float (&acc)[128],
                                      const struct tile &tile, char *memory, int group)
{
    char *out = memory + OUT + group * 2 * BOX_BYTES;
    const bool first = threadIdx.x % 128 == 0;
    if (first)
        tma_store_wait_read();
    bar_sync(BAR_OUT + group, 128);
    leave<T>(acc, out);
    fence_proxy_async();
    bar_sync(BAR_OUT + group, 128);
    if (first) {
        for (int half = 0; half < 2; half++)
            tma_store_2d(&s.y, smem_addr(out) + half * BOX_BYTES, tile.col + 64 * half,
                         tile.row + 64 * group);
        tma_store_commit();
    }
}

/* ---- the kernel ---- */

template <typename T>
__device__ __forceinline__ void work(const args &s, char *memory, int rank, int group)
{
    const struct tiles t = tiles_of(s);
    const uint32_t smem = smem_addr(memory);
    place at = {0, 0};
    for (int i = blockIdx.x / S; i < t.n; i += (int)gridDim.x / S) {
        float acc[128];
        multiply<T>(acc, at, s.k, smem, group);
        store<T>(s, acc, tile_at(t, i, rank), memory, group);
    }
    if (threadIdx.x % 128 == 0)
        tma_store_wait();
}

template <typename T>
__global__ void __cluster_dims__(S, 1, 1) __launch_bounds__(THREADS, 1)
    swiglu(const __grid_constant__ args s)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char memory[];
    const uint32_t smem = smem_addr(memory);
    const int group = threadIdx.x / 128, rank = blockIdx.x % S;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbar_init(smem + FULL + 8 * i, 1);
            mbar_init(smem + EMPTY + 8 * i, WARPS * S);
        }
        mbar_fence_init();
        fence_proxy_async();
    }
    cluster_sync();
    if (group < GROUPS) {
        reg_inc<232>();
        work<T>(s, memory, rank, group);
        cluster_sync(); /* the other may still send here */
    } else {
        reg_dec<40>();
        if (threadIdx.x / 32 == 4 * GROUPS && elect_one())
            feed(s, smem, rank);
        __syncwarp();
        cluster_sync();
    }
#endif
}

template <typename T>
static int launch(const args *s, int32_t clusters, void *stream)
{
    void (*kernel)(args) = swiglu<T>;
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (e != cudaSuccess)
        return (int)e;
    kernel<<<(unsigned)clusters * S, THREADS, BYTES, (cudaStream_t)stream>>>(*s);
    return (int)cudaGetLastError();
}

extern "C" int gemm_swiglu_launch(const args *s, int32_t clusters, int dtype, void *stream)
{
    return dtype == 0 ? launch<__nv_bfloat16>(s, clusters, stream)
                      : launch<__half>(s, clusters, stream);
}
