/* Listeners, and the server's own life. */
#define LOG_MODULE "ipc"
#include "ipc/server.h"

#include "core/log.h"
#include "core/mem.h"
#include "ipc/address.h"
#include "ipc/conn.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BACKLOG = 256 };

struct listener {
    struct list link;
    struct ipc_server *s;
    bool is_tcp;
    int port;
    union {
        uv_handle_t handle;
        uv_stream_t stream;
        uv_tcp_t tcp;
        uv_pipe_t pipe;
    } h;
};

static void on_check(uv_check_t *h)
{
    server_flush(h->data);
}

static void on_prepare(uv_prepare_t *h)
{
    server_flush(h->data);
}

static void set_defaults(struct ipc_server_config *c)
{
    c->max_connections = c->max_connections ? c->max_connections : 256;
    c->max_frame = c->max_frame ? c->max_frame : IPC_FRAME_MAX;
    c->soft_limit = c->soft_limit ? c->soft_limit : 256 << 10;
    c->hard_limit = c->hard_limit ? c->hard_limit : 4 << 20;
    c->max_lag_ms = c->max_lag_ms ? c->max_lag_ms : 10000;
    c->handshake_ms = c->handshake_ms ? c->handshake_ms : 5000;
}

static int check_config(const struct ipc_server_config *c, struct err_msg *why)
{
    const struct ipc_handlers *h = &c->handlers;
    ASSERT(h->open && h->submit && h->cancel && h->stats && h->health && h->drain && h->shutdown &&
           h->reset_prefix_cache && h->close);
    if (c->max_connections < 1 || c->max_connections > 65536)
        return err_set(why, ERR_CONFIG, "max_connections: %d is not in 1..65536",
                       c->max_connections);
    if (c->max_frame < IPC_FRAME_MIN || c->max_frame > IPC_FRAME_CEILING)
        return err_set(why, ERR_CONFIG, "max_frame: %lld is not in %d..%d", (long long)c->max_frame,
                       IPC_FRAME_MIN, IPC_FRAME_CEILING);
    if (c->soft_limit < 0 || c->hard_limit < c->soft_limit || c->hard_limit > IPC_FRAME_CEILING)
        return err_set(why, ERR_CONFIG, "hard_limit: must be at least soft_limit and at most %d",
                       IPC_FRAME_CEILING);
    if (c->max_lag_ms < 0 || c->handshake_ms < 0)
        return err_set(why, ERR_CONFIG, "max_lag_ms, handshake_ms: must not be negative");
    if (c->token && (c->token[0] == '\0' || strlen(c->token) > IPC_TOKEN_BYTES))
        return err_set(why, ERR_CONFIG, "token: must have 1 to %d bytes", IPC_TOKEN_BYTES);
    return 0;
}

/* libuv writes without MSG_NOSIGNAL: a client that went away must not kill the process. */
static void ignore_sigpipe(void)
{
    struct sigaction sa;
    if (sigaction(SIGPIPE, NULL, &sa) == 0 && sa.sa_handler == SIG_DFL) {
        sa.sa_handler = SIG_IGN;
        (void)sigaction(SIGPIPE, &sa, NULL);
    }
}

int ipc_server_create(struct ipc_server **out, uv_loop_t *loop, const struct ipc_server_config *cfg,
                      struct err_msg *why)
{
    struct ipc_server_config full = *cfg;
    struct ipc_decoder *decoder;
    *out = NULL;
    set_defaults(&full);
    TRY(check_config(&full, why));
    TRY(ipc_decoder_create(&decoder));
    ignore_sigpipe();
    struct ipc_server *s = mem_zalloc(1, sizeof *s);
    s->loop = loop;
    s->cfg = full;
    s->decoder = decoder;
    if (full.token)
        memcpy(s->token, full.token, strlen(full.token));
    s->cfg.token = NULL;
    s->slots = mem_zalloc((size_t)full.max_connections, sizeof *s->slots);
    list_init(&s->listeners);
    list_init(&s->conns);
    list_init(&s->dirty);
    /* These never fail; without a reference they do not keep the loop alive. */
    (void)uv_check_init(loop, &s->check);
    (void)uv_prepare_init(loop, &s->prepare);
    s->check.data = s->prepare.data = s;
    (void)uv_check_start(&s->check, on_check);
    (void)uv_prepare_start(&s->prepare, on_prepare);
    uv_unref((uv_handle_t *)&s->check);
    uv_unref((uv_handle_t *)&s->prepare);
    s->n_handles = 2;
    *out = s;
    return 0;
}

