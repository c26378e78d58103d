/* Decode attention on Hopper over the paged cache. The contract is in attn_decode_sm90.h.
 *
 * Bottleneck: device memory; every K tile, and every V tile that is kept, is read once. At the
 * H200's rate a multiprocessor receives a (page, KV head) pair of 32 KiB in about 1700 clocks; its
 * products take a warp about 2000, so six warps a multiprocessor leave it waiting for memory.
 *
 * Tile: 16 packed rows x 64 keys, m16n8k16. A warp computes whole pages alone, with a maximum, sum
 * and output of its own, and issues its own loads, so the page loop has no barrier between warps:
 *
 *   wait K(j) | QK(j) | issue K(j+1) | gate(j) | wait V(j'), PV(j') | issue V(j) | softmax(j)
 *
 * j' is the page kept before: its V arrives under the QK of the pages after it. A piece ends with a
 * merge over the warps through shared memory; K of the next piece is in flight meanwhile. A part of
 * a cut task goes to the workspace unnormalised; the last of its thread blocks to arrive merges all
 * parts in plan order (a second kernel would cost a launch gap of 2 to 3% at 150 us).
 *
 * Grid: one thread block a share, DEC_BLOCKS a multiprocessor: one streams while the other merges.
 * Shared memory, head_dim 128: 3 warps x (K 16 KiB + V 16 KiB) = 96 KiB, states 384 B, barriers.
 * head_dim 64: two slots of 8 KiB for each. In flight a multiprocessor: up to 192 KiB.
 * Registers: O 64, S 32, Q 32, P 16 a lane; below 255, no spills.
 * Barriers: one mbarrier a slot, completed by its TMA; slots are freed in the warp's own order. */
#include "attention/attn_decode_sm90.cuh"

/* A warp's place in the share. */
template <int D>
struct dec_warp {
    uint32_t smem;
    int warp, lane;
    dec_ring<dec_layout<D>::slots> k, v, v_next; /* to consume; to load */
    int coming[dec_layout<D>::slots];            /* tiles of the K ring, oldest first */
    struct dec_feed feed;
};

/* Running softmax of a warp's rows g and g + 8, and the page whose PV is still to be done. */
template <int D>
struct dec_state {
    float o[D / 8][4];
    float m[2], shift[2]; /* maximum of raw scores; the same in base-2 units, 0 while m is -inf */
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

/* Masks and gates a page: the same answer in all lanes. pm: this lane's maxima of its two rows. */
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
    bool vote = own;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        pm[i] = max_nan(s[0][2 * i], s[0][2 * i + 1]);
#pragma unroll
        for (int n = 1; n < 8; n++)
            pm[i] = max_nan(pm[i], max_nan(s[n][2 * i], s[n][2 * i + 1]));
        float bound = r.gate[i];
        if (GATE == SM90_GATE_REL)
            bound = __fadd_rn(__fmul_rn(st.m[i], a.scale), bound);
        vote |= visits[i] && !(__fmul_rn(pm[i], a.scale) < bound);
    }
    const bool keep = GATE == SM90_GATE_NONE || __any_sync(DEC_ALL, vote);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        r.seen[i] += visits[i];
        r.kept[i] += visits[i] && keep;
    }
    return keep;
}

__device__ __forceinline__ float quad_max_nan(float x)
{
    x = max_nan(x, __shfl_xor_sync(DEC_ALL, x, 1));
    return max_nan(x, __shfl_xor_sync(DEC_ALL, x, 2));
}

/* Moves the maxima, rescales, and leaves the page's probabilities in st.p. Explicit roundings: all
 * variants must give equal bits. */
