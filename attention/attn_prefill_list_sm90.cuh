/* The list of a tile's pages in the Hopper prefill kernel: which pages its two items want, merged
 * so that one copy of K serves both and each finds its own in the order of its own walk.
 *
 * The list is up to eight runs of consecutive pages that the same items want; each follows from
 * where the diagonal, the sink and the window of the items lie. All of it is kept in shared memory
 * and addressed by 32 bits: the loading warps have 24 registers. */
#ifndef ATTENTION_ATTN_PREFILL_LIST_SM90_CUH
#define ATTENTION_ATTN_PREFILL_LIST_SM90_CUH

#include "attention/attn_prefill_sm90.cuh"

#include <stddef.h>

/* What a run is: the items that want it, and whether it is their diagonal. */
enum { FIRST = 1, SECOND = 2, BOTH = 3, DIAGONAL = 4, KIND_BITS = 4 };

__device__ __forceinline__ constexpr int run_kinds(int k0, int k1, int k2 = 0, int k3 = 0,
                                                   int k4 = 0, int k5 = 0, int k6 = 0, int k7 = 0)
{
    return k0 | k1 << 4 | k2 << 8 | k3 << 12 | k4 << 16 | k5 << 20 | k6 << 24 | k7 << 28;
}

#define OF_ITEM(g, name)                                                                           \
    (uint32_t)(offsetof(struct tile_info, item) + (g) * sizeof(struct item_info) +                 \
               offsetof(struct item_info, name))
#define OF_RUN(i, name)                                                                            \
    (uint32_t)(offsetof(struct tile_info, run) + (i) * sizeof(struct page_run) +                   \
               offsetof(struct page_run, name))
#define OF_TILE(name) (uint32_t) offsetof(struct tile_info, name)

__device__ __forceinline__ int get(uint32_t tile, uint32_t field)
{
    return ld_shared_s32(tile + field);
}

__device__ __forceinline__ void put(uint32_t tile, uint32_t field, int x)
{
    st_shared_s32(tile + field, x);
}

/* ---- how many pages each run has, and its kind ---- */

/* Two items that share nothing, or one alone. */
__device__ __forceinline__ int runs_apart(uint32_t t, bool l2r)
{
    const bool two = get(t, OF_ITEM(1, n_pages)) > 0;
    put(t, OF_RUN(l2r ? 0 : 2, end), two ? get(t, OF_ITEM(1, n_off)) : 0);
    put(t, OF_RUN(l2r ? 3 : 0, end), two ? get(t, OF_ITEM(1, n_diag)) : 0);
    put(t, OF_RUN(l2r ? 1 : 3, end), get(t, OF_ITEM(0, n_off)));
    put(t, OF_RUN(l2r ? 2 : 1, end), get(t, OF_ITEM(0, n_diag)));
    return l2r ? run_kinds(SECOND, FIRST, FIRST | DIAGONAL, SECOND | DIAGONAL)
               : run_kinds(SECOND | DIAGONAL, FIRST | DIAGONAL, SECOND, FIRST);
}

/* Two heads, one block: the same pages. */
__device__ __forceinline__ int runs_of_heads(uint32_t t, bool l2r)
{
    put(t, OF_RUN(l2r ? 1 : 0, end), get(t, OF_ITEM(0, n_diag)));
    put(t, OF_RUN(l2r ? 0 : 1, end), get(t, OF_ITEM(0, n_off)));
    return l2r ? run_kinds(BOTH, BOTH | DIAGONAL) : run_kinds(BOTH | DIAGONAL, BOTH);
}

/* One head, two blocks, the later one second. Its walk is the first's with its two pages before the
 * diagonal put in; a window leaves two pages of the first that the second does not see. */
