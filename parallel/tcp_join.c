/* Rank 0 takes connections until every other rank has two. A connection says who it is in one
 * wire_hello of fixed size, within HELLO_US; whatever does not, or says something wrong, is closed
 * and costs nothing more. A rank that ends before all have joined leaves its place to a successor.
 * When all are there, rank 0 sends GO on every data connection.
 *
 * A follower tries until the deadline: the leader may be started last. A refusal is final. */
#define LOG_MODULE "comm"
#include "parallel/tcp_join.h"

#include "core/clock.h"
#include "core/log.h"
#include "core/mem.h"
#include "parallel/tcp_wire.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    HELLO_US = 5000000,
    SLICE_MS = 50, /* between looks at the clock and at peers_alive */
    RETRY_MS = 50,
    MAX_STRANGERS = 32, /* connections that have not said who they are; the oldest makes room */
};

_Static_assert((int)COMM_TCP_TOKEN == (int)WIRE_TOKEN, "a token fits its field");

struct stranger {
    int fd; /* -1: free */
    int64_t since_us;
    size_t got;
    struct wire_hello hello;
};

struct gathering {
    struct tcp_peers *peers;
    const struct comm_tcp_config *cfg;
    struct wire_hello want; /* what a follower must say, apart from its rank and channel */
    int listen_fd;
    struct stranger strangers[MAX_STRANGERS];
};

void tcp_peers_init(struct tcp_peers *p)
{
    for (int r = 0; r < TCP_MAX_RANKS; r++)
        p->data[r] = p->beat[r] = -1;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        (void)close(*fd);
    *fd = -1;
}

void tcp_peers_close(struct tcp_peers *p, int n_ranks)
{
    for (int r = 0; r < n_ranks; r++) {
        close_fd(&p->data[r]);
        close_fd(&p->beat[r]);
    }
}

static struct wire_hello make_hello(const struct comm_tcp_config *cfg, enum wire_channel channel)
{
    struct wire_hello h = {.magic = WIRE_MAGIC,
                           .channel = channel,
                           .rank = (uint32_t)cfg->rank,
                           .n_ranks = (uint32_t)cfg->n_ranks,
                           .max_floats = cfg->max_floats,
                           .max_msg = cfg->max_msg};
    (void)snprintf(h.build, sizeof h.build, "%s", SLUICE_VERSION);
    memcpy(h.token, cfg->token, strlen(cfg->token)); /* at most its size: checked */
    return h;
}

static int64_t join_deadline(const struct comm_tcp_config *cfg)
{
    return clock_monotonic_us(NULL) + (cfg->join_ms > 0 ? cfg->join_ms : cfg->timeout_ms) * 1000;
}

