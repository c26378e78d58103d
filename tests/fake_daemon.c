/* A daemon without a model, for the tests of its clients: it speaks the real protocol
 * (ipc/server.h) and answers from a table. A prompt found in the file FAKE_PROMPTS gets its
 * expected answer; any other prompt gets itself back, token by token. Work is done in ticks of a
 * timer, so that there is progress to see and to interrupt. FAKE_FAULT names one thing to do wrong:
 *   wrong      answers are off by one          leak       pages of a cancelled request stay in use
 *   numeric    every request fails             stat       STATS lacks a name
 *   die        exits in the middle             exit       ends with code 3 after SIGTERM
 *   stall      stops answering                 deaf       ignores SIGTERM
 *   sparse     wrong only where the prompt is not attended to densely */
#include "cmd/demo_plan.h"
#include "core/mem.h"
#include "ipc/server.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

enum { TICK_MS = 2, TICK_TOKENS = 2048, MAX_OPEN = 256, VOCAB = 512 };

struct job {
    bool open;
    uint64_t conn;
    char id[IPC_ID_BYTES + 1];
    int32_t *tokens; /* prompt; then what to answer */
    int32_t n, computed, answer_at, n_answer, max_tokens, logprobs;
    int32_t cached;
    bool dense;
    const struct demo_prompt *known;
};

struct fake {
    uv_loop_t loop;
    uv_timer_t timer;
    uv_signal_t term;
    struct ipc_server *server;
    const char *fault;
    struct demo_prompt prompts[DEMO_USERS];
    struct job jobs[MAX_OPEN];
    int64_t pages, peak, leaked, reachable, kept, errors, prompt_tokens, cached_tokens, generated;
    int32_t n_done;
    bool draining, warm; /* warm: some prompt was computed since the cache was emptied */
    int exit_code;
};

static bool fault(const struct fake *f, const char *name)
{
    return f->fault && strcmp(f->fault, name) == 0;
}

static int64_t pages_of(const struct job *j)
{
    return (j->n + 63) / 64;
}

static void end_job(struct fake *f, struct job *j)
{
    j->open = false;
    f->pages -= pages_of(j);
    mem_free(j->tokens);
    j->tokens = NULL;
}

static void on_submit(void *ctx, uint64_t conn, const struct ipc_submit *m)
{
    struct fake *f = ctx;
    struct job *j = f->jobs;
    struct err_msg why;
    if (f->draining) {
        ipc_send_failure(f->server, conn, m->id, ERR_DRAINING, NULL, 0);
        return;
    }
    if (m->n_tokens > 20000) {
        (void)err_set(&why, ERR_TOO_LONG, "prompt of %d tokens; at most 20000", m->n_tokens);
        ipc_send_failure(f->server, conn, m->id, ERR_TOO_LONG, &why, 0);
        return;
    }
    while (j < f->jobs + MAX_OPEN && j->open)
        j++;
    if (j == f->jobs + MAX_OPEN) {
        ipc_send_failure(f->server, conn, m->id, ERR_QUEUE_FULL, NULL, 100);
        return;
    }
    *j = (struct job){.open = true,
                      .conn = conn,
                      .n = m->n_tokens,
                      .max_tokens = m->max_tokens,
                      .logprobs = m->logprobs,
                      .dense = m->sparse.mode == IPC_SPARSE_DENSE};
    memcpy(j->id, m->id, sizeof j->id);
    j->tokens = mem_alloc((size_t)m->n_tokens * sizeof *j->tokens);
    memcpy(j->tokens, m->tokens, (size_t)m->n_tokens * sizeof *j->tokens);
    for (int u = 0; u < DEMO_USERS; u++) {
        const struct demo_ids *p = &f->prompts[u].prompt;
        if (p->n == j->n && memcmp(p->ids, j->tokens, (size_t)j->n * sizeof *j->tokens) == 0)
            j->known = &f->prompts[u];
    }
    /* The demo's seventh user shares its documents with the first. */
    if (j->known == &f->prompts[6] && f->warm)
        j->computed = j->cached = 7936;
    f->pages += pages_of(j);
    f->peak = f->pages > f->peak ? f->pages : f->peak;
    ipc_send_accepted(f->server, conn, m->id);
}

static void on_cancel(void *ctx, uint64_t conn, const struct ipc_cancel *m)
{
    struct fake *f = ctx;
    for (int i = 0; i < MAX_OPEN; i++) {
        struct job *j = &f->jobs[i];
        for (int32_t k = 0; k < m->n_ids && j->open && j->conn == conn; k++) {
            struct ipc_done done = {.reason = IPC_REASON_CANCELLED, .stop_token = -1};
            if (strcmp(j->id, m->ids[k]) != 0)
                continue;
            memcpy(done.id, j->id, sizeof done.id);
            ipc_send_done(f->server, conn, &done);
            end_job(f, j);
        }
    }
}

