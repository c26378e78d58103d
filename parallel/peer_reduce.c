#define LOG_MODULE "comm"
#include "parallel/peer_reduce.h"

#include "core/log.h"
#include "core/mem.h"
#include "parallel/comm.h"
#include "parallel/peer_reduce_kernel.h"

#include <stdatomic.h>
#include <string.h>

enum { IPC_ALIGN = 2 << 20 /* the driver's own granule: what is exported holds nothing else */ };

struct peer_reduce {
    struct peer_view view;
    size_t max_bytes;
    atomic_uint *abort; /* host memory that the device maps */
};

/* What the ranks tell each other: whole floats, see comm_all_gather. */
struct peer_card {
    cudaIpcMemHandle_t handle;
    float ok;
};

static int cuda_fail(struct err_msg *why, cudaError_t e, const char *what)
{
    return err_set(why, ERR_CUDA, "%s: %s", what, cudaGetErrorString(e));
}

/* This rank's region and abort word. */
static int take_memory(struct peer_reduce *p, struct err_msg *why)
{
    size_t bytes = sizeof(struct peer_region) + 2 * p->view.half_bytes;
    void *region = NULL, *word = NULL, *word_dev = NULL;

    bytes = (bytes + IPC_ALIGN - 1) / IPC_ALIGN * IPC_ALIGN;
    cudaError_t e = cudaMalloc(&region, bytes);
    if (e != cudaSuccess)
        return cuda_fail(why, e, "memory for small sums");
    p->view.regions[p->view.rank] = region;
    e = cudaMemset(region, 0, bytes);
    if (e == cudaSuccess)
        e = cudaDeviceSynchronize();
    if (e == cudaSuccess)
        e = cudaHostAlloc(&word, sizeof *p->abort, cudaHostAllocMapped);
    if (e != cudaSuccess)
        return cuda_fail(why, e, "memory for small sums");
    p->abort = word;
    atomic_init(p->abort, 0);
    e = cudaHostGetDevicePointer(&word_dev, word, 0);
    p->view.abort = word_dev;
    return e == cudaSuccess ? 0 : cuda_fail(why, e, "mapped host memory");
}

/* False when one of them cannot be mapped; the ranks then agree to do without. */
static bool map_peers(struct peer_reduce *p, const struct peer_card *cards)
{
    struct peer_view *v = &p->view;
    for (int r = 0; r < v->n_ranks; r++) {
        void *region = NULL;
        if (cards[r].ok < 1.0f)
            return false;
        if (r == v->rank)
            continue;
        if (cudaIpcOpenMemHandle(&region, cards[r].handle, cudaIpcMemLazyEnablePeerAccess) !=
            cudaSuccess) {
            log_info("rank=%d peer=%d no peer access: %s", v->rank, r,
                     cudaGetErrorString(cudaGetLastError()));
            return false;
        }
        v->regions[r] = region;
    }
    return true;
}

/* Everybody's region mapped by everybody, or by nobody. */
static int exchange(struct peer_reduce *p, struct comm *host, bool *all_ok)
{
    struct peer_card mine = {.ok = 1.0f}, cards[PEER_MAX];
    float ok;

    _Static_assert(sizeof mine % sizeof(float) == 0, "travels as floats");
    memset(cards, 0, sizeof cards);
    if (cudaIpcGetMemHandle(&mine.handle, p->view.regions[p->view.rank]) != cudaSuccess) {
        (void)cudaGetLastError();
        mine.ok = 0.0f;
    }
    TRY(comm_all_gather(host, (float *)(void *)cards, (const float *)(const void *)&mine,
                        sizeof mine / sizeof(float)));
    ok = map_peers(p, cards) ? 1.0f : 0.0f;
    TRY(comm_all_reduce(host, &ok, 1));
    *all_ok = ok > (float)p->view.n_ranks - 0.5f;
    return 0;
}

int peer_reduce_create(struct peer_reduce **out, struct comm *host, int device, size_t max_bytes,
                       struct err_msg *why)
{
    bool all_ok = false;
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
    int err = take_memory(p, why);
    if (err == 0)
        err = exchange(p, host, &all_ok);
    if (err < 0 || !all_ok)
        peer_reduce_close(p, err < 0 ? NULL : host);
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
    for (int r = 0; r < p->view.n_ranks; r++) {
        if (r != p->view.rank && p->view.regions[r])
            (void)cudaIpcCloseMemHandle(p->view.regions[r]);
    }
    if (host && comm_barrier(host) < 0)
        log_debug("a peer left without unmapping");
    (void)cudaFree(p->view.regions[p->view.rank]);
    (void)cudaFreeHost(p->abort);
    mem_free(p);
}
