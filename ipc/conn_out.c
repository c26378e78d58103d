/* What goes out: queueing, writing, and the treatment of slow readers. */
#define LOG_MODULE "ipc"
#include "ipc/conn.h"

#include "core/log.h"
#include "core/mem.h"

#include <string.h>

enum { KEEP_BYTES = 256 << 10 };

/* Tokens of one request that wait for a slow reader: later ones are added to them. */
struct held {
    struct list link;
    char id[IPC_ID_BYTES + 1];
    int64_t seq;
    int32_t n, cap;
    int32_t *tokens;
    struct ipc_logprob *logprobs; /* NULL, or [cap] */
};

struct conn *conn_find(const struct ipc_server *s, uint64_t id)
{
    uint32_t i = (uint32_t)id - 1;
    if (id == 0 || i >= (uint32_t)s->cfg.max_connections)
        return NULL;
    struct conn *c = s->slots[i].conn;
    return c && c->id == id && c->state == CONN_OPEN && !c->doom ? c : NULL;
}

size_t conn_unsent(const struct conn *c)
{
    return c->out.len + uv_stream_get_write_queue_size(&c->h.stream) + c->held_bytes;
}

static void mark_dirty(struct conn *c)
{
    if (list_empty(&c->dirty))
        list_push_back(&c->s->dirty, &c->dirty);
}

void conn_doom(struct conn *c, int reason)
{
    if (!c->doom)
        c->doom = reason;
    if (c->state < CONN_CLOSING)
        mark_dirty(c);
}

static void on_lag(uv_timer_t *t)
{
    conn_doom(t->data, ERR_SLOW_CONSUMER);
}

/* The buffer is kept for the next messages unless one large burst has blown it up. */
static void recycle(struct ipc_buf *b)
{
    if (b->cap > KEEP_BYTES)
        ipc_buf_free(b);
    b->len = 0;
}

static void on_written(uv_write_t *req, int status)
{
    struct conn *c = req->data;
    c->writing = false;
    recycle(&c->flight);
    if (c->state == CONN_CLOSED)
        return;
    if (c->state == CONN_CLOSING) {
        if (status < 0)
            conn_doom(c, status);
        else
            conn_write(c);
        conn_finish(c);
        return;
    }
    (void)uv_timer_stop(&c->timer);
    if (status < 0)
        conn_end(c, status, -1);
    else
        mark_dirty(c);
}

static void start_flight(struct conn *c, size_t sent)
{
    struct ipc_server *s = c->s;
    struct ipc_buf spare = c->flight;
    c->flight = c->out;
    c->out = spare;
    c->write.data = c;
    uv_buf_t rest = uv_buf_init((char *)c->flight.data + sent, (unsigned)(c->flight.len - sent));
    int err = uv_write(&c->write, &c->h.stream, &rest, 1, on_written);
    if (err < 0) {
        conn_doom(c, err);
        return;
    }
    c->writing = true;
    if (c->state >= CONN_CLOSING)
        return; /* the timer is the linger's */
    uint64_t age = uv_now(s->loop) - c->out_since_ms, max = (uint64_t)s->cfg.max_lag_ms;
    (void)uv_timer_start(&c->timer, on_lag, age < max ? max - age : 0, 0);
}

void conn_write(struct conn *c)
{
    if (c->writing || c->out.len == 0)
        return;
    uv_buf_t buf = uv_buf_init((char *)c->out.data, (unsigned)c->out.len);
    int n = uv_try_write(&c->h.stream, &buf, 1);
    if (n < 0 && n != UV_EAGAIN) {
        conn_doom(c, n);
        return;
    }
    size_t sent = n < 0 ? 0 : (size_t)n;
    c->s->stats.bytes_out += c->out.len;
    if (sent == c->out.len)
        recycle(&c->out);
    else
        start_flight(c, sent);
}

