/* The consumer of tiles under a gate: one page a step, scores in three buffers, so that a page's
 * votes have a whole step to travel and the tensor cores have the next page's QK meanwhile: wait
 * QK(i+1), PV(i-2) | pack(i-1), issue PV(i-1) | issue QK(i+2) | max(i+1), vote(i+1) | decide(i),
 * softmax(i) Votes: each warp writes one byte a page and arrives on the page's barrier. A warp that
 * keeps the page itself goes on at once; others wait for all eight. All see the same bytes and so
 * take the same decision. The diagonal pages are always kept and their votes are not read. */
#ifndef ATTENTION_ATTN_PREFILL_GATED_SM90_CUH
#define ATTENTION_ATTN_PREFILL_GATED_SM90_CUH

#include "attention/attn_prefill_rows_sm90.cuh"

/* Whether this row group and the other one process a page. The other's is known only where this
 * group does not, or where it decides by its own past (REL in groups of 64 rows). */
struct decision {
    int own, other;
};

/* What is known of a page before its turn. */
struct scored {
    float max[2]; /* this thread's maxima of its two rows */
    int vote;
};

/* Slots of a turn: of K, 0 or 3 on; of the votes likewise; and the parities of their rounds. */
struct turn {
    uint32_t k, k_parity, vote, vote_parity;
};

__device__ __forceinline__ struct turn turn_at(uint32_t round, uint32_t j, uint32_t vote_turn)
{
    return {(j & 1) * TURN, (round + j / 2) & 1, (vote_turn & 1) * TURN, vote_turn / 2 & 1};
}

/* Issues QK with the page at place s of a turn. Past the tile's last turn (`real` false) there is
 * no page: the product is then of whatever lies there and nobody looks at it; a branch around it
 * would cost more. */
template <int D, int DT>
__device__ __forceinline__ void issue_qk(const struct consumer<D> &c, float (&x)[32], uint32_t q,
                                         const struct turn &turn, int s, bool real)
{
    using L = smem_layout<D>;
    if (real)
        mbar_wait(c.smem + L::k_full + 8 * (turn.k + s), turn.k_parity);
    const uint32_t k = desc_k_major(c.smem + L::k) + (turn.k + s) * (PAGE * 128 / 16);
    wgmma_fence();
    wgmma_qk<DT, true>(x, q, k);
#pragma unroll
    for (int i = 1; i < D / 16; i++)
        wgmma_qk<DT, false>(x, q + ((i / 4) * L::half_bytes + (i % 4) * 32) / 16,
                            k + ((i / 4) * L::k_half + (i % 4) * 32) / 16);
    wgmma_commit();
}

/* Issues PV of a page that someone keeps. A group that does not keep it waits too: its release must
 * fall into the round in which the slot was filled. */
template <int D, int DT>
__device__ __forceinline__ void issue_pv(struct consumer<D> &c, float (&o)[D / 2],
                                         uint32_t (&p)[16], int own)
{
    using L = smem_layout<D>;
    mbar_wait(c.smem + L::v_full + 8 * c.v.slot(), c.v.parity());
    const uint32_t v = desc_mn_major(c.smem + L::v + c.v.slot() * L::page_bytes, PAGE * 128);
    c.v_owed = c.smem + L::v_empty + 8 * c.v.slot();
    c.v.next();
    if (all_of(own)) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < PAGE / 16; i++)
            wgmma_pv<DT>(o, p + 4 * i, v + i * 2048 / 16);
        wgmma_commit();
    }
}

/* After PV has been waited for. */
template <int D>
__device__ __forceinline__ void release_v(struct consumer<D> &c)
{
    if (c.lane == 0 && c.v_owed)
        mbar_arrive(c.v_owed);
    c.v_owed = 0;
}

