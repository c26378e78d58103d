/* What comes in: the handshake, and the verbs' way to their handlers. */
#define LOG_MODULE "ipc"
#include "ipc/conn.h"

#include "core/log.h"

#include <string.h>

/* Takes the same time wherever the first difference is; both are zero-padded. */
static bool same_token(const char a[IPC_TOKEN_BYTES + 1], const char b[IPC_TOKEN_BYTES + 1])
{
    volatile unsigned char diff = 0;
    for (size_t i = 0; i <= IPC_TOKEN_BYTES; i++)
        diff = (unsigned char)(diff | (a[i] ^ b[i]));
    return diff == 0;
}

static int judge_hello(const struct conn *c, const struct ipc_hello *m, struct err_msg *why)
{
    const struct ipc_server *s = c->s;
    if (m->proto_major != IPC_PROTO_MAJOR)
        return err_set(why, ERR_VERSION, "proto_major: %d, this server speaks %d", m->proto_major,
                       IPC_PROTO_MAJOR);
    if (c->is_tcp && s->token[0] != '\0' && !same_token(m->token, s->token))
        return err_set(why, ERR_AUTH, "token: missing or wrong");
    return 0;
}

static void say_hello(struct conn *c)
{
    struct ipc_server *s = c->s;
    struct ipc_hello_ok m = s->cfg.info;
    m.proto_major = IPC_PROTO_MAJOR;
    m.proto_minor = IPC_PROTO_MINOR;
    m.max_frame = s->cfg.max_frame;
    m.max_connections = s->cfg.max_connections;
    conn_queue(c, IPC_HELLO_OK, &m);
    if (!s->going_away)
        return;
    struct ipc_goaway g = s->goaway;
    uint64_t now = uv_now(s->loop);
    g.deadline_ms = s->goaway_until_ms > now ? (int64_t)(s->goaway_until_ms - now) : 0;
    conn_queue(c, IPC_GOAWAY, &g);
}

static void shake(struct conn *c, struct ipc_msg *m, int err, struct err_msg *why)
{
    if (err == ERR_UNSUPPORTED || (err == 0 && m->type != IPC_HELLO) ||
        (err == ERR_INVALID && m->type != IPC_HELLO))
        err = err_set(why, ERR_PROTOCOL, "the first message must be HELLO");
    if (err == 0)
        err = judge_hello(c, &m->u.hello, why);
    if (err < 0) {
        conn_fail(c, err, why);
        return;
    }
    (void)uv_timer_stop(&c->timer);
    c->state = CONN_OPEN;
    c->peer_max_frame = (size_t)m->u.hello.max_frame;
    ipc_frame_reader_set_limit(&c->in, (size_t)c->s->cfg.max_frame);
    say_hello(c);
    log_debug("client connected: %s", m->u.hello.client);
    c->s->cfg.handlers.open(c->s->cfg.handlers.ctx, c->id, &m->u.hello);
}

static void refuse(struct conn *c, const struct ipc_msg *m, int err, const struct err_msg *why)
{
    switch (m->type) {
    case IPC_SUBMIT: conn_queue_error(c, m->u.submit.id, 0, err, why); break;
    case IPC_STATS:
    case IPC_HEALTH:
    case IPC_SHUTDOWN:
    case IPC_RESET_PREFIX_CACHE:
    case IPC_PING: conn_queue_error(c, NULL, m->u.control.tag, err, why); break;
    case IPC_DRAIN: conn_queue_error(c, NULL, m->u.drain.tag, err, why); break;
    default: conn_queue_error(c, NULL, 0, err, why); break;
    }
}

static void submit(struct conn *c, const struct ipc_msg *m)
{
    const struct ipc_handlers *h = &c->s->cfg.handlers;
    struct err_msg why = {""};
    int err = ipc_submit_check(&m->u.submit, c->s->cfg.info.vocab, &why);
    if (err < 0)
        refuse(c, m, err, &why);
    else
        h->submit(h->ctx, c->id, &m->u.submit);
}

static void dispatch(struct conn *c, const struct ipc_msg *m)
{
    const struct ipc_handlers *h = &c->s->cfg.handlers;
    struct err_msg why;
    switch (m->type) {
    case IPC_SUBMIT: submit(c, m); break;
    case IPC_CANCEL: h->cancel(h->ctx, c->id, &m->u.cancel); break;
    case IPC_STATS: h->stats(h->ctx, c->id, m->u.control.tag); break;
    case IPC_HEALTH: h->health(h->ctx, c->id, m->u.control.tag); break;
    case IPC_DRAIN: h->drain(h->ctx, c->id, &m->u.drain); break;
    case IPC_SHUTDOWN: h->shutdown(h->ctx, c->id, m->u.control.tag); break;
    case IPC_RESET_PREFIX_CACHE: h->reset_prefix_cache(h->ctx, c->id, m->u.control.tag); break;
    case IPC_PING: conn_queue(c, IPC_PONG, &m->u.control); break;
    case IPC_HELLO: conn_fail(c, err_set(&why, ERR_PROTOCOL, "HELLO comes only once"), &why); break;
    default:
        refuse(c, m,
               err_set(&why, ERR_UNSUPPORTED, "%s is not for the server", ipc_type_name(m->type)),
               &why);
        break;
    }
}

void conn_handle(struct conn *c, const uint8_t *payload, size_t len)
{
    struct ipc_msg m;
    struct err_msg why = {""};
    int err = ipc_msg_unpack(c->s->decoder, &m, payload, len, &why);
    if (c->state == CONN_HANDSHAKE)
        shake(c, &m, err, &why);
    else if (err == 0)
        dispatch(c, &m);
    else if (err == ERR_INVALID || err == ERR_UNSUPPORTED)
        refuse(c, &m, err, &why);
    else
        conn_fail(c, err, &why);
}
