/* See gemm_skinny.h. One thread block a multiprocessor goes through units of 16 MT rows of w. Eight
 * warps multiply. The ninth keeps STAGES stages of 32 KiB on their way by bulk copies, a row's
 * piece each, and never waits for other kernels: when a product begins, 192 KiB of its weights a
 * multiprocessor are there or on their way, which covers the end of the kernel before it and a norm
 * in between. With an append a tenth cleans tails. The last rounds of units are drawn from a queue:
 * multiprocessors do not get equal parts of the memory's rate (bench/results/engine_h100.md: thread
 * blocks that were dealt all their units ended between 39 and 57 us).
 *
 * w is the A operand of the tensor core (m16n8k16: 16 rows of w, 8 rows of x): a lane reads 16
 * bytes, 8 neighbours along k, of rows g and g + 8, where the instruction wants pairs that lie 8
 * apart. The order of k is free as long as x is read alike, so pairs 0 and 1 of the eight feed one
 * instruction and pairs 2 and 3 the next. The warps share out a stage's columns in chunks and add
 * up their parts at a unit's end.
 *
 * Columns of y that are needed together (gate and up of SwiGLU, the two that rotate with each
 * other) are in one unit: its first half of rows belong to the one, the others to the other.
 *
 * Shared memory: stages [STAGES][16 MT] rows of a piece and 64 bytes, so that the eight lanes of a
 * quarter read all banks; sums over warps; two barriers and the unit of each stage. */
#include "model/gemm_skinny.h"

#include "attention/ptx.cuh"
#include "core/early.cuh"
#include "core/pack.cuh"
#include "core/ring.cuh"
#include "kvcache/kv_tails.cuh"
#include "model/swiglu.cuh"

#include <cuda_runtime.h>

enum {
    WARPS = 8,
    STAGES = 6,
    PACE = 2,    /* stages on their way at once */
    BAR_SUM = 1, /* named barrier of the eight warps */
    DRAWN_ROUNDS = 4
};

/* What becomes of the products. */
enum mode { PLAIN, SWIGLU, APPEND };

/* One warp copies; one cleans tails. */
template <enum mode M>
__host__ __device__ constexpr int threads_of(void)
{
    return 32 * (WARPS + (M == APPEND ? 2 : 1));
}

struct args {
    struct gemm_skinny p;
    struct kv_append a; /* APPEND */
};

/* For units of 16 MT rows of w: blocks of 32 along k in a warp's chunk, 4 KiB of w. */
template <int MT>
struct cut {
    static constexpr int blocks = 4 / MT, chunk = 32 * blocks, round = WARPS * chunk;
};

/* ---- products ---- */

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1, __nv_bfloat16)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, "
                 "%6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1, __half)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, "
                 "%6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* A warp's chunk of w and of x, in the layouts of the operands. */
template <int MT>
struct tile_w {
    uint4 v[cut<MT>::blocks][MT][2];
};

template <int MT, int NT>
struct tile_x {
    uint4 v[cut<MT>::blocks][NT];
};

/* Columns from `at` on; zeros behind k and behind the last row. */
template <typename T, int MT, int NT>
__device__ __forceinline__ void load_x(struct tile_x<MT, NT> *b, const struct gemm_skinny &p,
                                       int at)
{
    const int group = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
#pragma unroll
    for (int u = 0; u < cut<MT>::blocks; u++) {
        const int kk = at + 32 * u + 8 * quad;
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const int row = 8 * j + group;
            b->v[u][j] = kk < p.k && row < p.rows
                             ? *(const uint4 *)((const T *)p.x + (size_t)row * p.k + kk)
                             : make_uint4(0, 0, 0, 0);
        }
    }
}

