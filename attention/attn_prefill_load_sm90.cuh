/* The loading warps of the Hopper prefill kernel. Warp 0 takes tiles from the queue, longest first,
 * and copies Q and K; warp 1 copies the V pages that the votes keep, and only those, and counts
 * them. */
#ifndef ATTENTION_ATTN_PREFILL_LOAD_SM90_CUH
#define ATTENTION_ATTN_PREFILL_LOAD_SM90_CUH

#include "attention/attn_prefill_sm90.cuh"

/* ---- warp 0: tiles, Q and K ---- */

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
    info->block = t.block;
    info->q_row = s.row + t.block * BLOCK_M - s.pos;
    info->row_begin = max(s.pos - t.block * BLOCK_M, 0);
    info->row_end = min(end - t.block * BLOCK_M, (int)BLOCK_M);
    info->n_pages = (end + PAGE - 1) / PAGE;
    info->n_diag = (info->row_end + PAGE - 1) / PAGE;
    info->n_off = w.sink + w.local;
    info->sink = w.sink;
    info->local = w.local;
    info->rows64 = s.gate_rows == PAGE;
    if (GATE == SM90_GATE_ABS)
        info->gate = s.t ? s.t[t.head * a.t_head_stride + min(t.block, a.t_blocks - 1)] / a.scale
                         : -INFINITY;
    if (GATE == SM90_GATE_REL)
        info->gate = s.ln_lambda / a.scale;
}

/* Page id of place i (0 or 1) of a step's two pages, or -1: no page. off is the step's first index
 * among the off-diagonal pages, negative for the diagonal step. */
__device__ __forceinline__ int step_page(const struct tile_info *t, int order, int step, int i)
{
    int n_steps = tile_steps(t);
    int ltr = order == SM90_ORDER_L2R;
    int diag_step = ltr ? n_steps - 1 : 0;
    int page;
    if (step == diag_step) {
        page = i < t->n_diag ? 2 * t->block + i : -1;
    } else {
        int at = 2 * (ltr ? step : step - 1) + i;
        struct page_walk w = {2 * t->block, t->sink, t->local};
        page = at < t->n_off ? walk_page(w, at, ltr) : -1;
    }
    return page < 0 ? -1 : t->pages[page];
}

template <int D, int GATE>
__device__ __forceinline__ void produce_q_k(uint32_t smem, unsigned char *smem_ptr,
                                            const struct sm90_maps &maps, const struct sm90_args &a)
{
    using L = smem_layout<D>;
    const int lane = threadIdx.x & 31;
    struct ring<Q_SLOTS> q = {
        0, 0
    };
    struct ring<L::k_stages> k = {
        0, 0
    };
    int next = blockIdx.x;
    for (;;) {
        int at = next;
        struct tile_info *info = (struct tile_info *)(smem_ptr + L::info) + q.slot;
        mbar_wait(smem + L::q_empty + 8 * q.slot, q.parity ^ 1);
        if (at >= a.n_tiles) {
            if (lane == 0) {
                info->seq = -1;
                mbar_arrive(smem + L::q_full + 8 * q.slot);
            }
            break;
        }
        if (lane == 0) {
            struct sm90_tile t = a.tiles[at];
            next = (int)(atomicAdd(&a.queue[0], 1) + gridDim.x);
            describe_tile<GATE>(info, a, t);
            mbar_arrive_expect_tx(smem + L::q_full + 8 * q.slot, L::q_bytes);
            for (int h = 0; h < L::halves; h++)
                tma_load_3d(smem + L::q + q.slot * L::q_bytes + h * L::half_bytes, &maps.q,
                            smem + L::q_full + 8 * q.slot, 0, t.head * L::halves + h, info->q_row,
                            L2_EVICT_FIRST);
        }
        __syncwarp();
        next = __shfl_sync(0xffffffffu, next, 0);
        const int n_steps = tile_steps(info);
        const int kv_head = info->head / (a.n_heads / a.n_kv_heads);
        /* lane i holds the page of place i % 2 of step base + i / 2 */
        int mine = step_page(info, a.order, lane / 2, lane & 1);
        for (int base = 0; base < n_steps; base += 16) {
            int now = mine;
            if (base + 16 + lane / 2 < n_steps)
                mine = step_page(info, a.order, base + 16 + lane / 2, lane & 1);
            for (int i = 0; i < 16 && base + i < n_steps; i++) {
                int page[2] = {__shfl_sync(0xffffffffu, now, 2 * i),
                               __shfl_sync(0xffffffffu, now, 2 * i + 1)};
                if (lane == 0) {
                    uint32_t full = smem + L::k_full + 8 * k.slot;
                    mbar_wait(smem + L::k_empty + 8 * k.slot, k.parity ^ 1);
                    mbar_arrive_expect_tx(full, L::k_bytes);
                    for (int p = 0; p < 2; p++) {
                        int tile = page[p] < 0 ? a.n_pages * a.n_kv_heads
                                               : page[p] * a.n_kv_heads + kv_head;
                        for (int h = 0; h < L::halves; h++)
                            tma_load_4d(smem + L::k + k.slot * L::k_bytes + h * L::half_bytes +
                                            p * (L::half_bytes / 2),
                                        &maps.k, full, 0, 0, h, tile, L2_EVICT_LAST);
                    }
                }
                k.next();
            }
        }
        q.next();
    }
    if (lane == 0 && atomicAdd(&a.queue[1], 1) == gridDim.x - 1) {
        a.queue[0] = 0;
        a.queue[1] = 0;
    }
}

