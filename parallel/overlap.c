#define LOG_MODULE "comm"
#include "parallel/overlap.h"

#include "core/log.h"
#include "core/mem.h"
#include "parallel/peer_memory.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string.h>

enum { N_SLOTS = 2, ALIGN = 256, GONE = 1 << 30 /* past every count */ };

enum kind { SCATTER, GATHER, N_KINDS };

/* The head of a rank's region: what each peer tells it of exchanges of a kind. */
struct overlap_region {
    struct {
        uint32_t arrived[PEER_MAX]; /* that the peer has sent here */
        uint32_t read[PEER_MAX];    /* of ours that the peer has read */
    } told[N_KINDS];
    char pad[ALIGN - sizeof(uint32_t) * N_KINDS * 2 * PEER_MAX];
};
_Static_assert(sizeof(struct overlap_region) == ALIGN, "slots follow, and products read them");

struct stream_values { /* of the driver, through the runtime's entry-point query */
    __typeof__(&cuStreamWaitValue32) wait;
    __typeof__(&cuStreamWriteValue32) write;
};

/* The exchanges of a kind, counted from 1. */
struct exchanges {
    cudaEvent_t ready, done; /* what the stream gives is there; the side is through */
    uint32_t n_begun;
    bool open, copied; /* the last one */
    int32_t rows;      /* of it */
};

struct overlap {
    struct comm *comm;
    struct comm_rows rows;
    size_t row_bytes;
    cudaStream_t side;
    struct exchanges kinds[N_KINDS];

    bool copies;
    struct peer_memory memory; /* copies: of all ranks */
    void *own;                 /* otherwise: this rank's gathers */
    struct stream_values values;
};

static int failed(const char *what, const char *text)
{
    log_error("rows beside the stream: %s: %s", what, text);
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

/* ---- memory ---- */

static struct overlap_region *region(const struct overlap *o, int rank)
{
    return o->memory.regions[rank];
}

static size_t round_up(size_t bytes)
{
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

static size_t gather_bytes(const struct overlap *o) /* of a slot; parts may end behind the rows */
{
    return round_up((size_t)(o->rows.max + o->comm->n_ranks) * o->row_bytes);
}

static size_t scatter_bytes(const struct overlap *o)
{
    const size_t part = (size_t)comm_part(o->comm, o->rows.max) * o->row_bytes;
    return round_up((size_t)(o->comm->n_ranks - 1) * part);
}

static char *gather_slot(const struct overlap *o, int rank, uint32_t number)
{
    char *slots = o->copies ? (char *)(region(o, rank) + 1) : o->own;
    return slots + number % N_SLOTS * gather_bytes(o);
}

/* What others send `rank` for its part: share j of the ranks without it. */
static char *scatter_slot(const struct overlap *o, int rank, uint32_t number)
{
    return (char *)(region(o, rank) + 1) + N_SLOTS * gather_bytes(o) +
           number % N_SLOTS * scatter_bytes(o);
}

static size_t part_at(const struct overlap *o, int32_t n, int rank)
{
    return (size_t)rank * (size_t)comm_part(o->comm, n) * o->row_bytes;
}

static size_t part_bytes(const struct overlap *o, int32_t n, int rank)
{
    return (size_t)comm_part_rows(o->comm, n, rank) * o->row_bytes;
}

/* ---- exchanges ---- */

/* From here on the side works on what the stream has done so far. */
static int begin(struct overlap *o, enum kind kind, int32_t n, enum comm_overlap way, void *stream)
{
    struct exchanges *e = &o->kinds[kind];
    ASSERT(!e->open && n > 0 && n <= o->rows.max);
    e->open = true;
    e->n_begun++;
    e->rows = n;
    e->copied = o->copies && way == COMM_OVERLAP_COPY;
    TRY(check(cudaEventRecord(e->ready, (cudaStream_t)stream), "event"));
    return check(cudaStreamWaitEvent(o->side, e->ready, 0), "event");
}

/* Tells all peers that what they sent before was read: its readers came before this exchange. */
static int tell_read(struct overlap *o, enum kind kind)
{
    const uint32_t before = o->kinds[kind].n_begun - 1;
    const int me = o->comm->rank, n = o->comm->n_ranks;
    for (int i = 1; i < n && before > 0; i++)
        TRY(tell(o, o->side, &region(o, (me + i) % n)->told[kind].read[me], before));
    return 0;
}

/* One rank's part to where the peer expects it; every rank begins with another peer. */
static int send(struct overlap *o, enum kind kind, int peer, void *to, const void *from,
                size_t bytes)
{
    const struct exchanges *e = &o->kinds[kind];
    const int me = o->comm->rank;
    if (e->n_begun > N_SLOTS)
        TRY(await(o, o->side, &region(o, me)->told[kind].read[peer], e->n_begun - N_SLOTS));
    if (bytes > 0)
        TRY(check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, o->side),
                  "copy to a peer"));
    return tell(o, o->side, &region(o, peer)->told[kind].arrived[me], e->n_begun);
}

