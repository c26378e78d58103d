/* The loading warps of the Hopper prefill kernel. Warp 0 takes tiles from the queue, longest first,
 * and copies Q; warp 1 copies K; warp 2 copies the V pages that the votes keep, and only those, and
 * counts them. */
#ifndef ATTENTION_ATTN_PREFILL_LOAD_SM90_CUH
#define ATTENTION_ATTN_PREFILL_LOAD_SM90_CUH

#include "attention/attn_prefill_sm90.cuh"

/* ---- warp 0, one thread: tiles and Q ---- */

/* The smallest x with x * scale >= t: raw scores compared with it decide as scaled scores compared
 * with t do. */
__device__ __forceinline__ float raw_threshold(float t, float scale)
{
    float x = t / scale;
    if (!(fabsf(x) < INFINITY))
        return x;
    while (__fmul_rn(x, scale) < t)
        x = nextafterf(x, INFINITY);
    while (__fmul_rn(nextafterf(x, -INFINITY), scale) >= t)
        x = nextafterf(x, -INFINITY);
    return x;
}

template <int GATE>
__device__ __forceinline__ void describe_tile(struct tile_info *info, const struct sm90_args &a,
                                              const struct sm90_tile &t)
{
    const struct sm90_seq s = a.seqs[t.seq];
    int end = s.pos + s.n_rows;
    struct sm90_visit v = {1, -1};
    if (a.visit)
        v = a.visit[t.head];
    struct page_walk w = walk_make(t.block, v.sink, v.local);
    info->pages = s.pages;
    info->seq = t.seq;
    info->head = t.head;
    info->kv_head = t.head / (a.n_heads / a.n_kv_heads);
    info->block = t.block;
    info->q_row = s.row + t.block * BLOCK_M - s.pos;
    info->row_begin = max(s.pos - t.block * BLOCK_M, 0);
    info->row_end = min(end - t.block * BLOCK_M, (int)BLOCK_M);
    info->n_diag = (info->row_end + PAGE - 1) / PAGE;
    info->n_off = w.sink + w.local;
    info->sink = w.sink;
    info->local = w.local;
    info->diag_at = a.order == SM90_ORDER_L2R ? info->n_off : 0;
    info->rows64 = s.gate_rows == PAGE;
    info->gate = -INFINITY;
    if (GATE == SM90_GATE_ABS && s.t)
        info->gate =
            raw_threshold(s.t[t.head * a.t_head_stride + min(t.block, a.t_blocks - 1)], a.scale);
    if (GATE == SM90_GATE_REL)
        info->gate = s.ln_lambda / a.scale;
    info->dense = info->gate == -INFINITY;
}

/* Place of a (page, KV head) in the pools' maps; page < 0: outside, which makes zeros. */
__device__ __forceinline__ int tile_of_page(const struct sm90_args &a, int page, int kv_head)
{
    return page < 0 ? a.n_pages * a.n_kv_heads : page * a.n_kv_heads + kv_head;
}

/* Takes tiles from the queue, one ahead of their use. */
template <int D, int GATE>
__device__ __forceinline__ void produce_q(uint32_t smem, unsigned char *smem_ptr,
                                          const struct sm90_maps &maps, const struct sm90_args &a)
{
    using L = smem_layout<D>;
    struct ring<Q_SLOTS> q = {
        0
    };
    for (int at = blockIdx.x;; at = (int)(atomicAdd(&a.queue[0], 1) + gridDim.x)) {
        struct tile_info *info = (struct tile_info *)(smem_ptr + L::info) + q.slot();
        const uint32_t full = smem + L::q_full + 8 * q.slot();
        mbar_wait(smem + L::q_empty + 8 * q.slot(), q.parity() ^ 1);
        if (at >= a.n_tiles) {
            info->seq = -1;
            mbar_arrive(full);
            break;
        }
        describe_tile<GATE>(info, a, a.tiles[at]);
        mbar_arrive_expect_tx(full, L::q_bytes);
        for (int h = 0; h < L::halves; h++)
            tma_load_3d(smem + L::q + q.slot() * L::q_bytes + h * L::half_bytes, &maps.q, full, 0,
                        info->head * L::halves + h, info->q_row, L2_EVICT_FIRST);
        q.next();
    }
    if (atomicAdd(&a.queue[1], 1) == gridDim.x - 1) {
        a.queue[0] = 0;
        a.queue[1] = 0;
    }
}

/* ---- warp 1: K ---- */

template <int D>
__device__ __forceinline__ void produce_k(uint32_t smem, unsigned char *smem_ptr,
                                          const struct sm90_maps &maps, const struct sm90_args &a)
{
    using L = smem_layout<D>;
    const int lane = threadIdx.x & 31;
    struct ring<Q_SLOTS> q = {
        0
    };
    uint32_t round = 0;
    for (;;) {
        const struct tile_info *info = (const struct tile_info *)(smem_ptr + L::info) + q.slot();
        mbar_wait(smem + L::q_full + 8 * q.slot(), q.parity());
        if (info->seq < 0)
            break;
        int mine = 0; /* lane i holds the page of the i-th place of 32 */
        const int n = tile_rounds(info) * K_SLOTS;
        for (int i = 0, slot = 0; i < n; i++) {
            if ((i & 31) == 0)
                mine = place_page(info, a.order, i + lane);
            const int page = __shfl_sync(0xffffffffu, mine, i & 31);
            if (lane == 0) {
                const uint32_t full = smem + L::k_full + 8 * slot;
                mbar_wait(smem + L::k_empty + 8 * slot, ~round & 1);
                if (page < 0) { /* nothing reads it, or all of it is masked */
                    mbar_arrive(full);
                } else {
                    mbar_arrive_expect_tx(full, L::page_bytes);
                    for (int h = 0; h < L::halves; h++)
                        tma_load_4d(smem + L::k + h * L::k_half + slot * (PAGE * 128), &maps.k,
                                    full, 0, 0, h, tile_of_page(a, page, info->kv_head),
                                    L2_EVICT_LAST);
                }
            }
            if (++slot == K_SLOTS)
                slot = 0, round++;
        }
        __syncwarp();
        if (lane == 0)
            mbar_arrive(smem + L::q_empty + 8 * q.slot());
        q.next();
    }
}