template <typename T, int MT, int NT>
__device__ __forceinline__ void multiply_tile(float (&acc)[MT][NT][4], const struct tile_w<MT> &a,
                                              const struct tile_x<MT, NT> &b)
{
#pragma unroll
    for (int u = 0; u < cut<MT>::blocks; u++) {
#pragma unroll
        for (int i = 0; i < MT; i++) {
            const uint4 lo = a.v[u][i][0], hi = a.v[u][i][1];
#pragma unroll
            for (int j = 0; j < NT; j++) {
                mma(acc[i][j], lo.x, hi.x, lo.y, hi.y, b.v[u][j].x, b.v[u][j].y, T());
                mma(acc[i][j], lo.z, hi.z, lo.w, hi.w, b.v[u][j].z, b.v[u][j].w, T());
            }
        }
    }
}

/* ---- sums over warps ---- */

/* [row of x][column], a column of padding against bank conflicts. */
template <int MT, int NT>
struct partial {
    float v[WARPS][8 * NT][16 * MT + 1];
};

template <int MT, int NT>
__device__ __forceinline__ void leave(struct partial<MT, NT> *part, const float (&acc)[MT][NT][4])
{
    const int warp = threadIdx.x >> 5, group = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++)
                part->v[warp][8 * j + 2 * quad + e % 2][16 * i + 8 * (e / 2) + group] =
                    acc[i][j][e];
        }
    }
}

template <int MT, int NT>
__device__ __forceinline__ float total(const struct partial<MT, NT> &part, int row, int col)
{
    float sum = 0.0f;
#pragma unroll
    for (int o = 0; o < WARPS; o++)
        sum += part.v[o][row][col];
    return sum;
}

/* ---- the ring of stages ---- */

template <int MT, int NT>
struct layout {
    static constexpr int rows = 16 * MT;
    static constexpr int pitch = cut<MT>::round * 2 + 64;
    static constexpr int stage = rows * pitch;
    static constexpr int part = STAGES * stage;
    static constexpr int full = part + (int)((sizeof(struct partial<MT, NT>) + 7) & ~7ull);
    static constexpr int empty = full + 8 * STAGES;
    static constexpr int unit = empty + 8 * STAGES; /* int of each stage: whose, or -1 */
    static constexpr int bytes = unit + 4 * STAGES;
};
static_assert(layout<1, 2>::bytes <= 227 * 1024 && layout<2, 2>::bytes <= 227 * 1024, "");

typedef struct ring_place<STAGES> place;

/* Columns of w's product, or pairs of them, that a unit makes. */
template <int MT, enum mode M>
__host__ __device__ constexpr int columns_of_unit(void)
{
    return M == PLAIN ? 16 * MT : 8 * MT;
}

template <int MT, enum mode M>
__host__ __device__ constexpr int units_of(int n)
{
    return ((M == PLAIN ? n : n / 2) + columns_of_unit<MT, M>() - 1) / columns_of_unit<MT, M>();
}

/* How far the two columns of a pair lie apart. */
template <enum mode M>
__device__ __forceinline__ int apart(const struct args &s)
{
    return M == APPEND ? s.a.head_dim / 2 : s.p.n / 2;
}

/* The first column of a pair. */
template <enum mode M>
__device__ __forceinline__ int column_of(const struct args &s, int pair)
{
    const int d = apart<M>(s);
    return M == APPEND ? pair / d * 2 * d + pair % d : pair;
}

/* Row of w that is row r of a unit, or -1. */
template <int MT, enum mode M>
__device__ __forceinline__ int row_of(const struct args &s, int at, int r)
{
    enum { COLS = columns_of_unit<MT, M>() };
    const int col = at * COLS + r % COLS;
    if (M == PLAIN)
        return col < s.p.n ? col : -1;
    return col < s.p.n / 2 ? column_of<M>(s, col) + r / COLS * apart<M>(s) : -1;
}

__device__ __forceinline__ void copy_row(uint32_t dst, const void *src, int bytes, uint32_t bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
                 "%2, [%3];" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(bar)
                 : "memory");
}

/* Units are dealt out in rounds, and the last ones drawn: multiprocessors do not get equal parts of
 * the memory's rate, but a draw costs a trip to L2. */
