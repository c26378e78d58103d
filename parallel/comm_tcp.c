/* The collectives of comm_tcp.h. How ranks find each other is in tcp_join.c, the bytes are in
 * tcp_wire.c.
 *
 * Threads: one runs the collectives, and alone reads and writes the data connections. Another, of
 * this file, owns the heartbeats. Either, and comm_abort from anywhere, may fail the communicator:
 * a flag, then shutdown() on every data connection, which wakes whoever waits there here and on the
 * other ranks. Connections are closed only after the heartbeat's thread has ended. */
#define LOG_MODULE "comm"
#include "parallel/comm_tcp.h"

#include "core/clock.h"
#include "core/log.h"
#include "core/mem.h"
#include "parallel/tcp_join.h"
#include "parallel/tcp_wire.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BEAT_MS = 5000, BEATS_A_DEADLINE = 5 };

enum tag_kind { TAG_REDUCE = 1, TAG_GATHER, TAG_BARRIER };

struct comm_tcp {
    struct comm base;
    struct tcp_peers peers;
    size_t max_floats, max_msg;
    int64_t timeout_us, beat_ms;
    atomic_bool failed;
    float *shares;            /* rank 0: [n_ranks, max_floats] */
    struct wire_head pending; /* a follower's message whose length was read, kind 0: none */
    /* the heartbeat's thread */
    pthread_t thread;
    bool has_thread;
    int stop_fd; /* eventfd: the thread is to say goodbye and end */
    void (*on_fail)(void *arg);
    void *fail_arg;
};

static struct comm_tcp *self(struct comm *c)
{
    return (struct comm_tcp *)c;
}

/* Connections: rank 0 has one to every other rank, at its index; a follower one to rank 0. */
static bool is_peer(const struct comm_tcp *t, int r)
{
    return t->base.rank == 0 ? r > 0 && r < t->base.n_ranks : r == 0;
}

/* ---- failing ---- */

/* Any thread; idempotent. */
static int fail(struct comm_tcp *t)
{
    if (atomic_exchange(&t->failed, true))
        return ERR_PEER;
    for (int r = 0; r < t->base.n_ranks; r++) {
        if (is_peer(t, r))
            (void)shutdown(t->peers.data[r], SHUT_RDWR);
    }
    if (t->on_fail)
        t->on_fail(t->fail_arg);
    return ERR_PEER;
}

static bool has_failed(const struct comm_tcp *t)
{
    return atomic_load(&t->failed);
}

/* What went wrong with rank r, once: later errors follow from the first. */
static int fail_peer(struct comm_tcp *t, int r, int err, const char *what)
{
    if (!has_failed(t)) {
        if (err == -ETIMEDOUT)
            log_error("rank=%d peer=%d the peer did not %s within %" PRId64 " ms", t->base.rank, r,
                      what, t->timeout_us / 1000);
        else
            log_error("rank=%d peer=%d the peer is gone: it did not %s", t->base.rank, r, what);
    }
    return fail(t);
}

/* ---- heartbeat ---- */

struct beats {
    int64_t heard_us[TCP_MAX_RANKS];
    bool said_bye[TCP_MAX_RANKS];
};

