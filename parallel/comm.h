/* Collectives between the ranks of one model. Rank 0 decides everything; the others follow.
 * Every call takes part on all ranks in the same order. A dead or stuck peer turns into ERR_PEER on
 * the others within the communicator's timeout, never into a hang; after ERR_PEER the communicator
 * is unusable. Reductions add in rank order, so every rank holds the same bits. */
#ifndef PARALLEL_COMM_H
#define PARALLEL_COMM_H

#include "core/dtype.h"
#include "core/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct comm;

/* How sums that are begun and ended are made. */
enum comm_overlap {
    COMM_OVERLAP_COPY, /* by copy engines where they can, else as COMM_OVERLAP_SUMS */
    COMM_OVERLAP_SUMS, /* by the communicator's kernels, beside those of the stream */
    COMM_OVERLAP_NONE  /* not at all: sums are made in the stream's order */
};

enum { COMM_SUMS_OPEN = 2 /* begun and not ended at a time */ };

struct comm_ops {
    const char *name;
    void (*close)(struct comm *c);
    int (*all_reduce)(struct comm *c, float *buf, size_t n); /* sum, in place */
    /* each rank gives n floats; out receives n_ranks * n in rank order. in may be out + rank * n */
    int (*all_gather)(struct comm *c, float *out, const float *in, size_t n);
    int (*barrier)(struct comm *c);
    /* Rank 0 posts one message; followers wait for it without a deadline (an idle engine sends
     * nothing), on a doorbell, not in a collective. *len is the message's length; buf must hold cap
     * bytes. */
    int (*post)(struct comm *c, const void *msg, size_t len);
    int (*wait)(struct comm *c, void *buf, size_t cap, size_t *len);
    void (*abort)(
        struct comm *c); /* wakes every waiter on every rank with ERR_PEER; async-signal-unsafe */
    /* The collectives of device memory; NULL where ranks have no device. stream is a cudaStream_t:
     * they are enqueued, not awaited, and may be captured in a graph. */
    int (*all_reduce_dev)(struct comm *c, void *buf, size_t n, enum dtype dt, void *stream);
    int (*all_gather_dev)(struct comm *c, void *out, const void *in, size_t n, enum dtype dt,
                          void *stream);
    /* NULL: sums do not run beside other work */
    int (*reserve_sums)(struct comm *c, size_t max_bytes, struct err_msg *why);
    int (*sum_begin)(struct comm *c, void *buf, size_t n, enum dtype dt, void *stream);
    int (*sum_end)(struct comm *c, void *stream, const void **more);
    bool (*overlaps)(const struct comm *c);
    void (*set_overlap)(struct comm *c, enum comm_overlap way);
    int (*poll)(struct comm *c);
    int (*wait_stream)(struct comm *c, void *stream, int64_t timeout_ms);
    void (*set_timeout)(struct comm *c, int64_t timeout_ms); /* NULL: none to set */
};

/* Common head of every communicator. */
struct comm {
    const struct comm_ops *ops;
    int rank, n_ranks;
};

/* One rank: every collective is the identity, also those of device memory (all_gather_dev in place
 * only: nothing here can copy on a device). */
MUST_CHECK int comm_self_create(struct comm **out);

struct comm_shm_config {
    const char *name; /* of the shared memory object: "/sluice-<pid>-<random>" */
    int rank, n_ranks;
    size_t max_floats;  /* largest all_reduce or all_gather share, in floats; larger ones are cut
                           into pieces */
    size_t max_msg;     /* largest post, in bytes */
    int64_t timeout_ms; /* of one collective */
    int64_t join_ms;    /* for all ranks to join; 0: timeout_ms */
    /* Asked while the ranks gather, about every 50 ms: false gives up at once (a child that died
     * before it joined is known to its parent only). May be NULL. ranks_alive in ranks.h fits. */
    bool (*peers_alive)(void *arg);
    void *peers_arg;
};
/* A fresh name for comm_shm_config: "/sluice-<pid>-<random>". cap of 64 is enough. */
MUST_CHECK int comm_shm_name(char *buf, size_t cap);
/* Processes of one host over POSIX shared memory. Rank 0 creates the object and unlinks it once all
 * have joined; the others wait for it to appear. Returns on every rank once all have joined.
 * max_floats is a piece's size, not a limit: 64 Ki to 256 Ki keep the pieces in the cache.
 */
