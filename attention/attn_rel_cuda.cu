/* Counts what the REL gate would decide, at many lambdas at once, in a run without a gate.
 *
 * A thread block takes 128 query rows, one absolute block of one head, and walks the pages that the
 * head visits, in the gate's order. For each page: S = Q K^T, the rows' maxima of it, and for the
 * pages before the block
 *     gap = max over the rows of a group of scale * (maximum of the page - running maximum)
 * before the running maxima follow. The gate skips the page iff gap < ln(lambda), so the decision
 * is counted in the bin of as many edges as are <= gap; NaN, which keeps a page, is in the last.
 * Groups are all rows and each half of 64, from the first row that is there, as on the CPU
 * (attn_block.c); rows beyond the last one have no say. A row's maximum before its first page is
 * -inf, and NaN never raises one.
 *
 * Four warps have 32 rows each, whose Q stays in registers as A operands of m16n8k16. Scores never
 * leave registers: 32 keys at a time are multiplied, and only their maxima stay. Pages of K come by
 * cp.async, two ahead; a barrier a page tells that one is there, that the one before it has been
 * read by all, and that all warps' gaps of that are there. Three warps then count, one group each,
 * a lane an edge: bin = popc(ballot); lane i keeps bin i.
 *
 * Tile shapes: Q 128 x D, K 64 x D. Thread blocks: the heads of a KV head side by side, the longest
 * block first, KV heads one after the other, so that L2 holds what runs together.
 * Shared memory, head_dim 128: K 3 x 16 KiB, then gaps [page % 2][warp] floats. A row of K is 2 D
 * bytes, its 16-byte chunk c at c ^ (row % 8) of eight: ldmatrix and copies meet no bank twice.
 * Registers, head_dim 128: Q 64, scores 32, K 8; at most 168, for three thread blocks an SM.
 * Bottleneck: products of a warp, which reach some 60% of what those of a warpgroup do; then
 * ldmatrix, 1 KiB for each 8 products.
 * Source: BLASST (arXiv 2512.12087); PTX ISA 9.7.14.5 (mma.m16n8k16, ldmatrix). */
#include "attention/attn_rel_cuda.h"

#include "attention/tile.cuh"

#include <cuda_runtime.h>

enum {
    WARPS = 4,
    THREADS = 32 * WARPS,
    BLOCK = 128,
    PAGE = 64,
    WARP_ROWS = BLOCK / WARPS,
    KEYS = 32, /* multiplied at a time */
    STAGES = 3
};

template <int D>
struct rel_layout {
    static constexpr int row_bytes = 2 * D;
    static constexpr int page_bytes = PAGE * row_bytes;
    static constexpr int gaps = STAGES * page_bytes; /* float [2][WARPS] */
    static constexpr int bytes = gaps + 2 * WARPS * 4;
};

/* What a thread block is to do: rows [first, first + n) of the sequence in one head. */
struct rel_block {
    int head, kv_head;
    int first, n;
    int n_diag; /* pages of the diagonal that are walked, before the others */
    int n_pages;
    struct page_walk walk;
};

__device__ __forceinline__ struct rel_block block_of(const struct attn_rel_args &a)
{
    struct rel_block b;
    const int last = (a.pos + a.n_rows - 1) / BLOCK, block = last - (int)blockIdx.y;
    b.kv_head = blockIdx.z;
    b.head = b.kv_head * (int)gridDim.x + (int)blockIdx.x;
    b.first = max(a.pos, block * BLOCK);
    b.n = min(a.pos + a.n_rows, (block + 1) * BLOCK) - b.first;
    struct sm90_visit v = {1, -1};
    if (a.visit)
        v = a.visit[b.head];
    b.walk = walk_make(block, v.sink, v.local);
    /* left to right, the diagonal is last: nothing is counted there */
    b.n_diag = a.order == SM90_ORDER_L2R ? 0 : (b.first + b.n - 1) / PAGE - b.walk.diag + 1;
    b.n_pages = b.n_diag + b.walk.sink + b.walk.local;
    return b;
}

/* The i-th page of the walk. */
__device__ __forceinline__ int page_at(const struct rel_block &b, int i, bool left_to_right)
{
    return i < b.n_diag ? b.walk.diag + i : walk_page(b.walk, i - b.n_diag, left_to_right);
}

/* ---- loads ---- */

/* A operands of this warp's 32 rows; rows that are not there are zeros. */
template <int D>
__device__ __forceinline__ void load_q(uint32_t (&q)[2][D / 16][4], const struct attn_rel_args &a,
                                       const struct rel_block &b)
{
    const int lane = threadIdx.x & 31, row0 = (int)threadIdx.x / 32 * WARP_ROWS + lane / 4;
    const uint16_t *base = (const uint16_t *)a.q + b.head * D + 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = row0 + 8 * i;
        const uint16_t *from = base + (int64_t)(a.row + b.first - a.pos + row) * a.q_stride;
#pragma unroll
        for (int k = 0; k < D / 8; k++) /* register 2 (k % 2) + i % 2 of step k / 2 */
            q[i / 2][k / 2][2 * (k & 1) + (i & 1)] =
                row < b.n ? *(const uint32_t *)(from + 8 * k) : 0u;
    }
}