static void send_beats(struct comm_tcp *t, char byte)
{
    for (int r = 0; r < t->base.n_ranks; r++) {
        if (is_peer(t, r)) /* a full buffer holds beats enough */
            (void)send(t->peers.beat[r], &byte, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    }
}

/* Reads what rank r has sent. A peer that said goodbye has left in order: whoever still needs it
 * finds its data connection ended. False: it is gone without a word. */
static bool hear(struct comm_tcp *t, struct beats *b, int r)
{
    char buf[64];
    ssize_t n = recv(t->peers.beat[r], buf, sizeof buf, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return true;
    if (n <= 0)
        return b->said_bye[r];
    b->heard_us[r] = clock_monotonic_us(NULL);
    if (memchr(buf, WIRE_BYE, (size_t)n))
        b->said_bye[r] = true;
    return true;
}

static bool is_silent(const struct comm_tcp *t, const struct beats *b, int r, int64_t now)
{
    return !b->said_bye[r] && now - b->heard_us[r] > t->beat_ms * 1000;
}

static void listen_to(struct comm_tcp *t, struct beats *b, int r, bool readable)
{
    if (readable && !hear(t, b, r)) {
        if (!has_failed(t))
            log_error("rank=%d peer=%d the peer's process is gone", t->base.rank, r);
        (void)fail(t);
    } else if (is_silent(t, b, r, clock_monotonic_us(NULL))) {
        if (!has_failed(t))
            log_error("rank=%d peer=%d nothing heard for %" PRId64 " ms", t->base.rank, r,
                      t->beat_ms);
        (void)fail(t);
    }
}

static void *beat_main(void *arg)
{
    struct comm_tcp *t = arg;
    const int64_t every_us = t->beat_ms * 1000 / BEATS_A_DEADLINE;
    struct beats b = {{0}, {0}};
    struct pollfd p[TCP_MAX_RANKS + 1];
    int64_t sent = clock_monotonic_us(NULL);

    for (int r = 0; r < t->base.n_ranks; r++)
        b.heard_us[r] = sent;
    send_beats(t, WIRE_BEAT);
    while (!has_failed(t)) {
        for (int r = 0; r < t->base.n_ranks; r++)
            p[r] =
                (struct pollfd){is_peer(t, r) && !b.said_bye[r] ? t->peers.beat[r] : -1, POLLIN, 0};
        p[t->base.n_ranks] = (struct pollfd){t->stop_fd, POLLIN, 0};
        int64_t left = sent + every_us - clock_monotonic_us(NULL);
        (void)poll(p, (nfds_t)t->base.n_ranks + 1, left > 0 ? (int)(left / 1000) + 1 : 0);
        if (p[t->base.n_ranks].revents) {
            send_beats(t, WIRE_BYE);
            break;
        }
        if (clock_monotonic_us(NULL) - sent >= every_us) {
            sent = clock_monotonic_us(NULL);
            send_beats(t, WIRE_BEAT);
        }
        for (int r = 0; r < t->base.n_ranks; r++) {
            if (is_peer(t, r))
                listen_to(t, &b, r, p[r].revents != 0);
        }
    }
    return NULL;
}

static int start_beats(struct comm_tcp *t)
{
    sigset_t all, old;
    t->stop_fd = eventfd(0, EFD_CLOEXEC);
    if (t->stop_fd < 0)
        return -errno;
    (void)sigfillset(&all); /* signals are the program's threads' business */
    (void)pthread_sigmask(SIG_SETMASK, &all, &old);
    int err = pthread_create(&t->thread, NULL, beat_main, t);
    (void)pthread_sigmask(SIG_SETMASK, &old, NULL);
    t->has_thread = err == 0;
    return -err;
}

static void stop_beats(struct comm_tcp *t)
{
    const uint64_t one = 1;
    if (t->has_thread && write(t->stop_fd, &one, sizeof one) == (ssize_t)sizeof one)
        (void)pthread_join(t->thread, NULL);
    t->has_thread = false;
    if (t->stop_fd >= 0)
        (void)close(t->stop_fd);
}

/* ---- exchange ---- */

static uint64_t make_tag(enum tag_kind kind, size_t n)
{
    return (uint64_t)kind << 56 | (uint64_t)n;
}

static int64_t deadline(const struct comm_tcp *t)
{
    return clock_monotonic_us(NULL) + t->timeout_us;
}

/* Rank of the i-th connection of rank 0. */
enum { FIRST = 1 };

/* Rank 0: everybody's head, checked, then everybody's n floats into shares. */
static int collect(struct comm_tcp *t, uint64_t tag, size_t n)
{
    struct wire_head heads[TCP_MAX_RANKS] = {{0}};
    struct wire_io io[TCP_MAX_RANKS];
    const int n_peers = t->base.n_ranks - FIRST;
    const int64_t end = deadline(t);
    int who = 0;

    for (int i = 0; i < n_peers; i++)
        io[i] = (struct wire_io){
            .fd = t->peers.data[i + FIRST], .in = (char *)&heads[i], .left = sizeof heads[i]};
    int err = wire_read_all(io, n_peers, end, &who);
    for (int i = 0; i < n_peers && err == -ETIMEDOUT; i++)
        who = io[i].left ? i : who;
    if (err < 0)
        return fail_peer(t, who + FIRST, err, "take part in the collective");
    for (int i = 0; i < n_peers; i++) {
        const struct wire_head *h = &heads[i];
        if (h->kind != WIRE_SHARE || h->rank != (uint32_t)(i + FIRST) || h->tag != tag ||
            h->len != n * sizeof(float)) {
            log_error("rank=0 peer=%d the ranks have diverged: collective %" PRIx64
                      " here, %" PRIx64 " there",
                      i + FIRST, tag, h->tag);
            return fail(t);
        }
        float *share = t->shares + (size_t)(i + FIRST) * n;
        io[i] = (struct wire_io){
            .fd = t->peers.data[i + FIRST], .in = (char *)share, .left = n * sizeof(float)};
    }
    err = wire_read_all(io, n_peers, end, &who);
    return err < 0 ? fail_peer(t, who + FIRST, err, "send its share") : 0;
}

/* Rank 0: a head and its bytes to everybody. */
static int broadcast(struct comm_tcp *t, const struct wire_head *head, const void *bytes)
{
    struct wire_io io[TCP_MAX_RANKS];
    const int n_peers = t->base.n_ranks - FIRST;
    const int64_t end = deadline(t);
    const void *parts[] = {head, bytes};
    const size_t lens[] = {sizeof *head, (size_t)head->len};
    int who = 0;

    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < n_peers; i++)
            io[i] =
                (struct wire_io){.fd = t->peers.data[i + FIRST], .out = parts[k], .left = lens[k]};
        int err = wire_write_all(io, n_peers, end, &who);
        for (int i = 0; i < n_peers && err == -ETIMEDOUT; i++)
            who = io[i].left ? i : who;
        if (err < 0)
            return fail_peer(t, who + FIRST, err, "read what it is sent");
    }
    return 0;
}

