/* One page for an item of the Hopper prefill kernel: products, waits and releases of K and V, the
 * decision, softmax. The order of things is told in attn_prefill_sm90.cu. */
#ifndef ATTENTION_ATTN_PREFILL_PAGE_SM90_CUH
#define ATTENTION_ATTN_PREFILL_PAGE_SM90_CUH

#include "attention/attn_prefill_rows_sm90.cuh"

/* ---- products ---- */

/* Q of this group. FRESH: made where it is used, for the compiler would keep the descriptors of all
 * steps. */
template <int D, int GATE, bool FRESH>
__device__ __forceinline__ uint64_t q_desc(const struct consumer<D, GATE> &c)
{
    using L = smem_layout<D, GATE>;
    const uint32_t smem = FRESH ? (uint32_t)opaque((int)c.smem) : c.smem;
    return desc_k_major(smem + L::q + c.group * L::q_bytes);
}

template <int D, int DT>
__device__ __forceinline__ void issue_qk(float (&s)[32], uint64_t q_desc, uint32_t k_addr)
{
    const uint64_t k_desc = desc_k_major(k_addr);
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const uint64_t q_step = (uint64_t)((i / 4) * BLOCK_M * 128 + (i % 4) * 32) >> 4;
        const uint64_t k_step = (uint64_t)((i / 4) * PAGE * 128 + (i % 4) * 32) >> 4;
        if (i == 0)
            wgmma_qk<DT, true>(s, q_desc, k_desc);
        else
            wgmma_qk<DT, false>(s, q_desc + q_step, k_desc + k_step);
    }
    wgmma_commit();
}

template <int D, int DT>
__device__ __forceinline__ void issue_pv(float (&o)[D / 2], uint32_t (&p)[16], uint32_t v_addr)
{
    const uint64_t v_desc = desc_mn_major(v_addr, PAGE * 128);
    wgmma_pin(o);
    wgmma_pin(p);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < PAGE / 16; i++)
        wgmma_pv<DT>(o, p + 4 * i, v_desc + (uint64_t)(i * 2048 >> 4));
    wgmma_commit();
}

/* ---- pages ---- */

/* Gives the K page at hand back. */
template <int D, int GATE>
__device__ __forceinline__ void release_k(struct consumer<D, GATE> &c)
{
    if (elect_one())
        mbar_arrive(c.smem + smem_layout<D, GATE>::k_empty + 8 * c.k.slot());
    c.k.next();
}

template <int D, int GATE>
__device__ __forceinline__ void release_v(struct consumer<D, GATE> &c)
{
    if (GATE == SM90_GATE_NONE) {
        if (elect_one())
            mbar_arrive(c.smem + smem_layout<D, GATE>::v_empty + 8 * c.v.slot());
    }
    c.v.next();
}

/* Waits for the K page at hand; returns its address. */
template <int D, int GATE>
__device__ __forceinline__ uint32_t wait_k(const struct consumer<D, GATE> &c)
{
    using L = smem_layout<D, GATE>;
    const uint32_t slot = c.k.slot();
    mbar_wait(c.smem + L::k_full + 8 * slot, c.k.parity());
    return c.smem + L::k + slot * L::page_bytes;
}

template <int D, int GATE>
__device__ __forceinline__ uint32_t v_slot(const struct consumer<D, GATE> &c)
{
    return (GATE == SM90_GATE_NONE ? 0u : (uint32_t)(c.group * smem_layout<D, GATE>::own_v_slots)) +
           c.v.slot();
}

template <int D, int GATE>
__device__ __forceinline__ uint32_t wait_v(const struct consumer<D, GATE> &c)
{
    using L = smem_layout<D, GATE>;
    const uint32_t slot = v_slot(c), full = GATE == SM90_GATE_NONE ? L::v_full : L::v_asked;
    mbar_wait(c.smem + full + 8 * slot, c.v.parity());
    return c.smem + L::v + slot * L::page_bytes;
}

/* Passes over entries of the tile that are not for this group. */
template <int D, int GATE>
__device__ __forceinline__ void pass(struct consumer<D, GATE> &c, int n)
{
    for (; all_of(n > 0); n--) {
        wait_k(c);
        release_k(c);
        if (GATE == SM90_GATE_NONE) {
            wait_v(c);
            release_v(c);
        }
    }
}

/* One thread asks for the V page of the K page at hand. Its slot is free: all warps of the group
 * have passed a barrier since they last read it. */
