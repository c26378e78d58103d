/* The client library's bytes: a non-blocking socket, one poll() away from the kernel. */
#include "ipc/client_internal.h"

#include "ipc/address.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { FOREVER = -1 };

/* --- time and waiting --- */

static int64_t now_ms(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* When a timeout ends; -1: never. */
int64_t client_deadline(int timeout_ms)
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

int client_broken(struct sluice_client *c, int err)
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
int client_next_payload(struct sluice_client *c, const uint8_t **payload, size_t *len,
                        int64_t deadline)
{
    if (c->broken < 0)
        return c->broken;
    for (;;) {
        int rc = ipc_frame_reader_next(&c->in, payload, len, &c->why);
        if (rc != 0)
            return rc < 0 ? client_broken(c, rc) : rc;
        int write_err = push_out(c);
        if (write_err < 0)
            c->out.len = c->out_sent = 0;
        rc = pull_in(c);
        if (rc < 0)
            return client_broken(c, rc);
        if (rc > 0)
            continue;
        if (write_err < 0)
            return client_broken(c, write_err);
        rc = wait_for(c->fd, sluice_poll_events(c), deadline);
        if (rc < 0)
            return client_broken(c, rc);
        if (rc == 0)
            return 0;
    }
}

int client_unpack(struct sluice_client *c, const uint8_t *payload, size_t len)
{
    int rc = ipc_msg_unpack(c->decoder, &c->msg, payload, len, &c->why);
    return rc < 0 && rc != ERR_UNSUPPORTED ? client_broken(c, rc) : rc;
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

int client_connect(struct sluice_client *c, const char *address, int64_t deadline)
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

/* --- for callers --- */

int sluice_fd(const struct sluice_client *c)
{
    return c->fd;
}

short sluice_poll_events(const struct sluice_client *c)
{
    return c->out_sent < c->out.len ? POLLIN | POLLOUT : POLLIN;
}

int sluice_flush(struct sluice_client *c, int timeout_ms)
{
    int64_t deadline = client_deadline(timeout_ms);
    while (!c->broken) {
        int rc = push_out(c);
        if (rc < 0)
            return client_broken(c, rc);
        if (c->out.len == 0)
            return 0;
        rc = wait_for(c->fd, POLLOUT, deadline);
        if (rc < 0)
            return client_broken(c, rc);
        if (rc == 0)
            return err_set(&c->why, -ETIMEDOUT, "the daemon does not read");
    }
    return c->broken;
}

/* Queues a message and sends what goes. A write error shows when events are read. */
int client_queue(struct sluice_client *c, enum ipc_type type, const void *body)
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
