#include "cmd/calibrate_work.h"

#include "cmd/calibrate_pass.h"
#include "cmd/device.h"
#include "core/hash.h"
#include "core/mem.h"

#include <string.h>

void calibrate_work_free(struct calibrate_work *w)
{
    calib_run_destroy(w->run);
    model_close(w->model);
    dev_close(w->dev);
    samples_split_free(&w->split);
    samples_free(&w->samples);
    mem_free(w->held_out);
    mem_free(w->heads);
    mem_free(w->head_k);
    mem_free(w->lost);
    mem_free(w->decode_t);
    mem_free(w->rel_made[0]);
    mem_free(w->rel_made[1]);
    if (!w->file)
        mem_free(w->t);
    thresholds_free(w->file);
    conf_free(&calibrate_program, &w->o);
}

int calibrate_read(struct calibrate_work *w, struct err_msg *why)
{
    const struct calibrate_options *o = &w->o;
    TRY(samples_load(&w->samples, o->samples, INT32_MAX, (int32_t)o->max_len, why));
    samples_split(&w->split, &w->samples, o->task, (int32_t)o->limit, (int32_t)o->holdout);
    TRY(calibrate_rel_targets(o, w->rel_targets, &w->n_rel_targets, why));
    TRY(calibrate_decode_levels(o, w->decode_k, &w->n_decode, why));
    if (o->thresholds && o->rel == 0 && !o->decode_k)
        return 0;
    if (w->split.n_calibrate == 0) {
        return err_set(why, ERR_CONFIG, "%s: none of %d samples is left to calibrate on%s%s",
                       o->samples, w->samples.n, o->task ? ", task prefix " : "",
                       o->task ? o->task : "");
    }
    int32_t longest = samples_longest(&w->samples, w->split.calibrate, w->split.n_calibrate);
    w->decode_blocks =
        samples_longest_answered(&w->samples, w->split.calibrate, w->split.n_calibrate) /
        KV_BLOCK_TOKENS;
    if (o->thresholds && !o->decode_k)
        return 0;
    w->n_blocks = longest / KV_BLOCK_TOKENS;
    if (w->n_blocks == 0) {
        return err_set(why, ERR_CONFIG, "%s: the longest sample has %d tokens, fewer than %d",
                       o->samples, longest, KV_BLOCK_TOKENS);
    }
    if (o->thresholds)
        return 0;
    return calibrate_levels(o, w->n_blocks * KV_BLOCK_TOKENS, w->k, &w->n_levels, why);
}

int calibrate_open(struct calibrate_work *w, struct err_msg *why)
{
    struct calibrate_options *o = &w->o;
    const bool calibrates = !o->thresholds || o->rel > 0 || o->decode_k;
    int32_t (*const measure)(const struct samples *s, const int32_t *chosen, int32_t n) =
        o->decode_k ? samples_longest_answered : samples_longest;
    int32_t longest =
        calibrates ? measure(&w->samples, w->split.calibrate, w->split.n_calibrate) : 1;
    int32_t other = measure(&w->samples, w->split.held_out, w->split.n_held_out);
    longest = other > longest ? other : longest;
    TRY(device_open(&w->dev, o->device, 0, (int)o->threads, why));
    if (o->budget && w->dev->ops != &dev_cpu)
        return err_set(why, ERR_CONFIG, BUDGET_NEEDS_CPU);
    if (o->decode_k && w->dev->ops != &dev_cpu)
        return err_set(why, ERR_CONFIG, DECODE_NEEDS_CPU);
    if (o->chunk == 0)
        o->chunk = w->dev->ops == &dev_cpu ? 512 : 8192;
    struct model_config cfg = {.dir = o->model,
                               .dev = w->dev,
                               .random_weights = o->random_weights,
                               .dtype = device_dtype(o->dtype),
                               .kv_dtype = device_dtype(o->kv_dtype),
                               .max_seqs = 1,
                               .max_tokens = (int32_t)o->chunk,
                               .max_position = longest};
    TRY(model_open(&w->model, &cfg, why));
    w->info = *model_info(w->model);
    w->set = samples_hash(&w->samples, w->split.calibrate, w->split.n_calibrate);
    TRY(samples_check(&w->samples, o->samples, w->info.vocab_size, why));
    TRY(calib_run_create(&w->run, w->model, longest, (int32_t)o->chunk, why));
    calib_run_on_chunk(w->run, calibrate_progress_add, &w->progress);
    return 0;
}

void calibrate_set_policy(struct calibrate_work *w)
{
    const int64_t per_layer = (int64_t)w->info.n_heads * w->n_blocks;
    w->policy.abs = (struct attn_thresholds){.t = w->t,
                                             .n_levels = w->n_levels,
                                             .n_layers = w->info.n_layers,
                                             .n_heads = w->info.n_heads,
                                             .n_blocks = w->n_blocks,
                                             .level_stride = w->info.n_layers * per_layer,
                                             .layer_stride = per_layer,
                                             .head_stride = w->n_blocks};
}

static int64_t n_heads(const struct calibrate_work *w)
{
    return (int64_t)w->info.n_layers * w->info.n_heads;
}

void calibrate_one_k(struct calibrate_work *w)
{
    const int64_t n = n_heads(w);
    w->head_k = mem_zalloc((size_t)(w->n_levels * n), sizeof *w->head_k);
    for (int64_t i = 0; i < w->n_levels * n; i++)
        w->head_k[i] = w->k[i / n];
}

