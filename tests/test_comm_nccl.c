/* parallel/comm_nccl: one process a GPU. Sums and gathers of device memory against sums in double
 * on the host, equal bits on all ranks, rows beside the stream, graphs, and what happens when a
 * rank dies or stops. As in test_comm.c every rank is a forked child whose exit status reports;
 * only children touch CUDA. */
#include "tests/test.h"

#include "core/clock.h"
#include "parallel/comm_nccl.h"

#include <cuda_runtime_api.h>

#include <signal.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    MAX_RANKS = 8,
    TIMEOUT_MS = 20000,
    SHORT_MS = 1500,
    STATUS_OK = 7,
    MAX_N = 1 << 20,
    N_TYPES = 3,
};

#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            (void)fprintf(stderr, "%s:%d: rank failed: %s\n", __FILE__, __LINE__, #cond);          \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)
#define CUDA(call) CHECK((call) == cudaSuccess)

struct job {
    char name[64];
    int n_ranks;
    int64_t timeout_ms;
    size_t n; /* of the failure tests */
    bool beside;
    int pipe[2];
    int (*run)(struct job *j, struct comm *c);
    pid_t pids[MAX_RANKS];
};

static int n_devices(void)
{
    int status;
    (void)fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        int n = 0;
        _exit(cudaGetDeviceCount(&n) == cudaSuccess ? n : 0);
    }
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

static int open_comm(struct comm **out, const struct job *j, int rank, struct err_msg *why)
{
    struct comm *host = NULL;
    const struct comm_shm_config shm = {.name = j->name,
                                        .rank = rank,
                                        .n_ranks = j->n_ranks,
                                        .max_floats = 4096,
                                        .max_msg = 4096,
                                        .timeout_ms = TIMEOUT_MS};
    TRY(comm_shm_create(&host, &shm, why));
    const struct comm_nccl_config cfg = {
        .host = host, .device = rank, .timeout_ms = TIMEOUT_MS, .one_host = true};
    int err = comm_nccl_create(out, &cfg, why);
    if (err < 0)
        comm_close(host);
    return err;
}

_Noreturn static void child(struct job *j, int rank)
{
    struct err_msg why = {""};
    struct comm *c = NULL;
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)alarm(60);
    int err = open_comm(&c, j, rank, &why);
    if (err < 0) {
        (void)fprintf(stderr, "rank %d: %s\n", rank, err_why(&why, err));
        _exit(2);
    }
    int status = j->run(j, c);
    comm_close(c);
    _exit(status ? status : STATUS_OK);
}

static void job_start(struct job *j)
{
    assert_ok(comm_shm_name(j->name, sizeof j->name));
    assert_int_equal(pipe(j->pipe), 0);
    for (int r = 0; r < j->n_ranks; r++) {
        (void)fflush(NULL);
        j->pids[r] = fork();
        assert_true(j->pids[r] >= 0);
        if (j->pids[r] == 0)
            child(j, r);
    }
}

static void assert_ended_well(struct job *j, int rank)
{
    int status;
    assert_int_equal(waitpid(j->pids[rank], &status, 0), j->pids[rank]);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != STATUS_OK)
        fail_msg("rank %d of %d: wait status %#x", rank, j->n_ranks, status);
}

static void job_end(struct job *j)
{
    (void)close(j->pipe[0]);
    (void)close(j->pipe[1]);
}

static void run_all(int (*run)(struct job *j, struct comm *c))
{
    struct job j = {.n_ranks = n_devices() < MAX_RANKS ? n_devices() : MAX_RANKS, .run = run};
    job_start(&j);
    for (int r = 0; r < j.n_ranks; r++)
        assert_ended_well(&j, r);
    job_end(&j);
}

/* ---- values ---- */

