/* From page maxima to thresholds. Feed it the maxima of dense runs (model_probe_tiles), layer by
 * layer and chunk by chunk; it keeps two doubles a threshold and forgets the maxima at once.
 *
 * Per sample, layer, query head and full 128-token block i with its A = 2i off-diagonal pages, for
 * every level k in one pass: the threshold is the midpoint of the k-th and (k+1)-th largest page
 * maximum, -inf (dense) where A <= k. Over samples: the arithmetic mean, in double, of those that
 * reach the block; A <= k depends on i and k alone, so a mean never mixes finite and -inf.
 *
 * A block that a sample's end cuts short does not count: the maximum over fewer rows is smaller,
 * and its mean with others would skip too little. Blocks that no sample fills take the last filled
 * block's row, as the kernel does beyond the table.
 *
 * gate_rows 64: each half of a block has its own maxima, chooses among the same A pages, and gives
 * its own midpoint; the block's threshold is the mean of the two, since the kernel looks up
 * T[block] for both halves.
 *
 * gate_rows 1: thresholds for generated rows, which decide alone (calib_rows). What rows inside a
 * prompt see is no measure for them: those that answer look at many more pages. So a sample gives
 * its last rows, of its answer where it has one, and they stand for rows of every block up to
 * theirs: of block i with 2i + 1 of their pages, evenly spread from the first to the last one
 * before their own. That takes page maxima to be alike at any distance, and spares a run for every
 * length. The sample's threshold is the mean of the rows' midpoints; A = 2i + 1.
 *
 * Source: BSFA (arXiv 2512.07011) section 4.2-4.3, and its calibrate.py for the -inf rule. */
#ifndef CALIBRATION_CALIBRATE_H
#define CALIBRATION_CALIBRATE_H

#include "core/err.h"

#include <stdbool.h>
#include <stdint.h>

struct dev;
struct pool;
struct calib;
struct model_tiles;

enum { CALIB_MAX_LEVELS = 64, CALIB_MAX_ROWS = 64 };

struct calib_config {
    int32_t n_layers, n_heads;
    int32_t n_blocks;  /* of the longest sample: full 128-token blocks, at least 1 */
    int32_t gate_rows; /* 128, 64 or, on the CPU, 1 */
    const int32_t *k;  /* [n_levels], positive and increasing; copied */
    int32_t n_levels;
    struct pool *pool; /* works on heads in parallel; may be NULL */
    struct dev *dev;   /* a GPU: maxima stay there and go to calib_tiles_dev; else NULL */
};

/* Pages that a block's row groups choose from. */
static inline int32_t calib_available(int32_t gate_rows, int32_t block)
{
    return 2 * block + (gate_rows == 1);
}
/* First block of which k pages leave a choice. */
static inline int32_t calib_first_gated(int32_t gate_rows, int32_t k)
{
    return (k + 1 + (gate_rows != 1)) / 2;
}

MUST_CHECK int calib_create(struct calib **out, const struct calib_config *cfg,
                            struct err_msg *why);
void calib_destroy(struct calib *c); /* accepts NULL */

/* Maxima of one layer and chunk of the current sample: a model_tile_fn with arg = struct calib *.
 * max [n_heads, n_groups, n_pages], group g covering positions pos + g * gate_rows on; pos is a
 * multiple of 128. A value that is not finite
 * is remembered and fails calib_end_sample. */
void calib_tiles(void *calib, int layer, int32_t pos, int32_t n_tokens, const float *max,
                 int32_t n_groups, int32_t n_pages);
/* The maxima of one layer and of the sample's last n_rows rows, at most CALIB_MAX_ROWS, where
 * gate_rows is 1: max [n_heads, n_rows, n_pages]. A model_tile_fn. */
void calib_rows(void *calib, int layer, int32_t pos, int32_t n_rows, const float *max,
                int32_t n_groups, int32_t n_pages);
/* The same as calib_tiles on the GPU of calib_config.dev: a model_tile_dev_fn with arg = struct
 * calib *, which only enqueues. */
MUST_CHECK int calib_tiles_dev(void *calib, const struct model_tiles *tiles);
bool calib_on_device(const struct calib *c);
/* The current sample had n_tokens tokens, all of whose chunks and layers were fed. ERR_NUMERIC
 * where a maximum was not finite: nothing of the sample counts. */
MUST_CHECK int calib_end_sample(struct calib *c, int32_t n_tokens, struct err_msg *why);
/* The midpoints of the sample that ended last, [n_levels, n_layers, n_heads, n_blocks]: to be kept,
 * or to be written before calib_restore_sample, which counts them as if their maxima were fed. */
double *calib_sample(struct calib *c);
MUST_CHECK int calib_restore_sample(struct calib *c, int32_t n_tokens, struct err_msg *why);
/* Blocks that some sample filled; the rest repeat the last of them. */
int32_t calib_filled_blocks(const struct calib *c);
/* Writes the means to t [n_levels, n_layers, n_heads, n_blocks]. ERR_INVALID when no sample filled
 * a block. */
MUST_CHECK int calib_thresholds(const struct calib *c, float *t, struct err_msg *why);

/* Puts v's descending order right at ranks r - 1 and r for every r in ranks[0, n_ranks)
 * (increasing, less than n): v[r - 1] and v[r] are then the r-th and (r+1)-th largest. v holds no
 * NaN. */
void calib_select(float *v, int32_t n, const int32_t *ranks, int32_t n_ranks);

#endif
