/* --rel: how the REL gate's lambda reaches a density, from some of the calibration samples, and
 * what it then reaches on the held-out ones. */
#include "calibration/calib_rel.h"

#include "cmd/calibrate_work.h"
#include "core/mem.h"

/* Sample i of n, evenly spread over those that calibrate. */
static const struct sample *chosen(const struct calibrate_work *w, int64_t i, int64_t n)
{
    return &w->samples.items[w->split.calibrate[i * w->split.n_calibrate / n]];
}

/* The densities of heads at the trials, of which there are several where there is a fit. */
static void keep_heads(struct calibrate_work *w, const struct calib_rel *rel)
{
    const size_t n = (size_t)w->info.n_layers * (size_t)w->info.n_heads;
    for (int i = 0; i < 2; i++) {
        w->rel_made[i] = mem_alloc(CALIB_REL_STEPS * n * sizeof *w->rel_made[i]);
        const int32_t n_steps = calib_rel_steps(rel, i == 0 ? 128 : 64, w->rel_made[i]);
        w->rel_heads[i] = (struct thresholds_rel_heads){w->rel_made[i], n_steps};
        ASSERT(n_steps > 1);
    }
}

int calibrate_rel(struct calibrate_work *w, struct err_msg *why)
{
    const int64_t n = w->o.rel < w->split.n_calibrate ? w->o.rel : (int64_t)w->split.n_calibrate;
    struct calib_rel *rel = NULL;
    int64_t tokens = 0;
    int err = 0;
    for (int64_t i = 0; i < n; i++)
        tokens += chosen(w, i, n)->n_tokens;
    calib_rel_create(&rel, w->info.n_layers, w->info.n_heads);
    calibrate_progress_begin(&w->progress, "REL gate:", tokens * calib_run_rel_runs());
    for (int64_t i = 0; err == 0 && i < n; i++) {
        const struct sample *s = chosen(w, i, n);
        struct err_msg cause = {""};
        err = calib_run_rel(w->run, rel, s->tokens, s->n_tokens, &cause);
        if (err < 0)
            err = err_set(why, err, "%s:%d: %s", w->o.samples, s->line, err_why(&cause, err));
    }
    if (err == 0)
        err = calib_rel_fit(rel, 128, &w->rel_128, why);
    if (err == 0)
        err = calib_rel_fit(rel, 64, &w->rel_64, why);
    if (err == 0)
        keep_heads(w, rel);
    calibrate_progress_end(&w->progress);
    calib_rel_destroy(rel);
    return err;
}

static int measure_one(struct calibrate_work *w, int32_t target, int32_t i, struct err_msg *why)
{
    const struct sample *s = &w->samples.items[w->split.held_out[i]];
    const double wanted = w->rel_targets[target];
    const bool whole = w->o.auto_rows == 0;
    struct batch_policy policy = {.gate = BATCH_REL,
                                  .gate_rows = whole ? 128 : 64,
                                  .ln_lambda = (float)thresholds_rel_ln_lambda(
                                      whole ? &w->rel_128 : &w->rel_64, wanted, s->n_tokens)};
    struct batch_counts counts;
    policy.steer = (float)w->o.steer;
    if (w->o.steer > 0 && !thresholds_rel_steer(whole ? &w->policy.rel_128 : &w->policy.rel_64,
                                                wanted, s->n_tokens, &policy))
        policy.steer = 0;
    int err = calib_run_prompt(w->run, s->tokens, s->n_tokens, policy, &counts);
    if (err < 0)
        return err_set(why, err, "%s:%d: gated run: %s", w->o.samples, s->line, err_str(err));
    calibrate_density_add(&w->rel_levels[target], wanted,
                          (double)counts.kept / (double)counts.reachable);
    return 0;
}

int calibrate_measure_rel(struct calibrate_work *w, struct err_msg *why)
{
    if (w->n_rel_targets > 0 && !(w->rel_64.b > 0))
        return err_set(why, ERR_CONFIG,
                       "--rel-density: needs --rel, or a file of --thresholds with it");
    if (w->n_rel_targets > 0) {
        w->policy.rel_128 =
            thresholds_rel_heads_view(&w->rel_heads[0], w->info.n_layers, w->info.n_heads);
        w->policy.rel_64 =
            thresholds_rel_heads_view(&w->rel_heads[1], w->info.n_layers, w->info.n_heads);
        TRY(model_set_policy(w->model, &w->policy, why));
    }
    calibrate_progress_begin(&w->progress, "held-out runs:",
                             samples_tokens(&w->samples, w->split.held_out, w->split.n_held_out) *
                                 w->n_rel_targets);
    for (int32_t t = 0; t < w->n_rel_targets; t++) {
        for (int32_t i = 0; i < w->split.n_held_out; i++)
            TRY(measure_one(w, t, i, why));
    }
    calibrate_progress_end(&w->progress);
    return 0;
}