__device__ __forceinline__ int dealt_rounds(int units)
{
    return max(units / (int)gridDim.x - DRAWN_ROUNDS, 1);
}

__device__ __forceinline__ int draw_unit(const struct args &s, int dealt)
{
    return dealt + (int)atomicAdd(&s.p.queue[0], 1u);
}

/* The last thread block to find nothing left leaves the queue as it was. */
__device__ __forceinline__ void leave_queue(const struct args &s)
{
    if (atomicAdd(&s.p.queue[1], 1u) == gridDim.x - 1) {
        s.p.queue[0] = 0;
        s.p.queue[1] = 0;
    }
}

/* The copying warp: a lane a row. The next unit is drawn one stage ahead of need. */
template <typename T, int MT, int NT, enum mode M>
__device__ __forceinline__ void feed(const struct args &s, uint32_t smem)
{
    using L = layout<MT, NT>;
    const int lane = threadIdx.x & 31, units = units_of<MT, M>(s.p.n);
    place at = {0, 1}, landed = {0, 0};
    int issued = 0;
    const int dealt = dealt_rounds(units) * (int)gridDim.x;
    for (int u = blockIdx.x, next = 0; u < units; u = __shfl_sync(0xffffffffu, next, 0)) {
        const int row = lane < L::rows ? row_of<MT, M>(s, u, lane) : -1;
        const int n_rows = __popc(__ballot_sync(0xffffffffu, row >= 0));
        for (int k = 0; k < s.p.k; k += cut<MT>::round, at.next()) {
            const int bytes = min(cut<MT>::round, s.p.k - k) * 2;
            const uint32_t full = smem + L::full + 8 * at.slot;
            if (issued == PACE) { /* what others read waits behind all that is on its way */
                mbar_wait(smem + L::full + 8 * landed.slot, landed.parity);
                landed.next();
            } else {
                issued++;
            }
            mbar_wait(smem + L::empty + 8 * at.slot, at.parity);
            if (lane == 0) {
                if (k + cut<MT>::round >= s.p.k)
                    next = u + (int)gridDim.x < dealt ? u + (int)gridDim.x : draw_unit(s, dealt);
                st_shared_s32(smem + L::unit + 4 * at.slot, u);
                mbar_arrive_expect_tx(full, n_rows * bytes);
            }
            __syncwarp();
            if (row >= 0)
                copy_row(smem + at.slot * L::stage + lane * L::pitch,
                         (const T *)s.p.w + (size_t)row * s.p.k + k, bytes, full);
        }
    }
    if (lane != 0)
        return;
    mbar_wait(smem + L::empty + 8 * at.slot, at.parity);
    st_shared_s32(smem + L::unit + 4 * at.slot, -1);
    mbar_arrive(smem + L::full + 8 * at.slot);
    leave_queue(s);
}

/* A warp's chunk of the stage that begins at column k. */
template <int MT>
__device__ __forceinline__ void load_w(struct tile_w<MT> *a, const char *stage, int pitch, int k,
                                       int end)
{
    const int group = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
    const int first = (threadIdx.x >> 5) * cut<MT>::chunk + 8 * quad;
#pragma unroll
    for (int u = 0; u < cut<MT>::blocks; u++) {
        const int kk = first + 32 * u;
#pragma unroll
        for (int i = 0; i < 2 * MT; i++)
            a->v[u][i / 2][i % 2] = k + kk < end
                                        ? *(const uint4 *)(stage + (8 * i + group) * pitch + kk * 2)
                                        : make_uint4(0, 0, 0, 0);
    }
}

/* ---- results ---- */

