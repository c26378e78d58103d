/* How many pages each head keeps under one budget, so that the softmax mass lost is least. For
 * every layer and head: the mass that a row loses, on average over samples, blocks and rows, when
 * its row group keeps the k pages with the largest maxima before its block, for a grid of
 * candidates k; then pages go one step of the grid at a time to whichever head loses most mass per
 * page without them, until the mean predicted density over all heads is the budget's. That is the
 * least loss for curves of diminishing returns, and of others for their convex hull. */
#ifndef CALIBRATION_CALIB_MASS_H
#define CALIBRATION_CALIB_MASS_H

#include "calibration/calibrate.h"

struct calib_mass;
struct model_mass;

/* The k that heads choose from, increasing, up to the pages before the last of n_blocks blocks; at
 * least one. Returns how many: cfg.n_levels of the calibration that goes with it. */
int32_t calib_mass_candidates(int32_t k[CALIB_MAX_LEVELS], int32_t n_blocks);
/* cfg->k: the candidates. Copies cfg but for cfg->pool. */
void calib_mass_create(struct calib_mass **out, const struct calib_config *cfg);
void calib_mass_destroy(struct calib_mass *m); /* accepts NULL */

/* One layer and chunk of the current sample; tiles->pos is a multiple of 128. Blocks that the chunk
 * does not fill do not count. */
void calib_mass_tiles(struct calib_mass *m, const struct model_mass *tiles);
/* The current sample's [n_levels, n_layers, n_heads] mass lost, summed over row groups: to be kept
 * before calib_mass_end_sample, or to be written, instead of feeding tiles. */
double *calib_mass_sample(struct calib_mass *m);
/* ERR_NUMERIC where a mass is not finite: nothing of the sample counts. */
MUST_CHECK int calib_mass_end_sample(struct calib_mass *m, int32_t n_tokens, struct err_msg *why);

/* Mean mass that head (layer * n_heads + head) loses with k pages; linear between candidates. */
double calib_mass_lost(const struct calib_mass *m, int32_t head, int32_t k);
/* Candidates for all heads, head_k [n_layers, n_heads], whose mean predicted density at n_tokens is
 * nearest to `density`. Of two budgets the larger gives no head less. */
void calib_mass_choose(const struct calib_mass *m, double density, int64_t n_tokens,
                       int32_t *head_k);

/* The rule on bare numbers: pick [n_rows] of n increasing costs, where row r at cost[j] loses
 * lost[r * n + j], which does not grow with j. The sum of costs is as near to the budget as the
 * step that crosses it leaves a choice. */
void calib_budget(const double *cost, const double *lost, int32_t n_rows, int32_t n, double budget,
                  int32_t *pick);

#endif
