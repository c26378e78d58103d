/* sluiced: the daemon. Parses options, builds the parts, wires them, runs the loop.
 * With --tp N it is the leader of N processes: it starts the followers as copies of itself (--rank,
 * --shm), decides everything, and fails as a whole when one of them dies. With --nnodes the ranks
 * are spread over hosts: on the others sluiced is a follower itself, and starts the rest there. */
#define LOG_MODULE "sluiced"
#include "calibration/thresholds.h"
#include "cmd/daemon_model.h"
#include "cmd/daemon_options.h"
#include "cmd/secret.h"
#include "core/log.h"
#include "core/mem.h"
#include "parallel/ranks.h"
#include "scheduler/engine.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

enum { STOP_GRACE_MS = 2000 };

struct daemon {
    struct daemon_options opt;
    uv_loop_t loop;
    struct daemon_model model;
    struct engine *engine;
    struct ranks *ranks;
    uv_signal_t signals[2];
    int n_signals;        /* received so far */
    int status;           /* of the engine */
    uv_async_t peer_lost; /* with several hosts: the communicator's thread has lost a rank */
    bool rank_died;
    char shm[64];
    char *token;
};

static int step(void *arg, const struct batch *b, struct batch_result *r)
{
    return model_step(arg, b, r);
}

static void on_stopped(void *ctx, int status)
{
    struct daemon *d = ctx;
    d->status = status;
    for (int i = 0; i < 2; i++)
        uv_close((uv_handle_t *)&d->signals[i], NULL);
    uv_stop(&d->loop);
}

static void on_signal(uv_signal_t *s, int number)
{
    struct daemon *d = s->data;
    log_info("%s", number == SIGTERM ? "SIGTERM" : "SIGINT");
    if (d->n_signals++ == 0)
        engine_drain(d->engine, d->opt.drain_timeout * 1000);
    else
        engine_shutdown(d->engine);
}

static void on_rank_exit(void *ctx, int rank, int status, int signal_number)
{
    struct daemon *d = ctx;
    char text[96];
    d->rank_died = true;
    (void)snprintf(text, sizeof text, "rank %d ended with status %d, signal %d", rank, status,
                   signal_number);
    if (d->model.comm)
        comm_abort(d->model.comm);
    if (d->engine)
        engine_fail(d->engine, ERR_PEER, text);
    else
        log_error("%s", text);
}

/* With several hosts there is no child whose exit tells: the communicator does. */
static void on_peer_lost(uv_async_t *a)
{
    struct daemon *d = a->data;
    d->rank_died = true;
    if (d->engine)
        engine_fail(d->engine, ERR_PEER, "a rank was lost");
}

static void send_peer_lost(void *arg)
{
    (void)uv_async_send(arg);
}

static int read_token(struct daemon *d, struct err_msg *why)
{
    char buf[IPC_TOKEN_BYTES + 1];
    if (!d->opt.auth_token_file)
        return 0;
    TRY(secret_read(buf, sizeof buf, "auth-token-file", d->opt.auth_token_file, why));
    d->token = mem_strdup(buf);
    return 0;
}

static void fill_sched(const struct daemon *d, struct sched_config *s)
{
    const struct daemon_options *o = &d->opt;
    const struct model_info *info = model_info(d->model.model);
    *s = (struct sched_config){
        .max_running = (int32_t)o->max_running,
        .token_budget = d->model.token_budget,
        .step_us = o->max_step_time * 1000,
        .max_partial_prefills = (int32_t)o->max_partial_prefills,
        .max_long_partial = (int32_t)o->max_long_partial,
        .long_prefill_tokens = (int32_t)o->long_prefill_tokens,
        .watermark_pages = (int32_t)(o->watermark * d->model.n_pages),
        .max_queued = (int32_t)o->max_queued_requests,
        .max_queued_tokens = o->max_queued_tokens,
        .max_tenant_requests = (int32_t)o->max_tenant_requests,
        .max_model_len = d->model.max_model_len,
        .model_fingerprint = info->fingerprint,
        .share_generated = o->share_generated,
        .n_eos = info->n_eos,
    };
    memcpy(s->eos_ids, info->eos_ids, sizeof s->eos_ids);
}

static double rel_ln_lambda(const void *rel, double density, int64_t n_tokens)
{
    return thresholds_rel_ln_lambda(rel, density, n_tokens);
}

static int32_t level_for(const void *thresholds, double density, int64_t n_tokens)
{
    return thresholds_level_for(thresholds, density, n_tokens);
}

static bool steered(const void *thresholds, double density, int64_t n_tokens,
                    struct batch_policy *policy)
{
    if (policy->gate == BATCH_REL)
        return thresholds_rel_steer(thresholds_rel_view(thresholds, policy->gate_rows), density,
                                    n_tokens, policy);
    thresholds_abs_steer(thresholds, density, n_tokens, policy);
    return true;
}

static double decode_density(const void *thresholds, int32_t level, int64_t n_tokens)
{
    return thresholds_decode_density(thresholds, level, n_tokens);
}