template <int D, int DT>
__device__ __forceinline__ void softmax_page(struct dec_state<D> &st, const float (&s)[8][4],
                                             float (&pm)[2], float scale_log2)
{
    float m[2];
    bool moved = false;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        m[i] = max_nan(st.m[i], quad_max_nan(pm[i]));
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

/* ---- one piece ---- */

/* This warp's pages of a piece. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void attend(struct dec_warp<D> &w, struct dec_state<D> &st,
                                       struct dec_rows &r, const uint32_t (&q)[D / 16][4],
                                       const struct dec_piece &p, const struct sm90_maps &maps,
                                       const struct dec_args &a)
{
    using L = dec_layout<D>;
    const float scale_log2 = a.scale * DEC_LOG2E;
#pragma unroll 1
    for (int i = p.begin + w.warp; i < p.end; i += DEC_WARPS) {
        const int page = dec_page(i, p.last, p.n_run, p.sink), tile = w.coming[0];
        const uint32_t at = w.warp * L::slots + w.k.slot;
        float s[8][4], pm[2];
        mbar_wait(w.smem + L::k_full + 8 * at, w.k.parity);
        score_page<D, DT>(s, q, w.smem + L::k + at * L::tile_bytes, w.lane);
        __syncwarp();
#pragma unroll
        for (int j = 1; j < L::slots; j++)
            w.coming[j - 1] = w.coming[j];
        w.coming[L::slots - 1] = load_k(w, maps, a.n_kv_heads, w.k.slot);
        w.k.next();
        if (!gate_page<D, GATE>(pm, s, r, st, a, page, w.lane))
            continue;
        if (L::slots > 1)
            load_v(w, maps, tile);
        finish_page<D, DT>(w, st);
        if (L::slots == 1)
            load_v(w, maps, tile);
        softmax_page<D, DT>(st, s, pm, scale_log2);
        st.keys = min((int)DEC_PAGE, r.last_pos + 1 - page * DEC_PAGE);
    }
    finish_page<D, DT>(w, st);
}

/* A partial result of four columns of a row. */
struct dec_part {
    float shift, l; /* shift: base-2 units, -inf if nothing was kept */
    float4 o;
};

__device__ __forceinline__ void part_add(struct dec_part &x, float2 state, float4 o)
{
    const float top = max_nan(x.shift, state.x);
    const float fx = x.shift == -INFINITY ? 0.0f : ex2(x.shift - top);
    const float fy = state.x == -INFINITY ? 0.0f : ex2(state.x - top);
    x.shift = top;
    x.l = fmaf(x.l, fx, __fmul_rn(state.y, fy));
    x.o.x = fmaf(x.o.x, fx, __fmul_rn(o.x, fy)), x.o.y = fmaf(x.o.y, fx, __fmul_rn(o.y, fy));
    x.o.z = fmaf(x.o.z, fx, __fmul_rn(o.z, fy)), x.o.w = fmaf(x.o.w, fx, __fmul_rn(o.w, fy));
}

/* Leaves this warp's rows in its V ring, and their state. */
template <int D>
__device__ __forceinline__ void leave_rows(const struct dec_warp<D> &w,
                                           const struct dec_state<D> &st, const struct dec_rows &r,
                                           unsigned char *smem)
{
    using L = dec_layout<D>;
    float *o = (float *)(smem + L::v + w.warp * L::slots * L::tile_bytes);
    float2 *state = (float2 *)(smem + L::state) + w.warp * DEC_ROWS;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = w.lane / 4 + 8 * i;
        float l = st.l[i];
        l += __shfl_xor_sync(DEC_ALL, l, 1);
        l += __shfl_xor_sync(DEC_ALL, l, 2);
        if (row >= r.n)
            continue;
        if ((w.lane & 3) == 0)
            state[row] = make_float2(st.m[i] == -INFINITY ? -INFINITY : st.shift[i], l);
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2 *)(o + row * L::o_stride + 8 * n + 2 * (w.lane & 3)) =
                make_float2(st.o[n][2 * i], st.o[n][2 * i + 1]);
    }
}

template <int D, int DT>
__device__ __forceinline__ void write_out(const struct dec_args &a, const struct dec_piece &p,
                                          const struct dec_part &x, int row, int col)
{
    const int group = a.n_heads / a.n_kv_heads, packed = p.tile * DEC_ROWS + row;
    const int head = p.kv_head * group + packed % group;
    const int64_t q_row = a.seqs[p.seq].row + packed / group;
    const float inv = x.l == 0.0f ? 0.0f : 1.0f / x.l;
    *(uint2 *)((uint16_t *)a.out + q_row * a.out_stride + head * D + col) =
        make_uint2(pack2<DT>(x.o.x * inv, x.o.y * inv), pack2<DT>(x.o.z * inv, x.o.w * inv));
    if (a.lse && col == 0)
        a.lse[q_row * a.n_heads + head] =
            x.l == 0.0f ? -INFINITY : (x.shift + log2f(x.l)) * DEC_LN2;
}

/* Where slot's rows and states lie in the workspace. */
template <int D>
__device__ __forceinline__ float4 *slot_rows(const struct dec_args &a, int slot)
{
    return (float4 *)(a.workspace + (int64_t)slot * DEC_ROWS * D);
}

