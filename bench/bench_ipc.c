/* The protocol's own cost: SUBMIT .. DONE round trips a second through a real Unix socket, with an
 * engine that answers ACCEPTED, TOKENS and DONE at once. The server runs in one thread, the client
 * library in another (two cores); requests are pipelined over a few connections. Every answer is
 * checked.
 *   bench_ipc [--json] [--requests N] [--connections N] [--depth N] [--tokens N] */
#include "core/clock.h"
#include "core/err.h"
#include "core/log.h"
#include "core/mem.h"
#include "ipc/client.h"
#include "ipc/server.h"

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 64, REPEATS = 5 };

struct options {
    bool json;
    int requests, connections, depth, tokens;
};

/* --- the null engine --- */

struct engine {
    uv_loop_t loop;
    uv_async_t stop;
    struct ipc_server *server;
    int64_t cpu_us; /* of its thread, when it has ended */
};

static void on_open(void *ctx, uint64_t conn, const struct ipc_hello *m)
{
    (void)ctx, (void)conn, (void)m;
}

static void on_submit(void *ctx, uint64_t conn, const struct ipc_submit *m)
{
    const struct engine *e = ctx;
    struct ipc_tokens t = {.n_tokens = 1, .tokens = m->tokens};
    struct ipc_done d = {.reason = IPC_REASON_LENGTH, .stop_token = -1, .completion_tokens = 1};
    memcpy(t.id, m->id, sizeof t.id);
    memcpy(d.id, m->id, sizeof d.id);
    d.prompt_tokens = m->n_tokens;
    ipc_send_accepted(e->server, conn, m->id);
    ipc_send_tokens(e->server, conn, &t);
    ipc_send_done(e->server, conn, &d);
}

static void on_cancel(void *ctx, uint64_t conn, const struct ipc_cancel *m)
{
    (void)ctx, (void)conn, (void)m;
}

static void on_control(void *ctx, uint64_t conn, uint64_t tag)
{
    const struct engine *e = ctx;
    ipc_send_ok(e->server, conn, tag);
}

static void on_drain(void *ctx, uint64_t conn, const struct ipc_drain *m)
{
    on_control(ctx, conn, m->tag);
}

static void on_close(void *ctx, uint64_t conn, void *user, int reason)
{
    (void)ctx, (void)conn, (void)user, (void)reason;
}

static void on_stop(uv_async_t *h)
{
    struct engine *e = h->data;
    ipc_server_close(e->server, 0, NULL, NULL);
    uv_close((uv_handle_t *)h, NULL);
}

