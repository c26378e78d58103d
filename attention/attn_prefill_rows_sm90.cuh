/* The rows of a computing warpgroup of the Hopper prefill kernel: an item's 128 rows as two halves
 * of 64, their softmax state, what they want of a page, and their way out. */
#ifndef ATTENTION_ATTN_PREFILL_ROWS_SM90_CUH
#define ATTENTION_ATTN_PREFILL_ROWS_SM90_CUH

#include "attention/attn_prefill_sm90.cuh"

#include <stddef.h>

/* Named barriers of the warpgroups. */
enum { BAR_GROUP = 1 };

/* A thread's part of a row's sum over a page may grow to this before the row's maximum follows:
 * each term fits 16 bits, and O and the sums stay far from the ends of 32. */
#define SUM_LIMIT 4096.0f

/* What is known of an item's gate: nothing; that it keeps all pages; its threshold's sign. And
 * whether each half decides for itself. */
enum { GATED, OPEN, POSITIVE, NEGATIVE, SPLIT = 4 };

/* A computing thread: its place, its positions in the rings, and what it keeps of its item through
 * the page loop, in as few registers as can be. */
template <int D, int GATE>
struct consumer {
    using L = smem_layout<D, GATE>;
    uint32_t smem;
    int group;  /* 0 or 1: the item */
    float gate; /* REL moves it, by halves where they decide apart: then gate1 is the second's */
    float gate1;
    /* How (attn_steer.h): the gain's parts, 0 if it stays; pages still due of either; the page that
     * is decided next, from 1, and one more than the last. In registers: reading them from shared
     * memory for a page costs 2 to 4% of the kernel's time. */
    float steady, early, rest, rest1, n, end;
    int kept; /* (page, row group) units of the item */
    /* Bit 2 i + r: row r of half i belongs to the chunk; from bit 8 on the thread of the group. */
    int bits;
    struct ring<L::k_slots> k;
    struct ring<GATE == SM90_GATE_NONE ? L::v_slots : L::own_v_slots> v;
    __device__ __forceinline__ int thread(void) const
    {
        return bits >> 8;
    }
};

template <int D, int GATE>
__device__ __forceinline__ void group_sync(const struct consumer<D, GATE> &c)
{
    bar_sync(BAR_GROUP + c.group, GROUP_WARPS * 32);
}

/* How many tiles this group has taken: in shared memory, since registers are dear. */
template <int D, int GATE>
__device__ __forceinline__ uint32_t tiles_taken(const struct consumer<D, GATE> &c)
{
    return (uint32_t)ld_shared_s32(c.smem + smem_layout<D, GATE>::taken + 4 * c.group);
}

/* A field of the tile at hand, or of this group's item of it: read where it is needed. */
template <int D, int GATE>
__device__ __forceinline__ int tile_field(const struct consumer<D, GATE> &c, size_t field)
{
    return ld_shared_s32(c.smem + smem_layout<D, GATE>::info +
                         (tiles_taken(c) & 1) * (uint32_t)sizeof(struct tile_info) +
                         (uint32_t)field);
}

template <int D, int GATE>
__device__ __forceinline__ int item_field(const struct consumer<D, GATE> &c, size_t field)
{
    return tile_field(c, offsetof(struct tile_info, item) +
                             (uint32_t)c.group * sizeof(struct item_info) + field);
}

#define TILE_FIELD(c, name) tile_field(c, offsetof(struct tile_info, name))
#define ITEM_FIELD(c, name) item_field(c, offsetof(struct item_info, name))

/* A condition that is the same in all threads, in a form the compiler knows to be so: it serialises
 * products on branches that it takes for divergent (C7520). */
__device__ __forceinline__ bool all_of(bool x)
{
    return __any_sync(0xffffffffu, x);
}

/* Whether a row of this thread in one half wants the page: NaN does. No branches: votes wait. */
template <int D, int GATE>
__device__ __forceinline__ bool wants(const struct consumer<D, GATE> &c, const struct row_state &st,
                                      const float (&pm)[2], int half, float gate)
{
    const float b0 = GATE == SM90_GATE_REL ? st.top[0] + gate : gate;
    const float b1 = GATE == SM90_GATE_REL ? st.top[1] + gate : gate;
    const int valid = opaque(c.bits);
    const bool v0 = valid & 1 << 2 * half, v1 = valid & 2 << 2 * half;
    return (v0 & !(pm[0] < b0)) | (v1 & !(pm[1] < b1));
}

