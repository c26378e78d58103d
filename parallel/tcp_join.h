/* How the ranks of comm_tcp find each other: two connections of every follower to rank 0. */
#ifndef PARALLEL_TCP_JOIN_H
#define PARALLEL_TCP_JOIN_H

#include "parallel/comm_tcp.h"

enum { TCP_MAX_RANKS = 64 };

/* Sockets by the peer's rank; -1: none. */
struct tcp_peers {
    int data[TCP_MAX_RANKS], beat[TCP_MAX_RANKS];
};

void tcp_peers_init(struct tcp_peers *p);
void tcp_peers_close(struct tcp_peers *p, int n_ranks);
/* Returns on every rank once all have joined; closes the listening socket. After an error the
 * caller closes the peers. */
MUST_CHECK int tcp_join(struct tcp_peers *p, const struct comm_tcp_config *cfg,
                        struct err_msg *why);

#endif
