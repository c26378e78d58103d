/* Decode attention on Hopper over the paged cache. The contract is in attn_decode_sm90.h.
 *
 * Bottleneck: device memory; every K tile, and every V tile that is kept, is read once. At the
 * H200's rate a multiprocessor receives a (page, KV head) pair of 32 KiB in about 1700 clocks; its
 * products take a warp about 2000, so seven warps leave it waiting for memory.
 *
 * Tile: 16 packed rows x 64 keys, m16n8k16. A warp computes whole pages alone, with a maximum, sum
 * and output of its own, and issues its own loads, so the page loop has no barrier between warps:
 *
 *   wait K(j) | QK(j) | issue K(j+1) | gate(j) | wait V(j'), PV(j') | issue V(j) | softmax(j)
 *
 * j' is the page kept before: its V arrives under the QK of the pages after it. Without a gate V is
 * never in doubt and is asked for when the page before has left the slot (head_dim 128):
 *
 *   wait K(j) | QK(j) | issue K(j+1) | softmax(j) | wait V(j), PV(j) | issue V(j+1)
 *
 * A piece ends with a merge over the warps through shared memory; K of the next piece is in flight
 * meanwhile. A part of a cut task goes to the workspace unnormalised; the last of its thread blocks
 * to arrive merges all parts in plan order (a second kernel would cost a launch gap of 2 to 3% at
 * 150 us).
 *
 * Grid: DEC_BLOCKS a multiprocessor, persistent over shares (attn_decode_plan.h).
 * Shared memory, head_dim 128: 7 warps x (K 16 KiB + V 16 KiB), states 896 B, maxima 1792 B,
 * barriers. head_dim 64: two slots of 8 KiB for each. In flight a multiprocessor: up to 224 KiB.
 * Registers: O 64, S 32, Q 32, P 16 a lane; below 255, no spills.
 * Barriers: one mbarrier a slot, completed by its TMA; slots are freed in the warp's own order.
 * Four with DEC_WARPS arrivals for the maxima that warps show each other under REL. */
#include "attention/attn_decode_merge_sm90.cuh"

#include "core/early.cuh"

/* ---- one piece ---- */

/* Whether V of a page is asked for as soon as its slot is free: all pages are kept, and with one
 * slot a request behind the scores would leave it empty meanwhile. */
template <int D, int GATE>
__device__ constexpr bool v_ahead(void)
{
    return GATE == SM90_GATE_NONE && dec_layout<D>::slots == 1;
}

/* The page at walk position i: scores, gate, and up to its probabilities. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void do_page(struct dec_warp<D> &w, struct dec_state<D> &st,
                                        struct dec_rows &r, const uint32_t (&q)[D / 16][4],
                                        int page, const struct sm90_maps &maps,
                                        const struct dec_args &a)
{
    using L = dec_layout<D>;
    const uint32_t at = w.warp * L::slots + w.k.slot;
    const int tile = w.coming[0];
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
        return;
    if (L::slots > 1)
        load_v(w, maps, tile);
    if (!v_ahead<D, GATE>()) {
        finish_page<D, DT>(w, st);
        if (L::slots == 1)
            load_v(w, maps, tile);
    }
    softmax_page<D, DT, GATE>(st, s, pm, a.scale * DEC_LOG2E);
    st.keys = min((int)DEC_PAGE, r.last_pos + 1 - page * DEC_PAGE);
}

/* This warp's pages of a piece. Under REL all warps take part in all steps, with a page or not. */
template <int D, int DT, int GATE>
__device__ __forceinline__ void attend(struct dec_warp<D> &w, struct dec_state<D> &st,
                                       struct dec_rows &r, const uint32_t (&q)[D / 16][4],
                                       const struct dec_piece &p, const struct sm90_maps &maps,
                                       const struct dec_args &a, unsigned char *smem)
{
    if (v_ahead<D, GATE>() && !w.has_v && p.begin + w.warp < p.end)
        load_v(w, maps, w.coming[0]);
    w.has_v = false;
#pragma unroll 1
    for (int step = p.begin; step < p.end; step += DEC_WARPS) {
        const int i = step + w.warp;
        if (GATE == SM90_GATE_REL && step >= p.begin + 2 * DEC_WARPS)
            see_maxima(w, st, smem);
        if (i < p.end)
            do_page<D, DT, GATE>(w, st, r, q, dec_page(i, p.last, p.n_run, p.sink), maps, a);
        if (v_ahead<D, GATE>()) {
            finish_page<D, DT>(w, st);
            if (i + DEC_WARPS < p.end)
                load_v(w, maps, w.coming[0]);
        }
        if (GATE == SM90_GATE_REL) {
            show_maxima(w, st, smem);
            w.step++;
        }
    }
    finish_page<D, DT>(w, st);
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
        st.m[i] = st.top[i] = -INFINITY, st.shift[i] = st.l[i] = 0.0f;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
        st.o[n][0] = st.o[n][1] = st.o[n][2] = st.o[n][3] = 0.0f;
    st.keys = 0;
    attend<D, DT, GATE>(w, st, r, q, p, maps, a, smem);
    leave_rows<D>(w, st, r, smem);
    __syncthreads();
    merge_warps<D, DT>(a, p, r.n, smem);
    if (p.n_parts > 1)
        merge_parts<D, DT>(a, p, r.n, (volatile uint32_t *)(smem + dec_layout<D>::last));
    count_pages<D>(a, p, r.n, smem);
    fence_proxy_async(); /* V loads write where the rows were */
    __syncthreads();
}

