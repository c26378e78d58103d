/* What the kernel of peer_reduce sees, and its launcher. */
#ifndef PARALLEL_PEER_REDUCE_KERNEL_H
#define PARALLEL_PEER_REDUCE_KERNEL_H

#include "core/dtype.h"
#include "parallel/peer_max.h"

#include <cuda_runtime_api.h>

#include <stddef.h>
#include <stdint.h>

enum { PEER_BLOCKS = 32, PEER_THREADS = 512, PEER_VECTOR = 16 };

/* One rank's region: flags | state | two halves of data. Flag [block][source] holds the number of
 * the last call that `source` has entered with that block. */
struct peer_region {
    uint32_t flags[PEER_BLOCKS][PEER_MAX];
    uint32_t n_calls; /* finished calls; only the owner looks */
    uint32_t n_done;  /* blocks of the running call that are through */
    uint32_t pad[62]; /* data begins at a multiple of 256 bytes */
};

struct peer_view {
    struct peer_region *regions[PEER_MAX];
    const uint32_t *abort; /* host memory: nonzero lets the waiting go */
    size_t half_bytes;
    int rank, n_ranks;
};

#ifdef __cplusplus
extern "C"
#endif
    cudaError_t
    peer_reduce_launch(const struct peer_view *v, void *buf, size_t bytes, enum dtype dt,
                       cudaStream_t stream);

#endif