template <int D, int GATE>
__device__ __forceinline__ void request_v(const struct consumer<D, GATE> &c, const CUtensorMap *map)
{
    using L = smem_layout<D, GATE>;
    if (c.thread() != 0)
        return;
    const uint32_t slot = v_slot(c), full = c.smem + L::v_asked + 8 * slot;
    const int tile = ld_shared_s32(c.smem + L::k_tile + 4 * c.k.slot());
    mbar_arrive_expect_tx(full, L::page_bytes);
    tma_load_4d(c.smem + L::v + slot * L::page_bytes, map, full, 0, 0, 0, tile, L2_EVICT_LAST);
}

/* Adds a page that n row groups keep. */
template <int D, int GATE>
__device__ __forceinline__ void count_kept(struct consumer<D, GATE> &c, int n)
{
    if (GATE != SM90_GATE_NONE)
        c.kept += n;
}

template <int D, int GATE>
__device__ __forceinline__ bool vote(const struct consumer<D, GATE> &c, bool x)
{
    return bar_any(BAR_GROUP + c.group, GROUP_WARPS * 32, x);
}

/* 1 / x, nearly; x is not small. */
__device__ __forceinline__ float reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* What moves REL's gate at the page at hand: a kept one by gain, any by fall times what is due. See
 * attn_steer_next. */
struct steering {
    float gain, fall;
};

/* And goes on to the next page. */
template <int D, int GATE>
__device__ __forceinline__ struct steering steering_now(struct consumer<D, GATE> &c)
{
    if (GATE != SM90_GATE_REL)
        return {0.0f, 0.0f};
    const float gain = fmaf(c.early, reciprocal(c.n), c.steady), left = c.end - c.n;
    c.n += 1.0f;
    return {gain, gain * reciprocal(left)};
}

template <int D, int GATE>
__device__ __forceinline__ void steer_any(const struct consumer<D, GATE> &,
                                          const struct steering &m, float &gate, float rest)
{
    if (GATE == SM90_GATE_REL)
        gate -= m.fall * rest;
}

template <int D, int GATE>
__device__ __forceinline__ void steer_kept(const struct consumer<D, GATE> &,
                                           const struct steering &m, float &gate, float &rest)
{
    if (GATE == SM90_GATE_REL) {
        gate += m.gain;
        rest = fmaxf(rest - 1.0f, 0.0f);
    }
}

/* QK of both halves; returns when the first half's scores are there. An open item asks for V now.
 * How REL's gate is to move is computed meanwhile. */
template <int D, int DT, int GATE, int KIND>
__device__ __forceinline__ void begin_page(struct consumer<D, GATE> &c, struct steering &move,
                                           const CUtensorMap *map, float (&s0)[32], float (&s1)[32])
{
    using L = smem_layout<D, GATE>;
    const uint32_t k = wait_k(c);
    const uint64_t q = q_desc<D, GATE, (KIND & SPLIT) != 0>(c);
    if ((KIND & ~SPLIT) == OPEN) {
        group_sync(c);
        request_v(c, map);
    }
    wgmma_fence();
    issue_qk<D, DT>(s0, q, k);
    issue_qk<D, DT>(s1, q + (HALF_M * 128 >> 4), k);
    move = steering_now(c);
    wgmma_wait<1>();
    wgmma_pin(s0);
}

/* Whether a row of one half, whose scores are there, wants the page, the item's `at`-th before the
 * diagonal. pm: the maxima of its rows, unless the threshold's sign is known. */
template <int D, int GATE, int KIND>
__device__ __forceinline__ bool
half_wants(const struct consumer<D, GATE> &c, const struct sm90_args &a, const struct row_state &st,
           const float (&s)[32], float (&pm)[2], int half, int at, float gate)
{
    if (KIND != GATED)
        return reaches<D, GATE, KIND>(c, s, half);
    if (GATE == SM90_GATE_REL && tops_positive(st, gate))
        page_max_positive(pm, s);
    else
        page_max(pm, s);
    write_max(c, a, pm, half, at);
    return wants(c, st, pm, half, gate);
}

/* The exponentials of one half once more, after its maxima. No products may be in flight. */
template <int D, int DT>
__device__ __forceinline__ void settle(uint32_t (&p)[16], float (&sum)[2], const float (&s)[32],
                                       struct row_state &st, float (&o)[D / 2],
                                       const struct sm90_args &a)
{
    float pm[2], alpha[2];
    page_max(pm, s);
    raise_maxima(st, alpha, pm, a);
    scale_rows(o, alpha);
    page_exp<DT>(p, sum, s, st, a.scale_log2);
}