/* ---- warp 1: V, by decision ---- */

/* Adds a tile's counts in (page, row group) units; visited_off and kept exclude nothing. */
__device__ __forceinline__ void count_tile(const struct sm90_args &a, const struct tile_info *t,
                                           int kept)
{
    int groups = t->rows64 && t->row_end > PAGE ? 2 : 1;
    int diag = groups == 2 ? 3 : t->n_diag;
    struct sm90_counts c;
    c.reachable = (unsigned long long)(groups * 2 * t->block + diag);
    c.visited = (unsigned long long)(groups * t->n_off + diag);
    c.kept = (unsigned long long)kept;
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

template <int D>
__device__ __forceinline__ void load_v(uint32_t smem, const struct sm90_maps &maps,
                                       const struct sm90_args &a, uint32_t slot, uint32_t full,
                                       int page, int kv_head)
{
    using L = smem_layout<D>;
    const int tile = page < 0 ? a.n_pages * a.n_kv_heads : page * a.n_kv_heads + kv_head;
    tma_load_4d(smem + L::v + slot * L::v_bytes, &maps.v, full, 0, 0, 0, tile, L2_EVICT_LAST);
}

/* Copies the kept V pages of a step to the next slots, as one transaction on one barrier: there is
 * a barrier for each kept step, so that consumers wait once. */
template <int D>
__device__ __forceinline__ void
load_v_pages(uint32_t smem, const struct sm90_maps &maps, const struct sm90_args &a,
             struct ring<smem_layout<D>::v_slots> &v, struct ring<smem_layout<D>::v_slots> &full,
             const int (&pages)[2], int kv_head, int keep)
{
    using L = smem_layout<D>;
    const bool lead = (threadIdx.x & 31) == 0;
    const uint32_t bar = smem + L::v_full + 8 * full.slot;
    full.next();
    if (lead) {
        mbar_wait(smem + L::v_empty + 8 * v.slot, v.parity ^ 1);
        mbar_arrive_expect_tx(bar, (keep == 3 ? 2 : 1) * L::v_bytes);
        load_v<D>(smem, maps, a, v.slot, bar, keep == 2 ? pages[1] : pages[0], kv_head);
    }
    v.next();
    if (keep != 3)
        return;
    if (lead) {
        mbar_wait(smem + L::v_empty + 8 * v.slot, v.parity ^ 1);
        load_v<D>(smem, maps, a, v.slot, bar, pages[1], kv_head);
    }
    v.next();
}

template <int D, int GATE>
__device__ __forceinline__ void produce_v(uint32_t smem, unsigned char *smem_ptr,
                                          const struct sm90_maps &maps, const struct sm90_args &a)
{
    using L = smem_layout<D>;
    const int lane = threadIdx.x & 31;
    struct ring<Q_SLOTS> q = {
        0, 0
    };
    struct ring<L::v_slots> full = {0, 0}, v = {
        0, 0
    };
    struct ring<VOTE_SLOTS> vote = {
        0, 0
    };
    for (;;) {
        const struct tile_info *info = (const struct tile_info *)(smem_ptr + L::info) + q.slot;
        mbar_wait(smem + L::q_full + 8 * q.slot, q.parity);
        if (info->seq < 0)
            break;
        const int n_steps = tile_steps(info);
        const int kv_head = info->head / (a.n_heads / a.n_kv_heads);
        int kept = 0;
        int mine = step_page(info, a.order, lane / 2, lane & 1);
        for (int base = 0; base < n_steps; base += 16) {
            int now = mine;
            if (base + 16 + lane / 2 < n_steps)
                mine = step_page(info, a.order, base + 16 + lane / 2, lane & 1);
            for (int i = 0; i < 16 && base + i < n_steps; i++) {
                const int pages[2] = {__shfl_sync(0xffffffffu, now, 2 * i),
                                      __shfl_sync(0xffffffffu, now, 2 * i + 1)};
                if (GATE == SM90_GATE_NONE) {
                    load_v_pages<D>(smem, maps, a, v, full, pages, kv_head, 3);
                    continue;
                }
                /* what the first group keeps is loaded without waiting for the second */
                const int rows64 = info->rows64;
                const int first = vote_wait<D>(smem, vote.slot, vote.parity, 0);
                const int sure = rows64 ? vote_decode(first) : vote_sure(first);
                if (sure == 3)
                    load_v_pages<D>(smem, maps, a, v, full, pages, kv_head, 3);
                const int second = vote_wait<D>(smem, vote.slot, vote.parity, 1);
                const int keep = rows64 ? sure | vote_decode(second) : vote_decode(first | second);
                if (sure != 3 && keep)
                    load_v_pages<D>(smem, maps, a, v, full, pages, kv_head, keep);
                __syncwarp();
                if (lane == 0 && (vote.slot & 3) == 3)
                    mbar_arrive(smem + L::vote_free + 8 * (vote.slot >> 2));
                vote.next();
                kept += __popc(rows64 ? sure : keep) +
                        (rows64 && info->row_end > PAGE ? __popc(vote_decode(second)) : 0);
            }
        }
        if (lane == 0 && (a.seq_counts || a.head_counts))
            count_tile(a, info, GATE == SM90_GATE_NONE ? info->n_off + info->n_diag : kept);
        __syncwarp();
        if (lane == 0)
            mbar_arrive(smem + L::q_empty + 8 * q.slot);
        q.next();
    }
}

#endif
