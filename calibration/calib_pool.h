/* Thresholds that keep a share of all samples' pages together, where calibrate.h's keep it of each
 * sample on average of thresholds: T of level k, layer, head and block is where the samples that
 * fill the block keep k pages each on average, so that the predicted density is met over the pool,
 * however much the samples differ. A sample's maxima are known by their values at a grid of ranks
 * (calib_pool_grid), up to CALIB_MAX_LEVELS of them, and taken as linear in between: that is what
 * is kept, 4 bytes a rank, block, head, layer and sample. */
#ifndef CALIBRATION_CALIB_POOL_H
#define CALIBRATION_CALIB_POOL_H

#include "calibration/calibrate.h"

struct calib_pool;

/* The ranks to calibrate, increasing, with those of k [n] among them: cfg.k of the calibration that
 * feeds the pool. Denser at its beginning, and up to the pages of n_blocks blocks. Returns how many
 * there are. */
int32_t calib_pool_grid(int32_t grid[CALIB_MAX_LEVELS], const int32_t *k, int32_t n,
                        int32_t n_blocks);
/* cfg: the feeding calibration's; copied but for cfg->pool. */
MUST_CHECK int calib_pool_create(struct calib_pool **out, const struct calib_config *cfg,
                                 int32_t max_samples, struct err_msg *why);
void calib_pool_destroy(struct calib_pool *p); /* accepts NULL */
/* calib_sample of a sample that ended. */
MUST_CHECK int calib_pool_add(struct calib_pool *p, const double *sample, int32_t n_tokens);
/* Thresholds of levels k [n] to t [n, n_layers, n_heads, n_blocks], as calib_thresholds has them.
 * ERR_INVALID when no sample filled a block. */
MUST_CHECK int calib_pool_thresholds(const struct calib_pool *p, const int32_t *k, int32_t n,
                                     float *t, struct err_msg *why);

/* Makes each row of t [n_rows, n_blocks] grow along position, as thresholds of one k do where more
 * blocks can be chosen from: the nearest such row in squares, over the blocks from `first` on. */
void calib_smooth(float *t, int64_t n_rows, int32_t n_blocks, int32_t first);

#endif
