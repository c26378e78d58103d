#define LOG_MODULE "comm"
#include "parallel/overlap.h"

#include "core/log.h"
#include "core/mem.h"
#include "parallel/overlap_kernel.h"
#include "parallel/peer_memory.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string.h>

enum { N_OPEN = COMM_SUMS_OPEN, N_SLOTS = 4, VECTOR = 16, GONE = 1 << 30 /* past every count */ };

/* A rank's region: what its peer tells it, then the slots. */
struct overlap_region {
    uint32_t arrived; /* shares that the peer has sent here */
    uint32_t read;    /* shares of ours that the peer has read */
    uint32_t pad[62];
};

struct stream_values { /* of the driver, through the runtime's entry-point query */
    __typeof__(&cuStreamWaitValue32) wait;
    __typeof__(&cuStreamWriteValue32) write;
};

/* One sum between its begin and its end. */
struct open_sum {
    void *buf;
    size_t bytes;
    enum dtype dt;
    bool copied;
    uint32_t number; /* of the share, counted from 1; copied only */
};

struct overlap {
    struct comm *comm;
    cudaStream_t side;
    cudaEvent_t ready[N_OPEN], done[N_OPEN]; /* a sum's input is there; the side is through */
    struct open_sum sums[N_OPEN];
    uint32_t n_begun, n_ended, n_shares, n_read, n_told; /* shares sent, read, and told as read */
    size_t max_bytes;

    bool copies; /* the rest is for copies only */
    struct peer_memory memory;
    struct overlap_region *mine, *theirs;
    struct stream_values values;
};

static int failed(const char *what, const char *text)
{
    log_error("sum beside the stream: %s: %s", what, text);
    return ERR_CUDA;
}

static int check(cudaError_t e, const char *what)
{
    return e == cudaSuccess ? 0 : failed(what, cudaGetErrorString(e));
}

/* ---- numbers that streams write and wait for ---- */

static bool find(const char *name, void *function)
{
    void *entry = NULL;
    enum cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found) !=
            cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
        return false;
    memcpy(function, &entry, sizeof entry); /* ISO C has no cast between these pointers */
    return true;
}

static int tell(const struct overlap *o, cudaStream_t s, const uint32_t *where, uint32_t number)
{
    CUresult r = o->values.write(s, (CUdeviceptr)(uintptr_t)where, number, 0);
    return r == CUDA_SUCCESS ? 0 : failed("cuStreamWriteValue32", "refused");
}

static int await(const struct overlap *o, cudaStream_t s, const uint32_t *where, uint32_t number)
{
    CUresult r = o->values.wait(s, (CUdeviceptr)(uintptr_t)where, number, CU_STREAM_WAIT_VALUE_GEQ);
    return r == CUDA_SUCCESS ? 0 : failed("cuStreamWaitValue32", "refused");
}

/* ---- sums ---- */

static void *slot_of(const struct overlap *o, struct overlap_region *r, uint32_t number)
{
    return (char *)(r + 1) + number % N_SLOTS * o->max_bytes;
}

static bool can_copy(const struct overlap *o, const void *buf, size_t bytes, enum comm_overlap way)
{
    return o->copies && way == COMM_OVERLAP_COPY && bytes <= o->max_bytes && bytes % VECTOR == 0 &&
           (uintptr_t)buf % VECTOR == 0;
}

/* The share, on the side. */
static int send(struct overlap *o, struct open_sum *sum)
{
    sum->number = ++o->n_shares;
    if (sum->number > N_SLOTS)
        TRY(await(o, o->side, &o->mine->read, sum->number - N_SLOTS));
    TRY(check(cudaMemcpyAsync(slot_of(o, o->theirs, sum->number), sum->buf, sum->bytes,
                              cudaMemcpyDeviceToDevice, o->side),
              "copy to the peer"));
    return tell(o, o->side, &o->theirs->arrived, sum->number);
}

int overlap_begin(struct overlap *o, void *buf, size_t n, enum dtype dt, enum comm_overlap way,
                  void *stream)
{
    const uint32_t slot = o->n_begun++ % N_OPEN;
    struct open_sum *sum = &o->sums[slot];

    ASSERT(o->n_begun - o->n_ended <= N_OPEN);
    *sum = (struct open_sum){.buf = buf, .bytes = n * dtype_bytes(dt), .dt = dt};
    sum->copied = can_copy(o, buf, sum->bytes, way);
    if (o->n_told != o->n_read)
        TRY(tell(o, (cudaStream_t)stream, &o->theirs->read, o->n_told = o->n_read));
    TRY(check(cudaEventRecord(o->ready[slot], (cudaStream_t)stream), "event"));
    TRY(check(cudaStreamWaitEvent(o->side, o->ready[slot], 0), "event"));
    if (sum->copied)
        TRY(send(o, sum));
    else
        TRY(comm_all_reduce_dev(o->comm, buf, n, dt, o->side));
    return check(cudaEventRecord(o->done[slot], o->side), "event");
}