/* Columns lo and lo + head_dim / 2 of row n of qkv go where kv_append_cuda brings them. */
template <typename T>
__device__ __forceinline__ void append_pair(const struct kv_append &a, int n, int lo, float first,
                                            float second)
{
    const int d = a.head_dim, half = d / 2, head = lo / d, i = lo % d, slot = a.slots[n];
    const int kv_head = head - a.n_heads, v_head = kv_head - a.n_kv_heads;
    float x = first, y = second;
    if (slot < 0)
        return;
    if (v_head < 0) {
        const float *table = a.cos_sin + (int64_t)a.positions[n] * d;
        const float c = __ldg(table + i), s = __ldg(table + half + i);
        x = first * c - second * s;
        y = second * c + first * s;
    }
    T *to = (T *)a.qkv + n * a.stride + lo;
    if (kv_head >= 0) {
        const int64_t h =
            (int64_t)(slot / KV_PAGE_TOKENS) * a.n_kv_heads + (v_head < 0 ? kv_head : v_head);
        to = (T *)(v_head < 0 ? a.k : a.v) + (h * KV_PAGE_TOKENS + slot % KV_PAGE_TOKENS) * d + i;
    }
    from_f32(to, x);
    from_f32(to + half, y);
}

template <typename T, typename Y, int MT, int NT, enum mode M>
__device__ __forceinline__ void store_unit(const struct args &s, int u,
                                           const struct partial<MT, NT> &part)
{
    enum { COLS = columns_of_unit<MT, M>() };
    const int width = M == PLAIN ? s.p.n : s.p.n / 2;
    const void *bias = M == APPEND ? s.a.bias : s.p.bias;
    for (int i = threadIdx.x; i < COLS * 8 * NT; i += 32 * WARPS) {
        const int row = i / COLS, col = i % COLS, to = u * COLS + col;
        if (row >= s.p.rows || to >= width)
            continue;
        float y = total(part, row, col);
        if (M != PLAIN) {
            const int lo = column_of<M>(s, to), hi = lo + apart<M>(s);
            const float first = rounded<T>(y, bias, lo);
            const float second = rounded<T>(total(part, row, col + COLS), bias, hi);
            if (M == APPEND) {
                append_pair<T>(s.a, row, lo, first, second);
                continue;
            }
            y = swiglu_of(first, second);
        }
        from_f32((Y *)s.p.y + (size_t)row * width + to, y);
    }
}

/* ---- the kernel ---- */

template <typename T, typename Y, int MT, int NT, enum mode M>
__device__ __forceinline__ void work(const struct args &s, char *smem)
{
    using L = layout<MT, NT>;
    struct partial<MT, NT> *part = (struct partial<MT, NT> *)(smem + L::part);
    const int warp = threadIdx.x >> 5;
    const uint32_t base = smem_addr(smem);
    const int first = warp * cut<MT>::chunk;
    place at = {0, 0};
    struct tile_x<MT, NT> b;
    wait_for_inputs();
    load_x<T>(&b, s.p, first);
    for (;;) {
        float acc[MT][NT][4] = {};
        mbar_wait(base + L::full + 8 * at.slot, at.parity);
        const int u = ld_shared_s32(base + L::unit + 4 * at.slot);
        if (u < 0)
            break;
#pragma unroll 2 /* b and coming change places without a copy, which would wait for the load */
        for (int k = 0; k < s.p.k; k += cut<MT>::round, at.next()) {
            const int next = k + cut<MT>::round;
            struct tile_w<MT> a;
            struct tile_x<MT, NT> coming; /* of the next stage: a trip to the L2 cache */
            load_x<T>(&coming, s.p, (next < s.p.k ? next : 0) + first);
            mbar_wait(base + L::full + 8 * at.slot, at.parity);
            load_w<MT>(&a, smem + at.slot * L::stage, L::pitch, k, s.p.k);
            multiply_tile<T>(acc, a, b);
            __syncwarp();
            if ((threadIdx.x & 31) == 0)
                mbar_arrive(base + L::empty + 8 * at.slot);
            b = coming;
        }
        leave(part, acc);
        bar_sync(BAR_SUM, 32 * WARPS);
        store_unit<T, Y, MT, NT, M>(s, u, *part);
        bar_sync(BAR_SUM, 32 * WARPS);
    }
}

