/* One page of the Hopper decode kernel, by one warp: loads, scores, gate, softmax, values. The
 * order of these steps is told in attn_decode_sm90.cu. */
#ifndef ATTENTION_ATTN_DECODE_PAGE_SM90_CUH
#define ATTENTION_ATTN_DECODE_PAGE_SM90_CUH

#include "attention/attn_decode_sm90.cuh"

/* A warp's place in the share. */
template <int D>
struct dec_warp {
    uint32_t smem;
    int warp, lane;
    ring_place<dec_layout<D>::slots> k, v, v_next; /* to consume; to load */
    int coming[dec_layout<D>::slots];              /* tiles of the K ring, oldest first */
    struct dec_feed feed;
    bool has_v;    /* V of the next page is on its way already */
    uint32_t step; /* pages of a warp so far in the block: position in the ring of maxima */
};

/* Running softmax of a warp's rows g and g + 8, and the page whose PV is still to be done. */
template <int D>
struct dec_state {
    float o[D / 8][4];
    float m[2], shift[2]; /* maximum of raw scores; the same in base-2 units, 0 while m is -inf */
    float top[2];         /* REL: maxima that the other warps have shown */
    float l[2];           /* this lane's part of the sum */
    uint32_t p[16];       /* probabilities of the pending page */
    int keys;             /* of the pending page: up to the piece's newest token; 0: none pending */
};

/* ---- loads ---- */

/* Loads the next page's K into the slot; returns its tile. */
template <int D>
__device__ __forceinline__ int load_k(struct dec_warp<D> &w, const struct sm90_maps &maps,
                                      int n_kv_heads, uint32_t slot)
{
    using L = dec_layout<D>;
    const int tile = feed_tile(w.feed, n_kv_heads, w.warp, w.lane);
    if (tile >= 0 && w.lane == 0) {
        const uint32_t at = w.warp * L::slots + slot, bar = w.smem + L::k_full + 8 * at;
        mbar_arrive_expect_tx(bar, L::tile_bytes);
        tma_load_4d(w.smem + L::k + at * L::tile_bytes, &maps.k, bar, 0, 0, 0, tile,
                    L2_EVICT_FIRST);
    }
    return tile;
}

template <int D>
__device__ __forceinline__ void load_v(struct dec_warp<D> &w, const struct sm90_maps &maps,
                                       int tile)
{
    using L = dec_layout<D>;
    if (w.lane == 0) {
        const uint32_t at = w.warp * L::slots + w.v_next.slot, bar = w.smem + L::v_full + 8 * at;
        mbar_arrive_expect_tx(bar, L::tile_bytes);
        tma_load_4d(w.smem + L::v + at * L::tile_bytes, &maps.v, bar, 0, 0, 0, tile,
                    L2_EVICT_FIRST);
    }
    w.v_next.next();
}

/* Rows g and g + 8 of Q as A operands; rows the piece lacks are zero. */
template <int D>
__device__ __forceinline__ void load_q(uint32_t (&q)[D / 16][4], const struct dec_args &a,
                                       const struct dec_rows &r, int lane)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint16_t *row =
            (const uint16_t *)a.q + (int64_t)r.q_row[i] * a.q_stride + r.head[i] * D;
        const uint32_t *from = (const uint32_t *)row + (lane & 3);
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            q[s][i] = r.limit[i] >= 0 ? from[8 * s] : 0;
            q[s][i + 2] = r.limit[i] >= 0 ? from[8 * s + 4] : 0;
        }
    }
}

/* ---- one page ---- */

/* S = Q K^T of the K tile at `tile`. */
template <int D, int DT>
__device__ __forceinline__ void score_page(float (&s)[8][4], const uint32_t (&q)[D / 16][4],
                                           uint32_t tile, int lane)
{
    const int row = lane & 7, matrix = lane >> 3;
    const uint32_t base = tile + ((matrix >> 1) * 8 + row) * 128 + (((matrix & 1) ^ row) << 4);
#pragma unroll
    for (int n = 0; n < 8; n++)
        s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            uint32_t b[4];
            ldsm_x4(b, (base ^ ((k & 3) << 5)) + (k / 4) * dec_layout<D>::half_bytes + n * 2048);
            mma_16816<DT>(s[2 * n], q[k], b[0], b[1]);
            mma_16816<DT>(s[2 * n + 1], q[k], b[2], b[3]);
        }
}