/* ---- warp 2: V, by decision ---- */

/* Adds a tile's counts in (page, row group) units; kept are those before the diagonal. */
__device__ __forceinline__ void count_tile(const struct sm90_args &a, const struct tile_info *t,
                                           int kept)
{
    const int groups = t->rows64 && t->row_end > PAGE ? 2 : 1;
    const int diag = groups == 2 ? 3 : t->n_diag;
    struct sm90_counts c;
    c.reachable = (unsigned long long)(groups * 2 * t->block + diag);
    c.visited = (unsigned long long)(groups * t->n_off + diag);
    c.kept = t->dense ? c.visited : (unsigned long long)(kept + diag);
    struct sm90_counts *to[2] = {a.seq_counts ? a.seq_counts + t->seq : (struct sm90_counts *)0,
                                 a.head_counts ? a.head_counts + t->head : (struct sm90_counts *)0};
    for (int i = 0; i < 2; i++) {
        if (!to[i])
            continue;
        atomicAdd(&to[i]->reachable, c.reachable);
        atomicAdd(&to[i]->visited, c.visited);
        atomicAdd(&to[i]->kept, c.kept);
    }
}

/* Follows the votes on a page: the row groups (bit 0, bit 1; without groups of 64 rows all rows are
 * bit 0) that keep it, given those that kept the page before. */
template <int GATE>
__device__ __forceinline__ int keepers(uint2 votes, int rows64, int before)
{
    if (!rows64)
        return votes_keep<GATE>(votes.x | votes.y, before & 1);
    return votes_keep<GATE>(votes.x, before & 1) | votes_keep<GATE>(votes.y, before & 2) << 1;
}

/* What becomes of the page at place i of the walk: whether its V is wanted. */
template <int D, int GATE>
__device__ __forceinline__ int v_wanted(uint32_t smem, const struct tile_info *info, int page,
                                        int i, uint32_t &votes_read, int &before, int &kept)
{
    if (GATE == SM90_GATE_NONE || info->dense)
        return i < ((tile_places(info) + 1) & ~1); /* pages are taken in pairs */
    const uint32_t at = votes_read;
    if (i < (tile_places(info) + TURN - 1) / TURN * TURN)
        votes_read = at + 1 == 2 * VOTE_SLOTS ? 0 : at + 1;
    if (page < 0)
        return 0;
    if ((uint32_t)(i - info->diag_at) < 2) {
        before = 3;
        return 1;
    }
    const int second = at >= VOTE_SLOTS;
    before = keepers<GATE>(vote_wait<D>(smem, second ? at - VOTE_SLOTS : at, second), info->rows64,
                           before);
    kept += __popc(before);
    return before;
}

template <int D, int GATE>
__device__ __forceinline__ void produce_v(uint32_t smem, unsigned char *smem_ptr,
                                          const struct sm90_maps &maps, const struct sm90_args &a)
{
    using L = smem_layout<D>;
    const int lane = threadIdx.x & 31;
    struct ring<Q_SLOTS> q = {
        0
    };
    struct ring<L::v_slots> v = {
        0
    };
    uint32_t votes_read = 0, k = 0; /* k: place in two rounds of the ring */
    for (;;) {
        const struct tile_info *info = (const struct tile_info *)(smem_ptr + L::info) + q.slot();
        mbar_wait(smem + L::q_full + 8 * q.slot(), q.parity());
        if (info->seq < 0)
            break;
        int kept = 0, mine = 0, before = 3;
        const int n = tile_rounds(info) * K_SLOTS;
        for (int i = 0; i < n; i++) {
            if ((i & 31) == 0)
                mine = place_page(info, a.order, i + lane);
            const int page = __shfl_sync(0xffffffffu, mine, i & 31);
            const int keep = v_wanted<D, GATE>(smem, info, page, i, votes_read, before, kept);
            if (GATE != SM90_GATE_NONE) {
                /* K comes again when its votes have been read; never twice in a round */
                mbar_wait(smem + L::k_full + 8 * (k >= K_SLOTS ? k - K_SLOTS : k), k >= K_SLOTS);
                if (lane == 0)
                    mbar_arrive(smem + L::k_empty + 8 * (k >= K_SLOTS ? k - K_SLOTS : k));
                k = k == 2 * K_SLOTS - 1 ? 0 : k + 1;
            }
            if (!keep)
                continue;
            if (lane == 0) {
                const uint32_t full = smem + L::v_full + 8 * v.slot();
                mbar_wait(smem + L::v_empty + 8 * v.slot(), v.parity() ^ 1);
                mbar_arrive_expect_tx(full, L::page_bytes);
                tma_load_4d(smem + L::v + v.slot() * L::page_bytes, &maps.v, full, 0, 0, 0,
                            tile_of_page(a, page, info->kv_head), L2_EVICT_LAST);
            }
            v.next();
        }
        if (lane == 0 && (a.seq_counts || a.head_counts))
            count_tile(a, info, kept);
        __syncwarp();
        if (lane == 0)
            mbar_arrive(smem + L::q_empty + 8 * q.slot());
        q.next();
    }
}

#endif
