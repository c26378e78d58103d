/* Cleaning what a page has beyond its sequence (kv_store_cuda.h), by whole warps. */
#ifndef KVCACHE_KV_TAILS_CUH
#define KVCACHE_KV_TAILS_CUH

#include "core/pack.cuh"
#include "kvcache/kv_store_cuda.h"

/* n elements from `to` on, which the lanes share out. */
template <typename T>
__device__ __forceinline__ void clear_elements(T *to, int n, bool wide)
{
    const int lane = threadIdx.x % 32;
    if (wide) {
        for (int i = lane * PACK; i < n; i += 32 * PACK)
            clear_pack<PACK>(to + i);
        return;
    }
    for (int i = lane; i < n; i += 32)
        from_f32(to + i, 0.0f);
}

/* Zeroes the tail of a row in one KV head: rows of a head's page are neighbours. */
template <typename T>
__device__ __forceinline__ void clear_tail(const struct kv_append &a, int slot, int tail,
                                           int kv_head)
{
    const int64_t tile = (int64_t)(slot / KV_PAGE_TOKENS) * a.n_kv_heads + kv_head;
    const int64_t from = (tile * KV_PAGE_TOKENS + slot % KV_PAGE_TOKENS + 1) * a.head_dim;
    const bool wide = a.head_dim % PACK == 0 && aligned16(a.k) && aligned16(a.v);
    clear_elements((T *)a.k + from, tail * a.head_dim, wide);
    clear_elements((T *)a.v + from, tail * a.head_dim, wide);
}

/* The tails of all rows in all heads, which n warps share out; the caller is number `warp`. */
template <typename T>
__device__ __forceinline__ void clear_tails(const struct kv_append &a, int warp, int n)
{
    for (int i = warp; i < a.n_rows * a.n_kv_heads; i += n) {
        const int row = i / a.n_kv_heads, slot = a.slots[row], tail = a.tails[row];
        if (slot >= 0 && tail > 0)
            clear_tail<T>(a, slot, tail, i % a.n_kv_heads);
    }
}

#endif
