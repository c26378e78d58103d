/* Gated causal prefill over the paged cache for Hopper (sm_90a).
 * O = softmax(scale * Q K^T) V over the pages the policy keeps; a tile is 128 query rows (one
 * absolute block of one head) and takes two 64-token pages a step.
 *
 * Roles. Warpgroup 0 loads: warp 0 takes tiles from the queue and copies Q and K; warp 1 copies V,
 * and only pages that were voted for. Warpgroups 1 and 2 compute 64 rows each.
 * Order of a consumer, step j, FlashAttention-3's:
 *     issue QK(j) | issue PV(j-1) | wait QK(j) | max(j), votes(j), softmax(j) | wait PV(j-1) | pack
 * The warpgroups alternate on the tensor cores by themselves: barriers that force the order were
 * measured and cost 2 to 4 percent.
 *
 * Votes. Each warp writes one byte a step (bit 0: first page; bit 1: second page, if the first is
 * kept; bit 2: second page, if not) into a ring of VOTE_SLOTS words and arrives on its group's
 * barrier. A warp whose own votes keep both pages goes on at once; others wait for their group,
 * then for the other. All see the same bytes and so take the same decision. The V warp loads what
 * the first group keeps without waiting for the second. V slots are a ring over kept pages only.
 *
 * Shared memory, head_dim 128: Q 2 x 32 KiB, K 3 x 32 KiB, V 4 x 16 KiB, then barriers. O leaves
 * through the Q slot of its tile. Registers: 232 a consumer, 40 a producer.
 * Bottleneck: the consumers' own instructions between two products, then the tensor cores.
 * Source: BSFA (arXiv 2512.07011) section 4; FlashAttention-3 (arXiv 2407.08608) section 3. */
#include "attention/attn_prefill_load_sm90.cuh"

enum { BAR_GROUP = 1 /* and 2: one a consumer warpgroup */ };

/* Exponents may grow by this before O is rescaled (FlashAttention-4's lazy rescaling). */
#define SLACK_LOG2 8.0f

/* ---- warpgroups 1 and 2: the products ---- */

/* A consumer thread's place and its positions in the rings. */
template <int D>
struct consumer {
    uint32_t smem;
    int group; /* 0 or 1 */
    int warp;  /* 0..7 */
    int lane;
    struct ring<Q_SLOTS> q;
    struct ring<smem_layout<D>::k_stages> k;
    struct ring<smem_layout<D>::v_slots> v;
    struct ring<smem_layout<D>::v_slots> v_full; /* one place a kept step */
    struct ring<VOTE_SLOTS> vote;
};

/* What a consumer keeps of its tile. */
struct tile_rows {
    uint64_t q_desc;
    int row0; /* this thread's first row in the block; the second is row0 + 8 */
    int valid0, valid1;
    int diag_step, half_step; /* steps to be masked; half_step: its second page does not exist */
    int n_diag, rows64;
    float gate, scale_log2;
};

template <int D, int DT>
__device__ __forceinline__ void issue_qk(float (&s)[64], uint64_t q_desc, uint32_t k_addr)
{
    uint64_t k_desc = desc_k_major(k_addr);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint64_t step = (uint64_t)((i / 4) * smem_layout<D>::half_bytes + (i % 4) * 32) >> 4;
        if (i == 0)
            wgmma_qk<DT, true>(s, q_desc, k_desc);
        else
            wgmma_qk<DT, false>(s, q_desc + step, k_desc + step);
    }
    wgmma_commit();
}

template <int D, int DT>
__device__ __forceinline__ void issue_pv_page(float (&o)[D / 2], const uint32_t *p, uint32_t v_addr)
{
    uint64_t v_desc = desc_mn_major(v_addr, PAGE * 128);
#pragma unroll
    for (int i = 0; i < PAGE / 16; i++)
        wgmma_pv<DT>(o, p + 4 * i, v_desc + (uint64_t)(i * 2048 >> 4));
}

