/* The engine: joins the sockets (ipc/server.h), the schedule (scheduler.h), the page bookkeeping
 * and the device thread (runner.h) on one libuv loop. All of it runs on the loop's thread but the
 * step function.
 *
 * A turn of the loop first takes in every frame that has arrived, then collects a finished step,
 * then plans the next: requests that arrive together are planned together. One step is out at a
 * time.
 *
 * Every SUBMIT ends in exactly one DONE or ERROR. A failed rank or a stuck step ends the engine:
 * ERROR to every open request, GOAWAY, then `stopped` with a negative status; the process is
 * expected to exit with it. */
#ifndef SCHEDULER_ENGINE_H
#define SCHEDULER_ENGINE_H

#include "core/clock.h"
#include "core/err.h"
#include "ipc/server.h"
#include "kvcache/kv_cache.h"
#include "scheduler/scheduler.h"

#include <uv.h>

struct engine;

/* The sparse modes requests may choose from. */
struct engine_policy {
    const int32_t *k; /* levels of the threshold file, increasing; borrowed */
    int32_t n_levels; /* 0: no file, ABS is refused */
    int32_t gate_rows;
    int32_t auto_k;   /* level of `auto`; 0: dense */
    int32_t auto_min; /* prompts shorter than this are dense under `auto` */
    /* Above 0: `auto` is REL of so many rows, not auto_k; at a density above 0, or at a lambda. */
    int32_t auto_rows;
    double auto_density, auto_ln_lambda;
    /* For densities that requests name; set where n_levels > 0: the smallest level that is
     * predicted to reach it, or the largest; and ln(lambda) of the REL gate by what was calibrated
     * for its rows. */
    int32_t (*level_for)(const void *thresholds, double density, int64_t n_tokens);
    const void *thresholds; /* borrowed */
    double (*ln_lambda)(const void *rel, double density, int64_t n_tokens);
    const void *rel_128, *rel_64; /* borrowed; NULL: not calibrated */
    /* Gates are steered by this much (struct attn_choice), above 0, where the thresholds know what
     * heads are due, to a density or, of ABS, without one (0) to the pages of the level: that fills
     * in a policy of either gate. */
    double steer;
    bool (*steered)(const void *thresholds, double density, int64_t n_tokens,
                    struct batch_policy *policy);
    /* Gates of generated tokens: the predicted density of a level, growing with it. */
    const int32_t *decode_k; /* of n_decode_levels levels, increasing; borrowed */
    int32_t n_decode_levels;
    const char *no_decode; /* why there are none, for who asks; set where n_decode_levels is 0 */
    double decode_density; /* of requests that name none; 0 or 1: dense */
    double (*decode_predicted)(const void *thresholds, int32_t level, int64_t n_tokens);
    uint64_t fingerprint; /* of threshold file and visit sets */
};

struct engine_config {
    uv_loop_t *loop;
    struct clock clock;
    struct sched_config sched;
    struct kv_cache_config kv;
    struct engine_policy policy;
    int (*step)(void *arg, const struct batch *b,
                struct batch_result *r); /* on the device thread */
    void *step_arg;
    struct ipc_server_config ipc; /* handlers and the limits in info are set by the engine */
    const char *metrics;          /* HOST:PORT, or NULL */
    int64_t step_timeout_us;
    void (*stopped)(
        void *ctx, int status); /* 0: drained or told to stop; < 0: failed. Nothing runs after it */
    void *stopped_ctx;
};

MUST_CHECK int engine_create(struct engine **out, const struct engine_config *cfg,
                             struct err_msg *why);
/* Before the loop runs; see ipc_server_listen. */
MUST_CHECK int engine_listen(struct engine *e, const char *address, struct err_msg *why);
/* Refuses new requests; stops when the last one has ended, or after timeout_us (0: no limit) when
 * the rest is ended as SHUTDOWN. A second call only shortens the time. */
void engine_drain(struct engine *e, int64_t timeout_us);
/* Ends everything now. */
void engine_shutdown(struct engine *e);
/* A rank died, or the like: fails everything. Idempotent. */
void engine_fail(struct engine *e, int err, const char *why);
/* After `stopped`, when the loop has returned. With a step still out (a stuck rank) the device
 * thread cannot be joined: then nothing is freed and false is returned; the process must exit. */
bool engine_destroy(struct engine *e);

#endif