static void prefill(struct fake *f, struct job *j)
{
    struct ipc_progress p = {.prompt_len = j->n, .cached = j->cached};
    j->computed = j->computed + TICK_TOKENS < j->n ? j->computed + TICK_TOKENS : j->n;
    p.computed = j->computed;
    f->warm |= j->computed == j->n;
    memcpy(p.id, j->id, sizeof p.id);
    ipc_send_progress(f->server, j->conn, &p);
    if (fault(f, "die") && j->computed > 4000)
        _Exit(9);
}

static void send_token(struct fake *f, struct job *j)
{
    const struct demo_ids *e = j->known ? &j->known->expected : NULL;
    int32_t id = e ? e->ids[j->answer_at] : j->tokens[j->answer_at % j->n];
    if (e && (fault(f, "wrong") || (fault(f, "sparse") && !j->dense)))
        id = (id + 1) % VOCAB;
    struct ipc_logprob lp = {.token = id, .logprob = -0.25f, .n_top = j->logprobs};
    for (int32_t i = 0; i < j->logprobs; i++) {
        lp.top_ids[i] = (id + i) % VOCAB;
        lp.top_logprobs[i] = -0.25f - (float)i;
    }
    struct ipc_tokens t = {
        .seq = j->answer_at, .n_tokens = 1, .tokens = &id, .logprobs = j->logprobs ? &lp : NULL};
    memcpy(t.id, j->id, sizeof t.id);
    ipc_send_tokens(f->server, j->conn, &t);
    j->answer_at++;
}

static void finish(struct fake *f, struct job *j)
{
    struct ipc_done d = {.reason = j->known ? IPC_REASON_STOP : IPC_REASON_LENGTH,
                         .stop_token = j->known ? 2 : -1,
                         .prompt_tokens = j->n,
                         .cached_tokens = j->cached,
                         .completion_tokens = j->answer_at,
                         .queue_us = 10,
                         .prefill_us = 2000,
                         .ttft_us = 2500,
                         .decode_us = 700};
    int64_t rows = (j->n + 127) / 128;
    d.reachable = (uint64_t)(rows * (rows + 1));
    d.visited = d.reachable;
    d.kept = j->dense ? d.reachable : d.reachable * 2 / 5;
    memcpy(d.id, j->id, sizeof d.id);
    f->reachable += (int64_t)d.reachable;
    f->kept += (int64_t)d.kept;
    f->prompt_tokens += j->n;
    f->cached_tokens += j->cached;
    f->generated += j->answer_at;
    f->n_done++;
    ipc_send_done(f->server, j->conn, &d);
    end_job(f, j);
}

static void closed(void *arg)
{
    struct fake *f = arg;
    uv_close((uv_handle_t *)&f->timer, NULL);
    uv_close((uv_handle_t *)&f->term, NULL);
}

static void tick(uv_timer_t *t)
{
    struct fake *f = t->data;
    bool any = false;
    for (int i = 0; i < MAX_OPEN; i++) {
        struct job *j = &f->jobs[i];
        any |= j->open;
        if (!j->open || fault(f, "stall"))
            continue;
        if (fault(f, "numeric")) {
            ipc_send_failure(f->server, j->conn, j->id, ERR_NUMERIC, NULL, 0);
            f->errors++;
            end_job(f, j);
        } else if (j->computed < j->n) {
            prefill(f, j);
        } else if (j->answer_at < (j->known ? j->known->expected.n : j->max_tokens)) {
            send_token(f, j);
        } else {
            finish(f, j);
        }
    }
    if (f->draining && !any && f->server) {
        struct ipc_server *s = f->server;
        f->server = NULL;
        ipc_server_close(s, 100, closed, f);
    }
}

static void begin_drain(struct fake *f)
{
    if (!f->draining)
        ipc_server_goaway(f->server, "draining", 0);
    f->draining = true;
}

static void on_open(void *ctx, uint64_t conn, const struct ipc_hello *m)
{
    (void)ctx;
    (void)conn;
    (void)m;
}

static void on_stats(void *ctx, uint64_t conn, uint64_t tag)
{
    struct fake *f = ctx;
    const struct ipc_stat all[] = {{"kv_pages_total", true, 4096, 0},
                                   {"kv_pages_used", true, f->pages + f->leaked, 0},
                                   {"kv_pages_peak", true, f->peak, 0},
                                   {"kv_pages_free", true, 4096 - f->pages, 0},
                                   {"attention_us", true, f->kept * 10, 0},
                                   {"gemm_us", true, f->prompt_tokens, 0},
                                   {"step_us", true, f->prompt_tokens * 2, 0},
                                   {"steps", true, f->n_done, 0},
                                   {"requests_running", true, 0, 0},
                                   {"requests_waiting", true, 0, 0},
                                   {"prompt_tokens", true, f->prompt_tokens, 0},
                                   {"cached_tokens", true, f->cached_tokens, 0},
                                   {"generated_tokens", true, f->generated, 0},
                                   {"pages_reachable", true, f->reachable, 0},
                                   {"pages_visited", true, f->reachable, 0},
                                   {"errors", true, f->errors, 0},
                                   {"load", false, 0, 0.5},
                                   {"pages_kept", true, f->kept, 0}};
    int32_t n = (int32_t)(sizeof all / sizeof all[0]);
    struct ipc_stats_ok m = {.tag = tag, .n_stats = fault(f, "stat") ? n - 1 : n, .stats = all};
    ipc_send_stats_ok(f->server, conn, &m);
}