/* O += P V of the V tile at `tile`. */
template <int D, int DT>
__device__ __forceinline__ void add_values(float (&o)[D / 8][4], const uint32_t (&p)[16],
                                           uint32_t tile, int lane)
{
    const int row = lane & 7, matrix = lane >> 3;
    const uint32_t base = tile + ((matrix & 1) * 8 + row) * 128 + (((matrix >> 1) ^ row) << 4);
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            ldsm_trans_x4(b,
                          (base ^ ((n & 3) << 5)) + (n / 4) * dec_layout<D>::half_bytes + k * 2048);
            mma_16816<DT>(o[2 * n], p + 4 * k, b[0], b[1]);
            mma_16816<DT>(o[2 * n + 1], p + 4 * k, b[2], b[3]);
        }
}

/* Zeroes the V rows behind the newest token: stale memory may hold NaN. */
template <int D>
__device__ __forceinline__ void clear_tail(uint32_t tile, int keys, int lane)
{
    for (int row = keys; row < DEC_PAGE; row++)
#pragma unroll
        for (int half = 0; half < D / 64; half++)
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(tile + half * dec_layout<D>::half_bytes +
                                                         row * 128 + lane * 4),
                         "r"(0)
                         : "memory");
    fence_proxy_async();
    __syncwarp();
}

/* PV of the pending page, if any. */
template <int D, int DT>
__device__ __forceinline__ void finish_page(struct dec_warp<D> &w, struct dec_state<D> &st)
{
    using L = dec_layout<D>;
    if (st.keys == 0)
        return;
    const uint32_t at = w.warp * L::slots + w.v.slot, tile = w.smem + L::v + at * L::tile_bytes;
    mbar_wait(w.smem + L::v_full + 8 * at, w.v.parity);
    if (st.keys < DEC_PAGE)
        clear_tail<D>(tile, st.keys, w.lane);
    add_values<D, DT>(st.o, st.p, tile, w.lane);
    __syncwarp();
    w.v.next();
    st.keys = 0;
}

/* Scores of keys a row may not see become -inf. */
__device__ __forceinline__ void mask_page(float (&s)[8][4], const struct dec_rows &r, int page,
                                          const bool (&visits)[2], int lane)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int limit = visits[i] ? r.limit[i] - page * DEC_PAGE : -1;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (8 * n + 2 * (lane & 3) + j > limit)
                    s[n][2 * i + j] = -INFINITY;
    }
}

/* Shows the other warps this warp's maxima after its step-th page. */
template <int D>
__device__ __forceinline__ void show_maxima(const struct dec_warp<D> &w,
                                            const struct dec_state<D> &st, unsigned char *smem)
{
    using L = dec_layout<D>;
    const uint32_t slot = w.step % DEC_STEPS;
    float *to = (float *)(smem + L::tops) + (slot * DEC_WARPS + w.warp) * DEC_ROWS;
    if ((w.lane & 3) == 0)
        to[w.lane / 4] = st.m[0], to[w.lane / 4 + 8] = st.m[1];
    __syncwarp();
    if (w.lane == 0)
        mbar_arrive(w.smem + L::tops_full + 8 * slot);
}

/* Waits for what all warps have shown two steps ago. Never the last step: a warp would wait for the
 * slowest load of all. */
template <int D>
__device__ __forceinline__ void see_maxima(const struct dec_warp<D> &w, struct dec_state<D> &st,
                                           const unsigned char *smem)
{
    using L = dec_layout<D>;
    const uint32_t step = w.step - 2, slot = step % DEC_STEPS;
    const float *from = (const float *)(smem + L::tops) + slot * DEC_WARPS * DEC_ROWS;
    mbar_wait(w.smem + L::tops_full + 8 * slot, step / DEC_STEPS & 1);
#pragma unroll
    for (int i = 0; i < DEC_WARPS; i++) {
        st.top[0] = max_nan(st.top[0], from[i * DEC_ROWS + w.lane / 4]);
        st.top[1] = max_nan(st.top[1], from[i * DEC_ROWS + w.lane / 4 + 8]);
    }
}

__device__ __forceinline__ float quad_max_nan(float x)
{
    x = max_nan(x, __shfl_xor_sync(DEC_ALL, x, 1));
    return max_nan(x, __shfl_xor_sync(DEC_ALL, x, 2));
}