static void fill_policy(const struct daemon *d, struct engine_policy *p)
{
    const struct thresholds *t = d->model.policy.thresholds;
    *p = (struct engine_policy){.fingerprint = d->model.policy.fingerprint,
                                .no_decode = d->model.policy.no_decode,
                                .n_decode_levels = d->model.policy.attn.decode.n_levels,
                                .decode_density = d->opt.decode_density,
                                .decode_predicted = decode_density};
    if (!t)
        return;
    p->k = thresholds_k(t, &p->n_levels);
    p->decode_k = thresholds_meta(t)->decode.k;
    p->gate_rows = thresholds_meta(t)->gate_rows;
    p->auto_k = thresholds_meta(t)->auto_k;
    p->auto_min = thresholds_meta(t)->auto_min;
    p->auto_rows = thresholds_meta(t)->auto_rows;
    p->auto_density = thresholds_meta(t)->auto_density;
    p->auto_ln_lambda = thresholds_meta(t)->auto_ln_lambda;
    p->level_for = level_for;
    p->thresholds = t;
    p->ln_lambda = rel_ln_lambda;
    p->steered = steered;
    p->steer = d->opt.steer;
    p->rel_128 = thresholds_meta(t)->rel_128.b > 0 ? &thresholds_meta(t)->rel_128 : NULL;
    p->rel_64 = thresholds_meta(t)->rel_64.b > 0 ? &thresholds_meta(t)->rel_64 : NULL;
}

static void fill_ipc(const struct daemon *d, struct ipc_server_config *c)
{
    const struct daemon_options *o = &d->opt;
    const struct model_info *info = model_info(d->model.model);
    *c = (struct ipc_server_config){
        .token = d->token,
        .max_connections = (int32_t)o->max_connections,
        .max_frame = o->max_frame,
        .hard_limit = o->slow_bytes,
        .max_lag_ms = (int32_t)o->slow_timeout,
        .handshake_ms = (int32_t)o->handshake_timeout,
    };
    c->info.vocab = info->vocab_size;
    c->info.tp = (int32_t)o->tp;
    (void)snprintf(c->info.version, sizeof c->info.version, "%s", SLUICE_VERSION);
    (void)snprintf(c->info.instance_id, sizeof c->info.instance_id, "%ld-%" PRIx64, (long)getpid(),
                   uv_hrtime());
    (void)snprintf(c->info.model, sizeof c->info.model, "%s", info->name);
    (void)snprintf(c->info.kv_dtype, sizeof c->info.kv_dtype, "%s", dtype_name(info->kv_dtype));
    (void)snprintf(c->info.device, sizeof c->info.device, "%s", d->model.dev->ops->name);
}

static int open_engine(struct daemon *d, struct err_msg *why)
{
    struct engine_config cfg = {
        .loop = &d->loop,
        .clock = clock_real(),
        .kv = {.n_pages = d->model.n_pages,
               .max_seqs = (int32_t)d->opt.max_running,
               .max_pages_per_seq = kv_pages_for(d->model.max_model_len),
               .prefix_cache = d->opt.prefix_cache},
        .step = step,
        .step_arg = d->model.model,
        .metrics = d->opt.metrics,
        .step_timeout_us = d->opt.step_timeout * 1000,
        .stopped = on_stopped,
        .stopped_ctx = d,
    };
    fill_sched(d, &cfg.sched);
    fill_policy(d, &cfg.policy);
    fill_ipc(d, &cfg.ipc);
    return engine_create(&d->engine, &cfg, why);
}

/* Every address of a comma-separated list. */
static int listen_all(struct daemon *d, struct err_msg *why)
{
    char *list = mem_strdup(d->opt.listen), *save = NULL;
    struct err_msg inner = {""};
    int err = 0;
    for (char *a = strtok_r(list, ",", &save); a && err == 0; a = strtok_r(NULL, ",", &save))
        err = engine_listen(d->engine, a, &inner);
    if (err < 0)
        (void)err_set(why, err, "--listen: %.300s", err_why(&inner, err));
    mem_free(list);
    return err;
}

static int start_signals(struct daemon *d)
{
    static const int numbers[] = {SIGTERM, SIGINT};
    for (int i = 0; i < 2; i++) {
        TRY(uv_signal_init(&d->loop, &d->signals[i]));
        d->signals[i].data = d;
        TRY(uv_signal_start(&d->signals[i], on_signal, numbers[i]));
    }
    return 0;
}

static int start_ranks(struct daemon *d, int argc, char **argv, struct err_msg *why)
{
    const struct ranks_config cfg = {
        .loop = &d->loop,
        .n_ranks = daemon_comm_local_ranks(&d->opt),
        .argc = argc,
        .argv = argv,
        .shm = d->shm,
        .on_exit = on_rank_exit,
        .ctx = d,
    };
    if (cfg.n_ranks == 1)
        return 0;
    TRY(comm_shm_name(d->shm, sizeof d->shm));
    return ranks_start(&d->ranks, &cfg, why);
}

