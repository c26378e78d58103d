#include "cmd/calibrate_pass.h"

#include "calibration/calib_pool.h"
#include "calibration/calib_state.h"
#include "core/mem.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

/* What a pass takes and gives back. */
struct parts {
    int32_t grid[CALIB_MAX_LEVELS]; /* levels of calib: those of the pass, or more for the pool */
    struct calib_config cfg;
    struct calib *calib;
    struct calib_pool *pool;   /* NULL: means */
    struct calib_state *state; /* NULL: nothing is written */
    /* With the pages' mass, what is written of a sample: its midpoints, then the mass lost, as if
     * it were one more block. NULL: the midpoints alone. */
    double *record;
};

static int state_path(char *path, size_t size, const char *out, int number, struct err_msg *why)
{
    int n = number ? snprintf(path, size, "%s.state.%d", out, number)
                   : snprintf(path, size, "%s.state", out);
    return n < 0 || (size_t)n >= size ? err_set(why, -ENAMETOOLONG, "%.200s...: path too long", out)
                                      : 0;
}

static int open_state(struct parts *x, const struct calibrate_work *w,
                      const struct calibrate_pass *p, struct err_msg *why)
{
    char path[PATH_MAX];
    struct calib_state_id id;
    memset(&id, 0, sizeof id); /* padding too: it is written as it is */
    id.model = w->info.fingerprint;
    id.set = w->set;
    id.policy = p->policy_hash;
    (void)snprintf(id.numbers, sizeof id.numbers, "%s %s %s", w->dev->ops->name,
                   dtype_name(w->info.dtype), dtype_name(w->info.kv_dtype));
    id.gate_rows = x->cfg.gate_rows;
    id.n_layers = x->cfg.n_layers;
    id.n_heads = x->cfg.n_heads;
    id.n_blocks = x->cfg.n_blocks + (p->mass ? 1 : 0);
    id.n_levels = x->cfg.n_levels;
    memcpy(id.k, x->grid, (size_t)x->cfg.n_levels * sizeof *id.k);
    TRY(state_path(path, sizeof path, w->o.out, p->number, why));
    return calib_state_open(&x->state, path, &id, why);
}

static size_t n_lost(const struct parts *x)
{
    return (size_t)x->cfg.n_levels * (size_t)x->cfg.n_layers * (size_t)x->cfg.n_heads;
}

static size_t n_midpoints(const struct parts *x)
{
    return n_lost(x) * (size_t)x->cfg.n_blocks;
}

static int open_parts(struct parts *x, struct calibrate_work *w, const struct calibrate_pass *p,
                      struct err_msg *why)
{
    const bool pooled = w->o.aggregate == CALIBRATE_QUANTILE;
    x->cfg = (struct calib_config){.n_layers = w->info.n_layers,
                                   .n_heads = w->info.n_heads,
                                   .n_blocks = p->n_blocks,
                                   .gate_rows = p->policy.gate_rows,
                                   .k = x->grid,
                                   .n_levels = p->n_levels,
                                   .pool = w->dev->pool,
                                   .dev = w->dev->ops == &dev_cpu ? NULL : w->dev};
    if (pooled)
        x->cfg.n_levels = calib_pool_grid(x->grid, p->k, p->n_levels, p->n_blocks);
    else
        memcpy(x->grid, p->k, (size_t)p->n_levels * sizeof *x->grid);
    TRY(calib_create(&x->calib, &x->cfg, why));
    if (p->mass && w->o.out)
        x->record = mem_zalloc(n_midpoints(x) + n_lost(x), sizeof *x->record);
    if (pooled)
        TRY(calib_pool_create(&x->pool, &x->cfg, w->split.n_calibrate, why));
    return w->o.out ? open_state(x, w, p, why) : 0;
}

static void close_parts(struct parts *x)
{
    calib_state_close(x->state);
    calib_pool_destroy(x->pool);
    calib_destroy(x->calib);
    mem_free(x->record);
}

static const struct sample *sample_at(const struct calibrate_work *w, int32_t i)
{
    return &w->samples.items[w->split.calibrate[i]];
}

/* 1 with the sample in calib and mass, or 0 when there is none. */
static int next_record(struct parts *x, const struct calibrate_pass *p, int32_t *n_tokens,
                       struct err_msg *why)
{
    double *sample = calib_sample(x->calib);
    const int found = calib_state_next(x->state, x->record ? x->record : sample, n_tokens, why);
    if (found > 0 && x->record) {
        memcpy(sample, x->record, n_midpoints(x) * sizeof *sample);
        memcpy(calib_mass_sample(p->mass), x->record + n_midpoints(x), n_lost(x) * sizeof *sample);
    }
    return found;
}

