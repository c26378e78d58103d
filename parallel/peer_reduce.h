/* Small sums over NVLink peer memory, for decode steps: one kernel instead of NCCL's machinery.
 * Every rank copies its values into memory that all ranks of the host have mapped (CUDA IPC), meets
 * the others at flags there, then reads all copies and adds them in rank order in f32. So the bits
 * are equal on all ranks and do not depend on timing. The kernel keeps its own count of calls on
 * the device: it can be captured in a graph and replayed.
 *
 * Copies alternate between two halves: a rank overwrites a half two calls later, when every peer
 * has started the call between and thus finished reading; one meeting a call is enough.
 *
 * Ranks make the same calls in the same order. Calls of one rank are ordered: one stream, or
 * streams ordered by events. */
#ifndef PARALLEL_PEER_REDUCE_H
#define PARALLEL_PEER_REDUCE_H

#include "core/dtype.h"
#include "core/err.h"

#include <stdbool.h>
#include <stddef.h>

struct comm;
struct peer_reduce;

/* Collective over host, whose ranks are processes of one host with 2..8 devices. *out is NULL, and
 * the result 0, where some rank cannot map another's memory: use NCCL there. max_bytes: largest
 * sum. */
MUST_CHECK int peer_reduce_create(struct peer_reduce **out, struct comm *host, int device,
                                  size_t max_bytes, struct err_msg *why);
/* buf at a multiple of 16 bytes, n * size a multiple of 16 and at most max_bytes. */
bool peer_reduce_takes(const struct peer_reduce *p, const void *buf, size_t n, enum dtype dt);
/* buf[n] = sum over the ranks, in place, enqueued on the stream; the current device is `device`. */
MUST_CHECK int peer_reduce_run(struct peer_reduce *p, void *buf, size_t n, enum dtype dt,
                               void *stream);
/* Lets kernels that wait for a peer go, with garbage for a result. Any thread. */
void peer_reduce_abort(struct peer_reduce *p);
/* Collective over host: no rank may free what another still maps. Accepts NULL. */
void peer_reduce_close(struct peer_reduce *p, struct comm *host);

#endif