template <typename T, typename Y, int MT, int NT, enum mode M>
__global__ void __launch_bounds__(threads_of<M>(), 1) skinny(const __grid_constant__ struct args s)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(128) char smem[];
    using L = layout<MT, NT>;
    begin_next();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbar_init(smem_addr(smem) + L::full + 8 * i, 1);
            mbar_init(smem_addr(smem) + L::empty + 8 * i, WARPS);
        }
        mbar_fence_init();
        fence_proxy_async();
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp < WARPS) {
        work<T, Y, MT, NT, M>(s, smem);
    } else if (warp == WARPS) {
        feed<T, MT, NT, M>(s, smem_addr(smem));
    } else {
        wait_for_inputs();
        clear_tails<T>(s.a, blockIdx.x, gridDim.x);
    }
#endif
}

static int multiprocessors(void)
{
    int device = 0, n = 1;
    (void)cudaGetDevice(&device);
    (void)cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
    return n;
}

template <typename T, typename Y, int MT, int NT, enum mode M>
static int launch_skinny(const struct args *s, void *stream)
{
    void (*kernel)(struct args) = skinny<T, Y, MT, NT, M>;
    const int bytes = layout<MT, NT>::bytes, units = units_of<MT, M>(s->p.n);
    const int most = multiprocessors();
    const struct launch l = {dim3((unsigned)(units < most ? units : most)), threads_of<M>(),
                             (size_t)bytes, true, stream};
    cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return (int)(e == cudaSuccess ? launch_early(kernel, l, *s) : e);
}

template <typename T, typename Y, enum mode M>
static int choose(const struct args *s, int variant, void *stream)
{
    if (s->p.rows > 8)
        return variant == 1 ? launch_skinny<T, Y, 1, 2, M>(s, stream)
                            : launch_skinny<T, Y, 2, 2, M>(s, stream);
    return variant == 1 ? launch_skinny<T, Y, 1, 1, M>(s, stream)
                        : launch_skinny<T, Y, 2, 1, M>(s, stream);
}

static bool supported(const struct gemm_skinny *p, int variant)
{
    return p->rows >= 1 && p->rows <= GEMM_SKINNY_ROWS && p->k % 8 == 0 && variant >= 1 &&
           variant <= GEMM_SKINNY_VARIANTS;
}

template <typename T>
static int choose_y(const struct args *s, int variant, int y_f32, void *stream)
{
    return y_f32 ? choose<T, float, PLAIN>(s, variant, stream)
                 : choose<T, T, PLAIN>(s, variant, stream);
}

extern "C" int gemm_skinny_launch(const struct gemm_skinny *p, int variant, int dtype, int y_f32,
                                  void *stream)
{
    const struct args s = {*p, {}};
    if (!supported(p, variant))
        return (int)cudaErrorInvalidValue;
    return dtype == 0 ? choose_y<__nv_bfloat16>(&s, variant, y_f32, stream)
                      : choose_y<__half>(&s, variant, y_f32, stream);
}

extern "C" int gemm_skinny_swiglu(const struct gemm_skinny *p, int variant, int dtype, void *stream)
{
    const struct args s = {*p, {}};
    if (!supported(p, variant) || p->n % 2)
        return (int)cudaErrorInvalidValue;
    return dtype == 0 ? choose<__nv_bfloat16, __nv_bfloat16, SWIGLU>(&s, variant, stream)
                      : choose<__half, __half, SWIGLU>(&s, variant, stream);
}

extern "C" int gemm_skinny_append(const struct gemm_skinny *p, const struct kv_append *a,
                                  int variant, int dtype, void *stream)
{
    const struct args s = {*p, *a};
    if (!supported(p, variant) || a->head_dim < 2 || a->head_dim % 2 || a->n_rows != p->rows ||
        p->n != (a->n_heads + 2 * a->n_kv_heads) * a->head_dim)
        return (int)cudaErrorInvalidValue;
    return dtype == 0 ? choose<__nv_bfloat16, __nv_bfloat16, APPEND>(&s, variant, stream)
                      : choose<__half, __half, APPEND>(&s, variant, stream);
}