static void append(struct conn *c, enum ipc_type type, const void *body)
{
    struct err_msg why = {""};
    size_t before = c->out.len;
    if (before == 0)
        c->out_since_ms = uv_now(c->s->loop);
    int err = ipc_body_pack(&c->out, type, body, &why);
    if (err == 0 && c->out.len - before - IPC_FRAME_HEADER > c->peer_max_frame) {
        c->out.len = before;
        err = err_set(&why, ERR_TOO_LONG, "%s is longer than the client's max_frame",
                      ipc_type_name(type));
    }
    if (err < 0) {
        log_error("cannot send %s: %s", ipc_type_name(type), err_why(&why, err));
        conn_doom(c, err);
        return;
    }
    c->s->stats.frames_out++;
    mark_dirty(c);
    /* A burst within one loop iteration is not the reader's fault: try before counting it. */
    if (c->out.len > (size_t)c->s->cfg.soft_limit)
        conn_write(c);
}

static bool over_hard(struct conn *c)
{
    if (conn_unsent(c) <= (size_t)c->s->cfg.hard_limit)
        return false;
    conn_doom(c, ERR_SLOW_CONSUMER);
    return true;
}

void conn_queue(struct conn *c, enum ipc_type type, const void *body)
{
    if (!over_hard(c))
        append(c, type, body);
}

void conn_queue_error(struct conn *c, const char *id, uint64_t tag, int err,
                      const struct err_msg *why)
{
    struct ipc_error m;
    ipc_body_init(IPC_ERROR, &m);
    (void)snprintf(m.id, sizeof m.id, "%s", id ? id : "");
    (void)snprintf(m.message, sizeof m.message, "%s", err_why(why, err));
    m.tag = tag;
    m.code = ipc_code_of(err);
    m.retryable = ipc_code_retryable(m.code);
    conn_queue(c, IPC_ERROR, &m);
}

/* --- held tokens --- */

static size_t held_size(int32_t n, bool logprobs)
{
    return (size_t)n * (sizeof(int32_t) + (logprobs ? sizeof(struct ipc_logprob) : 0));
}

static void held_free(struct conn *c, struct held *h)
{
    c->held_bytes -= held_size(h->n, h->logprobs != NULL) + sizeof *h;
    list_unlink(&h->link);
    mem_free(h->tokens);
    mem_free(h->logprobs);
    mem_free(h);
}

void conn_drop_held(struct conn *c)
{
    LIST_FOREACH_SAFE(node, tmp, &c->held)
    held_free(c, LIST_ENTRY(node, struct held, link));
}

/* How many tokens one TOKENS message takes, so that it fits the peer's frames and the limit on
 * values. */
static int32_t tokens_per_frame(const struct conn *c, bool logprobs)
{
    enum { HEAD = 256, LOGPROB_BYTES = 250, LOGPROB_TOKENS = 8192 };
    size_t n = (c->peer_max_frame - HEAD) / (logprobs ? LOGPROB_BYTES : sizeof(int32_t));
    if (logprobs && n > LOGPROB_TOKENS)
        n = LOGPROB_TOKENS;
    return n < INT32_MAX ? (int32_t)n : INT32_MAX;
}

/* One result may exceed the hard limit when it is the first to do so. */
static void queue_tokens(struct conn *c, const struct ipc_tokens *m)
{
    struct ipc_tokens part = *m;
    int32_t max = tokens_per_frame(c, m->logprobs != NULL);
    for (int32_t at = 0; at < m->n_tokens && !c->doom; at += part.n_tokens) {
        int32_t left = m->n_tokens - at;
        part.seq = m->seq + at;
        part.tokens = m->tokens + at;
        part.logprobs = m->logprobs ? m->logprobs + at : NULL;
        part.n_tokens = left < max ? left : max;
        append(c, IPC_TOKENS, &part);
    }
}

static struct held *held_find(const struct conn *c, const char *id)
{
    LIST_FOREACH (node, &c->held) {
        struct held *h = LIST_ENTRY(node, struct held, link);
        if (strcmp(h->id, id) == 0)
            return h;
    }
    return NULL;
}

/* Moves held tokens to the output, whose limit they already counted against. */
static void held_release(struct conn *c, struct held *h)
{
    struct ipc_tokens m = {.seq = h->seq, .n_tokens = h->n, .tokens = h->tokens};
    m.logprobs = h->logprobs;
    memcpy(m.id, h->id, sizeof m.id);
    queue_tokens(c, &m);
    held_free(c, h);
}

