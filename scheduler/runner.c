/* A queue of length one: the policy is that one batch is out at a time, so two threads, one lock,
 * one condition and a state are all it takes. The state says who owns the batch and the result:
 * the loop thread in IDLE and DONE, the device thread in QUEUED and RUNNING; every change of hands
 * happens under the lock. */
#include "scheduler/runner.h"

#include "core/clock.h"
#include "core/mem.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

enum runner_state { RUNNER_IDLE, RUNNER_QUEUED, RUNNER_RUNNING, RUNNER_DONE };

struct runner {
    struct runner_config cfg;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake; /* QUEUED or stop */
    enum runner_state state;
    bool stop;
    const struct batch *batch;
    int status;
    struct batch_result result;
    _Atomic int64_t since_us; /* read by the watchdog without the lock */
};

/* Waits for a batch; a batch that is queued when the runner stops still runs. */
static const struct batch *next_batch(struct runner *r)
{
    const struct batch *b = NULL;
    (void)pthread_mutex_lock(&r->lock);
    while (r->state != RUNNER_QUEUED && !r->stop)
        (void)pthread_cond_wait(&r->wake, &r->lock);
    if (r->state == RUNNER_QUEUED) {
        r->state = RUNNER_RUNNING;
        b = r->batch;
    }
    (void)pthread_mutex_unlock(&r->lock);
    return b;
}

static void *runner_main(void *arg)
{
    struct runner *r = arg;
    const struct batch *b;
    while ((b = next_batch(r)) != NULL) {
        int status = r->cfg.step(r->cfg.step_arg, b, &r->result);
        (void)pthread_mutex_lock(&r->lock);
        r->status = status;
        r->state = RUNNER_DONE;
        atomic_store(&r->since_us, 0);
        (void)pthread_mutex_unlock(&r->lock);
        r->cfg.notify(r->cfg.notify_arg);
    }
    return NULL;
}

static void free_runner(struct runner *r)
{
    mem_free(r->result.tokens);
    mem_free(r->result.counts);
    mem_free(r);
}

int runner_start(struct runner **out, const struct runner_config *cfg)
{
    struct runner *r = mem_zalloc(1, sizeof *r);
    size_t n = (size_t)cfg->max_seqs;
    r->cfg = *cfg;
    r->result.tokens = mem_zalloc(n, sizeof *r->result.tokens);
    r->result.counts = mem_zalloc(n, sizeof *r->result.counts);
    (void)pthread_mutex_init(&r->lock, NULL);
    (void)pthread_cond_init(&r->wake, NULL);
    int err = pthread_create(&r->thread, NULL, runner_main, r);
    if (err != 0) {
        (void)pthread_cond_destroy(&r->wake);
        (void)pthread_mutex_destroy(&r->lock);
        free_runner(r);
        return -err;
    }
    *out = r;
    return 0;
}

void runner_stop(struct runner *r)
{
    if (!r)
        return;
    (void)pthread_mutex_lock(&r->lock);
    r->stop = true;
    (void)pthread_cond_signal(&r->wake);
    (void)pthread_mutex_unlock(&r->lock);
    (void)pthread_join(r->thread, NULL);
    (void)pthread_cond_destroy(&r->wake);
    (void)pthread_mutex_destroy(&r->lock);
    free_runner(r);
}

int runner_submit(struct runner *r, const struct batch *b)
{
    (void)pthread_mutex_lock(&r->lock);
    bool idle = r->state == RUNNER_IDLE;
    if (idle) {
        r->batch = b;
        r->state = RUNNER_QUEUED;
        atomic_store(&r->since_us, clock_monotonic_us(NULL));
        (void)pthread_cond_signal(&r->wake);
    }
    (void)pthread_mutex_unlock(&r->lock);
    return idle ? 0 : -EBUSY;
}

bool runner_poll(struct runner *r, struct runner_done *out)
{
    (void)pthread_mutex_lock(&r->lock);
    bool done = r->state == RUNNER_DONE;
    if (done) {
        r->state = RUNNER_IDLE;
        *out = (struct runner_done){.batch = r->batch, .status = r->status, .result = &r->result};
    }
    (void)pthread_mutex_unlock(&r->lock);
    return done;
}

int64_t runner_busy_since(const struct runner *r)
{
    return atomic_load(&r->since_us);
}
