/* Sums over the ranks that run beside the work of the stream they came from. Of two GPUs with peer
 * memory, each one's copy engine sends its share to the other over NVLink, which takes no
 * multiprocessor from the kernels meanwhile; the sum itself is a short kernel once both are there.
 * Otherwise the communicator's own sum runs on a stream of its own.
 *
 * Four slots hold what the peer sends. Share e goes to slot e mod 4 once the peer has said that it
 * has read share e - 4, and is followed by the number e, which the peer's stream waits for: the
 * streams of the two GPUs order themselves, no host does. What was read is told when the next sum
 * begins, which for four slots is early enough that nobody waits for it. Numbers are written and
 * awaited by the streams themselves (cuStreamWriteValue32), in device memory.
 *
 * For comm_nccl, whose rules hold: all ranks make the same calls in the same order. */
#ifndef PARALLEL_OVERLAP_H
#define PARALLEL_OVERLAP_H

#include "parallel/comm.h"

struct overlap;

struct overlap_config {
    struct comm *comm; /* makes the sums where copies cannot */
    struct comm *host; /* introduces the ranks */
    bool one_host;
    size_t max_bytes; /* of one sum */
};

/* Collective; the current device is the rank's. Takes four times max_bytes of its memory where
 * copies are used. */
MUST_CHECK int overlap_create(struct overlap **out, const struct overlap_config *cfg,
                              struct err_msg *why);
/* comm.h's comm_sum_begin and comm_sum_end. way: COMM_OVERLAP_COPY falls back to _SUMS. */
MUST_CHECK int overlap_begin(struct overlap *o, void *buf, size_t n, enum dtype dt,
                             enum comm_overlap way, void *stream);
MUST_CHECK int overlap_end(struct overlap *o, void *stream, const void **more);
bool overlap_copies(const struct overlap *o);
/* Lets streams that wait for a peer go, with garbage for a result. */
void overlap_abort(struct overlap *o);
/* Collective over host, or NULL where a peer is gone: then memory is left to the process's end.
 * Accepts NULL. */
void overlap_close(struct overlap *o, struct comm *host);

#endif