void server_handle_closed(struct ipc_server *s)
{
    if (--s->n_handles > 0 || !s->closing)
        return;
    void (*cb)(void *) = s->on_closed;
    void *arg = s->on_closed_arg;
    ipc_decoder_destroy(s->decoder);
    mem_free(s->slots);
    mem_free(s);
    if (cb)
        cb(arg);
}

/* --- listening --- */

static void on_listener_closed(uv_handle_t *h)
{
    struct listener *l = h->data;
    struct ipc_server *s = l->s;
    list_unlink(&l->link);
    mem_free(l);
    server_handle_closed(s);
}

static void on_connection(uv_stream_t *stream, int status)
{
    struct listener *l = stream->data;
    if (status < 0)
        log_warn("cannot take a connection: %s", err_str(status));
    else if (!l->s->closing)
        conn_accept(l->s, stream, l->is_tcp);
}

static struct listener *listener_create(struct ipc_server *s, bool is_tcp)
{
    struct listener *l = mem_zalloc(1, sizeof *l);
    l->s = s;
    l->is_tcp = is_tcp;
    if (is_tcp)
        (void)uv_tcp_init(s->loop, &l->h.tcp);
    else
        (void)uv_pipe_init(s->loop, &l->h.pipe, 0);
    l->h.handle.data = l;
    list_push_back(&s->listeners, &l->link);
    s->n_handles++;
    return l;
}

/* A socket file that nobody listens on is left over from a process that died. */
static int clear_stale(const struct ipc_address *a, const char *text, struct err_msg *why)
{
    struct stat st;
    struct sockaddr_un sa;
    if (lstat(a->path, &st) < 0)
        return 0; /* binding tells what is wrong, if anything */
    if (!S_ISSOCK(st.st_mode))
        return err_set(why, UV_EEXIST, "%s: the file exists and is no socket", text);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return err_set(why, -errno, "%s: %s", text, err_str(-errno));
    ipc_address_unix(a, &sa);
    int err = connect(fd, (const struct sockaddr *)&sa, sizeof sa) < 0 ? -errno : 0;
    (void)close(fd);
    if (err != -ECONNREFUSED)
        return err_set(why, UV_EADDRINUSE, "%s: another process listens there", text);
    log_info("replacing the stale socket %s", a->path);
    return unlink(a->path) < 0 ? err_set(why, -errno, "%s: %s", text, err_str(-errno)) : 0;
}

/* Nobody can connect between bind and listen, so the mode is set in time. */
static int listen_unix(struct ipc_server *s, const struct ipc_address *a, const char *text,
                       struct err_msg *why)
{
    TRY(clear_stale(a, text, why));
    struct listener *l = listener_create(s, false);
    int err = uv_pipe_bind(&l->h.pipe, a->path);
    if (err == 0 && chmod(a->path, 0600) < 0)
        err = -errno;
    if (err == 0)
        err = uv_listen(&l->h.stream, BACKLOG, on_connection);
    if (err < 0) {
        uv_close(&l->h.handle, on_listener_closed);
        /* libuv reports a missing folder as EACCES. */
        return err_set(why, err, "%s: %s", text,
                       err == UV_EACCES ? "the folder is missing or not writable" : err_str(err));
    }
    log_info("listening on %s", text);
    return 0;
}

static int local_port(const uv_tcp_t *tcp)
{
    struct sockaddr_storage ss = {0};
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    int len = sizeof ss;
    if (uv_tcp_getsockname(tcp, (struct sockaddr *)&ss, &len) < 0)
        return 0;
    if (ss.ss_family == AF_INET6) {
        memcpy(&in6, &ss, sizeof in6);
        return ntohs(in6.sin6_port);
    }
    memcpy(&in, &ss, sizeof in);
    return ntohs(in.sin_port);
}

static int listen_sockaddr(struct ipc_server *s, const struct sockaddr *sa)
{
    struct listener *l = listener_create(s, true);
    int err = uv_tcp_bind(&l->h.tcp, sa, 0);
    if (err == 0)
        err = uv_listen(&l->h.stream, BACKLOG, on_connection);
    if (err < 0) {
        uv_close(&l->h.handle, on_listener_closed);
        return err;
    }
    l->port = local_port(&l->h.tcp);
    return l->port;
}

/* The first of the host's addresses that can be bound. Refuses if any of them is reachable from
 * outside while there is no secret. */
