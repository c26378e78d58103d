/* One pass of sluice-calibrate over its samples: runs under one policy, and the thresholds that
 * their page maxima give. */
#ifndef CMD_CALIBRATE_PASS_H
#define CMD_CALIBRATE_PASS_H

#include "cmd/calibrate_work.h"

enum { CALIBRATE_PASS_DECODE = CALIBRATE_MAX_LEVELS + 1 }; /* number of the pass of single rows */

struct calibrate_pass {
    const char *phase;          /* shown with the progress */
    int number;                 /* names the state file: 0 is OUT.state, others OUT.state.N */
    struct batch_policy policy; /* of the runs; gate_rows is also that of the maxima. 1: of the rows
                                   that calibrate_row_span names, one by one */
    uint64_t policy_hash;       /* 0: dense */
    const int32_t *k;           /* [n_levels] */
    int32_t n_levels, n_blocks;
    float *t;                /* [n_levels, n_layers, n_heads, n_blocks], written */
    struct calib_mass *mass; /* fed too, where the runs are dense; may be NULL */
};

/* Goes on where an earlier run of the same pass was cut off, if there is --out. */
MUST_CHECK int calibrate_pass_run(struct calibrate_work *w, const struct calibrate_pass *p,
                                  struct err_msg *why);
/* Removes the state of all passes: the output is written. */
void calibrate_forget_state(const struct calibrate_work *w);

#endif