/* A condition that is the same in all threads, in a form the compiler knows to be so: it serialises
 * products on branches that it takes for divergent (C7520). */
__device__ __forceinline__ bool all_of(bool x)
{
    return __any_sync(0xffffffffu, x);
}

/* Masks the scores of a step where needed, finds the page maxima and casts this warp's votes. */
template <int D, int GATE>
__device__ __forceinline__ int score_step(struct consumer<D> &c, const struct tile_rows &t,
                                          const struct row_state &st, float (&s)[64],
                                          float (&pm)[2][2], int step)
{
    using L = smem_layout<D>;
    if (step == t.diag_step || step == t.half_step) {
        const int limit = step == t.diag_step ? t.row0 : PAGE - 1;
        mask_columns(s, 2 * (c.lane & 3), limit, step == t.diag_step ? limit + 8 : limit);
    }
    page_max<0>(pm[0], s);
    page_max<32>(pm[1], s);
    if (GATE == SM90_GATE_NONE)
        return 3;
    int bits;
    if (step == t.diag_step) {
        bits = t.n_diag == 2 && c.group == 1 ? 7 : 1;
    } else if (GATE == SM90_GATE_ABS) {
        int first = (t.valid0 && !(pm[0][0] < t.gate)) || (t.valid1 && !(pm[0][1] < t.gate));
        int second = (t.valid0 && !(pm[1][0] < t.gate)) || (t.valid1 && !(pm[1][1] < t.gate));
        second = second && step != t.half_step;
        bits = first | second * 6;
    } else {
        float m0 = st.m[0] + t.gate, m1 = st.m[1] + t.gate;
        float k0 = max_nan(st.m[0], quad_max(pm[0][0])) + t.gate;
        float k1 = max_nan(st.m[1], quad_max(pm[0][1])) + t.gate;
        int first = (t.valid0 && !(pm[0][0] < m0)) || (t.valid1 && !(pm[0][1] < m1));
        int after = (t.valid0 && !(pm[1][0] < k0)) || (t.valid1 && !(pm[1][1] < k1));
        int alone = (t.valid0 && !(pm[1][0] < m0)) || (t.valid1 && !(pm[1][1] < m1));
        int exists = step != t.half_step;
        bits = first | (after && exists) << 1 | (alone && exists) << 2;
    }
    bits = (__any_sync(0xffffffffu, bits & 1) ? 1 : 0) |
           (__any_sync(0xffffffffu, bits & 2) ? 2 : 0) |
           (GATE == SM90_GATE_REL && __any_sync(0xffffffffu, bits & 4) ? 4 : 0);
    if (GATE == SM90_GATE_ABS)
        bits |= (bits & 2) << 1;
    if (c.lane == 0) {
        if ((c.vote.slot & 3) == 0) /* the V warp has read this half's last round */
            mbar_wait(c.smem + L::vote_free + 2 * c.vote.slot, c.vote.parity ^ 1);
        asm volatile("st.shared.u8 [%0], %1;" ::"r"(c.smem + L::votes + 8 * c.vote.slot + c.warp),
                     "r"(bits)
                     : "memory");
        mbar_arrive(c.smem + L::vote_full + 16 * c.vote.slot + 8 * c.group);
    }
    return bits;
}

/* The pages of a step: those this row group processes and those that either does. */
struct pending {
    int own, any;
};

/* Turns votes into a decision. A warp whose own votes keep both pages need not wait for others. */
template <int D, int GATE>
__device__ __forceinline__ struct pending decide(struct consumer<D> &c, const struct tile_rows &t,
                                                 int votes)
{
    if (GATE == SM90_GATE_NONE)
        return {3, 3};
    int own = vote_sure(votes), any = own;
    if (own != 3) {
        const int group = vote_wait<D>(c.smem, c.vote.slot, c.vote.parity, c.group);
        own = any = t.rows64 ? vote_decode(group) : vote_sure(group);
        if (own != 3) {
            const int other = vote_wait<D>(c.smem, c.vote.slot, c.vote.parity, c.group ^ 1);
            if (t.rows64)
                any = own | vote_decode(other);
            else
                own = any = vote_decode(group | other);
        }
    }
    c.vote.next();
    return {own, any};
}

