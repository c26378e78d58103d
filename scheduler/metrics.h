/* What the engine counts, and its Prometheus text form. Names are vLLM's where it has a counterpart
 * (so dashboards and the Kubernetes endpoint picker work unchanged), ours begin with sluice_. Loop
 * thread only. */
#ifndef SCHEDULER_METRICS_H
#define SCHEDULER_METRICS_H

#include "kvcache/kv_cache.h"
#include "scheduler/scheduler.h"

#include <stdint.h>
#include <stdio.h>

enum { METRICS_MAX_BUCKETS = 24, METRICS_MAX_ERRORS = 32 };

struct metrics_hist {
    const double *bounds; /* increasing; +Inf is implied */
    int n;
    uint64_t counts[METRICS_MAX_BUCKETS + 1];
    double sum;
};

/* Rejections and failures by error code. */
struct metrics_error {
    int code;
    uint64_t count;
};

struct metrics {
    struct metrics_hist ttft, itl, e2e, queue, prefill, decode; /* seconds */
    struct metrics_hist prompt_tokens, generation_tokens, max_tokens, iteration_tokens;
    struct metrics_hist step, schedule; /* seconds */
    struct metrics_error errors[METRICS_MAX_ERRORS];
    int n_errors;
    uint64_t n_failed; /* sum over errors */
    int64_t attention_us, gemm_us, host_us, step_us;
};

void metrics_init(struct metrics *m);
void metrics_observe(struct metrics_hist *h, double v);
void metrics_error(struct metrics *m, int code);
/* A finished request's intervals, from its own clock readings. */
void metrics_finish(struct metrics *m, const struct request *r, int64_t now_us);

struct metrics_view {
    const struct metrics *m;
    struct sched_stats sched;
    struct kv_cache_stats kv;
    const char *model_name;
    const char *cache_dtype;
    uint64_t outbuf_bytes; /* waiting to be read by clients */
    int n_clients;
    double step_age; /* seconds since the last finished step while work exists; 0 when idle */
};

void metrics_write(const struct metrics_view *v, FILE *to);

#endif
