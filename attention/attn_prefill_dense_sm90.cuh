/* The consumer of tiles in which nothing can be skipped: two pages a step, FlashAttention-3's
 * order: issue QK(j) | issue PV(j-1) | wait QK(j) | max(j), softmax(j) | wait PV(j-1) | pack The
 * warpgroups alternate on the tensor cores by themselves: barriers that force the order were
 * measured and cost 2 to 4 percent. */
#ifndef ATTENTION_ATTN_PREFILL_DENSE_SM90_CUH
#define ATTENTION_ATTN_PREFILL_DENSE_SM90_CUH

#include "attention/attn_prefill_rows_sm90.cuh"

/* Where the walk is: pair of K slots 0..2, parity of the ring's round. */
struct pair_at {
    uint32_t pair, parity;
    __device__ __forceinline__ void next(void)
    {
        pair++;
        if (pair == K_SLOTS / 2)
            pair = 0, parity ^= 1;
    }
};

template <int D, int DT>
__device__ __forceinline__ void pair_qk(const struct consumer<D> &c, float (&x)[64], uint32_t q,
                                        const struct pair_at &at)
{
    using L = smem_layout<D>;
    mbar_wait(c.smem + L::k_full + 16 * at.pair, at.parity);
    mbar_wait(c.smem + L::k_full + 16 * at.pair + 8, at.parity);
    const uint32_t k = desc_k_major(c.smem + L::k) + at.pair * (2 * PAGE * 128 / 16);
    wgmma_fence();
    wgmma_qk<DT, true>(x, q, k);
#pragma unroll
    for (int i = 1; i < D / 16; i++)
        wgmma_qk<DT, false>(x, q + ((i / 4) * L::half_bytes + (i % 4) * 32) / 16,
                            k + ((i / 4) * L::k_half + (i % 4) * 32) / 16);
    wgmma_commit();
}

template <int D>
__device__ __forceinline__ void pair_release_k(const struct consumer<D> &c,
                                               const struct pair_at &at)
{
    using L = smem_layout<D>;
    if (c.lane == 0) {
        mbar_arrive(c.smem + L::k_empty + 16 * at.pair);
        mbar_arrive(c.smem + L::k_empty + 16 * at.pair + 8);
    }
}

template <int D, int DT>
__device__ __forceinline__ void pair_pv(const struct consumer<D> &c, float (&o)[D / 2],
                                        uint32_t (&p)[32])
{
    using L = smem_layout<D>;
    struct ring<L::v_slots> v = c.v;
    mbar_wait(c.smem + L::v_full + 8 * v.slot(), v.parity());
    const uint32_t first = desc_mn_major(c.smem + L::v + v.slot() * L::page_bytes, PAGE * 128);
    v.next();
    mbar_wait(c.smem + L::v_full + 8 * v.slot(), v.parity());
    const uint32_t second = desc_mn_major(c.smem + L::v + v.slot() * L::page_bytes, PAGE * 128);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < PAGE / 16; i++)
        wgmma_pv<DT>(o, p + 4 * i, first + i * 2048 / 16);
#pragma unroll
    for (int i = 0; i < PAGE / 16; i++)
        wgmma_pv<DT>(o, p + 16 + 4 * i, second + i * 2048 / 16);
    wgmma_commit();
}

/* PV of the last pair is done. */
template <int D>
__device__ __forceinline__ void pair_release_v(struct consumer<D> &c)
{
    using L = smem_layout<D>;
#pragma unroll
    for (int page = 0; page < 2; page++) {
        if (c.lane == 0)
            mbar_arrive(c.smem + L::v_empty + 8 * c.v.slot());
        c.v.next();
    }
}

/* Masks what the diagonal hides and what does not exist, at places i and i + 1 of the walk. */
template <int D>
__device__ __forceinline__ void pair_mask(const struct consumer<D> &c, const struct tile_rows &t,
                                          float (&x)[64], int i)
{
    int limit[2];
    const int row0 = c.warp * 16 + c.lane / 4, col0 = 2 * (c.lane & 3);
#pragma unroll
    for (int page = 0; page < 2; page++) {
        const int diag = i + page - t.diag_at;
        const bool none = i + page >= t.n_pages || (diag == 1 && !(t.flags & TWO_DIAGONAL));
        limit[page] = none ? -9 : diag == 0 ? row0 : diag == 1 ? row0 - PAGE : PAGE;
    }
    page_mask<0>(x, col0, limit[0], limit[0] + 8);
    page_mask<32>(x, col0, limit[1], limit[1] + 8);
}

/* Two pages: see the top. FIRST: nothing is pending. */
template <int D, int DT, bool FIRST>
__device__ __forceinline__ void pair_step(struct consumer<D> &c, const struct tile_rows &t,
                                          struct row_state &st, float (&o)[D / 2],
                                          uint32_t (&p)[32], struct pair_at &at, int i)
{
    float x[64], pm[2][2], alpha[2] = {1.0f, 1.0f};
    bool moved = false;
    pair_qk<D, DT>(c, x, t.q, at);
    if (!FIRST)
        pair_pv<D, DT>(c, o, p);
    wgmma_wait<FIRST ? 0 : 1>();
    wgmma_pin(x);
    pair_release_k(c, at);
    at.next();
    if (all_of((uint32_t)(i + 1 - t.diag_at) < 3 || i + 2 > t.n_pages))
        pair_mask(c, t, x, i);
    page_max<0>(pm[0], x);
    page_max<32>(pm[1], x);
    pm[0][0] = max_nan(pm[0][0], pm[1][0]);
    pm[0][1] = max_nan(pm[0][1], pm[1][1]);
    /* Always true, but not to the compiler: ptxas hoists the wait for PV to the top of its basic
     * block, above the exponentials that are to run under PV. */
    if (t.scale_log2 != 0.0f) {
        moved = outgrown(st, pm[0], t.scale_log2);
        if (moved)
            move_shift(st, alpha, pm[0], t.scale_log2);
        page_exp<0>(x, st.l, t.scale_log2, st.shift);
        page_exp<32>(x, st.l, t.scale_log2, st.shift);
    }
    if (!FIRST) {
        wgmma_wait<0>();
        wgmma_pin(o);
        wgmma_pin(p);
        forget(p);
        pair_release_v(c);
    }
    page_pack<DT>(p, x);
    if (moved)
        scale_rows(o, alpha);
}

/* All pages of a tile. */
template <int D, int DT>
__device__ __forceinline__ void attend_dense(struct consumer<D> &c, const struct tile_rows &t,
                                             struct row_state &st, float (&o)[D / 2])
{
    uint32_t p[32];
    struct pair_at at = {0, c.round & 1};
    pair_step<D, DT, true>(c, t, st, o, p, at, 0);
#pragma unroll 1
    for (int i = 2; i < t.n_pages; i += 2)
        pair_step<D, DT, false>(c, t, st, o, p, at, i);
    pair_pv<D, DT>(c, o, p);
    wgmma_wait<0>();
    wgmma_pin(o);
    wgmma_pin(p);
    pair_release_v(c);
    if (at.pair != 0)
        skip_slots(c, 2 * at.pair, at.parity);
}

#endif
