/* See comm_nccl.h. NCCL's communicators are non-blocking: a call returns at once and its state is
 * polled, together with the peers' and a deadline; a rank that dies or stops is an error here and
 * never a call that does not return.
 *
 * comm_abort may come from any thread: it fails the host's communicator and sets a flag. NCCL
 * itself is taken down by the thread that runs the collectives, when it sees either; so no two
 * threads are inside NCCL at once. Taking it down has a bound of its own (see tear_down). */
#define LOG_MODULE "comm"
#include "parallel/comm_nccl.h"

#include "core/clock.h"
#include "core/log.h"
#include "core/mem.h"
#include "parallel/nccl_lib.h"
#include "parallel/overlap.h"
#include "parallel/peer_reduce.h"

#include <cuda_runtime_api.h>

#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    SPIN_US = 2000,     /* polls without a pause: decode steps are short */
    NAP_US = 20,        /* between polls later */
    LOOK_US = 1000,     /* between looks at the peers */
    BLAME_US = 500000,  /* for a dying peer to be seen as dead */
    ABORT_US = 2000000, /* for NCCL to take itself down */
    LEAVE_MS = 5000,    /* for an orderly end */
    SMALL_SUM_BYTES = 512 << 10,
    MANY_RANKS = 4, /* above, one-shot sums read too much: half the size */
};

struct comm_nccl {
    struct comm base;
    struct comm *host;
    struct nccl_lib lib;
    ncclComm_t nccl; /* NULL: not made, or taken down */
    struct peer_reduce *peer, *peer_off;
    struct overlap *overlap; /* NULL: nothing is reserved */
    enum comm_overlap way;
    int device;
    bool one_host;
    int64_t timeout_ms;
    atomic_bool aborted;
    bool torn; /* only touched by the thread that runs collectives */
};

static struct comm_nccl *self(struct comm *c)
{
    return (struct comm_nccl *)c;
}

static void nap(int64_t us)
{
    const struct timespec ts = {us / 1000000, us % 1000000 * 1000};
    (void)nanosleep(&ts, NULL);
}

/* ---- failing ---- */

struct abort_job {
    struct nccl_lib lib;
    ncclComm_t nccl;
    atomic_bool done;
    atomic_int users; /* the last of two frees */
};

static void leave_job(struct abort_job *j)
{
    if (atomic_fetch_sub(&j->users, 1) == 1)
        mem_free(j);
}

static void *abort_main(void *arg)
{
    struct abort_job *j = arg;
    (void)j->lib.CommAbort(j->nccl);
    atomic_store(&j->done, true);
    leave_job(j);
    return NULL;
}

/* ncclCommAbort waits for NCCL's own threads and frees device memory, either of which a stuck
 * driver can delay; the clients' answers must not wait for it. So it gets a thread, and a bound. */
static void abort_nccl(struct comm_nccl *s)
{
    struct abort_job *j = mem_zalloc(1, sizeof *j);
    int64_t end = clock_monotonic_us(NULL) + ABORT_US;
    pthread_t thread;

    j->lib = s->lib;
    j->nccl = s->nccl;
    atomic_init(&j->users, 2);
    s->nccl = NULL;
    if (pthread_create(&thread, NULL, abort_main, j) != 0) {
        log_warn("rank=%d no thread to abort NCCL in", s->base.rank);
        mem_free(j);
        return;
    }
    (void)pthread_detach(thread);
    while (!atomic_load(&j->done) && clock_monotonic_us(NULL) < end)
        nap(LOOK_US);
    if (!atomic_load(&j->done))
        log_warn("rank=%d NCCL does not let go; the process must end", s->base.rank);
    leave_job(j);
}

/* After the first failure: nobody waits for this communicator any more, on any rank. */
static void tear_down(struct comm_nccl *s)
{
    if (s->torn)
        return;
    s->torn = true;
    atomic_store(&s->aborted, true);
    comm_abort(s->host);
    peer_reduce_abort(s->peer ? s->peer : s->peer_off);
    overlap_abort(s->overlap);
    if (s->nccl)
        abort_nccl(s);
}

static int fail(struct comm_nccl *s, int err)
{
    tear_down(s);
    return err;
}

