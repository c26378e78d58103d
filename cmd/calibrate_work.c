#include "cmd/calibrate_work.h"

#include "cmd/device.h"
#include "core/mem.h"

void calibrate_work_free(struct calibrate_work *w)
{
    calib_destroy(w->calib);
    calib_run_destroy(w->run);
    model_close(w->model);
    dev_close(w->dev);
    samples_split_free(&w->split);
    samples_free(&w->samples);
    mem_free(w->held_out);
    mem_free(w->t);
    conf_free(&calibrate_program, &w->o);
}

int calibrate_read(struct calibrate_work *w, struct err_msg *why)
{
    const struct calibrate_options *o = &w->o;
    TRY(samples_load(&w->samples, o->samples, INT32_MAX, (int32_t)o->max_len, why));
    samples_split(&w->split, &w->samples, o->task, (int32_t)o->limit, (int32_t)o->holdout);
    if (w->split.n_calibrate == 0) {
        return err_set(why, ERR_CONFIG, "%s: none of %d samples is left to calibrate on%s%s",
                       o->samples, w->samples.n, o->task ? ", task prefix " : "",
                       o->task ? o->task : "");
    }
    int32_t longest = samples_longest(&w->samples, w->split.calibrate, w->split.n_calibrate);
    w->n_blocks = longest / KV_BLOCK_TOKENS;
    if (w->n_blocks == 0) {
        return err_set(why, ERR_CONFIG, "%s: the longest sample has %d tokens, fewer than %d",
                       o->samples, longest, KV_BLOCK_TOKENS);
    }
    return calibrate_levels(o, w->n_blocks * KV_BLOCK_TOKENS, w->k, &w->n_levels, why);
}

int calibrate_open(struct calibrate_work *w, struct err_msg *why)
{
    struct calibrate_options *o = &w->o;
    int32_t longest = samples_longest(&w->samples, w->split.calibrate, w->split.n_calibrate);
    int32_t other = samples_longest(&w->samples, w->split.held_out, w->split.n_held_out);
    longest = other > longest ? other : longest;
    TRY(device_open(&w->dev, o->device, 0, (int)o->threads, why));
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

int calibrate_dense(struct calibrate_work *w, struct err_msg *why)
{
    const struct model_info *info = model_info(w->model);
    const struct samples_split *split = &w->split;
    struct calib_config cfg = {.n_layers = info->n_layers,
                               .n_heads = info->n_heads,
                               .n_blocks = w->n_blocks,
                               .gate_rows = calibrate_gate_rows(&w->o),
                               .k = w->k,
                               .n_levels = w->n_levels,
                               .pool = w->dev->pool,
                               .dev = w->dev->ops == &dev_cpu ? NULL : w->dev};
    const struct batch_policy dense = {.gate = BATCH_DENSE, .gate_rows = (uint8_t)cfg.gate_rows};
    TRY(calib_create(&w->calib, &cfg, why));
    calibrate_progress_begin(&w->progress, "dense runs:",
                             samples_tokens(&w->samples, split->calibrate, split->n_calibrate));
    for (int32_t i = 0; i < split->n_calibrate; i++) {
        const struct sample *s = &w->samples.items[split->calibrate[i]];
        struct err_msg cause = {""};
        int err = calib_run_sample(w->run, w->calib, dense, s->tokens, s->n_tokens, &cause);
        if (err < 0)
            return err_set(why, err, "%s:%d: %s", w->o.samples, s->line, err_why(&cause, err));
    }
    calibrate_progress_end(&w->progress);
    size_t per_level = (size_t)info->n_layers * (size_t)info->n_heads * (size_t)w->n_blocks;
    w->t = mem_zalloc((size_t)w->n_levels * per_level, sizeof *w->t);
    w->policy.abs = (struct attn_thresholds){.t = w->t,
                                             .n_levels = w->n_levels,
                                             .n_layers = info->n_layers,
                                             .n_heads = info->n_heads,
                                             .n_blocks = w->n_blocks,
                                             .level_stride = (int64_t)per_level,
                                             .layer_stride = (int64_t)info->n_heads * w->n_blocks,
                                             .head_stride = w->n_blocks};
    return calib_thresholds(w->calib, w->t, why);
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
    w->held_out[i].task = s->task;
    w->held_out[i].line = s->line;
    w->held_out[i].n_tokens = s->n_tokens;
    w->held_out[i].density[level] = density;
    calibrate_density_add(&w->levels[level],
                          thresholds_predicted_density(w->k[level], s->n_tokens, gate_rows),
                          density);
    return 0;
}

int calibrate_measure(struct calibrate_work *w, struct err_msg *why)
{
    const struct samples_split *split = &w->split;
    TRY(model_set_policy(w->model, &w->policy, why));
    w->held_out = mem_zalloc((size_t)split->n_held_out, sizeof *w->held_out);
    calibrate_progress_begin(&w->progress, "held-out runs:",
                             samples_tokens(&w->samples, split->held_out, split->n_held_out) *
                                 w->n_levels);
    for (int32_t level = 0; level < w->n_levels; level++) {
        w->levels[level].k = w->k[level];
        for (int32_t i = 0; i < split->n_held_out; i++)
            TRY(measure_sample(w, level, i, why));
    }
    calibrate_progress_end(&w->progress);
    return 0;
}
