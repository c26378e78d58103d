/* Shared between the engine's files; nobody else includes it. */
#ifndef SCHEDULER_ENGINE_INTERNAL_H
#define SCHEDULER_ENGINE_INTERNAL_H

#include "core/list.h"
#include "scheduler/engine.h"
#include "scheduler/metrics.h"
#include "scheduler/metrics_http.h"
#include "scheduler/runner.h"

enum engine_state { ENGINE_SERVING, ENGINE_DRAINING, ENGINE_DEAD, ENGINE_STOPPED };

/* One client connection that finished its handshake. */
struct engine_conn {
    uint64_t conn;    /* ipc's number */
    struct list reqs; /* engine_req.of_conn */
    struct list link; /* in engine.dead once closed, else alone */
};

/* One request as a client knows it. */
struct engine_req {
    struct engine_conn *owner;
    struct list of_conn;
    struct engine_req *next_in_bucket;
    uint64_t hash;
    char id[IPC_ID_BYTES + 1];
    struct request *req; /* NULL until sched_submit returns */
    bool stream;
    int64_t last_token_us;
    int32_t n_sent;               /* generated tokens given to the server */
    struct ipc_logprob *logprobs; /* of tokens not sent yet, when not streaming */
    int32_t n_logprobs, cap_logprobs;
};

struct engine {
    struct engine_config cfg;
    enum engine_state state;
    struct kv_cache *kv;
    struct sched *sched;
    struct runner *runner;
    struct ipc_server *server;
    struct metrics_http *http;
    struct metrics metrics;

    uv_async_t wake;      /* a step finished */
    uv_check_t check;     /* end of a turn: everything that arrived is in */
    uv_timer_t deadlines; /* next deadline or queue timeout */
    uv_timer_t watchdog;  /* while a step is out */
    uv_timer_t drain;
    int n_handles;
    bool stopping;
    int exit_status;

    struct engine_req **buckets;
    size_t n_buckets; /* a power of two */
    struct list dead; /* engine_conn that have closed, requests not cancelled yet */

    bool step_out;
    bool dirty;            /* something changed that may allow a plan */
    int64_t now_us;        /* of the scheduler call being made, for its events */
    int64_t plan_us;       /* host time the plan that is out took */
    int64_t busy_since_us; /* last finished step, or when work appeared; 0: idle */
    double prefill_rate;   /* prompt tokens a second, moving average; for retry_after */
    uint64_t seeds;        /* for requests that bring none */
};

/* engine_requests.c */
/* Mean over the measured rows and heads; 0 where none was. */
double engine_lost_mass(const struct batch_counts *c);
void engine_fill_events(struct engine *e, struct sched_events *ev);
void engine_on_submit(void *ctx, uint64_t conn, const struct ipc_submit *m);
void engine_on_cancel(void *ctx, uint64_t conn, const struct ipc_cancel *m);
void engine_on_open(void *ctx, uint64_t conn, const struct ipc_hello *m);
void engine_on_close(void *ctx, uint64_t conn, void *user, int reason);
/* Cancels what closed connections left behind; true if there was any. */
bool engine_reap_dead(struct engine *e);

/* engine_admin.c */
void engine_on_stats(void *ctx, uint64_t conn, uint64_t tag);
void engine_on_health(void *ctx, uint64_t conn, uint64_t tag);
void engine_on_drain(void *ctx, uint64_t conn, const struct ipc_drain *m);
void engine_on_shutdown(void *ctx, uint64_t conn, uint64_t tag);
void engine_on_reset(void *ctx, uint64_t conn, uint64_t tag);
int engine_start_metrics(struct engine *e, struct err_msg *why);
void engine_fill_info(struct engine *e, struct ipc_hello_ok *info);

/* engine.c */
int64_t engine_now(const struct engine *e);
void engine_kick(struct engine *e); /* something changed: plan at the end of this turn */

#endif
