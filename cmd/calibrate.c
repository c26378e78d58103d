/* sluice-calibrate: page thresholds for a model from prompts, and how dense they leave held-out
 * prompts. The method is in calibration/README.md; this file wires its parts. */
#include "calibration/export.h"
#include "calibration/thresholds.h"
#include "cmd/calibrate_pass.h"
#include "core/clock.h"
#include "core/log.h"

#include <math.h>
#include <string.h>
#include <unistd.h>

enum { AUTO_MIN_TOKENS = 4096 };

/* The level that `auto` means: as asked for, or the one whose density is nearest to a half. */
static int32_t choose_auto(const struct calibrate_work *w)
{
    const int32_t n_max = w->n_blocks * KV_BLOCK_TOKENS;
    double best = 2;
    int32_t k = 0;
    if (w->o.auto_k >= 0)
        return (int32_t)w->o.auto_k;
    for (int32_t i = 0; i < w->n_levels; i++) {
        const struct calibrate_density *d = &w->levels[i];
        double density = d->n ? calibrate_density_mean(d) : calibrate_predicted(w, i, n_max);
        if (fabs(density - 0.5) < best) {
            best = fabs(density - 0.5);
            k = w->k[i];
        }
    }
    return k;
}

/* What `auto` is to mean, where it is named; else meta stays. */
static void set_auto(const struct calibrate_options *o, struct thresholds_meta *meta)
{
    const bool rel = o->auto_density > 0 || o->auto_lambda > 0;
    if (rel || o->auto_k >= 0) {
        meta->auto_rows = rel ? o->auto_rows == 0 ? 128 : 64 : 0;
        meta->auto_density = o->auto_density;
        meta->auto_ln_lambda = o->auto_lambda > 0 ? log(o->auto_lambda) : 0;
    }
    meta->auto_k = o->auto_k >= 0 ? (int32_t)o->auto_k : meta->auto_k;
    meta->auto_min = o->auto_min >= 0 ? (int32_t)o->auto_min : meta->auto_min;
}

static struct thresholds_decode decode_of(const struct calibrate_work *w)
{
    if (!w->decode_t)
        return (struct thresholds_decode){.t = NULL};
    return (struct thresholds_decode){w->decode_t, w->decode_k, w->n_decode, w->decode_blocks};
}

static struct thresholds_meta make_meta(const struct calibrate_work *w)
{
    const struct model_info *info = &w->info;
    if (w->file) {
        struct thresholds_meta meta = *thresholds_meta(w->file);
        meta.rel_128 = w->rel_128;
        meta.rel_64 = w->rel_64;
        meta.rel_128_heads = w->rel_heads[0];
        meta.rel_64_heads = w->rel_heads[1];
        if (w->decode_t)
            meta.decode = decode_of(w);
        set_auto(&w->o, &meta);
        return meta;
    }
    struct thresholds_meta meta = {.model = info->fingerprint,
                                   .set = w->set,
                                   .gate_rows = calibrate_gate_rows(&w->o),
                                   .n_max = w->n_blocks * KV_BLOCK_TOKENS,
                                   .n_samples = w->split.n_calibrate,
                                   .imported = w->o.import != NULL,
                                   .softmax_scale = info->softmax_scale,
                                   .auto_k = choose_auto(w),
                                   .auto_min = AUTO_MIN_TOKENS,
                                   .rel_128 = w->rel_128,
                                   .rel_64 = w->rel_64,
                                   .rel_128_heads = w->rel_heads[0],
                                   .rel_64_heads = w->rel_heads[1],
                                   .head_k = w->o.budget ? w->head_k : NULL,
                                   .decode = decode_of(w)};
    memcpy(meta.rope, info->rope, sizeof meta.rope);
    set_auto(&w->o, &meta);
    return meta;
}

static int write_files(const struct calibrate_work *w, const struct thresholds_meta *meta,
                       struct err_msg *why)
{
    const struct model_info *info = &w->info;
    if (w->o.export)
        TRY(thresholds_export(w->o.export, &w->policy.abs, w->k, meta->gate_rows, why));
    if (!w->o.out)
        return 0;
    TRY(thresholds_save(w->o.out, meta, w->t, w->k, w->n_levels, info->n_layers, info->n_heads,
                        w->n_blocks, why));
    calibrate_forget_state(w);
    return 0;
}