/* Softmax of one half. No products may be in flight. */
template <int D, int DT>
__device__ __forceinline__ void half_exp(uint32_t (&p)[16], const float (&s)[32],
                                         struct row_state &st, float (&o)[D / 2],
                                         const struct sm90_args &a)
{
    float sum[2];
    page_exp<DT>(p, sum, s, st, a.scale_log2);
    if (outgrown(sum))
        settle<D, DT>(p, sum, s, st, o, a);
    add_sums(st, sum);
}

/* Softmax of the first half under QK of the second, which has come when it returns. */
template <int D, int DT>
__device__ __forceinline__ void exp_under_qk(uint32_t (&p)[16], const float (&s0)[32],
                                             float (&s1)[32], struct row_state &st,
                                             float (&o)[D / 2], const struct sm90_args &a)
{
    float sum[2];
    page_exp<DT>(p, sum, s0, st, a.scale_log2);
    const bool grown = outgrown(sum);
    wgmma_wait<0>();
    wgmma_pin(s1);
    if (all_of(grown))
        settle<D, DT>(p, sum, s0, st, o, a);
    add_sums(st, sum);
}

/* PV of both halves, the second's softmax under the first's. */
template <int D, int DT>
__device__ __forceinline__ void both_pv(uint32_t (&p0)[16], const float (&s1)[32],
                                        struct row_state &st1, float (&o0)[D / 2],
                                        float (&o1)[D / 2], uint32_t v, const struct sm90_args &a)
{
    uint32_t p1[16];
    float sum[2];
    issue_pv<D, DT>(o0, p0, v);
    page_exp<DT>(p1, sum, s1, st1, a.scale_log2);
    const bool grown = outgrown(sum);
    wgmma_wait<0>();
    wgmma_pin(o0);
    wgmma_pin(p0);
    if (all_of(grown))
        settle<D, DT>(p1, sum, s1, st1, o1, a);
    add_sums(st1, sum);
    issue_pv<D, DT>(o1, p1, v);
    wgmma_wait<0>();
    wgmma_pin(o1);
    wgmma_pin(p1);
}

/* Softmax and PV of one half. No products may be in flight. */
template <int D, int DT>
__device__ __forceinline__ void half_pv(const float (&s)[32], struct row_state &st,
                                        float (&o)[D / 2], uint32_t v, const struct sm90_args &a)
{
    uint32_t p[16];
    half_exp<D, DT>(p, s, st, o, a);
    issue_pv<D, DT>(o, p, v);
    wgmma_wait<0>();
    wgmma_pin(o);
    wgmma_pin(p);
}

/* A page before the diagonal that both halves keep or skip together, the item's `at`-th. */
template <int D, int DT, int GATE, int KIND>
__device__ __forceinline__ void plain_page(struct consumer<D, GATE> &c, const CUtensorMap *map,
                                           const struct sm90_args &a, struct row_state (&st)[2],
                                           float (&o0)[D / 2], float (&o1)[D / 2], int at)
{
    constexpr bool gated = GATE != SM90_GATE_NONE && (KIND & ~SPLIT) != OPEN;
    float s0[32], s1[32];
    uint32_t p0[16];
    struct steering move;
    begin_page<D, DT, GATE, KIND>(c, move, map, s0, s1);
    if (gated) {
        float pm0[2], pm1[2];
        const bool first = half_wants<D, GATE, KIND>(c, a, st[0], s0, pm0, 0, at, c.gate);
        wgmma_wait<0>();
        wgmma_pin(s1);
        const bool second = half_wants<D, GATE, KIND>(c, a, st[1], s1, pm1, 1, at, c.gate);
        const bool keep = vote(c, first | second);
        steer_any(c, move, c.gate, c.rest);
        if (all_of(keep))
            request_v(c, map);
        release_k(c);
        if (all_of(!keep))
            return;
        steer_kept(c, move, c.gate, c.rest);
        raise_tops(c, st[0], pm0);
        raise_tops(c, st[1], pm1);
        half_exp<D, DT>(p0, s0, st[0], o0, a);
    } else {
        exp_under_qk<D, DT>(p0, s0, s1, st[0], o0, a);
        release_k(c);
    }
    count_kept(c, (KIND & SPLIT) && ITEM_FIELD(c, row_end) > HALF_M ? 2 : 1);
    both_pv<D, DT>(p0, s1, st[1], o0, o1, wait_v(c), a);
    release_v(c);
}