/* Random numbers of the type, between about 2^-7 and 2^4, as its bits. */
static void fill(void *dst, size_t n, enum dtype dt, uint64_t seed, int rank)
{
    struct rng g = {seed * 1000 + (uint64_t)rank};
    for (size_t i = 0; i < n; i++) {
        uint64_t u = rng_u64(&g);
        unsigned e = (unsigned)(u >> 32) % 11;
        if (dt == DTYPE_F32)
            ((float *)dst)[i] = (float)rng_normal(&g);
        else if (dt == DTYPE_BF16)
            ((uint16_t *)dst)[i] = (uint16_t)((u & 0x807f) | (120 + e) << 7);
        else
            ((uint16_t *)dst)[i] = (uint16_t)((u & 0x83ff) | (8 + e) << 10);
    }
}

static float value(const void *p, size_t i, enum dtype dt)
{
    if (dt == DTYPE_F32)
        return ((const float *)p)[i];
    uint16_t bits = ((const uint16_t *)p)[i];
    return dt == DTYPE_BF16 ? dtype_bf16_f32(bits) : dtype_f16_f32(bits);
}

static double rounding(enum dtype dt)
{
    return dt == DTYPE_F32 ? 0x1p-23 : dt == DTYPE_BF16 ? 0x1p-8 : 0x1p-11;
}

/* True when got[n] is the sum of the ranks' fills, to the rounding of each addition. */
static bool sums_right(const void *got, size_t n, enum dtype dt, uint64_t seed, int n_ranks)
{
    static double sum[MAX_N], size[MAX_N];
    static float share[MAX_N];
    memset(sum, 0, n * sizeof *sum);
    memset(size, 0, n * sizeof *size);
    for (int r = 0; r < n_ranks; r++) {
        fill(share, n, dt, seed, r);
        for (size_t i = 0; i < n; i++) {
            sum[i] += (double)value(share, i, dt);
            size[i] += fabs((double)value(share, i, dt));
        }
    }
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)value(got, i, dt) - sum[i]);
        if (!(d <= size[i] * rounding(dt) * (double)(n_ranks - 1))) {
            (void)fprintf(stderr, "%s n=%zu i=%zu: %g, want %g\n", dtype_name(dt), n, i,
                          (double)value(got, i, dt), sum[i]);
            return false;
        }
    }
    return true;
}

/* All ranks hold the same bytes. */
static bool same_bits(struct comm *c, const void *p, size_t bytes)
{
    float mine[4], all[4 * MAX_RANKS];
    uint64_t h = 1469598103934665603ull;
    for (size_t i = 0; i < bytes; i++)
        h = (h ^ ((const unsigned char *)p)[i]) * 1099511628211ull;
    for (int k = 0; k < 4; k++)
        mine[k] = (float)(h >> (16 * k) & 0xffff);
    if (comm_all_gather(c, all, mine, 4) < 0)
        return false;
    for (int r = 0; r < c->n_ranks; r++) {
        if (memcmp(all + 4 * r, mine, sizeof mine) != 0)
            return false;
    }
    return true;
}

/* ---- sums and gathers ---- */

static const size_t sizes[] = {1, 7, 8, 64, 4096, 4104, 65536, 131072, 262144, 300007, MAX_N};
enum { N_SIZES = sizeof sizes / sizeof *sizes };

static uint64_t seed_of(size_t n, enum dtype dt)
{
    return n * 10 + dt;
}

/* What the stream has summed: right, and the same on all ranks. */
static int read_sums(struct comm *c, const void *dev, void *host, size_t n, enum dtype dt,
                     cudaStream_t s)
{
    const size_t bytes = n * dtype_bytes(dt);
    CHECK(comm_wait_stream(c, s, 0) == 0);
    memset(host, 0xff, bytes);
    CUDA(cudaMemcpy(host, dev, bytes, cudaMemcpyDeviceToHost));
    CHECK(sums_right(host, n, dt, seed_of(n, dt), c->n_ranks));
    CHECK(same_bits(c, host, bytes));
    return 0;
}

