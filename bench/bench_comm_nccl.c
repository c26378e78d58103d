/* Sums of device memory between the GPUs of this host, one process each: over peer memory and over
 * NCCL, as eager calls and replayed from a graph, by size, as CSV.
 *   bench_comm_nccl [ranks, default 2] [reps, default 30]
 * A rep is a group of calls on one stream between two events, all ranks starting from a barrier;
 * bus_gb_s is bytes * 2 (ranks - 1) / ranks / time, as nccl-tests count it. The sum is checked
 * before timing. */
#include "core/clock.h"
#include "core/mem.h"
#include "parallel/comm_nccl.h"

#include <cuda_runtime_api.h>

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_REPS = 200, WARM_UP = 3, MAX_BYTES = 128 << 20, SMALL_BYTES = 1 << 20 };

struct bench {
    struct comm *comm;
    uint16_t *buf; /* bf16 on the device */
    cudaStream_t stream;
    cudaEvent_t begin, end;
    int reps;
    double us[MAX_REPS];
};

#define CUDA(call)                                                                                 \
    do {                                                                                           \
        cudaError_t cuda_err = (call);                                                             \
        if (cuda_err != cudaSuccess) {                                                             \
            (void)fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(cuda_err));                \
            return ERR_CUDA;                                                                       \
        }                                                                                          \
    } while (0)

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(struct bench *b, const char *path, const char *how, size_t bytes)
{
    const double n = b->comm->n_ranks;
    if (b->comm->rank != 0)
        return;
    qsort(b->us, (size_t)b->reps, sizeof b->us[0], by_value);
    double median = b->us[b->reps / 2];
    (void)printf("%s,%s,%d,%zu,%.2f,%.2f,%.1f\n", path, how, b->comm->n_ranks, bytes, median,
                 b->us[b->reps * 9 / 10], (double)bytes * 2 * (n - 1) / n / median * 1e-3);
    (void)fflush(stdout);
}

static int check_sum(struct bench *b, size_t bytes)
{
    const size_t n = bytes / 2;
    const uint16_t one = dtype_f32_bf16(1.0f), want = dtype_f32_bf16((float)b->comm->n_ranks);
    uint16_t *host = mem_alloc(bytes);
    bool right = true;
    for (size_t i = 0; i < n; i++)
        host[i] = one;
    CUDA(cudaMemcpy(b->buf, host, bytes, cudaMemcpyHostToDevice));
    TRY(comm_all_reduce_dev(b->comm, b->buf, n, DTYPE_BF16, b->stream));
    TRY(comm_wait_stream(b->comm, b->stream, 0));
    CUDA(cudaMemcpy(host, b->buf, bytes, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++)
        right = right && host[i] == want;
    mem_free(host);
    CUDA(cudaMemset(b->buf, 0, bytes)); /* stays zero, so the timed sums cannot overflow */
    return right ? 0 : ERR_INTERNAL;
}

static int calls(struct bench *b, size_t bytes, int n)
{
    for (int i = 0; i < n; i++)
        TRY(comm_all_reduce_dev(b->comm, b->buf, bytes / 2, DTYPE_BF16, b->stream));
    return 0;
}

static int time_calls(struct bench *b, size_t bytes, int n, cudaGraphExec_t graph)
{
    for (int i = -WARM_UP; i < b->reps; i++) {
        float ms;
        TRY(comm_barrier(b->comm));
        CUDA(cudaEventRecord(b->begin, b->stream));
        if (graph)
            CUDA(cudaGraphLaunch(graph, b->stream));
        else
            TRY(calls(b, bytes, n));
        CUDA(cudaEventRecord(b->end, b->stream));
        TRY(comm_wait_stream(b->comm, b->stream, 0));
        CUDA(cudaEventElapsedTime(&ms, b->begin, b->end));
        if (i >= 0)
            b->us[i] = (double)ms * 1e3 / n;
    }
    return 0;
}

static int time_graph(struct bench *b, const char *path, size_t bytes, int n)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal));
    TRY(calls(b, bytes, n));
    CUDA(cudaStreamEndCapture(b->stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    TRY(time_calls(b, bytes, n, exec));
    report(b, path, "graph", bytes);
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    return 0;
}

static int time_size(struct bench *b, bool peer, size_t bytes)
{
    const char *path = peer ? "peer" : "nccl";
    const int n = bytes <= SMALL_BYTES ? 50 : 5;
    if (!comm_nccl_use_peer_memory(b->comm, peer) && peer)
        return 0;
    TRY(check_sum(b, bytes));
    TRY(time_calls(b, bytes, n, NULL));
    report(b, path, "eager", bytes);
    return time_graph(b, path, bytes, n);
}

static int run_rank(struct bench *b, const struct comm_shm_config *shm, struct err_msg *why)
{
    struct comm *host = NULL;
    TRY(comm_shm_create(&host, shm, why));
    const struct comm_nccl_config cfg = {
        .host = host, .device = shm->rank, .timeout_ms = 30000, .one_host = true};
    int err = comm_nccl_create(&b->comm, &cfg, why);
    if (err < 0) {
        comm_close(host);
        return err;
    }
    CUDA(cudaMalloc((void **)&b->buf, MAX_BYTES));
    CUDA(cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking));
    CUDA(cudaEventCreate(&b->begin));
    CUDA(cudaEventCreate(&b->end));
    if (shm->rank == 0)
        (void)printf("path,how,ranks,bytes,median_us,p90_us,bus_gb_s\n");
    for (size_t bytes = 8 << 10; bytes <= MAX_BYTES; bytes *= 2) {
        if (bytes <= 512 << 10)
            TRY(time_size(b, true, bytes));
        TRY(time_size(b, false, bytes));
    }
    (void)comm_nccl_use_peer_memory(b->comm, true);
    return 0;
}

static int rank_main(const struct comm_shm_config *shm, int reps)
{
    struct bench *b = mem_zalloc(1, sizeof *b);
    struct err_msg why = {""};
    b->reps = reps;
    int err = run_rank(b, shm, &why);
    if (err < 0)
        (void)fprintf(stderr, "bench_comm_nccl: rank %d: %s\n", shm->rank, err_why(&why, err));
    comm_close(b->comm);
    mem_free(b);
    return err < 0 ? 1 : 0;
}

int main(int argc, char **argv)
{
    char name[64];
    long ranks = argc > 1 ? strtol(argv[1], NULL, 10) : 2;
    long reps = argc > 2 ? strtol(argv[2], NULL, 10) : 30;
    if (ranks < 2 || ranks > 64 || reps < 1 || reps > MAX_REPS ||
        comm_shm_name(name, sizeof name) < 0) {
        (void)fprintf(stderr, "usage: bench_comm_nccl [ranks 2..64] [reps 1..%d]\n", MAX_REPS);
        return 2;
    }
    struct comm_shm_config cfg = {.name = name,
                                  .n_ranks = (int)ranks,
                                  .max_floats = 4096,
                                  .max_msg = 64,
                                  .timeout_ms = 30000};
    int status = 0, end;
    for (int r = 0; r < (int)ranks; r++) {
        pid_t pid = fork();
        if (pid == 0) {
            (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
            cfg.rank = r;
            _exit(rank_main(&cfg, (int)reps));
        }
        if (pid < 0)
            return 1;
    }
    while (wait(&end) > 0)
        status |= end != 0;
    return status;
}