double calibrate_predicted(const struct calibrate_work *w, int32_t level, int64_t n_tokens)
{
    const int64_t n = n_heads(w);
    return thresholds_heads_density(w->head_k + level * n, n, n_tokens, calibrate_gate_rows(&w->o));
}

/* Each level from what its own gate, by the thresholds there are, lets the layers see. */
static int second_pass(struct calibrate_work *w, size_t per_level, struct err_msg *why)
{
    float *t = mem_zalloc((size_t)w->n_levels * per_level, sizeof *t);
    int err = model_set_policy(w->model, &w->policy, why);
    for (int32_t s = 0; err == 0 && s < w->n_levels; s++) {
        const float *gate = w->t + (size_t)s * per_level;
        const struct calibrate_pass pass = {
            .phase = "gated runs:",
            .number = s + 1,
            .policy = {.gate = BATCH_ABS,
                       .gate_rows = (uint8_t)calibrate_gate_rows(&w->o),
                       .level = (int16_t)s},
            .policy_hash = hash_bytes(gate, per_level * sizeof *gate, 1),
            .k = &w->k[s],
            .n_levels = 1,
            .n_blocks = w->n_blocks,
            .t = t + (size_t)s * per_level};
        err = calibrate_pass_run(w, &pass, why);
    }
    if (err == 0)
        memcpy(w->t, t, (size_t)w->n_levels * per_level * sizeof *t);
    mem_free(t);
    return err;
}

int calibrate_runs(struct calibrate_work *w, struct err_msg *why)
{
    const struct model_info *info = &w->info;
    const size_t per_level = (size_t)info->n_layers * (size_t)info->n_heads * (size_t)w->n_blocks;
    if (w->o.budget)
        return calibrate_budget(w, why);
    calibrate_one_k(w);
    w->t = mem_zalloc((size_t)w->n_levels * per_level, sizeof *w->t);
    const struct calibrate_pass dense = {
        .phase = "dense runs:",
        .policy = {.gate = BATCH_DENSE, .gate_rows = (uint8_t)calibrate_gate_rows(&w->o)},
        .k = w->k,
        .n_levels = w->n_levels,
        .n_blocks = w->n_blocks,
        .t = w->t};
    TRY(calibrate_pass_run(w, &dense, why));
    calibrate_set_policy(w);
    return w->o.second_pass ? second_pass(w, per_level, why) : 0;
}

/* One held-out sample under one level. */
static int measure_sample(struct calibrate_work *w, int32_t level, int32_t i, struct err_msg *why)
{
    const struct sample *s = &w->samples.items[w->split.held_out[i]];
    const int32_t gate_rows = calibrate_gate_rows(&w->o);
    struct batch_counts counts;
    struct batch_policy policy = {
        .gate = BATCH_ABS, .gate_rows = (uint8_t)gate_rows, .level = (int16_t)level};
    int err = calib_run_prompt(w->run, s->tokens, s->n_tokens, policy, &counts);
    if (err < 0)
        return err_set(why, err, "%s:%d: gated run: %s", w->o.samples, s->line, err_str(err));
    double density = (double)counts.kept / (double)counts.reachable;
    double predicted = calibrate_predicted(w, level, s->n_tokens);
    w->held_out[i].task = s->task;
    w->held_out[i].line = s->line;
    w->held_out[i].n_tokens = s->n_tokens;
    w->held_out[i].pages = (double)counts.reachable;
    w->held_out[i].density[level] = density;
    calibrate_density_add(&w->levels[level], predicted, density);
    return 0;
}

/* What the heads counted in the runs of a level: the counters now, less those before. */
static void take_head_counts(struct calibrate_work *w, int32_t level, struct attn_counts *before)
{
    const size_t n = (size_t)w->info.n_layers * (size_t)w->info.n_heads;
    const struct attn_counts *now = model_head_counts(w->model);
    struct attn_counts *to = w->heads + (size_t)level * n;
    for (size_t i = 0; i < n; i++) {
        to[i] = (struct attn_counts){.reachable = now[i].reachable - before[i].reachable,
                                     .visited = now[i].visited - before[i].visited,
                                     .kept = now[i].kept - before[i].kept};
    }
    memcpy(before, now, n * sizeof *now);
}

int calibrate_measure(struct calibrate_work *w, struct err_msg *why)
{
    const struct samples_split *split = &w->split;
    const size_t n = (size_t)w->info.n_layers * (size_t)w->info.n_heads;
    TRY(model_set_policy(w->model, &w->policy, why));
    w->held_out = mem_zalloc((size_t)split->n_held_out, sizeof *w->held_out);
    w->heads = mem_zalloc((size_t)w->n_levels * n, sizeof *w->heads);
    struct attn_counts *before = mem_zalloc(n, sizeof *before);
    int err = 0;
    calibrate_progress_begin(&w->progress, "held-out runs:",
                             samples_tokens(&w->samples, split->held_out, split->n_held_out) *
                                 w->n_levels);
    memcpy(before, model_head_counts(w->model), n * sizeof *before);
    for (int32_t level = 0; err == 0 && level < w->n_levels; level++) {
        w->levels[level].k = w->k[level];
        for (int32_t i = 0; err == 0 && i < split->n_held_out; i++)
            err = measure_sample(w, level, i, why);
        take_head_counts(w, level, before);
    }
    mem_free(before);
    calibrate_progress_end(&w->progress);
    return err;
}
