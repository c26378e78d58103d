/* The client library: blocking calls over a non-blocking socket, one poll() away from the kernel.
 * Replies to questions (stats, health, ...) are told from the events of running requests by their
 * tag; events that come while one waits for a reply are kept as packed messages, in order. Errors
 * are returned, never fatal: this code runs in other people's programs. */
#include "ipc/client.h"

#include "ipc/address.h"
#include "ipc/frame.h"
#include "ipc/message.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { CONNECT_MS = 5000, FOREVER = -1 };

/* An event that arrived while a reply was waited for. */
struct kept {
    struct kept *next;
    size_t len;
    uint8_t payload[];
};

struct sluice_client {
    int fd;
    struct ipc_frame_reader in;
    struct ipc_buf out;
    size_t out_sent;
    struct ipc_decoder *decoder;
    struct ipc_msg msg; /* the last one read: events point into it and into the decoder */
    struct kept *first_kept, **last_kept;
    uint64_t last_tag;
    struct ipc_hello_ok hello;
    struct sluice_info info;
    struct sluice_logprob *logprobs;
    struct sluice_stat *stats;
    struct err_msg why;
    int broken; /* < 0: the connection is over, and this is why */
};

_Static_assert(SLUICE_EPROTOCOL == ERR_PROTOCOL && SLUICE_EINVALID == ERR_INVALID &&
                   SLUICE_EREFUSED == ERR_AUTH,
               "error codes");
_Static_assert((int)SLUICE_MAX_STOP == (int)IPC_MAX_STOP &&
                   (int)SLUICE_MAX_LOGPROBS == (int)IPC_MAX_LOGPROBS &&
                   (int)SLUICE_REL == (int)IPC_SPARSE_REL &&
                   (int)SLUICE_SHUTDOWN == (int)IPC_REASON_SHUTDOWN,
               "limits and numbers");

/* --- time and waiting --- */

static int64_t now_ms(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* When a timeout ends; -1: never. */
static int64_t deadline_of(int timeout_ms)
{
    return timeout_ms < 0 ? FOREVER : now_ms() + timeout_ms;
}

/* > 0 ready, 0 the deadline has passed, < 0 failed. */
static int wait_for(int fd, short events, int64_t deadline)
{
    for (;;) {
        struct pollfd p = {.fd = fd, .events = events};
        int64_t left = deadline == FOREVER ? -1 : deadline - now_ms();
        int ms = left > 1 << 30 ? 1 << 30 : left < 0 && deadline != FOREVER ? 0 : (int)left;
        int n = poll(&p, 1, ms);
        if (n >= 0)
            return n;
        if (errno != EINTR)
            return -errno;
    }
}

static int broken(struct sluice_client *c, int err)
{
    if (c->why.text[0] == '\0')
        (void)err_set(&c->why, err, "connection lost: %s", err_str(err));
    c->broken = err;
    return err;
}

/* --- bytes in and out --- */

/* Sends what the socket takes now. */
static int push_out(struct sluice_client *c)
{
    while (c->out_sent < c->out.len) {
        ssize_t n = send(c->fd, c->out.data + c->out_sent, c->out.len - c->out_sent, MSG_NOSIGNAL);
        if (n >= 0)
            c->out_sent += (size_t)n;
        else if (errno == EAGAIN)
            return 0;
        else if (errno != EINTR)
            return -errno;
    }
    c->out.len = c->out_sent = 0;
    return 0;
}

/* 1: bytes came, 0: none are there. */
static int pull_in(struct sluice_client *c)
{
    uint8_t *room;
    size_t len;
    TRY(ipc_frame_reader_space(&c->in, &room, &len));
    for (;;) {
        ssize_t n = recv(c->fd, room, len, 0);
        if (n > 0) {
            ipc_frame_reader_commit(&c->in, (size_t)n);
            return 1;
        }
        if (n == 0)
            return err_set(&c->why, -ECONNRESET, "the daemon closed the connection");
        if (errno == EAGAIN)
            return 0;
        if (errno != EINTR)
            return -errno;
    }
}

/* Next payload: 1, or 0 at the deadline. A write error does not hide what the daemon said before it
 * closed. */
static int next_payload(struct sluice_client *c, const uint8_t **payload, size_t *len,
                        int64_t deadline)
{
    if (c->broken < 0)
        return c->broken;
    for (;;) {
        int rc = ipc_frame_reader_next(&c->in, payload, len, &c->why);
        if (rc != 0)
            return rc < 0 ? broken(c, rc) : rc;
        int write_err = push_out(c);
        if (write_err < 0)
            c->out.len = c->out_sent = 0;
        rc = pull_in(c);
        if (rc < 0)
            return broken(c, rc);
        if (rc > 0)
            continue;
        if (write_err < 0)
            return broken(c, write_err);
        rc = wait_for(c->fd, sluice_poll_events(c), deadline);
        if (rc < 0)
            return broken(c, rc);
        if (rc == 0)
            return 0;
    }
}

static int unpack(struct sluice_client *c, const uint8_t *payload, size_t len)
{
    int rc = ipc_msg_unpack(c->decoder, &c->msg, payload, len, &c->why);
    return rc < 0 && rc != ERR_UNSUPPORTED ? broken(c, rc) : rc;
}

/* --- connecting --- */

static int open_socket(int family, const struct sockaddr *sa, socklen_t len, int64_t deadline,
                       int *out)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), err = 0;
    socklen_t err_len = sizeof err;
    if (fd < 0)
        return -errno;
    if (connect(fd, sa, len) < 0) {
        err = errno;
        if (err == EINPROGRESS) {
            int rc = wait_for(fd, POLLOUT, deadline);
            err = rc == 0 ? ETIMEDOUT : rc < 0 ? -rc : 0;
            if (!err && getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &err_len) < 0)
                err = errno;
        }
    }
    if (err) {
        (void)close(fd);
        return -err;
    }
    if (family != AF_UNIX)
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    *out = fd;
    return 0;
}

