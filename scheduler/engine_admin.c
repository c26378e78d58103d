/* What operators ask: STATS, HEALTH, DRAIN, SHUTDOWN, RESET_PREFIX_CACHE, and the HTTP endpoint. */
#define LOG_MODULE "engine"
#include "scheduler/engine_internal.h"

#include "core/log.h"

#include <inttypes.h>
#include <string.h>

void engine_fill_info(struct engine *e, struct ipc_hello_ok *info)
{
    const struct engine_policy *p = &e->cfg.policy;
    info->max_model_len = e->cfg.sched.max_model_len;
    info->max_servable_tokens = sched_max_servable(e->sched);
    info->block_size = KV_PAGE_TOKENS;
    info->num_blocks = e->cfg.kv.n_pages;
    info->max_queued_requests = e->cfg.sched.max_queued;
    info->max_queued_tokens = e->cfg.sched.max_queued_tokens;
    info->n_modes = 0;
    info->modes[info->n_modes++] = IPC_SPARSE_AUTO;
    info->modes[info->n_modes++] = IPC_SPARSE_DENSE;
    if (p->n_levels > 0)
        info->modes[info->n_modes++] = IPC_SPARSE_ABS;
    info->modes[info->n_modes++] = IPC_SPARSE_REL;
    info->n_levels = p->n_levels < IPC_MAX_LEVELS ? p->n_levels : IPC_MAX_LEVELS;
    for (int32_t i = 0; i < info->n_levels; i++)
        info->k_levels[i] = p->k[i];
    info->gate_rows = p->n_levels > 0 ? p->gate_rows : 0;
    info->n_decode_levels =
        p->n_decode_levels < IPC_MAX_LEVELS ? p->n_decode_levels : IPC_MAX_LEVELS;
    for (int32_t i = 0; i < info->n_decode_levels; i++)
        info->decode_levels[i] = p->decode_k[i];
}

static int64_t step_age_us(const struct engine *e)
{
    if (e->busy_since_us == 0 || !sched_has_work(e->sched))
        return 0;
    return engine_now(e) - e->busy_since_us;
}

static const char *state_name(const struct engine *e)
{
    return e->state == ENGINE_SERVING    ? "serving"
           : e->state == ENGINE_DRAINING ? "draining"
                                         : "dead";
}

static bool live(const struct engine *e)
{
    return e->state <= ENGINE_DRAINING && step_age_us(e) <= e->cfg.step_timeout_us;
}

void engine_on_stats(void *ctx, uint64_t conn, uint64_t tag)
{
    struct engine *e = ctx;
    struct sched_stats s;
    struct kv_cache_stats kv;
    struct ipc_server_stats io;
    sched_get_stats(e->sched, &s);
    kv_cache_get_stats(e->kv, &kv);
    ipc_server_get_stats(e->server, &io);
#define INT(key, value)                                                                            \
    {                                                                                              \
        .name = (key), .is_int = true, .i = (int64_t)(value)                                       \
    }
    const struct ipc_stat stats[] = {
        INT("requests_running", s.n_running),
        INT("requests_waiting", s.n_waiting),
        INT("requests_submitted", s.n_submitted),
        INT("waiting_tokens", s.waiting_tokens),
        INT("finished_stop", s.finished[REQ_FINISH_STOP]),
        INT("finished_length", s.finished[REQ_FINISH_LENGTH]),
        INT("finished_cancelled", s.finished[REQ_FINISH_CANCELLED]),
        INT("finished_deadline", s.finished[REQ_FINISH_DEADLINE]),
        INT("finished_capacity", s.finished[REQ_FINISH_CAPACITY]),
        INT("finished_error", s.finished[REQ_FINISH_ERROR]),
        INT("finished_shutdown", s.finished[REQ_FINISH_SHUTDOWN]),
        INT("preemptions", s.n_preempted),
        INT("errors", e->metrics.n_failed),
        INT("steps", s.n_steps),
        INT("step_us", e->metrics.step_us),
        INT("attention_us", e->metrics.attention_us),
        INT("gemm_us", e->metrics.gemm_us),
        INT("host_us", e->metrics.host_us),
        INT("prompt_tokens", s.prompt_tokens),
        INT("cached_tokens", s.cached_tokens),
        INT("generated_tokens", s.generated_tokens),
        INT("pages_reachable", s.counts.reachable),
        INT("pages_visited", s.counts.visited),
        INT("pages_kept", s.counts.kept),
        INT("decode_pages_reachable", s.decode_counts.reachable),
        INT("decode_pages_kept", s.decode_counts.kept),
        INT("lost_mass_samples", s.counts.sampled),
        INT("kv_pages_total", kv.n_pages),
        INT("kv_pages_free", kv.free_pages),
        INT("kv_pages_used", kv.used_pages),
        INT("kv_pages_cached", kv.cached_pages),
        INT("kv_pages_peak", kv.peak_used_pages),
        INT("prefix_query_tokens", kv.query_tokens),
        INT("prefix_hit_tokens", kv.hit_tokens),
        INT("kv_evictions", kv.evictions),
        INT("connections", io.n_connections),
        INT("protocol_errors", io.protocol_errors),
        INT("slow_consumers", io.slow_consumers),
        INT("unsent_bytes", io.unsent_bytes),
        {.name = "prefill_tokens_per_second", .d = e->prefill_rate},
        {.name = "lost_mass", .d = engine_lost_mass(&s.counts)},
        {.name = "schedule_us_mean",
         .d = s.n_steps ? e->metrics.schedule.sum * 1e6 / (double)s.n_steps : 0},
    };
#undef INT
    const struct ipc_stats_ok m = {
        .tag = tag, .n_stats = (int32_t)(sizeof stats / sizeof *stats), .stats = stats};
    ipc_send_stats_ok(e->server, conn, &m);
}

