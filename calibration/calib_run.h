/* Runs samples through a model one at a time, in chunks, with a hand-made page table: the dense
 * runs that calibrate, and the gated runs that measure the density of held-out samples. Needs
 * neither the cache's bookkeeping nor the scheduler. */
#ifndef CALIBRATION_CALIB_RUN_H
#define CALIBRATION_CALIB_RUN_H

#include "calibration/calib_mass.h"
#include "calibration/calib_rel.h"
#include "calibration/calibrate.h"
#include "model/batch.h"
#include "model/model.h"

struct calib_run;

/* For prompts of up to max_tokens tokens in chunks of `chunk` (a multiple of 128, within the
 * model's max_tokens). Takes the model's pages, so once per model. The model must outlive the run.
 */
MUST_CHECK int calib_run_create(struct calib_run **out, struct model *m, int32_t max_tokens,
                                int32_t chunk, struct err_msg *why);
void calib_run_destroy(struct calib_run *r); /* accepts NULL */

/* Called after every chunk; may be NULL. */
void calib_run_on_chunk(struct calib_run *r, void (*fn)(void *arg, int32_t n_tokens), void *arg);
/* One whole prompt as prefill under the policy; counts (may be NULL) receives its pages. */
MUST_CHECK int calib_run_prompt(struct calib_run *r, const int32_t *tokens, int32_t n_tokens,
                                struct batch_policy policy, struct batch_counts *counts);
/* Generated rows at the end of a text: all but its last n_rows (at least one is left) as a dense
 * prompt, then those as one chunk of generated rows under each level of the decode thresholds in
 * turn; counts [n_levels] receives theirs. */
MUST_CHECK int calib_run_generated(struct calib_run *r, const int32_t *tokens, int32_t n_tokens,
                                   int32_t n_rows, int32_t n_levels, struct batch_counts *counts);
/* A dense run whose last n_rows rows' page maxima go into c, one by one (calib_rows). On the CPU.
 */
MUST_CHECK int calib_run_rows(struct calib_run *r, struct calib *c, const int32_t *tokens,
                              int32_t n_tokens, int32_t n_rows, struct err_msg *why);
/* A prompt whose page maxima, over policy.gate_rows rows, go into c. Dense, but for thresholds that
 * are made from what gated layers see. */
MUST_CHECK int calib_run_sample(struct calib_run *r, struct calib *c, struct batch_policy policy,
                                const int32_t *tokens, int32_t n_tokens, struct err_msg *why);
/* A dense run whose page maxima go into c and, with the pages' softmax mass, into mass. On the CPU.
 */
MUST_CHECK int calib_run_mass(struct calib_run *r, struct calib *c, struct calib_mass *mass,
                              int32_t gate_rows, const int32_t *tokens, int32_t n_tokens,
                              struct err_msg *why);
/* A prompt's points for the REL gate's law: one dense run for the trials below 1, which is counted,
 * and one gated run for each other trial and each size of row groups. */
MUST_CHECK int calib_run_rel(struct calib_run *r, struct calib_rel *rel, const int32_t *tokens,
                             int32_t n_tokens, struct err_msg *why);
/* How many runs that is. */
int32_t calib_run_rel_runs(void);

#endif