/* The stream waits for its own share too: what follows may overwrite what was sent. */
int overlap_end(struct overlap *o, void *stream, const void **more)
{
    const uint32_t slot = o->n_ended++ % N_OPEN;
    const struct open_sum *sum = &o->sums[slot];
    cudaStream_t s = (cudaStream_t)stream;

    ASSERT(o->n_ended <= o->n_begun);
    if (more)
        *more = NULL;
    TRY(check(cudaStreamWaitEvent(s, o->done[slot], 0), "event"));
    if (!sum->copied)
        return 0;
    TRY(await(o, s, &o->mine->arrived, sum->number));
    o->n_read = sum->number;
    void *share = slot_of(o, o->mine, sum->number);
    if (!more)
        return check(overlap_add_launch(sum->buf, share, sum->bytes, sum->dt, s), "adding");
    *more = share;
    return 0;
}

bool overlap_copies(const struct overlap *o)
{
    return o->copies;
}

/* ---- life ---- */

/* Both ranks or none; an error is the host communicator's. */
static int take_copies(struct overlap *o, struct comm *host)
{
    const bool can = find("cuStreamWaitValue32", (void *)&o->values.wait) &&
                     find("cuStreamWriteValue32", (void *)&o->values.write);
    float n = can ? 1.0f : 0.0f;
    TRY(comm_all_reduce(host, &n, 1));
    if (n < (float)host->n_ranks - 0.5f)
        return 0;
    TRY(peer_memory_open(&o->memory, host, sizeof(struct overlap_region) + N_SLOTS * o->max_bytes,
                         &o->copies));
    o->mine = o->memory.regions[host->rank];
    o->theirs = o->memory.regions[1 - host->rank];
    return 0;
}

static int create(struct overlap *o, const struct overlap_config *cfg, struct err_msg *why)
{
    int least = 0, most = 0;
    cudaError_t e = cudaDeviceGetStreamPriorityRange(&least, &most);
    if (e == cudaSuccess)
        e = cudaStreamCreateWithPriority(&o->side, cudaStreamNonBlocking, most);
    for (int i = 0; i < N_OPEN && e == cudaSuccess; i++) {
        e = cudaEventCreateWithFlags(&o->ready[i], cudaEventDisableTiming);
        if (e == cudaSuccess)
            e = cudaEventCreateWithFlags(&o->done[i], cudaEventDisableTiming);
    }
    if (e != cudaSuccess)
        return err_set(why, ERR_CUDA, "a stream for sums: %s", cudaGetErrorString(e));
    if (!cfg->one_host || cfg->host->n_ranks != 2)
        return 0;
    int err = take_copies(o, cfg->host);
    return err < 0 ? err_set(why, err, "a rank failed while peer memory was mapped") : 0;
}

int overlap_create(struct overlap **out, const struct overlap_config *cfg, struct err_msg *why)
{
    struct overlap *o = mem_zalloc(1, sizeof *o);
    o->comm = cfg->comm;
    o->max_bytes = (cfg->max_bytes + 255) / 256 * 256;
    int err = create(o, cfg, why);
    if (err < 0) {
        overlap_close(o, NULL);
        return err;
    }
    *out = o;
    return 0;
}

void overlap_abort(struct overlap *o)
{
    cudaStream_t s = NULL;
    if (!o || !o->copies || cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking) != cudaSuccess)
        return;
    if (tell(o, s, &o->mine->arrived, GONE) < 0 || tell(o, s, &o->mine->read, GONE) < 0)
        log_warn("streams that wait for the peer are not let go");
}

void overlap_close(struct overlap *o, struct comm *host)
{
    if (!o)
        return;
    if (o->copies && host)
        peer_memory_close(&o->memory, host);
    for (int i = 0; i < N_OPEN; i++) {
        if (o->ready[i])
            (void)cudaEventDestroy(o->ready[i]);
        if (o->done[i])
            (void)cudaEventDestroy(o->done[i]);
    }
    if (o->side)
        (void)cudaStreamDestroy(o->side);
    mem_free(o);
}