void engine_on_health(void *ctx, uint64_t conn, uint64_t tag)
{
    struct engine *e = ctx;
    struct sched_stats s;
    sched_get_stats(e->sched, &s);
    struct ipc_health_ok m = {
        .tag = tag,
        .live = live(e),
        .ready = e->state == ENGINE_SERVING && live(e),
        .draining = e->state == ENGINE_DRAINING,
        .step_age_ms = step_age_us(e) / 1000,
        .inflight = s.n_running,
        .waiting = s.n_waiting,
    };
    (void)snprintf(m.state, sizeof m.state, "%s", state_name(e));
    ipc_send_health_ok(e->server, conn, &m);
}

void engine_on_drain(void *ctx, uint64_t conn, const struct ipc_drain *m)
{
    struct engine *e = ctx;
    ipc_send_ok(e->server, conn, m->tag);
    engine_drain(e, m->timeout_ms * 1000);
}

void engine_on_shutdown(void *ctx, uint64_t conn, uint64_t tag)
{
    struct engine *e = ctx;
    log_info("a client asked for shutdown");
    ipc_send_ok(e->server, conn, tag);
    engine_shutdown(e);
}

void engine_on_reset(void *ctx, uint64_t conn, uint64_t tag)
{
    struct engine *e = ctx;
    kv_prefix_reset(e->kv);
    ipc_send_ok(e->server, conn, tag);
}

static void write_metrics(void *ctx, FILE *to)
{
    struct engine *e = ctx;
    struct ipc_server_stats io = {0};
    struct metrics_view v = {.m = &e->metrics,
                             .model_name = e->cfg.ipc.info.model,
                             .cache_dtype = e->cfg.ipc.info.kv_dtype,
                             .step_age = (double)step_age_us(e) * 1e-6};
    sched_get_stats(e->sched, &v.sched);
    kv_cache_get_stats(e->kv, &v.kv);
    if (e->server)
        ipc_server_get_stats(e->server, &io);
    v.n_clients = io.n_connections;
    v.outbuf_bytes = io.unsent_bytes;
    metrics_write(&v, to);
}

static bool write_health(void *ctx, FILE *to)
{
    const struct engine *e = ctx;
    (void)fprintf(to, "{\"state\": \"%s\", \"live\": %s, \"step_age_ms\": %" PRId64 "}\n",
                  state_name(e), live(e) ? "true" : "false", step_age_us(e) / 1000);
    return live(e) && e->state == ENGINE_SERVING;
}

int engine_start_metrics(struct engine *e, struct err_msg *why)
{
    const struct metrics_http_config cfg = {
        .address = e->cfg.metrics, .metrics = write_metrics, .healthy = write_health, .ctx = e};
    if (!cfg.address)
        return 0;
    return metrics_http_start(&e->http, e->cfg.loop, &cfg, why);
}
