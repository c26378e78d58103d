/* The device thread: takes batches from a bounded queue, runs them with the given step function,
 * and tells the loop thread by `notify` (which may only wake it: uv_async_send). The loop thread
 * then collects with runner_poll. */
#ifndef SCHEDULER_RUNNER_H
#define SCHEDULER_RUNNER_H

#include "core/err.h"
#include "model/batch.h"

#include <stdbool.h>

struct runner;

struct runner_config {
    int (*step)(void *arg, const struct batch *b,
                struct batch_result *r); /* on the device thread */
    void *step_arg;
    void (*notify)(void *arg); /* on the device thread */
    void *notify_arg;
    int32_t max_seqs; /* sizes the result */
};

struct runner_done {
    const struct batch *batch;
    int status;
    const struct batch_result *result; /* valid until the next runner_submit */
};

MUST_CHECK int runner_start(struct runner **out, const struct runner_config *cfg);
/* Waits for the step in flight, then joins the thread; accepts NULL. */
void runner_stop(struct runner *r);
/* One batch may be out at a time; -EBUSY otherwise. */
MUST_CHECK int runner_submit(struct runner *r, const struct batch *b);
/* True once per finished batch. */
bool runner_poll(struct runner *r, struct runner_done *out);
/* When the batch that has not finished was submitted (monotonic us), 0 if none: for the watchdog.
 */
int64_t runner_busy_since(const struct runner *r);

#endif
