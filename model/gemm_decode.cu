/* See gemm_decode.h. Bottleneck: reading w, once, at the memory's rate; all else has to stay out of
 * its way. A cluster of four thread blocks makes units of up to 128 rows of w, in turn; block i
 * takes steps i, i + 4, ... of 64 columns, so that a unit's x is read by four blocks in all and the
 * cluster reads 512 neighbouring bytes of a row at a time. Of a block's seven warps one keeps w on
 * its way through a ring of slots from before the kernel ahead has ended, one does so for x from
 * when it may be read, one cleans the tails of an append, and four, a warpgroup, multiply: m64nNk16
 * with w as the operand of 64 rows and x, N = 16 or 32 rows, as the other, both in shared memory as
 * bulk tensor copies leave them (128-byte swizzle; what w and x do not have is filled with zeros).
 *
 * A unit's sums are put together in shared memory: rows of warp i of every block go to block i
 * (st.async, which counts bytes at the receiver's barrier), which adds them in the order of the
 * blocks and does what follows on the product. Columns of y that are needed together (gate and up
 * of SwiGLU, the two that rotate with each other) are in the same place of a unit's two halves,
 * hence in one thread.
 *
 * Shared memory at N = 16, 32: slots of w, 12, 11 x 16 KiB; of x, 8 x 2, 6 x 4 KiB; received sums
 * [block][half][8 rows of x][lane] of four, 8, 16 KiB; two barriers a slot and two for sums; what
 * an append says of x's rows. Registers: N sums a thread of the warpgroup.
 *
 * Tried on an H200 (2026-11-26), us a layer's four products of 16 and 64 rows, library and
 * gemm_skinny.h 121 and 127: steps of all units dealt out evenly over the thread blocks, sums left
 * in the L2 cache for each other, 120 and 139 (4 to 5 us a product from the last step to the end),
 * x shared by multicast 123 and 142; so cut, a layer from o to the next q, k and v with its norms
 * as one launch with barriers over the grid, 133 with 16 rows where separate kernels take 126;
 * clusters of two 112 and 139, but 121 with the norms in between, and 140 where two sizes of
 * clusters alternate: such kernels do not begin early beside each other; this with 64 rows, 149: x
 * is then half as much traffic as w. */
#include "attention/tile.cuh"
#include "core/early.cuh"
#include "core/pack.cuh"
#include "core/ring.cuh"
#include "kvcache/kv_tails.cuh"
#include "model/gemm_decode.cuh"
#include "model/gemm_decode_args.h"
#include "model/gemm_map.h"
#include "model/swiglu.cuh"

#include <cuda_runtime.h>

enum {
    S = 4,     /* thread blocks of a cluster */
    WARPS = 4, /* that multiply */
    MULTIPLIERS = 32 * WARPS,
    THREADS = MULTIPLIERS + 96,
    HALF = 64,                                /* rows of w, at most, in either half of a unit */
    HALF_BYTES = HALF * GEMM_MAP_COLUMNS * 2, /* of them in a step */
    MAX_BOXES = 6,
    BAR_ALL = 1 /* named barrier of the multipliers */
};
static_assert(WARPS * 8 >= GEMM_DECODE_ROWS, "a warp's groups of x");
static_assert((int)WARPS == (int)S, "a warp's rows are put together by one thread block");

typedef struct decode_args args;

/* GEMM_DECODE_APPEND: what kv_append says of a row of x. */
struct append_row {
    int slot, position;
};

