/* The life of a connection: accepting, reading, ending. */
#define LOG_MODULE "ipc"
#include "ipc/conn.h"

#include "core/log.h"
#include "core/mem.h"

#include <errno.h>

static void on_handle_closed(uv_handle_t *h)
{
    struct conn *c = h->data;
    if (--c->n_handles > 0)
        return;
    struct ipc_server *s = c->s;
    list_unlink(&c->link);
    ipc_frame_reader_deinit(&c->in);
    ipc_buf_free(&c->out);
    ipc_buf_free(&c->flight);
    mem_free(c);
    server_handle_closed(s);
}

static void conn_destroy(struct conn *c)
{
    if (c->state == CONN_CLOSED)
        return;
    if (c->state == CONN_CLOSING)
        c->s->n_closing--;
    c->state = CONN_CLOSED;
    list_unlink(&c->dirty);
    uv_close((uv_handle_t *)&c->timer, on_handle_closed);
    uv_close(&c->h.handle, on_handle_closed);
}

static bool take_slot(struct conn *c)
{
    struct ipc_server *s = c->s;
    for (int32_t i = 0; i < s->cfg.max_connections; i++) {
        struct conn_slot *slot = &s->slots[i];
        if (slot->conn)
            continue;
        slot->conn = c;
        slot->generation++;
        c->id = (uint64_t)slot->generation << 32 | (uint32_t)(i + 1);
        s->n_slots_used++;
        return true;
    }
    return false;
}

static void give_slot_back(struct conn *c)
{
    if (!c->id)
        return;
    c->s->slots[(uint32_t)c->id - 1].conn = NULL;
    c->s->n_slots_used--;
    c->id = 0;
}

static void on_linger_over(uv_timer_t *t)
{
    conn_destroy(t->data);
}

static void on_shutdown(uv_shutdown_t *req, int status)
{
    struct conn *c = req->data;
    if (status < 0)
        conn_destroy(c);
}

static bool peer_is_gone(int reason)
{
    return reason == UV_EOF || reason == UV_ECONNRESET || reason == UV_EPIPE ||
           reason == UV_ETIMEDOUT || reason == UV_ENOBUFS;
}

void conn_end(struct conn *c, int reason, int32_t linger_ms)
{
    struct ipc_server *s = c->s;
    if (c->state >= CONN_CLOSING)
        return;
    bool was_open = c->state == CONN_OPEN;
    uint64_t id = c->id;
    c->state = CONN_CLOSING;
    s->n_closing++;
    list_unlink(&c->dirty);
    conn_drop_held(c);
    give_slot_back(c);
    (void)uv_timer_stop(&c->timer);
    if (was_open)
        s->cfg.handlers.close(s->cfg.handlers.ctx, id, c->user, reason);
    if (c->state == CONN_CLOSED) /* the handler closed the server */
        return;
    c->doom = 0;
    if (peer_is_gone(reason) || linger_ms < 0 || s->n_closing > s->cfg.max_connections ||
        uv_timer_start(&c->timer, on_linger_over, (uint64_t)linger_ms, 0) < 0) {
        conn_destroy(c);
        return;
    }
    conn_write(c);
    conn_finish(c);
}

void conn_hurry(struct conn *c, int32_t linger_ms)
{
    if (c->state == CONN_CLOSING &&
        uv_timer_start(&c->timer, on_linger_over, linger_ms > 0 ? (uint64_t)linger_ms : 0, 0) < 0)
        conn_destroy(c);
}

/* Closing with unread input would reset a TCP connection and lose our last words: end our side
 * first, and read until the peer ends its own. */
void conn_finish(struct conn *c)
{
    if (c->doom) {
        conn_destroy(c);
        return;
    }
    if (c->writing || c->out.len > 0 || c->shutting)
        return;
    c->shutting = true;
    c->shutdown.data = c;
    if (uv_shutdown(&c->shutdown, &c->h.stream, on_shutdown) < 0)
        conn_destroy(c);
}

