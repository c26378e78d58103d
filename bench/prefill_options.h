/* bench_prefill's options, and the lists in them as numbers. */
#ifndef BENCH_PREFILL_OPTIONS_H
#define BENCH_PREFILL_OPTIONS_H

#include "core/err.h"
#include "model/batch.h"
#include "parallel/comm.h"

#include <stdbool.h>
#include <stdint.h>

enum { PREFILL_MAX_TPS = 8, PREFILL_MAX_PROMPTS = 16, PREFILL_MAX_MODES = 16 };

/* The page policy of a whole prompt. */
struct prefill_mode {
    char name[32]; /* "dense", "k=32", "density=0.25", "rel=0.01" */
    enum batch_gate gate;
    int32_t k;       /* ABS */
    double density;  /* ABS: instead of k, the level that is measured to keep so many; else 0 */
    float ln_lambda; /* REL */
    bool lost_mass;  /* measured */
    bool all_rows;   /* batch.h */
};

struct prefill_options {
    char *model, *device, *thresholds, *tp, *prompt, *k, *density, *lambda, *sums, *shm;
    bool random_weights, force_thresholds, lost_mass, all_rows, quick, json, verbose;
    int64_t chunk, reps, threads, rank; /* chunk: prefill_chunk */
    double steer;                       /* attn_steer.h; 0: thresholds alone */

    /* what the texts say */
    int32_t tps[PREFILL_MAX_TPS], prompts[PREFILL_MAX_PROMPTS];
    struct prefill_mode modes[PREFILL_MAX_MODES]; /* dense first */
    enum comm_overlap overlap;
    int n_tps, n_prompts, n_modes;
    int32_t longest; /* of the prompts */
};

/* 0; 1 when there is nothing to do but exit with 0 (--help); else an error. o is zeroed before;
 * free with prefill_options_free whatever is returned. */
MUST_CHECK int prefill_options_read(struct prefill_options *o, int argc, char **argv,
                                    struct err_msg *why);
void prefill_options_free(struct prefill_options *o);

/* Tokens a step over tp ranks: with 0 as many for each rank, so that its parts of the products do
 * not become small. */
static inline int32_t prefill_chunk(const struct prefill_options *o, int32_t tp)
{
    return o->chunk ? (int32_t)o->chunk : 8192 * tp;
}

#endif