static int look_at_peers(struct comm_nccl *s)
{
    if (s->torn || atomic_load(&s->aborted))
        return fail(s, ERR_PEER);
    int err = comm_poll(s->host);
    return err < 0 ? fail(s, err) : 0;
}

/* A dying peer takes its memory away before its end can be seen: what CUDA or NCCL report first is
 * put down to the peer if it is gone within a moment. */
static int blame(struct comm_nccl *s, int err)
{
    const int64_t end = clock_monotonic_us(NULL) + BLAME_US;
    while (clock_monotonic_us(NULL) < end) {
        TRY(look_at_peers(s));
        nap(LOOK_US);
    }
    return fail(s, err);
}

/* 0, or the communicator has failed. *busy: NCCL is still at work on the last call. */
static int look_at_nccl(struct comm_nccl *s, bool *busy)
{
    ncclResult_t state = ncclSuccess;
    ncclResult_t r = s->lib.CommGetAsyncError(s->nccl, &state);
    if (r != ncclSuccess)
        state = r;
    *busy = state == ncclInProgress;
    if (state == ncclSuccess || state == ncclInProgress)
        return 0;
    log_error("rank=%d NCCL: %s", s->base.rank, s->lib.GetErrorString(state));
    return blame(s, state == ncclRemoteError ? ERR_PEER : ERR_NCCL);
}

/* Waits until NCCL has taken the last call: connected, or enqueued. The peers are looked at only
 * once this takes long. */
static int settle(struct comm_nccl *s, int64_t timeout_ms, const char *what)
{
    const int64_t start = clock_monotonic_us(NULL);
    int64_t looked = start;
    bool busy;

    for (;;) {
        TRY(look_at_nccl(s, &busy));
        if (!busy)
            return 0;
        int64_t now = clock_monotonic_us(NULL);
        if (now - start > timeout_ms * 1000) {
            log_error("rank=%d NCCL: %s took more than %" PRId64 " ms", s->base.rank, what,
                      timeout_ms);
            return fail(s, ERR_PEER);
        }
        if (now - looked > LOOK_US) {
            looked = now;
            TRY(look_at_peers(s));
        }
        if (now - start > SPIN_US)
            nap(NAP_US);
        else
            (void)sched_yield();
    }
}

/* ---- device collectives ---- */

static ncclDataType_t type_of(enum dtype dt)
{
    static const ncclDataType_t types[] = {
        [DTYPE_F32] = ncclFloat32, [DTYPE_F16] = ncclFloat16, [DTYPE_BF16] = ncclBfloat16};
    return types[dt];
}

static bool usable(const struct comm_nccl *s)
{
    return !s->torn && !atomic_load(&s->aborted);
}

static int launched(struct comm_nccl *s, ncclResult_t r, const char *what)
{
    if (r != ncclSuccess && r != ncclInProgress) {
        log_error("rank=%d NCCL: %s: %s", s->base.rank, what, s->lib.GetErrorString(r));
        return fail(s, ERR_NCCL);
    }
    return settle(s, s->timeout_ms, what);
}

static int nccl_all_reduce_dev(struct comm *c, void *buf, size_t n, enum dtype dt, void *stream)
{
    struct comm_nccl *s = self(c);
    if (!usable(s))
        return fail(s, ERR_PEER);
    if (n == 0)
        return 0;
    if (s->peer && peer_reduce_takes(s->peer, buf, n, dt)) {
        int err = peer_reduce_run(s->peer, buf, n, dt, stream);
        return err < 0 ? fail(s, err) : 0;
    }
    return launched(
        s, s->lib.AllReduce(buf, buf, n, type_of(dt), ncclSum, s->nccl, (cudaStream_t)stream),
        "all_reduce");
}

static int nccl_all_gather_dev(struct comm *c, void *out, const void *in, size_t n, enum dtype dt,
                               void *stream)
{
    struct comm_nccl *s = self(c);
    if (!usable(s))
        return fail(s, ERR_PEER);
    if (n == 0)
        return 0;
    return launched(s, s->lib.AllGather(in, out, n, type_of(dt), s->nccl, (cudaStream_t)stream),
                    "all_gather");
}