static void release_id(struct conn *c, const char *id)
{
    struct held *h = list_empty(&c->held) ? NULL : held_find(c, id);
    if (h)
        held_release(c, h);
}

static void held_grow(struct held *h, int32_t n, bool logprobs)
{
    if (h->n + n <= h->cap)
        return;
    h->cap = 2 * (h->n + n);
    h->tokens = mem_realloc(h->tokens, (size_t)h->cap * sizeof *h->tokens);
    if (logprobs)
        h->logprobs = mem_realloc(h->logprobs, (size_t)h->cap * sizeof *h->logprobs);
}

static void hold(struct conn *c, const struct ipc_tokens *m)
{
    struct held *h = held_find(c, m->id);
    if (over_hard(c))
        return;
    if (h && (h->seq + h->n != m->seq || (h->logprobs != NULL) != (m->logprobs != NULL))) {
        held_release(c, h);
        h = NULL;
    }
    if (!h) {
        h = mem_zalloc(1, sizeof *h);
        memcpy(h->id, m->id, sizeof h->id);
        h->seq = m->seq;
        list_push_back(&c->held, &h->link);
        c->held_bytes += sizeof *h;
    }
    size_t n = (size_t)m->n_tokens;
    held_grow(h, m->n_tokens, m->logprobs != NULL);
    memcpy(h->tokens + h->n, m->tokens, n * sizeof *h->tokens);
    if (m->logprobs)
        memcpy(h->logprobs + h->n, m->logprobs, n * sizeof *h->logprobs);
    h->n += m->n_tokens;
    c->held_bytes += held_size(m->n_tokens, m->logprobs != NULL);
}

static bool over_soft(struct conn *c)
{
    bool over = conn_unsent(c) > (size_t)c->s->cfg.soft_limit;
    c->was_full |= over;
    return over;
}

/* --- the flush phase --- */

/* A slow reader loses what has not been handed to libuv; what is in flight ends on a frame's
 * border, so the error can follow it. */
static void end_slow(struct conn *c)
{
    struct err_msg why;
    int err = err_set(&why, ERR_SLOW_CONSUMER, "%zu bytes wait to be read", conn_unsent(c));
    c->s->stats.slow_consumers++;
    conn_drop_held(c);
    c->out.len = 0;
    c->doom = 0;
    struct ipc_error m;
    ipc_body_init(IPC_ERROR, &m);
    m.code = ipc_code_of(err);
    memcpy(m.message, why.text, sizeof m.message);
    if (ipc_body_pack(&c->out, IPC_ERROR, &m, NULL) < 0)
        c->out.len = 0;
    log_info("connection ended: client reads too slowly, %s", why.text);
    conn_end(c, err, CONN_LINGER_MS);
}

static void release_all(struct conn *c)
{
    size_t low = (size_t)c->s->cfg.soft_limit / 2;
    if (!c->was_full || conn_unsent(c) - c->held_bytes > low)
        return;
    while (!list_empty(&c->held) && !c->doom)
        held_release(c, LIST_ENTRY(c->held.next, struct held, link));
    c->was_full = conn_unsent(c) > low;
    if (!c->was_full && c->s->cfg.handlers.writable && c->state == CONN_OPEN)
        c->s->cfg.handlers.writable(c->s->cfg.handlers.ctx, c->id);
}

static void flush_one(struct conn *c)
{
    if (!c->doom) {
        conn_write(c);
        if (c->state == CONN_OPEN && !c->doom)
            release_all(c);
        if (c->state < CONN_CLOSING && !c->doom)
            conn_write(c);
    }
    if (c->doom == ERR_SLOW_CONSUMER)
        end_slow(c);
    else if (c->doom)
        conn_end(c, c->doom, CONN_LINGER_MS);
}

