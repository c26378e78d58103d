/* What the daemon says: events of requests, and replies to questions. Replies are told from events
 * by their tag; events that come while one waits for a reply are kept as packed messages, in order.
 */
#include "ipc/client_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* --- events --- */

static int tokens_event(struct sluice_client *c, struct sluice_event *e)
{
    const struct ipc_tokens *m = &c->msg.u.tokens;
    e->u.tokens.first = m->seq;
    e->u.tokens.n = m->n_tokens;
    e->u.tokens.ids = m->tokens;
    e->u.tokens.logprobs = NULL;
    if (!m->logprobs || m->n_tokens == 0)
        return 0;
    size_t n = (size_t)m->n_tokens;
    struct sluice_logprob *l = realloc(c->logprobs, n * sizeof *l);
    if (!l)
        return -ENOMEM;
    c->logprobs = l;
    for (size_t i = 0; i < n; i++) {
        l[i].token = m->logprobs[i].token;
        l[i].logprob = m->logprobs[i].logprob;
        l[i].n_top = m->logprobs[i].n_top;
        memcpy(l[i].top_ids, m->logprobs[i].top_ids, sizeof l[i].top_ids);
        memcpy(l[i].top_logprobs, m->logprobs[i].top_logprobs, sizeof l[i].top_logprobs);
    }
    e->u.tokens.logprobs = l;
    return 0;
}

static void done_event(const struct ipc_done *m, struct sluice_event *e)
{
    e->u.done.reason = (enum sluice_reason)m->reason;
    e->u.done.stop_token = m->stop_token;
    e->u.done.prompt_tokens = m->prompt_tokens;
    e->u.done.cached_tokens = m->cached_tokens;
    e->u.done.completion_tokens = m->completion_tokens;
    e->u.done.preemptions = m->preemptions;
    e->u.done.queue_us = m->queue_us;
    e->u.done.prefill_us = m->prefill_us;
    e->u.done.ttft_us = m->ttft_us;
    e->u.done.decode_us = m->decode_us;
    e->u.done.reachable = m->reachable;
    e->u.done.visited = m->visited;
    e->u.done.kept = m->kept;
    e->u.done.decode_reachable = m->decode_reachable;
    e->u.done.decode_kept = m->decode_kept;
    e->u.done.lost_mass_samples = m->lost_mass_samples;
    e->u.done.lost_mass = m->lost_mass;
}

static void error_event(const struct ipc_error *m, struct sluice_event *e)
{
    e->type = m->id[0] ? SLUICE_FAILED : SLUICE_REFUSED;
    e->id = m->id;
    e->u.error.code = m->code;
    e->u.error.message = m->message;
    e->u.error.retryable = m->retryable;
    e->u.error.retry_after_ms = m->retry_after_ms;
}

/* 1: c->msg is an event; 0: something to pass over (a late reply, a message of a newer version). */
static int to_event(struct sluice_client *c, struct sluice_event *e)
{
    const struct ipc_msg *m = &c->msg;
    memset(e, 0, sizeof *e);
    e->id = "";
    switch ((int)m->type) {
    case IPC_ACCEPTED:
        e->type = SLUICE_ACCEPTED;
        e->id = m->u.accepted.id;
        return 1;
    case IPC_PROGRESS:
        e->type = SLUICE_PROGRESS;
        e->id = m->u.progress.id;
        e->u.progress.computed = m->u.progress.computed;
        e->u.progress.prompt_len = m->u.progress.prompt_len;
        e->u.progress.cached = m->u.progress.cached;
        return 1;
    case IPC_TOKENS:
        e->type = SLUICE_TOKENS;
        e->id = m->u.tokens.id;
        TRY(tokens_event(c, e));
        return 1;
    case IPC_DONE:
        e->type = SLUICE_DONE;
        e->id = m->u.done.id;
        done_event(&m->u.done, e);
        return 1;
    case IPC_ERROR: error_event(&m->u.error, e); return 1;
    case IPC_GOAWAY:
        e->type = SLUICE_GOING_AWAY;
        e->u.goaway.reason = m->u.goaway.reason;
        e->u.goaway.deadline_ms = m->u.goaway.deadline_ms;
        return 1;
    default: return 0;
    }
}

static int take_kept(struct sluice_client *c)
{
    struct kept *k = c->first_kept;
    if (!k)
        return 0;
    c->first_kept = k->next;
    if (!k->next)
        c->last_kept = &c->first_kept;
    int rc = client_unpack(c, k->payload, k->len);
    /* Nothing in a read message points into the payload. */
    free(k);
    return rc < 0 ? rc : 1;
}

