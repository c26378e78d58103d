/* The part of a calibration that lives on a GPU: the current sample's midpoints, which are all that
 * leaves it. calib_device_cuda.c, or calib_device_none.c in builds without CUDA. Internal to
 * calibration/. */
#ifndef CALIBRATION_CALIB_DEVICE_H
#define CALIBRATION_CALIB_DEVICE_H

#include "calibration/calibrate.h"

struct calib_device;

/* cfg->dev is a GPU; cfg->k must outlive it. Takes 8 bytes a threshold. */
MUST_CHECK int calib_device_create(struct calib_device **out, const struct calib_config *cfg,
                                   struct err_msg *why);
void calib_device_destroy(struct calib_device *d); /* accepts NULL */
/* Enqueues the selection of one layer and chunk. */
MUST_CHECK int calib_device_tiles(struct calib_device *d, const struct model_tiles *tiles);
/* Waits; writes the sample's midpoints to t [n_levels, n_layers, n_heads, n_blocks]. NaN where a
 * maximum was not finite; -inf where the level keeps all pages. */
MUST_CHECK int calib_device_fetch(struct calib_device *d, double *t);

#endif
