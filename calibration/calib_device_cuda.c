#include "calibration/calib_device.h"
#include "calibration/select_cuda.h"
#include "core/dev_cuda.h"
#include "core/mem.h"
#include "kvcache/kv_view.h"
#include "model/model.h"

#include <string.h>

_Static_assert((int)SELECT_CUDA_MAX_LEVELS == (int)CALIB_MAX_LEVELS, "the same bound");

struct calib_device {
    struct dev *dev;
    struct calib_config cfg;
    double *t; /* device [n_levels, n_layers, n_heads, n_blocks] */
    size_t bytes;
};

int calib_device_create(struct calib_device **out, const struct calib_config *cfg,
                        struct err_msg *why)
{
    void *memory = NULL;
    struct calib_device *d = mem_zalloc(1, sizeof *d);
    d->dev = cfg->dev;
    d->cfg = *cfg;
    d->bytes = (size_t)cfg->n_levels * (size_t)cfg->n_layers * (size_t)cfg->n_heads *
               (size_t)cfg->n_blocks * sizeof *d->t;
    int err = dev_alloc(d->dev, &memory, d->bytes, why);
    if (err < 0) {
        mem_free(d);
        return err;
    }
    d->t = memory;
    *out = d;
    return 0;
}

void calib_device_destroy(struct calib_device *d)
{
    if (!d)
        return;
    dev_release(d->dev, d->t, d->bytes);
    mem_free(d);
}

int calib_device_tiles(struct calib_device *d, const struct model_tiles *tiles)
{
    const struct calib_config *c = &d->cfg;
    struct select_cuda s = {.max = tiles->max,
                            .max_groups = tiles->max_groups,
                            .max_pages = tiles->max_pages,
                            .n_heads = c->n_heads,
                            .first_block = tiles->pos / KV_BLOCK_TOKENS,
                            .n_blocks = tiles->n_tokens / KV_BLOCK_TOKENS,
                            .gate_rows = c->gate_rows,
                            .n_levels = c->n_levels,
                            .scale = tiles->scale,
                            .t = d->t + (int64_t)tiles->layer * c->n_heads * c->n_blocks,
                            .level_stride = (int64_t)c->n_layers * c->n_heads * c->n_blocks,
                            .head_stride = c->n_blocks};
    ASSERT(tiles->layer >= 0 && tiles->layer < c->n_layers);
    ASSERT(tiles->pos % KV_BLOCK_TOKENS == 0 && s.first_block + s.n_blocks <= c->n_blocks);
    memcpy(s.k, c->k, (size_t)c->n_levels * sizeof *s.k);
    CUDA_TRY(select_cuda_launch(&s, dev_cuda_stream(d->dev)));
    return 0;
}

int calib_device_fetch(struct calib_device *d, double *t)
{
    return dev_download(d->dev, t, d->t, d->bytes);
}
