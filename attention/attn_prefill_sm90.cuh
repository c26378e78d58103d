/* What all roles of the Hopper prefill kernel share: sizes, shared-memory layout, the description
 * of a tile, ring positions. The protocol is told in attn_prefill_sm90.cu. */
#ifndef ATTENTION_ATTN_PREFILL_SM90_CUH
#define ATTENTION_ATTN_PREFILL_SM90_CUH

#include "attention/attn_sm90.h"
#include "attention/attn_steer.h"
#include "attention/tile.cuh"

enum {
    BLOCK_M = 128,
    HALF_M = 64,
    PAGE = 64,
    THREADS = 384,
    GROUPS = 2, /* computing warpgroups, one item of a tile each */
    GROUP_WARPS = 4,
    TILE_SLOTS = 2,
    RUNS = 8,     /* of a tile's pages */
    SEGMENTS = 4, /* of an item's */
    PRODUCER_REGS = 24,
    CONSUMER_REGS = 240
};

/* One query block of one head. */
struct item_info {
    int32_t n_pages;       /* to be visited: n_diag + n_off; 0: no item */
    int32_t n_diag, n_off; /* diagonal pages, pages before them */
    int32_t head, block;
    int32_t q_row;              /* row in q of the block's first row; may be negative */
    int32_t row_begin, row_end; /* rows of the block that belong to the chunk */
    int32_t sink, local;
    int32_t rows64;
    float gate;          /* on raw scores. ABS: the threshold; REL: ln(lambda) */
    float steer;         /* REL, likewise: how firmly it is held (attn_steer.h); 0: not at all */
    int32_t is_absolute; /* REL: the gate is a threshold */
    int32_t q_parity;    /* of the barrier of Q */
    /* Its pages in the tile's list: before each segment so many that are not for it, then `n` that
     * are. One segment is the diagonal, the others lie before it. */
    int32_t n_segments, diag_segment;
    int32_t pass[SEGMENTS + 1], n[SEGMENTS]; /* pass[n_segments]: behind the last */
};

/* Consecutive pages of a tile's list that the same items want. */
struct page_run {
    int32_t end;  /* entry behind the last; while the list is made: pages */
    int32_t item; /* whose walk they are in, as entry + shift */
    int32_t shift;
};

/* What the first producer warp tells all others about a tile. seq < 0: no more tiles. The pages of
 * a tile are one list, in which each item finds its own in its own order; nearly all are for both.
 */
struct tile_info {
    struct item_info item[GROUPS];
    const int32_t *pages;
    int32_t seq, kv_head;
    int32_t n_entries;
    /* With a gate (HAS_OPEN). Whether all its items keep all pages: then V comes in one ring for
     * both, as it does without a gate, and not on demand. Whether the tile before was of the other
     * kind: the same slots serve both, so all who use them meet first; how often they have. Its
     * first place in the ring, which has twice as many as slots, a parity each. */
    int32_t open, turn, turns;
    uint32_t v_first;
    uint32_t kinds; /* of the runs, four bits each: while the list is made */
    struct page_run run[RUNS];
};

/* Whether a kernel has tiles whose items all keep all pages, which it computes as one without a
 * gate does. */
#define HAS_OPEN(gate) ((gate) == SM90_GATE_ABS || (gate) == SM90_GATE_REL)

template <int D, int GATE>
struct smem_layout {
    static constexpr int halves = D / 64;
    static constexpr int q_half_bytes = BLOCK_M * 128;
    static constexpr int q_bytes = BLOCK_M * D * 2;
    static constexpr int page_bytes = PAGE * D * 2;
    static constexpr int k_slots = D == 128 ? 6 : 10;
    static constexpr int v_slots = D == 128 ? 4 : 10;    /* of the ring for both groups */
    static constexpr int own_v_slots = v_slots / GROUPS; /* on demand: of each group */
    static constexpr int q = 0;
    static constexpr int k = q + GROUPS * q_bytes;
    static constexpr int v = k + k_slots * page_bytes;
    static constexpr int info = v + v_slots * page_bytes;
    static constexpr int k_tile = info + TILE_SLOTS * (int)sizeof(struct tile_info); /* [k_slots] */
    static constexpr int taken = k_tile + (k_slots + 1) / 2 * 8; /* [GROUPS] tiles */
    static constexpr int tile_full = taken + 4 * GROUPS;
    static constexpr int tile_empty = tile_full + 8 * TILE_SLOTS;
    static constexpr int tile_wanted = tile_empty + 8 * TILE_SLOTS;
    static constexpr int q_full = tile_wanted + 8;
    static constexpr int q_empty = q_full + 8 * GROUPS;
    static constexpr int k_full = q_empty + 8 * GROUPS;
    static constexpr int k_empty = k_full + 8 * k_slots;
    static constexpr int v_full = k_empty + 8 * k_slots;
    static constexpr int v_empty = v_full + 8 * v_slots;
    static constexpr int v_asked = v_empty + 8 * v_slots; /* full, on demand */
    static constexpr int v_turn = v_asked + 8 * v_slots;
    static constexpr int bytes = v_turn + 8;
};

/* The same value, but unknown to the compiler: what is derived from it is computed where it is used
 * and not kept in registers through a loop. */
__device__ __forceinline__ int opaque(int x)
{
    asm volatile("" : "+r"(x));
    return x;
}

/* Waits at a barrier until all who take part have come the n-th time. */
__device__ __forceinline__ void meet(uint32_t bar, int n)
{
    mbar_arrive(bar);
    mbar_wait(bar, (uint32_t)(n - 1) & 1);
}

/* Position in a ring of N slots and the parity of its present round, in one register. */
template <int N>
struct ring {
    uint32_t at; /* 2 * slot + parity */
    __device__ __forceinline__ uint32_t slot(void) const
    {
        return at >> 1;
    }
    __device__ __forceinline__ uint32_t parity(void) const
    {
        return at & 1;
    }
    __device__ __forceinline__ void next(void)
    {
        at += 2;
        if (at >= 2 * N)
            at = ~at & 1;
    }
};

/* Logical page of an item's i-th visit. */
__device__ __forceinline__ int item_page(const struct item_info *it, int order, int i)
{
    const struct page_walk w = {2 * it->block, it->sink, it->local};
    if (order == SM90_ORDER_L2R)
        return i < it->n_off ? walk_page(w, i, true) : 2 * it->block + i - it->n_off;
    return i < it->n_diag ? 2 * it->block + i : walk_page(w, i - it->n_diag, false);
}

#endif
