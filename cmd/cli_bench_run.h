/* Drives one load against a daemon: sends each request when it is due, over a few connections, and
 * measures. One thread and poll(2), so that the client costs little beside the daemon it measures.
 */
#ifndef CMD_CLI_BENCH_RUN_H
#define CMD_CLI_BENCH_RUN_H

#include "cmd/cli.h"
#include "cmd/cli_load.h"
#include "cmd/cli_report.h"

/* What a run's requests are and what becomes of their answers, where the load does not say. */
struct bench_hooks {
    void *ctx;
    /* Points r at the input_len tokens of request i; NULL: load_tokens writes them. */
    void (*prompt)(void *ctx, int32_t i, struct sluice_request *r);
    void (*tokens)(void *ctx, int32_t i, const int32_t *ids, int32_t n); /* or NULL */
};

struct bench_plan {
    const struct cli_target *target;
    const struct load *load;
    struct sluice_request request; /* sampling and sparse mode of all; id, tokens and max_tokens are
                                      set for each */
    int32_t n_connections;
    int32_t max_concurrency; /* 0: no limit */
    bool progress;           /* a live line on stderr */
    const char *label;       /* its beginning; NULL: none */
    struct bench_hooks hooks;
};

/* Fills samples [n_requests] and the run's length. Returns an exit code; lost connections and
 * failed requests are failures in the samples, not of the run. */
int bench_run(const struct bench_plan *plan, struct bench_sample *samples, double *duration_s);
void bench_samples_free(struct bench_sample *samples, int32_t n);

#endif