__device__ __forceinline__ int runs_of_blocks(uint32_t t, bool l2r)
{
    const int local = get(t, OF_ITEM(1, local)), fresh = min(local, 2);
    put(t, OF_RUN(l2r ? 3 : 4, end), local - fresh);
    put(t, OF_RUN(l2r ? 2 : 5, end), get(t, OF_ITEM(0, local)) - (local - fresh));
    const int sink0 = get(t, OF_ITEM(0, sink)), zero0 = !l2r && sink0 > 0;
    const int sink1 = get(t, OF_ITEM(1, sink)), zero1 = !l2r && sink1 > 0;
    put(t, OF_RUN(l2r ? 7 : 2, end), zero0);
    put(t, OF_RUN(l2r ? 4 : 3, end), zero1 - zero0 + fresh);
    put(t, OF_RUN(l2r ? 0 : 7, end), sink0 - zero0);
    put(t, OF_RUN(l2r ? 1 : 6, end), sink1 - zero1 - (sink0 - zero0));
    put(t, OF_RUN(l2r ? 5 : 1, end), get(t, OF_ITEM(0, n_diag)));
    put(t, OF_RUN(l2r ? 6 : 0, end), get(t, OF_ITEM(1, n_diag)));
    return l2r ? run_kinds(BOTH, SECOND, FIRST, BOTH, SECOND, FIRST | DIAGONAL, SECOND | DIAGONAL)
               : run_kinds(SECOND | DIAGONAL, FIRST | DIAGONAL, BOTH, SECOND, BOTH, FIRST, SECOND,
                           BOTH);
}

/* Pages of each run into run[].end, and the kinds. One lane, when the items are described. */
__device__ __forceinline__ void count_runs(uint32_t t, bool l2r)
{
#pragma unroll
    for (int i = 0; i < RUNS; i++)
        put(t, OF_RUN(i, end), 0);
    int kinds;
    if (get(t, OF_ITEM(1, n_pages)) == 0)
        kinds = runs_apart(t, l2r);
    else if (get(t, OF_ITEM(0, head)) == get(t, OF_ITEM(1, head)))
        kinds = runs_of_blocks(t, l2r);
    else if (get(t, OF_ITEM(0, sink)) == get(t, OF_ITEM(1, sink)) &&
             get(t, OF_ITEM(0, local)) == get(t, OF_ITEM(1, local)))
        kinds = runs_of_heads(t, l2r);
    else
        kinds = runs_apart(t, l2r);
    put(t, OF_TILE(kinds), kinds);
}

/* ---- the list ---- */

/* Adds n pages to what item `it` (an address) knows of the list. */
__device__ __forceinline__ void add_run(uint32_t it, int n, bool wanted, bool diag)
{
    const int s = get(it, offsetof(struct item_info, n_segments));
    const uint32_t pass = it + (uint32_t)offsetof(struct item_info, pass) + 4 * s;
    const uint32_t pages = it + (uint32_t)offsetof(struct item_info, n) + 4 * s;
    if (n == 0)
        return;
    if (!wanted) {
        st_shared_s32(pass, ld_shared_s32(pass) + n);
        return;
    }
    if (s > 0 && !diag && ld_shared_s32(pass) == 0 &&
        get(it, offsetof(struct item_info, diag_segment)) != s - 1) {
        st_shared_s32(pages - 4, ld_shared_s32(pages - 4) + n);
        return;
    }
    if (diag)
        put(it, offsetof(struct item_info, diag_segment), s);
    st_shared_s32(pages, n);
    st_shared_s32(pass + 4, 0);
    put(it, offsetof(struct item_info, n_segments), s + 1);
}

/* Where the runs end and whose pages they are, by lane 0; each item's segments, by lane g. */
__device__ __forceinline__ void list_pages(uint32_t t, int g)
{
    const uint32_t it = t + OF_ITEM(g, n_pages) - (uint32_t)offsetof(struct item_info, n_pages);
    int entries = 0, seen0 = 0, seen1 = 0; /* pages of the list, and of each item */
    uint32_t kinds = get(t, OF_TILE(kinds));
    put(it, offsetof(struct item_info, n_segments), 0);
    put(it, offsetof(struct item_info, diag_segment), -1);
    put(it, offsetof(struct item_info, pass), 0);
#pragma unroll 1
    for (uint32_t run = t + OF_RUN(0, end); kinds; kinds >>= KIND_BITS) {
        const int n = ld_shared_s32(run);
        __syncwarp((1u << GROUPS) - 1);
        if (g == 0) {
            const int item = !(kinds & FIRST);
            st_shared_s32(run, entries + n);
            put(run, OF_RUN(0, item) - OF_RUN(0, end), item);
            put(run, OF_RUN(0, shift) - OF_RUN(0, end), (item ? seen1 : seen0) - entries);
        }
        entries += n;
        seen0 += kinds & FIRST ? n : 0;
        seen1 += kinds & SECOND ? n : 0;
        add_run(it, n, kinds >> g & 1, kinds & DIAGONAL);
        run += (uint32_t)sizeof(struct page_run);
    }
    if (g == 0)
        put(t, OF_TILE(n_entries), entries);
}

#endif