MUST_CHECK int comm_shm_create(struct comm **out, const struct comm_shm_config *cfg,
                               struct err_msg *why);

void comm_close(struct comm *c); /* accepts NULL */
MUST_CHECK int comm_all_reduce(struct comm *c, float *buf, size_t n);
MUST_CHECK int comm_all_gather(struct comm *c, float *out, const float *in, size_t n);
MUST_CHECK int comm_barrier(struct comm *c);
MUST_CHECK int comm_post(struct comm *c, const void *msg, size_t len);
MUST_CHECK int comm_wait(struct comm *c, void *buf, size_t cap, size_t *len);
void comm_abort(struct comm *c);
/* Another deadline for the collectives to come: while the ranks load a model they may be minutes
 * apart. For the thread that runs the collectives. */
void comm_set_timeout(struct comm *c, int64_t timeout_ms);

/* Collectives on device memory, in the order of the stream. ERR_UNSUPPORTED where the communicator
 * has no device. 0 means enqueued: a peer that fails later is found by comm_poll or
 * comm_wait_stream. Sums run over the ranks in an order that depends on n, dt and n_ranks only; all
 * ranks get the same bits.
 *   all_reduce_dev   buf[n] = sum of the ranks' buf[n], in place
 *   all_gather_dev   out[n_ranks, n] from in[n]; in may be out + rank * n */
MUST_CHECK int comm_all_reduce_dev(struct comm *c, void *buf, size_t n, enum dtype dt,
                                   void *stream);
MUST_CHECK int comm_all_gather_dev(struct comm *c, void *out, const void *in, size_t n,
                                   enum dtype dt, void *stream);
/* Sums of device memory that run beside what the stream does next, of at most max_bytes each, which
 * comm_reserve_sums tells at start (a collective; it takes device memory). comm_sum_begin takes buf
 * as the stream leaves it; nobody may touch it until comm_sum_end has made the stream wait for the
 * sum. more NULL: buf then holds it. Otherwise buf may hold this rank's share yet, and *more points
 * at what must be added to it, in f32, by work that is enqueued before the next comm_sum_begin;
 * *more is NULL where there is nothing to add. Ends follow the order of begins, at most
 * COMM_SUMS_OPEN are open, and no other collective of device memory comes between. Not to be
 * captured. The bits are those of f32 sums of two ranks, else comm_all_reduce_dev's. */
MUST_CHECK int comm_reserve_sums(struct comm *c, size_t max_bytes, struct err_msg *why);
MUST_CHECK int comm_sum_begin(struct comm *c, void *buf, size_t n, enum dtype dt, void *stream);
MUST_CHECK int comm_sum_end(struct comm *c, void *stream, const void **more);
/* False where comm_sum_begin cannot be called, or had better not. The same on all ranks. */
bool comm_overlaps(const struct comm *c);
/* For benches and tests, on all ranks alike and with no sum open. */
void comm_set_overlap(struct comm *c, enum comm_overlap way);
/* Have the peers or the device's collectives failed? 0, ERR_PEER or ERR_NCCL; never blocks. For the
 * thread that runs the collectives. A peer that has left is a failure here. */
MUST_CHECK int comm_poll(struct comm *c);
/* Waits until the stream has done what it holds, watching the peers meanwhile: ERR_PEER when one
 * dies, or when the stream is not done in timeout_ms (0: the communicator's own timeout). After an
 * error the stream may never end: leave the process by _exit. ERR_UNSUPPORTED without a device. */
MUST_CHECK int comm_wait_stream(struct comm *c, void *stream, int64_t timeout_ms);

#endif
