/* How this daemon's rank reaches the others: shared memory on one host, TCP between several, and
 * NCCL on top where the ranks have GPUs. With --nnodes N every host runs tp / N ranks, numbered
 * host after host: the first is that host's sluiced, the rest its children. */
#ifndef CMD_DAEMON_COMM_H
#define CMD_DAEMON_COMM_H

#include "cmd/daemon_options.h"
#include "core/dev.h"
#include "parallel/comm.h"

struct ranks;

struct daemon_peers {
    const char *shm;     /* of the ranks of one host; unused with several */
    struct ranks *ranks; /* this process's children, to notice one that dies early; may be NULL */
    /* A rank was lost; called by any thread, with several hosts only. May be NULL. */
    void (*on_fail)(void *arg);
    void *fail_arg;
};

/* Ranks on this host. */
int daemon_comm_local_ranks(const struct daemon_options *o);
/* Number of this rank on its host: 0 for the process that was started there. */
int daemon_comm_local_rank(const struct daemon_options *o);
/* All ranks together, with a long deadline for collectives until the caller has loaded its weights
 * and calls comm_set_timeout. max_msg: largest plan of a step. */
MUST_CHECK int daemon_comm_open(struct comm **out, const struct daemon_options *o,
                                const struct daemon_peers *peers, const struct dev *dev,
                                size_t max_msg, struct err_msg *why);
/* Collective. ERR_MISMATCH naming the rank when not all hold the same value. */
MUST_CHECK int daemon_comm_same(struct comm *c, uint64_t value, const char *what,
                                struct err_msg *why);
/* Collective: the least n of all ranks. */
MUST_CHECK int daemon_comm_least(struct comm *c, int32_t *n);

#endif