static int connect_tcp(struct sluice_client *c, const struct ipc_address *a, int64_t deadline)
{
    struct addrinfo *list;
    int err = -EADDRNOTAVAIL;
    TRY(ipc_address_resolve(a, &list, &c->why));
    for (const struct addrinfo *ai = list; ai && err < 0; ai = ai->ai_next)
        err = open_socket(ai->ai_family, ai->ai_addr, ai->ai_addrlen, deadline, &c->fd);
    freeaddrinfo(list);
    return err;
}

static int connect_address(struct sluice_client *c, const char *address, int64_t deadline)
{
    struct ipc_address a;
    struct sockaddr_un sa;
    int err;
    TRY(ipc_address_parse(&a, address, &c->why));
    if (a.is_unix) {
        ipc_address_unix(&a, &sa);
        err = open_socket(AF_UNIX, (const struct sockaddr *)&sa, sizeof sa, deadline, &c->fd);
    } else {
        err = connect_tcp(c, &a, deadline);
    }
    if (err < 0 && c->why.text[0] == '\0')
        (void)err_set(&c->why, err, "%s: %s", address, err_str(err));
    return err;
}

static int copy_text(char *to, size_t room, const char *text, const char *what, struct err_msg *why)
{
    size_t len = text ? strlen(text) : 0;
    if (len >= room)
        return err_set(why, ERR_INVALID, "%s: longer than %zu bytes", what, room - 1);
    if (len)
        memcpy(to, text, len);
    to[len] = '\0';
    return 0;
}

static void fill_info(struct sluice_client *c)
{
    const struct ipc_hello_ok *h = &c->hello;
    c->info = (struct sluice_info){
        .proto_major = h->proto_major,
        .proto_minor = h->proto_minor,
        .version = h->version,
        .instance_id = h->instance_id,
        .model = h->model,
        .kv_dtype = h->kv_dtype,
        .device = h->device,
        .vocab = h->vocab,
        .max_model_len = h->max_model_len,
        .max_servable_tokens = h->max_servable_tokens,
        .block_size = h->block_size,
        .num_blocks = h->num_blocks,
        .tp = h->tp,
        .gate_rows = h->gate_rows,
        .n_levels = h->n_levels,
        .k_levels = h->k_levels,
        .max_frame = h->max_frame,
        .max_connections = h->max_connections,
        .max_queued_requests = h->max_queued_requests,
        .max_queued_tokens = h->max_queued_tokens,
    };
    for (int32_t i = 0; i < h->n_modes; i++) {
        c->info.has_dense |= h->modes[i] == IPC_SPARSE_DENSE;
        c->info.has_abs |= h->modes[i] == IPC_SPARSE_ABS;
        c->info.has_rel |= h->modes[i] == IPC_SPARSE_REL;
    }
}