static int reduce_once(struct comm *c, void *dev, void *host, size_t n, enum dtype dt,
                       cudaStream_t s)
{
    const size_t bytes = n * dtype_bytes(dt);
    fill(host, n, dt, seed_of(n, dt), c->rank);
    CUDA(cudaMemcpyAsync(dev, host, bytes, cudaMemcpyHostToDevice, s));
    CHECK(comm_all_reduce_dev(c, dev, n, dt, s) == 0);
    return read_sums(c, dev, host, n, dt, s);
}

static int reduce_rank(struct job *j, struct comm *c)
{
    static float host[MAX_N];
    void *dev;
    cudaStream_t s;
    (void)j;
    CUDA(cudaMalloc(&dev, sizeof host));
    CUDA(cudaStreamCreate(&s));
    CHECK(comm_nccl_use_peer_memory(c, true)); /* GPUs of one host: otherwise not tested at all */
    for (int peer = 0; peer < 2; peer++) {
        (void)comm_nccl_use_peer_memory(c, peer == 1);
        for (int dt = 0; dt < N_TYPES; dt++) {
            for (size_t i = 0; i < N_SIZES; i++)
                CHECK(reduce_once(c, dev, host, sizes[i], (enum dtype)dt, s) == 0);
        }
    }
    CHECK(comm_all_reduce_dev(c, dev, 0, DTYPE_F32, s) == 0);
    CHECK(comm_poll(c) == 0);
    return 0;
}

static void sums_match_the_host(void **state)
{
    (void)state;
    run_all(reduce_rank);
}

static int gather_rank(struct job *j, struct comm *c)
{
    enum { N = 100003 };
    static float mine[N], host[MAX_RANKS * N];
    char *out, *in;
    cudaStream_t s;
    (void)j;
    CUDA(cudaMalloc((void **)&out, sizeof host));
    CUDA(cudaMalloc((void **)&in, sizeof mine));
    CUDA(cudaStreamCreate(&s));
    for (int k = 0; k < 2 * N_TYPES; k++) {
        const enum dtype dt = (enum dtype)(k / 2);
        const size_t bytes = N * dtype_bytes(dt);
        void *from = k % 2 ? out + (size_t)c->rank * bytes : in; /* in place, or not */
        CUDA(cudaMemset(out, 0xff, sizeof host));
        fill(mine, N, dt, (uint64_t)k, c->rank);
        CUDA(cudaMemcpy(from, mine, bytes, cudaMemcpyHostToDevice));
        CHECK(comm_all_gather_dev(c, out, from, N, dt, s) == 0);
        CHECK(comm_wait_stream(c, s, 0) == 0);
        CUDA(cudaMemcpy(host, out, bytes * (size_t)c->n_ranks, cudaMemcpyDeviceToHost));
        for (int r = 0; r < c->n_ranks; r++) {
            fill(mine, N, dt, (uint64_t)k, r);
            CHECK(memcmp((char *)host + (size_t)r * bytes, mine, bytes) == 0);
        }
    }
    return 0;
}

static void gathers_keep_rank_order(void **state)
{
    (void)state;
    run_all(gather_rank);
}

/* ---- small sums: exact bits, and many in a row without the host ---- */

