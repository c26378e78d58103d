#define LOG_MODULE "comm"
#include "parallel/peer_memory.h"

#include "core/log.h"
#include "parallel/comm.h"

#include <cuda_runtime_api.h>

#include <string.h>

enum { IPC_ALIGN = 2 << 20 /* the driver's own granule: what is exported holds nothing else */ };

/* What the ranks tell each other: whole floats, see comm_all_gather. */
struct peer_card {
    cudaIpcMemHandle_t handle;
    float ok;
};

static bool fine(const struct peer_memory *m, cudaError_t e, const char *what)
{
    if (e == cudaSuccess)
        return true;
    (void)cudaGetLastError();
    log_info("rank=%d no peer memory: %s: %s", m->rank, what, cudaGetErrorString(e));
    return false;
}

/* This rank's region, zeroed, and what the others open it with. */
static bool take(struct peer_memory *m, size_t bytes, struct peer_card *card)
{
    void *region = NULL;
    bytes = (bytes + IPC_ALIGN - 1) / IPC_ALIGN * IPC_ALIGN;
    if (!fine(m, cudaMalloc(&region, bytes), "allocation"))
        return false;
    m->regions[m->rank] = region;
    return fine(m, cudaMemset(region, 0, bytes), "memset") &&
           fine(m, cudaDeviceSynchronize(), "memset") &&
           fine(m, cudaIpcGetMemHandle(&card->handle, region), "export");
}

static bool map_peers(struct peer_memory *m, const struct peer_card *cards)
{
    for (int r = 0; r < m->n_ranks; r++) {
        void *region = NULL;
        if (cards[r].ok < 1.0f)
            return false;
        if (r == m->rank)
            continue;
        if (!fine(m, cudaIpcOpenMemHandle(&region, cards[r].handle, cudaIpcMemLazyEnablePeerAccess),
                  "mapping"))
            return false;
        m->regions[r] = region;
    }
    return true;
}

/* Everybody's region mapped by everybody, or by nobody. */
static int exchange(struct peer_memory *m, struct comm *host, size_t bytes, bool *mapped)
{
    struct peer_card mine, cards[PEER_MAX];
    float ok;

    _Static_assert(sizeof mine % sizeof(float) == 0, "travels as floats");
    memset(&mine, 0, sizeof mine);
    memset(cards, 0, sizeof cards);
    mine.ok = take(m, bytes, &mine) ? 1.0f : 0.0f;
    TRY(comm_all_gather(host, (float *)(void *)cards, (const float *)(const void *)&mine,
                        sizeof mine / sizeof(float)));
    ok = map_peers(m, cards) ? 1.0f : 0.0f;
    TRY(comm_all_reduce(host, &ok, 1));
    *mapped = ok > (float)m->n_ranks - 0.5f;
    return 0;
}

int peer_memory_open(struct peer_memory *m, struct comm *host, size_t bytes, bool *mapped)
{
    *mapped = false;
    *m = (struct peer_memory){.rank = host->rank, .n_ranks = host->n_ranks};
    if (host->n_ranks < 2 || host->n_ranks > PEER_MAX)
        return 0;
    int err = exchange(m, host, bytes, mapped);
    if (err < 0 || !*mapped)
        peer_memory_close(m, err < 0 ? NULL : host);
    return err;
}

void peer_memory_close(struct peer_memory *m, struct comm *host)
{
    for (int r = 0; r < m->n_ranks; r++) {
        if (r != m->rank && m->regions[r])
            (void)cudaIpcCloseMemHandle(m->regions[r]);
    }
    if (host && comm_barrier(host) < 0)
        log_debug("a peer left without unmapping");
    (void)cudaFree(m->regions[m->rank]);
    memset(m->regions, 0, sizeof m->regions);
}