/* A follower: its n floats to rank 0, the answer of n_out floats back. */
static int submit(struct comm_tcp *t, uint64_t tag, const float *in, size_t n, float *out,
                  size_t n_out)
{
    const int64_t end = deadline(t);
    const int fd = t->peers.data[0];
    struct wire_head h = {WIRE_SHARE, (uint32_t)t->base.rank, tag, n * sizeof *in};

    int err = wire_write(fd, &h, sizeof h, end);
    if (err == 0)
        err = wire_write(fd, in, n * sizeof *in, end);
    if (err == 0)
        err = wire_read(fd, &h, sizeof h, end);
    if (err < 0)
        return fail_peer(t, 0, err, "take part in the collective");
    if (h.kind != WIRE_RESULT || h.tag != tag || h.len != n_out * sizeof *out) {
        log_error("rank=%d peer=0 the ranks have diverged: collective %" PRIx64 " here, %" PRIx64
                  " there",
                  t->base.rank, tag, h.tag);
        return fail(t);
    }
    err = wire_read(fd, out, n_out * sizeof *out, end);
    return err < 0 ? fail_peer(t, 0, err, "send the result") : 0;
}

/* Rank 0: everybody's share is in place, its own too; the sum goes to all. */
static int lead_reduce(struct comm_tcp *t, uint64_t tag, float *buf, size_t n)
{
    const struct wire_head h = {WIRE_RESULT, 0, tag, n * sizeof *buf};
    TRY(collect(t, tag, n));
    for (int r = FIRST; r < t->base.n_ranks; r++) { /* in rank order */
        const float *share = t->shares + (size_t)r * n;
        for (size_t i = 0; i < n; i++)
            buf[i] += share[i];
    }
    return broadcast(t, &h, buf);
}

static int tcp_all_reduce(struct comm *c, float *buf, size_t n)
{
    struct comm_tcp *t = self(c);
    const uint64_t tag = make_tag(TAG_REDUCE, n);
    if (has_failed(t))
        return ERR_PEER;
    for (size_t at = 0; at < n; at += t->max_floats) {
        size_t len = n - at < t->max_floats ? n - at : t->max_floats;
        TRY(c->rank == 0 ? lead_reduce(t, tag, buf + at, len)
                         : submit(t, tag, buf + at, len, buf + at, len));
    }
    return 0;
}

/* Pieces are cut so that all ranks' fit where one rank's piece of a sum does. */
static int gather_piece(struct comm_tcp *t, uint64_t tag, float *all, const float *in, size_t n)
{
    const size_t n_all = n * (size_t)t->base.n_ranks;
    const struct wire_head h = {WIRE_RESULT, 0, tag, n_all * sizeof *all};
    if (t->base.rank != 0)
        return submit(t, tag, in, n, all, n_all);
    TRY(collect(t, tag, n));
    if (n)
        memcpy(all, in, n * sizeof *all);
    return broadcast(t, &h, all);
}

static int tcp_all_gather(struct comm *c, float *out, const float *in, size_t n)
{
    struct comm_tcp *t = self(c);
    const uint64_t tag = make_tag(TAG_GATHER, n);
    if (has_failed(t))
        return ERR_PEER;
    for (size_t at = 0; at < n; at += t->max_floats) {
        size_t len = n - at < t->max_floats ? n - at : t->max_floats;
        TRY(gather_piece(t, tag, t->shares, in + at, len));
        for (int r = 0; r < c->n_ranks; r++)
            memcpy(out + (size_t)r * n + at, t->shares + (size_t)r * len, len * sizeof *out);
    }
    return 0;
}

static int tcp_barrier(struct comm *c)
{
    struct comm_tcp *t = self(c);
    if (has_failed(t))
        return ERR_PEER;
    return gather_piece(t, make_tag(TAG_BARRIER, 0), t->shares, t->shares, 0);
}

/* ---- messages ---- */

static int tcp_post(struct comm *c, const void *msg, size_t len)
{
    struct comm_tcp *t = self(c);
    const struct wire_head h = {WIRE_MESSAGE, 0, 0, len};
    if (c->rank != 0 || len > t->max_msg)
        return ERR_INVALID;
    return has_failed(t) ? ERR_PEER : broadcast(t, &h, msg);
}

