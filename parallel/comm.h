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

/* How scatters and gathers are made. */
enum comm_overlap {
    COMM_OVERLAP_COPY, /* by copy engines where they can, else as COMM_OVERLAP_SUMS */
    COMM_OVERLAP_SUMS, /* by the communicator's kernels, beside those of the stream */
    COMM_OVERLAP_NONE  /* not at all: comm_overlaps is false */
};

/* Rows that the ranks share out: of n rows, a part of ceil(n / n_ranks) each in rank order, the
 * last ones shorter or empty. */
struct comm_rows {
    int32_t max;   /* n of one call */
    int32_t width; /* elements of a row */
    enum dtype dt;
};

/* The other ranks' addends to a rank's part: row r of it at rows + (j * pitch + r) * width for each
 * j < n. */
struct comm_shares {
    const void *rows; /* device */
    int32_t n, pitch;
};

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
    /* buf [n_ranks, n] in place: slice `rank` becomes the sum of the ranks' */
    int (*reduce_scatter_dev)(struct comm *c, void *buf, size_t n, enum dtype dt, void *stream);
    /* NULL: nothing runs beside other work */
    int (*reserve_rows)(struct comm *c, const struct comm_rows *rows, struct err_msg *why);
    int (*scatter_begin)(struct comm *c, void *buf, int32_t n, void *stream);
    int (*scatter_end)(struct comm *c, void *stream, struct comm_shares *out);
    void *(*gather_rows)(struct comm *c);
    int (*gather_begin)(struct comm *c, int32_t n, void *stream);
    int (*gather_end)(struct comm *c, void *stream);
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
 *   all_gather_dev   out[n_ranks, n] from in[n]; in may be out + rank * n
 *   reduce_scatter_dev   buf[n_ranks, n]: slice `rank` = sum of the ranks' slices, the others may
 * be overwritten */
MUST_CHECK int comm_all_reduce_dev(struct comm *c, void *buf, size_t n, enum dtype dt,
                                   void *stream);
MUST_CHECK int comm_all_gather_dev(struct comm *c, void *out, const void *in, size_t n,
                                   enum dtype dt, void *stream);
MUST_CHECK int comm_reduce_scatter_dev(struct comm *c, void *buf, size_t n, enum dtype dt,
                                       void *stream);

/* Sums of rows of which each rank keeps a part, and gathers of what the ranks make of their parts:
 * both run beside what the stream does next, so that products hide them. comm_reserve_rows tells at
 * start how large they get (a collective; it takes device memory). At most one scatter and one
 * gather are open at a time, no other collective of device memory comes between a begin and its
 * end, and nothing of it can be captured.
 *
 * comm_scatter_begin takes buf [n, width], this rank's addends, as the stream leaves it; there is
 * room for n_ranks - 1 rows more behind it. Nobody touches it until comm_scatter_end has made the
 * stream wait. The sum of this rank's part is then that part of buf and the shares, to be added in
 * f32 by work that is enqueued before the next comm_scatter_begin; the rest of buf is undefined.
 *
 * comm_gather_rows is device memory [max, width] of which the stream then writes this rank's part.
 * comm_gather_begin takes that, and once comm_gather_end has made the stream wait all n rows are
 * there; they may be read by work that is enqueued before the next comm_gather_begin. */
MUST_CHECK int comm_reserve_rows(struct comm *c, const struct comm_rows *rows, struct err_msg *why);
MUST_CHECK int comm_scatter_begin(struct comm *c, void *buf, int32_t n, void *stream);
MUST_CHECK int comm_scatter_end(struct comm *c, void *stream, struct comm_shares *out);
void *comm_gather_rows(struct comm *c);
MUST_CHECK int comm_gather_begin(struct comm *c, int32_t n, void *stream);
MUST_CHECK int comm_gather_end(struct comm *c, void *stream);
/* Rows of a full part. */
static inline int32_t comm_part(const struct comm *c, int32_t n)
{
    return (n + c->n_ranks - 1) / c->n_ranks;
}
/* Rows of a rank's part. */
static inline int32_t comm_part_rows(const struct comm *c, int32_t n, int rank)
{
    const int32_t part = comm_part(c, n), left = n - rank * part;
    return left < 0 ? 0 : left < part ? left : part;
}
/* False where they cannot be called, or had better not. The same on all ranks. */
bool comm_overlaps(const struct comm *c);
/* For benches and tests, on all ranks alike and with nothing open. */
void comm_set_overlap(struct comm *c, enum comm_overlap way);
/* Have the peers or the device's collectives failed? 0, ERR_PEER or ERR_NCCL; never blocks. For the
 * thread that runs the collectives. A peer that has left is a failure here. */
MUST_CHECK int comm_poll(struct comm *c);
/* Waits until the stream has done what it holds, watching the peers meanwhile: ERR_PEER when one
 * dies, or when the stream is not done in timeout_ms (0: the communicator's own timeout). After an
 * error the stream may never end: leave the process by _exit. ERR_UNSUPPORTED without a device. */
MUST_CHECK int comm_wait_stream(struct comm *c, void *stream, int64_t timeout_ms);

#endif
