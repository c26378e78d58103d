/* What all roles of the Hopper prefill kernel share: sizes, shared-memory layout, the description
 * of a tile, ring positions and votes. The protocol is told in attn_prefill_sm90.cu. */
#ifndef ATTENTION_ATTN_PREFILL_SM90_CUH
#define ATTENTION_ATTN_PREFILL_SM90_CUH

#include "attention/attn_sm90.h"
#include "attention/tile.cuh"

enum {
    BLOCK_M = 128,
    PAGE = 64,
    Q_SLOTS = 2,
    TURN = 3,    /* places of the walk that the gated consumer takes in a turn */
    K_SLOTS = 6, /* a round of the ring of K; tiles begin on a round */
    VOTE_SLOTS = 2 * TURN,
    THREADS = 384,
    CONSUMER_WARPS = 8,
    PRODUCER_REGS = 24,
    CONSUMER_REGS = 240
};

/* What the first producer warp tells all others about a tile. seq < 0: no more tiles. */
struct tile_info {
    const int32_t *pages;
    int32_t seq, head, kv_head, block;
    int32_t q_row;              /* row in q of the block's first row; may be negative */
    int32_t row_begin, row_end; /* rows of the block that belong to the chunk */
    int32_t n_diag, n_off;      /* diagonal pages that exist, pages before them */
    int32_t sink, local;
    int32_t diag_at; /* place of the first of the two diagonal pages in the walk */
    int32_t rows64;
    int32_t dense; /* nothing can be skipped */
    float gate;    /* in raw units: ABS: a page below it is skipped; REL: ln(lambda) */
};

template <int D>
struct smem_layout {
    static constexpr int halves = D / 64;
    static constexpr int half_bytes = BLOCK_M * 128; /* of a Q tile */
    static constexpr int q_bytes = BLOCK_M * D * 2;
    static constexpr int page_bytes = PAGE * D * 2; /* of K or V */
    /* K lies as [half][slot][64][64], so that neighbouring slots make one operand of 128 keys */
    static constexpr int k_half = K_SLOTS * PAGE * 128;
    static constexpr int v_slots = D == 128 ? 4 : 8;
    static constexpr int q = 0;
    static constexpr int k = q + Q_SLOTS * q_bytes;
    static constexpr int v = k + K_SLOTS * page_bytes;
    static constexpr int info = v + v_slots * page_bytes;
    static constexpr int votes = info + Q_SLOTS * (int)sizeof(struct tile_info);
    static constexpr int bars = votes + VOTE_SLOTS * 8;
    static constexpr int q_full = bars;
    static constexpr int q_empty = q_full + 8 * Q_SLOTS;
    static constexpr int k_full = q_empty + 8 * Q_SLOTS;
    static constexpr int k_empty = k_full + 8 * K_SLOTS;
    static constexpr int v_full = k_empty + 8 * K_SLOTS;
    static constexpr int v_empty = v_full + 8 * v_slots;
    static constexpr int vote_full = v_empty + 8 * v_slots;
    static constexpr int bytes = vote_full + 8 * VOTE_SLOTS;
};

/* Position in a ring of N slots, N a power of two, and the parity of its present round. */
template <int N>
struct ring {
    uint32_t at;
    __device__ __forceinline__ uint32_t slot(void) const
    {
        return at & (N - 1);
    }
    __device__ __forceinline__ uint32_t parity(void) const
    {
        return at / N & 1;
    }
    __device__ __forceinline__ void next(void)
    {
        at++;
    }
};

/* ---- the walk and the votes, shared by all roles ---- */

/* Places of a tile's walk: both diagonal pages (the second may not exist) and those before them.
 * Places without a page follow up to the end of the round. */
__device__ __forceinline__ int tile_places(const struct tile_info *t)
{
    return t->n_off + 2;
}

__device__ __forceinline__ int tile_rounds(const struct tile_info *t)
{
    return (t->n_off + 2 + K_SLOTS - 1) / K_SLOTS;
}

/* Page id of a place of the walk, or -1: no page. */
__device__ __forceinline__ int place_page(const struct tile_info *t, int order, int place)
{
    const int diag = place - t->diag_at;
    int page;
    if (diag >= 0 && diag < 2) {
        page = diag < t->n_diag ? 2 * t->block + diag : -1;
    } else {
        int at = t->diag_at ? place : place - 2;
        struct page_walk w = {2 * t->block, t->sink, t->local};
        page = at < t->n_off ? walk_page(w, at, order == SM90_ORDER_L2R) : -1;
    }
    return page < 0 ? -1 : t->pages[page];
}

/* The votes of both row groups on a page, a byte a warp, once all have cast theirs. A vote has bit
 * 0 if its warp keeps the page and, under REL, bit 1 if it does so even when the page before is
 * kept: that page's fate is not yet known then. */
template <int D>
__device__ __forceinline__ uint2 vote_wait(uint32_t smem, uint32_t slot, uint32_t parity)
{
    using L = smem_layout<D>;
    uint2 votes;
    mbar_wait(smem + L::vote_full + 8 * slot, parity);
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(votes.x), "=r"(votes.y)
                 : "r"(smem + L::votes + 8 * slot)
                 : "memory");
    return votes;
}

template <int GATE>
__device__ __forceinline__ int votes_keep(uint32_t votes, int kept_before)
{
    return GATE == SM90_GATE_REL ? (votes & (kept_before ? 0x02020202 : 0x01010101)) != 0
                                 : votes != 0;
}

#endif
