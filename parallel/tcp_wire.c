#include "parallel/tcp_wire.h"

#include "core/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_IO = 64, HOST_MAX = 256, PORT_MAX = 16 };

/* ---- transfers ---- */

/* Milliseconds for poll, rounded up; -1: no deadline. */
static int ms_until(int64_t deadline_us)
{
    if (deadline_us < 0)
        return -1;
    int64_t left = deadline_us - clock_monotonic_us(NULL);
    if (left <= 0)
        return 0;
    return left > 1000000000 ? 1000000 : (int)((left + 999) / 1000);
}

/* One try. 0, or the connection is over. */
static int move(struct wire_io *io, short what)
{
    ssize_t n = what == POLLIN ? recv(io->fd, io->in, io->left, 0)
                               : send(io->fd, io->out, io->left, MSG_NOSIGNAL);
    if (n > 0 && what == POLLIN)
        io->in += n;
    else if (n > 0)
        io->out += n;
    else
        return n < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : ERR_PEER;
    io->left -= (size_t)n;
    return 0;
}

static int run_all(struct wire_io *io, int n, short what, int64_t deadline_us, int *failed)
{
    struct pollfd p[MAX_IO];
    ASSERT(n <= MAX_IO);
    for (;;) {
        int n_open = 0;
        for (int i = 0; i < n; i++) {
            p[i] = (struct pollfd){io[i].left ? io[i].fd : -1, what, 0};
            n_open += io[i].left > 0;
        }
        if (n_open == 0)
            return 0;
        int ready = poll(p, (nfds_t)n, ms_until(deadline_us));
        if (ready == 0)
            return -ETIMEDOUT;
        if (ready < 0 && errno != EINTR)
            return -errno;
        for (int i = 0; i < n && ready > 0; i++) {
            if (p[i].revents == 0 || move(&io[i], what) == 0)
                continue;
            if (failed)
                *failed = i;
            return ERR_PEER;
        }
    }
}

int wire_read_all(struct wire_io *io, int n, int64_t deadline_us, int *failed)
{
    return run_all(io, n, POLLIN, deadline_us, failed);
}

int wire_write_all(struct wire_io *io, int n, int64_t deadline_us, int *failed)
{
    return run_all(io, n, POLLOUT, deadline_us, failed);
}

int wire_read(int fd, void *buf, size_t len, int64_t deadline_us)
{
    struct wire_io io = {.fd = fd, .in = buf, .left = len};
    return wire_read_all(&io, 1, deadline_us, NULL);
}

int wire_write(int fd, const void *buf, size_t len, int64_t deadline_us)
{
    struct wire_io io = {.fd = fd, .out = buf, .left = len};
    return wire_write_all(&io, 1, deadline_us, NULL);
}

/* ---- addresses ---- */

static int split(const char *address, char *host, char *port, struct err_msg *why)
{
    const char *colon = strrchr(address, ':');
    size_t n = colon ? (size_t)(colon - address) : 0;
    const char *begin = address;
    if (n >= 2 && address[0] == '[' && address[n - 1] == ']') {
        begin++;
        n -= 2;
    }
    if (n == 0 || n >= HOST_MAX || !colon[1] || strlen(colon + 1) >= PORT_MAX)
        return err_set(why, ERR_CONFIG, "'%.200s' is not HOST:PORT", address);
    memcpy(host, begin, n);
    host[n] = '\0';
    memcpy(port, colon + 1, strlen(colon + 1) + 1);
    return 0;
}

static int resolve(struct addrinfo **out, const char *address, int flags, struct err_msg *why)
{
    char host[HOST_MAX], port[PORT_MAX];
    const struct addrinfo hints = {
        .ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = flags | AI_NUMERICSERV};
    TRY(split(address, host, port, why));
    int e = getaddrinfo(host, port, &hints, out);
    if (e != 0)
        return err_set(why, ERR_CONFIG, "cannot resolve '%.200s': %s", address, gai_strerror(e));
    return 0;
}

int wire_prepare(int fd)
{
    const int on = 1;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ||
        fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)
        return -errno;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return 0;
}

int wire_listen(int *fd, const char *address, struct err_msg *why)
{
    struct addrinfo *list = NULL;
    const int on = 1;
    int err = -EADDRNOTAVAIL;

    *fd = -1;
    TRY(resolve(&list, address, AI_PASSIVE, why));
    for (const struct addrinfo *a = list; a && err < 0; a = a->ai_next) {
        int s = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
        if (s >= 0) {
            (void)setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
            err = bind(s, a->ai_addr, a->ai_addrlen) < 0 || listen(s, 128) < 0 ? -errno
                                                                               : wire_prepare(s);
        } else {
            err = -errno;
        }
        if (err == 0)
            *fd = s;
        else if (s >= 0)
            (void)close(s);
    }
    freeaddrinfo(list);
    return err < 0 ? err_set(why, err, "cannot listen at %.200s: %s", address, err_str(err)) : 0;
}

static int finish_connect(int fd, int64_t deadline_us)
{
    struct pollfd p = {fd, POLLOUT, 0};
    int e = 0;
    socklen_t len = sizeof e;
    int ready;
    do
        ready = poll(&p, 1, ms_until(deadline_us));
    while (ready < 0 && errno == EINTR);
    if (ready <= 0)
        return -ETIMEDOUT;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &e, &len) < 0)
        return -errno;
    return -e;
}

int wire_connect(int *fd, const char *address, int64_t deadline_us, struct err_msg *why)
{
    struct addrinfo *list = NULL;
    int err = -EAGAIN;

    *fd = -1;
    TRY(resolve(&list, address, 0, why));
    for (const struct addrinfo *a = list; a && *fd < 0; a = a->ai_next) {
        int s = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
        if (s < 0)
            continue;
        err = wire_prepare(s);
        if (err == 0 && connect(s, a->ai_addr, a->ai_addrlen) < 0)
            err = errno == EINPROGRESS ? finish_connect(s, deadline_us) : -errno;
        if (err == 0)
            *fd = s;
        else
            (void)close(s);
    }
    freeaddrinfo(list);
    return *fd >= 0 ? 0 : -EAGAIN;
}
