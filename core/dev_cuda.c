/* A CUDA GPU as a device. One non-blocking stream orders everything; memory is plain device memory.
 * The current device belongs to a thread in CUDA, so every function selects its own first (cheap
 * where it already is): an engine opens the device in one thread and runs steps in another. */
#define LOG_MODULE "cuda"
#include "core/dev_cuda.h"

#include "core/log.h"
#include "core/mem.h"
#include "core/pool.h"

#include <cuda_runtime_api.h>
#include <errno.h>
#include <string.h>

enum { COMPUTE_MAJOR = 9, COMPUTE_MINOR = 0 /* what the kernels are compiled for */ };

struct dev_cuda_state {
    struct dev base;
    int index, sms;
    cudaStream_t stream;
    char name[64];
};

static struct dev_cuda_state *state_of(const struct dev *d)
{
    ASSERT(d->ops == &dev_cuda);
    return (struct dev_cuda_state *)d;
}

int dev_cuda_check(int cuda_error, const char *what, const char *file, int line)
{
    const cudaError_t e = (cudaError_t)cuda_error;
    if (e == cudaSuccess)
        return 0;
    log_error("CUDA call failed error=%s text=\"%s\" call=\"%s\" at=%s:%d", cudaGetErrorName(e),
              cudaGetErrorString(e), what, file, line);
    (void)cudaGetLastError(); /* what does not stick should not be reported again */
    return ERR_CUDA;
}

int dev_cuda_count(void)
{
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {
        (void)cudaGetLastError();
        return 0;
    }
    return n;
}

int dev_cuda_bind(struct dev *d)
{
    CUDA_TRY(cudaSetDevice(state_of(d)->index));
    return 0;
}

void *dev_cuda_stream(struct dev *d)
{
    return state_of(d)->stream;
}

int dev_cuda_index(const struct dev *d)
{
    return state_of(d)->index;
}

int dev_cuda_sms(const struct dev *d)
{
    return state_of(d)->sms;
}

/* The device must exist and be of the kind that the kernels are compiled for. */
static int check_device(struct dev_cuda_state *d, struct err_msg *why)
{
    int n = 0, major = 0, minor = 0;
    struct cudaDeviceProp prop;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        return err_set(why, e == cudaErrorNoDevice ? -ENODEV : ERR_CUDA, "device cuda:%d: %s",
                       d->index, cudaGetErrorString(e));
    }
    if (d->index < 0 || d->index >= n)
        return err_set(why, -ENODEV, "device cuda:%d: this machine has %d (from 0 on)", d->index,
                       n);
    CUDA_TRY(cudaGetDeviceProperties(&prop, d->index));
    (void)memcpy(d->name, prop.name, sizeof d->name - 1); /* rest of d->name is zero */
    CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d->index));
    CUDA_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, d->index));
    CUDA_TRY(cudaDeviceGetAttribute(&d->sms, cudaDevAttrMultiProcessorCount, d->index));
    if (major != COMPUTE_MAJOR || minor != COMPUTE_MINOR)
        return err_set(why, ERR_UNSUPPORTED,
                       "device cuda:%d (%s) has compute capability %d.%d, the kernels are compiled "
                       "for %d.%d (Hopper)",
                       d->index, d->name, major, minor, COMPUTE_MAJOR, COMPUTE_MINOR);
    return 0;
}

static int start(struct dev_cuda_state *d, int n_threads, struct err_msg *why)
{
    TRY(check_device(d, why));
    cudaError_t e = cudaSetDevice(d->index);
    if (e == cudaSuccess)
        e = cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        return err_set(why, ERR_CUDA, "device cuda:%d (%s): %s", d->index, d->name,
                       cudaGetErrorString(e));
    }
    int err = pool_create(&d->base.pool, n_threads); /* for what a step leaves to the host */
    if (err < 0)
        return err_set(why, err, "device cuda:%d: cannot start %d threads: %s", d->index, n_threads,
                       err_str(err));
    return 0;
}

static void close_cuda(struct dev *base)
{
    struct dev_cuda_state *d = state_of(base);
    pool_destroy(d->base.pool);
    if (d->stream) {
        (void)cudaSetDevice(d->index);
        (void)cudaStreamDestroy(d->stream);
    }
    mem_free(d);
}

