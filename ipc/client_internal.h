/* Shared by the files of the client library; not installed. */
#ifndef IPC_CLIENT_INTERNAL_H
#define IPC_CLIENT_INTERNAL_H

#include "ipc/client.h"
#include "ipc/frame.h"
#include "ipc/message.h"

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

/* When a timeout ends, for client_next_payload. */
int64_t client_deadline(int timeout_ms);
/* Ends the connection with this error; returns it. */
int client_broken(struct sluice_client *c, int err);
/* Opens the socket. */
int client_connect(struct sluice_client *c, const char *address, int64_t deadline);
/* Queues a message and sends what goes. A write error shows when events are read. */
int client_queue(struct sluice_client *c, enum ipc_type type, const void *body);
/* Next payload: 1, or 0 at the deadline. */
int client_next_payload(struct sluice_client *c, const uint8_t **payload, size_t *len,
                        int64_t deadline);
/* Reads a payload into c->msg. ERR_UNSUPPORTED: a message of a newer version, to be passed over. */
int client_unpack(struct sluice_client *c, const uint8_t *payload, size_t len);

#endif
