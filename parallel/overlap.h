/* Scatters and gathers of rows over the ranks that run beside the work of the stream they came from
 * (comm_scatter_begin and what follows it in comm.h). Between GPUs of one host with peer memory a
 * copy engine sends every other rank its part over NVLink, which takes no multiprocessor from the
 * kernels meanwhile; what came is added by whoever reads it next. Otherwise the communicator's own
 * kernels run on a stream of their own.
 *
 * A rank's region holds two slots of what the others send for each kind. Exchange e of a kind goes
 * to slot e mod 2 once the receiver has said that it has read exchange e - 2, and is followed by
 * the number e, which the receiver's side stream waits for: the streams of the GPUs order
 * themselves, no host does. What was read is told when the next exchange of its kind begins, early
 * enough for two slots. Numbers are written and awaited by the streams (cuStreamWriteValue32), in
 * device memory.
 *
 * For comm_nccl, whose rules hold: all ranks make the same calls in the same order. */
#ifndef PARALLEL_OVERLAP_H
#define PARALLEL_OVERLAP_H

#include "parallel/comm.h"

struct overlap;

struct overlap_config {
    struct comm *comm; /* makes what copies cannot */
    struct comm *host; /* introduces the ranks */
    bool one_host;
    struct comm_rows rows;
};

/* Collective; the current device is the rank's. Takes memory for two gathers, and where copies are
 * used for two scatters. */
MUST_CHECK int overlap_create(struct overlap **out, const struct overlap_config *cfg,
                              struct err_msg *why);
/* comm.h's. way: COMM_OVERLAP_COPY falls back to _SUMS. */
MUST_CHECK int overlap_scatter_begin(struct overlap *o, void *buf, int32_t n, enum comm_overlap way,
                                     void *stream);
MUST_CHECK int overlap_scatter_end(struct overlap *o, void *stream, struct comm_shares *out);
void *overlap_gather_rows(struct overlap *o);
MUST_CHECK int overlap_gather_begin(struct overlap *o, int32_t n, enum comm_overlap way,
                                    void *stream);
MUST_CHECK int overlap_gather_end(struct overlap *o, void *stream);
bool overlap_copies(const struct overlap *o);
/* Lets streams that wait for a peer go, with garbage for a result. */
void overlap_abort(struct overlap *o);
/* Collective over host, or NULL where a peer is gone: then memory is left to the process's end.
 * Accepts NULL. */
void overlap_close(struct overlap *o, struct comm *host);

#endif
