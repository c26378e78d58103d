#include "kvcache/kv_store.h"

#include "core/mem.h"

#include <errno.h>

struct kv_store {
    struct kv_view view;
    struct dev *dev;
    void *memory; /* every pool, one after the other: K of all layers, then V */
    size_t bytes;
    void **pools; /* [2 * n_layers] */
};

enum { MAX_LAYERS = 4096, MAX_HEADS = 4096, MAX_HEAD_DIM = 1024 };

size_t kv_store_page_bytes(const struct kv_store_config *cfg)
{
    return 2 * (size_t)cfg->n_layers * (size_t)cfg->n_kv_heads * KV_PAGE_TOKENS *
           (size_t)cfg->head_dim * dtype_bytes(cfg->dtype);
}

static int check_config(const struct dev *d, const struct kv_store_config *c, struct err_msg *why)
{
    const enum dtype other = d->ops == &dev_cpu ? DTYPE_F32 : DTYPE_F16;
    if (c->dtype != DTYPE_BF16 && c->dtype != other) {
        return err_set(why, ERR_UNSUPPORTED, "cache dtype %s: only %s and bf16 are, on this device",
                       dtype_name(c->dtype), dtype_name(other));
    }
    if (c->n_layers < 1 || c->n_layers > MAX_LAYERS || c->n_kv_heads < 1 ||
        c->n_kv_heads > MAX_HEADS || c->head_dim < 1 || c->head_dim > MAX_HEAD_DIM) {
        return err_set(why, ERR_INVALID,
                       "cache shape: %d layers, %d kv heads, head_dim %d (at most %d, %d, %d)",
                       c->n_layers, c->n_kv_heads, c->head_dim, MAX_LAYERS, MAX_HEADS,
                       MAX_HEAD_DIM);
    }
    if (c->n_pages < 1)
        return err_set(why, ERR_INVALID, "cache: %d pages", c->n_pages);
    return 0;
}

int kv_store_create(struct kv_store **out, struct dev *d, const struct kv_store_config *cfg,
                    struct err_msg *why)
{
    struct err_msg cause = {""};
    size_t page, bytes;
    void *memory = NULL;
    TRY(check_config(d, cfg, why));
    page = kv_store_page_bytes(cfg);
    if (__builtin_mul_overflow(page, (size_t)cfg->n_pages, &bytes))
        return err_set(why, -ENOMEM, "cache: %d pages of %zu bytes overflow", cfg->n_pages, page);
    int err = dev_alloc(d, &memory, bytes, &cause);
    if (err < 0) {
        return err_set(why, err,
                       "cache: %d pages x %.1f KiB (%d layers x %d kv heads x %d x 64 tokens x K "
                       "and V, %s): %s",
                       cfg->n_pages, (double)page / 1024, cfg->n_layers, cfg->n_kv_heads,
                       cfg->head_dim, dtype_name(cfg->dtype), err_why(&cause, err));
    }
    struct kv_store *s = mem_zalloc(1, sizeof *s);
    size_t n_pools = 2 * (size_t)cfg->n_layers;
    s->dev = d;
    s->memory = memory;
    s->bytes = bytes;
    s->pools = mem_zalloc(n_pools, sizeof *s->pools);
    for (size_t i = 0; i < n_pools; i++)
        s->pools[i] = (char *)memory + i * (bytes / n_pools);
    s->view = (struct kv_view){.dtype = cfg->dtype,
                               .n_layers = cfg->n_layers,
                               .n_pages = cfg->n_pages,
                               .n_kv_heads = cfg->n_kv_heads,
                               .head_dim = cfg->head_dim,
                               .k = s->pools,
                               .v = s->pools + cfg->n_layers};
    *out = s;
    return 0;
}

void kv_store_destroy(struct kv_store *s)
{
    if (!s)
        return;
    dev_release(s->dev, s->memory, s->bytes);
    mem_free(s->pools);
    mem_free(s);
}

const struct kv_view *kv_store_view(const struct kv_store *s)
{
    return &s->view;
}