/* This warp's vote on an off-diagonal page with maxima pm; before: those of the page before it. */
template <int GATE>
__device__ __forceinline__ int vote_of(const struct tile_rows &t, const struct row_state &st,
                                       const float (&pm)[2], const float (&before)[2])
{
    const bool row0 = t.flags & ROW0_VALID, row1 = t.flags & ROW1_VALID;
    if (GATE == SM90_GATE_ABS)
        return __any_sync(0xffffffffu, (row0 && !(pm[0] < t.gate)) || (row1 && !(pm[1] < t.gate)));
    float top[2] = {st.top[0], st.top[1]};
    int votes = __any_sync(0xffffffffu, (row0 && !(pm[0] < top[0] + t.gate)) ||
                                            (row1 && !(pm[1] < top[1] + t.gate)));
    if (__any_sync(0xffffffffu, !(before[0] <= top[0]) || !(before[1] <= top[1]))) {
        top[0] = max_nan(top[0], quad_max(before[0]));
        top[1] = max_nan(top[1], quad_max(before[1]));
        return votes | (__any_sync(0xffffffffu, (row0 && !(pm[0] < top[0] + t.gate)) ||
                                                    (row1 && !(pm[1] < top[1] + t.gate)))
                            ? 2
                            : 0);
    }
    return votes * 3;
}

template <int D>
__device__ __forceinline__ void cast_vote(const struct consumer<D> &c, uint32_t slot, int vote)
{
    using L = smem_layout<D>;
    asm volatile("{\n.reg .pred p;\nsetp.eq.s32 p, %0, 0;\n"
                 "@p st.shared.u8 [%1], %2;\n"
                 "@p mbarrier.arrive.shared::cta.b64 _, [%3];\n}" ::"r"(c.lane),
                 "r"(c.smem + L::votes + 8 * slot + c.warp), "r"(vote),
                 "r"(c.smem + L::vote_full + 8 * slot)
                 : "memory");
}

/* Turns votes into a decision; a warp that keeps the page itself need not wait for others. */
template <int D, int GATE>
__device__ __forceinline__ struct decision
decide(const struct consumer<D> &c, const struct tile_rows &t, int vote, const struct turn &turn,
       int s, struct decision before)
{
    const bool alone = t.flags & ROWS64;
    struct decision now = {votes_keep<GATE>(vote, before.own), 0};
    if (!now.own || (GATE == SM90_GATE_REL && alone)) {
        const uint2 votes = vote_wait<D>(c.smem, turn.vote + s, turn.vote_parity);
        if (alone) {
            now.own = votes_keep<GATE>(c.group ? votes.y : votes.x, before.own);
            now.other = votes_keep<GATE>(c.group ? votes.x : votes.y, before.other);
        } else {
            now.own = now.other = votes_keep<GATE>(votes.x | votes.y, before.own);
        }
    } else if (!alone) {
        now.other = 1;
    }
    return now;
}

/* Masks the scores of place i where needed, finds their maxima and casts this warp's vote. */
template <int D, int GATE>
__device__ __forceinline__ void score(const struct consumer<D> &c, const struct tile_rows &t,
                                      const struct row_state &st, float (&x)[32],
                                      struct scored &page, const struct scored &before,
                                      uint32_t slot, int i, bool real)
{
    const uint32_t diag = (uint32_t)(i - t.diag_at);
    if (all_of(diag < 2)) {
        const int row0 = c.warp * 16 + c.lane / 4 - (diag ? PAGE : 0);
        page_mask<0>(x, 2 * (c.lane & 3), row0, row0 + 8);
    }
    page_max<0>(page.max, x);
    page.vote = vote_of<GATE>(t, st, page.max, before.max);
    if (real)
        cast_vote(c, slot, page.vote);
}

/* Probabilities of a page that is kept. */
template <int D, int GATE>
__device__ __forceinline__ void softmax(const struct tile_rows &t, struct row_state &st,
                                        float (&o)[D / 2], float (&x)[32], const float (&pm)[2])
{
    if (GATE == SM90_GATE_REL &&
        __any_sync(0xffffffffu, !(pm[0] <= st.top[0]) || !(pm[1] <= st.top[1]))) {
        st.top[0] = max_nan(st.top[0], quad_max(pm[0]));
        st.top[1] = max_nan(st.top[1], quad_max(pm[1]));
    }
    if (outgrown(st, pm, t.scale_log2)) {
        float alpha[2];
        move_shift(st, alpha, pm, t.scale_log2);
        wgmma_wait<0>();
        wgmma_pin(o);
        scale_rows(o, alpha);
    }
    page_exp<0>(x, st.l, t.scale_log2, st.shift);
}