static int open_cuda(struct dev **out, int index, int n_threads, struct err_msg *why)
{
    struct dev_cuda_state *d = mem_zalloc(1, sizeof *d);
    d->base.ops = &dev_cuda;
    d->index = index;
    int err = start(d, n_threads, why);
    if (err < 0) {
        close_cuda(&d->base);
        return err;
    }
    log_info("device opened device=cuda:%d name=\"%s\" sms=%d", index, d->name, d->sms);
    *out = &d->base;
    return 0;
}

static int mem_info_cuda(struct dev *d, size_t *free_bytes, size_t *total_bytes)
{
    TRY(dev_cuda_bind(d));
    CUDA_TRY(cudaMemGetInfo(free_bytes, total_bytes));
    return 0;
}

static double gib(size_t bytes)
{
    return (double)bytes / 1073741824.0;
}

static int out_of_memory(struct dev *base, size_t bytes, struct err_msg *why)
{
    const struct dev_cuda_state *d = state_of(base);
    size_t free_bytes = 0, total_bytes = 0;
    (void)cudaGetLastError(); /* this one does not stick */
    TRY(mem_info_cuda(base, &free_bytes, &total_bytes));
    return err_set(why, -ENOMEM, "need %.2f GiB, %.2f free of %.2f GiB on GPU %d (%s)", gib(bytes),
                   gib(free_bytes), gib(total_bytes), d->index, d->name);
}

static int alloc_cuda(struct dev *d, void **out, size_t bytes, struct err_msg *why)
{
    void *p = NULL;
    TRY(dev_cuda_bind(d));
    cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
    if (e == cudaErrorMemoryAllocation)
        return out_of_memory(d, bytes, why);
    CUDA_TRY(e);
    e = cudaMemsetAsync(p, 0, bytes ? bytes : 1, state_of(d)->stream);
    if (e == cudaSuccess)
        e = cudaStreamSynchronize(state_of(d)->stream);
    if (e != cudaSuccess) {
        (void)cudaFree(p);
        CUDA_TRY(e);
    }
    *out = p;
    return 0;
}

static void release_cuda(struct dev *d, void *p, size_t bytes)
{
    (void)bytes;
    (void)cudaSetDevice(state_of(d)->index);
    (void)cudaFree(p);
}

static int sync_cuda(struct dev *d)
{
    TRY(dev_cuda_bind(d));
    CUDA_TRY(cudaStreamSynchronize(state_of(d)->stream));
    return 0;
}

/* The source may be pageable or pinned, and is free again on return. */
static int upload_cuda(struct dev *d, void *dst, const void *src, size_t bytes)
{
    TRY(dev_cuda_upload_async(d, dst, src, bytes));
    return sync_cuda(d);
}

static int download_cuda(struct dev *d, void *dst, const void *src, size_t bytes)
{
    TRY(dev_cuda_download_async(d, dst, src, bytes));
    return sync_cuda(d);
}

int dev_cuda_pin_alloc(struct dev *d, void **out, size_t bytes, struct err_msg *why)
{
    void *p = NULL;
    TRY(dev_cuda_bind(d));
    cudaError_t e = cudaHostAlloc(&p, bytes ? bytes : 1, cudaHostAllocDefault);
    if (e == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        return err_set(why, -ENOMEM, "no %.1f MiB of pinned host memory",
                       (double)bytes / 1048576.0);
    }
    CUDA_TRY(e);
    memset(p, 0, bytes);
    *out = p;
    return 0;
}

void dev_cuda_pin_free(struct dev *d, void *p)
{
    if (!p)
        return;
    (void)cudaSetDevice(state_of(d)->index);
    (void)cudaFreeHost(p);
}

int dev_cuda_upload_async(struct dev *d, void *dst, const void *src, size_t bytes)
{
    TRY(dev_cuda_bind(d));
    CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, state_of(d)->stream));
    return 0;
}

int dev_cuda_download_async(struct dev *d, void *dst, const void *src, size_t bytes)
{
    TRY(dev_cuda_bind(d));
    CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, state_of(d)->stream));
    return 0;
}

const struct dev_ops dev_cuda = {
    .name = "cuda",
    .open = open_cuda,
    .close = close_cuda,
    .mem_info = mem_info_cuda,
    .alloc = alloc_cuda,
    .release = release_cuda,
    .upload = upload_cuda,
    .download = download_cuda,
    .sync = sync_cuda,
};
