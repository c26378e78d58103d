/* Gated causal prefill over the paged cache for Hopper (sm_90a).
 * O = softmax(scale * Q K^T) V over the pages the policy keeps. An item is 128 query rows (one
 * absolute block of one head); a tile is two items that share K: two blocks of a head, which also
 * keep about as many pages, or two heads of a KV head where a block is left over. It takes one
 * 64-token page a step.
 *
 * Roles. Warpgroup 0 loads: lanes 0 and 1 of warp 0 take tiles from the queue and copy Q, warp 1 K,
 * warp 2 V where nothing of a tile is gated. Warpgroups 1 and 2 compute an item each, all its 128
 * rows, as two halves of 64. So the page's decision is a barrier of four warps, and nothing ties
 * the two groups to each other but the ring of K.
 * Order of a group, one page:
 *     issue QK of half 0, of half 1 | softmax 0 | issue PV 0 | softmax 1 | issue PV 1 | wait
 * so that half 0's softmax runs under half 1's QK, half 1's under half 0's PV, and the other
 * group's products under what is left. With a gate the group decides by both halves' scores before
 * softmax 0, and a skipped page ends there: 16 QK products, 64 scores compared, a vote. Softmax
 * takes no maxima of a page: its sums tell when a row's maximum must follow (SUM_LIMIT). REL keeps
 * the maxima that decide apart from those that exponents refer to.
 *
 * V on demand. With a gate, one thread of a group asks for V when the group has decided, or at the
 * page's start if the item keeps all; the slot is the group's own. Without one, or where both items
 * of a tile keep all, V comes in a ring for both groups, and such a tile is computed as without a
 * gate. Tiles of the two kinds use the same slots by turns, at which all meet (take_turn).
 *
 * Tile shapes: Q 128 x D, K and V 64 x D; products m64n64k16 (QK, from shared memory) and m64nDk16
 * (PV, P from registers). Shared memory, head_dim 128: Q 2 x 32 KiB, K 6 x 16 KiB, V 4 x 16 KiB
 * (on demand 2 a group), then descriptions of two tiles and barriers. O leaves from registers,
 * while the next Q comes. Registers: 240 a computing thread, 24 a loading one; O takes 128 of
 * them, scores 64. mbarriers: full and empty for each slot, full on demand, Q of each group and
 * tile description, turns of V; named barriers: one a group. Bottleneck: the card's power; then, of
 * skipped pages, QK of 64 keys, which reads Q and K at shared memory's full rate.
 * Source: BSFA (arXiv 2512.07011) section 4; FlashAttention-3 (arXiv 2407.08608) section 3. */
#include "attention/attn_prefill_load_sm90.cuh"
#include "attention/attn_prefill_page_sm90.cuh"

/* ---- a tile ---- */

/* How REL's gate is steered and to what (attn_steer.h), and a threshold in its place. They come
 * from global memory here, once an item: the loading warps have no registers left for it. */
template <int D, int GATE>
__device__ __forceinline__ void take_steering(struct consumer<D, GATE> &c,
                                              const struct sm90_args &a)
{
    const float steer = __int_as_float(ITEM_FIELD(c, steer));
    const int n_off = ITEM_FIELD(c, n_off), absolute = ITEM_FIELD(c, is_absolute);
    c.gate1 = c.gate;
    c.steady = attn_steer_steady(steer, absolute);
    c.early = attn_steer_early(steer, absolute);
    c.rest = c.rest1 = 0.0f;
    c.n = 1.0f;
    c.end = (float)(n_off + 1);
    if (!all_of(steer > 0.0f))
        return;
    const struct sm90_seq *s = a.seqs + TILE_FIELD(c, seq);
    const int head = ITEM_FIELD(c, head), block = ITEM_FIELD(c, block);
    const int n_diag = ITEM_FIELD(c, n_diag);
    const float *keep = s->keep + head;
    if (all_of(absolute)) {
        const float *t = s->t + head * a.t_head_stride;
        c.gate = c.gate1 = t[attn_steer_row(block, *keep, a.t_blocks)] * a.inv_scale;
        c.rest = c.rest1 = attn_steer_due(s->blend * *keep, n_off);
    } else {
        const float density = (1.0f - s->blend) * keep[0] + s->blend * keep[a.keep_level_stride];
        c.rest1 = attn_steer_due_of(density, 2 * block, n_diag, n_off);
        c.rest = attn_steer_due_of(density, 2 * block, ITEM_FIELD(c, rows64) ? 1 : n_diag, n_off);
    }
    c.gate = c.rest < (float)n_off ? c.gate : -INFINITY;
    c.gate1 = c.rest1 < (float)n_off ? c.gate1 : -INFINITY;
}