/* The side is done once what the peers send is here too. */
static int finish(struct overlap *o, enum kind kind)
{
    const struct exchanges *e = &o->kinds[kind];
    const int me = o->comm->rank, n = o->comm->n_ranks;
    for (int i = 1; i < n && e->copied; i++)
        TRY(await(o, o->side, &region(o, me)->told[kind].arrived[(me + i) % n], e->n_begun));
    return check(cudaEventRecord(e->done, o->side), "event");
}

static int end(struct overlap *o, enum kind kind, void *stream)
{
    struct exchanges *e = &o->kinds[kind];
    ASSERT(e->open);
    e->open = false;
    return check(cudaStreamWaitEvent((cudaStream_t)stream, e->done, 0), "event");
}

static int scatter_parts(struct overlap *o, const char *buf, int32_t n)
{
    const uint32_t number = o->kinds[SCATTER].n_begun;
    const int me = o->comm->rank, ranks = o->comm->n_ranks;
    const size_t share = (size_t)comm_part(o->comm, n) * o->row_bytes;
    TRY(tell_read(o, SCATTER));
    for (int i = 1; i < ranks; i++) {
        const int peer = (me + i) % ranks;
        char *to = scatter_slot(o, peer, number) + (size_t)(me - (me > peer)) * share;
        TRY(send(o, SCATTER, peer, to, buf + part_at(o, n, peer), part_bytes(o, n, peer)));
    }
    return 0;
}

int overlap_scatter_begin(struct overlap *o, void *buf, int32_t n, enum comm_overlap way,
                          void *stream)
{
    TRY(begin(o, SCATTER, n, way, stream));
    if (o->kinds[SCATTER].copied)
        TRY(scatter_parts(o, buf, n));
    else
        TRY(comm_reduce_scatter_dev(o->comm, buf,
                                    (size_t)comm_part(o->comm, n) * (size_t)o->rows.width,
                                    o->rows.dt, o->side));
    return finish(o, SCATTER);
}

int overlap_scatter_end(struct overlap *o, void *stream, struct comm_shares *out)
{
    const struct exchanges *e = &o->kinds[SCATTER];
    *out = (struct comm_shares){0};
    if (e->copied)
        *out = (struct comm_shares){.rows = scatter_slot(o, o->comm->rank, e->n_begun),
                                    .n = o->comm->n_ranks - 1,
                                    .pitch = comm_part(o->comm, e->rows)};
    return end(o, SCATTER, stream);
}

void *overlap_gather_rows(struct overlap *o)
{
    return gather_slot(o, o->comm->rank, o->kinds[GATHER].n_begun + 1);
}

static int gather_parts(struct overlap *o, int32_t n)
{
    const uint32_t number = o->kinds[GATHER].n_begun;
    const int me = o->comm->rank, ranks = o->comm->n_ranks;
    const size_t at = part_at(o, n, me), bytes = part_bytes(o, n, me);
    const char *mine = gather_slot(o, me, number) + at;
    TRY(tell_read(o, GATHER));
    for (int i = 1; i < ranks; i++) {
        const int peer = (me + i) % ranks;
        TRY(send(o, GATHER, peer, gather_slot(o, peer, number) + at, mine, bytes));
    }
    return 0;
}

