#ifndef PARALLEL_PEER_MAX_H
#define PARALLEL_PEER_MAX_H

enum { PEER_MAX = 8 }; /* ranks of a host that share device memory */

#endif
