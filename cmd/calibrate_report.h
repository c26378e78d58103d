/* What sluice-calibrate shows: progress while it works, densities at the end. */
#ifndef CMD_CALIBRATE_REPORT_H
#define CMD_CALIBRATE_REPORT_H

#include "calibration/thresholds.h"
#include "cmd/calibrate_options.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

/* One line rewritten on a terminal, nothing elsewhere. */
struct calibrate_progress {
    FILE *to; /* NULL: silent */
    const char *phase;
    int64_t done, total; /* tokens of the phase */
    int64_t start_us, last_us;
};

void calibrate_progress_begin(struct calibrate_progress *p, const char *phase, int64_t total);
/* For calib_run_on_chunk, with arg = struct calibrate_progress *. */
void calibrate_progress_add(void *progress, int32_t n_tokens);
void calibrate_progress_end(struct calibrate_progress *p);

/* Densities of one level over the held-out samples. */
struct calibrate_density {
    int32_t k;
    int32_t n;        /* samples measured */
    double predicted; /* mean over the samples' lengths */
    double sum, sum_squares, min, max;
};

void calibrate_density_add(struct calibrate_density *d, double predicted, double measured);
double calibrate_density_mean(const struct calibrate_density *d);

/* One held-out sample and its density under each level. */
struct calibrate_held_out {
    const char *task; /* "" when it has none */
    int32_t line, n_tokens;
    double density[CALIBRATE_MAX_LEVELS];
};

struct calibrate_report {
    const char *model, *out; /* out NULL: nothing written */
    const struct thresholds_meta *meta;
    const struct calibrate_density *levels;
    const struct calibrate_held_out *held_out;
    int32_t n_held_out, n_levels, n_layers, n_heads, n_blocks;
    double seconds;
};

void calibrate_report_text(const struct calibrate_report *r, FILE *to);
/* 0, or -EIO when `to` cannot be written. */
MUST_CHECK int calibrate_report_json(const struct calibrate_report *r, FILE *to);

#endif
