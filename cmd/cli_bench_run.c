#include "cmd/cli_bench_run.h"

#include "core/clock.h"
#include "core/mem.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>

struct bench {
    const struct bench_plan *plan;
    const struct load *load;
    struct bench_sample *samples;
    double *last_s;   /* [n] when the last token message of each came */
    int32_t *conn_of; /* [n] connection each was sent on, -1: none */
    struct sluice_client **conns;
    struct pollfd *fds;
    int32_t n_conns, n_alive;
    int32_t next, n_open, n_ended; /* requests: to send next, open, over */
    int32_t *tokens;               /* scratch for one prompt */
    struct clock clock;
    int64_t start_us, shown_us;
    int64_t n_output;
};

static double now_s(const struct bench *b)
{
    return (double)(clock_now_us(&b->clock) - b->start_us) / 1e6;
}

static double due_s(const struct bench *b, int32_t i)
{
    return (double)b->load->requests[i].at_us / 1e6;
}

static void end_request(struct bench *b, int32_t i, bool ok, const char *error)
{
    struct bench_sample *s = &b->samples[i];
    s->ok = ok;
    s->latency_s = now_s(b) - s->start_s;
    (void)snprintf(s->error, sizeof s->error, "%s", error);
    b->conn_of[i] = -1;
    b->n_open--;
    b->n_ended++;
}

static void lose_connection(struct bench *b, int32_t c)
{
    char why[128];
    (void)snprintf(why, sizeof why, "connection lost: %.100s", sluice_error(b->conns[c]));
    for (int32_t i = 0; i < b->next; i++) {
        if (b->conn_of[i] == c)
            end_request(b, i, false, why);
    }
    sluice_close(b->conns[c]);
    b->conns[c] = NULL;
    b->fds[c].fd = -1;
    b->n_alive--;
}

static void on_tokens(struct bench *b, int32_t i, const struct sluice_event *e)
{
    struct bench_sample *s = &b->samples[i];
    double at = now_s(b);
    if (s->output_len == 0) {
        s->ttft_s = at - s->start_s;
    } else {
        if (s->n_itls == s->cap_itls) {
            s->cap_itls = s->cap_itls ? s->cap_itls * 2 : 64;
            s->itls = mem_realloc(s->itls, (size_t)s->cap_itls * sizeof *s->itls);
        }
        s->itls[s->n_itls++] = at - b->last_s[i];
    }
    if (b->plan->hooks.tokens)
        b->plan->hooks.tokens(b->plan->hooks.ctx, i, e->u.tokens.ids, e->u.tokens.n);
    b->last_s[i] = at;
    s->output_len += e->u.tokens.n;
    b->n_output += e->u.tokens.n;
}

static void on_done(struct bench *b, int32_t i, const struct sluice_event *e)
{
    struct bench_sample *s = &b->samples[i];
    enum sluice_reason reason = e->u.done.reason;
    s->cached = e->u.done.cached_tokens;
    s->reachable = e->u.done.reachable;
    s->kept = e->u.done.kept;
    s->decode_reachable = e->u.done.decode_reachable;
    s->decode_kept = e->u.done.decode_kept;
    s->lost_mass = e->u.done.lost_mass;
    s->decode_s = (double)e->u.done.decode_us * 1e-6;
    s->preemptions = e->u.done.preemptions;
    bool ok = reason == SLUICE_STOP || reason == SLUICE_LENGTH || reason == SLUICE_CAPACITY;
    end_request(b, i, ok, ok ? "" : sluice_reason_name((int)reason));
}

static void on_event(struct bench *b, const struct sluice_event *e)
{
    int32_t i = (int32_t)strtol(e->id, NULL, 10);
    if (!e->id[0] || i < 0 || i >= b->next || b->conn_of[i] < 0)
        return;
    if (e->type == SLUICE_TOKENS) {
        on_tokens(b, i, e);
    } else if (e->type == SLUICE_DONE) {
        on_done(b, i, e);
    } else if (e->type == SLUICE_FAILED) {
        char why[128];
        (void)snprintf(why, sizeof why, "%s: %.90s", sluice_code_name(e->u.error.code),
                       e->u.error.message);
        end_request(b, i, false, why);
    }
}

static void drain_connection(struct bench *b, int32_t c)
{
    struct sluice_event e;
    int n;
    while ((n = sluice_next(b->conns[c], &e, 0)) > 0)
        on_event(b, &e);
    if (n < 0)
        lose_connection(b, c);
}