template <int D>
__device__ __forceinline__ float2 *slot_states(const struct dec_args &a, int slot)
{
    return (float2 *)(a.workspace + (int64_t)2 * a.n_shares * DEC_ROWS * D) + slot * DEC_ROWS;
}

/* Merges the warps' rows: to the output, or for a part of a task to the workspace. */
template <int D, int DT>
__device__ __forceinline__ void merge_warps(const struct dec_args &a, const struct dec_piece &p,
                                            int n_rows, const unsigned char *smem)
{
    using L = dec_layout<D>;
    for (int i = threadIdx.x; i < n_rows * (D / 4); i += DEC_THREADS) {
        const int row = i / (D / 4), col = i % (D / 4) * 4;
        struct dec_part x = {-INFINITY, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
#pragma unroll
        for (int w = 0; w < DEC_WARPS; w++) {
            const float *o = (const float *)(smem + L::v + w * L::slots * L::tile_bytes);
            part_add(x, ((const float2 *)(smem + L::state))[w * DEC_ROWS + row],
                     *(const float4 *)(o + row * L::o_stride + col));
        }
        if (p.n_parts == 1) {
            write_out<D, DT>(a, p, x, row, col);
            continue;
        }
        slot_rows<D>(a, p.slot)[i] = x.o;
        if (col == 0)
            slot_states<D>(a, p.slot)[row] = make_float2(x.shift, x.l);
    }
}

/* The thread block that brings the last part of a task merges them all. The counter of a task is
 * that of the share where it begins: no share begins two cut tasks. */
template <int D, int DT>
__device__ __forceinline__ void merge_parts(const struct dec_args &a, const struct dec_piece &p,
                                            int n_rows, volatile uint32_t *last)
{
    const int share = p.first_slot / 2;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        *last = atomicAdd(a.arrived + share, 1u) == (uint32_t)p.n_parts - 1;
    __syncthreads();
    if (!*last)
        return;
    __threadfence();
    if (threadIdx.x == 0)
        a.arrived[share] = 0;
    for (int i = threadIdx.x; i < n_rows * (D / 4); i += DEC_THREADS) {
        const int row = i / (D / 4);
        struct dec_part x = {-INFINITY, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
#pragma unroll 8
        for (int part = 0; part < p.n_parts; part++) {
            const int slot = part == 0 ? p.first_slot : 2 * (share + part);
            part_add(x, __ldcg(slot_states<D>(a, slot) + row), __ldcg(slot_rows<D>(a, slot) + i));
        }
        write_out<D, DT>(a, p, x, row, i % (D / 4) * 4);
    }
}

__device__ __forceinline__ void count_pages(const struct dec_args &a, const struct dec_piece &p,
                                            const struct dec_rows &r, int warp, int lane)
{
    if ((!a.seq_counts && !a.head_counts) || (lane & 3))
        return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (r.limit[i] < 0)
            continue;
        const unsigned all = warp == 0 && p.begin == 0 ? r.limit[i] / DEC_PAGE + 1 : 0;
        struct sm90_counts *to[2] = {a.seq_counts ? a.seq_counts + p.seq : NULL,
                                     a.head_counts ? a.head_counts + r.head[i] : NULL};
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (to[j]) {
                atomicAdd(&to[j]->reachable, all);
                atomicAdd(&to[j]->visited, r.seen[i]);
                atomicAdd(&to[j]->kept, r.kept[i]);
            }
    }
}

template <int D, int DT, int GATE>
__device__ __forceinline__ void do_piece(struct dec_warp<D> &w, const struct dec_piece &p,
                                         const struct sm90_maps &maps, const struct dec_args &a,
                                         unsigned char *smem)
{
    struct dec_rows r = rows_make<GATE>(a, p, w.lane);
    struct dec_state<D> st;
    uint32_t q[D / 16][4];
    load_q<D>(q, a, r, w.lane);
#pragma unroll
    for (int i = 0; i < 2; i++)
        st.m[i] = -INFINITY, st.shift[i] = st.l[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
        st.o[n][0] = st.o[n][1] = st.o[n][2] = st.o[n][3] = 0.0f;
    st.keys = 0;
    attend<D, DT, GATE>(w, st, r, q, p, maps, a);
    count_pages(a, p, r, w.warp, w.lane);
    leave_rows<D>(w, st, r, smem);
    __syncthreads();
    merge_warps<D, DT>(a, p, r.n, smem);
    if (p.n_parts > 1)
        merge_parts<D, DT>(a, p, r.n, (volatile uint32_t *)(smem + dec_layout<D>::last));
    fence_proxy_async(); /* V loads write where the rows were */
    __syncthreads();
}

/* ---- the kernel ---- */

template <int D>
__device__ __forceinline__ void start_warp(struct dec_warp<D> &w, const struct sm90_maps &maps,
                                           const struct dec_args &a, uint32_t smem)
{
    using L = dec_layout<D>;
    w.smem = smem;
    w.warp = __shfl_sync(DEC_ALL, (int)threadIdx.x / 32, 0);
    w.lane = threadIdx.x & 31;
    w.k = {0, 0}, w.v = {0, 0}, w.v_next = {0, 0};
    w.feed.next = a.pieces + a.first[blockIdx.x];
    w.feed.end = a.pieces + a.first[blockIdx.x + 1];
    w.feed.at = w.feed.stop = 0;
    if (w.lane == 0) {
        for (int i = 0; i < L::slots; i++) {
            mbar_init(smem + L::k_full + 8 * (w.warp * L::slots + i), 1);
            mbar_init(smem + L::v_full + 8 * (w.warp * L::slots + i), 1);
        }
        mbar_fence_init();
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < L::slots; i++)
        w.coming[i] = load_k(w, maps, a.n_kv_heads, i);
}

template <int D, int DT, int GATE>
__global__ void __launch_bounds__(DEC_THREADS, DEC_BLOCKS)
    attn_decode(const __grid_constant__ struct sm90_maps maps,
                const __grid_constant__ struct dec_args args)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char smem[];
    struct dec_warp<D> w;
    start_warp<D>(w, maps, args, smem_addr(smem));
    const int end = args.first[blockIdx.x + 1];
#    pragma unroll 1
    for (int i = args.first[blockIdx.x]; i < end; i++)
        do_piece<D, DT, GATE>(w, args.pieces[i], maps, args, smem);
#endif
}

template <int D, int DT, int GATE>
static cudaError_t launch(const struct sm90_maps *maps, const struct dec_args *args,
                          cudaStream_t stream)
{
    constexpr int bytes = dec_layout<D>::bytes;
    cudaError_t e = cudaFuncSetAttribute(attn_decode<D, DT, GATE>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess)
        return e;
    attn_decode<D, DT, GATE><<<args->n_shares, DEC_THREADS, bytes, stream>>>(*maps, *args);
    return cudaGetLastError();
}

struct dec_entry {
    int head_dim, dtype, gate;
    cudaError_t (*launch)(const struct sm90_maps *, const struct dec_args *, cudaStream_t);
};

static const struct dec_entry kernels[] = {
    {128, DT_BF16, SM90_GATE_NONE, launch<128, DT_BF16, SM90_GATE_NONE>},
    {128, DT_BF16, SM90_GATE_ABS, launch<128, DT_BF16, SM90_GATE_ABS>},
    {128, DT_BF16, SM90_GATE_REL, launch<128, DT_BF16, SM90_GATE_REL>},
    {128, DT_F16, SM90_GATE_NONE, launch<128, DT_F16, SM90_GATE_NONE>},
    {128, DT_F16, SM90_GATE_ABS, launch<128, DT_F16, SM90_GATE_ABS>},
    {128, DT_F16, SM90_GATE_REL, launch<128, DT_F16, SM90_GATE_REL>},
    {64, DT_BF16, SM90_GATE_NONE, launch<64, DT_BF16, SM90_GATE_NONE>},
    {64, DT_BF16, SM90_GATE_ABS, launch<64, DT_BF16, SM90_GATE_ABS>},
    {64, DT_BF16, SM90_GATE_REL, launch<64, DT_BF16, SM90_GATE_REL>},
    {64, DT_F16, SM90_GATE_NONE, launch<64, DT_F16, SM90_GATE_NONE>},
    {64, DT_F16, SM90_GATE_ABS, launch<64, DT_F16, SM90_GATE_ABS>},
    {64, DT_F16, SM90_GATE_REL, launch<64, DT_F16, SM90_GATE_REL>},
};

int decode_sm90_launch(const struct sm90_maps *maps, const struct dec_args *args, int head_dim,
                       int dtype, int gate, void *stream)
{
    for (const struct dec_entry &k : kernels)
        if (k.head_dim == head_dim && k.dtype == dtype && k.gate == gate)
            return (int)k.launch(maps, args, (cudaStream_t)stream);
    return (int)cudaErrorInvalidValue;
}
