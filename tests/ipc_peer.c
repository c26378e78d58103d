#include "tests/test.h"

#include "tests/ipc_peer.h"

#include "core/clock.h"
#include "ipc/address.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

static const int32_t prompt[4096];

static void on_open(void *ctx, uint64_t conn, const struct ipc_hello *m)
{
    struct world *w = ctx;
    w->n_open++;
    w->conn = conn;
    w->hello = *m;
}

static void on_submit(void *ctx, uint64_t conn, const struct ipc_submit *m)
{
    struct world *w = ctx;
    w->n_submit++;
    w->conn = conn;
    w->submit = *m;
    w->submit.tokens = NULL;
    if (w->close_in_submit)
        ipc_conn_close(w->server, conn);
    if (!w->answer)
        return;
    struct ipc_tokens t = {.n_tokens = 1, .tokens = m->tokens};
    struct ipc_done d = {.reason = IPC_REASON_LENGTH, .stop_token = -1, .completion_tokens = 1};
    memcpy(t.id, m->id, sizeof t.id);
    memcpy(d.id, m->id, sizeof d.id);
    d.prompt_tokens = m->n_tokens;
    ipc_send_accepted(w->server, conn, m->id);
    ipc_send_tokens(w->server, conn, &t);
    ipc_send_done(w->server, conn, &d);
}

static void on_cancel(void *ctx, uint64_t conn, const struct ipc_cancel *m)
{
    struct world *w = ctx;
    (void)conn;
    w->n_cancel += m->n_ids;
}

static void on_stats(void *ctx, uint64_t conn, uint64_t tag)
{
    struct world *w = ctx;
    static const struct ipc_stat stats[] = {{"requests", true, 7, 7}, {"load", false, 0, 0.5}};
    ipc_send_stats_ok(w->server, conn, &(struct ipc_stats_ok){tag, 2, stats});
}

static void on_health(void *ctx, uint64_t conn, uint64_t tag)
{
    struct world *w = ctx;
    struct ipc_health_ok m = {.tag = tag, .live = true, .state = "serving"};
    ipc_send_health_ok(w->server, conn, &m);
}

static void on_drain(void *ctx, uint64_t conn, const struct ipc_drain *m)
{
    struct world *w = ctx;
    ipc_send_ok(w->server, conn, m->tag);
}

static void on_shutdown(void *ctx, uint64_t conn, uint64_t tag)
{
    struct world *w = ctx;
    ipc_send_control_failure(w->server, conn, tag, ERR_UNSUPPORTED, NULL);
}

static void on_reset(void *ctx, uint64_t conn, uint64_t tag)
{
    struct world *w = ctx;
    ipc_send_ok(w->server, conn, tag);
}

static void on_writable(void *ctx, uint64_t conn)
{
    struct world *w = ctx;
    (void)conn;
    w->n_writable++;
}

static void on_close(void *ctx, uint64_t conn, void *user, int reason)
{
    struct world *w = ctx;
    w->n_close++;
    w->last_reason = reason;
    w->closed_user = user;
    assert_false(ipc_conn_alive(w->server, conn));
    ipc_send_ok(w->server, conn, 1); /* must do nothing */
}

void world_start(struct world *w, const struct ipc_server_config *cfg)
{
    struct ipc_server_config c = *cfg;
    struct err_msg why = {""};
    memset(w, 0, sizeof *w);
    assert_ok(uv_loop_init(&w->loop));
    c.handlers =
        (struct ipc_handlers){w,        on_open,     on_submit, on_cancel,   on_stats, on_health,
                              on_drain, on_shutdown, on_reset,  on_writable, on_close};
    ipc_body_init(IPC_HELLO_OK, &c.info);
    memcpy(c.info.model, "tiny", 5);
    c.info.n_decode_levels = 2;
    c.info.decode_levels[1] = 32;
    c.info.vocab = 100;
    c.info.n_modes = 1;
    c.info.modes[0] = IPC_SPARSE_DENSE;
    assert_ok(ipc_server_create(&w->server, &w->loop, &c, &why));
    memcpy(w->dir, "/tmp/sluice_ipc_XXXXXX", sizeof "/tmp/sluice_ipc_XXXXXX");
    assert_non_null(mkdtemp(w->dir));
    (void)snprintf(w->unix_address, sizeof w->unix_address, "unix:%s/s", w->dir);
    if (ipc_server_listen(w->server, w->unix_address, &why) < 0)
        fail_msg("%s", why.text);
}

static void on_stopped(void *arg)
{
    struct world *w = arg;
    w->closed++;
}

void world_stop(struct world *w)
{
    if (!w->closed)
        ipc_server_close(w->server, 0, on_stopped, w);
    for (int i = 0; i < 1000 && !w->closed; i++)
        (void)uv_run(&w->loop, UV_RUN_ONCE);
    assert_int_equal(w->closed, 1);
    assert_int_equal(w->n_open, w->n_close);
    assert_ok(uv_loop_close(&w->loop)); /* no handle is left */
    (void)rmdir(w->dir);
}

void world_turn(struct world *w, int n)
{
    for (int i = 0; i < n; i++)
        (void)uv_run(&w->loop, UV_RUN_NOWAIT);
}