/* Online softmax of the kept pages, in place; alpha is what O must be scaled by, `moved` whether
 * any row of the warp has a new maximum. Rows seldom do after the first steps: then the reduction
 * over the quad and all scaling fall away, with the same bits. */
template <int GATE>
__device__ __forceinline__ void softmax_step(struct row_state &st, float (&alpha)[2], bool &moved,
                                             float (&s)[64], const float (&pm)[2][2],
                                             float scale_log2, int own)
{
    const float slack = GATE == SM90_GATE_REL ? 0.0f : SLACK_LOG2 / scale_log2;
    float top[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = max_nan(pm[0][r], pm[1][r]);
        if (GATE != SM90_GATE_NONE)
            top[r] = own == 3 ? top[r] : own == 1 ? pm[0][r] : pm[1][r];
    }
    alpha[0] = alpha[1] = 1.0f;
    moved = __any_sync(0xffffffffu, !(top[0] <= st.bound[0]) || !(top[1] <= st.bound[1]));
    if (moved) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float m = max_nan(st.m[r], quad_max(top[r]));
            st.shift[r] = m == -INFINITY ? 0.0f : m * scale_log2;
            alpha[r] = ex2(fmaf(st.m[r], scale_log2, -st.shift[r]));
            st.m[r] = m;
            st.bound[r] = m + slack;
            st.l[r] = __fmul_rn(st.l[r], alpha[r]);
        }
    }
    if (GATE == SM90_GATE_NONE || all_of(own == 3)) {
        page_exp<0>(s, st.l, scale_log2, st.shift);
        page_exp<32>(s, st.l, scale_log2, st.shift);
    } else if (all_of(own == 1)) {
        page_exp<0>(s, st.l, scale_log2, st.shift);
    } else {
        page_exp<32>(s, st.l, scale_log2, st.shift);
    }
}

/* Probabilities to A operands and O to the new maxima; PV of the last step must have finished. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void pack_step(uint32_t (&p)[32], float (&o)[D / 2],
                                          const float (&s)[64], const float (&alpha)[2], bool moved,
                                          int own)
{
    if (GATE == SM90_GATE_NONE || all_of(own == 3)) {
        page_pack<0, DT>(p, s);
        page_pack<32, DT>(p + 16, s);
    } else if (all_of(own == 1)) {
        page_pack<0, DT>(p, s);
    } else {
        page_pack<32, DT>(p, s); /* a single page always comes first */
    }
    if (moved) {
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            o[i] *= alpha[(i >> 1) & 1];
    }
}

/* Issues PV of the pages in `own`, whose slots follow each other in `any`. A group that keeps
 * neither waits too: its release must fall into the round in which the slots were filled. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void issue_pv(struct consumer<D> &c, float (&o)[D / 2],
                                         uint32_t (&p)[32], int own, int any)
{
    using L = smem_layout<D>;
    struct ring<L::v_slots> v = c.v;
    const uint32_t first = c.smem + L::v + v.slot * L::v_bytes;
    mbar_wait(c.smem + L::v_full + 8 * c.v_full.slot, c.v_full.parity);
    c.v_full.next();
    v.next();
    const uint32_t second = c.smem + L::v + v.slot * L::v_bytes;
    wgmma_pin(o);
    wgmma_pin(p);
    wgmma_fence();
    if (GATE == SM90_GATE_NONE || all_of(own == 3)) {
        issue_pv_page<D, DT>(o, p, first);
        issue_pv_page<D, DT>(o, p + 16, second);
        wgmma_commit(); /* in each branch: apart from its products it would cost one of its own */
    } else if (all_of(own != 0)) {
        issue_pv_page<D, DT>(o, p, own == 2 && any == 3 ? second : first);
        wgmma_commit();
    } else {
        wgmma_commit();
    }
}