/* Begins to copy a page of the pool; every thread copies the same chunk of every few rows. */
template <int D>
__device__ __forceinline__ void load_page(uint32_t to, const struct attn_rel_args &a,
                                          const struct rel_block &b, int32_t page)
{
    using L = rel_layout<D>;
    constexpr int chunks = D / 8, rows = THREADS / chunks;
    static_assert(rows % 8 == 0, "a thread's rows have the same place in the swizzle");
    const int row = (int)threadIdx.x / chunks, chunk = (int)threadIdx.x % chunks;
    const char *from =
        (const char *)a.k + ((int64_t)page * a.n_kv_heads + b.kv_head) * L::page_bytes;
    from += row * L::row_bytes + chunk * 16;
    to += row * L::row_bytes + (chunk ^ (row & 7)) * 16;
#pragma unroll
    for (int i = 0; i < PAGE / rows; i++)
        cp_async_16(to + i * rows * L::row_bytes, from + i * rows * L::row_bytes);
}

/* ---- a page ---- */

/* Scores of keys [key0, key0 + 32) of the page at `k`. lane_row: where this lane's row of an
 * ldmatrix begins, with the low chunk bit already in place; matrices 0 and 1 are two chunks of
 * eight keys, 2 and 3 those of the next eight. */
template <int D, int DT>
__device__ __forceinline__ void multiply(float (&s)[2][KEYS / 8][4],
                                         const uint32_t (&q)[2][D / 16][4], uint32_t k,
                                         uint32_t lane_row, int key0)
{
    using L = rel_layout<D>;
#pragma unroll
    for (int step = 0; step < D / 16; step++) {
        const uint32_t at = k + (lane_row ^ (uint32_t)((step & 3) * 32)) + (step / 4) * 128;
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            uint32_t r[4];
            ldsm_x4(r, at + (key0 + 16 * j) * L::row_bytes);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma_16816<DT>(s[m][2 * j], q[m][step], r[0], r[1]);
                mma_16816<DT>(s[m][2 * j + 1], q[m][step], r[2], r[3]);
            }
        }
    }
}

/* Keys that a row may not see become -inf. beyond: the first key's position less that of this
 * thread's first row. */
__device__ __forceinline__ void mask(float (&s)[2][KEYS / 8][4], int beyond)
{
#pragma unroll
    for (int i = 0; i < 2 * KEYS / 8 * 4; i++) {
        const int m = i / (KEYS / 2), j = i / 4 % (KEYS / 8);
        const int key = beyond + 8 * j + (i & 1), row = 16 * m + 8 * (i >> 1 & 1);
        if (key > row)
            s[m][j][i & 3] = -INFINITY;
    }
}

/* Maxima of the page over the four rows of this thread, 8 apart. to_first: as mask's beyond, of the
 * page. */
template <int D, int DT>
__device__ __forceinline__ void page_tops(float (&top)[4], const uint32_t (&q)[2][D / 16][4],
                                          uint32_t k, uint32_t lane_row, bool diagonal,
                                          int to_first)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        top[i] = -INFINITY;
