/* Addresses as users write them: "unix:PATH", "tcp:HOST:PORT", "tcp:[v6]:PORT", "tcp:PORT" (on
 * 127.0.0.1). Shared by the server and the client library. */
#ifndef IPC_ADDRESS_H
#define IPC_ADDRESS_H

#include "core/err.h"

#include <netdb.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <sys/un.h>

struct ipc_address {
    bool is_unix;
    char path[sizeof((struct sockaddr_un *)0)->sun_path];
    char host[256];
    char port[6];
};

/* ERR_INVALID, or -ENAMETOOLONG for a path that no Unix socket can have. */
MUST_CHECK int ipc_address_parse(struct ipc_address *a, const char *text, struct err_msg *why);
/* The TCP addresses of a host; freeaddrinfo when done. Blocks for names. */
MUST_CHECK int ipc_address_resolve(const struct ipc_address *a, struct addrinfo **out,
                                   struct err_msg *why);
void ipc_address_unix(const struct ipc_address *a, struct sockaddr_un *out);
bool ipc_address_is_loopback(const struct sockaddr *sa);

#endif