static int shake(struct sluice_client *c, const struct sluice_options *o, int64_t deadline)
{
    struct ipc_hello hello;
    const uint8_t *payload = NULL;
    size_t len = 0;
    ipc_body_init(IPC_HELLO, &hello);
    hello.proto_major = IPC_PROTO_MAJOR;
    hello.proto_minor = IPC_PROTO_MINOR;
    TRY(copy_text(hello.client, sizeof hello.client, o->name ? o->name : "sluice_client", "name",
                  &c->why));
    TRY(copy_text(hello.token, sizeof hello.token, o->token, "token", &c->why));
    TRY(ipc_body_pack(&c->out, IPC_HELLO, &hello, &c->why));
    int rc = next_payload(c, &payload, &len, deadline);
    if (rc == 0)
        return err_set(&c->why, -ETIMEDOUT, "no answer to the handshake in time");
    TRY(rc);
    TRY(unpack(c, payload, len));
    if (c->msg.type == IPC_ERROR)
        return err_set(&c->why, ERR_AUTH, "the daemon refused the connection: %s: %s",
                       ipc_code_name(c->msg.u.error.code), c->msg.u.error.message);
    if (c->msg.type != IPC_HELLO_OK)
        return err_set(&c->why, ERR_PROTOCOL, "the daemon answered HELLO with %s",
                       ipc_type_name(c->msg.type));
    c->hello = c->msg.u.hello_ok;
    fill_info(c);
    return 0;
}

static int client_start(struct sluice_client *c, const char *address,
                        const struct sluice_options *o)
{
    int64_t deadline = deadline_of(o->connect_ms > 0 ? o->connect_ms : CONNECT_MS);
    c->fd = -1;
    c->last_kept = &c->first_kept;
    ipc_frame_reader_init(&c->in, IPC_FRAME_MAX);
    TRY(ipc_decoder_create(&c->decoder));
    TRY(connect_address(c, address, deadline));
    return shake(c, o, deadline);
}

int sluice_connect(struct sluice_client **out, const char *address,
                   const struct sluice_options *options, char *why, size_t why_len)
{
    static const struct sluice_options none;
    struct sluice_client *c = calloc(1, sizeof *c);
    int err = c ? client_start(c, address, options ? options : &none) : -ENOMEM;
    if (why && why_len)
        (void)snprintf(why, why_len, "%s", err < 0 ? err_why(c ? &c->why : NULL, err) : "");
    if (err < 0) {
        sluice_close(c);
        c = NULL;
    }
    *out = c;
    return err;
}

void sluice_close(struct sluice_client *c)
{
    if (!c)
        return;
    if (c->fd >= 0)
        (void)close(c->fd);
    while (c->first_kept) {
        struct kept *k = c->first_kept;
        c->first_kept = k->next;
        free(k);
    }
    ipc_frame_reader_deinit(&c->in);
    ipc_buf_free(&c->out);
    ipc_decoder_destroy(c->decoder);
    free(c->logprobs);
    free(c->stats);
    free(c);
}

/* --- small things --- */

const struct sluice_info *sluice_get_info(const struct sluice_client *c)
{
    return &c->info;
}

const char *sluice_error(const struct sluice_client *c)
{
    return c->why.text;
}

const char *sluice_strerror(int err)
{
    return err_str(err);
}

const char *sluice_code_name(int code)
{
    return ipc_code_name(code);
}

const char *sluice_reason_name(int reason)
{
    return ipc_reason_name(reason);
}

int sluice_fd(const struct sluice_client *c)
{
    return c->fd;
}

short sluice_poll_events(const struct sluice_client *c)
{
    return c->out_sent < c->out.len ? POLLIN | POLLOUT : POLLIN;
}

bool sluice_event_is_last(const struct sluice_event *event)
{
    return event->type == SLUICE_DONE || event->type == SLUICE_FAILED;
}

int sluice_flush(struct sluice_client *c, int timeout_ms)
{
    int64_t deadline = deadline_of(timeout_ms);
    while (!c->broken) {
        int rc = push_out(c);
        if (rc < 0)
            return broken(c, rc);
        if (c->out.len == 0)
            return 0;
        rc = wait_for(c->fd, POLLOUT, deadline);
        if (rc < 0)
            return broken(c, rc);
        if (rc == 0)
            return err_set(&c->why, -ETIMEDOUT, "the daemon does not read");
    }
    return c->broken;
}

/* --- requests --- */

/* Queues a message and sends what goes. A write error shows when events are read. */
static int queue(struct sluice_client *c, enum ipc_type type, const void *body)
{
    if (c->broken)
        return c->broken;
    c->why.text[0] = '\0';
    size_t before = c->out.len;
    int err = ipc_body_pack(&c->out, type, body, &c->why);
    size_t len = c->out.len - before;
    if (err == 0 && (int64_t)len - IPC_FRAME_HEADER > c->hello.max_frame) {
        c->out.len = before;
        err = err_set(&c->why, ERR_INVALID, "the message has %zu bytes, the daemon takes %lld", len,
                      (long long)c->hello.max_frame);
    }
    if (err < 0) {
        if (c->why.text[0] == '\0')
            (void)err_set(&c->why, err, "%s", err_str(err));
        return err;
    }
    (void)push_out(c);
    return 0;
}