template <int N>
struct layout {
    static constexpr int w_slot = 2 * HALF_BYTES, x_slot = N * GEMM_MAP_COLUMNS * 2;
    static constexpr int x_slots = N == 32 ? 6 : 8;
    static constexpr int sums = N * 2 * HALF * (int)sizeof(float);
    static constexpr int w_slots = (226 * 1024 - x_slots * x_slot - sums) / w_slot;
    static constexpr int x = w_slots * w_slot;
    static constexpr int received = x + x_slots * x_slot;
    static constexpr int full_w = received + sums;
    static constexpr int empty_w = full_w + 8 * w_slots;
    static constexpr int full_x = empty_w + 8 * w_slots;
    static constexpr int empty_x = full_x + 8 * x_slots;
    static constexpr int full_sums = empty_x + 8 * x_slots;
    static constexpr int empty_sums = full_sums + 8;
    static constexpr int rows = empty_sums + 8;
    static constexpr int bytes = rows + N * (int)sizeof(struct append_row);
};
static_assert(layout<16>::bytes <= 227 * 1024 && layout<32>::bytes <= 227 * 1024, "");

/* ---- who computes what ---- */

/* Of this thread block: units first, first + stride, ...; of each, steps part, part + S, ...: what
 * the cluster reads at a time is S neighbours in every row. */
struct share {
    int first, stride, units, part, steps;
};

__device__ __forceinline__ int column_at(const struct share &h, int step)
{
    return (step * S + h.part) * GEMM_MAP_COLUMNS;
}

__device__ __forceinline__ struct share share_of(const args &s)
{
    struct share h;
    h.first = blockIdx.x / S;
    h.stride = grid_blocks() / S;
    h.units = (s.p.n + 2 * s.half - 1) / (2 * s.half);
    h.part = blockIdx.x % S;
    h.steps = ((s.p.k + GEMM_MAP_COLUMNS - 1) / GEMM_MAP_COLUMNS + S - 1 - h.part) / S;
    return h;
}

__device__ __forceinline__ bool is_paired(const args &s)
{
    return s.mode == GEMM_DECODE_SWIGLU || s.mode == GEMM_DECODE_APPEND;
}

/* How far the two columns of a pair lie apart. */
__device__ __forceinline__ int apart(const args &s)
{
    return s.mode == GEMM_DECODE_APPEND ? s.append.head_dim / 2 : s.p.n / 2;
}

/* The first column of a pair. */
__device__ __forceinline__ int column_of(const args &s, int pair)
{
    const int d = apart(s);
    return s.mode == GEMM_DECODE_APPEND ? pair / d * 2 * d + pair % d : pair;
}

/* ---- copies ---- */

/* A unit's rows of w in boxes of s.w_rows, and where they go in a slot. */
struct boxes {
    int n, row[MAX_BOXES], to[MAX_BOXES];
};

__device__ __forceinline__ struct boxes boxes_of(const args &s, int unit)
{
    const int of_half = s.half / s.w_rows;
    struct boxes b;
    b.n = 2 * of_half;
#pragma unroll
    for (int i = 0; i < MAX_BOXES; i++) {
        const int hi = i >= of_half, r = (i - hi * of_half) * s.w_rows;
        b.to[i] = hi * HALF_BYTES + r * GEMM_MAP_COLUMNS * 2;
        b.row[i] = unit * 2 * s.half + hi * s.half + r;
        if (is_paired(s))
            b.row[i] = column_of(s, unit * s.half + r) + hi * apart(s);
    }
    return b;
}

__device__ __forceinline__ void load_boxes(uint32_t to, const args &s, const struct boxes &b,
                                           uint32_t full, int col)
{
#pragma unroll
    for (int i = 0; i < MAX_BOXES; i++) {
        if (i < b.n)
            tma_load_2d(to + b.to[i], &s.w, full, col, b.row[i], L2_EVICT_FIRST);
    }
}

/* One thread issues them all: what it computes a step is time that the memory waits. */
template <int N>
__device__ __forceinline__ void feed_w(const args &s, uint32_t smem)
{
    using L = layout<N>;
    const struct share h = share_of(s);
    struct ring_place<L::w_slots> at = {
        0, 1
    };
    for (int u = h.first; u < h.units; u += h.stride) {
        const struct boxes b = boxes_of(s, u);
#pragma unroll 1
        for (int k = 0; k < h.steps; k++, at.next()) {
            const uint32_t full = smem + L::full_w + 8 * at.slot;
            mbar_wait(smem + L::empty_w + 8 * at.slot, at.parity);
            mbar_arrive_expect_tx(full, 2 * s.half * GEMM_MAP_COLUMNS * 2);
            load_boxes(smem + at.slot * L::w_slot, s, b, full, column_at(h, k));
        }
    }
}