bool world_run(struct world *w, bool (*done)(void *arg), void *arg)
{
    int64_t end = clock_monotonic_us(NULL) + 5000000;
    while (!done(arg)) {
        if (clock_monotonic_us(NULL) > end)
            return false;
        (void)uv_run(&w->loop, UV_RUN_NOWAIT);
    }
    return true;
}

/* --- peer --- */

static int open_fd(const char *address)
{
    struct ipc_address a;
    struct sockaddr_un un;
    struct addrinfo *list;
    assert_ok(ipc_address_parse(&a, address, NULL));
    int fd = -1, rc = -1;
    if (a.is_unix) {
        ipc_address_unix(&a, &un);
        fd = socket(AF_UNIX, SOCK_STREAM, 0);
        rc = connect(fd, (const struct sockaddr *)&un, sizeof un);
    } else {
        assert_ok(ipc_address_resolve(&a, &list, NULL));
        fd = socket(list->ai_family, SOCK_STREAM, 0);
        rc = connect(fd, list->ai_addr, list->ai_addrlen);
        freeaddrinfo(list);
    }
    assert_int_equal(rc, 0);
    return fd;
}

void peer_open(struct peer *p, struct world *w, const char *address)
{
    memset(p, 0, sizeof *p);
    p->fd = open_fd(address ? address : w->unix_address);
    assert_ok(fcntl(p->fd, F_SETFL, O_NONBLOCK));
    ipc_frame_reader_init(&p->in, IPC_FRAME_MAX);
    assert_ok(ipc_decoder_create(&p->decoder));
}

void peer_close(struct peer *p)
{
    if (p->fd >= 0)
        (void)close(p->fd);
    p->fd = -1;
    ipc_frame_reader_deinit(&p->in);
    ipc_decoder_destroy(p->decoder);
    p->decoder = NULL;
}

void peer_send(struct world *w, struct peer *p, const void *bytes, size_t len)
{
    const char *at = bytes;
    while (len > 0) {
        ssize_t n = send(p->fd, at, len, MSG_NOSIGNAL);
        if (n > 0) {
            at += n;
            len -= (size_t)n;
        } else if (errno != EAGAIN) {
            return; /* the server has closed: the test sees that when it reads */
        }
        (void)uv_run(&w->loop, UV_RUN_NOWAIT);
    }
}

void peer_send_msg(struct world *w, struct peer *p, enum ipc_type type, const void *body)
{
    struct ipc_buf buf = {0};
    struct err_msg why = {""};
    if (ipc_body_pack(&buf, type, body, &why) < 0)
        fail_msg("%s", why.text);
    peer_send(w, p, buf.data, buf.len);
    ipc_buf_free(&buf);
}

/* 1: a message, 0: nothing yet, -1: the end. */
static int try_read(struct peer *p)
{
    const uint8_t *payload;
    uint8_t *room;
    size_t len;
    for (;;) {
        int rc = ipc_frame_reader_next(&p->in, &payload, &len, NULL);
        assert_true(rc >= 0);
        if (rc == 1) {
            struct err_msg why = {""};
            if (ipc_msg_unpack(p->decoder, &p->msg, payload, len, &why) < 0)
                fail_msg("%s", why.text);
            return 1;
        }
        assert_ok(ipc_frame_reader_space(&p->in, &room, &len));
        ssize_t n = recv(p->fd, room, len, 0);
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n <= 0) {
            p->eof = true;
            return -1;
        }
        ipc_frame_reader_commit(&p->in, (size_t)n);
    }
}

static bool has_something(void *arg)
{
    struct peer *p = arg;
    if (p->msg.type)
        return true;
    if (try_read(p) == 0)
        return false;
    return true;
}

bool peer_read(struct world *w, struct peer *p)
{
    p->msg.type = 0;
    if (!world_run(w, has_something, p))
        fail_msg("nothing came within 5 s");
    return !p->eof;
}

void peer_expect(struct world *w, struct peer *p, enum ipc_type type)
{
    if (!peer_read(w, p))
        fail_msg("the stream ended instead of %s", ipc_type_name(type));
    if (p->msg.type != type)
        fail_msg("%s instead of %s: %s", ipc_type_name(p->msg.type), ipc_type_name(type),
                 p->msg.type == IPC_ERROR ? p->msg.u.error.message : "");
}

void peer_expect_end(struct world *w, struct peer *p, enum ipc_code code)
{
    peer_expect(w, p, IPC_ERROR);
    if (p->msg.u.error.code != (int)code)
        fail_msg("%s instead of %s", ipc_code_name(p->msg.u.error.code), ipc_code_name(code));
    assert_false(peer_read(w, p));
}

void peer_hello(struct world *w, struct peer *p, const char *token)
{
    struct ipc_hello h;
    ipc_body_init(IPC_HELLO, &h);
    h.proto_major = IPC_PROTO_MAJOR;
    memcpy(h.client, "peer", 5);
    (void)snprintf(h.token, sizeof h.token, "%s", token ? token : "");
    peer_send_msg(w, p, IPC_HELLO, &h);
    peer_expect(w, p, IPC_HELLO_OK);
}

void peer_submit(struct world *w, struct peer *p, const char *id, int32_t n)
{
    struct ipc_submit m;
    ipc_body_init(IPC_SUBMIT, &m);
    (void)snprintf(m.id, sizeof m.id, "%s", id);
    m.tokens = prompt;
    m.n_tokens = n;
    peer_send_msg(w, p, IPC_SUBMIT, &m);
}
