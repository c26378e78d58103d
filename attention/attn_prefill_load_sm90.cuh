/* The loading warps of the Hopper prefill kernel. Warp 0 takes tiles from the queue, longest first,
 * describes them and copies Q; warp 1 copies K; warp 2 copies V where no item of a tile has a gate.
 * Otherwise the computing warps ask for V themselves, a page at a time. */
#ifndef ATTENTION_ATTN_PREFILL_LOAD_SM90_CUH
#define ATTENTION_ATTN_PREFILL_LOAD_SM90_CUH

#include "attention/attn_prefill_list_sm90.cuh"

/* ---- warp 0: tiles and Q ---- */

/* Ends a part of a description: the loading warps have so few registers that not all its values can
 * be in them at once. */
__device__ __forceinline__ void part_end(void)
{
    asm volatile("" ::: "memory");
}

template <int GATE>
__device__ __forceinline__ float gate_of(const struct sm90_args &a, const struct sm90_seq *s,
                                         int block, int head)
{
    if (GATE == SM90_GATE_REL)
        return s->ln_lambda * a.inv_scale;
    const float *t = s->t;
    if (GATE == SM90_GATE_NONE || !t)
        return -INFINITY;
    return t[(uint32_t)(head * (int)a.t_head_stride + min(block + 1, a.t_blocks) - 1)] *
           a.inv_scale;
}

template <int GATE>
__device__ __forceinline__ void describe_item(struct item_info *it, const struct sm90_args &a,
                                              const struct sm90_seq *s, int block, int head)
{
    it->n_pages = 0;
    if (block < 0)
        return;
    it->head = head;
    it->block = block;
    it->rows64 = s->gate_rows == PAGE;
    part_end();
    const int pos = s->pos - block * BLOCK_M; /* of the chunk's first row, from the block's */
    it->q_row = s->row - pos;
    it->row_begin = max(pos, 0);
    it->row_end = min(pos + s->n_rows, (int)BLOCK_M);
    const int n_diag = (it->row_end + PAGE - 1) / PAGE;
    it->n_diag = n_diag;
    part_end();
    struct sm90_visit v = {1, -1};
    if (a.visit)
        v = a.visit[head];
    const struct page_walk w = walk_make(block, v.sink, v.local);
    it->sink = w.sink;
    it->local = w.local;
    it->n_off = w.sink + w.local;
    it->n_pages = n_diag + w.sink + w.local;
    part_end();
    it->gate = gate_of<GATE>(a, s, block, head);
    if (GATE == SM90_GATE_REL) {
        it->steer = s->steer * a.inv_scale;
        it->is_absolute = s->is_absolute;
        part_end();
        if (it->is_absolute && it->steer > 0.0f && s->blend * s->keep[head] >= (float)it->n_off)
            it->gate = -INFINITY; /* as attn_steer_due says: all are due */
    }
}

/* Whether the gate of a tile's item keeps all pages; of none too. */
__device__ __forceinline__ bool keeps_all(uint32_t tile, int g)
{
    return get(tile, OF_ITEM(g, n_pages)) == 0 ||
           !(__int_as_float(get(tile, OF_ITEM(g, gate))) > -INFINITY);
}

/* How a tile's V comes, when its items are described and its pages listed; `before` is the last
 * tile. One lane. */
template <int D, int GATE>
__device__ __forceinline__ void describe_v(uint32_t tile, uint32_t before)
{
    if (!HAS_OPEN(GATE))
        return;
    const int open = keeps_all(tile, 0) && keeps_all(tile, 1);
    const int turn = open ^ get(before, OF_TILE(open));
    put(tile, OF_TILE(open), open);
    put(tile, OF_TILE(turn), turn);
    put(tile, OF_TILE(turns), get(before, OF_TILE(turns)) + turn);
    uint32_t first = (uint32_t)get(before, OF_TILE(v_first));
    if (get(before, OF_TILE(open)))
        first = (first + (uint32_t)get(before, OF_TILE(n_entries))) %
                (2 * smem_layout<D, GATE>::v_slots);
    put(tile, OF_TILE(v_first), (int)first);
}

/* Lanes 0 and 1, each for the group of its number. A tile is taken when the copies of K have come
 * to the end of the one before, six pages ahead of the computing groups: a thread block that took
 * one earlier would sit on it while others run out of work. */