template <int N>
__device__ __forceinline__ void feed_x(const args &s, uint32_t smem)
{
    using L = layout<N>;
    const struct share h = share_of(s);
    struct ring_place<L::x_slots> at = {
        0, 1
    };
    wait_for_inputs();
    for (int u = h.first; u < h.units; u += h.stride) {
#pragma unroll 1
        for (int k = 0; k < h.steps; k++, at.next()) {
            const uint32_t full = smem + L::full_x + 8 * at.slot;
            mbar_wait(smem + L::empty_x + 8 * at.slot, at.parity);
            mbar_arrive_expect_tx(full, L::x_slot);
            tma_load_2d(smem + L::x + at.slot * L::x_slot, &s.x, full, column_at(h, k), 0,
                        L2_EVICT_LAST);
        }
    }
}

/* ---- products ---- */

template <int N>
struct sums {
    float v[2][N / 2]; /* of a unit's halves; four a group of eight rows of x */
};

template <int N>
struct rings {
    struct ring_place<layout<N>::w_slots> w;
    struct ring_place<layout<N>::x_slots> x;
};

template <int N>
__device__ __forceinline__ void give_back(const struct rings<N> &r, uint32_t smem)
{
    if (threadIdx.x % 32 == 0) {
        mbar_arrive(smem + layout<N>::empty_w + 8 * r.w.slot);
        mbar_arrive(smem + layout<N>::empty_x + 8 * r.x.slot);
    }
}

template <typename T, int N>
__device__ __forceinline__ void multiply_step(struct sums<N> &acc, const struct rings<N> &r,
                                              uint32_t smem)
{
    using L = layout<N>;
    const uint64_t w = desc_k_major(smem + r.w.slot * L::w_slot);
    const uint64_t x = desc_k_major(smem + L::x + r.x.slot * L::x_slot);
    mbar_wait(smem + L::full_w + 8 * r.w.slot, r.w.parity);
    mbar_wait(smem + L::full_x + 8 * r.x.slot, r.x.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < GEMM_MAP_COLUMNS / 16; k++) { /* 32 bytes of a row, in units of 16 */
        wgmma_rows(acc.v[0], w + 2 * k, x + 2 * k, T());
        wgmma_rows(acc.v[1], w + HALF_BYTES / 16 + 2 * k, x + 2 * k, T());
    }
    wgmma_commit();
}

/* n steps. A slot is given back a step later, when the products of the next are on their way. */
template <typename T, int N>
__device__ __forceinline__ void multiply(struct sums<N> &acc, struct rings<N> &r, int n,
                                         uint32_t smem)
{
    struct rings<N> last = r;
    wgmma_zero(acc.v[0]);
    wgmma_zero(acc.v[1]);
    for (int i = 0; i < n; i++) {
        multiply_step<T, N>(acc, r, smem);
        if (i > 0) {
            wgmma_wait<1>();
            give_back<N>(last, smem);
        }
        last = r;
        r.w.next();
        r.x.next();
    }
    wgmma_wait<0>();
    wgmma_pin(acc.v[0]);
    wgmma_pin(acc.v[1]);
    if (n > 0)
        give_back<N>(last, smem);
}

/* ---- sums over the thread blocks of a cluster ---- */

/* Rows of warp i are put together by block i. */
template <int N>
__device__ __forceinline__ int received_at(int from_block, int half, int group)
{
    return layout<N>::received +
           (((from_block * 2 + half) * (N / 8) + group) * 32 + (int)threadIdx.x % 32) * 16;
}

