/* How the REL gate's lambda reaches a density. L is the prompt's length in tokens, S the share of
 * its pages, diagonal ones among all, that the gate skips. Taken from what prompts and their
 * beginnings show at trial lambdas: as the published law lambda * L = a * exp(b * S), fitted in
 * logarithms, and as knots: where the mean curve reaches S = 0.1, 0.2, ..., and how that moves with
 * L. The curve bends where the law is straight, and its length need not enter as a factor. At
 * lambda = 1 a page is skipped as soon as none of it exceeds what was seen before; the trials go on
 * beyond. Source: BLASST (arXiv 2512.12087); its published calibrator for trials up to 1 and bounds
 * of S. */
#ifndef CALIBRATION_CALIB_REL_H
#define CALIBRATION_CALIB_REL_H

#include "attention/attention.h"
#include "calibration/thresholds.h"
#include "core/err.h"

#include <stdbool.h>

enum { CALIB_REL_TRIALS = 26, CALIB_REL_BELOW_1 = 20, CALIB_REL_STEPS = CALIB_REL_TRIALS + 1 };

struct calib_rel;

void calib_rel_create(struct calib_rel **out, int32_t n_layers, int32_t n_heads);
void calib_rel_destroy(struct calib_rel *r); /* accepts NULL */

/* Increasing ln(lambda), CALIB_REL_TRIALS of them, the first CALIB_REL_BELOW_1 below 0. */
const float *calib_rel_trials(void);
/* For model_count_rel: what a dense run counts at the trials below 0, where what is skipped raises
 * no maximum. The run is one prompt from its beginning; calib_rel_reached after every chunk says
 * how far it is, and takes a curve at the end (last) and at lengths that double on the way there.
 */
const struct attn_rel_counts *calib_rel_counts(struct calib_rel *r);
void calib_rel_reached(struct calib_rel *r, int32_t n_tokens, bool last);
/* The same of a trial that no dense run counts: the density up to there of a run gated at it. The
 * runs of a prompt follow each other, the dense one first, and have the same chunks. */
void calib_rel_gated(struct calib_rel *r, int32_t gate_rows, int32_t trial, double density,
                     int32_t n_tokens, bool last);
/* And what its heads [n_layers, n_heads] kept in the whole of such a run; added up over prompts. */
void calib_rel_heads(struct calib_rel *r, int32_t gate_rows, int32_t trial,
                     const struct attn_counts *heads);
/* What heads are steered between (attn_policy.rel_128): the shares of their pages that they keep
 * without a gate and at the trials, into out [at most CALIB_REL_STEPS, n_layers, n_heads]; trials
 * that lower the mean by less than 0.002 are left out. Returns how many. The last layer's, of gated
 * trials, are of the rows that it computes. */
int32_t calib_rel_steps(const struct calib_rel *r, int32_t gate_rows, float *out);
/* Mean share skipped by each layer and head at a trial, off the diagonal; NAN where nothing was
 * counted. */
double calib_rel_skipped(const struct calib_rel *r, int32_t gate_rows, int32_t trial, int32_t layer,
                         int32_t head);
/* The law by least squares over the points with S from 0.1 to 0.9; each knot a line over ln(L),
 * likewise, through prompts and beginnings no shorter than an eighth of the longest, as far as the
 * trials reach.
 * ERR_INVALID where the points are fewer than four, or all alike, or S falls as lambda grows. */
MUST_CHECK int calib_rel_fit(const struct calib_rel *r, int32_t gate_rows,
                             struct thresholds_rel *fit, struct err_msg *why);

#endif
