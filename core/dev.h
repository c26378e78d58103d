/* A device: memory, copies and the threads or streams that work on it. One const table per kind of
 * device. Memory from dev_alloc is taken at start only; nothing allocates inside a step. Copies and
 * kernels on one device are ordered; dev_sync waits for all of them (on the CPU they are done
 * already). */
#ifndef CORE_DEV_H
#define CORE_DEV_H

#include "core/err.h"

#include <stddef.h>

struct pool;
struct dev;

struct dev_ops {
    const char *name; /* "cpu", "cuda" */
    int (*open)(struct dev **out, int index, int n_threads, struct err_msg *why);
    void (*close)(struct dev *d);
    int (*mem_info)(struct dev *d, size_t *free_bytes, size_t *total_bytes);
    int (*alloc)(struct dev *d, void **out, size_t bytes, struct err_msg *why);
    void (*release)(struct dev *d, void *p, size_t bytes);
    int (*upload)(struct dev *d, void *dst, const void *src, size_t bytes);
    int (*download)(struct dev *d, void *dst, const void *src, size_t bytes);
    int (*sync)(struct dev *d);
};

/* Common head of every device; an implementation embeds it first. */
struct dev {
    const struct dev_ops *ops;
    struct pool *pool; /* CPU workers; beside a GPU, for what a step leaves to the host */
};

extern const struct dev_ops dev_cpu;
/* Built with SLUICE_CUDA, which defines WITH_CUDA; see dev_cuda.h. */
extern const struct dev_ops dev_cuda;

/* index: which device of that kind. n_threads: CPU workers, 0 = one per processor. */
MUST_CHECK int dev_open(struct dev **out, const struct dev_ops *ops, int index, int n_threads,
                        struct err_msg *why);
void dev_close(struct dev *d); /* accepts NULL */
/* Bytes a new allocation could get now, and bytes in all. */
MUST_CHECK int dev_mem_info(struct dev *d, size_t *free_bytes, size_t *total_bytes);
/* Zeroed, aligned for every kernel (a page on the CPU, 256 bytes on a GPU). why tells the
 * arithmetic when there is not enough. */
MUST_CHECK int dev_alloc(struct dev *d, void **out, size_t bytes, struct err_msg *why);
void dev_release(struct dev *d, void *p, size_t bytes); /* accepts NULL */
/* Ordered after everything given to the device before; done with src, or dst, on return. */
MUST_CHECK int dev_upload(struct dev *d, void *dst, const void *src, size_t bytes);
MUST_CHECK int dev_download(struct dev *d, void *dst, const void *src, size_t bytes);
MUST_CHECK int dev_sync(struct dev *d);

#endif