static int64_t thread_cpu_us(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static void *run_engine(void *arg)
{
    struct engine *e = arg;
    (void)uv_run(&e->loop, UV_RUN_DEFAULT);
    e->cpu_us = thread_cpu_us();
    return NULL;
}

static int engine_start(struct engine *e, const char *address, struct err_msg *why)
{
    struct ipc_server_config c = {.max_connections = MAX_CONNECTIONS};
    c.handlers = (struct ipc_handlers){
        .ctx = e,
        .open = on_open,
        .submit = on_submit,
        .cancel = on_cancel,
        .stats = on_control,
        .health = on_control,
        .drain = on_drain,
        .shutdown = on_control,
        .reset_prefix_cache = on_control,
        .close = on_close,
    };
    ipc_body_init(IPC_HELLO_OK, &c.info);
    c.info.vocab = 128256;
    TRY(uv_loop_init(&e->loop));
    TRY(uv_async_init(&e->loop, &e->stop, on_stop));
    e->stop.data = e;
    TRY(ipc_server_create(&e->server, &e->loop, &c, why));
    return ipc_server_listen(e->server, address, why);
}

/* --- the client --- */

struct lane {
    struct sluice_client *c;
    int sent, done, tokens;
};

struct load {
    const struct options *o;
    struct lane lanes[MAX_CONNECTIONS];
    int32_t *prompt;
    int sent, done;
};

static int fill(struct load *l, struct lane *lane)
{
    char id[16];
    struct sluice_request r;
    sluice_request_init(&r);
    r.id = id;
    r.tokens = l->prompt;
    r.n_tokens = l->o->tokens;
    while (l->sent < l->o->requests && lane->sent - lane->done < l->o->depth) {
        (void)snprintf(id, sizeof id, "%d", lane->sent);
        TRY(sluice_submit(lane->c, &r));
        lane->sent++;
        l->sent++;
    }
    return 0;
}

static int drain(struct load *l, struct lane *lane)
{
    struct sluice_event e;
    int rc;
    while ((rc = sluice_next(lane->c, &e, 0)) > 0) {
        if (e.type == SLUICE_TOKENS)
            lane->tokens += e.u.tokens.n;
        if (!sluice_event_is_last(&e))
            continue;
        if (e.type != SLUICE_DONE || strtol(e.id, NULL, 10) != lane->done ||
            e.u.done.prompt_tokens != l->o->tokens || lane->tokens != lane->done + 1)
            return ERR_INTERNAL;
        lane->done++;
        l->done++;
    }
    return rc;
}

/* Refills are collected until half the window is free, so that both sides work in batches. */
static int turn(struct load *l, struct pollfd *fds)
{
    if (poll(fds, (nfds_t)l->o->connections, 5000) <= 0)
        return ERR_INTERNAL;
    for (int i = 0; i < l->o->connections; i++) {
        struct lane *lane = &l->lanes[i];
        if (fds[i].revents)
            TRY(drain(l, lane));
        if (lane->sent - lane->done <= l->o->depth / 2)
            TRY(fill(l, lane));
        fds[i].events = sluice_poll_events(lane->c);
    }
    return 0;
}

static int run_load(struct load *l)
{
    struct pollfd fds[MAX_CONNECTIONS];
    l->sent = l->done = 0;
    for (int i = 0; i < l->o->connections; i++) {
        struct lane *lane = &l->lanes[i];
        lane->sent = lane->done = lane->tokens = 0;
        TRY(fill(l, lane));
        fds[i] = (struct pollfd){.fd = sluice_fd(lane->c), .events = sluice_poll_events(lane->c)};
    }
    while (l->done < l->o->requests)
        TRY(turn(l, fds));
    return 0;
}

/* One request at a time on one connection: what a round trip takes. */
static int one_by_one(struct load *l, int n, double *us)
{
    struct options o = *l->o;
    struct load single = {.o = &o, .prompt = l->prompt};
    o.requests = n;
    o.connections = o.depth = 1;
    single.lanes[0].c = l->lanes[0].c;
    int64_t t0 = clock_monotonic_us(NULL);
    TRY(run_load(&single));
    *us = (double)(clock_monotonic_us(NULL) - t0) / n;
    return 0;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int measure(struct load *l, const char *address, double rates[REPEATS], double *single_us)
{
    char why[256];
    for (int i = 0; i < l->o->connections; i++) {
        int err = sluice_connect(&l->lanes[i].c, address, NULL, why, sizeof why);
        if (err < 0) {
            (void)fprintf(stderr, "bench_ipc: %s\n", why);
            return err;
        }
    }
    TRY(run_load(l)); /* warm-up */
    for (int i = 0; i < REPEATS; i++) {
        int64_t t0 = clock_monotonic_us(NULL);
        TRY(run_load(l));
        rates[i] = l->o->requests * 1e6 / (double)(clock_monotonic_us(NULL) - t0);
    }
    qsort(rates, REPEATS, sizeof *rates, compare);
    return one_by_one(l, 2000, single_us);
}

static void report(const struct options *o, const double rates[REPEATS], double single_us,
                   double client_us, double server_us)
{
    double median = rates[REPEATS / 2];
    if (o->json) {
        (void)printf(
            "{\"round_trips_per_s\": %.0f, \"best\": %.0f, \"worst\": %.0f, "
            "\"single_round_trip_us\": %.2f, \"client_cpu_us\": %.2f, \"server_cpu_us\": %.2f, "
            "\"connections\": %d, \"depth\": %d, \"prompt_tokens\": %d}\n",
            median, rates[REPEATS - 1], rates[0], single_us, client_us, server_us, o->connections,
            o->depth, o->tokens);
        return;
    }
    (void)printf("%d connections, %d requests in flight on each, %d prompt tokens\n",
                 o->connections, o->depth, o->tokens);
    (void)printf("SUBMIT .. DONE   %.0f round trips/s (median of %d; %.0f to %.0f)\n", median,
                 REPEATS, rates[0], rates[REPEATS - 1]);
    (void)printf("CPU a request    client %.2f us, server %.2f us\n", client_us, server_us);
    (void)printf("one at a time    %.1f us a round trip\n", single_us);
}

static int parse(struct options *o, int argc, char **argv)
{
    struct {
        const char *name;
        int *value;
        int max;
    } ints[] = {{"--requests", &o->requests, 100000000},
                {"--connections", &o->connections, MAX_CONNECTIONS},
                {"--depth", &o->depth, 100000},
                {"--tokens", &o->tokens, 1000000}};
    for (int i = 1; i < argc; i++) {
        size_t k = 0;
        if (strcmp(argv[i], "--json") == 0) {
            o->json = true;
            continue;
        }
        while (k < 4 && strcmp(argv[i], ints[k].name) != 0)
            k++;
        if (k == 4 || i + 1 == argc)
            return ERR_INVALID;
        long v = strtol(argv[++i], NULL, 10);
        if (v < 1 || v > ints[k].max)
            return ERR_INVALID;
        *ints[k].value = (int)v;
    }
    return 0;
}

static int bench(const struct options *o, const char *address)
{
    struct engine e = {0};
    struct err_msg why = {""};
    pthread_t thread;
    double rates[REPEATS] = {0}, single_us = 0;
    struct load l = {.o = o, .prompt = mem_zalloc((size_t)o->tokens, sizeof(int32_t))};
    int err = engine_start(&e, address, &why);
    if (err < 0) {
        (void)fprintf(stderr, "bench_ipc: %s\n", err_why(&why, err));
        mem_free(l.prompt);
        return err;
    }
    if (pthread_create(&thread, NULL, run_engine, &e) != 0)
        abort();
    int64_t cpu0 = thread_cpu_us();
    err = measure(&l, address, rates, &single_us);
    double client_us = (double)(thread_cpu_us() - cpu0);
    for (int i = 0; i < o->connections; i++)
        sluice_close(l.lanes[i].c);
    (void)uv_async_send(&e.stop);
    (void)pthread_join(thread, NULL);
    (void)uv_loop_close(&e.loop);
    mem_free(l.prompt);
    if (err < 0) {
        (void)fprintf(stderr, "bench_ipc: %s\n", err_str(err));
        return err;
    }
    double n = (double)o->requests * (REPEATS + 1) + 2000;
    report(o, rates, single_us, client_us / n, (double)e.cpu_us / n);
    return 0;
}

int main(int argc, char **argv)
{
    struct options o = {.requests = 200000, .connections = 8, .depth = 64, .tokens = 64};
    char dir[] = "/tmp/bench_ipc_XXXXXX", address[64];
    if (parse(&o, argc, argv) < 0) {
        (void)fprintf(stderr,
                      "usage: bench_ipc [--json] [--requests N] [--connections N] [--depth N] "
                      "[--tokens N]\n");
        return 2;
    }
    log_set_level(LOG_WARN);
    if (!mkdtemp(dir)) {
        perror("bench_ipc");
        return 1;
    }
    (void)snprintf(address, sizeof address, "unix:%s/s", dir);
    int err = bench(&o, address);
    (void)rmdir(dir);
    return err < 0;
}