/* REL: whether all rows of the warp want scores above zero, and no score below decides anything:
 * then the order of integers will do. Steered ABS has tops of zero. */
__device__ __forceinline__ bool tops_positive(const struct row_state &st, float gate)
{
    const float least = fminf(st.top[0], st.top[1]);
    return __all_sync(0xffffffffu, least >= 0.0f && least > -gate);
}

/* The same for a threshold of the sign that KIND tells. */
template <int D, int GATE, int KIND>
__device__ __forceinline__ bool reaches(const struct consumer<D, GATE> &c, const float (&s)[32],
                                        int half)
{
    uint32_t x[2];
    page_reach<KIND == POSITIVE>(x, s);
    const uint32_t t = __float_as_uint(c.gate);
    const int valid = opaque(c.bits);
    const bool v0 = valid & 1 << 2 * half, v1 = valid & 2 << 2 * half;
    if (KIND == POSITIVE)
        return (v0 & ((int)x[0] >= (int)t)) | (v1 & ((int)x[1] >= (int)t));
    return (v0 & (x[0] <= t)) | (v1 & (x[1] <= t));
}

/* The maximum over this warp's rows of one half, in the integers of sm90_args. */
__device__ __forceinline__ int ordered_max(float v0, float v1)
{
    const int bits = __float_as_int(max_nan(v0, v1));
    return __reduce_max_sync(0xffffffffu, bits ^ (bits >> 31 & 0x7fffffff));
}

/* Adds one half's rows to the maximum of the item's `at`-th page before the diagonal. */
template <int D, int GATE>
__device__ __forceinline__ void write_max(const struct consumer<D, GATE> &c,
                                          const struct sm90_args &a, const float (&pm)[2], int half,
                                          int at)
{
    if (GATE != SM90_GATE_ABS_MAX)
        return;
    const int valid = opaque(c.bits) >> 2 * half;
    const int max = ordered_max(valid & 1 ? pm[0] : -INFINITY, valid & 2 ? pm[1] : -INFINITY);
    if (!elect_one())
        return;
    const struct page_walk w = {2 * ITEM_FIELD(c, block), ITEM_FIELD(c, sink),
                                ITEM_FIELD(c, local)};
    const int page = walk_page(w, at, a.order == SM90_ORDER_L2R);
    const int block = ITEM_FIELD(c, block) - a.seqs[TILE_FIELD(c, seq)].pos / BLOCK_M;
    const int group = ITEM_FIELD(c, rows64) ? 2 * block + half : block;
    atomicMax(a.page_max + ((int64_t)ITEM_FIELD(c, head) * a.max_groups + group) * a.max_pages +
                  page,
              max);
}

/* Moves the maxima of one half up to those of a page; O must then be scaled by alpha. */
__device__ __forceinline__ void raise_maxima(struct row_state &st, float (&alpha)[2],
                                             const float (&pm)[2], const struct sm90_args &a)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float m = max_nan(st.m[r], quad_max(pm[r]));
        alpha[r] = ex2(fmaf(st.m[r], a.scale_log2, -row_shift(m, a.scale_log2)));
        st.m[r] = m;
        st.l[r] = __fmul_rn(st.l[r], alpha[r]);
    }
}

/* Whether sums of a page's exponentials tell that a row of the warp has outgrown its maximum by too
 * much, as it does on its first page. NaN has. The branch keeps the exponentials ahead of a wait
 * for products that follows: within a block ptxas would move the wait. It cannot itself wait in the
 * branch, which only some of the group's warps may take. */
__device__ __forceinline__ bool outgrown(const float (&sum)[2])
{
    const bool grown = all_of(!(sum[0] <= SUM_LIMIT) || !(sum[1] <= SUM_LIMIT));
    if (grown)
        nap();
    return grown;
}