/* A page that others of the piece keep is none to these rows: probabilities of 0, no maximum. */
__device__ __forceinline__ void drop_rows(float (&s)[8][4], float (&pm)[2], const bool (&drops)[2])
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!drops[i])
            continue;
        pm[i] = -INFINITY;
#pragma unroll
        for (int n = 0; n < 8; n++)
            s[n][2 * i] = s[n][2 * i + 1] = -INFINITY;
    }
}

/* Masks and gates a page: whether it is kept, the same answer in all lanes. pm: maxima of the
 * lane's two rows, under ABS of the whole row, else of this lane's part. */
template <int D, int GATE>
__device__ __forceinline__ bool gate_page(float (&pm)[2], float (&s)[8][4], struct dec_rows &r,
                                          const struct dec_state<D> &st, const struct dec_args &a,
                                          int page, int lane)
{
    const bool visits[2] = {row_visits(r, 0, page), row_visits(r, 1, page)};
    const bool own = page * DEC_PAGE + DEC_PAGE > r.first_pos;
    const bool hidden = (r.limit[0] >= 0 && !visits[0]) || (r.limit[1] >= 0 && !visits[1]);
    if (own || (a.visit && __any_sync(DEC_ALL, hidden)))
        mask_page(s, r, page, visits, lane);
    bool votes[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        pm[i] = max_nan(s[0][2 * i], s[0][2 * i + 1]);
#pragma unroll
        for (int n = 1; n < 8; n++)
            pm[i] = max_nan(pm[i], max_nan(s[n][2 * i], s[n][2 * i + 1]));
        if (GATE == SM90_GATE_ABS)
            pm[i] = quad_max_nan(pm[i]);
        float bound = r.gate[i];
        if (GATE == SM90_GATE_REL)
            bound = __fadd_rn(__fmul_rn(max_nan(st.m[i], st.top[i]), a.scale), bound);
        const bool always = GATE == SM90_GATE_ABS ? page * DEC_PAGE + DEC_PAGE > r.limit[i] : own;
        votes[i] = visits[i] && (always || !(__fmul_rn(pm[i], a.scale) < bound));
    }
    const bool keep = GATE == SM90_GATE_NONE || __any_sync(DEC_ALL, votes[0] || votes[1]);
    bool drops[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        drops[i] = GATE == SM90_GATE_ABS && visits[i] && !votes[i];
        r.seen[i] += visits[i];
        r.kept[i] += visits[i] && keep && !drops[i];
    }
    if (GATE == SM90_GATE_ABS && keep && __any_sync(DEC_ALL, drops[0] || drops[1]))
        drop_rows(s, pm, drops);
    return keep;
}

/* Moves the maxima, rescales, and leaves the page's probabilities in st.p. Explicit roundings: all
 * variants must give equal bits. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void softmax_page(struct dec_state<D> &st, const float (&s)[8][4],
                                             float (&pm)[2], float scale_log2)
{
    float m[2];
    bool moved = false;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        m[i] = max_nan(st.m[i], GATE == SM90_GATE_ABS ? pm[i] : quad_max_nan(pm[i]));
        moved |= !(m[i] == st.m[i]);
    }
    if (__any_sync(DEC_ALL, moved)) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float shift = m[i] == -INFINITY ? 0.0f : __fmul_rn(m[i], scale_log2);
            const float alpha = st.m[i] == -INFINITY ? 0.0f : ex2(__fadd_rn(st.shift[i], -shift));
            st.m[i] = m[i], st.shift[i] = shift;
            st.l[i] = __fmul_rn(st.l[i], alpha);
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                st.o[n][2 * i] = __fmul_rn(st.o[n][2 * i], alpha);
                st.o[n][2 * i + 1] = __fmul_rn(st.o[n][2 * i + 1], alpha);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float x = ex2(fmaf(s[n][2 * i], scale_log2, -st.shift[i]));
            const float y = ex2(fmaf(s[n][2 * i + 1], scale_log2, -st.shift[i]));
            sum[n & 1] = __fadd_rn(sum[n & 1], __fadd_rn(x, y));
            st.p[2 * n + i] = pack2<DT>(x, y);
        }
        st.l[i] = __fadd_rn(st.l[i], __fadd_rn(sum[0], sum[1]));
    }
}

#endif
