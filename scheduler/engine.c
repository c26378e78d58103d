#define LOG_MODULE "engine"
#include "scheduler/engine_internal.h"

#include "core/log.h"
#include "core/mem.h"

#include <errno.h>
#include <string.h>

enum { WATCHDOG_MS = 250, LINGER_MS = 1000 };

int64_t engine_now(const struct engine *e)
{
    return clock_now_us(&e->cfg.clock);
}

/* The loop may be about to sleep: a wake-up makes sure of one more turn. */
void engine_kick(struct engine *e)
{
    e->dirty = true;
    if (e->n_handles > 0 && !uv_is_closing((uv_handle_t *)&e->wake))
        (void)uv_async_send(&e->wake);
}

static void on_handle_closed(uv_handle_t *h)
{
    struct engine *e = h->data;
    if (--e->n_handles > 0)
        return;
    e->state = ENGINE_STOPPED;
    if (e->cfg.stopped)
        e->cfg.stopped(e->cfg.stopped_ctx, e->exit_status);
}

static void on_server_closed(void *arg)
{
    struct engine *e = arg;
    uv_handle_t *handles[] = {(uv_handle_t *)&e->wake, (uv_handle_t *)&e->check,
                              (uv_handle_t *)&e->deadlines, (uv_handle_t *)&e->watchdog,
                              (uv_handle_t *)&e->drain};
    e->server = NULL;
    (void)engine_reap_dead(e);
    metrics_http_close(e->http);
    e->http = NULL;
    for (size_t i = 0; i < sizeof handles / sizeof *handles; i++)
        uv_close(handles[i], on_handle_closed);
}

/* Sends what is queued, closes every socket, then the loop's handles, then calls stopped. */
static void stop(struct engine *e, int status)
{
    if (e->stopping)
        return;
    e->stopping = true;
    e->exit_status = status;
    if (e->server)
        ipc_server_close(e->server, LINGER_MS, on_server_closed, e);
    else
        on_server_closed(e);
}

/* Nothing can run again: the ranks no longer agree, or the device has failed, and errors of a
 * device stick. */
static bool is_final(int err)
{
    return err == ERR_PEER || err == ERR_CUDA || err == ERR_CUBLAS || err == ERR_NCCL;
}

/* Collects a finished step. */
static void collect(struct engine *e)
{
    struct runner_done done;
    if (!e->step_out || !runner_poll(e->runner, &done))
        return;
    e->step_out = false;
    (void)uv_timer_stop(&e->watchdog);
    int64_t begin = e->now_us = engine_now(e);
    int32_t n_tokens = done.batch->n_tokens;
    if (is_final(done.status)) {
        engine_fail(e, done.status,
                    done.status == ERR_PEER ? "a rank failed during a step"
                                            : "the device failed during a step");
        sched_update(e->sched, done.status, NULL, begin);
        return;
    }
    if (done.status < 0)
        log_error("step %llu failed: %s", (unsigned long long)done.batch->step_id,
                  err_str(done.status));
    sched_update(e->sched, done.status, done.status < 0 ? NULL : done.result, begin);
    int64_t end = engine_now(e);
    metrics_observe(&e->metrics.schedule, (double)(end - begin + e->plan_us) * 1e-6);
    if (done.status == 0) {
        metrics_observe(&e->metrics.step, (double)done.result->total_us * 1e-6);
        metrics_observe(&e->metrics.iteration_tokens, n_tokens);
        e->metrics.attention_us += done.result->attention_us;
        e->metrics.gemm_us += done.result->gemm_us;
        e->metrics.host_us += done.result->host_us;
        e->metrics.step_us += done.result->total_us;
        if (done.result->total_us > 0 && n_tokens >= KV_BLOCK_TOKENS) {
            double rate = n_tokens * 1e6 / (double)done.result->total_us;
            e->prefill_rate += (rate - e->prefill_rate) * (e->prefill_rate > 0 ? 0.1 : 1.0);
        }
    }
    e->busy_since_us = end;
    e->dirty = true;
}

