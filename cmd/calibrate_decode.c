/* --decode-k: thresholds of generated rows, from the last rows of the calibration samples' dense
 * runs, and how many pages they keep where those of held-out samples are generated. */
#include "calibration/thresholds.h"
#include "cmd/calibrate_pass.h"
#include "core/mem.h"

#include <errno.h>

enum { UNANSWERED_ROWS = 16 }; /* of a sample's end, where it has no answer */

_Static_assert((int)SAMPLES_MAX_ANSWER <= (int)CALIB_MAX_ROWS &&
                   (int)CALIB_MAX_ROWS <= (int)MODEL_PROBE_ROWS,
               "every answer can be probed");

struct calibrate_row_span calibrate_row_span(const struct sample *s)
{
    const int32_t end = s->n_tokens + s->n_answer;
    const int32_t n = s->n_answer ? s->n_answer : UNANSWERED_ROWS;
    return (struct calibrate_row_span){n < end ? n : end - 1, end};
}

static void set_policy(struct calibrate_work *w)
{
    const int64_t per_layer = (int64_t)w->info.n_heads * w->decode_blocks;
    w->policy.decode = (struct attn_thresholds){.t = w->decode_t,
                                                .n_levels = w->n_decode,
                                                .n_layers = w->info.n_layers,
                                                .n_heads = w->info.n_heads,
                                                .n_blocks = w->decode_blocks,
                                                .level_stride = w->info.n_layers * per_layer,
                                                .layer_stride = per_layer,
                                                .head_stride = w->decode_blocks};
}

/* Pages that rows [first, end) keep of those they could, by prediction. */
static double predicted(int32_t k, int32_t first, int32_t end)
{
    double kept = 0, pages = 0;
    for (int32_t at = first; at < end; at++) {
        const int32_t all = at / KV_PAGE_TOKENS + 1;
        kept += thresholds_row_density(k, at) * all;
        pages += all;
    }
    return kept / pages;
}

static int measure_sample(struct calibrate_work *w, const struct sample *s, struct err_msg *why)
{
    struct batch_counts counts[CALIBRATE_MAX_LEVELS];
    const struct calibrate_row_span x = calibrate_row_span(s);
    int err = calib_run_generated(w->run, s->tokens, x.end, x.n_rows, w->n_decode, counts);
    if (err < 0)
        return err_set(why, err, "%s:%d: gated rows: %s", w->o.samples, s->line, err_str(err));
    for (int32_t i = 0; i < w->n_decode; i++)
        calibrate_density_add(&w->decode[i], predicted(w->decode_k[i], x.end - x.n_rows, x.end),
                              (double)counts[i].kept / (double)counts[i].reachable);
    return 0;
}

static int measure(struct calibrate_work *w, struct err_msg *why)
{
    const struct samples_split *split = &w->split;
    set_policy(w);
    TRY(model_set_policy(w->model, &w->policy, why));
    calibrate_progress_begin(&w->progress, "held-out rows:",
                             samples_tokens(&w->samples, split->held_out, split->n_held_out));
    for (int32_t i = 0; i < split->n_held_out; i++)
        TRY(measure_sample(w, &w->samples.items[split->held_out[i]], why));
    calibrate_progress_end(&w->progress);
    return 0;
}

int calibrate_decode(struct calibrate_work *w, struct err_msg *why)
{
    const size_t heads = (size_t)w->info.n_layers * (size_t)w->info.n_heads;
    const size_t n = (size_t)w->n_decode * heads * (size_t)w->decode_blocks;
    if (w->n_decode == 0)
        return 0;
    w->decode_t = mem_try_aligned(n, sizeof *w->decode_t);
    if (!w->decode_t)
        return err_set(why, -ENOMEM, "--decode-k: no memory for %zu thresholds", n);
    for (int32_t i = 0; i < w->n_decode; i++)
        w->decode[i].k = w->decode_k[i];
    const struct calibrate_pass pass = {
        .phase = "single rows:",
        .number = CALIBRATE_PASS_DECODE,
        .policy = {.gate = BATCH_DENSE, .gate_rows = 1},
        .policy_hash = samples_hash_answers(&w->samples, w->split.calibrate, w->split.n_calibrate),
        .k = w->decode_k,
        .n_levels = w->n_decode,
        .n_blocks = w->decode_blocks,
        .t = w->decode_t};
    TRY(calibrate_pass_run(w, &pass, why));
    return measure(w, why);
}