/* One page: see the top. It is at place S of turn `here`, i of the walk. x holds its scores;
 * x_next, in flight, those of the next page; x_last holds the probabilities of the last page and
 * receives the scores of the page after the next. `more`: there is a next turn in this tile. */
template <int D, int DT, int GATE, int S>
__device__ __forceinline__ void
step(struct consumer<D> &c, const struct tile_rows &t, struct row_state &st, float (&o)[D / 2],
     uint32_t (&p)[16], float (&x)[32], float (&x_next)[32], float (&x_last)[32],
     struct scored &page, struct decision &last, const struct turn &here, const struct turn &then,
     int i, bool more)
{
    using L = smem_layout<D>;
    struct scored next;
    struct decision now = {0, 0};
    const uint32_t diag = (uint32_t)(i - t.diag_at);
    wgmma_wait<0>();
    wgmma_pin(x_next);
    wgmma_pin(o);
    wgmma_pin(p);
    forget(p);
    if (c.lane == 0 && (S < 2 || more))
        mbar_arrive(c.smem + L::k_empty + 8 * (S < 2 ? here.k + S + 1 : then.k));
    release_v(c);
    if (all_of(last.own | last.other)) {
        if (all_of(last.own))
            page_pack<DT>(p, x_last);
        issue_pv<D, DT>(c, o, p, last.own);
    }
    issue_qk<D, DT>(c, x_last, t.q, S == 0 ? here : then, (S + 2) % 3, S == 0 || more);
    score<D, GATE>(c, t, st, x_next, next, page, (S < 2 ? here.vote : then.vote) + (S + 1) % 3,
                   i + 1, S < 2 || more);
    if (diag < 2) {
        const int second = (t.flags & TWO_DIAGONAL) != 0;
        now.own = diag == 0 || (second && c.group);
        now.other = diag == 0 || (second && !c.group);
    } else if (i < t.n_pages) {
        if (diag == 2)
            last = {1, 1};
        now = decide<D, GATE>(c, t, page.vote, here, S, last);
    }
    if (all_of(now.own))
        softmax<D, GATE>(t, st, o, x, page.max);
    page = next;
    last = now;
}

/* All pages of a tile. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void attend_gated(struct consumer<D> &c, const struct tile_rows &t,
                                             struct row_state &st, float (&o)[D / 2])
{
    using L = smem_layout<D>;
    float xa[32], xb[32], xc[32];
    uint32_t p[16], j = 0;
    struct decision last = {0, 0};
    struct scored page = {{-INFINITY, -INFINITY}, 0}, none = page;
    struct turn here = turn_at(c.round, 0, c.vote_turn);
    issue_qk<D, DT>(c, xa, t.q, here, 0, true);
    wgmma_wait<0>();
    wgmma_pin(xa);
    if (c.lane == 0)
        mbar_arrive(c.smem + L::k_empty);
    issue_qk<D, DT>(c, xb, t.q, here, 1, true);
    score<D, GATE>(c, t, st, xa, page, none, here.vote, 0, true);
    forget(p);
    /* three steps a turn, for the buffers to come round; steps past the end do nothing */
#pragma unroll 1
    for (int i = 0; i < t.n_pages; i += TURN) {
        const bool more = i + TURN < t.n_pages;
        const struct turn then = turn_at(c.round, ++j, ++c.vote_turn);
        step<D, DT, GATE, 0>(c, t, st, o, p, xa, xb, xc, page, last, here, then, i, more);
        step<D, DT, GATE, 1>(c, t, st, o, p, xb, xc, xa, page, last, here, then, i + 1, more);
        step<D, DT, GATE, 2>(c, t, st, o, p, xc, xa, xb, page, last, here, then, i + 2, more);
        here = then;
    }
    wgmma_wait<0>();
    wgmma_pin(o);
    wgmma_pin(p);
    forget(p);
    release_v(c);
    if (all_of(last.own | last.other)) {
        if (all_of(last.own))
            page_pack<DT>(p, xc);
        issue_pv<D, DT>(c, o, p, last.own);
    }
    wgmma_wait<0>();
    wgmma_pin(o);
    wgmma_pin(p);
    release_v(c);
    if (j & 1)
        skip_slots(c, TURN, (c.round + j / 2) & 1);
}

#endif