static void on_health(void *ctx, uint64_t conn, uint64_t tag)
{
    struct fake *f = ctx;
    struct ipc_health_ok m = {.tag = tag,
                              .live = true,
                              .ready = !f->draining,
                              .draining = f->draining,
                              .state = "serving"};
    ipc_send_health_ok(f->server, conn, &m);
}

static void on_drain(void *ctx, uint64_t conn, const struct ipc_drain *m)
{
    struct fake *f = ctx;
    ipc_send_ok(f->server, conn, m->tag);
    begin_drain(f);
}

static void on_shutdown(void *ctx, uint64_t conn, uint64_t tag)
{
    struct fake *f = ctx;
    ipc_send_ok(f->server, conn, tag);
    begin_drain(f);
}

static void on_reset(void *ctx, uint64_t conn, uint64_t tag)
{
    struct fake *f = ctx;
    f->warm = false;
    ipc_send_ok(f->server, conn, tag);
}

static void on_close(void *ctx, uint64_t conn, void *user, int reason)
{
    struct fake *f = ctx;
    (void)user;
    (void)reason;
    for (int i = 0; i < MAX_OPEN; i++) {
        struct job *j = &f->jobs[i];
        if (!j->open || j->conn != conn)
            continue;
        if (fault(f, "leak"))
            f->leaked += pages_of(j);
        end_job(f, j);
    }
}

static void on_signal(uv_signal_t *s, int number)
{
    struct fake *f = s->data;
    (void)number;
    if (fault(f, "deaf"))
        return;
    if (fault(f, "exit"))
        f->exit_code = 3;
    begin_drain(f);
}

static const char *flag(int argc, char **argv, const char *name)
{
    for (int i = 1; i + 1 < argc; i++) {
        if (strcmp(argv[i], name) == 0)
            return argv[i + 1];
    }
    return NULL;
}

static int serve(struct fake *f, const char *address)
{
    struct err_msg why = {""};
    struct ipc_server_config cfg = {
        .handlers = {f, on_open, on_submit, on_cancel, on_stats, on_health, on_drain, on_shutdown,
                     on_reset, NULL, on_close},
        .info = {.version = "fake",
                 .instance_id = "0",
                 .model = "fake",
                 .vocab = VOCAB,
                 .max_model_len = 32768,
                 .max_servable_tokens = 20001,
                 .block_size = 64,
                 .num_blocks = 4096,
                 .kv_dtype = "f32",
                 .device = "none",
                 .tp = 1,
                 .n_modes = 3,
                 .modes = {IPC_SPARSE_DENSE, IPC_SPARSE_ABS, IPC_SPARSE_REL},
                 .n_levels = 3,
                 .k_levels = {16, 32, 64},
                 .gate_rows = 128}};
    int err = ipc_server_create(&f->server, &f->loop, &cfg, &why);
    if (err == 0)
        err = ipc_server_listen(f->server, address, &why);
    if (err < 0) {
        (void)fprintf(stderr, "fake_daemon: %s\n", err_why(&why, err));
        return 1;
    }
    (void)uv_timer_init(&f->loop, &f->timer);
    (void)uv_signal_init(&f->loop, &f->term);
    f->timer.data = f->term.data = f;
    (void)uv_timer_start(&f->timer, tick, TICK_MS, TICK_MS);
    (void)uv_signal_start(&f->term, on_signal, SIGTERM);
    (void)uv_run(&f->loop, UV_RUN_DEFAULT);
    return f->exit_code;
}

int main(int argc, char **argv)
{
    const char *address = flag(argc, argv, "--listen");
    const char *prompts = getenv("FAKE_PROMPTS"); // NOLINT(concurrency-mt-unsafe)
    struct fake *f = mem_zalloc(1, sizeof *f);
    struct err_msg why = {""};
    f->fault = getenv("FAKE_FAULT"); // NOLINT(concurrency-mt-unsafe)
    if (prompts && demo_prompts_load(f->prompts, prompts, &why) < 0) {
        (void)fprintf(stderr, "fake_daemon: %s\n", why.text);
        return 1;
    }
    (void)uv_loop_init(&f->loop);
    int code = serve(f, address ? address : "unix:/tmp/fake.sock");
    (void)uv_loop_close(&f->loop);
    demo_prompts_free(f->prompts);
    mem_free(f);
    return code;
}
