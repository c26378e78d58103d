/* A model over ranks, opened and followed as sluiced does it (cmd/daemon_model.h), without sockets
 * and scheduler: rank 0 is the bench, the others are copies of it. */
#ifndef BENCH_PREFILL_RANKS_H
#define BENCH_PREFILL_RANKS_H

#include "bench/prefill_options.h"
#include "cmd/daemon_model.h"

#include <uv.h>

struct ranks;

struct prefill_ranks {
    struct daemon_options opt;
    struct daemon_model parts; /* dev, comm, model, policy */
    uv_loop_t loop;
    struct ranks *ranks;
    char shm[64];
};

/* Starts tp - 1 copies of this program with its arguments and --tp=N, and opens the model on all of
 * them, with pages for the longest prompt. From the main thread. After an error leave the process
 * at once: the copies end with it. */
MUST_CHECK int prefill_ranks_open(struct prefill_ranks *p, const struct prefill_options *o,
                                  int32_t tp, int argc, char **argv, struct err_msg *why);
void prefill_ranks_close(struct prefill_ranks *p);
/* The life of a copy: rank o->rank of o->tps[0]. */
MUST_CHECK int prefill_ranks_follow(const struct prefill_options *o, struct err_msg *why);

#endif
