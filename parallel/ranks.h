/* The processes of one model, seen from its leader: starts the followers (ranks 1..n-1) as copies
 * of the running program, watches them on a libuv loop, ends them.
 *
 * A follower gets the leader's arguments and then --rank=N --shm=NAME, its environment, its stdout
 * and stderr (so the log is one), and an empty stdin. It must call ranks_follower_init first.
 * No follower outlives the leader: the kernel kills it when the leader's thread that called
 * ranks_start ends, however that happens; so call it from the main thread.
 * All functions belong to the loop's thread, except ranks_alive, which any may call meanwhile. */
#ifndef PARALLEL_RANKS_H
#define PARALLEL_RANKS_H

#include "core/err.h"

#include <uv.h>

#include <stdbool.h>
#include <stdint.h>

struct ranks;

struct ranks_config {
    uv_loop_t *loop;
    int n_ranks; /* with the leader */
    int argc;
    char *const *argv; /* of the leader */
    const char *shm;   /* comm_shm_config.name */
    const char *exe;   /* program of the followers; NULL: this one */
    /* A follower ended although nobody had called ranks_stop or ranks_kill: status is its exit
     * status, or signal the signal that ended it. May call ranks_kill and ranks_stop. */
    void (*on_exit)(void *ctx, int rank, int status, int signal);
    void *ctx;
};

/* Starts all followers, or none. */
MUST_CHECK int ranks_start(struct ranks **out, const struct ranks_config *cfg, struct err_msg *why);
/* False when a follower has ended; asks the system, so it also works while the loop does not run.
 */
bool ranks_alive(void *ranks);
/* Process of a rank; 0 when it has ended. */
int ranks_pid(const struct ranks *r, int rank);
/* SIGKILLs every follower that is left. They are reaped when the loop runs, or by init when the
 * leader exits at once. Accepts NULL. */
void ranks_kill(struct ranks *r);
/* The last call on r. The followers, told to leave by other means (model_stop_followers), have
 * grace_ms to end, then are killed; when all are reaped the handles close and r is freed, all
 * while the loop runs. Accepts NULL. */
void ranks_stop(struct ranks *r, int64_t grace_ms);

/* First thing in a follower's main: binds its life to the leader's. Signals that a terminal or a
 * service manager sends to the whole group (SIGINT, SIGTERM, SIGHUP) are the leader's to handle and
 * are ignored here. */
MUST_CHECK int ranks_follower_init(struct err_msg *why);

#endif