template <int D, int GATE>
__device__ __forceinline__ void take_item(struct consumer<D, GATE> &c, const struct sm90_args &a)
{
    const int row_begin = ITEM_FIELD(c, row_begin), row_end = ITEM_FIELD(c, row_end);
    int valid = 0;
    for (int i = 0; i < 4; i++) {
        const int row =
            (i >> 1) * HALF_M + c.thread() / 32 * 16 + (c.thread() & 31) / 4 + 8 * (i & 1);
        valid |= (row >= row_begin && row < row_end) << i;
    }
    c.bits = c.thread() << 8 | valid;
    c.gate = GATE == SM90_GATE_NONE ? 0.0f : __int_as_float(ITEM_FIELD(c, gate));
    if (GATE == SM90_GATE_ABS && c.gate == 0.0f)
        c.gate = -0.0f; /* which reaches() takes for a negative one */
    if (GATE == SM90_GATE_REL)
        take_steering(c, a);
    c.kept = 0;
}

/* The pages of one segment before the diagonal: i is 8 * their number + the segment's. */
template <int D, int DT, int GATE, int KIND>
__device__ __forceinline__ void pages(struct consumer<D, GATE> &c, const CUtensorMap *map,
                                      const struct sm90_args &a, struct row_state (&st)[2],
                                      float (&o0)[D / 2], float (&o1)[D / 2], int &i, int &at)
{
    constexpr int watched = GATE == SM90_GATE_ABS_MAX;
#pragma unroll 1
    for (; all_of(i > 7); i -= 8) {
        if ((KIND & SPLIT) && KIND != (OPEN | SPLIT))
            split_page<D, DT, GATE, KIND & ~SPLIT>(c, map, a, st, o0, o1, at);
        else
            plain_page<D, DT, GATE, KIND>(c, map, a, st, o0, o1, at);
        at += watched;
    }
}

/* All pages of an item, of which there is at least one. */
template <int D, int DT, int GATE, int ROWS>
__device__ __forceinline__ void attend(struct consumer<D, GATE> &c, const CUtensorMap *map,
                                       const struct sm90_args &a, struct row_state (&st)[2],
                                       float (&o0)[D / 2], float (&o1)[D / 2])
{
    constexpr int split = ROWS == HALF_M ? SPLIT : 0;
    int at = 0; /* pages before the diagonal so far, if that is asked for */
#pragma unroll 1
    for (int i = 0; all_of(i < ITEM_FIELD(c, n_segments)); i++) {
        const bool diag = i == ITEM_FIELD(c, diag_segment);
        const int n = item_field(c, offsetof(struct item_info, n) + 4 * i);
        pass(c, item_field(c, offsetof(struct item_info, pass) + 4 * i));
        if (all_of(diag)) {
#pragma unroll 1
            for (int j = 0; all_of(j < n); j++)
                diagonal_page<D, DT, GATE>(c, map, a, st, o0, o1, j);
            continue;
        }
        i |= n << 3; /* one register for both */
        if (GATE != SM90_GATE_ABS)
            pages<D, DT, GATE, GATED | split>(c, map, a, st, o0, o1, i, at);
        else if (all_of(!(c.gate > -INFINITY)))
            pages<D, DT, GATE, OPEN | split>(c, map, a, st, o0, o1, i, at);
        else if (all_of(c.gate > 0.0f))
            pages<D, DT, GATE, POSITIVE | split>(c, map, a, st, o0, o1, i, at);
        else
            pages<D, DT, GATE, NEGATIVE | split>(c, map, a, st, o0, o1, i, at);
    }
    pass(c, item_field(c, offsetof(struct item_info, pass) + 4 * ITEM_FIELD(c, n_segments)));
}

/* The same computing thread in a tile whose items keep all pages: it does what it does without a
 * gate. */
template <int D, int GATE>
__device__ __forceinline__ struct consumer<D, SM90_GATE_NONE>
keeping_all(const struct consumer<D, GATE> &c) {
    constexpr uint32_t slots = smem_layout<D, GATE>::v_slots;
    const uint32_t first = (uint32_t)TILE_FIELD(c, v_first);
    struct consumer<D, SM90_GATE_NONE> all = {
    };
    all.smem = c.smem;
    all.group = c.group;
    all.bits = c.bits | (int)c.v.at << 4; /* to be kept: registers are dear */
    all.k.at = c.k.at;
    all.v.at = first < slots ? 2 * first : 2 * (first - slots) + 1;
    return all;
}