template <int N>
__device__ __forceinline__ void send(const struct sums<N> &acc, uint32_t smem)
{
    const uint32_t there = shared_of_block(smem, threadIdx.x / 32);
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int g = 0; g < N / 8; g++) {
            const float *v = acc.v[half] + 4 * g;
            store_async(there + received_at<N>(blockIdx.x % S, half, g), v[0], v[1], v[2], v[3],
                        there + layout<N>::full_sums);
        }
    }
}

template <int N>
__device__ __forceinline__ void total(float (&sum)[4], const char *memory, int half, int group)
{
#pragma unroll
    for (int i = 0; i < S; i++) {
        const float4 x = *(const float4 *)(memory + received_at<N>(i, half, group));
        sum[0] += x.x;
        sum[1] += x.y;
        sum[2] += x.z;
        sum[3] += x.w;
    }
}

/* ---- results ---- */

/* Four sums of a half: rows 8 group + 2 (lane % 4) + {0, 1} of x and row `at` of the half, then the
 * same rows of x and row at + 8. */
struct place_of_sums {
    int unit, group, at;
    __device__ __forceinline__ int row(int e) const
    {
        return 8 * group + threadIdx.x % 4 * 2 + e % 2;
    }
    /* Of y, or the pair; -1: there is none. */
    __device__ __forceinline__ int column(const args &s, int e, int width, int of_unit) const
    {
        const int i = at + e / 2 * 8, col = unit * of_unit + i;
        return i < s.half && col < width && row(e) < s.p.rows ? col : -1;
    }
};

template <typename Y>
__device__ __forceinline__ void store_plain(const args &s, const struct place_of_sums &p,
                                            const float (&lo)[4], const float (&hi)[4])
{
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int col = p.column(s, e, s.p.n, 2 * s.half);
        Y *y = (Y *)s.p.y + (size_t)p.row(e) * s.p.n + col;
        if (col >= 0)
            from_f32(y, lo[e]);
        if (col >= 0 && col + s.half < s.p.n)
            from_f32(y + s.half, hi[e]);
    }
}

template <typename T>
__device__ __forceinline__ void store_swiglu(const args &s, const struct place_of_sums &p,
                                             const float (&lo)[4], const float (&hi)[4])
{
    const int width = s.p.n / 2;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int col = p.column(s, e, width, s.half);
        if (col >= 0)
            from_f32((T *)s.p.y + (size_t)p.row(e) * width + col,
                     swiglu_of(rounded<T>(lo[e], s.p.bias, col),
                               rounded<T>(hi[e], s.p.bias, col + width)));
    }
}

/* Columns col and col + head_dim / 2 of a row of qkv go where kv_append_cuda brings them. */
template <typename T>
__device__ __forceinline__ void append_pair(const struct kv_append &a, const struct append_row &r,
                                            int row, int col, float x, float y)
{
    const int d = a.head_dim, head = col / d, kv_head = head - a.n_heads;
    const bool v = kv_head >= a.n_kv_heads;
    T *to = (T *)a.qkv + row * a.stride + col;
    if (kv_head >= 0) {
        const int64_t h =
            (int64_t)(r.slot / KV_PAGE_TOKENS) * a.n_kv_heads + kv_head - (v ? a.n_kv_heads : 0);
        to = (T *)(v ? a.v : a.k) + (h * KV_PAGE_TOKENS + r.slot % KV_PAGE_TOKENS) * d + col % d;
    }
    from_f32(to, x);
    from_f32(to + d / 2, y);
}

/* Angles of a thread's four pairs of a unit, and where in a row of qkv their first columns are, or
 * -1. They are asked for before the unit's products, since they come from device memory: weights
 * drive them out of the L2 cache from layer to layer. */
struct turns {
    float cosine[4], sine[4];
    int col[4];
};

__device__ __forceinline__ bool is_turned(const struct kv_append &a, int col)
{
    return col >= 0 && col / a.head_dim < a.n_heads + a.n_kv_heads;
}