static int small_rank(struct job *j, struct comm *c)
{
    enum { N = 4096, ROUNDS = 3000 };
    static float host[N], want[N], share[N];
    float *dev;
    cudaStream_t s;
    (void)j;
    CUDA(cudaMalloc((void **)&dev, N * sizeof *dev));
    CUDA(cudaStreamCreate(&s));
    CHECK(comm_nccl_use_peer_memory(c, true));
    fill(host, N, DTYPE_F32, 5, c->rank);
    CUDA(cudaMemcpy(dev, host, sizeof host, cudaMemcpyHostToDevice));
    for (int r = 0; r < c->n_ranks; r++) {
        fill(share, N, DTYPE_F32, 5, r);
        for (size_t i = 0; i < N; i++)
            want[i] = r == 0 ? share[i] : want[i] + share[i];
    }
    CHECK(comm_all_reduce_dev(c, dev, N, DTYPE_F32, s) == 0);
    CUDA(cudaMemcpyAsync(host, dev, sizeof host, cudaMemcpyDeviceToHost, s));
    CHECK(comm_wait_stream(c, s, 0) == 0);
    CHECK(memcmp(host, want, sizeof want) == 0); /* rank order */
    /* zeros and one rank's ones, of changing size: stale copies would show */
    for (int k = 0; k < ROUNDS; k++) {
        const size_t n = (size_t)(k * 37 % 1000 + 1) * 4;
        const float one = (float)(k % 7);
        for (size_t i = 0; i < n; i++)
            want[i] = one * (float)c->n_ranks;
        for (size_t i = 0; i < n; i++)
            share[i] = one;
        CUDA(cudaMemcpyAsync(dev, share, n * sizeof *dev, cudaMemcpyHostToDevice, s));
        CHECK(comm_all_reduce_dev(c, dev, n, DTYPE_F32, s) == 0);
        if (k % 50 == 0 || k > ROUNDS - 10) {
            CUDA(cudaMemcpyAsync(host, dev, n * sizeof *dev, cudaMemcpyDeviceToHost, s));
            CHECK(comm_wait_stream(c, s, 0) == 0);
            CHECK(memcmp(host, want, n * sizeof *want) == 0);
        }
    }
    return 0;
}

static void small_sums_are_in_rank_order(void **state)
{
    (void)state;
    run_all(small_rank);
}

/* ---- rows beside the stream ---- */

enum { ROWS = 1000, WIDTH = 512 };

static const struct comm_rows row_shape = {ROWS, WIDTH, DTYPE_BF16};

struct rows_case {
    struct comm *c;
    cudaStream_t s;
    char *dev; /* [ROWS + n_ranks, WIDTH] */
    bool copies;
};

static size_t row_bytes(size_t n)
{
    return n * WIDTH * dtype_bytes(row_shape.dt);
}

/* What rank `from` adds to the part of rank `of`, among n rows. */
static void fill_part(uint16_t *part, uint16_t *all, int32_t n, int from, const struct comm *c,
                      int of)
{
    const size_t first = row_bytes((size_t)(of * comm_part(c, n)));
    fill(all, (size_t)n * WIDTH, row_shape.dt, (uint64_t)n, from);
    memcpy(part, (char *)all + first, row_bytes((size_t)comm_part_rows(c, n, of)));
}

/* The part of the sum that the communicator made, to the rounding of each addition. */
static int check_summed(const struct rows_case *t, const uint16_t *got, int32_t n)
{
    static uint16_t all[ROWS * WIDTH], part[ROWS * WIDTH];
    static double sum[ROWS * WIDTH], size[ROWS * WIDTH];
    const struct comm *c = t->c;
    const size_t len = (size_t)comm_part_rows(c, n, c->rank) * WIDTH;
    memset(sum, 0, sizeof sum);
    memset(size, 0, sizeof size);
    for (int r = 0; r < c->n_ranks; r++) {
        fill_part(part, all, n, r, c, c->rank);
        for (size_t i = 0; i < len; i++) {
            sum[i] += (double)value(part, i, row_shape.dt);
            size[i] += fabs((double)value(part, i, row_shape.dt));
        }
    }
    for (size_t i = 0; i < len; i++)
        CHECK(fabs((double)value(got, i, row_shape.dt) - sum[i]) <=
              size[i] * rounding(row_shape.dt) * (double)(c->n_ranks - 1));
    return 0;
}

