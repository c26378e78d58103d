/* The tile arithmetic of the attention kernels: shared-memory descriptors, the online softmax on
 * wgmma accumulators, and the walk over a query block's pages.
 *
 * Accumulator of m64nNk16 (PTX ISA 9.7.15.5): thread t of a warpgroup holds, in registers 4i..4i+3,
 * columns 8i + 2(t % 4) + {0, 1} of row r = 16 (t / 32) + (t % 32) / 4, then the same columns of
 * row r + 8. "Row 0" and "row 1" of a thread mean these two.
 * Shared tiles are [half][row][64] of 16-bit elements with the 128-byte swizzle: 16-byte chunk c of
 * a row lies at chunk c ^ (row % 8); `half` splits the head dimension into parts of 64. */
#ifndef ATTENTION_TILE_CUH
#define ATTENTION_TILE_CUH

#include "attention/ptx.cuh"

#define LOG2E 1.4426950408889634f
#define LN2   0.6931471805599453f

/* ---- descriptors (their low halves; ptx.cuh) ---- */

__device__ __forceinline__ uint32_t desc_k_major(uint32_t addr)
{
    return addr >> 4 | 1 << 16;
}

/* The halves of 64 columns lie half_bytes apart. */
__device__ __forceinline__ uint32_t desc_mn_major(uint32_t addr, uint32_t half_bytes)
{
    return addr >> 4 | half_bytes >> 4 << 16;
}

/* ---- softmax ---- */

struct row_state {
    float top[2];   /* running maximum of the raw scores, for the REL gate */
    float shift[2]; /* what exponents refer to: a maximum in base-2 units */
    float l[2];     /* this thread's part of the row sum */
};

__device__ __forceinline__ float quad_max(float x)
{
    x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* The functions of one page work on 32 accumulators of a thread, from x[FIRST] on. */

/* This thread's maxima of a page's scores, a row each. */
template <int FIRST, int N>
__device__ __forceinline__ void page_max(float (&pm)[2], const float (&x)[N])
{
    const float *s = x + FIRST;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float a = max_nan(s[2 * r], s[2 * r + 1]), b = max_nan(s[4 + 2 * r], s[5 + 2 * r]);
#pragma unroll
        for (int i = 2; i < 8; i += 2) {
            a = max_nan(a, max_nan(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
            b = max_nan(b, max_nan(s[4 * i + 4 + 2 * r], s[4 * i + 5 + 2 * r]));
        }
        pm[r] = max_nan(a, b);
    }
}

/* Columns beyond limit[row] become -inf; col0 is the first column of this thread. */
template <int FIRST, int N>
__device__ __forceinline__ void page_mask(float (&x)[N], int col0, int limit0, int limit1)
{
#pragma unroll
    for (int i = 0; i < 32; i++) {
        int col = 8 * (i / 4) + (i & 1) + col0;
        if (col > ((i & 2) ? limit1 : limit0))
            x[FIRST + i] = -INFINITY;
    }
}

/* s = exp2(s * scale - shift); adds to the row sums, in two chains a row. Sums are never fused with
 * what precedes them: all kernels must give equal bits. */
template <int FIRST, int N>
__device__ __forceinline__ void page_exp(float (&x)[N], float (&l)[2], float scale_log2,
                                         const float (&shift)[2])
{
    float part[4];
#pragma unroll
    for (int i = 0; i < 32; i++) {
        float e = ex2(fmaf(x[FIRST + i], scale_log2, -shift[(i >> 1) & 1]));
        x[FIRST + i] = e;
        part[i & 3] = i < 4 ? e : __fadd_rn(part[i & 3], e);
    }
    l[0] = __fadd_rn(l[0], __fadd_rn(part[0], part[1]));
    l[1] = __fadd_rn(l[1], __fadd_rn(part[2], part[3]));
}

/* Probabilities as A operands of PV. */
template <int DT, int N>
__device__ __forceinline__ void page_pack(uint32_t (&p)[N / 2], const float (&x)[N])
{
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        p[i] = pack2<DT>(x[2 * i], x[2 * i + 1]);
}

/* ---- the walk ---- */

/* Off-diagonal pages of a query block, in order: with a sink, page 0 first, then the local pages
 * right to left, then the other sink pages right to left; or all left to right. */
struct page_walk {
    int diag;        /* first diagonal page */
    int sink, local; /* clamped: sink + local <= diag */
};

__device__ __forceinline__ struct page_walk walk_make(int block, int sink, int local)
{
    struct page_walk w;
    w.diag = 2 * block;
    w.sink = min(sink, w.diag);
    w.local = local < 0 ? w.diag - w.sink : min(local, w.diag - w.sink);
    return w;
}

__device__ __forceinline__ int walk_page(const struct page_walk &w, int i, bool left_to_right)
{
    if (left_to_right)
        return i < w.sink ? i : w.diag - w.local + i - w.sink;
    int first = w.sink > 0;
    if (i < first)
        return 0;
    i -= first;
    return i < w.local ? w.diag - 1 - i : w.sink - 1 - (i - w.local);
}

#endif