static int nccl_reduce_scatter_dev(struct comm *c, void *buf, size_t n, enum dtype dt, void *stream)
{
    struct comm_nccl *s = self(c);
    if (!usable(s))
        return fail(s, ERR_PEER);
    if (n == 0)
        return 0;
    void *slice = (char *)buf + (size_t)c->rank * n * dtype_bytes(dt);
    return launched(
        s, s->lib.ReduceScatter(buf, slice, n, type_of(dt), ncclSum, s->nccl, (cudaStream_t)stream),
        "reduce_scatter");
}

/* ---- beside the stream ---- */

static int nccl_reserve_rows(struct comm *c, const struct comm_rows *rows, struct err_msg *why)
{
    struct comm_nccl *s = self(c);
    const struct overlap_config cfg = {
        .comm = c, .host = s->host, .one_host = s->one_host, .rows = *rows};
    ASSERT(!s->overlap);
    cudaError_t e = cudaSetDevice(s->device);
    if (e != cudaSuccess)
        return err_set(why, ERR_CUDA, "GPU %d: %s", s->device, cudaGetErrorString(e));
    TRY(overlap_create(&s->overlap, &cfg, why));
    log_debug("rank=%d rows are shared out over %s", c->rank,
              overlap_copies(s->overlap) ? "copy engines" : "NCCL");
    return 0;
}

static int nccl_scatter_begin(struct comm *c, void *buf, int32_t n, void *stream)
{
    struct comm_nccl *s = self(c);
    if (!usable(s))
        return fail(s, ERR_PEER);
    int err = overlap_scatter_begin(s->overlap, buf, n, s->way, stream);
    return err < 0 ? fail(s, err) : 0;
}

static int nccl_scatter_end(struct comm *c, void *stream, struct comm_shares *out)
{
    struct comm_nccl *s = self(c);
    if (!usable(s))
        return fail(s, ERR_PEER);
    int err = overlap_scatter_end(s->overlap, stream, out);
    return err < 0 ? fail(s, err) : 0;
}

static void *nccl_gather_rows(struct comm *c)
{
    return overlap_gather_rows(self(c)->overlap);
}

static int nccl_gather_begin(struct comm *c, int32_t n, void *stream)
{
    struct comm_nccl *s = self(c);
    if (!usable(s))
        return fail(s, ERR_PEER);
    int err = overlap_gather_begin(s->overlap, n, s->way, stream);
    return err < 0 ? fail(s, err) : 0;
}

static int nccl_gather_end(struct comm *c, void *stream)
{
    struct comm_nccl *s = self(c);
    if (!usable(s))
        return fail(s, ERR_PEER);
    int err = overlap_gather_end(s->overlap, stream);
    return err < 0 ? fail(s, err) : 0;
}

static bool nccl_overlaps(const struct comm *c)
{
    const struct comm_nccl *s = (const struct comm_nccl *)c;
    return s->overlap && s->way != COMM_OVERLAP_NONE;
}

static void nccl_set_overlap(struct comm *c, enum comm_overlap way)
{
    self(c)->way = way;
}

static int nccl_poll(struct comm *c)
{
    struct comm_nccl *s = self(c);
    bool busy;
    TRY(look_at_peers(s));
    return look_at_nccl(s, &busy);
}

/* 1: the stream is done; 0: not yet. */
static int stream_done(struct comm_nccl *s, cudaStream_t stream)
{
    cudaError_t e = cudaStreamQuery(stream);
    if (e == cudaSuccess)
        return 1;
    if (e == cudaErrorNotReady)
        return 0;
    log_error("rank=%d CUDA: %s", s->base.rank, cudaGetErrorString(e));
    return blame(s, ERR_CUDA);
}

static int nccl_wait_stream(struct comm *c, void *stream, int64_t timeout_ms)
{
    struct comm_nccl *s = self(c);
    const int64_t limit_us = (timeout_ms > 0 ? timeout_ms : s->timeout_ms) * 1000;
    const int64_t start = clock_monotonic_us(NULL);
    int64_t looked = start;

    if (!usable(s))
        return fail(s, ERR_PEER);
    for (;;) {
        int done = stream_done(s, stream);
        if (done)
            return done < 0 ? done : 0;
        int64_t now = clock_monotonic_us(NULL);
        if (now - looked > LOOK_US) {
            looked = now;
            int err = nccl_poll(c);
            if (err < 0)
                return err;
        }
        if (now - start > limit_us) {
            log_error("rank=%d the step was not done in %" PRId64 " ms: a rank is stuck", c->rank,
                      limit_us / 1000);
            return fail(s, ERR_PEER);
        }
        if (now - start > SPIN_US)
            nap(NAP_US);
    }
}