/* No deadline for the head; its bytes follow at once. */
static int tcp_wait(struct comm *c, void *buf, size_t cap, size_t *len)
{
    struct comm_tcp *t = self(c);
    struct wire_head *h = &t->pending;
    if (c->rank == 0)
        return ERR_INVALID;
    if (has_failed(t))
        return ERR_PEER;
    if (h->kind == 0 && wire_read(t->peers.data[0], h, sizeof *h, -1) < 0) {
        *h = (struct wire_head){0};
        return fail(t);
    }
    if (h->kind != WIRE_MESSAGE || h->len > t->max_msg) {
        log_error("rank=%d peer=0 the ranks have diverged: a message here, %" PRIx64 " there",
                  c->rank, h->tag);
        return fail(t);
    }
    *len = (size_t)h->len;
    if (*len > cap)
        return -EMSGSIZE; /* left in place */
    *h = (struct wire_head){0};
    int err = wire_read(t->peers.data[0], buf, *len, deadline(t));
    return err < 0 ? fail_peer(t, 0, err, "send its message") : 0;
}

static void tcp_abort(struct comm *c)
{
    (void)fail(self(c));
}

static void tcp_set_timeout(struct comm *c, int64_t timeout_ms)
{
    self(c)->timeout_us = timeout_ms * 1000;
}

static int tcp_poll(struct comm *c)
{
    return has_failed(self(c)) ? ERR_PEER : 0;
}

/* ---- life ---- */

static void tcp_close(struct comm *c)
{
    struct comm_tcp *t = self(c);
    stop_beats(t);
    tcp_peers_close(&t->peers, c->n_ranks);
    mem_free(t->shares);
    mem_free(t);
}

static const struct comm_ops comm_tcp_ops = {
    .name = "tcp",
    .close = tcp_close,
    .all_reduce = tcp_all_reduce,
    .all_gather = tcp_all_gather,
    .barrier = tcp_barrier,
    .post = tcp_post,
    .wait = tcp_wait,
    .abort = tcp_abort,
    .poll = tcp_poll,
    .set_timeout = tcp_set_timeout,
};

static int check_config(const struct comm_tcp_config *cfg, struct err_msg *why)
{
    const size_t token = cfg->token ? strlen(cfg->token) : 0;
    if (cfg->n_ranks < 1 || cfg->n_ranks > TCP_MAX_RANKS || cfg->rank < 0 ||
        cfg->rank >= cfg->n_ranks)
        return err_set(why, ERR_INVALID, "rank %d of %d ranks: at most %d", cfg->rank, cfg->n_ranks,
                       TCP_MAX_RANKS);
    if (token < 1 || token > COMM_TCP_TOKEN)
        return err_set(why, ERR_INVALID, "the token has %zu bytes, must be 1 to %d", token,
                       COMM_TCP_TOKEN);
    if (cfg->timeout_ms < 1 || cfg->max_floats < 1 || !cfg->leader)
        return err_set(why, ERR_INVALID, "timeout_ms %" PRId64 " or max_floats %zu out of range",
                       cfg->timeout_ms, cfg->max_floats);
    return 0;
}

int comm_tcp_create(struct comm **out, const struct comm_tcp_config *cfg, struct err_msg *why)
{
    *out = NULL;
    int err = check_config(cfg, why);
    if (err < 0)
        return err;
    struct comm_tcp *t = mem_zalloc(1, sizeof *t);
    t->base = (struct comm){&comm_tcp_ops, cfg->rank, cfg->n_ranks};
    t->max_floats = cfg->max_floats;
    t->max_msg = cfg->max_msg;
    t->timeout_us = cfg->timeout_ms * 1000;
    t->beat_ms = cfg->beat_ms > 0 ? cfg->beat_ms : BEAT_MS;
    t->on_fail = cfg->on_fail;
    t->fail_arg = cfg->fail_arg;
    t->stop_fd = -1;
    tcp_peers_init(&t->peers);
    t->shares = mem_try_aligned((size_t)cfg->n_ranks * cfg->max_floats, sizeof *t->shares);
    err = t->shares ? tcp_join(&t->peers, cfg, why)
                    : err_set(why, -ENOMEM, "no memory for %d shares of %zu floats", cfg->n_ranks,
                              cfg->max_floats);
    if (err == 0) {
        err = start_beats(t);
        if (err < 0)
            (void)err_set(why, err, "cannot start the heartbeat: %s", err_str(err));
    }
    if (err < 0) {
        tcp_close(&t->base);
        return err;
    }
    *out = &t->base;
    return 0;
}

int comm_tcp_listen(int *fd, const char *address, struct err_msg *why)
{
    return wire_listen(fd, address, why);
}
