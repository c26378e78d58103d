/* What all roles of the Hopper prefill kernel share: sizes, shared-memory layout, the description
 * of a tile, ring positions, and the votes with their decoding. The protocol is told in
 * attn_prefill_sm90.cu. */
#ifndef ATTENTION_ATTN_PREFILL_SM90_CUH
#define ATTENTION_ATTN_PREFILL_SM90_CUH

#include "attention/attn_sm90.h"
#include "attention/tile.cuh"

enum {
    BLOCK_M = 128,
    PAGE = 64,
    STEP_KEYS = 128,
    Q_SLOTS = 2,
    VOTE_SLOTS = 8,
    THREADS = 384,
    CONSUMER_WARPS = 8,
    PRODUCER_REGS = 40,
    CONSUMER_REGS = 232
};

/* What the first producer warp tells all others about a tile. seq < 0: no more tiles. */
struct tile_info {
    const int32_t *pages;
    int32_t seq, head, block;
    int32_t q_row;              /* row in q of the block's first row; may be negative */
    int32_t row_begin, row_end; /* rows of the block that belong to the chunk */
    int32_t n_pages;            /* entries of `pages` */
    int32_t n_diag, n_off;      /* diagonal pages, pages before them */
    int32_t sink, local;
    int32_t rows64;
    float gate; /* ABS: threshold on raw scores; REL: ln(lambda) in raw units */
};

template <int D>
struct smem_layout {
    static constexpr int halves = D / 64;
    static constexpr int half_bytes = BLOCK_M * 128; /* of Q and K tiles */
    static constexpr int q_bytes = BLOCK_M * D * 2;
    static constexpr int k_bytes = STEP_KEYS * D * 2;
    static constexpr int v_bytes = PAGE * D * 2;
    static constexpr int k_stages = D == 128 ? 3 : 4;
    static constexpr int v_slots = D == 128 ? 4 : 8;
    static constexpr int q = 0;
    static constexpr int k = q + Q_SLOTS * q_bytes;
    static constexpr int v = k + k_stages * k_bytes;
    static constexpr int info = v + v_slots * v_bytes;
    static constexpr int votes = info + Q_SLOTS * (int)sizeof(struct tile_info);
    static constexpr int bars = votes + VOTE_SLOTS * 8;
    static constexpr int q_full = bars;
    static constexpr int q_empty = q_full + 8 * Q_SLOTS;
    static constexpr int k_full = q_empty + 8 * Q_SLOTS;
    static constexpr int k_empty = k_full + 8 * k_stages;
    static constexpr int v_full = k_empty + 8 * k_stages;
    static constexpr int v_empty = v_full + 8 * v_slots;
    static constexpr int vote_full = v_empty + 8 * v_slots;
    static constexpr int vote_free = vote_full + 2 * 8 * VOTE_SLOTS; /* [slot][group] */
    static constexpr int bytes = vote_free + 2 * 8;                  /* [half of the ring] */
};

/* Position in a ring of N slots and the parity of its present round. */
template <int N>
struct ring {
    uint32_t slot, parity;
    __device__ __forceinline__ void next(void)
    {
        slot++;
        if (slot == N) {
            slot = 0;
            parity ^= 1;
        }
    }
};

/* ---- pages and votes, shared by all roles ---- */

__device__ __forceinline__ int tile_steps(const struct tile_info *t)
{
    return 1 + (t->n_off + 1) / 2;
}

/* Pages to keep (bit 0 first page, bit 1 second page) out of the votes of the rows concerned, or-ed
 * together: bit 0 the first page; bit 1 the second if the first is kept; bit 2 the second if not.
 */
__device__ __forceinline__ int vote_decode(int votes)
{
    int second = (votes & 1) ? votes & 2 : votes >> 1 & 2;
    return (votes & 1) | second;
}

/* What one group's votes settle alone, where either group can keep a page. */
__device__ __forceinline__ int vote_sure(int votes)
{
    return (votes & 1) | ((votes & 1) ? votes & 2 : votes & (votes >> 1) & 2);
}

/* The votes of a group's four warps, or-ed, once cast. */
template <int D>
__device__ __forceinline__ int vote_wait(uint32_t smem, uint32_t slot, uint32_t parity, int group)
{
    using L = smem_layout<D>;
    uint32_t votes;
    mbar_wait(smem + L::vote_full + 16 * slot + 8 * group, parity);
    asm volatile("ld.shared.u32 %0, [%1];"
                 : "=r"(votes)
                 : "r"(smem + L::votes + 8 * slot + 4 * group)
                 : "memory");
    votes |= votes >> 16;
    return (int)((votes | votes >> 8) & 7);
}

#endif