/* Its own part where it was, and the others' as they gave them. */
static int check_shares(const struct rows_case *t, const uint16_t *got, int32_t n,
                        const struct comm_shares *shares)
{
    static uint16_t all[ROWS * WIDTH], want[ROWS * WIDTH], share[ROWS * WIDTH];
    const struct comm *c = t->c;
    const size_t bytes = row_bytes((size_t)comm_part_rows(c, n, c->rank));
    CHECK(shares->n == c->n_ranks - 1 && shares->pitch == comm_part(c, n));
    fill_part(want, all, n, c->rank, c, c->rank);
    CHECK(memcmp(got, want, bytes) == 0);
    for (int j = 0; j < shares->n; j++) {
        const char *at = (const char *)shares->rows + row_bytes((size_t)(j * shares->pitch));
        CUDA(cudaMemcpy(share, at, bytes, cudaMemcpyDeviceToHost));
        fill_part(want, all, n, j + (j >= c->rank), c, c->rank);
        CHECK(memcmp(share, want, bytes) == 0);
    }
    return 0;
}

static int scatter_once(const struct rows_case *t, int32_t n)
{
    static uint16_t host[ROWS * WIDTH];
    struct comm *c = t->c;
    const size_t at = row_bytes((size_t)(c->rank * comm_part(c, n)));
    struct comm_shares shares;
    fill(host, (size_t)n * WIDTH, row_shape.dt, (uint64_t)n, c->rank);
    CUDA(cudaMemcpyAsync(t->dev, host, row_bytes((size_t)n), cudaMemcpyHostToDevice, t->s));
    CHECK(comm_scatter_begin(c, t->dev, n, t->s) == 0);
    CHECK(comm_scatter_end(c, t->s, &shares) == 0);
    CHECK(comm_wait_stream(c, t->s, 0) == 0);
    memset(host, 0xff, sizeof host);
    CUDA(cudaMemcpy(host, t->dev + at, row_bytes((size_t)comm_part_rows(c, n, c->rank)),
                    cudaMemcpyDeviceToHost));
    CHECK((shares.n > 0) == t->copies);
    return t->copies ? check_shares(t, host, n, &shares) : check_summed(t, host, n);
}

static int gather_once(const struct rows_case *t, int32_t n)
{
    static uint16_t host[ROWS * WIDTH], all[ROWS * WIDTH], part[ROWS * WIDTH];
    struct comm *c = t->c;
    char *rows = comm_gather_rows(c);
    const size_t pitch = row_bytes((size_t)comm_part(c, n));
    CHECK((uintptr_t)rows % 256 == 0);
    CUDA(cudaMemsetAsync(rows, 0xff, row_bytes((size_t)n), t->s));
    fill_part(part, all, n, c->rank, c, c->rank);
    CUDA(cudaMemcpyAsync(rows + (size_t)c->rank * pitch, part,
                         row_bytes((size_t)comm_part_rows(c, n, c->rank)), cudaMemcpyHostToDevice,
                         t->s));
    CHECK(comm_wait_stream(c, t->s, 0) == 0);
    CHECK(comm_barrier(c) == 0); /* nobody sends before all have cleared */
    CHECK(comm_gather_begin(c, n, t->s) == 0);
    CHECK(comm_gather_end(c, t->s) == 0);
    CHECK(comm_wait_stream(c, t->s, 0) == 0);
    CUDA(cudaMemcpy(host, rows, row_bytes((size_t)n), cudaMemcpyDeviceToHost));
    for (int r = 0; r < c->n_ranks; r++) {
        fill_part(part, all, n, r, c, r);
        CHECK(memcmp((char *)host + (size_t)r * pitch, part,
                     row_bytes((size_t)comm_part_rows(c, n, r))) == 0);
    }
    return 0;
}

/* What a byte of a rank's addends is in a round. */
static int mark_of(int round, int rank)
{
    return (round * 11 + rank * 3) % 251;
}

/* Many rounds without a wait of the host, one rank late by turns: what is read too late or sent too
 * early would show. What a rank makes of its part is the share of the first other rank. */
