#define LOG_MODULE "comm"
#include "parallel/peer_reduce.h"

#include "core/log.h"
#include "core/mem.h"
#include "parallel/comm.h"
#include "parallel/peer_memory.h"
#include "parallel/peer_reduce_kernel.h"

#include <stdatomic.h>
#include <string.h>

struct peer_reduce {
    struct peer_view view;
    struct peer_memory memory;
    size_t max_bytes;
    atomic_uint *abort; /* host memory that the device maps */
};

static int cuda_fail(struct err_msg *why, cudaError_t e, const char *what)
{
    return err_set(why, ERR_CUDA, "%s: %s", what, cudaGetErrorString(e));
}

static int take_abort_word(struct peer_reduce *p, struct err_msg *why)
{
    void *word = NULL, *word_dev = NULL;
    cudaError_t e = cudaHostAlloc(&word, sizeof *p->abort, cudaHostAllocMapped);
    if (e != cudaSuccess)
        return cuda_fail(why, e, "memory for small sums");
    p->abort = word;
    atomic_init(p->abort, 0);
    e = cudaHostGetDevicePointer(&word_dev, word, 0);
    p->view.abort = word_dev;
    return e == cudaSuccess ? 0 : cuda_fail(why, e, "mapped host memory");
}

static void free_all(struct peer_reduce *p)
{
    (void)cudaFreeHost(p->abort);
    mem_free(p);
}

int peer_reduce_create(struct peer_reduce **out, struct comm *host, int device, size_t max_bytes,
                       struct err_msg *why)
{
    bool mapped = false;
    *out = NULL;
    if (host->n_ranks < 2 || host->n_ranks > PEER_MAX || max_bytes < PEER_VECTOR)
        return 0;
    cudaError_t e = cudaSetDevice(device);
    if (e != cudaSuccess)
        return cuda_fail(why, e, "cudaSetDevice");
    struct peer_reduce *p = mem_zalloc(1, sizeof *p);
    p->max_bytes = max_bytes;
    p->view.half_bytes = (max_bytes + 255) / 256 * 256;
    p->view.rank = host->rank;
    p->view.n_ranks = host->n_ranks;
    int err = take_abort_word(p, why);
    if (err == 0)
        err = peer_memory_open(&p->memory, host,
                               sizeof(struct peer_region) + 2 * p->view.half_bytes, &mapped);
    for (int r = 0; r < host->n_ranks; r++)
        p->view.regions[r] = p->memory.regions[r];
    if (err < 0 || !mapped)
        free_all(p);
    else
        *out = p;
    return err;
}

bool peer_reduce_takes(const struct peer_reduce *p, const void *buf, size_t n, enum dtype dt)
{
    size_t bytes = n * dtype_bytes(dt);
    return bytes <= p->max_bytes && bytes % PEER_VECTOR == 0 && (uintptr_t)buf % PEER_VECTOR == 0;
}

int peer_reduce_run(struct peer_reduce *p, void *buf, size_t n, enum dtype dt, void *stream)
{
    cudaError_t e = peer_reduce_launch(&p->view, buf, n * dtype_bytes(dt), dt, stream);
    if (e == cudaSuccess)
        return 0;
    log_error("small sum: %s", cudaGetErrorString(e));
    return ERR_CUDA;
}

void peer_reduce_abort(struct peer_reduce *p)
{
    if (p)
        atomic_store(p->abort, 1);
}

void peer_reduce_close(struct peer_reduce *p, struct comm *host)
{
    if (!p)
        return;
    peer_memory_close(&p->memory, host);
    free_all(p);
}