static int listen_tcp(struct ipc_server *s, const struct ipc_address *a, const char *text,
                      struct err_msg *why)
{
    struct addrinfo *list;
    TRY(ipc_address_resolve(a, &list, why));
    int rc = UV_EADDRNOTAVAIL;
    for (const struct addrinfo *ai = list; ai && rc < 0; ai = ai->ai_next) {
        if (s->token[0] == '\0' && !ipc_address_is_loopback(ai->ai_addr)) {
            rc =
                err_set(why, ERR_CONFIG,
                        "%s: not a loopback address, so a shared secret (token) must be set", text);
            break;
        }
        rc = listen_sockaddr(s, ai->ai_addr);
        if (rc < 0)
            (void)err_set(why, rc, "%s: %s", text, err_str(rc));
    }
    freeaddrinfo(list);
    TRY(rc);
    log_info("listening on %s, port %d", text, rc);
    return 0;
}

int ipc_server_listen(struct ipc_server *s, const char *address, struct err_msg *why)
{
    struct ipc_address a;
    TRY(ipc_address_parse(&a, address, why));
    return a.is_unix ? listen_unix(s, &a, address, why) : listen_tcp(s, &a, address, why);
}

int ipc_server_port(const struct ipc_server *s, int32_t i)
{
    LIST_FOREACH (node, &s->listeners) {
        const struct listener *l = LIST_ENTRY(node, struct listener, link);
        if (uv_is_closing(&l->h.handle))
            continue;
        if (i-- == 0)
            return l->port;
    }
    return 0;
}

/* --- the rest --- */

void ipc_server_goaway(struct ipc_server *s, const char *reason, int64_t deadline_ms)
{
    ipc_body_init(IPC_GOAWAY, &s->goaway);
    (void)snprintf(s->goaway.reason, sizeof s->goaway.reason, "%s", reason);
    s->goaway.deadline_ms = deadline_ms > 0 ? deadline_ms : 0;
    s->goaway_until_ms = uv_now(s->loop) + (uint64_t)s->goaway.deadline_ms;
    s->going_away = true;
    LIST_FOREACH (node, &s->conns) {
        struct conn *c = LIST_ENTRY(node, struct conn, link);
        if (c->state == CONN_OPEN && !c->doom)
            conn_queue(c, IPC_GOAWAY, &s->goaway);
    }
}

static void on_handle_closed(uv_handle_t *h)
{
    server_handle_closed(h->data);
}

void ipc_server_close(struct ipc_server *s, int32_t linger_ms, void (*cb)(void *arg), void *arg)
{
    ASSERT(!s->closing);
    s->closing = true;
    s->on_closed = cb;
    s->on_closed_arg = arg;
    LIST_FOREACH (node, &s->listeners) {
        struct listener *l = LIST_ENTRY(node, struct listener, link);
        if (!uv_is_closing(&l->h.handle))
            uv_close(&l->h.handle, on_listener_closed);
    }
    LIST_FOREACH (node, &s->conns) {
        struct conn *c = LIST_ENTRY(node, struct conn, link);
        conn_end(c, UV_ECANCELED, linger_ms);
        conn_hurry(c, linger_ms);
    }
    uv_close((uv_handle_t *)&s->check, on_handle_closed);
    uv_close((uv_handle_t *)&s->prepare, on_handle_closed);
}

void ipc_server_get_stats(const struct ipc_server *s, struct ipc_server_stats *out)
{
    *out = s->stats;
    out->n_connections = s->n_slots_used;
    out->unsent_bytes = 0;
    for (int32_t i = 0; i < s->cfg.max_connections; i++) {
        if (s->slots[i].conn && s->slots[i].conn->state == CONN_OPEN)
            out->unsent_bytes += conn_unsent(s->slots[i].conn);
    }
}

void ipc_server_set_info(struct ipc_server *s, const struct ipc_hello_ok *info)
{
    s->cfg.info = *info;
}

/* Also a doomed connection: its owner's state is needed until the close handler has run. */
static struct conn *conn_any(const struct ipc_server *s, uint64_t id)
{
    uint32_t i = (uint32_t)id - 1;
    if (id == 0 || i >= (uint32_t)s->cfg.max_connections)
        return NULL;
    struct conn *c = s->slots[i].conn;
    return c && c->id == id && c->state == CONN_OPEN ? c : NULL;
}

void ipc_conn_set_user(struct ipc_server *s, uint64_t conn, void *user)
{
    struct conn *c = conn_any(s, conn);
    if (c)
        c->user = user;
}

void *ipc_conn_user(const struct ipc_server *s, uint64_t conn)
{
    const struct conn *c = conn_any(s, conn);
    return c ? c->user : NULL;
}

bool ipc_conn_alive(const struct ipc_server *s, uint64_t conn)
{
    return conn_find(s, conn) != NULL;
}

void ipc_conn_close(struct ipc_server *s, uint64_t conn)
{
    struct conn *c = conn_any(s, conn);
    if (c)
        conn_end(c, UV_ECANCELED, CONN_LINGER_MS);
}
