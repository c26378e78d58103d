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

#include <float.h>

#define LOG2E 1.4426950408889634f
#define LN2   0.6931471805599453f

/* ---- descriptors ---- */

/* K-major operand: groups of 8 rows lie 1024 bytes apart. */
__device__ __forceinline__ uint64_t desc_k_major(uint32_t addr)
{
    return (uint64_t)((addr & 0x3ffff) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}

/* MN-major operand: the halves of 64 columns lie half_bytes apart, groups of 8 rows 1024. */
__device__ __forceinline__ uint64_t desc_mn_major(uint32_t addr, uint32_t half_bytes)
{
    return (uint64_t)((addr & 0x3ffff) >> 4) | (uint64_t)(half_bytes >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

/* ---- softmax ---- */

/* Of the two rows that a thread has in 64 rows of a block. */
struct row_state {
    float m[2];   /* maximum of the raw scores that exponents refer to */
    float l[2];   /* this thread's part of the row sum */
    float top[2]; /* maximum of all kept scores, where pages are skipped by that (REL) */
};

/* What is taken off exponents: m in base-2 units, but finite while m is -inf. */
__device__ __forceinline__ float row_shift(float m, float scale_log2)
{
    return max_nan(m * scale_log2, -FLT_MAX);
}

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

/* This thread's maxima of one page. */
__device__ __forceinline__ void page_max(float (&pm)[2], const float (&s)[32])
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float a = max_nan(s[2 * r], s[2 * r + 1]);
        float b = max_nan(s[4 + 2 * r], s[4 + 2 * r + 1]);
#pragma unroll
        for (int i = 2; i < 8; i += 2) {
            a = max_nan(a, s[4 * i + 2 * r]);
            a = max_nan(a, s[4 * i + 2 * r + 1]);
            b = max_nan(b, s[4 * i + 4 + 2 * r]);
            b = max_nan(b, s[4 * i + 4 + 2 * r + 1]);
        }
        pm[r] = max_nan(a, b);
    }
}

/* Of this thread's part of each row of a page, as bits, the score that tells whether one reaches a
 * threshold of a sign: the largest in the order of integers, or the least in that of unsigned ones.
 * Three operands an instruction; max.NaN has two. NaN of the tensor cores is positive: it reaches
 * both. */
template <bool POSITIVE>
__device__ __forceinline__ void page_reach(uint32_t (&x)[2], const float (&s)[32])
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        uint32_t a = __float_as_uint(s[2 * r]), b = __float_as_uint(s[2 * r + 1]);
#pragma unroll
        for (int i = 1; i < 8; i++) {
            const uint32_t y = __float_as_uint(s[4 * i + 2 * r]);
            const uint32_t z = __float_as_uint(s[4 * i + 2 * r + 1]);
            uint32_t &acc = i & 1 ? a : b;
            acc = POSITIVE ? (uint32_t)__vimax3_s32((int)acc, (int)y, (int)z)
                           : __vimin3_u32(acc, y, z);
        }
        x[r] = POSITIVE ? (uint32_t)max((int)a, (int)b) : min(a, b);
    }
}

/* The same as maxima, which are right where they are above zero, and at most zero elsewhere. */
__device__ __forceinline__ void page_max_positive(float (&pm)[2], const float (&s)[32])
{
    uint32_t x[2];
    page_reach<true>(x, s);
    pm[0] = __uint_as_float(x[0]);
    pm[1] = __uint_as_float(x[1]);
}

/* Columns beyond the row become -inf: the diagonal page of 64 rows. col0 and row0 are the first
 * column and row of this thread. */
__device__ __forceinline__ void mask_diagonal(float (&s)[32], int col0, int row0)
{
#pragma unroll
    for (int i = 0; i < 32; i++) {
        int col = 8 * (i / 4) + (i & 1) + col0;
        if (col > ((i & 2) ? row0 + 8 : row0))
            s[i] = -INFINITY;
    }
}

/* p = exp2(s * scale - shift) of one page as A operands of PV, and this thread's sums of its rows,
 * in two chains each. Sums are never fused with what precedes them: all kernels must give equal
 * bits. */
template <int DT>
__device__ __forceinline__ void page_exp(uint32_t (&p)[16], float (&sum)[2], const float (&s)[32],
                                         const struct row_state &st, float scale_log2)
{
    const float shift[2] = {row_shift(st.m[0], scale_log2), row_shift(st.m[1], scale_log2)};
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        const float x = ex2(fmaf(s[i], scale_log2, -shift[i >> 1 & 1]));
        const float y = ex2(fmaf(s[i + 1], scale_log2, -shift[i >> 1 & 1]));
        part[i & 2] = i < 4 ? x : __fadd_rn(part[i & 2], x);
        part[(i & 2) + 1] = i < 4 ? y : __fadd_rn(part[(i & 2) + 1], y);
        p[i / 2] = pack2<DT>(x, y);
    }
    sum[0] = __fadd_rn(part[0], part[1]);
    sum[1] = __fadd_rn(part[2], part[3]);
}

__device__ __forceinline__ void add_sums(struct row_state &st, const float (&sum)[2])
{
    st.l[0] = __fadd_rn(st.l[0], sum[0]);
    st.l[1] = __fadd_rn(st.l[1], sum[1]);
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