/* ---- host collectives ---- */

static int nccl_all_reduce(struct comm *c, float *buf, size_t n)
{
    return comm_all_reduce(self(c)->host, buf, n);
}

static int nccl_all_gather(struct comm *c, float *out, const float *in, size_t n)
{
    return comm_all_gather(self(c)->host, out, in, n);
}

static int nccl_barrier(struct comm *c)
{
    return comm_barrier(self(c)->host);
}

static int nccl_post(struct comm *c, const void *msg, size_t len)
{
    return comm_post(self(c)->host, msg, len);
}

static int nccl_wait(struct comm *c, void *buf, size_t cap, size_t *len)
{
    return comm_wait(self(c)->host, buf, cap, len);
}

static void nccl_set_timeout(struct comm *c, int64_t timeout_ms)
{
    self(c)->timeout_ms = timeout_ms;
    comm_set_timeout(self(c)->host, timeout_ms);
}

static void nccl_abort(struct comm *c)
{
    atomic_store(&self(c)->aborted, true);
    comm_abort(self(c)->host);
}

/* ---- life ---- */

static void finish(struct comm_nccl *s)
{
    struct peer_reduce *peer = s->peer ? s->peer : s->peer_off;
    ncclResult_t r = s->lib.CommFinalize(s->nccl);
    if ((r == ncclSuccess || r == ncclInProgress) && settle(s, LEAVE_MS, "leaving") == 0) {
        (void)s->lib.CommDestroy(s->nccl);
        s->nccl = NULL;
        peer_reduce_close(peer, s->host);
        overlap_close(s->overlap, s->host);
    } else {
        tear_down(s);
    }
}

/* After a failure the device's memory is left to the end of the process: freeing it would wait for
 * kernels that may never end. */
static void nccl_close(struct comm *c)
{
    struct comm_nccl *s = self(c);
    if (!usable(s))
        tear_down(s);
    else if (s->nccl)
        finish(s);
    comm_close(s->host);
    mem_free(s);
}

static const struct comm_ops comm_nccl_ops = {
    .name = "nccl",
    .close = nccl_close,
    .all_reduce = nccl_all_reduce,
    .all_gather = nccl_all_gather,
    .barrier = nccl_barrier,
    .post = nccl_post,
    .wait = nccl_wait,
    .abort = nccl_abort,
    .all_reduce_dev = nccl_all_reduce_dev,
    .all_gather_dev = nccl_all_gather_dev,
    .reduce_scatter_dev = nccl_reduce_scatter_dev,
    .reserve_rows = nccl_reserve_rows,
    .scatter_begin = nccl_scatter_begin,
    .scatter_end = nccl_scatter_end,
    .gather_rows = nccl_gather_rows,
    .gather_begin = nccl_gather_begin,
    .gather_end = nccl_gather_end,
    .overlaps = nccl_overlaps,
    .set_overlap = nccl_set_overlap,
    .poll = nccl_poll,
    .wait_stream = nccl_wait_stream,
    .set_timeout = nccl_set_timeout,
};

/* Rank 0's identifier of the communicator, to all. */
static int share_id(struct comm_nccl *s, ncclUniqueId *id, struct err_msg *why)
{
    const size_t n = sizeof *id / sizeof(float);
    _Static_assert(sizeof *id % sizeof(float) == 0, "travels as floats");
    ncclResult_t r = s->base.rank == 0 ? s->lib.GetUniqueId(id) : ncclSuccess;
    if (r != ncclSuccess)
        return err_set(why, ERR_NCCL, "NCCL: %s", s->lib.GetErrorString(r));
    ncclUniqueId *all = mem_zalloc((size_t)s->base.n_ranks, sizeof *all);
    int err = comm_all_gather(s->host, (float *)(void *)all, (const float *)(const void *)id, n);
    *id = all[0];
    mem_free(all);
    return err < 0 ? err_set(why, err, "a rank failed before NCCL could connect") : 0;
}