static int append_record(struct parts *x, const struct calibrate_pass *p, int32_t n_tokens,
                         struct err_msg *why)
{
    const double *sample = calib_sample(x->calib);
    if (!x->state)
        return 0;
    if (x->record) {
        memcpy(x->record, sample, n_midpoints(x) * sizeof *sample);
        memcpy(x->record + n_midpoints(x), calib_mass_sample(p->mass), n_lost(x) * sizeof *sample);
    }
    return calib_state_append(x->state, x->record ? x->record : sample, n_tokens, why);
}

/* Tokens that a sample's record counts. */
static int32_t length_of(const struct calibrate_pass *p, const struct sample *s)
{
    return p->policy.gate_rows == 1 ? calibrate_row_span(s).end : s->n_tokens;
}

/* Samples that an earlier run left; *n of them. */
static int restore(struct parts *x, struct calibrate_work *w, const struct calibrate_pass *p,
                   int32_t *n, struct err_msg *why)
{
    for (*n = 0; x->state && *n < w->split.n_calibrate; (*n)++) {
        int32_t n_tokens = 0;
        int found = next_record(x, p, &n_tokens, why);
        if (found <= 0)
            return found;
        if (n_tokens != length_of(p, sample_at(w, *n)))
            return err_set(why, ERR_FORMAT, "%s.state: sample %d has %d tokens", w->o.out, *n,
                           n_tokens);
        TRY(calib_restore_sample(x->calib, n_tokens, why));
        if (x->pool)
            TRY(calib_pool_add(x->pool, calib_sample(x->calib), n_tokens));
        if (p->mass)
            TRY(calib_mass_end_sample(p->mass, n_tokens, why));
        calibrate_progress_add(&w->progress, n_tokens);
    }
    return 0;
}

static int run_one(struct parts *x, struct calibrate_work *w, const struct calibrate_pass *p,
                   const struct sample *s, struct err_msg *why)
{
    const struct calibrate_row_span span = calibrate_row_span(s);
    if (p->policy.gate_rows == 1)
        return calib_run_rows(w->run, x->calib, s->tokens, span.end, span.n_rows, why);
    if (p->mass)
        return calib_run_mass(w->run, x->calib, p->mass, x->cfg.gate_rows, s->tokens, s->n_tokens,
                              why);
    return calib_run_sample(w->run, x->calib, p->policy, s->tokens, s->n_tokens, why);
}

static int run_sample(struct parts *x, struct calibrate_work *w, const struct calibrate_pass *p,
                      const struct sample *s, struct err_msg *why)
{
    struct err_msg cause = {""};
    int err = run_one(x, w, p, s, &cause);
    if (err < 0)
        return err_set(why, err, "%s:%d: %s", w->o.samples, s->line, err_why(&cause, err));
    if (x->pool)
        TRY(calib_pool_add(x->pool, calib_sample(x->calib), length_of(p, s)));
    TRY(append_record(x, p, length_of(p, s), why));
    return p->mass ? calib_mass_end_sample(p->mass, s->n_tokens, why) : 0;
}

static int run_all(struct parts *x, struct calibrate_work *w, const struct calibrate_pass *p,
                   struct err_msg *why)
{
    int32_t done = 0;
    TRY(restore(x, w, p, &done, why));
    w->n_resumed += done;
    for (int32_t i = done; i < w->split.n_calibrate; i++)
        TRY(run_sample(x, w, p, sample_at(w, i), why));
    if (x->pool)
        TRY(calib_pool_thresholds(x->pool, p->k, p->n_levels, p->t, why));
    else
        TRY(calib_thresholds(x->calib, p->t, why));
    return 0;
}

/* Rows are smoothed over the blocks that the level gates. */
static void smooth(const struct calibrate_work *w, const struct calibrate_pass *p)
{
    const int64_t rows = (int64_t)w->info.n_layers * w->info.n_heads;
    for (int32_t s = 0; s < p->n_levels; s++) {
        const int32_t first = calib_first_gated(p->policy.gate_rows, p->k[s]);
        calib_smooth(p->t + s * rows * p->n_blocks, rows, p->n_blocks, first);
    }
}

int calibrate_pass_run(struct calibrate_work *w, const struct calibrate_pass *p,
                       struct err_msg *why)
{
    struct parts x = {.state = NULL};
    const struct samples_split *split = &w->split;
    calibrate_progress_begin(&w->progress, p->phase,
                             samples_tokens(&w->samples, split->calibrate, split->n_calibrate));
    int err = open_parts(&x, w, p, why);
    if (err == 0)
        err = run_all(&x, w, p, why);
    close_parts(&x);
    calibrate_progress_end(&w->progress);
    if (err == 0 && w->o.smooth)
        smooth(w, p);
    return err;
}

void calibrate_forget_state(const struct calibrate_work *w)
{
    char path[PATH_MAX];
    for (int i = 0; w->o.out && i <= CALIBRATE_PASS_DECODE; i++) {
        if (state_path(path, sizeof path, w->o.out, i, NULL) == 0)
            (void)remove(path);
    }
}
