/* What only a CUDA device has: its stream, pinned memory, copies that do not wait. Built with
 * SLUICE_CUDA. A struct dev here is one that dev_cuda opened. Calls of different threads on one
 * device must not overlap; a thread other than the one that opened it first calls dev_cuda_bind. */
#ifndef CORE_DEV_CUDA_H
#define CORE_DEV_CUDA_H

#include "core/dev.h"
#include "core/dtype.h"

/* Devices that the driver shows; 0 without a driver. */
int dev_cuda_count(void);
/* Makes it the calling thread's device; needed once in every thread that launches kernels. */
MUST_CHECK int dev_cuda_bind(struct dev *d);
/* The cudaStream_t that orders all copies and kernels of the device. */
void *dev_cuda_stream(struct dev *d);
int dev_cuda_index(const struct dev *d);
int dev_cuda_sms(const struct dev *d); /* streaming multiprocessors */

/* Host memory, zeroed, that copies reach without staging. why tells what was asked for. */
MUST_CHECK int dev_cuda_pin_alloc(struct dev *d, void **out, size_t bytes, struct err_msg *why);
void dev_cuda_pin_free(struct dev *d, void *p); /* accepts NULL */
/* Copies from and to pinned memory, ordered on the stream: both sides must stay untouched until a
 * dev_sync (or an event) after them. */
MUST_CHECK int dev_cuda_upload_async(struct dev *d, void *dst, const void *src, size_t bytes);
MUST_CHECK int dev_cuda_download_async(struct dev *d, void *dst, const void *src, size_t bytes);

/* A cudaError_t as 0 or ERR_CUDA; an error is logged with its text and place. Errors of kernels
 * stick: after one, every later call on the device fails too. */
MUST_CHECK int dev_cuda_check(int cuda_error, const char *what, const char *file, int line);
#define CUDA_TRY(e) TRY(dev_cuda_check((int)(e), #e, __FILE__, __LINE__))

/* The dtype argument of every launcher. */
static inline int dev_cuda_dtype(enum dtype t)
{
    ASSERT(t != DTYPE_F32);
    return t == DTYPE_F16;
}

#endif
