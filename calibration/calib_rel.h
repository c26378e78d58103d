/* The law by which the REL gate's lambda reaches a density: lambda * L = a * exp(b * S), where L is
 * the prompt's length in tokens and S the share of its pages, diagonal ones among all, that the
 * gate skips. Fitted in logarithms to what prompts and their beginnings show at trial lambdas.
 * Lambda is at most 1, where a page is skipped as soon as none of it exceeds what was seen before.
 * Source: BLASST (arXiv 2512.12087); its published calibrator for trials and bounds of S. */
#ifndef CALIBRATION_CALIB_REL_H
#define CALIBRATION_CALIB_REL_H

#include "attention/attention.h"
#include "core/err.h"

#include <stdbool.h>

enum { CALIB_REL_TRIALS = 20 };

struct calib_rel_fit {
    double ln_a, b;
    double r2;       /* share of the variance of ln(lambda * L) that the law explains */
    double min, max; /* S of the points it was fitted to */
    int32_t n_points, gate_rows;
};

struct calib_rel;

void calib_rel_create(struct calib_rel **out, int32_t n_layers, int32_t n_heads);
void calib_rel_destroy(struct calib_rel *r); /* accepts NULL */

/* Increasing ln(lambda), CALIB_REL_TRIALS of them, all below 0. */
const float *calib_rel_trials(void);
/* For model_count_rel: what a dense run counts at all trials. The run is one prompt from its
 * beginning; calib_rel_reached after every chunk says how far it is, and takes points at the end
 * (last) and at lengths that double on the way there. */
const struct attn_rel_counts *calib_rel_counts(struct calib_rel *r);
void calib_rel_reached(struct calib_rel *r, int32_t n_tokens, bool last);
/* The same where a dense run cannot count: the density up to there of a run gated at a trial. */
void calib_rel_gated(struct calib_rel *r, int32_t gate_rows, int32_t trial, double density,
                     int32_t n_tokens, bool last);
/* Mean share skipped by each layer and head at a trial, off the diagonal; NAN where nothing was
 * counted. */
double calib_rel_skipped(const struct calib_rel *r, int32_t gate_rows, int32_t trial, int32_t layer,
                         int32_t head);
/* Least squares over the points with S from 0.1 to 0.9. ERR_INVALID where those are fewer than
 * four, or all alike, or S falls as lambda grows. */
MUST_CHECK int calib_rel_fit(const struct calib_rel *r, int32_t gate_rows,
                             struct calib_rel_fit *fit, struct err_msg *why);

/* ln(lambda) for a density in (0, 1] at n_tokens: at most -1e-4, at least -60; the density that 1
 * reaches is the least there is. */
double calib_rel_ln_lambda(double ln_a, double b, double density, int64_t n_tokens);

#endif
