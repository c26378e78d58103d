/* Writing and copying pages on the CPU. Tokens come as rows [n_tokens, n_kv_heads * head_dim] f32
 * and go to tiles [head, token in page, head_dim]: each (token, head) is one contiguous conversion,
 * which the compiler turns into SIMD. */
#include "core/err.h"
#include "kvcache/kv_store.h"

/* One token's heads into row r of its page. */
static void write_token(const struct kv_view *kv, void *pool, int32_t page, int32_t r,
                        const float *src)
{
    size_t dim = (size_t)kv->head_dim, elem = dtype_bytes(kv->dtype);
    for (int32_t h = 0; h < kv->n_kv_heads; h++) {
        size_t at = kv_tile_offset(kv, page, h) + (size_t)r * dim;
        dtype_from_f32((char *)pool + at * elem, kv->dtype, src + (size_t)h * dim, dim);
    }
}

/* Eight parameters: a struct for them would have one user. */
// NOLINTNEXTLINE(readability-function-size)
void kv_store_write_cpu(const struct kv_view *kv, int layer, const int32_t *pages, int32_t pos,
                        int32_t n_tokens, const float *k, const float *v, size_t row_stride)
{
    ASSERT(layer >= 0 && layer < kv->n_layers && pos >= 0);
    for (int32_t i = 0; i < n_tokens; i++) {
        int32_t page = pages[(pos + i) / KV_PAGE_TOKENS], r = (pos + i) % KV_PAGE_TOKENS;
        write_token(kv, kv->k[layer], page, r, k + (size_t)i * row_stride);
        write_token(kv, kv->v[layer], page, r, v + (size_t)i * row_stride);
    }
}

void kv_store_copy_page_cpu(const struct kv_view *kv, int32_t dst, int32_t src)
{
    size_t elem = dtype_bytes(kv->dtype), to = kv_tile_offset(kv, dst, 0) * elem;
    size_t from = kv_tile_offset(kv, src, 0) * elem;
    size_t bytes = (size_t)kv->n_kv_heads * KV_PAGE_TOKENS * (size_t)kv->head_dim * elem;
    if (dst == src)
        return;
    for (int32_t l = 0; l < kv->n_layers; l++) {
        memcpy((char *)kv->k[l] + to, (const char *)kv->k[l] + from, bytes);
        memcpy((char *)kv->v[l] + to, (const char *)kv->v[l] + from, bytes);
    }
}