__device__ __forceinline__ struct turns turns_of(const args &s, const struct place_of_sums &p,
                                                 const struct append_row *rows)
{
    const struct kv_append &a = s.append;
    const int d = a.head_dim;
    struct turns t;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int pair = p.column(s, e, s.p.n / 2, s.half);
        t.col[e] = pair >= 0 && rows[p.row(e)].slot >= 0 ? column_of(s, pair) : -1;
        t.cosine[e] = 1.0f, t.sine[e] = 0.0f;
        if (is_turned(a, t.col[e])) {
            const float *table = a.cos_sin + (int64_t)rows[p.row(e)].position * d + t.col[e] % d;
            t.cosine[e] = __ldg(table), t.sine[e] = __ldg(table + d / 2);
        }
    }
    return t;
}

template <typename T>
__device__ __forceinline__ void store_append(const args &s, const struct place_of_sums &p,
                                             const struct append_row *rows, const struct turns &t,
                                             const float (&lo)[4], const float (&hi)[4])
{
    const struct kv_append &a = s.append;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        if (t.col[e] < 0)
            continue;
        const float x = rounded<T>(lo[e], a.bias, t.col[e]);
        const float y = rounded<T>(hi[e], a.bias, t.col[e] + a.head_dim / 2);
        const bool turned = is_turned(a, t.col[e]);
        append_pair<T>(a, rows[p.row(e)], p.row(e), t.col[e],
                       turned ? x * t.cosine[e] - y * t.sine[e] : x,
                       turned ? y * t.cosine[e] + x * t.sine[e] : y);
    }
}

/* The rows that this block puts together, 8 rows of x a warp. */
__device__ __forceinline__ struct place_of_sums my_sums(int unit)
{
    return {unit, (int)threadIdx.x / 32, (int)blockIdx.x % S * 16 + (int)threadIdx.x % 32 / 4};
}

template <typename T, int N>
__device__ __forceinline__ void end_unit(const args &s, const struct place_of_sums &p,
                                         const struct turns &t, const char *memory)
{
    float lo[4] = {}, hi[4] = {};
    total<N>(lo, memory, 0, p.group);
    total<N>(hi, memory, 1, p.group);
    if (s.mode == GEMM_DECODE_PLAIN)
        store_plain<T>(s, p, lo, hi);
    else if (s.mode == GEMM_DECODE_F32)
        store_plain<float>(s, p, lo, hi);
    else if (s.mode == GEMM_DECODE_SWIGLU)
        store_swiglu<T>(s, p, lo, hi);
    else
        store_append<T>(s, p, (const struct append_row *)(memory + layout<N>::rows), t, lo, hi);
}

/* Early, so that the end need not wait for them one after another. */
__device__ __forceinline__ void load_rows(const args &s, struct append_row *rows)
{
    const struct kv_append &a = s.append;
    const int i = threadIdx.x;
    if (s.mode == GEMM_DECODE_APPEND && i < s.p.rows)
        rows[i] = {a.slots[i], a.positions[i]};
    bar_sync(BAR_ALL, MULTIPLIERS);
}

/* ---- the kernel ---- */

template <typename T>
__device__ __forceinline__ void clean(const args &s)
{
    if (s.mode != GEMM_DECODE_APPEND)
        return;
    wait_for_inputs();
    clear_tails<T>(s.append, blockIdx.x, grid_blocks());
}

template <typename T, int N>
__device__ __forceinline__ void work(const args &s, char *memory)
{
    using L = layout<N>;
    const struct share h = share_of(s);
    const uint32_t smem = smem_addr(memory);
    struct rings<N> r = {
    };
    uint32_t parity = 0;
    wait_for_inputs();
    load_rows(s, (struct append_row *)(memory + L::rows));
    for (int u = h.first; u < h.units; u += h.stride, parity ^= 1) {
        const struct place_of_sums p = my_sums(u);
        struct turns t = {};
        struct sums<N> acc;
        if (s.mode == GEMM_DECODE_APPEND && p.group < N / 8)
            t = turns_of(s, p, (const struct append_row *)(memory + L::rows));
        multiply<T, N>(acc, r, h.steps, smem);
        if (threadIdx.x == 0)
            mbar_arrive_expect_tx(smem + L::full_sums, L::sums);
        mbar_wait(smem + L::empty_sums, parity ^ 1);
        send<N>(acc, smem);
        mbar_wait(smem + L::full_sums, parity);
        if (p.group < N / 8)
            end_unit<T, N>(s, p, t, memory);
        __syncwarp();
        if (u + h.stride < h.units && threadIdx.x % 32 < S) /* else a thread block may be gone */
            mbar_arrive_at(smem + L::empty_sums, threadIdx.x % 32);
    }
}

