/* One prompt from its first token to the next after its last: bench_prefill's unit of work. */
#ifndef BENCH_PREFILL_PASS_H
#define BENCH_PREFILL_PASS_H

#include "bench/prefill_options.h"
#include "calibration/thresholds.h"
#include "model/model.h"

/* What passes run on, and where they show how far they are. Zeroed, then the public fields. */
struct prefill_runner {
    struct model *model;
    const struct thresholds *thresholds; /* NULL: no ABS */
    const int32_t *tokens, *pages;       /* enough for the longest prompt */
    int32_t chunk;
    double steer;    /* of ABS */
    bool all_rows;   /* batch.h */
    bool terminal;   /* a line on stderr */
    char title[128]; /* of that line */

    int64_t shown_us; /* private from here */
    struct batch_token token;
    struct batch_counts counts;
};

/* Sums over the steps of a pass; rank 0's times. */
struct prefill_pass {
    int64_t total_us, attention_us, gemm_us, comm_us;
    uint64_t reachable, kept, sampled;
    double lost;   /* mass, over the sampled */
    int32_t token; /* the greedy one after the prompt */
};

/* The policy of a mode for a prompt. level: of the file, for modes that are found by their density;
 * any other mode knows its own. */
MUST_CHECK int prefill_policy(const struct prefill_runner *r, struct batch_policy *out,
                              const struct prefill_mode *mode, int level, int32_t n_prompt,
                              struct err_msg *why);
MUST_CHECK int prefill_run(struct prefill_runner *r, struct prefill_pass *out, int32_t n_prompt,
                           const struct batch_policy *policy);
double prefill_density(const struct prefill_pass *p);
/* The level of the file whose density on such a prompt comes nearest: higher levels keep more, so
 * it is found by halving, a pass each. */
MUST_CHECK int prefill_find_level(struct prefill_runner *r, int *level, double density,
                                  int32_t n_prompt);
/* Erases the line. */
void prefill_clear(const struct prefill_runner *r);

#endif
