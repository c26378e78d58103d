/* Ranks with a GPU each: collectives on device memory over NCCL, small sums over peer memory
 * (peer_reduce.h), everything between the hosts' processors over another communicator.
 *
 * The order of NCCL's additions depends on the size, the type and the ranks only, so equal calls
 * give equal bits, on all ranks; sums of 16-bit numbers are rounded at every hop. Sums over peer
 * memory are made in rank order in f32 and rounded once. */
#ifndef PARALLEL_COMM_NCCL_H
#define PARALLEL_COMM_NCCL_H

#include "parallel/comm.h"

struct comm_nccl_config {
    /* Carries what comm.h does on host memory, the ranks' introduction and their liveness
     * (comm_shm on one host, comm_tcp between several). Owned by the new communicator; after a
     * failure it is aborted and stays the caller's. Its poll must not be NULL. */
    struct comm *host;
    int device;         /* this rank's, among the visible ones */
    int64_t timeout_ms; /* comm_wait_stream without one of its own, and a call to NCCL itself */
    int64_t join_ms;    /* for NCCL to connect all ranks; 0: timeout_ms */
    bool one_host;      /* small sums may go over peer memory */
};

/* All ranks together; makes the device current. ERR_UNSUPPORTED without NCCL. Device memory it
 * takes: what NCCL takes, and 2 MiB. */
MUST_CHECK int comm_nccl_create(struct comm **out, const struct comm_nccl_config *cfg,
                                struct err_msg *why);
/* For benches and tests: turns the small sums over peer memory off or on again, on all ranks alike.
 * False when there are none. */
bool comm_nccl_use_peer_memory(struct comm *c, bool on);

#endif
