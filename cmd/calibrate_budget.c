/* --budget: each head keeps the pages that lose the least softmax mass over all heads, at the mean
 * density that one k for all would have. One dense pass gives the curves of mass and the thresholds
 * of every candidate k; then each head takes its own candidate's row. */
#include "calibration/calib_mass.h"

#include "calibration/thresholds.h"
#include "cmd/calibrate_pass.h"
#include "core/mem.h"

#include <errno.h>
#include <string.h>

/* Thresholds of all candidates, t [n, n_layers, n_heads, n_blocks]. */
struct candidates {
    int32_t k[CALIB_MAX_LEVELS], n;
    float *t;
    struct calib_mass *mass;
};

static int32_t find(const struct candidates *c, int32_t k)
{
    int32_t i = 0;
    while (c->k[i] != k)
        i++;
    return i;
}

/* One level: what its heads keep, their rows of thresholds, and the mass lost. */
static void choose_level(struct calibrate_work *w, const struct candidates *c, int32_t level)
{
    const int32_t heads = w->info.n_layers * w->info.n_heads;
    const int32_t rows = calibrate_gate_rows(&w->o), n_max = w->n_blocks * KV_BLOCK_TOKENS;
    const size_t row = (size_t)w->n_blocks;
    int32_t *head_k = w->head_k + (size_t)level * (size_t)heads;
    float *t = w->t + (size_t)level * (size_t)heads * row;
    struct calibrate_lost *lost = &w->lost[level];
    calib_mass_choose(c->mass, thresholds_predicted_density(w->k[level], n_max, rows), n_max,
                      head_k);
    for (int32_t i = 0; i < heads; i++) {
        const size_t from = (size_t)find(c, head_k[i]) * (size_t)heads + (size_t)i;
        memcpy(t + (size_t)i * row, c->t + from * row, row * sizeof *t);
        lost->own += calib_mass_lost(c->mass, i, head_k[i]) / heads;
        lost->one += calib_mass_lost(c->mass, i, w->k[level]) / heads;
    }
}

static int run(struct calibrate_work *w, struct candidates *c, struct err_msg *why)
{
    const size_t heads = (size_t)w->info.n_layers * (size_t)w->info.n_heads;
    const struct calib_config cfg = {.n_layers = w->info.n_layers,
                                     .n_heads = w->info.n_heads,
                                     .n_blocks = w->n_blocks,
                                     .gate_rows = calibrate_gate_rows(&w->o),
                                     .k = c->k,
                                     .n_levels = c->n,
                                     .pool = w->dev->pool};
    c->t = mem_try_aligned((size_t)c->n * heads * (size_t)w->n_blocks, sizeof *c->t);
    if (!c->t)
        return err_set(why, -ENOMEM, "--budget: no memory for %d candidates", c->n);
    calib_mass_create(&c->mass, &cfg);
    const struct calibrate_pass pass = {
        .phase = "dense runs:",
        .policy = {.gate = BATCH_DENSE, .gate_rows = (uint8_t)cfg.gate_rows},
        .k = c->k,
        .n_levels = c->n,
        .n_blocks = w->n_blocks,
        .t = c->t,
        .mass = c->mass};
    TRY(calibrate_pass_run(w, &pass, why));
    w->t = mem_zalloc((size_t)w->n_levels * heads * (size_t)w->n_blocks, sizeof *w->t);
    w->lost = mem_zalloc((size_t)w->n_levels, sizeof *w->lost);
    calibrate_one_k(w);
    for (int32_t s = 0; s < w->n_levels; s++)
        choose_level(w, c, s);
    calibrate_set_policy(w);
    return 0;
}

int calibrate_budget(struct calibrate_work *w, struct err_msg *why)
{
    struct candidates c = {.t = NULL};
    c.n = calib_mass_candidates(c.k, w->n_blocks);
    int err = run(w, &c, why);
    calib_mass_destroy(c.mass);
    mem_free(c.t);
    return err;
}