static int rows_in_a_row(const struct rows_case *t)
{
    enum { ROUNDS = 240 };
    struct comm *c = t->c;
    char *log, *host;
    CUDA(cudaMalloc((void **)&log, (size_t)ROUNDS * ROWS));
    CUDA(cudaMallocHost((void **)&host, (size_t)ROUNDS * ROWS));
    for (int round = 0; round < ROUNDS; round++) {
        const int32_t n = ROWS - round % 7 * 13;
        const size_t part = row_bytes((size_t)comm_part(c, n));
        struct comm_shares shares;
        if (round % 16 == c->rank)
            usleep(3000);
        CUDA(cudaMemsetAsync(t->dev, mark_of(round, c->rank), row_bytes((size_t)n), t->s));
        CHECK(comm_scatter_begin(c, t->dev, n, t->s) == 0);
        CHECK(comm_scatter_end(c, t->s, &shares) == 0);
        char *rows = comm_gather_rows(c);
        CUDA(cudaMemcpyAsync(rows + (size_t)c->rank * part, shares.rows,
                             row_bytes((size_t)comm_part_rows(c, n, c->rank)),
                             cudaMemcpyDeviceToDevice, t->s));
        CHECK(comm_gather_begin(c, n, t->s) == 0);
        CHECK(comm_gather_end(c, t->s) == 0);
        /* the last byte of every row */
        CUDA(cudaMemcpy2DAsync(log + (size_t)round * ROWS, 1, rows + row_bytes(1) - 1, row_bytes(1),
                               1, (size_t)n, cudaMemcpyDeviceToDevice, t->s));
    }
    CHECK(comm_wait_stream(c, t->s, 0) == 0);
    CUDA(cudaMemcpy(host, log, (size_t)ROUNDS * ROWS, cudaMemcpyDeviceToHost));
    for (int round = 0; round < ROUNDS; round++) {
        const int32_t n = ROWS - round % 7 * 13;
        for (int32_t row = 0; row < n; row++)
            CHECK((unsigned char)host[round * ROWS + row] ==
                  mark_of(round, row / comm_part(c, n) == 0 ? 1 : 0));
    }
    return 0;
}

static int beside_rank(struct job *j, struct comm *c)
{
    static const int32_t rows[] = {1, 2, 7, 64, 513, ROWS - 1, ROWS};
    struct rows_case t = {.c = c};
    struct err_msg why = {""};
    (void)j;
    CUDA(cudaMalloc((void **)&t.dev, row_bytes((size_t)(ROWS + c->n_ranks))));
    CUDA(cudaStreamCreateWithFlags(&t.s, cudaStreamNonBlocking));
    CHECK(!comm_overlaps(c));
    CHECK(comm_reserve_rows(c, &row_shape, &why) == 0);
    for (enum comm_overlap way = COMM_OVERLAP_COPY; way <= COMM_OVERLAP_SUMS; way++) {
        comm_set_overlap(c, way);
        CHECK(comm_overlaps(c));
        t.copies = way == COMM_OVERLAP_COPY; /* GPUs of one host: otherwise not tested at all */
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
            CHECK(scatter_once(&t, rows[i]) == 0);
            CHECK(gather_once(&t, rows[i]) == 0);
        }
        if (t.copies)
            CHECK(rows_in_a_row(&t) == 0);
    }
    comm_set_overlap(c, COMM_OVERLAP_NONE);
    CHECK(!comm_overlaps(c));
    return 0;
}

static void rows_go_beside_the_stream(void **state)
{
    (void)state;
    run_all(beside_rank);
}

/* ---- graphs ---- */

enum { GRAPH_SMALL = 8192, GRAPH_BIG = MAX_N };

/* dst = sum of src, in place in dst; small and big, and a gather of the small one. */
static int record(struct comm *c, float *dst, const float *src, float *all, cudaStream_t s)
{
    CUDA(cudaMemcpyAsync(dst, src, GRAPH_BIG * sizeof *dst, cudaMemcpyDeviceToDevice, s));
    CHECK(comm_all_reduce_dev(c, dst, GRAPH_BIG, DTYPE_F32, s) == 0);
    CUDA(cudaMemcpyAsync(dst, src, GRAPH_SMALL * sizeof *dst, cudaMemcpyDeviceToDevice, s));
    for (int k = 0; k < 3; k++) /* the third sum is n_ranks^2 times the first */
        CHECK(comm_all_reduce_dev(c, dst, GRAPH_SMALL, DTYPE_F32, s) == 0);
    CHECK(comm_all_gather_dev(c, all, src, GRAPH_SMALL, DTYPE_F32, s) == 0);
    return 0;
}