/* No products may be in flight. */
template <int N>
__device__ __forceinline__ void scale_rows(float (&o)[N], const float (&alpha)[2])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        o[i] *= alpha[(i >> 1) & 1];
}

/* REL decides by the maxima of all that was kept, exactly; exponents need not refer to them. */
template <int D, int GATE>
__device__ __forceinline__ void raise_tops(const struct consumer<D, GATE> &c, struct row_state &st,
                                           const float (&pm)[2])
{
    if (GATE != SM90_GATE_REL || !all_of(!(pm[0] <= st.top[0]) || !(pm[1] <= st.top[1])))
        return;
    if (all_of(ITEM_FIELD(c, is_absolute)))
        return;
    st.top[0] = max_nan(st.top[0], quad_max(pm[0]));
    st.top[1] = max_nan(st.top[1], quad_max(pm[1]));
}

/* Four registers of each of four neighbouring threads, transposed: x[i] of thread j to x[j] of
 * thread i. */
__device__ __forceinline__ void quad_transpose(uint32_t (&x)[4], int lane)
{
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit)
                continue;
            const uint32_t theirs = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + bit], bit);
            x[i] = upper ? theirs : x[i];
            x[i + bit] = upper ? x[i + bit] : theirs;
        }
    }
}

/* O and LSE of one half, in whole sectors: four threads hold 32 columns of a row and each stores
 * eight of them. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void write_half(struct consumer<D, GATE> &c, const struct sm90_args &a,
                                           const struct row_state &st, const float (&o)[D / 2],
                                           int half)
{
    const int q_row = ITEM_FIELD(c, q_row), head = ITEM_FIELD(c, head);
    const int row_begin = ITEM_FIELD(c, row_begin), row_end = ITEM_FIELD(c, row_end);
    const int thread = opaque(c.thread()), lane = thread & 31;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = half * HALF_M + thread / 32 * 16 + lane / 4 + 8 * r;
        const bool mine = row >= row_begin && row < row_end;
        const float l = quad_sum(st.l[r]), inv = l == 0.0f ? 0.0f : 1.0f / l;
        if (a.lse && (lane & 3) == 0 && mine)
            a.lse[(int64_t)(q_row + row) * a.n_heads + head] =
                l == 0.0f ? -INFINITY : fmaf(st.m[r], a.scale, logf(l));
        uint16_t *out =
            (uint16_t *)a.out + (int64_t)(q_row + row) * a.out_stride + head * D + (lane & 3) * 8;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            uint32_t x[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int at = 16 * i + 4 * j + 2 * r;
                x[j] = pack2<DT>(o[at] * inv, o[at + 1] * inv);
            }
            quad_transpose(x, lane);
            if (mine)
                *(uint4 *)(out + 32 * i) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

/* Adds an item's counts in (page, row group) units. One thread. */
template <int D, int GATE>
__device__ __forceinline__ void count_item(const struct consumer<D, GATE> &c,
                                           const struct sm90_args &a)
{
    const int groups = ITEM_FIELD(c, rows64) && ITEM_FIELD(c, row_end) > PAGE ? 2 : 1;
    const int diag = groups == 2 ? 3 : ITEM_FIELD(c, n_diag);
    const int visited = groups * ITEM_FIELD(c, n_off) + diag;
    const int kept =
        GATE == SM90_GATE_NONE || (HAS_OPEN(GATE) && TILE_FIELD(c, open)) ? visited : c.kept;
    struct sm90_counts *to[2] = {
        a.seq_counts ? a.seq_counts + TILE_FIELD(c, seq) : (struct sm90_counts *)0,
        a.head_counts ? a.head_counts + ITEM_FIELD(c, head) : (struct sm90_counts *)0};
    for (int i = 0; i < 2; i++) {
        if (!to[i])
            continue;
        atomicAdd(&to[i]->reachable,
                  (unsigned long long)(groups * 2 * ITEM_FIELD(c, block) + diag));
        atomicAdd(&to[i]->visited, (unsigned long long)visited);
        atomicAdd(&to[i]->kept, (unsigned long long)kept);
    }
}

#endif