static void on_watchdog(uv_timer_t *t)
{
    struct engine *e = t->data;
    int64_t since = runner_busy_since(e->runner);
    if (e->step_out && since && engine_now(e) - since > e->cfg.step_timeout_us)
        engine_fail(e, ERR_PEER, "a step took longer than --step-timeout");
}

static void plan(struct engine *e)
{
    if (e->step_out || e->state >= ENGINE_DEAD || !e->dirty)
        return;
    e->dirty = false;
    int64_t begin = e->now_us = engine_now(e);
    sched_expire(e->sched, begin);
    const struct batch *b = sched_plan(e->sched, begin);
    e->plan_us = engine_now(e) - begin;
    if (!b) {
        if (!sched_has_work(e->sched))
            e->busy_since_us = 0;
        return;
    }
    if (e->busy_since_us == 0)
        e->busy_since_us = begin;
    int err = runner_submit(e->runner, b);
    ASSERT(err == 0);
    e->step_out = true;
    (void)uv_timer_start(&e->watchdog, on_watchdog, WATCHDOG_MS, WATCHDOG_MS);
}

static void on_deadline(uv_timer_t *t)
{
    struct engine *e = t->data;
    e->now_us = engine_now(e);
    sched_expire(e->sched, e->now_us);
    engine_kick(e);
}

static void arm_deadline(struct engine *e)
{
    int64_t next = sched_next_deadline(e->sched);
    if (next == INT64_MAX || e->state >= ENGINE_DEAD) {
        (void)uv_timer_stop(&e->deadlines);
        return;
    }
    int64_t ms = (next - engine_now(e) + 999) / 1000;
    (void)uv_timer_start(&e->deadlines, on_deadline, ms > 0 ? (uint64_t)ms : 0, 0);
}

/* The end of a turn. Sending may close a slow connection, so the dead are looked at last and again.
 */
static void on_check(uv_check_t *c)
{
    struct engine *e = c->data;
    if (e->stopping)
        return;
    collect(e);
    while (engine_reap_dead(e))
        e->dirty = true;
    plan(e);
    if (!list_empty(&e->dead))
        engine_kick(e);
    arm_deadline(e);
    if (e->state == ENGINE_DRAINING && !e->step_out && !sched_has_work(e->sched))
        stop(e, 0);
}

static void on_wake(uv_async_t *a)
{
    (void)a; /* on_check does the work */
}

static void notify(void *arg)
{
    struct engine *e = arg;
    (void)uv_async_send(&e->wake);
}

static void on_drain_timeout(uv_timer_t *t)
{
    struct engine *e = t->data;
    log_warn("drain timeout: ending what still runs");
    engine_shutdown(e);
}

void engine_drain(struct engine *e, int64_t timeout_us)
{
    if (e->state > ENGINE_DRAINING)
        return;
    if (e->state == ENGINE_SERVING) {
        log_info("draining");
        e->state = ENGINE_DRAINING;
        sched_drain(e->sched);
        ipc_server_goaway(e->server, "draining", timeout_us / 1000);
    }
    if (timeout_us > 0)
        (void)uv_timer_start(&e->drain, on_drain_timeout, (uint64_t)(timeout_us / 1000), 0);
    engine_kick(e);
}

void engine_shutdown(struct engine *e)
{
    if (e->state > ENGINE_DRAINING)
        return;
    e->state = ENGINE_DRAINING;
    e->now_us = engine_now(e);
    sched_drain(e->sched);
    sched_cancel_all(e->sched, REQ_FINISH_SHUTDOWN, 0);
    engine_kick(e);
}