static int connect_nccl(struct comm_nccl *s, const struct comm_nccl_config *cfg,
                        struct err_msg *why)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclUniqueId id = {{0}};

    config.blocking = 0;
    TRY(share_id(s, &id, why));
    ncclResult_t r =
        s->lib.CommInitRankConfig(&s->nccl, s->base.n_ranks, id, s->base.rank, &config);
    if (r != ncclSuccess && r != ncclInProgress)
        return err_set(why, ERR_NCCL, "NCCL: %s", s->lib.GetErrorString(r));
    int err = settle(s, cfg->join_ms > 0 ? cfg->join_ms : cfg->timeout_ms, "connecting");
    return err < 0 ? err_set(why, err, "NCCL could not connect the ranks") : 0;
}

/* NCCL connects ranks at their first collective, which a graph's capture must not see. */
static int warm_up(struct comm_nccl *s, struct err_msg *why)
{
    const size_t n = 64;
    float *buf = NULL;
    cudaStream_t stream = NULL;
    int err = 0;

    if (cudaMalloc((void **)&buf, n * (size_t)s->base.n_ranks * sizeof *buf) != cudaSuccess ||
        cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess)
        err = ERR_CUDA;
    if (err == 0)
        err = nccl_all_reduce_dev(&s->base, buf, n, DTYPE_F32, stream);
    if (err == 0)
        err = nccl_all_gather_dev(&s->base, buf, buf + (size_t)s->base.rank * n, n, DTYPE_F32,
                                  stream);
    if (err == 0)
        err = nccl_wait_stream(&s->base, stream, 0);
    if (err == 0) {
        (void)cudaStreamDestroy(stream);
        (void)cudaFree(buf);
    }
    return err < 0 ? err_set(why, err, "the first collective failed: %s", err_str(err)) : 0;
}

static int open_all(struct comm_nccl *s, const struct comm_nccl_config *cfg, struct err_msg *why)
{
    /* NVLink multicast wants rights that virtual machines often lack, and then takes the fabric
     * down with it; a user who knows better sets the variable. */
    (void)setenv("NCCL_NVLS_ENABLE", "0", 0); // NOLINT(concurrency-mt-unsafe): at start
    TRY(nccl_lib_open(&s->lib, why));
    cudaError_t e = cudaSetDevice(cfg->device);
    if (e != cudaSuccess)
        return err_set(why, ERR_CUDA, "GPU %d: %s", cfg->device, cudaGetErrorString(e));
    TRY(connect_nccl(s, cfg, why));
    TRY(warm_up(s, why));
    if (!cfg->one_host)
        return 0;
    return peer_reduce_create(&s->peer, s->host, cfg->device,
                              SMALL_SUM_BYTES / (s->base.n_ranks > MANY_RANKS ? 2 : 1), why);
}

int comm_nccl_create(struct comm **out, const struct comm_nccl_config *cfg, struct err_msg *why)
{
    *out = NULL;
    if (!cfg->host || !cfg->host->ops->poll || cfg->timeout_ms < 1)
        return err_set(why, ERR_INVALID, "NCCL: no host communicator, or timeout_ms %" PRId64,
                       cfg->timeout_ms);
    struct comm_nccl *s = mem_zalloc(1, sizeof *s);
    s->base = (struct comm){&comm_nccl_ops, cfg->host->rank, cfg->host->n_ranks};
    s->host = cfg->host;
    s->timeout_ms = cfg->timeout_ms;
    s->device = cfg->device;
    s->one_host = cfg->one_host;
    int err = open_all(s, cfg, why);
    if (err < 0) {
        tear_down(s);
        mem_free(s);
        return err;
    }
    log_debug("rank=%d NCCL connected, small sums over %s", s->base.rank,
              s->peer ? "peer memory" : "NCCL");
    *out = &s->base;
    return 0;
}

bool comm_nccl_use_peer_memory(struct comm *c, bool on)
{
    struct comm_nccl *s = self(c);
    struct peer_reduce *p = s->peer ? s->peer : s->peer_off;
    s->peer = on ? p : NULL;
    s->peer_off = on ? NULL : p;
    return p != NULL;
}