void sluice_request_init(struct sluice_request *r)
{
    *r = (struct sluice_request){
        .max_tokens = 16,
        .temperature = 1,
        .top_p = 1,
        .repetition_penalty = 1,
        .stream = true,
    };
}

static int copy_bounded(struct ipc_submit *m, const struct sluice_request *r, struct err_msg *why)
{
    TRY(copy_text(m->id, sizeof m->id, r->id, "id", why));
    TRY(copy_text(m->tenant, sizeof m->tenant, r->tenant, "tenant", why));
    if (r->n_stop < 0 || r->n_stop > IPC_MAX_STOP)
        return err_set(why, ERR_INVALID, "stop_token_ids: %d, at most %d", r->n_stop, IPC_MAX_STOP);
    if (r->n_salt < 0 || r->n_salt > IPC_SALT_BYTES)
        return err_set(why, ERR_INVALID, "cache_salt: %d bytes, at most %d", r->n_salt,
                       IPC_SALT_BYTES);
    if (r->n_tokens < 0 || (r->n_tokens > 0 && !r->tokens))
        return err_set(why, ERR_INVALID, "tokens: missing");
    m->n_stop = r->n_stop;
    memcpy(m->stop_token_ids, r->stop_token_ids, sizeof m->stop_token_ids);
    m->n_salt = r->n_salt;
    if (r->n_salt > 0)
        memcpy(m->cache_salt, r->cache_salt, (size_t)r->n_salt);
    m->n_tokens = r->n_tokens;
    m->tokens = r->tokens;
    return 0;
}

int sluice_submit(struct sluice_client *c, const struct sluice_request *r)
{
    struct ipc_submit m;
    ipc_body_init(IPC_SUBMIT, &m);
    TRY(copy_bounded(&m, r, &c->why));
    m.max_tokens = r->max_tokens;
    m.min_tokens = r->min_tokens;
    m.temperature = r->temperature;
    m.top_k = r->top_k;
    m.top_p = r->top_p;
    m.min_p = r->min_p;
    m.repetition_penalty = r->repetition_penalty;
    m.presence_penalty = r->presence_penalty;
    m.frequency_penalty = r->frequency_penalty;
    m.has_seed = r->has_seed;
    m.seed = r->seed;
    m.ignore_eos = r->ignore_eos;
    m.logprobs = r->logprobs;
    m.priority = r->priority;
    m.deadline_ms = r->deadline_ms;
    m.queue_timeout_ms = r->queue_timeout_ms;
    m.stream = r->stream;
    m.sparse = (struct ipc_sparse){(int32_t)r->sparse, r->k, r->ln_lambda, r->gate_rows};
    TRY(ipc_submit_check(&m, c->info.vocab, &c->why));
    return queue(c, IPC_SUBMIT, &m);
}

int sluice_cancel(struct sluice_client *c, const char *id)
{
    return queue(c, IPC_CANCEL, &(struct ipc_cancel){1, &id});
}

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
    int rc = unpack(c, k->payload, k->len);
    /* Nothing in a read message points into the payload. */
    free(k);
    return rc < 0 ? rc : 1;
}

int sluice_next(struct sluice_client *c, struct sluice_event *event, int timeout_ms)
{
    int64_t deadline = deadline_of(timeout_ms);
    const uint8_t *payload = NULL;
    size_t len = 0;
    if (!c->broken)
        c->why.text[0] = '\0';
    for (;;) {
        int rc = take_kept(c);
        if (rc == 0) {
            rc = next_payload(c, &payload, &len, deadline);
            if (rc <= 0)
                return rc;
            rc = unpack(c, payload, len);
        }
        if (rc == ERR_UNSUPPORTED)
            continue;
        TRY(rc);
        rc = to_event(c, event);
        if (rc < 0)
            return broken(c, rc);
        if (rc > 0)
            return rc;
    }
}

/* --- questions --- */

static int keep(struct sluice_client *c, const uint8_t *payload, size_t len)
{
    struct kept *k = malloc(sizeof *k + len);
    if (!k)
        return broken(c, -ENOMEM);
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
    int64_t deadline = deadline_of(timeout_ms);
    const uint8_t *payload = NULL;
    size_t len = 0;
    for (;;) {
        int rc = next_payload(c, &payload, &len, deadline);
        if (rc == 0)
            return err_set(&c->why, -ETIMEDOUT, "no answer in time");
        TRY(rc);
        rc = unpack(c, payload, len);
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
    TRY(queue(c, verb, &(struct ipc_control){tag}));
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
    TRY(queue(c, IPC_DRAIN, &m));
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