template <int D, int GATE>
__device__ __forceinline__ void release_v(struct consumer<D> &c, int any)
{
    using L = smem_layout<D>;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (GATE != SM90_GATE_NONE && !(any >> i & 1))
            continue;
        if (c.lane == 0)
            mbar_arrive(c.smem + L::v_empty + 8 * c.v.slot);
        c.v.next();
    }
}

template <int D>
__device__ __forceinline__ void release_k(struct consumer<D> &c)
{
    if (c.lane == 0)
        mbar_arrive(c.smem + smem_layout<D>::k_empty + 8 * c.k.slot);
    c.k.next();
}

template <int D, int DT>
__device__ __forceinline__ void qk_step(struct consumer<D> &c, const struct tile_rows &t,
                                        float (&s)[64])
{
    using L = smem_layout<D>;
    mbar_wait(c.smem + L::k_full + 8 * c.k.slot, c.k.parity);
    issue_qk<D, DT>(s, t.q_desc, c.smem + L::k + c.k.slot * L::k_bytes);
}

/* Ends the life of packed probabilities: a page that is not packed in some branch would keep the
 * old registers alive through the whole loop. */
__device__ __forceinline__ void forget(uint32_t (&p)[32])
{
#pragma unroll
    for (int i = 0; i < 32; i++)
        asm volatile("" : "=r"(p[i]));
}

/* A step with nothing pending: scores, decision, probabilities. */
template <int D, int DT, int GATE>
__device__ __forceinline__ struct pending
step_alone(struct consumer<D> &c, const struct tile_rows &t, struct row_state &st,
           float (&o)[D / 2], uint32_t (&p)[32], int step)
{
    float s[64], pm[2][2], alpha[2];
    bool moved = false;
    struct pending now;
    qk_step<D, DT>(c, t, s);
    wgmma_wait<0>();
    wgmma_pin(s);
    release_k(c);
    now = decide<D, GATE>(c, t, score_step<D, GATE>(c, t, st, s, pm, step));
    forget(p);
    if (GATE == SM90_GATE_NONE || all_of(now.own)) {
        softmax_step<GATE>(st, alpha, moved, s, pm, t.scale_log2, now.own);
        pack_step<D, DT, GATE>(p, o, s, alpha, moved, now.own);
    }
    return now;
}

/* A step under which the pending PV runs. */
template <int D, int DT, int GATE>
__device__ __forceinline__ struct pending
step_over(struct consumer<D> &c, const struct tile_rows &t, struct row_state &st, float (&o)[D / 2],
          uint32_t (&p)[32], struct pending last, int step)
{
    float s[64], pm[2][2], alpha[2];
    bool moved = false;
    struct pending now;
    qk_step<D, DT>(c, t, s);
    issue_pv<D, DT, GATE>(c, o, p, last.own, last.any);
    wgmma_wait<1>();
    wgmma_pin(s);
    release_k(c);
    now = decide<D, GATE>(c, t, score_step<D, GATE>(c, t, st, s, pm, step));
    /* Always true without a gate, but not to the compiler: ptxas hoists the wait for PV to the top
     * of its basic block, above the exponentials that are to run under PV. */
    if (GATE == SM90_GATE_NONE ? t.scale_log2 > 0.0f : all_of(now.own))
        softmax_step<GATE>(st, alpha, moved, s, pm, t.scale_log2, now.own);
    wgmma_wait<0>();
    wgmma_pin(o);
    wgmma_pin(p);
    forget(p);
    release_v<D, GATE>(c, last.any);
    if (GATE == SM90_GATE_NONE || all_of(now.own))
        pack_step<D, DT, GATE>(p, o, s, alpha, moved, now.own);
    return now;
}