#pragma unroll
    for (int key0 = 0; key0 < PAGE; key0 += KEYS) {
        float s[2][KEYS / 8][4] = {};
        multiply<D, DT>(s, q, k, lane_row, key0);
        if (diagonal)
            mask(s, to_first + key0);
#pragma unroll
        for (int i = 0; i < 2 * KEYS / 8 * 4; i++) {
            const int m = i / (KEYS / 2), j = i / 4 % (KEYS / 8);
            float &t = top[2 * m + (i >> 1 & 1)];
            t = max_nan(t, s[m][j][i & 3]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        top[i] = quad_max(top[i]);
}

/* The largest gap of this warp's rows, then their running maxima follow. */
__device__ __forceinline__ float follow(float (&m)[4], const float (&top)[4], int n, float scale)
{
    const int row0 = (int)threadIdx.x / 32 * WARP_ROWS + (int)(threadIdx.x & 31) / 4;
    float gap = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (row0 + 8 * i < n)
            gap = max_nan(gap, (top[i] - m[i]) * scale);
        m[i] = fmaxf(m[i], top[i]); /* not by NaN */
    }
#pragma unroll
    for (int lane = 4; lane < 32; lane *= 2)
        gap = max_nan(gap, __shfl_xor_sync(0xffffffffu, gap, lane));
    return gap;
}

/* ---- counting ---- */

/* What one warp counts: of all rows, of the first 64, or of the others. Lane i has edge i, and how
 * many decisions were in bin i. */
struct rel_counter {
    float edge;
    bool has_edge, counts;
    int warp, lane;
    uint32_t n;
};

__device__ __forceinline__ struct rel_counter counter_of(const struct attn_rel_args &a,
                                                         const struct rel_block &b)
{
    struct rel_counter c;
    c.lane = threadIdx.x & 31;
    c.warp = (int)threadIdx.x / 32;
    c.has_edge = c.lane < a.n_edges;
    c.edge = c.has_edge ? a.edges[c.lane] : 0.0f;
    c.counts = c.warp < 2 || (c.warp == 2 && b.n > BLOCK / 2);
    c.n = 0;
    return c;
}

/* gaps: of the four warps. */
__device__ __forceinline__ void count(struct rel_counter &c, const float *gaps)
{
    if (!c.counts)
        return;
    const int first = c.warp == 2 ? 2 : 0;
    float gap = max_nan(gaps[first], gaps[first + 1]);
    if (c.warp == 0)
        gap = max_nan(gap, max_nan(gaps[2], gaps[3]));
    c.n += __popc(__ballot_sync(0xffffffffu, c.has_edge && !(gap < c.edge))) == c.lane;
}

__device__ __forceinline__ void publish(const struct rel_counter &c, const struct attn_rel_args &a,
                                        const struct rel_block &b)
{
    const int row = (c.warp > 0 ? a.n_heads : 0) + b.head;
    if (c.n > 0)
        atomicAdd(&a.bins[(int64_t)row * (a.n_edges + 1) + c.lane], (unsigned long long)c.n);
}

/* ---- the kernel ---- */

template <int D, int DT>
__global__ void __launch_bounds__(THREADS, 3)
    attn_rel(const __grid_constant__ struct attn_rel_args a)
{
    using L = rel_layout<D>;
    extern __shared__ __align__(128) unsigned char smem_ptr[];
    const uint32_t smem = smem_addr(smem_ptr);
    float *gaps = (float *)(smem_ptr + L::gaps);
    const int lane = threadIdx.x & 31, warp = (int)threadIdx.x / 32;
    const bool left_to_right = a.order == SM90_ORDER_L2R;
    const struct rel_block b = block_of(a);
    if (b.walk.sink + b.walk.local == 0)
        return;

    for (int i = 0; i < STAGES - 1; i++) {
        if (i < b.n_pages)
            load_page<D>(smem + i * L::page_bytes, a, b, a.pages[page_at(b, i, left_to_right)]);
        cp_async_commit();
    }
    uint32_t q[2][D / 16][4];
    load_q<D>(q, a, b);
    struct rel_counter c = counter_of(a, b);
    float m[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    const uint32_t lane_row =
        ((lane & 7) + (lane >> 4) * 8) * L::row_bytes + (((lane >> 3 & 1) ^ (lane & 7)) * 16);
    const int first_row =
        b.first + warp * WARP_ROWS + lane / 4; /* position of this thread's first */
    int32_t next = STAGES - 1 < b.n_pages ? a.pages[page_at(b, STAGES - 1, left_to_right)] : 0;

    for (int i = 0, slot = 0; i < b.n_pages; i++, slot = slot + 1 < STAGES ? slot + 1 : 0) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (i + STAGES - 1 < b.n_pages)
            load_page<D>(smem + (slot > 0 ? slot - 1 : STAGES - 1) * L::page_bytes, a, b, next);
        cp_async_commit();
        if (i + STAGES < b.n_pages)
            next = a.pages[page_at(b, i + STAGES, left_to_right)];
        if (i > b.n_diag)
            count(c, gaps + (i - 1) % 2 * WARPS);

        const bool diagonal = i < b.n_diag;
        float top[4];
        page_tops<D, DT>(top, q, smem + slot * L::page_bytes, lane_row, diagonal,
                         (b.walk.diag + i) * PAGE + 2 * (lane & 3) - first_row);
        const float gap = follow(m, top, b.n, a.scale);
        if (!diagonal && lane == 0)
            gaps[i % 2 * WARPS + warp] = gap;
    }
    __syncthreads();
    count(c, gaps + (b.n_pages - 1) % 2 * WARPS);
    publish(c, a, b);
}

template <int D, int DT>
static cudaError_t launch(const struct attn_rel_args *a, cudaStream_t stream)
{
    constexpr int bytes = rel_layout<D>::bytes;
    const int blocks = (a->pos + a->n_rows - 1) / BLOCK - a->pos / BLOCK + 1;
    const dim3 grid((unsigned)(a->n_heads / a->n_kv_heads), (unsigned)blocks,
                    (unsigned)a->n_kv_heads);
    cudaError_t e =
        cudaFuncSetAttribute(attn_rel<D, DT>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess)
        return e;
    attn_rel<D, DT><<<grid, THREADS, bytes, stream>>>(*a);
    return cudaGetLastError();
}

int attn_rel_launch(const struct attn_rel_args *args, int head_dim, int dtype, void *stream)
{
    cudaStream_t s = (cudaStream_t)stream;
    if (args->n_edges < 1 || args->n_edges > ATTN_REL_MAX_EDGES ||
        (head_dim != 64 && head_dim != 128))
        return (int)cudaErrorInvalidValue;
    if (head_dim == 128)
        return (int)(dtype == DT_BF16 ? launch<128, DT_BF16>(args, s)
                                      : launch<128, DT_F16>(args, s));
    return (int)(dtype == DT_BF16 ? launch<64, DT_BF16>(args, s) : launch<64, DT_F16>(args, s));
}