static void send_next(struct bench *b)
{
    int32_t i = b->next++, c = i % b->n_conns;
    const struct load_request *q = &b->load->requests[i];
    struct bench_sample *s = &b->samples[i];
    struct sluice_request r = b->plan->request;
    char id[16];
    while (!b->conns[c])
        c = (c + 1) % b->n_conns;
    (void)snprintf(id, sizeof id, "%d", i);
    if (b->plan->hooks.prompt) {
        b->plan->hooks.prompt(b->plan->hooks.ctx, i, &r);
    } else {
        load_tokens(q, sluice_get_info(b->conns[c])->vocab, b->tokens);
        r.tokens = b->tokens;
    }
    r.id = id;
    r.n_tokens = q->input_len;
    r.max_tokens = q->output_len;
    b->conn_of[i] = c;
    b->n_open++;
    s->class = q->class;
    s->input_len = q->input_len;
    s->start_s = now_s(b);
    s->queue_s = s->start_s - due_s(b, i);
    int err = sluice_submit(b->conns[c], &r);
    if (err == SLUICE_EINVALID)
        end_request(b, i, false, sluice_error(b->conns[c]));
    else if (err < 0)
        lose_connection(b, c);
}

static void show_progress(struct bench *b)
{
    int64_t now = clock_now_us(&b->clock);
    if (!b->plan->progress || now - b->shown_us < 200000)
        return;
    b->shown_us = now;
    (void)fprintf(stderr, "\r%s%d/%d done, %d open, %.0f tok/s\033[K",
                  b->plan->label ? b->plan->label : "", b->n_ended, b->load->n_requests, b->n_open,
                  (double)b->n_output / (now_s(b) + 1e-9));
}

static bool may_send(const struct bench *b)
{
    int32_t cap = b->plan->max_concurrency;
    return b->next < b->load->n_requests && b->n_alive > 0 && (!cap || b->n_open < cap);
}

/* How long to wait for events: until the next arrival, and at most 100 ms for the progress line. */
static int wait_ms(const struct bench *b)
{
    double until = may_send(b) ? (due_s(b, b->next) - now_s(b)) * 1000.0 : 100.0;
    return until < 0.0 ? 0 : until > 100.0 ? 100 : (int)until;
}

static void turn(struct bench *b)
{
    while (may_send(b) && due_s(b, b->next) <= now_s(b))
        send_next(b);
    for (int32_t c = 0; c < b->n_conns; c++) {
        b->fds[c].revents = 0;
        if (b->conns[c])
            b->fds[c].events = sluice_poll_events(b->conns[c]);
    }
    if (poll(b->fds, (nfds_t)b->n_conns, wait_ms(b)) > 0) {
        for (int32_t c = 0; c < b->n_conns; c++) {
            if (b->conns[c] && b->fds[c].revents)
                drain_connection(b, c);
        }
    }
    show_progress(b);
}

/* Nothing is left to send on: what was not sent has failed too. */
static void give_up(struct bench *b)
{
    while (b->next < b->load->n_requests) {
        struct bench_sample *s = &b->samples[b->next++];
        (void)snprintf(s->error, sizeof s->error, "not sent: no connection is left");
        b->n_ended++;
    }
}

static int open_connections(struct bench *b)
{
    for (int32_t c = 0; c < b->n_conns; c++) {
        int code = cli_connect(&b->conns[c], b->plan->target);
        if (code != CLI_OK)
            return code;
        b->n_alive++;
        b->fds[c].fd = sluice_fd(b->conns[c]);
    }
    return CLI_OK;
}

static void bench_init(struct bench *b, const struct bench_plan *plan, struct bench_sample *samples)
{
    size_t n = (size_t)plan->load->n_requests, longest = 1;
    *b = (struct bench){.plan = plan, .load = plan->load, .samples = samples};
    b->n_conns = plan->n_connections;
    b->clock = clock_real();
    b->last_s = mem_zalloc(n, sizeof *b->last_s);
    b->conn_of = mem_zalloc(n, sizeof *b->conn_of);
    b->conns = mem_zalloc((size_t)b->n_conns, sizeof *b->conns);
    b->fds = mem_zalloc((size_t)b->n_conns, sizeof *b->fds);
    for (size_t i = 0; i < n; i++) {
        size_t len = (size_t)plan->load->requests[i].input_len;
        longest = len > longest ? len : longest;
        b->conn_of[i] = -1;
    }
    b->tokens = mem_zalloc(longest, sizeof *b->tokens);
}

static void bench_deinit(struct bench *b)
{
    for (int32_t c = 0; c < b->n_conns; c++)
        sluice_close(b->conns[c]);
    mem_free(b->last_s);
    mem_free(b->conn_of);
    mem_free(b->conns);
    mem_free(b->fds);
    mem_free(b->tokens);
}

int bench_run(const struct bench_plan *plan, struct bench_sample *samples, double *duration_s)
{
    struct bench b;
    bench_init(&b, plan, samples);
    int code = open_connections(&b);
    if (code == CLI_OK) {
        b.start_us = clock_now_us(&b.clock);
        while (b.n_ended < b.load->n_requests) {
            turn(&b);
            if (b.n_alive == 0)
                give_up(&b);
        }
        *duration_s = now_s(&b);
        if (plan->progress)
            (void)fputs("\r\033[K", stderr);
    }
    bench_deinit(&b);
    return code;
}

void bench_samples_free(struct bench_sample *samples, int32_t n)
{
    for (int32_t i = 0; i < n; i++)
        mem_free(samples[i].itls);
    mem_free(samples);
}
