/* The memory behind the pages, on one device. All of it is taken at creation (zeroed: unwritten
 * tails must be finite). A const table of functions per device kind; kv_store_cpu is one. */
#ifndef KVCACHE_KV_STORE_H
#define KVCACHE_KV_STORE_H

#include "core/dev.h"
#include "kvcache/kv_view.h"

struct kv_store;

struct kv_store_config {
    enum dtype dtype;
    int32_t n_layers, n_pages, n_kv_heads, head_dim;
};

/* Bytes that one page takes over all layers, K and V. */
size_t kv_store_page_bytes(const struct kv_store_config *cfg);
/* The device must outlive the store. why names the arithmetic when memory is short. */
MUST_CHECK int kv_store_create(struct kv_store **out, struct dev *d,
                               const struct kv_store_config *cfg, struct err_msg *why);
void kv_store_destroy(struct kv_store *s); /* accepts NULL */
const struct kv_view *kv_store_view(const struct kv_store *s);

/* Writes K and V of n_tokens consecutive tokens of one sequence at absolute positions pos.. into
 * its pages. k, v   [n_tokens, row_stride] f32; the n_kv_heads * head_dim values of a token are
 * contiguous, K already rotated pages  the sequence's page table, covering pos + n_tokens tokens
 * Rows of different tokens are independent, so callers may split a range over threads. */
void kv_store_write_cpu(const struct kv_view *kv, int layer, const int32_t *pages, int32_t pos,
                        int32_t n_tokens, const float *k, const float *v, size_t row_stride);
/* Copies whole pages (all layers, K and V) on the CPU. */
void kv_store_copy_page_cpu(const struct kv_view *kv, int32_t dst, int32_t src);

#endif