/* The same where each half decides for itself (gate_rows 64). */
template <int D, int DT, int GATE, int KIND>
__device__ __forceinline__ void split_page(struct consumer<D, GATE> &c, const CUtensorMap *map,
                                           const struct sm90_args &a, struct row_state (&st)[2],
                                           float (&o0)[D / 2], float (&o1)[D / 2], int at)
{
    float s0[32], s1[32], pm[2];
    struct steering move;
    begin_page<D, DT, GATE, KIND | SPLIT>(c, move, map, s0, s1);
    const bool keep0 = vote(c, half_wants<D, GATE, KIND>(c, a, st[0], s0, pm, 0, at, c.gate));
    steer_any(c, move, c.gate, c.rest);
    wgmma_wait<0>();
    wgmma_pin(s1);
    if (all_of(keep0)) {
        request_v(c, map);
        raise_tops(c, st[0], pm);
        steer_kept(c, move, c.gate, c.rest);
    }
    const float gate1 = GATE == SM90_GATE_REL ? c.gate1 : c.gate;
    const bool keep1 = vote(c, half_wants<D, GATE, KIND>(c, a, st[1], s1, pm, 1, at, gate1));
    steer_any(c, move, c.gate1, c.rest1);
    if (all_of(keep1 && !keep0))
        request_v(c, map);
    release_k(c);
    if (all_of(keep1)) {
        raise_tops(c, st[1], pm);
        steer_kept(c, move, c.gate1, c.rest1);
    }
    if (all_of(!keep0 && !keep1))
        return;
    count_kept(c, ITEM_FIELD(c, rows64) ? keep0 + keep1 : 1);
    const uint32_t v = wait_v(c);
    if (all_of(!keep0)) {
        half_pv<D, DT>(s1, st[1], o1, v, a);
    } else if (all_of(!keep1)) {
        half_pv<D, DT>(s0, st[0], o0, v, a);
    } else {
        uint32_t p0[16];
        half_exp<D, DT>(p0, s0, st[0], o0, a);
        both_pv<D, DT>(p0, s1, st[1], o0, o1, v, a);
    }
    release_v(c);
}

/* One half of a diagonal page; `mask`: its own diagonal. V must be asked for unless `asked`. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void
diagonal_half(struct consumer<D, GATE> &c, const CUtensorMap *map, const struct sm90_args &a,
              struct row_state &st, float (&o)[D / 2], int half, uint32_t k, bool mask, bool asked)
{
    using L = smem_layout<D, GATE>;
    float s[32], pm[2];
    wgmma_fence();
    issue_qk<D, DT>(s, q_desc<D, GATE, true>(c) + (half * HALF_M * 128 >> 4), k);
    if (GATE != SM90_GATE_NONE && !asked) {
        group_sync(c);
        request_v(c, map);
    }
    wgmma_wait<0>();
    wgmma_pin(s);
    if (all_of(mask)) {
        const int thread = opaque(c.thread()), lane = thread & 31;
        mask_diagonal(s, 2 * (lane & 3), thread / 32 * 16 + lane / 4);
    }
    page_max(pm, s);
    raise_tops(c, st, pm);
    half_pv<D, DT>(s, st, o, wait_v(c), a);
}

/* The first or second diagonal page, one half after the other; the second is above the first half's
 * rows. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void diagonal_page(struct consumer<D, GATE> &c, const CUtensorMap *map,
                                              const struct sm90_args &a, struct row_state (&st)[2],
                                              float (&o0)[D / 2], float (&o1)[D / 2], int diag)
{
    const uint32_t k = wait_k(c);
    const bool first = diag == 0, second = diag == 1 || ITEM_FIELD(c, row_end) > HALF_M;
    if (all_of(first))
        diagonal_half<D, DT, GATE>(c, map, a, st[0], o0, 0, k, true, false);
    if (all_of(second))
        diagonal_half<D, DT, GATE>(c, map, a, st[1], o1, 1, k, !first, first);
    release_k(c);
    count_kept(c, ITEM_FIELD(c, rows64) ? first + second : 1);
    release_v(c);
}

#endif
