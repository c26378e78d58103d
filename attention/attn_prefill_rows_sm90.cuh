/* What the computing warpgroups of the Hopper prefill kernel share: a consumer's place, its tile,
 * the maintenance of the row state, and the way out of O. */
#ifndef ATTENTION_ATTN_PREFILL_ROWS_SM90_CUH
#define ATTENTION_ATTN_PREFILL_ROWS_SM90_CUH

#include "attention/attn_prefill_sm90.cuh"

/* Exponents may grow by this before O is rescaled (FlashAttention-4's lazy rescaling). */
#define SLACK_LOG2 8.0f
/* Reference of exponents before any score: finite, so that -inf minus it is -inf. */
#define SHIFT_MIN -1e30f

/* A consumer thread's place and its positions in the rings. */
template <int D>
struct consumer {
    uint32_t smem;
    int group; /* 0 or 1 */
    int warp;  /* 0..7 */
    int lane;
    struct ring<Q_SLOTS> q;
    uint32_t round; /* of K */
    struct ring<smem_layout<D>::v_slots> v;
    uint32_t v_owed; /* barrier to release once PV is done; 0: none */
    uint32_t vote_turn;
};

/* What a consumer keeps of its tile. */
struct tile_rows {
    int diag_at, n_pages; /* places of the walk that may have a page, diagonal included */
    int flags;
    uint32_t q; /* descriptor */
    float gate, scale_log2;
};

enum { ROW0_VALID = 1, ROW1_VALID = 2, ROWS64 = 4, TWO_DIAGONAL = 8 };

/* A condition that is the same in all threads, in a form the compiler knows to be so: it serialises
 * products on branches that it takes for divergent (C7520). */
__device__ __forceinline__ bool all_of(bool x)
{
    return __any_sync(0xffffffffu, x);
}

/* Passes the slots of a tile's last round of K, from `first` on, that nobody used. */
template <int D>
__device__ __forceinline__ void skip_slots(const struct consumer<D> &c, int first, uint32_t parity)
{
    using L = smem_layout<D>;
#pragma unroll 1
    for (int s = first; s < K_SLOTS; s++) {
        mbar_wait(c.smem + L::k_full + 8 * s, parity);
        if (c.lane == 0)
            mbar_arrive(c.smem + L::k_empty + 8 * s);
    }
}

/* Whether a row of the warp has scores that exceed what its exponents refer to by too much. Rows
 * seldom have after the first pages. */
__device__ __forceinline__ bool outgrown(const struct row_state &st, const float (&pm)[2],
                                         float scale_log2)
{
    return __any_sync(0xffffffffu, !(fmaf(pm[0], scale_log2, -st.shift[0]) <= SLACK_LOG2) ||
                                       !(fmaf(pm[1], scale_log2, -st.shift[1]) <= SLACK_LOG2));
}

/* Makes exponents refer to the maxima with pm; alpha is what O must be scaled by. */
__device__ __forceinline__ void move_shift(struct row_state &st, float (&alpha)[2],
                                           const float (&pm)[2], float scale_log2)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float shift = max_nan(st.shift[r], __fmul_rn(quad_max(pm[r]), scale_log2));
        alpha[r] = ex2(st.shift[r] - shift);
        st.shift[r] = shift;
        st.l[r] = __fmul_rn(st.l[r], alpha[r]);
    }
}

template <int N>
__device__ __forceinline__ void scale_rows(float (&o)[N], const float (&alpha)[2])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        o[i] *= alpha[(i >> 1) & 1];
}

/* Ends the life of packed probabilities: a page that is not packed in some branch would keep the
 * old registers alive through the whole loop. */
template <int N>
__device__ __forceinline__ void forget(uint32_t (&p)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "=r"(p[i]));
}

/* O and LSE of a tile: through this warp's rows of the Q slot, so that stores are whole lines. */
template <int D, int DT>
__device__ __forceinline__ void write_rows(struct consumer<D> &c, const struct sm90_args &a,
                                           const struct tile_info *info, struct row_state &st,
                                           float (&o)[D / 2])
{
    using L = smem_layout<D>;
    float inv[2];
    const int row0 = c.warp * 16 + c.lane / 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float l = quad_sum(st.l[r]);
        inv[r] = l == 0.0f ? 0.0f : 1.0f / l;
        int row = row0 + 8 * r;
        if (a.lse && (c.lane & 3) == 0 && row >= info->row_begin && row < info->row_end)
            a.lse[(int64_t)(info->q_row + row) * a.n_heads + info->head] =
                l == 0.0f ? -INFINITY : (st.shift[r] + log2f(l)) * LN2;
    }
    bar_sync(1 + c.group, 128); /* all QK of this group have read Q */
    const uint32_t base = c.smem + L::q + c.q.slot() * L::q_bytes;
    const int srow = c.warp * 16 + (c.lane & 15);
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t chunk = (uint32_t)(2 * (i & 3) + (c.lane >> 4)) ^ (srow & 7);
        stmatrix_x4(base + (i / 4) * L::half_bytes + srow * 128 + chunk * 16,
                    pack2<DT>(o[8 * i] * inv[0], o[8 * i + 1] * inv[0]),
                    pack2<DT>(o[8 * i + 2] * inv[1], o[8 * i + 3] * inv[1]),
                    pack2<DT>(o[8 * i + 4] * inv[0], o[8 * i + 5] * inv[0]),
                    pack2<DT>(o[8 * i + 6] * inv[1], o[8 * i + 7] * inv[1]));
    }
    __syncwarp();
    constexpr int chunks = D / 8, rows = 32 / chunks;
    const int chunk = c.lane % chunks;
#pragma unroll
    for (int i = 0; i < 16 / rows; i++) {
        int row = c.warp * 16 + i * rows + c.lane / chunks;
        uint32_t from = base + (chunk / 8) * L::half_bytes + row * 128 +
                        (((uint32_t)chunk & 7) ^ (row & 7)) * 16;
        uint4 x;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "r"(from)
                     : "memory");
        if (row >= info->row_begin && row < info->row_end)
            *(uint4 *)((uint16_t *)a.out + (int64_t)(info->q_row + row) * a.out_stride +
                       info->head * D + chunk * 8) = x;
    }
}

#endif
