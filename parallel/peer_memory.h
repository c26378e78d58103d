/* Device memory that all ranks of a host have mapped (CUDA IPC): a region of each. */
#ifndef PARALLEL_PEER_MEMORY_H
#define PARALLEL_PEER_MEMORY_H

#include "core/err.h"
#include "parallel/peer_max.h"

#include <stdbool.h>
#include <stddef.h>

struct comm;

struct peer_memory {
    void *regions[PEER_MAX]; /* zeroed before any peer sees it; [rank] is this rank's own */
    int rank, n_ranks;
};

/* Collective over host; the current device is the rank's. *mapped is false, with nothing to close,
 * where some rank cannot map another's memory, or has none left: all ranks then agree to do
 * without. An error is the host communicator's. */
MUST_CHECK int peer_memory_open(struct peer_memory *m, struct comm *host, size_t bytes,
                                bool *mapped);
/* Collective over host: no rank may free what another still maps. host NULL: a peer is gone. */
void peer_memory_close(struct peer_memory *m, struct comm *host);

#endif