template <int D, int GATE>
__device__ __forceinline__ void produce_tiles(uint32_t smem, unsigned char *smem_ptr,
                                              const struct sm90_maps &maps,
                                              const struct sm90_args &a)
{
    using L = smem_layout<D, GATE>;
    const uint32_t lanes = (1u << GROUPS) - 1;
    uint32_t q_parity = 0; /* and from bit 1 on the number of tiles taken: registers are dear */
    for (int at = blockIdx.x;; q_parity += 2) {
        const int g = opaque((int)threadIdx.x);
        const uint32_t n = q_parity >> 1, slot = n % TILE_SLOTS;
        struct tile_info *info = (struct tile_info *)(smem_ptr + L::info) + slot;
        mbar_wait(smem + L::tile_wanted, n & 1);
        if (g == 0 && n > 0)
            at = (int)(atomicAdd(&a.queue[0], 1) + grid_blocks());
        at = __shfl_sync(lanes, at, 0);
        const bool more = at < a.n_tiles;
        mbar_wait(smem + L::tile_empty + 8 * slot, ~(n / TILE_SLOTS) & 1);
        if (g == 0) {
            info->seq = more ? (int)a.tiles[at].seq : -1;
            info->kv_head = more ? a.tiles[at].kv_head : 0;
        }
        if (more) {
            const struct sm90_tile *t = a.tiles + at;
            info->item[g].q_parity = q_parity & 1;
            describe_item<GATE>(&info->item[g], a, a.seqs + t->seq, t->block[g], t->head[g]);
        }
        __syncwarp(lanes);
        const uint32_t tile = smem + L::info + slot * (uint32_t)sizeof *info;
        if (more) {
            if (g == 0) {
                info->pages = a.seqs[info->seq].pages;
                count_runs(tile, opaque(a.order) == SM90_ORDER_L2R);
            }
            __syncwarp(lanes);
            list_pages(tile, g);
            if (g == 0)
                describe_v<D, GATE>(tile, 2 * (smem + L::info) + (uint32_t)sizeof *info - tile);
        }
        mbar_arrive(smem + L::tile_full + 8 * slot);
        if (!more)
            break;
        if (info->item[g].n_pages > 0) {
            const uint32_t full = smem + L::q_full + 8 * g;
            mbar_wait(smem + L::q_empty + 8 * g, ~q_parity & 1);
            q_parity ^= 1;
            mbar_arrive_expect_tx(full, L::q_bytes);
            for (int h = 0; h < L::halves; h++)
                tma_load_3d(smem + L::q + g * L::q_bytes + h * L::q_half_bytes, &maps.q, full, 0,
                            info->item[g].head * L::halves + h, info->item[g].q_row,
                            L2_EVICT_FIRST);
        }
        __syncwarp(lanes);
    }
    if (threadIdx.x == 0 && atomicAdd(&a.queue[1], 1) == grid_blocks() - 1) {
        a.queue[0] = 0;
        a.queue[1] = 0;
    }
}

/* ---- warps 1 and 2: pages ---- */

/* Row of the page's tensor map for entry e, or -1: no page. */
__device__ __forceinline__ int entry_tile(const struct tile_info *t, const struct sm90_args &a,
                                          int e)
{
    if (e >= t->n_entries)
        return -1;
    const struct page_run *run = t->run;
    while (e >= run->end)
        run++;
    const int page = item_page(&t->item[run->item], a.order, e + run->shift);
    return t->pages[page] * a.n_kv_heads + t->kv_head;
}

/* Fills a slot of the ring at SLOTS with a page, or with nothing. One lane. */
template <int D, int GATE, int SLOTS>
__device__ __forceinline__ void load_page(uint32_t smem, const CUtensorMap *map, uint32_t full,
                                          uint32_t slot, int tile)
{
    using L = smem_layout<D, GATE>;
    if (tile < 0) {
        mbar_arrive(full);
        return;
    }
    if (GATE != SM90_GATE_NONE && SLOTS == L::k)
        st_shared_s32(smem + L::k_tile + 4 * slot, tile);
    mbar_arrive_expect_tx(full, L::page_bytes);
    tma_load_4d(smem + SLOTS + slot * L::page_bytes, map, full, 0, 0, 0, tile, L2_EVICT_LAST);
}

/* The entries of all tiles into a ring of N slots: pages at SLOTS, barriers at FULL and EMPTY. */
template <int D, int GATE, int N, int SLOTS, int FULL, int EMPTY>
__device__ __forceinline__ void produce_pages(uint32_t smem, unsigned char *smem_ptr,
                                              const CUtensorMap *map, const struct sm90_args &a)
{
    using L = smem_layout<D, GATE>;
    const int lane = threadIdx.x & 31;
    struct ring<TILE_SLOTS> tile = {
        0
    };
    struct ring<N> r = {
        0
    };
    for (;;) {
        const struct tile_info *t = (const struct tile_info *)(smem_ptr + L::info) + tile.slot();
        if (SLOTS == L::k && lane == 0)
            mbar_arrive(smem + L::tile_wanted);
        mbar_wait(smem + L::tile_full + 8 * tile.slot(), tile.parity());
        if (t->seq < 0)
            break;
        int mine = -1, n = t->n_entries;
        if (HAS_OPEN(GATE) && SLOTS == L::v) {
            n = t->open ? n : 0;
            if (t->turn && lane == 0)
                meet(smem + L::v_turn, t->turns);
        }
#pragma unroll 1
        for (int e = 0; e < n; e++) {
            if ((e & 31) == 0)
                mine = entry_tile(t, a, e + lane);
            const int page = __shfl_sync(0xffffffffu, mine, e & 31);
            const uint32_t slot = r.slot();
            if (lane == 0) {
                mbar_wait(smem + EMPTY + 8 * slot, r.parity() ^ 1);
                load_page<D, GATE, SLOTS>(smem, map, smem + FULL + 8 * slot, slot, page);
            }
            r.next();
        }
        mbar_arrive(smem + L::tile_empty + 8 * tile.slot());
        tile.next();
    }
}

template <int D, int GATE>
__device__ __forceinline__ void produce(uint32_t smem, unsigned char *smem_ptr,
                                        const struct sm90_maps &maps, const struct sm90_args &a)
{
    using L = smem_layout<D, GATE>;
    const int warp = threadIdx.x / 32;
    if (threadIdx.x < GROUPS)
        produce_tiles<D, GATE>(smem, smem_ptr, maps, a);
    else if (warp == 1)
        produce_pages<D, GATE, L::k_slots, L::k, L::k_full, L::k_empty>(smem, smem_ptr, &maps.k, a);
    else if (warp == 2 && (GATE == SM90_GATE_NONE || HAS_OPEN(GATE)))
        produce_pages<D, GATE, L::v_slots, L::v, L::v_full, L::v_empty>(smem, smem_ptr, &maps.v, a);
}

#endif