/* ---- the kernel ---- */

template <int D>
__device__ __forceinline__ void start_warp(struct dec_warp<D> &w, uint32_t smem)
{
    using L = dec_layout<D>;
    w.smem = smem;
    w.warp = __shfl_sync(DEC_ALL, (int)threadIdx.x / 32, 0);
    w.lane = threadIdx.x & 31;
    w.k = {0, 0}, w.v = {0, 0}, w.v_next = {0, 0};
    w.step = 0;
    w.has_v = false;
    if (w.lane == 0) {
        for (int i = 0; i < L::slots; i++) {
            mbar_init(smem + L::k_full + 8 * (w.warp * L::slots + i), 1);
            mbar_init(smem + L::v_full + 8 * (w.warp * L::slots + i), 1);
        }
        for (int i = 0; i < DEC_STEPS && w.warp == 0; i++)
            mbar_init(smem + L::tops_full + 8 * i, DEC_WARPS);
        mbar_fence_init();
    }
    __syncthreads();
}

/* Whether this warp begins the share with pages that hold no token of the step: the kernel before
 * this one may still write the others. */
template <int D>
__device__ __forceinline__ bool begins_old(const struct dec_args &a, int begin, int warp)
{
    const struct dec_piece p = piece_load(a.pieces + begin);
    const int i = p.begin + warp, last = i + (dec_layout<D>::slots - 1) * DEC_WARPS;
    return last < p.end && dec_page(i, p.last, p.n_run, p.sink) < p.pos / DEC_PAGE;
}

/* Pieces [begin, end): the first pages of this warp. */
template <int D>
__device__ __forceinline__ void start_share(struct dec_warp<D> &w, const struct sm90_maps &maps,
                                            const struct dec_args &a, int begin, int end)
{
    w.feed.next = a.pieces + begin;
    w.feed.end = a.pieces + end;
    w.feed.at = w.feed.stop = 0;
#pragma unroll
    for (int i = 0; i < dec_layout<D>::slots; i++) {
        const uint32_t slot = (w.k.slot + i) % dec_layout<D>::slots;
        w.coming[i] = load_k(w, maps, a.n_kv_heads, slot);
    }
}

/* Draws a share. Every share in use is followed by one draw, so the last draw resets the counter;
 * it is that of the last share, which never begins a cut task. */
__device__ __forceinline__ int next_share(const struct dec_args &a, int used, volatile int *share)
{
    if (threadIdx.x == 0) {
        uint32_t *drawn = a.arrived + a.n_shares - 1;
        const int n = (int)atomicAdd(drawn, 1u);
        if (n == used - 1)
            *drawn = 0;
        *share = (int)gridDim.x + n;
    }
    __syncthreads();
    return *share;
}

template <int D, int DT, int GATE>
__global__ void __launch_bounds__(DEC_THREADS, DEC_BLOCKS)
    attn_decode(const __grid_constant__ struct sm90_maps maps,
                const __grid_constant__ struct dec_args args)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char smem[];
    struct dec_warp<D> w;
    bool begun = false;
    begin_next();
    if (threadIdx.x == 0) {
        tma_prefetch_map(&maps.k);
        tma_prefetch_map(&maps.v);
    }
    int share = blockIdx.x, begin = load_kept(args.first + share);
    int end = load_kept(args.first + share + 1);
    const int n_pieces = load_kept(args.first + args.n_shares);
    const int used = load_kept(&args.pieces[0].shares);
    start_warp<D>(w, smem_addr(smem));
    if (n_pieces > 0 && share < used && begins_old<D>(args, begin, w.warp)) {
        begun = true;
        start_share<D>(w, maps, args, begin, end);
        if (v_ahead<D, GATE>()) {
            w.has_v = true;
            load_v(w, maps, w.coming[0]);
        }
    }
    wait_for_inputs();
    while (n_pieces > 0 && share < used) {
        if (!begun)
            start_share<D>(w, maps, args, begin, end);
        begun = false;
#    pragma unroll 1
        for (int i = begin; i < end; i++)
            do_piece<D, DT, GATE>(w, piece_load(args.pieces + i), maps, args, smem);
        if (used <= (int)gridDim.x)
            break;
        share = next_share(args, used, (volatile int *)(smem + dec_layout<D>::share));
        if (share < used)
            begin = args.first[share], end = args.first[share + 1];
    }
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
    const struct launch l = {dim3((unsigned)dec_blocks(args->n_shares)), DEC_THREADS, bytes,
                             args->early, stream};
    return launch_early(attn_decode<D, DT, GATE>, l, *maps, *args);
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