void conn_fail(struct conn *c, int err, const struct err_msg *why)
{
    if (c->state >= CONN_CLOSING)
        return;
    log_info("connection ended: %s", err_why(why, err));
    c->s->stats.protocol_errors += err == ERR_PROTOCOL;
    conn_queue_error(c, NULL, 0, err, why);
    conn_end(c, err, CONN_LINGER_MS);
}

static void on_alloc(uv_handle_t *h, size_t suggested, uv_buf_t *buf)
{
    struct conn *c = h->data;
    uint8_t *room;
    size_t len;
    (void)suggested;
    if (c->state >= CONN_CLOSING)
        *buf = uv_buf_init(c->s->discard, sizeof c->s->discard);
    else if (ipc_frame_reader_space(&c->in, &room, &len) < 0)
        *buf = uv_buf_init(NULL, 0); /* libuv reports UV_ENOBUFS */
    else
        *buf = uv_buf_init((char *)room, (unsigned)len);
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct conn *c = stream->data;
    struct err_msg why = {""};
    const uint8_t *payload;
    size_t len;
    (void)buf;
    if (n == 0 || c->state == CONN_CLOSED)
        return;
    if (c->state == CONN_CLOSING) {
        if (n < 0)
            conn_destroy(c);
        return;
    }
    if (n < 0) {
        conn_end(c, (int)n, -1);
        return;
    }
    c->s->stats.bytes_in += (uint64_t)n;
    ipc_frame_reader_commit(&c->in, (size_t)n);
    int rc = 0;
    while (c->state < CONN_CLOSING && !c->doom &&
           (rc = ipc_frame_reader_next(&c->in, &payload, &len, &why)) > 0) {
        c->s->stats.frames_in++;
        conn_handle(c, payload, len);
    }
    if (rc < 0)
        conn_fail(c, rc, &why);
}

static void on_handshake_timeout(uv_timer_t *t)
{
    struct conn *c = t->data;
    struct err_msg why;
    int err = err_set(&why, ERR_PROTOCOL, "no HELLO within %d ms", c->s->cfg.handshake_ms);
    conn_fail(c, err, &why);
}

static int start(struct conn *c, uv_stream_t *listener)
{
    struct ipc_server *s = c->s;
    TRY(uv_accept(listener, &c->h.stream));
    if (c->is_tcp) {
        (void)uv_tcp_nodelay(&c->h.tcp, 1);
        (void)uv_tcp_keepalive(&c->h.tcp, 1, 60);
    }
    int send_buffer = s->cfg.send_buffer;
    if (send_buffer > 0)
        (void)uv_send_buffer_size(&c->h.handle, &send_buffer);
    TRY(uv_timer_start(&c->timer, on_handshake_timeout, (uint64_t)s->cfg.handshake_ms, 0));
    return uv_read_start(&c->h.stream, on_alloc, on_read);
}

void conn_accept(struct ipc_server *s, uv_stream_t *listener, bool is_tcp)
{
    struct conn *c = mem_zalloc(1, sizeof *c);
    struct err_msg why;
    c->s = s;
    c->is_tcp = is_tcp;
    c->peer_max_frame = IPC_FRAME_MIN;
    list_init(&c->dirty);
    list_init(&c->held);
    list_push_back(&s->conns, &c->link);
    ipc_frame_reader_init(&c->in, IPC_HELLO_MAX);
    (void)uv_timer_init(s->loop, &c->timer);
    if (is_tcp)
        (void)uv_tcp_init(s->loop, &c->h.tcp);
    else
        (void)uv_pipe_init(s->loop, &c->h.pipe, 0);
    c->timer.data = c->h.handle.data = c;
    c->n_handles = 2;
    s->n_handles++;
    int err = start(c, listener);
    if (err < 0) {
        log_warn("cannot take a connection: %s", err_str(err));
        conn_destroy(c);
        return;
    }
    s->stats.accepted++;
    if (!take_slot(c)) {
        s->stats.refused++;
        err =
            err_set(&why, -EMFILE, "the server has all its %d connections", s->cfg.max_connections);
        conn_fail(c, err, &why);
    }
}
