/* What sluice-calibrate shows: progress while it works, densities at the end. */
#ifndef CMD_CALIBRATE_REPORT_H
#define CMD_CALIBRATE_REPORT_H

#include "attention/policy.h"
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
double calibrate_density_std(const struct calibrate_density *d);

/* One held-out sample and its density under each level. */
struct calibrate_held_out {
    const char *task; /* "" when it has none */
    int32_t line, n_tokens;
    double pages; /* reachable */
    double density[CALIBRATE_MAX_LEVELS];
};

/* How far a head's density over all held-out samples may be from the level's prediction. */
#define CALIBRATE_TOLERANCE 0.05

/* Softmax mass predicted to be lost on average, by each head's own k and by the level's. */
struct calibrate_lost {
    double own, one;
};

struct calibrate_report {
    const char *model, *out;           /* out NULL: nothing written */
    const char *how;                   /* the thresholds were made: "mean", "quantile, smooth" */
    int32_t n_resumed;                 /* samples that an earlier run left */
    const struct attn_counts *heads;   /* [n_levels, n_layers, n_heads]; NULL: nothing measured */
    const int32_t *head_k;             /* [n_levels, n_layers, n_heads] pages kept */
    const struct calibrate_lost *lost; /* [n_levels]; NULL without --budget */
    const float *t;                    /* [n_levels, n_layers, n_heads, n_blocks] */
    const struct thresholds_meta *meta;
    const struct calibrate_density *levels;
    const struct calibrate_held_out *held_out;
    int32_t n_held_out, n_levels, n_layers, n_heads, n_blocks;
    const struct calibrate_density *rel_levels; /* predicted: what was wanted */
    int32_t n_rel_levels;
    const struct calibrate_density *decode; /* [n_decode] of generated rows */
    int32_t n_decode;
    double seconds;
};

/* Density of a head under a level, over all held-out samples, and its prediction there. */
double calibrate_head_density(const struct calibrate_report *r, int32_t level, int32_t head);
double calibrate_head_predicted(const struct calibrate_report *r, int32_t level, int32_t head);
int32_t calibrate_head_k(const struct calibrate_report *r, int32_t level, int32_t head);
/* Fewest and most pages that a head keeps under a level. */
void calibrate_k_range(const struct calibrate_report *r, int32_t level, int32_t *min, int32_t *max);
/* Heads (layer * n_heads + head) that leave CALIBRATE_TOLERANCE under a level; *worst is one of
 * them, the farthest. */
int32_t calibrate_heads_off(const struct calibrate_report *r, int32_t level, int32_t *worst);

void calibrate_report_text(const struct calibrate_report *r, FILE *to);
/* 0, or -EIO when `to` cannot be written. */
MUST_CHECK int calibrate_report_json(const struct calibrate_report *r, FILE *to);
/* calibrate_report_dir.c: report.md, density.svg, thresholds.svg and k.svg in a folder, which is
 * made. */
MUST_CHECK int calibrate_report_dir(const struct calibrate_report *r, const char *dir,
                                    struct err_msg *why);

#endif
