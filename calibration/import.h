/* Thresholds of the reference implementation: the `.pt` files that its calibrate.py writes, a dict
 * with `thresholds` [S, L, H, NB], `k_values` [S], `q_block_size` and `k_block_size`. What is kept
 * and what differs stands in README.md. The file names no model: that its thresholds belong to the
 * one they are bound to is the caller's word, and only shapes can be checked. Every error names the
 * file and the field.
 * Source: Danielohayon/Block-Sparse-Flash-Attention c3ee81e, thresholds/calibrate.py. */
#ifndef CALIBRATION_IMPORT_H
#define CALIBRATION_IMPORT_H

#include "core/err.h"

#include <stddef.h>
#include <stdint.h>

enum { IMPORT_MAX_LEVELS = 64 };

struct thresholds_import {
    float *t; /* [n_levels, n_layers, n_heads, n_blocks], as struct attn_thresholds wants them */
    int32_t k[IMPORT_MAX_LEVELS]; /* increasing */
    int32_t n_levels, n_layers, n_heads, n_blocks;
    uint64_t set;      /* hash of the thresholds, in place of the calibration set's */
    int64_t n_dense;   /* -inf where k leaves a choice: positions that no sample reached */
    int64_t n_limited; /* above -inf where k keeps all pages: the file counts k otherwise */
};

MUST_CHECK int thresholds_import(struct thresholds_import *out, const char *path, int32_t n_layers,
                                 int32_t n_heads, struct err_msg *why);
/* From memory, for tests and fuzzing; `name` stands for the file in messages. */
MUST_CHECK int thresholds_import_parse(struct thresholds_import *out, const void *data, size_t len,
                                       const char *name, int32_t n_layers, int32_t n_heads,
                                       struct err_msg *why);
void thresholds_import_free(struct thresholds_import *t); /* accepts zeroed memory */

#endif