/* The last pending PV of a tile. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void step_last(struct consumer<D> &c, float (&o)[D / 2],
                                          uint32_t (&p)[32], struct pending last)
{
    issue_pv<D, DT, GATE>(c, o, p, last.own, last.any);
    wgmma_wait<0>();
    wgmma_pin(o);
    wgmma_pin(p);
    release_v<D, GATE>(c, last.any);
}

/* All steps of a tile. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void attend(struct consumer<D> &c, const struct tile_rows &t,
                                       struct row_state &st, float (&o)[D / 2], int n_steps)
{
    uint32_t p[32];
    int step = 0;
    for (;;) {
        struct pending now;
        now = step_alone<D, DT, GATE>(c, t, st, o, p, step++);
        if (GATE != SM90_GATE_NONE && all_of(!now.any && step == n_steps))
            return;
        if (GATE != SM90_GATE_NONE && all_of(!now.any))
            continue;
#pragma unroll 1
        while (step < n_steps) {
            now = step_over<D, DT, GATE>(c, t, st, o, p, now, step++);
            if (GATE != SM90_GATE_NONE && all_of(!now.any))
                break;
        }
        if (GATE == SM90_GATE_NONE || all_of(now.any)) {
            step_last<D, DT, GATE>(c, o, p, now);
            return;
        }
        if (step == n_steps)
            return;
    }
}

/* O and LSE of a tile: through this warp's rows of the Q slot, so that stores are whole lines. */
template <int D, int DT>
__device__ __forceinline__ void write_rows(struct consumer<D> &c, const struct sm90_args &a,
                                           const struct tile_info *info, struct row_state &st,
                                           float (&o)[D / 2], float scale)
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
                l == 0.0f ? -INFINITY : fmaf(st.m[r], scale, logf(l));
    }
    bar_sync(BAR_GROUP + c.group, 128); /* all wgmma of this group have read Q */
    const uint32_t base = c.smem + L::q + c.q.slot * L::q_bytes;
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

template <int D>
__device__ __forceinline__ struct tile_rows
tile_rows_make(const struct consumer<D> &c, const struct tile_info *info, const struct sm90_args &a)
{
    using L = smem_layout<D>;
    struct tile_rows t;
    const int n_steps = tile_steps(info);
    t.q_desc = desc_k_major(c.smem + L::q + c.q.slot * L::q_bytes + c.group * (64 * 128));
    t.row0 = c.warp * 16 + c.lane / 4;
    t.valid0 = t.row0 >= info->row_begin && t.row0 < info->row_end;
    t.valid1 = t.row0 + 8 >= info->row_begin && t.row0 + 8 < info->row_end;
    t.diag_step = a.order == SM90_ORDER_L2R ? n_steps - 1 : 0;
    t.half_step = (info->n_off & 1) ? (a.order == SM90_ORDER_L2R ? n_steps - 2 : n_steps - 1) : -1;
    t.n_diag = info->n_diag;
    t.rows64 = info->rows64;
    t.gate = info->gate;
    t.scale_log2 = a.scale * LOG2E;
    return t;
}

template <int D, int DT, int GATE>
__device__ __forceinline__ void consume(uint32_t smem, unsigned char *smem_ptr,
                                        const struct sm90_args &a)
{
    using L = smem_layout<D>;
    struct consumer<D> c = {
    };
    c.smem = smem;
    c.warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32 - 4, 0);
    c.group = c.warp / 4;
    c.lane = threadIdx.x & 31;
    for (;;) {
        const struct tile_info *info = (const struct tile_info *)(smem_ptr + L::info) + c.q.slot;
        mbar_wait(smem + L::q_full + 8 * c.q.slot, c.q.parity);
        if (info->seq < 0)
            break;
        const struct tile_rows t = tile_rows_make(c, info, a);
        const int n_steps = tile_steps(info);
        struct row_state st = {
            {-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}, {0.0f, 0.0f}, {0.0f, 0.0f}};
        float o[D / 2];
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            o[i] = 0.0f;
        attend<D, DT, GATE>(c, t, st, o, n_steps);
        write_rows<D, DT>(c, a, info, st, o, a.scale);
        fence_proxy_async();
        __syncwarp();
        if (c.lane == 0)
            mbar_arrive(smem + L::q_empty + 8 * c.q.slot);
        c.q.next();
    }
}

