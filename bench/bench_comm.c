/* Cost of the collectives between processes of this host: median and 90th percentile of one
 * all_reduce by size, of a barrier and of a post that all followers have taken, as CSV.
 *   bench_comm [ranks, default 2] [max_floats, default 65536]
 * bytes_per_s counts the n floats a rank hands in, once. The sum is checked before timing. */
#include "core/clock.h"
#include "core/mem.h"
#include "parallel/comm.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { REPS = 300, WARM_UP = 20, MAX_FLOATS = 1 << 22 };

static const size_t sizes[] = {1, 64, 512, 4096, 1 << 14, 1 << 16, 1 << 18, 1 << 20, MAX_FLOATS};

struct bench {
    struct comm *comm;
    float *buf;
    double us[REPS];
};

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(struct bench *b, const char *what, size_t n)
{
    if (b->comm->rank != 0)
        return;
    qsort(b->us, REPS, sizeof b->us[0], by_value);
    double median = b->us[REPS / 2];
    (void)printf("%s,%d,%zu,%.2f,%.2f,%.3g\n", what, b->comm->n_ranks, n, median,
                 b->us[REPS * 9 / 10], (double)n * sizeof(float) / median * 1e6);
    (void)fflush(stdout);
}

static int check_sum(struct bench *b, size_t n)
{
    const int triangle = b->comm->n_ranks * (b->comm->n_ranks + 1) / 2;
    const float want = (float)triangle;
    for (size_t i = 0; i < n; i++)
        b->buf[i] = (float)(b->comm->rank + 1);
    TRY(comm_all_reduce(b->comm, b->buf, n));
    for (size_t i = 0; i < n; i++) {
        if (b->buf[i] != want)
            return ERR_INTERNAL;
    }
    memset(b->buf, 0, n * sizeof *b->buf); /* stays zero, so the timed sums cannot overflow */
    return 0;
}

static int time_reduce(struct bench *b, size_t n)
{
    TRY(check_sum(b, n));
    for (int i = -WARM_UP; i < REPS; i++) {
        TRY(comm_barrier(b->comm));
        int64_t start = clock_monotonic_us(NULL);
        /* small sizes are below the clock's resolution: time eight and divide */
        for (int k = 0; k < 8; k++)
            TRY(comm_all_reduce(b->comm, b->buf, n));
        if (i >= 0)
            b->us[i] = (double)(clock_monotonic_us(NULL) - start) / 8;
    }
    report(b, "all_reduce", n);
    return 0;
}

static int time_barrier(struct bench *b)
{
    for (int i = 0; i < REPS; i++) {
        int64_t start = clock_monotonic_us(NULL);
        for (int k = 0; k < 64; k++)
            TRY(comm_barrier(b->comm));
        b->us[i] = (double)(clock_monotonic_us(NULL) - start) / 64;
    }
    report(b, "barrier", 0);
    return 0;
}

/* As a step does: the plan goes out, then all meet in a collective. */
static int time_post(struct bench *b)
{
    char msg[4096] = "";
    size_t len;
    for (int i = 0; i < REPS; i++) {
        int64_t start = clock_monotonic_us(NULL);
        for (int k = 0; k < 64; k++) {
            if (b->comm->rank == 0)
                TRY(comm_post(b->comm, msg, sizeof msg));
            else
                TRY(comm_wait(b->comm, msg, sizeof msg, &len));
            TRY(comm_barrier(b->comm));
        }
        b->us[i] = (double)(clock_monotonic_us(NULL) - start) / 64;
    }
    report(b, "post_4KiB_and_barrier", 0);
    return 0;
}

static int run_rank(const struct comm_shm_config *cfg)
{
    struct bench *b = mem_zalloc(1, sizeof *b);
    struct err_msg why = {""};
    b->buf = mem_zalloc(MAX_FLOATS, sizeof *b->buf);
    int err = comm_shm_create(&b->comm, cfg, &why);
    if (err == 0 && cfg->rank == 0)
        (void)printf("what,ranks,floats,median_us,p90_us,bytes_per_s\n");
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes && err == 0; i++)
        err = time_reduce(b, sizes[i]);
    if (err == 0)
        err = time_barrier(b);
    if (err == 0)
        err = time_post(b);
    if (err < 0)
        (void)fprintf(stderr, "bench_comm: rank %d: %s\n", cfg->rank, err_why(&why, err));
    comm_close(b->comm);
    mem_free(b->buf);
    mem_free(b);
    return err < 0 ? 1 : 0;
}

int main(int argc, char **argv)
{
    char name[64];
    long ranks = argc > 1 ? strtol(argv[1], NULL, 10) : 2;
    long piece = argc > 2 ? strtol(argv[2], NULL, 10) : 1 << 16;
    if (ranks < 1 || ranks > 64 || piece < 1 || comm_shm_name(name, sizeof name) < 0) {
        (void)fprintf(stderr, "usage: bench_comm [ranks 1..64] [max_floats]\n");
        return 2;
    }
    struct comm_shm_config cfg = {.name = name,
                                  .n_ranks = (int)ranks,
                                  .max_floats = (size_t)piece,
                                  .max_msg = 4096,
                                  .timeout_ms = 30000};
    for (int r = 1; r < (int)ranks; r++) {
        pid_t pid = fork();
        if (pid == 0) {
            (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
            cfg.rank = r;
            _exit(run_rank(&cfg));
        }
        if (pid < 0) {
            (void)fprintf(stderr, "bench_comm: cannot fork\n");
            return 1;
        }
    }
    int status = run_rank(&cfg);
    while (wait(NULL) > 0) {
    }
    return status;
}