int sluice_next(struct sluice_client *c, struct sluice_event *event, int timeout_ms)
{
    int64_t deadline = client_deadline(timeout_ms);
    const uint8_t *payload = NULL;
    size_t len = 0;
    if (!c->broken)
        c->why.text[0] = '\0';
    for (;;) {
        int rc = take_kept(c);
        if (rc == 0) {
            rc = client_next_payload(c, &payload, &len, deadline);
            if (rc <= 0)
                return rc;
            rc = client_unpack(c, payload, len);
        }
        if (rc == ERR_UNSUPPORTED)
            continue;
        TRY(rc);
        rc = to_event(c, event);
        if (rc < 0)
            return client_broken(c, rc);
        if (rc > 0)
            return rc;
    }
}

/* --- questions --- */

static int keep(struct sluice_client *c, const uint8_t *payload, size_t len)
{
    struct kept *k = malloc(sizeof *k + len);
    if (!k)
        return client_broken(c, -ENOMEM);
    k->next = NULL;
    k->len = len;
    memcpy(k->payload, payload, len);
    *c->last_kept = k;
    c->last_kept = &k->next;
    return 0;
}

static uint64_t reply_tag(const struct ipc_msg *m)
{
    switch ((int)m->type) {
    case IPC_STATS_OK: return m->u.stats_ok.tag;
    case IPC_HEALTH_OK: return m->u.health_ok.tag;
    case IPC_OK:
    case IPC_PONG: return m->u.control.tag;
    case IPC_ERROR: return m->u.error.tag;
    default: return 0;
    }
}

/* Waits for the reply with this tag; it is then in c->msg. */
static int await(struct sluice_client *c, uint64_t tag, enum ipc_type wanted, int timeout_ms)
{
    int64_t deadline = client_deadline(timeout_ms);
    const uint8_t *payload = NULL;
    size_t len = 0;
    for (;;) {
        int rc = client_next_payload(c, &payload, &len, deadline);
        if (rc == 0)
            return err_set(&c->why, -ETIMEDOUT, "no answer in time");
        TRY(rc);
        rc = client_unpack(c, payload, len);
        if (rc == ERR_UNSUPPORTED)
            continue;
        TRY(rc);
        if (reply_tag(&c->msg) != tag) {
            TRY(keep(c, payload, len));
            continue;
        }
        if (c->msg.type == wanted)
            return 0;
        if (c->msg.type == IPC_ERROR)
            return err_set(&c->why, SLUICE_EREFUSED, "%s: %s", ipc_code_name(c->msg.u.error.code),
                           c->msg.u.error.message);
        return err_set(&c->why, ERR_PROTOCOL, "the daemon answered with %s",
                       ipc_type_name(c->msg.type));
    }
}

static int ask(struct sluice_client *c, enum ipc_type verb, enum ipc_type wanted, int timeout_ms)
{
    uint64_t tag = ++c->last_tag;
    TRY(client_queue(c, verb, &(struct ipc_control){tag}));
    return await(c, tag, wanted, timeout_ms);
}

int sluice_get_stats(struct sluice_client *c, const struct sluice_stat **stats, int timeout_ms)
{
    *stats = NULL;
    TRY(ask(c, IPC_STATS, IPC_STATS_OK, timeout_ms));
    const struct ipc_stats_ok *m = &c->msg.u.stats_ok;
    struct sluice_stat *s = realloc(c->stats, ((size_t)m->n_stats + 1) * sizeof *s);
    if (!s)
        return err_set(&c->why, -ENOMEM, "out of memory");
    c->stats = s;
    for (int32_t i = 0; i < m->n_stats; i++)
        s[i] = (struct sluice_stat){m->stats[i].name, m->stats[i].is_int, m->stats[i].i,
                                    m->stats[i].d};
    *stats = s;
    return m->n_stats;
}

int sluice_get_health(struct sluice_client *c, struct sluice_health *health, int timeout_ms)
{
    memset(health, 0, sizeof *health);
    TRY(ask(c, IPC_HEALTH, IPC_HEALTH_OK, timeout_ms));
    const struct ipc_health_ok *m = &c->msg.u.health_ok;
    health->live = m->live;
    health->ready = m->ready;
    health->draining = m->draining;
    memcpy(health->state, m->state, sizeof health->state);
    health->step_age_ms = m->step_age_ms;
    health->inflight = m->inflight;
    health->waiting = m->waiting;
    return 0;
}

int sluice_drain(struct sluice_client *c, int64_t drain_ms, int timeout_ms)
{
    struct ipc_drain m = {++c->last_tag, drain_ms};
    TRY(client_queue(c, IPC_DRAIN, &m));
    return await(c, m.tag, IPC_OK, timeout_ms);
}

int sluice_shutdown(struct sluice_client *c, int timeout_ms)
{
    return ask(c, IPC_SHUTDOWN, IPC_OK, timeout_ms);
}

int sluice_reset_prefix_cache(struct sluice_client *c, int timeout_ms)
{
    return ask(c, IPC_RESET_PREFIX_CACHE, IPC_OK, timeout_ms);
}

int sluice_ping(struct sluice_client *c, int timeout_ms)
{
    return ask(c, IPC_PING, IPC_PONG, timeout_ms);
}
