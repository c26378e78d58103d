/* What a calibration has done so far, in a file beside its output: one record a finished sample,
 * appended in order, so that a run that was killed goes on behind the last whole record and ends
 * with the same bytes. Every record carries its hash; what is cut short or damaged at the end is
 * dropped. The file is locked: two runs cannot share it. */
#ifndef CALIBRATION_CALIB_STATE_H
#define CALIBRATION_CALIB_STATE_H

#include "calibration/calibrate.h"

struct calib_state;

/* What must agree for records to mean the same. */
struct calib_state_id {
    uint64_t model, set; /* as in struct thresholds_meta */
    uint64_t policy;     /* hash of the gate that the runs are under; 0: dense */
    char numbers[32];    /* device and number formats, "cpu f32 f32" */
    int32_t gate_rows, n_layers, n_heads, n_blocks, n_levels;
    int32_t k[CALIB_MAX_LEVELS]; /* 0 beyond n_levels */
};

/* Opens or begins the file. ERR_MISMATCH, with the first field that differs, for another
 * calibration's; ERR_FORMAT for a file of another kind. */
MUST_CHECK int calib_state_open(struct calib_state **out, const char *path,
                                const struct calib_state_id *id, struct err_msg *why);
/* The next record's midpoints [n_levels, n_layers, n_heads, n_blocks] and length: 1, or 0 when
 * there is none (any more), after which records may be appended. */
MUST_CHECK int calib_state_next(struct calib_state *s, double *sample, int32_t *n_tokens,
                                struct err_msg *why);
MUST_CHECK int calib_state_append(struct calib_state *s, const double *sample, int32_t n_tokens,
                                  struct err_msg *why);
void calib_state_close(struct calib_state *s); /* accepts NULL; the file stays */

#endif
