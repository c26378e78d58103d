#include "cmd/demo_run.h"

#include "core/clock.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>

struct visitor {
    struct sluice_client *client; /* NULL: not here */
    bool accepted;
    int64_t sent_us;
};

struct run {
    const struct demo_scene *scene;
    const struct demo_mode *mode;
    struct demo_round *out;
    struct visitor visitors[DEMO_USERS];
    struct clock clock;
    int64_t start_us, event_us, sampled_us;
};

static void leave(struct run *r, int u, enum demo_state state)
{
    r->out->users[u].state = state;
    sluice_close(r->visitors[u].client);
    r->visitors[u].client = NULL;
}

static void broken(struct run *r, int u, const char *what, const char *why)
{
    struct demo_answer *a = &r->out->users[u];
    (void)snprintf(a->problem, sizeof a->problem, "%s: %s", what, why);
    leave(r, u, DEMO_BROKEN);
}

static void ask(struct run *r, int u)
{
    const struct demo_prompt *p = &r->scene->prompts[u];
    struct visitor *v = &r->visitors[u];
    struct sluice_options o = {.name = demo_users[u].name};
    struct sluice_request q;
    char why[160] = "";

    r->out->users[u].state = DEMO_WAITING;
    if (sluice_connect(&v->client, r->scene->daemon->address, &o, why, sizeof why) < 0) {
        broken(r, u, "cannot connect", why);
        return;
    }
    sluice_request_init(&q);
    q.id = demo_users[u].name;
    q.tokens = p->prompt.ids;
    q.n_tokens = p->prompt.n;
    q.max_tokens = p->expected.n;
    q.temperature = 0;
    q.sparse = r->mode->sparse;
    q.k = r->mode->k;
    q.ln_lambda = r->mode->ln_lambda;
    q.gate_rows = r->mode->gate_rows;
    v->sent_us = clock_now_us(&r->clock);
    if (sluice_submit(v->client, &q) < 0)
        broken(r, u, "cannot ask", sluice_error(v->client));
}

/* Whether what user u waits for has happened. */
static bool may_come(const struct run *r, int u)
{
    int first = demo_users[u].after;
    if (first < 0)
        return true;
    const struct demo_answer *a = &r->out->users[first];
    if (a->state != DEMO_AWAY && a->state != DEMO_WAITING)
        return true;
    const struct demo_prompt *p = r->scene->prompts;
    return demo_users[u].after_prefix ? a->computed >= demo_shared_prefix(&p[first], &p[u])
                                      : r->visitors[first].accepted;
}

static void on_tokens(struct run *r, int u, const struct sluice_event *e)
{
    struct demo_answer *a = &r->out->users[u];
    if (a->n_tokens == 0)
        a->ttft_us = clock_now_us(&r->clock) - r->visitors[u].sent_us;
    for (int32_t i = 0; i < e->u.tokens.n && a->n_tokens < DEMO_MAX_ANSWER; i++)
        a->tokens[a->n_tokens++] = e->u.tokens.ids[i];
}

static void on_done(struct run *r, int u, const struct sluice_event *e)
{
    struct demo_answer *a = &r->out->users[u];
    if (e->u.done.reason != SLUICE_STOP && e->u.done.reason != SLUICE_LENGTH) {
        broken(r, u, "ended early", sluice_reason_name((int)e->u.done.reason));
        return;
    }
    a->cached = e->u.done.cached_tokens;
    a->reachable = e->u.done.reachable;
    a->kept = e->u.done.kept;
    a->score = demo_score(&r->scene->prompts[u], a->tokens, a->n_tokens, &a->exact);
    leave(r, u, DEMO_ANSWERED);
}

static void on_event(struct run *r, int u, const struct sluice_event *e)
{
    struct demo_answer *a = &r->out->users[u];
    r->event_us = clock_now_us(&r->clock);
    switch (e->type) {
    case SLUICE_ACCEPTED: r->visitors[u].accepted = true; break;
    case SLUICE_PROGRESS:
        a->computed = e->u.progress.computed;
        a->cached = e->u.progress.cached;
        if (demo_users[u].leaves_at > 0 &&
            a->computed >= demo_users[u].leaves_at * r->scene->prompts[u].prompt.n)
            leave(r, u, DEMO_LEFT);
        break;
    case SLUICE_TOKENS: on_tokens(r, u, e); break;
    case SLUICE_DONE: on_done(r, u, e); break;
    case SLUICE_FAILED:
    case SLUICE_REFUSED: broken(r, u, sluice_code_name(e->u.error.code), e->u.error.message); break;
    case SLUICE_GOING_AWAY: broken(r, u, "the daemon goes away", e->u.goaway.reason); break;
    }
}

static void hear(struct run *r, int u)
{
    struct sluice_event e;
    int n = 1;
    while (r->visitors[u].client && n > 0) {
        n = sluice_next(r->visitors[u].client, &e, 0);
        if (n > 0)
            on_event(r, u, &e);
        else if (n < 0)
            broken(r, u, "connection lost", sluice_error(r->visitors[u].client));
    }
}

