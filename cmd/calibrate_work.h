/* The stages of sluice-calibrate, in the order they run. */
#ifndef CMD_CALIBRATE_WORK_H
#define CMD_CALIBRATE_WORK_H

#include "calibration/calib_run.h"
#include "calibration/samples.h"
#include "cmd/calibrate_options.h"
#include "cmd/calibrate_report.h"
#include "model/model.h"

/* Everything the program builds, released in one place. */
struct calibrate_work {
    struct calibrate_options o;
    struct samples samples;
    struct samples_split split;
    struct model_info info; /* of the model, once it is open or described */
    uint64_t set;           /* of what the thresholds come from */
    struct dev *dev;
    struct model *model;
    struct calib_run *run;
    struct thresholds *file;   /* of --thresholds, else NULL */
    int32_t n_resumed;         /* samples that an earlier run left */
    struct attn_policy policy; /* the model keeps a pointer into it while it is open */
    float *t;                  /* [n_levels, n_layers, n_heads, n_blocks] */
    int32_t k[CALIBRATE_MAX_LEVELS], n_levels, n_blocks;
    int32_t *head_k;             /* [n_levels, n_layers, n_heads] pages that a head keeps */
    struct calibrate_lost *lost; /* [n_levels]; NULL without --budget */
    float *decode_t;             /* [n_decode, n_layers, n_heads, decode_blocks]; NULL: none */
    int32_t decode_k[CALIBRATE_MAX_LEVELS], n_decode, decode_blocks;
    struct calibrate_density decode[CALIBRATE_MAX_LEVELS]; /* of generated rows */
    struct calibrate_density levels[CALIBRATE_MAX_LEVELS];
    struct calibrate_held_out *held_out;      /* [split.n_held_out] */
    struct attn_counts *heads;                /* [n_levels, n_layers, n_heads] over those */
    struct thresholds_rel rel_128, rel_64;    /* b 0: not calibrated */
    struct thresholds_rel_heads rel_heads[2]; /* of 128 rows, of 64; t NULL: not calibrated */
    float *rel_made[2];                       /* what --rel found, which rel_heads points to then */
    double rel_targets[CALIBRATE_MAX_LEVELS]; /* densities to reach by REL on held-out samples */
    int32_t n_rel_targets;
    struct calibrate_density rel_levels[CALIBRATE_MAX_LEVELS]; /* by those */
    struct calibrate_progress progress;
};

/* Samples and how they are split; the levels. */
MUST_CHECK int calibrate_read(struct calibrate_work *w, struct err_msg *why);
MUST_CHECK int calibrate_open(struct calibrate_work *w, struct err_msg *why);
/* Runs over the calibration samples, then thresholds in w->t and w->policy. */
MUST_CHECK int calibrate_runs(struct calibrate_work *w, struct err_msg *why);
/* Instead, with --budget: each head's own k, in w->head_k and w->t. */
MUST_CHECK int calibrate_budget(struct calibrate_work *w, struct err_msg *why);
/* All heads keep the level's k. */
void calibrate_one_k(struct calibrate_work *w);
/* Predicted density of a level by what its heads keep. */
double calibrate_predicted(const struct calibrate_work *w, int32_t level, int64_t n_tokens);
/* w->policy from w->t. */
void calibrate_set_policy(struct calibrate_work *w);
/* Every held-out sample under every level. */
MUST_CHECK int calibrate_measure(struct calibrate_work *w, struct err_msg *why);
/* calibrate_rel.c: the REL gate's law, and the densities it reaches on held-out samples. */
MUST_CHECK int calibrate_rel(struct calibrate_work *w, struct err_msg *why);
MUST_CHECK int calibrate_measure_rel(struct calibrate_work *w, struct err_msg *why);
/* The last rows of a sample, which stand for generated ones: how many, and where they end. */
struct calibrate_row_span {
    int32_t n_rows, end;
};
struct calibrate_row_span calibrate_row_span(const struct sample *s);
/* calibrate_decode.c: --decode-k, thresholds of generated rows, and what they keep at the ends of
 * held-out samples. */
MUST_CHECK int calibrate_decode(struct calibrate_work *w, struct err_msg *why);
/* Instead of all these: levels and thresholds of the file that --import names. */
MUST_CHECK int calibrate_import(struct calibrate_work *w, struct err_msg *why);
/* Instead of runs: those of the file that --thresholds names, made for the open model; or, where
 * none is open, for the folder's shape and rope. */
MUST_CHECK int calibrate_load(struct calibrate_work *w, struct err_msg *why);
void calibrate_work_free(struct calibrate_work *w); /* accepts zeroed memory */

#endif