template <typename T, int N>
__global__ void __cluster_dims__(S, 1, 1) __launch_bounds__(THREADS, 1)
    decode(const __grid_constant__ args s)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char memory[];
    using L = layout<N>;
    const uint32_t smem = smem_addr(memory);
    const int warp = threadIdx.x / 32;
    begin_next();
    if (threadIdx.x == 0) {
        for (int i = 0; i < L::w_slots; i++) {
            mbar_init(smem + L::full_w + 8 * i, 1);
            mbar_init(smem + L::empty_w + 8 * i, WARPS);
        }
        for (int i = 0; i < L::x_slots; i++) {
            mbar_init(smem + L::full_x + 8 * i, 1);
            mbar_init(smem + L::empty_x + 8 * i, WARPS);
        }
        mbar_init(smem + L::full_sums, 1);
        mbar_init(smem + L::empty_sums, WARPS * S);
        mbar_fence_init();
        fence_proxy_async();
    }
    cluster_sync();
    if (warp < WARPS)
        work<T, N>(s, memory);
    else if (warp == WARPS && elect_one())
        feed_w<N>(s, smem);
    else if (warp == WARPS + 1 && elect_one())
        feed_x<N>(s, smem);
    else if (warp == WARPS + 2)
        clean<T>(s);
#endif
}

template <typename T, int N>
static int launch_decode(const args *s, void *stream)
{
    void (*kernel)(args) = decode<T, N>;
    const int bytes = layout<N>::bytes, units = (s->p.n + 2 * s->half - 1) / (2 * s->half);
    const int clusters = units < s->clusters ? units : s->clusters;
    const struct launch l = {dim3((unsigned)(clusters * S)), THREADS, (size_t)bytes, true, stream};
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return (int)(e == cudaSuccess ? launch_early(kernel, l, *s) : e);
}

template <typename T>
static int choose_rows(const args *s, void *stream)
{
    return s->p.rows > 16 ? launch_decode<T, 32>(s, stream) : launch_decode<T, 16>(s, stream);
}

extern "C" int gemm_decode_clusters(void)
{
    void (*kernel)(args) = decode<__nv_bfloat16, 32>;
    cudaLaunchConfig_t config = {};
    int n = 0;
    config.gridDim = dim3(S);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = layout<32>::bytes;
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         layout<32>::bytes);
    if (e == cudaSuccess)
        e = cudaOccupancyMaxActiveClusters(&n, kernel, &config);
    return e == cudaSuccess ? n : 0;
}

static bool supported(const args *s)
{
    const struct gemm_skinny *p = &s->p;
    const struct kv_append *a = &s->append;
    if (s->mode == GEMM_DECODE_SWIGLU && p->n % 2)
        return false;
    if (s->mode == GEMM_DECODE_APPEND &&
        (a->head_dim < 64 || a->head_dim % 64 || a->n_rows != p->rows ||
         p->n != (a->n_heads + 2 * a->n_kv_heads) * a->head_dim))
        return false;
    return p->rows >= 1 && p->rows <= GEMM_DECODE_ROWS && p->k % 8 == 0 && s->clusters > 0;
}

extern "C" int gemm_decode_launch(const args *s, int dtype, void *stream)
{
    if (!supported(s))
        return (int)cudaErrorInvalidValue;
    return dtype == 0 ? choose_rows<__nv_bfloat16>(s, stream) : choose_rows<__half>(s, stream);
}