static int64_t sooner(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* ---- rank 0 ---- */

/* Takes the same time wherever they differ. */
static bool same_token(const char *a, const char *b)
{
    unsigned char diff = 0;
    for (size_t i = 0; i < WIRE_TOKEN; i++)
        diff |= (unsigned char)(a[i] ^ b[i]);
    return diff == 0;
}

/* 0, or why this peer may not join. */
static int judge(const struct gathering *g, const struct wire_hello *h, struct err_msg *why)
{
    const struct wire_hello *want = &g->want;
    if (!same_token(h->token, want->token))
        return err_set(why, ERR_AUTH, "wrong token");
    if (memcmp(h->build, want->build, sizeof h->build) != 0)
        return err_set(why, ERR_VERSION, "rank 0 runs version %.31s: all ranks must run the same",
                       want->build);
    if (h->n_ranks != want->n_ranks)
        return err_set(why, ERR_CONFIG, "rank 0 expects %u ranks, this one %u", want->n_ranks,
                       h->n_ranks);
    if (h->max_floats != want->max_floats || h->max_msg != want->max_msg)
        return err_set(why, ERR_CONFIG,
                       "max_floats or max_msg differ from rank 0's: all ranks need "
                       "the same options");
    if (h->rank < 1 || h->rank >= want->n_ranks ||
        (h->channel != WIRE_DATA && h->channel != WIRE_BEATS))
        return err_set(why, ERR_PROTOCOL, "no such rank: %u", h->rank);
    const int *slots = h->channel == WIRE_DATA ? g->peers->data : g->peers->beat;
    if (slots[h->rank] >= 0)
        return err_set(why, -EEXIST, "rank %u has already joined", h->rank);
    return 0;
}

/* A complete hello: takes the connection in or sends it away. Answers fit the socket's buffer. */
static void answer(struct gathering *g, struct stranger *s)
{
    struct wire_welcome w = {.magic = WIRE_MAGIC};
    struct err_msg why = {""};

    w.code = judge(g, &s->hello, &why);
    (void)snprintf(w.why, sizeof w.why, "%s", why.text);
    if (w.code < 0)
        log_warn("a connection is refused: %s", why.text);
    if (send(s->fd, &w, sizeof w, MSG_NOSIGNAL) != (ssize_t)sizeof w || w.code < 0) {
        close_fd(&s->fd);
        return;
    }
    int *slots = s->hello.channel == WIRE_DATA ? g->peers->data : g->peers->beat;
    slots[s->hello.rank] = s->fd;
    s->fd = -1;
}

static void read_stranger(struct gathering *g, struct stranger *s)
{
    ssize_t n = recv(s->fd, (char *)&s->hello + s->got, sizeof s->hello - s->got, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    s->got += n > 0 ? (size_t)n : 0;
    if (n <= 0 || (s->got >= sizeof s->hello.magic && s->hello.magic != WIRE_MAGIC))
        close_fd(&s->fd);
    else if (s->got == sizeof s->hello)
        answer(g, s);
}

static void accept_stranger(struct gathering *g)
{
    struct stranger *place = &g->strangers[0];
    int fd = accept(g->listen_fd, NULL, NULL);
    if (fd < 0)
        return;
    if (wire_prepare(fd) < 0) {
        (void)close(fd);
        return;
    }
    for (int i = 0; i < MAX_STRANGERS && place->fd >= 0; i++) {
        struct stranger *s = &g->strangers[i];
        if (s->fd < 0 || s->since_us < place->since_us)
            place = s;
    }
    close_fd(&place->fd);
    *place = (struct stranger){.fd = fd, .since_us = clock_monotonic_us(NULL)};
}

/* Followers are silent until GO: one that is readable has ended, or is none of ours. */
static void drop_rank(struct gathering *g, int r)
{
    log_warn("peer=%d the rank left before all had joined", r);
    close_fd(&g->peers->data[r]);
    close_fd(&g->peers->beat[r]);
}

/* One turn of at most SLICE_MS. */
static void gather_turn(struct gathering *g)
{
    struct pollfd p[1 + MAX_STRANGERS + 2 * TCP_MAX_RANKS];
    const int n_ranks = g->cfg->n_ranks;
    struct pollfd *strangers = p + 1, *data = strangers + MAX_STRANGERS, *beat = data + n_ranks;
    const nfds_t n = 1 + MAX_STRANGERS + 2 * (nfds_t)n_ranks;

    p[0] = (struct pollfd){g->listen_fd, POLLIN, 0};
    for (int i = 0; i < MAX_STRANGERS; i++)
        strangers[i] = (struct pollfd){g->strangers[i].fd, POLLIN, 0};
    for (int r = 0; r < n_ranks; r++) {
        data[r] = (struct pollfd){g->peers->data[r], POLLIN, 0};
        beat[r] = (struct pollfd){g->peers->beat[r], POLLIN, 0};
    }
    if (poll(p, n, SLICE_MS) < 0)
        return;
    for (int r = 0; r < n_ranks; r++) {
        if (data[r].revents || beat[r].revents)
            drop_rank(g, r);
    }
    for (int i = 0; i < MAX_STRANGERS; i++) {
        struct stranger *s = &g->strangers[i];
        if (s->fd >= 0 && strangers[i].revents)
            read_stranger(g, s);
        else if (s->fd >= 0 && clock_monotonic_us(NULL) - s->since_us > HELLO_US)
            close_fd(&s->fd);
    }
    if (p[0].revents)
        accept_stranger(g);
}

static int n_missing(const struct gathering *g)
{
    int n = 0;
    for (int r = 1; r < g->cfg->n_ranks; r++)
        n += g->peers->data[r] < 0 || g->peers->beat[r] < 0;
    return n;
}

static int gather(struct gathering *g, struct err_msg *why)
{
    const struct comm_tcp_config *cfg = g->cfg;
    const int64_t end = join_deadline(cfg);
    const struct wire_head go = {.kind = WIRE_GO};

    while (n_missing(g) > 0) {
        gather_turn(g);
        if (cfg->peers_alive && !cfg->peers_alive(cfg->peers_arg))
            return err_set(why, ERR_PEER, "a rank ended before it had joined; its log says why");
        if (clock_monotonic_us(NULL) >= end)
            return err_set(why, ERR_PEER, "only %d of %d ranks joined in time",
                           cfg->n_ranks - n_missing(g), cfg->n_ranks);
    }
    for (int r = 1; r < cfg->n_ranks; r++) {
        int err = wire_write(g->peers->data[r], &go, sizeof go, end + HELLO_US);
        if (err < 0)
            return err_set(why, ERR_PEER, "rank %d left while the ranks gathered", r);
    }
    return 0;
}

static int lead(struct tcp_peers *p, const struct comm_tcp_config *cfg, struct err_msg *why)
{
    struct gathering *g = mem_zalloc(1, sizeof *g);
    int err = 0;

    g->peers = p;
    g->cfg = cfg;
    g->want = make_hello(cfg, WIRE_DATA);
    g->listen_fd = cfg->listen_fd;
    for (int i = 0; i < MAX_STRANGERS; i++)
        g->strangers[i].fd = -1;
    if (g->listen_fd <= 0)
        err = wire_listen(&g->listen_fd, cfg->leader, why);
    if (err == 0)
        err = gather(g, why);
    for (int i = 0; i < MAX_STRANGERS; i++)
        close_fd(&g->strangers[i].fd);
    close_fd(&g->listen_fd);
    mem_free(g);
    return err;
}

/* ---- followers ---- */

/* Says hello and hears the answer. ERR_PEER, -ETIMEDOUT: worth another try. */
static int introduce(int fd, const struct wire_hello *h, int64_t end, struct err_msg *why)
{
    struct wire_welcome w = {0};
    const int64_t soon = sooner(end, clock_monotonic_us(NULL) + HELLO_US);

    TRY(wire_write(fd, h, sizeof *h, soon));
    TRY(wire_read(fd, &w, sizeof w, soon));
    if (w.magic != WIRE_MAGIC)
        return err_set(why, ERR_VERSION, "what listens there is no leader of this version");
    w.why[sizeof w.why - 1] = '\0';
    return w.code < 0 ? err_set(why, w.code, "the leader refuses: %.199s", w.why) : 0;
}

static int connect_channel(int *fd, const struct comm_tcp_config *cfg, enum wire_channel channel,
                           int64_t end, struct err_msg *why)
{
    const struct wire_hello h = make_hello(cfg, channel);
    const struct timespec pause = {0, RETRY_MS * 1000000L};

    for (;;) {
        int err = wire_connect(fd, cfg->leader, end, why);
        if (err == 0)
            err = introduce(*fd, &h, end, why);
        if (err == 0)
            return 0;
        close_fd(fd);
        if (err != -EAGAIN && err != ERR_PEER && err != -ETIMEDOUT)
            return err;
        if (clock_monotonic_us(NULL) >= end)
            return err_set(why, ERR_PEER, "no leader at %.200s in time", cfg->leader);
        (void)nanosleep(&pause, NULL);
    }
}

/* Until the leader says something, or a child of this process ends. */
static int await_go(int fd, const struct comm_tcp_config *cfg, int64_t end, struct err_msg *why)
{
    struct pollfd p = {fd, POLLIN, 0};
    while (poll(&p, 1, SLICE_MS) <= 0 && clock_monotonic_us(NULL) < end) {
        if (cfg->peers_alive && !cfg->peers_alive(cfg->peers_arg))
            return err_set(why, ERR_PEER, "a rank ended before it had joined; its log says why");
    }
    return 0;
}

static int follow(struct tcp_peers *p, const struct comm_tcp_config *cfg, struct err_msg *why)
{
    const int64_t end = join_deadline(cfg);
    struct wire_head go = {0};

    TRY(connect_channel(&p->data[0], cfg, WIRE_DATA, end, why));
    TRY(connect_channel(&p->beat[0], cfg, WIRE_BEATS, end, why));
    TRY(await_go(p->data[0], cfg, end, why));
    int err = wire_read(p->data[0], &go, sizeof go, end);
    if (err < 0)
        return err_set(why, ERR_PEER, "%s",
                       err == -ETIMEDOUT ? "the other ranks did not join in time"
                                         : "the leader ended while the ranks gathered");
    return go.kind == WIRE_GO ? 0 : err_set(why, ERR_PROTOCOL, "the leader sent no GO");
}

int tcp_join(struct tcp_peers *p, const struct comm_tcp_config *cfg, struct err_msg *why)
{
    return cfg->rank == 0 ? lead(p, cfg, why) : follow(p, cfg, why);
}
