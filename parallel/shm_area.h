/* The protocol of comm_shm over one region of memory that several ranks share: words to sleep on,
 * an exchange of equal shares, a mailbox. It knows neither files nor processes, so that tests can
 * run it between threads (and under TSan) as well.
 *
 * Layout: head | message | shares [2][n_ranks][max_floats].
 * A shm_word is a futex. Its owner raises the value by 2 for each event, so a reader waits for
 * "at least 2 * n"; bit 0 means that the communicator has failed. Since failing changes the value
 * itself, a reader about to sleep cannot miss it.
 *
 * Exchange number e uses half e % 2 of the shares. A rank writes half e % 2 again in exchange e +
 * 2, for which it has passed e + 1, for which every peer had finished reading e: two halves and one
 * wait per exchange are enough. */
#ifndef PARALLEL_SHM_AREA_H
#define PARALLEL_SHM_AREA_H

#include "core/err.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SHM_MAX_RANKS = 64, SHM_LINE = 64 };

struct shm_word {
    _Alignas(SHM_LINE) atomic_uint value;
    atomic_uint sleepers; /* readers that may be asleep: spares the writer a system call */
};

/* What one rank publishes; only it writes here, except for bit 0 of the words. */
struct shm_rank {
    struct shm_word arrived; /* exchanges entered */
    struct shm_word taken;   /* messages read */
    uint64_t tag[2];         /* what the rank believes each exchange is: unequal tags are a bug */
    atomic_int pid;
};

struct shm_head {
    atomic_uint magic; /* written last by rank 0 */
    uint32_t n_ranks;
    uint64_t max_floats, max_msg, bytes;
    struct shm_word joined; /* ranks that have attached */
    struct shm_word posted; /* messages posted */
    uint64_t msg_len;
    struct shm_rank ranks[SHM_MAX_RANKS];
};

/* One rank's view. Sizes are copied out of the head so that nobody can change them later. */
struct shm_area {
    struct shm_head *head;
    unsigned char *msg;
    float *shares;
    int rank, n_ranks;
    size_t max_floats, max_msg;
    int64_t timeout_us; /* of one exchange or post */
    int spin;           /* polls before sleeping */
    uint32_t n_exchanges, n_posted;
    /* Asked now and then while waiting; returns a rank whose process is gone, else -1. May be NULL.
     */
    int (*dead_rank)(void *arg);
    void *dead_arg;
};

/* Bytes of the region; 0 when the sizes overflow or are out of range. */
size_t shm_area_bytes(int n_ranks, size_t max_floats, size_t max_msg);
/* Rank 0: makes zeroed memory a region. */
void shm_area_format(void *mem, int n_ranks, size_t max_floats, size_t max_msg);
/* True once rank 0 has formatted the region. */
bool shm_area_ready(const void *mem);
/* Checks that the region is the one expected, then takes the place of `rank`. */
MUST_CHECK int shm_area_attach(struct shm_area *a, void *mem, int rank, int n_ranks,
                               size_t max_floats, size_t max_msg, struct err_msg *why);
int shm_area_n_joined(const struct shm_area *a);
/* Waits until all ranks are attached, at most wait_us. -ETIMEDOUT leaves the region usable. */
MUST_CHECK int shm_area_await_join(struct shm_area *a, int64_t wait_us);

/* The collectives of comm.h. */
MUST_CHECK int shm_area_reduce(struct shm_area *a, float *buf, size_t n);
MUST_CHECK int shm_area_gather(struct shm_area *a, float *out, const float *in, size_t n);
MUST_CHECK int shm_area_barrier(struct shm_area *a);
MUST_CHECK int shm_area_post(struct shm_area *a, const void *msg, size_t len);
MUST_CHECK int shm_area_wait(struct shm_area *a, void *buf, size_t cap, size_t *len);
/* Fails the communicator for everybody and wakes them. Any thread; idempotent. */
void shm_area_fail(struct shm_area *a);
bool shm_area_failed(const struct shm_area *a);

#endif
