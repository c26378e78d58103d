/* Options of sluice-calibrate. */
#ifndef CMD_CALIBRATE_OPTIONS_H
#define CMD_CALIBRATE_OPTIONS_H

#include "core/conf.h"

enum { CALIBRATE_MAX_LEVELS = 64 };

#define BUDGET_NEEDS_CPU                                                                           \
    "--budget: the softmax mass of pages is counted on the CPU only (--device cpu)"

#define DECODE_NEEDS_CPU                                                                           \
    "--decode-k: maxima of single rows are taken on the CPU only (--device cpu)"

enum calibrate_aggregate { CALIBRATE_MEAN, CALIBRATE_QUANTILE }; /* choices of --aggregate */

struct calibrate_options {
    char *model, *samples, *import, *thresholds, *task, *out, *export, *report, *k, *density,
        *budget, *decode_k, *rel_density, *device;
    int aggregate; /* enum calibrate_aggregate */
    bool smooth, second_pass;
    int64_t rel; /* samples for the REL gate's law; 0: none */
    /* auto is the REL gate at a density or a lambda, of auto_rows; both 0: it is auto_k */
    double auto_density, auto_lambda;
    double steer;  /* of the held-out runs of the REL gate */
    int auto_rows; /* index into the choices 128, 64 */
    int64_t holdout, limit, max_len, threads, chunk, auto_k, auto_min;
    int gate_rows;       /* index into the choices 128, 64 */
    int dtype, kv_dtype; /* index into DEVICE_DTYPES */
    bool random_weights, json;
};

extern const struct conf_program calibrate_program;

/* What the table cannot say: required options, chunk sizes. */
MUST_CHECK int calibrate_options_check(const struct calibrate_options *o, struct err_msg *why);
/* The levels, increasing: --k as given, or one for each --density or --budget at a prompt of
 * n_tokens. */
MUST_CHECK int calibrate_levels(const struct calibrate_options *o, int32_t n_tokens,
                                int32_t k[CALIBRATE_MAX_LEVELS], int32_t *n, struct err_msg *why);
/* The levels of --decode-k, increasing; none without it. */
MUST_CHECK int calibrate_decode_levels(const struct calibrate_options *o,
                                       int32_t k[CALIBRATE_MAX_LEVELS], int32_t *n,
                                       struct err_msg *why);
/* The densities of --rel-density. */
MUST_CHECK int calibrate_rel_targets(const struct calibrate_options *o,
                                     double targets[CALIBRATE_MAX_LEVELS], int32_t *n,
                                     struct err_msg *why);
/* --auto-k is one of the n levels, or none of its own. */
MUST_CHECK int calibrate_check_auto(const struct calibrate_options *o, const int32_t *k, int32_t n,
                                    struct err_msg *why);

static inline int32_t calibrate_gate_rows(const struct calibrate_options *o)
{
    return o->gate_rows == 0 ? 128 : 64;
}

#endif