void server_flush(struct ipc_server *s)
{
    struct list todo;
    /* What handlers queue meanwhile lands on s->dirty and waits for the next phase. */
    list_init(&todo);
    while (!list_empty(&s->dirty)) {
        struct list *node = s->dirty.next;
        list_unlink(node);
        list_push_back(&todo, node);
    }
    while (!list_empty(&todo)) {
        struct list *node = todo.next;
        list_unlink(node);
        flush_one(LIST_ENTRY(node, struct conn, dirty));
    }
}

/* --- the public senders --- */

void ipc_send_accepted(struct ipc_server *s, uint64_t conn, const char *id)
{
    struct conn *c = conn_find(s, conn);
    struct ipc_accepted m = {""};
    if (!c)
        return;
    (void)snprintf(m.id, sizeof m.id, "%s", id);
    conn_queue(c, IPC_ACCEPTED, &m);
}

void ipc_send_progress(struct ipc_server *s, uint64_t conn, const struct ipc_progress *m)
{
    struct conn *c = conn_find(s, conn);
    if (c && !over_soft(c))
        conn_queue(c, IPC_PROGRESS, m);
}

void ipc_send_tokens(struct ipc_server *s, uint64_t conn, const struct ipc_tokens *m)
{
    struct conn *c = conn_find(s, conn);
    if (!c || m->n_tokens <= 0)
        return;
    if (over_soft(c)) {
        hold(c, m);
        return;
    }
    release_id(c, m->id);
    if (!c->doom)
        queue_tokens(c, m);
}

/* Not counted against the hard limit: there is one for each request that was accepted, and it may
 * follow a large result. */
void ipc_send_done(struct ipc_server *s, uint64_t conn, const struct ipc_done *m)
{
    struct conn *c = conn_find(s, conn);
    if (!c)
        return;
    release_id(c, m->id);
    if (!c->doom)
        append(c, IPC_DONE, m);
}

void ipc_send_error(struct ipc_server *s, uint64_t conn, const struct ipc_error *m)
{
    struct conn *c = conn_find(s, conn);
    if (!c)
        return;
    release_id(c, m->id);
    if (!c->doom)
        conn_queue(c, IPC_ERROR, m);
}

void ipc_send_failure(struct ipc_server *s, uint64_t conn, const char *id, int err,
                      const struct err_msg *why, int64_t retry_after_ms)
{
    struct ipc_error m;
    ipc_body_init(IPC_ERROR, &m);
    (void)snprintf(m.id, sizeof m.id, "%s", id ? id : "");
    (void)snprintf(m.message, sizeof m.message, "%s", err_why(why, err));
    m.code = ipc_code_of(err);
    m.retryable = ipc_code_retryable(m.code);
    m.retry_after_ms = retry_after_ms > 0 ? retry_after_ms : 0;
    ipc_send_error(s, conn, &m);
}

void ipc_send_control_failure(struct ipc_server *s, uint64_t conn, uint64_t tag, int err,
                              const struct err_msg *why)
{
    struct conn *c = conn_find(s, conn);
    if (c)
        conn_queue_error(c, NULL, tag, err, why);
}

static void send_any(struct ipc_server *s, uint64_t conn, enum ipc_type type, const void *body)
{
    struct conn *c = conn_find(s, conn);
    if (c)
        conn_queue(c, type, body);
}

void ipc_send_stats_ok(struct ipc_server *s, uint64_t conn, const struct ipc_stats_ok *m)
{
    send_any(s, conn, IPC_STATS_OK, m);
}

void ipc_send_health_ok(struct ipc_server *s, uint64_t conn, const struct ipc_health_ok *m)
{
    send_any(s, conn, IPC_HEALTH_OK, m);
}

void ipc_send_ok(struct ipc_server *s, uint64_t conn, uint64_t tag)
{
    send_any(s, conn, IPC_OK, &(struct ipc_control){tag});
}

void ipc_send_goaway(struct ipc_server *s, uint64_t conn, const struct ipc_goaway *m)
{
    send_any(s, conn, IPC_GOAWAY, m);
}

bool ipc_conn_writable(const struct ipc_server *s, uint64_t conn)
{
    const struct conn *c = conn_find(s, conn);
    return c && conn_unsent(c) <= (size_t)s->cfg.soft_limit;
}
