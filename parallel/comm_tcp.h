/* Ranks of one or several hosts over TCP: a full communicator for CPUs, and what several hosts with
 * GPUs say to each other beside NCCL. The ranks form a star: rank 0 listens, every other rank holds
 * two connections to it, one for collectives and messages, one for a heartbeat. Sums are made on
 * rank 0 in rank order and sent out, so every rank holds the same bits.
 *
 * A process that ends is noticed at once, one that is stopped or whose host is gone after beat_ms
 * (also while nothing is going on), one that keeps a collective waiting after timeout_ms.
 *
 * Who may join: peers that present the token, the same version of the program, number of ranks and
 * sizes. Anything else that connects costs its own connection and nothing more. The token travels
 * in the clear and nothing is encrypted: the network between the hosts must be trusted. */
#ifndef PARALLEL_COMM_TCP_H
#define PARALLEL_COMM_TCP_H

#include "parallel/comm.h"

enum { COMM_TCP_TOKEN = 128 }; /* longest token, in bytes */

struct comm_tcp_config {
    const char *leader; /* "HOST:PORT" or "[HOST]:PORT", where rank 0 listens */
    int listen_fd;      /* rank 0: a listening socket, taken over; 0: make one at `leader` */
    const char *token;  /* shared secret, 1 to COMM_TCP_TOKEN bytes */
    int rank, n_ranks;
    size_t max_floats;  /* largest piece of a collective, in floats; larger ones are cut */
    size_t max_msg;     /* largest post, in bytes */
    int64_t timeout_ms; /* of one piece of a collective, and of a post */
    int64_t join_ms;    /* for all ranks to join; 0: timeout_ms */
    int64_t beat_ms;    /* a peer silent for so long is gone; 0: 5000 */
    /* Asked while the ranks gather, about every 50 ms; may be NULL (comm_shm_config). */
    bool (*peers_alive)(void *arg);
    void *peers_arg;
    /* Called once when the communicator fails, also while it is idle, by the thread that notices:
     * it may only wake another (uv_async_send). May be NULL. */
    void (*on_fail)(void *arg);
    void *fail_arg;
};

/* Returns on every rank once all have joined. */
MUST_CHECK int comm_tcp_create(struct comm **out, const struct comm_tcp_config *cfg,
                               struct err_msg *why);
/* A listening socket at "HOST:PORT" (port 0: any free one) for comm_tcp_config.listen_fd. */
MUST_CHECK int comm_tcp_listen(int *fd, const char *address, struct err_msg *why);

#endif