/* ---- the kernel ---- */

template <int D>
__device__ __forceinline__ void init_barriers(uint32_t smem)
{
    using L = smem_layout<D>;
    for (int i = 0; i < Q_SLOTS; i++) {
        mbar_init(smem + L::q_full + 8 * i, 1);
        mbar_init(smem + L::q_empty + 8 * i, CONSUMER_WARPS + 1);
    }
    for (int i = 0; i < L::k_stages; i++) {
        mbar_init(smem + L::k_full + 8 * i, 1);
        mbar_init(smem + L::k_empty + 8 * i, CONSUMER_WARPS);
    }
    for (int i = 0; i < L::v_slots; i++) {
        mbar_init(smem + L::v_full + 8 * i, 1);
        mbar_init(smem + L::v_empty + 8 * i, CONSUMER_WARPS);
    }
    for (int i = 0; i < VOTE_SLOTS; i++) {
        mbar_init(smem + L::vote_full + 16 * i, CONSUMER_WARPS / 2);
        mbar_init(smem + L::vote_full + 16 * i + 8, CONSUMER_WARPS / 2);
    }
    mbar_init(smem + L::vote_free, 1);
    mbar_init(smem + L::vote_free + 8, 1);
    mbar_fence_init();
}

/* A compiler pass for plain sm_90, which lacks wgmma, makes an empty kernel. */
template <int D, int DT, int GATE>
__global__ void __launch_bounds__(THREADS, 1)
    attn_prefill(const __grid_constant__ struct sm90_maps maps,
                 const __grid_constant__ struct sm90_args args)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char smem_ptr[];
    const uint32_t smem = smem_addr(smem_ptr);
    if (threadIdx.x == 0) {
        tma_prefetch_map(&maps.q);
        tma_prefetch_map(&maps.k);
        tma_prefetch_map(&maps.v);
        init_barriers<D>(smem);
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        reg_dec<PRODUCER_REGS>();
        if (threadIdx.x < 32)
            produce_q_k<D, GATE>(smem, smem_ptr, maps, args);
        else if (threadIdx.x < 64)
            produce_v<D, GATE>(smem, smem_ptr, maps, args);
    } else {
        reg_inc<CONSUMER_REGS>();
        consume<D, DT, GATE>(smem, smem_ptr, args);
    }
#endif
}

template <int D, int DT, int GATE>
static cudaError_t launch(const struct sm90_maps *maps, const struct sm90_args *args, int n_sms,
                          cudaStream_t stream)
{
    cudaError_t e =
        cudaFuncSetAttribute(attn_prefill<D, DT, GATE>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             smem_layout<D>::bytes);
    if (e != cudaSuccess)
        return e;
    int grid = args->n_tiles < n_sms ? args->n_tiles : n_sms;
    attn_prefill<D, DT, GATE><<<grid, THREADS, smem_layout<D>::bytes, stream>>>(*maps, *args);
    return cudaGetLastError();
}

struct kernel_entry {
    int head_dim, dtype, gate;
    cudaError_t (*launch)(const struct sm90_maps *, const struct sm90_args *, int, cudaStream_t);
};

static const struct kernel_entry kernels[] = {
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

int sm90_prefill_launch(const struct sm90_maps *maps, const struct sm90_args *args, int head_dim,
                        int dtype, int gate, int n_sms, void *stream)
{
    for (const struct kernel_entry &k : kernels)
        if (k.head_dim == head_dim && k.dtype == dtype && k.gate == gate)
            return (int)k.launch(maps, args, n_sms, (cudaStream_t)stream);
    return (int)cudaErrorInvalidValue;
}