/* How the thresholds were made, for the report. */
static const char *how(const struct calibrate_options *o, char *text, size_t size)
{
    (void)snprintf(text, size, "%s%s%s%s", o->aggregate == CALIBRATE_MEAN ? "mean" : "quantile",
                   o->smooth ? ", smooth" : "", o->second_pass ? ", second pass" : "",
                   o->budget ? ", k by head" : "");
    return o->import ? "imported" : o->thresholds ? "read" : text;
}

static int finish(const struct calibrate_work *w, int64_t start_us, struct err_msg *why)
{
    const struct thresholds_meta meta = make_meta(w);
    char text[64];
    TRY(write_files(w, &meta, why));
    struct calibrate_report r = {.model = w->info.name,
                                 .out = w->o.out,
                                 .how = how(&w->o, text, sizeof text),
                                 .n_resumed = w->n_resumed,
                                 .meta = &meta,
                                 .levels = w->levels,
                                 .held_out = w->held_out,
                                 .heads = w->heads,
                                 .t = w->t,
                                 .head_k = w->head_k,
                                 .lost = w->lost,
                                 .rel_levels = w->rel_levels,
                                 .n_rel_levels = w->n_rel_targets,
                                 .decode = w->decode,
                                 .n_decode = w->decode_t ? w->n_decode : 0,
                                 .n_held_out = w->held_out ? w->split.n_held_out : 0,
                                 .n_levels = w->n_levels,
                                 .n_layers = w->info.n_layers,
                                 .n_heads = w->info.n_heads,
                                 .n_blocks = w->n_blocks,
                                 .seconds = (double)(clock_monotonic_us(NULL) - start_us) / 1e6};
    if (w->o.report)
        TRY(calibrate_report_dir(&r, w->o.report, why));
    if (!w->o.json) {
        calibrate_report_text(&r, stdout);
        return 0;
    }
    int err = calibrate_report_json(&r, stdout);
    return err < 0 ? err_set(why, err, "cannot write the report: %s", err_str(err)) : 0;
}

static int run(struct calibrate_work *w, int argc, char **argv, struct err_msg *why)
{
    int64_t start_us = clock_monotonic_us(NULL);
    TRY(conf_args(&calibrate_program, &w->o, argc, argv, NULL, 0, NULL, why));
    TRY(calibrate_options_check(&w->o, why));
    if (w->o.import) {
        TRY(calibrate_import(w, why));
        return finish(w, start_us, why);
    }
    if (w->o.samples) {
        TRY(calibrate_read(w, why));
        TRY(calibrate_open(w, why));
    }
    TRY(w->o.thresholds ? calibrate_load(w, why) : calibrate_runs(w, why));
    if (w->o.samples)
        TRY(calibrate_measure(w, why));
    if (w->o.rel > 0)
        TRY(calibrate_rel(w, why));
    TRY(calibrate_measure_rel(w, why));
    TRY(calibrate_decode(w, why));
    return finish(w, start_us, why);
}

int main(int argc, char **argv)
{
    struct calibrate_work w = {0};
    struct err_msg why = {""};
    if (conf_wants_help(argc, argv)) {
        conf_help(&calibrate_program, stdout);
        return 0;
    }
    if (argc == 2 && strcmp(argv[1], "--help-markdown") == 0) {
        conf_markdown(&calibrate_program, stdout);
        return 0;
    }
    if (isatty(STDERR_FILENO))
        w.progress.to = stderr;
    conf_defaults(&calibrate_program, &w.o);
    log_set_level(LOG_WARN); /* stderr is for progress and errors */
    int err = run(&w, argc, argv, &why);
    if (err < 0)
        (void)fprintf(stderr, "sluice-calibrate: %s\n", err_why(&why, err));
    calibrate_work_free(&w);
    return err < 0 ? 1 : 0;
}