/* Runs until drained, told to stop, or failed. */
static int serve(struct daemon *d, struct err_msg *why)
{
    TRY(read_token(d, why));
    const struct daemon_peers peers = {d->shm, d->ranks, send_peer_lost, &d->peer_lost};
    TRY(daemon_model_open(&d->model, &d->opt, &peers, why));
    TRY(open_engine(d, why));
    int err = start_signals(d);
    if (err == 0)
        err = listen_all(d, why);
    if (err < 0)
        engine_shutdown(d->engine);
    else
        log_info("ready model=%s device=%s tp=%" PRId64 " pages=%" PRId32
                 " kv=%s max_model_len=%" PRId32 " token_budget=%" PRId32,
                 model_info(d->model.model)->name, d->model.dev->ops->name, d->opt.tp,
                 d->model.n_pages, dtype_name(model_info(d->model.model)->kv_dtype),
                 d->model.max_model_len, d->model.token_budget);
    (void)uv_run(&d->loop, UV_RUN_DEFAULT);
    if (err == 0)
        *why = (struct err_msg){""}; /* what was said about optional files at start */
    return err < 0 ? err : d->status;
}

static bool has_gpu(const struct daemon *d)
{
    return d->model.dev && d->model.dev->ops != &dev_cpu;
}

/* Without freeing anything: on a GPU that could wait for kernels that wait for a lost rank. */
_Noreturn static void end_at_once(struct daemon *d)
{
    ranks_kill(d->ranks);
    _exit(1);
}

static int lead(struct daemon *d, int argc, char **argv)
{
    struct err_msg why = {""};
    (void)signal(SIGPIPE, SIG_IGN);
    ASSERT(uv_loop_init(&d->loop) == 0);
    ASSERT(uv_async_init(&d->loop, &d->peer_lost, on_peer_lost) == 0);
    d->peer_lost.data = d;
    uv_unref((uv_handle_t *)&d->peer_lost); /* alone it is no reason for the loop to go on */
    int err = start_ranks(d, argc, argv, &why);
    if (err == 0)
        err = serve(d, &why);
    if (err < 0)
        log_error("%s", err_why(&why, err));
    if (d->engine && !engine_destroy(d->engine)) /* a step never came back */
        end_at_once(d);
    if (err < 0 && has_gpu(d))
        end_at_once(d);
    if (d->model.model && !d->rank_died)
        model_stop_followers(d->model.model);
    ranks_stop(d->ranks, STOP_GRACE_MS);
    daemon_model_close(&d->model);
    uv_close((uv_handle_t *)&d->peer_lost, NULL);
    (void)uv_run(&d->loop, UV_RUN_DEFAULT);
    (void)uv_loop_close(&d->loop);
    mem_free(d->token);
    return err < 0 ? 1 : 0;
}

/* A child of this host's sluiced, or that sluiced itself where it does not lead: then it has
 * children of its own, which the kernel ends with it. Who loses one of them is the communicator. */
static int follow(struct daemon *d, int argc, char **argv)
{
    struct err_msg why = {""};
    const bool child = daemon_comm_local_rank(&d->opt) > 0;
    ASSERT(uv_loop_init(&d->loop) == 0);
    int err = child ? ranks_follower_init(&why) : start_ranks(d, argc, argv, &why);
    const struct daemon_peers peers = {.shm = d->opt.shm, .ranks = d->ranks};
    if (err == 0)
        err = daemon_model_open(&d->model, &d->opt, &peers, &why);
    if (err == 0)
        err = model_follow(d->model.model);
    if (err < 0)
        log_error("rank %" PRId64 ": %s", d->opt.rank, err_why(&why, err));
    if (err < 0 && has_gpu(d))
        end_at_once(d);
    ranks_stop(d->ranks, STOP_GRACE_MS);
    daemon_model_close(&d->model);
    (void)uv_run(&d->loop, UV_RUN_DEFAULT);
    (void)uv_loop_close(&d->loop);
    return err < 0 ? 1 : 0;
}

int main(int argc, char **argv)
{
    struct daemon daemon = {0};
    struct daemon *d = &daemon;
    struct err_msg why = {""};

    if (conf_wants_help(argc, argv)) {
        conf_help(&daemon_program, stdout);
        return 0;
    }
    if (argc == 2 && strcmp(argv[1], "--help-markdown") == 0) {
        conf_markdown(&daemon_program, stdout);
        return 0;
    }
    if (argc == 2 && strcmp(argv[1], "--version") == 0) {
        (void)printf("sluiced %s\n", SLUICE_VERSION);
        return 0;
    }
    conf_defaults(&daemon_program, &d->opt);
    int err = conf_args(&daemon_program, &d->opt, argc, argv, NULL, 0, NULL, &why);
    if (err == 0)
        err = daemon_options_check(&d->opt, &why);
    if (err < 0) {
        (void)fprintf(stderr, "sluiced: %s\n", err_why(&why, err));
        conf_free(&daemon_program, &d->opt);
        return 2;
    }
    log_set_level((enum log_level)d->opt.log_level);
    d->opt.rank +=
        d->opt.node_rank * daemon_comm_local_ranks(&d->opt); /* --rank counts on a host */
    int status = d->opt.rank > 0 ? follow(d, argc, argv) : lead(d, argc, argv);
    conf_free(&daemon_program, &d->opt);
    return status;
}
