/* What a kernel sees of the cache: plain data, no allocator. One of the two seams between the
 * folders.
 *
 * A page holds KV_PAGE_TOKENS consecutive tokens of one sequence. Its id indexes every layer's K
 * pool and V pool alike. Pool layout, per layer: [n_pages, n_kv_heads, KV_PAGE_TOKENS, head_dim]
 * row-major, so that one (page, head) tile is contiguous. The page is also the gate unit (B_N = 64
 * of BSFA, arXiv 2512.07011 section 4). */
#ifndef KVCACHE_KV_VIEW_H
#define KVCACHE_KV_VIEW_H

#include "core/dtype.h"

#include <stddef.h>
#include <stdint.h>

enum {
    KV_PAGE_TOKENS = 64,
    KV_BLOCK_TOKENS =
        128 /* query block of the policies; prefix hits and chunks are multiples of it */
};

struct kv_view {
    enum dtype dtype; /* DTYPE_BF16; DTYPE_F32 on the CPU, DTYPE_F16 on a GPU */
    int32_t n_layers;
    int32_t n_pages;
    int32_t n_kv_heads; /* of this rank */
    int32_t head_dim;
    void *const *k; /* [n_layers] pools in device memory */
    void *const *v; /* [n_layers] */
};

/* Elements from the pool's start to the tile of (page, head). */
static inline size_t kv_tile_offset(const struct kv_view *kv, int32_t page, int32_t head)
{
    return ((size_t)page * (size_t)kv->n_kv_heads + (size_t)head) * KV_PAGE_TOKENS *
           (size_t)kv->head_dim;
}

static inline int32_t kv_pages_for(int64_t n_tokens)
{
    return (int32_t)((n_tokens + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS);
}

#endif