/* 78 columns, so that it fits any terminal. */
static void show_progress(const struct run *r)
{
    (void)fprintf(stderr, "\r%-9.9s%4.0fs", r->mode->name,
                  (double)(clock_now_us(&r->clock) - r->start_us) / 1e6);
    for (int u = 0; u < DEMO_USERS; u++) {
        const struct demo_answer *a = &r->out->users[u];
        int n = r->scene->prompts[u].prompt.n;
        (void)fprintf(stderr, " %s ", demo_users[u].name);
        switch (a->state) {
        case DEMO_AWAY: (void)fputs("  .", stderr); break;
        case DEMO_WAITING: (void)fprintf(stderr, "%2d%%", a->computed * 99 / n); break;
        case DEMO_ANSWERED: (void)fputs(a->exact ? " ok" : "bad", stderr); break;
        case DEMO_LEFT: (void)fputs("bye", stderr); break;
        case DEMO_BROKEN: (void)fputs("ERR", stderr); break;
        }
    }
    (void)fputs("\033[K", stderr);
}

/* Several times a second: pages in use, the live line, the daemon's life, stalls. */
static int sample(struct run *r, struct err_msg *why)
{
    struct demo_stats s;
    int64_t now = clock_now_us(&r->clock);
    if (now - r->sampled_us < 200000)
        return 0;
    r->sampled_us = now;
    TRY(demo_daemon_check(r->scene->daemon, why));
    TRY(demo_stats_read(&s, r->scene->control, why));
    if (s.kv_pages_used > r->out->peak_pages)
        r->out->peak_pages = s.kv_pages_used;
    if (r->scene->progress)
        show_progress(r);
    if (now - r->event_us > r->scene->stall_us)
        return err_set(why, -ETIMEDOUT, "nothing was heard from the daemon for %" PRId64 " s",
                       r->scene->stall_us / 1000000);
    return 0;
}

/* One round of waiting. Returns the number of users that are still to come or here. */
static int turn(struct run *r, struct err_msg *why)
{
    struct pollfd fds[DEMO_USERS + 1];
    int left = 0;
    for (int u = 0; u < DEMO_USERS; u++) {
        if (r->out->users[u].state == DEMO_AWAY && may_come(r, u))
            ask(r, u);
        struct sluice_client *c = r->visitors[u].client;
        fds[u] = (struct pollfd){-1, 0, 0};
        if (c)
            fds[u] = (struct pollfd){sluice_fd(c), sluice_poll_events(c), 0};
        left += c != NULL || r->out->users[u].state == DEMO_AWAY;
    }
    fds[DEMO_USERS] = (struct pollfd){r->scene->signal_fd, POLLIN, 0};
    if (left && poll(fds, DEMO_USERS + 1, 100) < 0 && errno != EINTR)
        return err_set(why, -errno, "poll: %s", err_str(-errno));
    if (fds[DEMO_USERS].revents)
        return err_set(why, -EINTR, "interrupted");
    for (int u = 0; u < DEMO_USERS; u++) {
        if (fds[u].revents)
            hear(r, u);
    }
    TRY(sample(r, why));
    return left;
}

/* Everybody is gone: within moments no request may run and no page may be in use. */
static int settle(struct run *r, struct err_msg *why)
{
    struct demo_stats *s = &r->out->after;
    struct pollfd wait = {r->scene->signal_fd, POLLIN, 0};
    int64_t limit = r->scene->stall_us < 10000000 ? r->scene->stall_us : 10000000;
    int64_t until = clock_now_us(&r->clock) + limit;
    do {
        if (poll(&wait, 1, 20) > 0)
            return err_set(why, -EINTR, "interrupted");
        TRY(demo_stats_read(s, r->scene->control, why));
        r->out->leaked = s->kv_pages_used || s->requests_running || s->requests_waiting;
    } while (r->out->leaked && clock_now_us(&r->clock) < until);
    return 0;
}

int demo_run(struct demo_round *out, const struct demo_scene *scene, const struct demo_mode *mode,
             struct err_msg *why)
{
    struct run r = {.scene = scene, .mode = mode, .out = out, .clock = clock_real()};
    int left;
    memset(out, 0, sizeof *out);
    TRY(demo_stats_read(&out->before, scene->control, why));
    r.start_us = r.event_us = clock_now_us(&r.clock);
    while ((left = turn(&r, why)) > 0)
        ;
    out->wall_us = clock_now_us(&r.clock) - r.start_us;
    if (scene->progress)
        (void)fputs("\r\033[K", stderr);
    if (left == 0)
        left = settle(&r, why);
    /* The daemon's own peak is exact, but is since its start: it tells when it grew here. */
    if (left == 0 && out->after.kv_pages_peak > out->before.kv_pages_peak)
        out->peak_pages = out->after.kv_pages_peak;
    for (int u = 0; u < DEMO_USERS; u++)
        sluice_close(r.visitors[u].client);
    return left;
}
