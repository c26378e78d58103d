#include "core/dev.h"

int dev_open(struct dev **out, const struct dev_ops *ops, int index, int n_threads,
             struct err_msg *why)
{
    return ops->open(out, index, n_threads, why);
}

void dev_close(struct dev *d)
{
    if (d)
        d->ops->close(d);
}

int dev_mem_info(struct dev *d, size_t *free_bytes, size_t *total_bytes)
{
    return d->ops->mem_info(d, free_bytes, total_bytes);
}

int dev_alloc(struct dev *d, void **out, size_t bytes, struct err_msg *why)
{
    return d->ops->alloc(d, out, bytes, why);
}

void dev_release(struct dev *d, void *p, size_t bytes)
{
    if (p)
        d->ops->release(d, p, bytes);
}

int dev_upload(struct dev *d, void *dst, const void *src, size_t bytes)
{
    return d->ops->upload(d, dst, src, bytes);
}

int dev_download(struct dev *d, void *dst, const void *src, size_t bytes)
{
    return d->ops->download(d, dst, src, bytes);
}

int dev_sync(struct dev *d)
{
    return d->ops->sync(d);
}