/* And back. */
template <int D, int GATE>
__device__ __forceinline__ void take_back(struct consumer<D, GATE> &c,
                                          const struct consumer<D, SM90_GATE_NONE> &all)
{
    c.k.at = all.k.at;
    c.v.at = (uint32_t)all.bits >> 4 & 15;
    c.bits = all.bits & ~0xf0;
}

/* Passes over a tile without an item for this group. */
template <int D, int GATE>
__device__ __forceinline__ void pass_tile(struct consumer<D, GATE> &c)
{
    if (HAS_OPEN(GATE) && all_of(TILE_FIELD(c, open))) {
        struct consumer<D, SM90_GATE_NONE> all = keeping_all(c);
        pass(all, TILE_FIELD(c, n_entries));
        take_back(c, all);
    } else {
        pass(c, TILE_FIELD(c, n_entries));
    }
}

/* The slots of V change their use: waits until both groups and the loading warp are done with them.
 */
template <int D, int GATE>
__device__ __forceinline__ void take_turn(const struct consumer<D, GATE> &c)
{
    if (!HAS_OPEN(GATE) || !all_of(TILE_FIELD(c, turn)))
        return;
    if (elect_one())
        meet(c.smem + smem_layout<D, GATE>::v_turn, TILE_FIELD(c, turns));
    __syncwarp();
}

template <int D, int DT, int GATE, int ROWS>
__device__ __forceinline__ void compute_item(struct consumer<D, GATE> &c, const CUtensorMap *map,
                                             const struct sm90_args &a)
{
    using L = smem_layout<D, GATE>;
    struct row_state st[2];
    float o0[D / 2], o1[D / 2];
    take_turn(c);
    if (all_of(ITEM_FIELD(c, n_pages) == 0)) {
        pass_tile(c);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        st[i / 2].m[i & 1] = -INFINITY;
        st[i / 2].top[i & 1] = -INFINITY;
        st[i / 2].l[i & 1] = 0.0f;
    }
    wgmma_zero(o0);
    wgmma_zero(o1);
    take_item(c, a);
    if (GATE == SM90_GATE_REL && all_of(ITEM_FIELD(c, is_absolute)))
        st[0].top[0] = st[0].top[1] = st[1].top[0] = st[1].top[1] = 0.0f; /* and they stay so */
    mbar_wait(c.smem + L::q_full + 8 * c.group, ITEM_FIELD(c, q_parity));
    if (HAS_OPEN(GATE) && all_of(TILE_FIELD(c, open))) {
        struct consumer<D, SM90_GATE_NONE> all = keeping_all(c);
        attend<D, DT, SM90_GATE_NONE, BLOCK_M>(all, map, a, st, o0, o1);
        take_back(c, all);
    } else {
        attend<D, DT, GATE, ROWS>(c, map, a, st, o0, o1);
    }
    if (elect_one()) /* the next Q comes while this O leaves */
        mbar_arrive(c.smem + L::q_empty + 8 * c.group);
    write_half<D, DT, GATE>(c, a, st[0], o0, 0);
    write_half<D, DT, GATE>(c, a, st[1], o1, 1);
    if (c.thread() == 0 && (a.seq_counts || a.head_counts))
        count_item(c, a);
}

template <int D, int DT, int GATE, int ROWS>
__device__ __forceinline__ void consume(uint32_t smem, const struct sm90_maps &maps,
                                        const struct sm90_args &a)
{
    using L = smem_layout<D, GATE>;
    struct consumer<D, GATE> c = {
    };
    c.smem = smem;
    c.group = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128 - 1, 0);
    c.bits = (int)(threadIdx.x & 127) << 8;
    for (;;) {
        const uint32_t taken = tiles_taken(c);
        mbar_wait(smem + L::tile_full + 8 * (taken & 1), taken >> 1 & 1);
        if (TILE_FIELD(c, seq) < 0)
            break;
        compute_item<D, DT, GATE, ROWS>(c, &maps.v, a);
        const uint32_t last = tiles_taken(c);
        mbar_arrive(smem + L::tile_empty + 8 * (last & 1));
        group_sync(c); /* all have read `taken` */
        if (c.thread() == 0)
            st_shared_s32(smem + L::taken + 4 * c.group, (int)last + 1);
        group_sync(c);
    }
}

/* ---- the kernel ---- */