static int graph_rank(struct job *j, struct comm *c)
{
    static float host[GRAPH_BIG], all_host[MAX_RANKS * GRAPH_SMALL];
    float *dst, *src, *all;
    cudaStream_t s;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    (void)j;
    CUDA(cudaMalloc((void **)&dst, sizeof host));
    CUDA(cudaMalloc((void **)&src, sizeof host));
    CUDA(cudaMalloc((void **)&all, sizeof all_host));
    CUDA(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    CHECK(record(c, dst, src, all, s) == 0);
    CUDA(cudaStreamEndCapture(s, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    const float n = (float)c->n_ranks;
    for (int k = 0; k < 20; k++) {
        for (size_t i = 0; i < GRAPH_BIG; i++)
            host[i] = (float)(k + 1); /* small integers: exact in any order */
        CUDA(cudaMemcpyAsync(src, host, sizeof host, cudaMemcpyHostToDevice, s));
        CUDA(cudaGraphLaunch(exec, s));
        if (k % 3 == 0) /* eager calls between replays keep the count */
            CHECK(comm_all_reduce_dev(c, src, GRAPH_SMALL, DTYPE_F32, s) == 0);
        CHECK(comm_wait_stream(c, s, 0) == 0);
        CUDA(cudaMemcpy(host, dst, sizeof host, cudaMemcpyDeviceToHost));
        CUDA(cudaMemcpy(all_host, all, sizeof *all * GRAPH_SMALL * (size_t)c->n_ranks,
                        cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < GRAPH_BIG; i++)
            CHECK(host[i] == (float)(k + 1) * (i < GRAPH_SMALL ? n * n * n : n));
        for (size_t i = 0; i < (size_t)c->n_ranks * GRAPH_SMALL; i++)
            CHECK(all_host[i] == (float)(k + 1));
    }
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    return 0;
}

static void graphs_replay(void **state)
{
    (void)state;
    run_all(graph_rank);
}

/* ---- failures ---- */

static int scatter_and_gather(struct comm *c, float *dev, int32_t n, cudaStream_t s)
{
    struct comm_shares shares;
    TRY(comm_scatter_begin(c, dev, n, s));
    TRY(comm_scatter_end(c, s, &shares));
    TRY(comm_gather_begin(c, n, s));
    return comm_gather_end(c, s);
}

static int reduce_until_failure(struct job *j, struct comm *c)
{
    float *dev;
    cudaStream_t s;
    int err = 0;
    const struct comm_rows rows = {(int32_t)(j->n / WIDTH), WIDTH, DTYPE_F32};
    CUDA(cudaMalloc((void **)&dev, (j->n + MAX_RANKS * WIDTH) * sizeof *dev));
    CUDA(cudaMemset(dev, 0, j->n * sizeof *dev));
    CUDA(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    if (j->beside)
        CHECK(comm_reserve_rows(c, &rows, NULL) == 0);
    if (write(j->pipe[1], "x", 1) != 1)
        return 3;
    while (err == 0) {
        for (int k = 0; k < 8 && err == 0; k++)
            err = j->beside ? scatter_and_gather(c, dev, rows.max, s)
                            : comm_all_reduce_dev(c, dev, j->n, DTYPE_F32, s);
        if (err == 0)
            err = comm_wait_stream(c, s, j->timeout_ms);
    }
    CHECK(err == ERR_PEER);
    CHECK(comm_all_reduce_dev(c, dev, j->n, DTYPE_F32, s) == ERR_PEER);
    CHECK(comm_wait_stream(c, s, 1) == ERR_PEER);
    CHECK(comm_poll(c) == ERR_PEER);
    CHECK(comm_barrier(c) == ERR_PEER);
    return 0;
}

/* Signals the last rank in mid-collective; the seconds until all others have given up and ended. */
static double lose(size_t n, bool beside, int sig, int64_t timeout_ms)
{
    struct job j = {.n_ranks = n_devices() < MAX_RANKS ? n_devices() : MAX_RANKS,
                    .n = n,
                    .beside = beside,
                    .timeout_ms = timeout_ms,
                    .run = reduce_until_failure};
    const int victim = j.n_ranks - 1;
    const struct timespec in_the_middle = {0, 200000000};
    char byte;
    int status;
    job_start(&j);
    for (int r = 0; r < j.n_ranks; r++)
        assert_int_equal(read(j.pipe[0], &byte, 1), 1);
    (void)nanosleep(&in_the_middle, NULL);
    int64_t start = clock_monotonic_us(NULL);
    assert_int_equal(kill(j.pids[victim], sig), 0);
    for (int r = 0; r < victim; r++)
        assert_ended_well(&j, r);
    double seconds = (double)(clock_monotonic_us(NULL) - start) * 1e-6;
    (void)kill(j.pids[victim], SIGKILL);
    assert_int_equal(waitpid(j.pids[victim], &status, 0), j.pids[victim]);
    job_end(&j);
    printf("# signal %d, %zu floats%s: the others ended after %.2f s\n", sig, n,
           beside ? " beside the stream" : "", seconds);
    return seconds;
}

static const struct {
    size_t n;
    bool beside;
} lose_cases[] = {{4096, false}, {MAX_N, false}, {MAX_N, true}};
enum { N_LOSE = sizeof lose_cases / sizeof *lose_cases };

static void a_killed_rank_fails_the_others(void **state)
{
    (void)state;
    for (int i = 0; i < N_LOSE; i++)
        assert_true(lose(lose_cases[i].n, lose_cases[i].beside, SIGKILL, TIMEOUT_MS) < 5.0);
}

static void a_stopped_rank_fails_the_others(void **state)
{
    (void)state;
    for (int i = 0; i < N_LOSE; i++)
        assert_true(lose(lose_cases[i].n, lose_cases[i].beside, SIGSTOP, SHORT_MS) <
                    SHORT_MS * 1e-3 + 5.0);
}

/* An abort from another place than the collectives, as the leader's loop thread does. */
static int abort_rank(struct job *j, struct comm *c)
{
    float *dev;
    cudaStream_t s;
    (void)j;
    CUDA(cudaMalloc((void **)&dev, MAX_N * sizeof *dev));
    CUDA(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    int64_t start = clock_monotonic_us(NULL);
    if (c->rank == 0) {
        comm_abort(c);
        comm_abort(c);
        CHECK(comm_all_reduce_dev(c, dev, 8, DTYPE_F32, s) == ERR_PEER);
    } else {
        int err = comm_all_reduce_dev(c, dev, 4096, DTYPE_F32, s); /* waits for rank 0 on the GPU */
        CHECK(err == 0 || err == ERR_PEER);
        CHECK(comm_wait_stream(c, s, TIMEOUT_MS) == ERR_PEER);
    }
    CHECK(clock_monotonic_us(NULL) - start < 5000000);
    return 0;
}

static void abort_wakes_everybody(void **state)
{
    (void)state;
    run_all(abort_rank);
}

/* An argument is a pattern of the tests to run. */
int main(int argc, char **argv)
{
    if (n_devices() < 2) {
        (void)printf("fewer than two GPUs\n");
        return 77;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sums_match_the_host),
        cmocka_unit_test(gathers_keep_rank_order),
        cmocka_unit_test(small_sums_are_in_rank_order),
        cmocka_unit_test(rows_go_beside_the_stream),
        cmocka_unit_test(graphs_replay),
        cmocka_unit_test(a_killed_rank_fails_the_others),
        cmocka_unit_test(a_stopped_rank_fails_the_others),
        cmocka_unit_test(abort_wakes_everybody),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