void engine_fail(struct engine *e, int err, const char *why)
{
    if (e->state >= ENGINE_DEAD)
        return;
    log_error("engine failed: %s (%s)", why, err_str(err));
    e->state = ENGINE_DEAD;
    e->now_us = engine_now(e);
    sched_cancel_all(e->sched, REQ_FINISH_ERROR, ERR_ENGINE_DEAD);
    ipc_server_goaway(e->server, why, 0);
    stop(e, err);
}

static void fill_handlers(struct engine *e, struct ipc_handlers *h)
{
    *h = (struct ipc_handlers){
        .ctx = e,
        .open = engine_on_open,
        .submit = engine_on_submit,
        .cancel = engine_on_cancel,
        .stats = engine_on_stats,
        .health = engine_on_health,
        .drain = engine_on_drain,
        .shutdown = engine_on_shutdown,
        .reset_prefix_cache = engine_on_reset,
        .close = engine_on_close,
    };
}

static void init_handles(struct engine *e)
{
    uv_loop_t *loop = e->cfg.loop;
    (void)uv_async_init(loop, &e->wake, on_wake);
    (void)uv_check_init(loop, &e->check);
    (void)uv_timer_init(loop, &e->deadlines);
    (void)uv_timer_init(loop, &e->watchdog);
    (void)uv_timer_init(loop, &e->drain);
    e->wake.data = e->check.data = e->deadlines.data = e->watchdog.data = e->drain.data = e;
    e->n_handles = 5;
    (void)uv_check_start(&e->check, on_check);
}

static int open_parts(struct engine *e, struct err_msg *why)
{
    struct sched_events events;
    const struct runner_config run = {.step = e->cfg.step,
                                      .step_arg = e->cfg.step_arg,
                                      .notify = notify,
                                      .notify_arg = e,
                                      .max_seqs = e->cfg.sched.max_running};
    TRY(kv_cache_create(&e->kv, &e->cfg.kv, why));
    engine_fill_events(e, &events);
    TRY(sched_create(&e->sched, &e->cfg.sched, e->kv, &events, why));
    fill_handlers(e, &e->cfg.ipc.handlers);
    engine_fill_info(e, &e->cfg.ipc.info);
    TRY(ipc_server_create(&e->server, e->cfg.loop, &e->cfg.ipc, why));
    int err = runner_start(&e->runner, &run);
    if (err < 0)
        return err_set(why, err, "cannot start the device thread: %s", err_str(err));
    return engine_start_metrics(e, why);
}

int engine_create(struct engine **out, const struct engine_config *cfg, struct err_msg *why)
{
    struct engine *e = mem_zalloc(1, sizeof *e);
    e->cfg = *cfg;
    e->seeds = (uint64_t)engine_now(e);
    metrics_init(&e->metrics);
    list_init(&e->dead);
    e->n_buckets = 64;
    while (e->n_buckets < 2 * (size_t)(cfg->sched.max_queued + cfg->sched.max_running))
        e->n_buckets *= 2;
    e->buckets = mem_zalloc(e->n_buckets, sizeof *e->buckets);
    init_handles(e);
    int err = open_parts(e, why);
    if (err < 0) {
        e->cfg.stopped = NULL;
        stop(e, err);
        (void)uv_run(cfg->loop, UV_RUN_DEFAULT); /* nothing listens: this only closes handles */
        (void)engine_destroy(e);
        return err;
    }
    *out = e;
    return 0;
}

int engine_listen(struct engine *e, const char *address, struct err_msg *why)
{
    return ipc_server_listen(e->server, address, why);
}

bool engine_destroy(struct engine *e)
{
    if (e->step_out && runner_busy_since(e->runner))
        return false;
    runner_stop(e->runner);
    if (e->step_out) {
        struct runner_done done;
        (void)runner_poll(e->runner, &done);
        sched_update(e->sched, ERR_ENGINE_DEAD, NULL, engine_now(e));
    }
    if (e->sched)
        sched_destroy(e->sched);
    kv_cache_destroy(e->kv);
    mem_free(e->buckets);
    mem_free(e);
    return true;
}
