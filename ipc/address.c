#include "ipc/address.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

static int parse_port(struct ipc_address *a, const char *port, const char *text,
                      struct err_msg *why)
{
    size_t len = strlen(port);
    if (len == 0 || len >= sizeof a->port || strspn(port, "0123456789") != len ||
        strtol(port, NULL, 10) > 65535)
        return err_set(why, ERR_INVALID, "%s: '%s' is no port (0 to 65535)", text, port);
    memcpy(a->port, port, len + 1);
    return 0;
}

static int parse_tcp(struct ipc_address *a, const char *rest, const char *text, struct err_msg *why)
{
    const char *colon = strrchr(rest, ':'), *host = rest;
    if (!colon) {
        memcpy(a->host, "127.0.0.1", sizeof "127.0.0.1");
        return parse_port(a, rest, text, why);
    }
    size_t len = (size_t)(colon - rest);
    if (len >= 2 && host[0] == '[' && host[len - 1] == ']') {
        host++;
        len -= 2;
    } else if (memchr(host, ':', len)) {
        return err_set(why, ERR_INVALID, "%s: write IPv6 addresses in brackets, tcp:[::1]:7000",
                       text);
    }
    if (len == 0 || len >= sizeof a->host)
        return err_set(why, ERR_INVALID, "%s: the host is empty or too long", text);
    memcpy(a->host, host, len);
    a->host[len] = '\0';
    return parse_port(a, colon + 1, text, why);
}

int ipc_address_parse(struct ipc_address *a, const char *text, struct err_msg *why)
{
    *a = (struct ipc_address){0};
    if (strncmp(text, "tcp:", 4) == 0)
        return parse_tcp(a, text + 4, text, why);
    if (strncmp(text, "unix:", 5) != 0)
        return err_set(why, ERR_INVALID, "'%s': an address is unix:PATH or tcp:HOST:PORT", text);
    const char *path = text + 5;
    size_t len = strlen(path);
    if (len == 0)
        return err_set(why, ERR_INVALID, "%s: the path is empty", text);
    if (len >= sizeof a->path)
        return err_set(why, -ENAMETOOLONG, "%s: the path has %zu bytes, a socket's at most %zu",
                       text, len, sizeof a->path - 1);
    memcpy(a->path, path, len + 1);
    a->is_unix = true;
    return 0;
}

int ipc_address_resolve(const struct ipc_address *a, struct addrinfo **out, struct err_msg *why)
{
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
    hints.ai_flags = AI_NUMERICSERV;
    int rc = getaddrinfo(a->host, a->port, &hints, out);
    if (rc == 0)
        return 0;
    int err = rc == EAI_SYSTEM ? -errno : rc == EAI_MEMORY ? -ENOMEM : -ENXIO;
    return err_set(why, err, "tcp:%s:%s: %s", a->host, a->port, gai_strerror(rc));
}

void ipc_address_unix(const struct ipc_address *a, struct sockaddr_un *out)
{
    *out = (struct sockaddr_un){.sun_family = AF_UNIX};
    memcpy(out->sun_path, a->path, sizeof out->sun_path);
}

bool ipc_address_is_loopback(const struct sockaddr *sa)
{
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    if (sa->sa_family == AF_INET) {
        memcpy(&in, sa, sizeof in);
        return ntohl(in.sin_addr.s_addr) >> 24 == 127;
    }
    if (sa->sa_family != AF_INET6)
        return false;
    memcpy(&in6, sa, sizeof in6);
    if (IN6_IS_ADDR_V4MAPPED(&in6.sin6_addr))
        return in6.sin6_addr.s6_addr[12] == 127;
    return IN6_IS_ADDR_LOOPBACK(&in6.sin6_addr);
}
