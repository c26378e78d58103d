/* The figures of a benchmark: what was measured of each request, and what is printed of all. Names,
 * formulas and JSON keys are those of `vllm bench serve`, so that results can be laid side by side:
 *   TTFT  sent to first token             TPOT  (latency - TTFT) / (output - 1); one token: left
 * out ITL   every gap between two messages  E2EL  sent to end A failed request counts as failed and
 * in nothing else. Waiting in the client (for a free place under --max-concurrency) is in none of
 * these but in the client queue time. Added: measured density and prefix-cache hits. */
#ifndef CMD_CLI_REPORT_H
#define CMD_CLI_REPORT_H

#include "cmd/cli_load.h"
#include "core/err.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

enum { REPORT_MAX_PERCENTILES = 8 };

struct bench_sample {
    bool ok;
    int32_t class; /* load_request.class */
    int32_t input_len, output_len, cached;
    double start_s, ttft_s, latency_s; /* start: since the run began */
    double queue_s;                    /* due to sent */
    double *itls;                      /* [n_itls] seconds; owned */
    int32_t n_itls, cap_itls;
    uint64_t reachable, kept; /* pages */
    uint64_t decode_reachable, decode_kept;
    double lost_mass; /* where the request asked for it */
    double decode_s;  /* first to last token, as the daemon measured */
    int32_t preemptions;
    char error[128]; /* of a failed one */
};

/* Service levels for goodput, in ms; infinite where none is given. */
struct report_slo {
    bool any;
    double ttft_ms, tpot_ms, e2el_ms;
};

struct report_options {
    double duration_s;
    double request_rate;     /* infinite: not printed */
    int32_t max_concurrency; /* 0: not printed */
    struct report_slo slo;
    double percentiles[REPORT_MAX_PERCENTILES];
    int32_t n_percentiles;
    const struct load_class *classes; /* of a mix, whose figures are also told apart */
    int32_t n_classes;                /* 0: no mix */
};

struct report_series {
    double mean, median, std;
    double percentiles[REPORT_MAX_PERCENTILES];
};

enum report_metric { REPORT_TTFT, REPORT_TPOT, REPORT_ITL, REPORT_E2EL, REPORT_QUEUE, REPORT_N };

/* The requests of one class of a mix. */
struct report_class {
    int32_t completed, failed;
    double density;
    struct report_series series[REPORT_N];
};

struct report {
    int32_t completed, failed;
    int64_t total_input, total_output, total_cached;
    double request_throughput, request_goodput, output_throughput, total_token_throughput;
    double peak_output; /* tokens in the fullest second */
    int32_t peak_concurrent;
    struct report_series series[REPORT_N]; /* milliseconds */
    double density;                        /* kept / reachable pages; 1 where nothing was counted */
    int64_t preemptions;
    struct report_class classes[LOAD_MAX_CLASSES]; /* [n_classes of the options] */
};

/* Of values (sorted in place); linear between the two neighbours, as numpy's. 0 when n is 0. */
double report_percentile(double *values, int32_t n, double p);
void report_compute(struct report *out, const struct bench_sample *samples, int32_t n,
                    const struct report_options *o);
void report_print(const struct report *r, const struct report_options *o, FILE *to);
/* All keys, the per-request lists too; under "classes" a mix's, one object each. */
MUST_CHECK int report_write_json(const struct report *r, const struct report_options *o,
                                 const struct bench_sample *samples, int32_t n, const char *path,
                                 struct err_msg *why);

#endif