int overlap_gather_begin(struct overlap *o, int32_t n, enum comm_overlap way, void *stream)
{
    TRY(begin(o, GATHER, n, way, stream));
    char *all = gather_slot(o, o->comm->rank, o->kinds[GATHER].n_begun);
    if (o->kinds[GATHER].copied)
        TRY(gather_parts(o, n));
    else
        TRY(comm_all_gather_dev(o->comm, all, all + part_at(o, n, o->comm->rank),
                                (size_t)comm_part(o->comm, n) * (size_t)o->rows.width, o->rows.dt,
                                o->side));
    return finish(o, GATHER);
}

int overlap_gather_end(struct overlap *o, void *stream)
{
    return end(o, GATHER, stream);
}

bool overlap_copies(const struct overlap *o)
{
    return o->copies;
}

/* ---- life ---- */

/* All ranks or none; an error is the host communicator's. */
static int take_copies(struct overlap *o, struct comm *host)
{
    const bool can = find("cuStreamWaitValue32", (void *)&o->values.wait) &&
                     find("cuStreamWriteValue32", (void *)&o->values.write);
    const size_t bytes =
        sizeof(struct overlap_region) + N_SLOTS * (gather_bytes(o) + scatter_bytes(o));
    float n = can ? 1.0f : 0.0f;
    TRY(comm_all_reduce(host, &n, 1));
    if (n < (float)host->n_ranks - 0.5f)
        return 0;
    return peer_memory_open(&o->memory, host, bytes, &o->copies);
}

static cudaError_t make_stream(struct overlap *o)
{
    int least = 0, most = 0;
    cudaError_t e = cudaDeviceGetStreamPriorityRange(&least, &most);
    if (e == cudaSuccess)
        e = cudaStreamCreateWithPriority(&o->side, cudaStreamNonBlocking, most);
    for (int k = 0; k < N_KINDS && e == cudaSuccess; k++) {
        e = cudaEventCreateWithFlags(&o->kinds[k].ready, cudaEventDisableTiming);
        if (e == cudaSuccess)
            e = cudaEventCreateWithFlags(&o->kinds[k].done, cudaEventDisableTiming);
    }
    return e;
}

static int create(struct overlap *o, const struct overlap_config *cfg, struct err_msg *why)
{
    cudaError_t e = make_stream(o);
    if (e != cudaSuccess)
        return err_set(why, ERR_CUDA, "a stream for what ranks share out: %s",
                       cudaGetErrorString(e));
    int err = cfg->one_host ? take_copies(o, cfg->host) : 0;
    if (err < 0)
        return err_set(why, err, "a rank failed while peer memory was mapped");
    if (o->copies)
        return 0;
    e = cudaMalloc(&o->own, N_SLOTS * gather_bytes(o));
    if (e != cudaSuccess)
        return err_set(why, ERR_CUDA, "memory for %d rows that ranks share out: %s", o->rows.max,
                       cudaGetErrorString(e));
    return 0;
}

int overlap_create(struct overlap **out, const struct overlap_config *cfg, struct err_msg *why)
{
    struct overlap *o = mem_zalloc(1, sizeof *o);
    o->comm = cfg->comm;
    o->rows = cfg->rows;
    o->row_bytes = (size_t)cfg->rows.width * dtype_bytes(cfg->rows.dt);
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
    struct overlap_region *mine = region(o, o->comm->rank);
    for (int i = 0; i < N_KINDS * o->comm->n_ranks; i++) {
        const int kind = i % N_KINDS, rank = i / N_KINDS;
        if (tell(o, s, &mine->told[kind].arrived[rank], GONE) < 0 ||
            tell(o, s, &mine->told[kind].read[rank], GONE) < 0)
            log_warn("streams that wait for a peer are not let go");
    }
}

void overlap_close(struct overlap *o, struct comm *host)
{
    if (!o)
        return;
    if (o->copies && host)
        peer_memory_close(&o->memory, host);
    if (o->own)
        (void)cudaFree(o->own);
    for (int k = 0; k < N_KINDS; k++) {
        if (o->kinds[k].ready)
            (void)cudaEventDestroy(o->kinds[k].ready);
        if (o->kinds[k].done)
            (void)cudaEventDestroy(o->kinds[k].done);
    }
    if (o->side)
        (void)cudaStreamDestroy(o->side);
    mem_free(o);
}
