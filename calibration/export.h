/* Thresholds for the reference implementation: a `.pt` file with the fields that its calibrate.py
 * writes, in its order, as torch.save would store them, so that torch.load (weights_only too) reads
 * it. import.h reads it back bit for bit. Only thresholds for 128 rows have a meaning there.
 * Source: Danielohayon/Block-Sparse-Flash-Attention c3ee81e, thresholds/calibrate.py. */
#ifndef CALIBRATION_EXPORT_H
#define CALIBRATION_EXPORT_H

#include "attention/policy.h"
#include "core/err.h"

/* t is contiguous; k [t->n_levels], at most IMPORT_MAX_LEVELS. ERR_UNSUPPORTED for gate_rows 64 and
 * for tensors of 2 GiB and more. Written beside its place, then renamed. */
MUST_CHECK int thresholds_export(const char *path, const struct attn_thresholds *t,
                                 const int32_t *k, int32_t gate_rows, struct err_msg *why);

#endif