template <int D, int GATE>
__device__ __forceinline__ void init_barriers(uint32_t smem)
{
    using L = smem_layout<D, GATE>;
    const int warps = GROUPS * GROUP_WARPS;
    /* Each thread tells for itself that it has read a description: racecheck follows no other way.
     */
    const int tile_readers = 32 * (warps + (GATE == SM90_GATE_NONE || HAS_OPEN(GATE) ? 2 : 1));
    mbar_init(smem + L::tile_wanted, 1);
    for (int i = 0; i < TILE_SLOTS; i++) {
        mbar_init(smem + L::tile_full + 8 * i, GROUPS);
        mbar_init(smem + L::tile_empty + 8 * i, tile_readers);
    }
    for (int i = 0; i < GROUPS; i++) {
        st_shared_s32(smem + L::taken + 4 * i, 0);
        mbar_init(smem + L::q_full + 8 * i, 1);
        mbar_init(smem + L::q_empty + 8 * i, GROUP_WARPS);
    }
    for (int i = 0; i < L::k_slots; i++) {
        mbar_init(smem + L::k_full + 8 * i, 1);
        mbar_init(smem + L::k_empty + 8 * i, warps);
    }
    for (int i = 0; i < L::v_slots; i++) {
        mbar_init(smem + L::v_full + 8 * i, 1);
        mbar_init(smem + L::v_empty + 8 * i, warps);
        mbar_init(smem + L::v_asked + 8 * i, 1);
    }
    mbar_init(smem + L::v_turn, warps + 1);
    const uint32_t before = smem + L::info + (TILE_SLOTS - 1) * (uint32_t)sizeof(struct tile_info);
    st_shared_s32(before + OF_TILE(open), 0); /* what the first tile takes for the last */
    st_shared_s32(before + OF_TILE(turns), 0);
    st_shared_s32(before + OF_TILE(v_first), 0);
    mbar_fence_init();
}

/* A compiler pass for plain sm_90, which lacks wgmma, makes an empty kernel. */
template <int D, int DT, int GATE, int ROWS>
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
        init_barriers<D, GATE>(smem);
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        reg_dec<PRODUCER_REGS>();
        produce<D, GATE>(smem, smem_ptr, maps, args);
    } else {
        reg_inc<CONSUMER_REGS>();
        consume<D, DT, GATE, ROWS>(smem, maps, args);
    }
#endif
}

template <int D, int DT, int GATE, int ROWS>
static cudaError_t launch(const struct sm90_maps *maps, const struct sm90_args *args, int n_sms,
                          cudaStream_t stream)
{
    struct sm90_args a = *args;
    a.scale_log2 = a.scale * LOG2E;
    a.inv_scale = 1.0f / a.scale;
    constexpr int bytes = smem_layout<D, GATE>::bytes;
    static_assert(bytes <= 232448, "shared memory of a thread block");
    cudaError_t e = cudaFuncSetAttribute(attn_prefill<D, DT, GATE, ROWS>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e != cudaSuccess)
        return e;
    const int grid = args->n_tiles < n_sms ? args->n_tiles : n_sms;
    attn_prefill<D, DT, GATE, ROWS><<<grid, THREADS, bytes, stream>>>(*maps, a);
    return cudaGetLastError();
}

struct kernel_entry {
    int head_dim, dtype, gate, rows;
    cudaError_t (*launch)(const struct sm90_maps *, const struct sm90_args *, int, cudaStream_t);
};

#define KERNEL(d, dt, gate, rows)                                                                  \
    {                                                                                              \
        d, dt, gate, rows, launch<d, dt, gate, rows>                                               \
    }
#define KERNELS(d, dt)                                                                             \
    KERNEL(d, dt, SM90_GATE_NONE, 128), KERNEL(d, dt, SM90_GATE_ABS, 128),                         \
        KERNEL(d, dt, SM90_GATE_ABS, 64), KERNEL(d, dt, SM90_GATE_REL, 128),                       \
        KERNEL(d, dt, SM90_GATE_REL, 64), KERNEL(d, dt, SM90_GATE_ABS_MAX, 128),                   \
        KERNEL(d, dt, SM90_GATE_ABS_MAX, 64)

static const struct kernel_entry kernels[] = {
    KERNELS(128, DT_BF16),
    KERNELS(128, DT_F16),
    KERNELS(64, DT_BF16),
    KERNELS(64, DT_F16),
};

int sm90_prefill_launch(const struct sm90_maps *maps, const struct sm90_args *args, int head_dim,
                        int dtype, int gate, int n_sms, void *stream)
{
    const int rows = gate == SM90_GATE_NONE ? BLOCK_M : args->gate_rows;
    for (const struct kernel_entry &k : kernels)
        if (k.head_dim == head_dim && k.dtype == dtype && k.gate == gate && k.rows == rows)
            return (int)k.launch(maps, args, n_sms, (cudaStream_t)stream);
    return (int)cudaErrorInvalidValue;
}
