/* Thresholds from files instead of runs. --import: of the reference implementation's, where the
 * model's folder is read for its shape and identity only. --thresholds: of our own. */
#include "calibration/import.h"

#include "cmd/calibrate_work.h"
#include "kvcache/kv_view.h"
#include "model/describe.h"

#include <inttypes.h>
#include <string.h>

_Static_assert((int)IMPORT_MAX_LEVELS <= (int)CALIBRATE_MAX_LEVELS, "every level has a place");

/* What a file's own numbers do not explain; on stderr, so that --json stays one object. */
static void warn(const char *path, const struct thresholds_import *t)
{
    const int64_t n = (int64_t)t->n_levels * t->n_layers * t->n_heads * t->n_blocks;
    if (t->n_dense > 0) {
        (void)fprintf(stderr,
                      "sluice-calibrate: %s: %" PRId64 " of %" PRId64
                      " thresholds are -inf where k "
                      "leaves a choice: denser than predicted there\n",
                      path, t->n_dense, n);
    }
    if (t->n_limited > 0) {
        (void)fprintf(stderr,
                      "sluice-calibrate: %s: %" PRId64 " of %" PRId64
                      " thresholds are finite where "
                      "k keeps all pages: was k counted otherwise?\n",
                      path, t->n_limited, n);
    }
}

int calibrate_import(struct calibrate_work *w, struct err_msg *why)
{
    struct thresholds_import t;
    TRY(model_describe(&w->info, w->o.model, w->o.random_weights, why));
    TRY(thresholds_import(&t, w->o.import, w->info.n_layers, w->info.n_heads, why));
    w->t = t.t; /* released with w */
    w->set = t.set;
    w->n_levels = t.n_levels;
    w->n_blocks = t.n_blocks;
    for (int32_t i = 0; i < t.n_levels; i++) {
        w->k[i] = t.k[i];
        w->levels[i].k = t.k[i];
    }
    calibrate_one_k(w);
    calibrate_set_policy(w);
    warn(w->o.import, &t);
    return calibrate_check_auto(&w->o, w->k, w->n_levels, why);
}

int calibrate_load(struct calibrate_work *w, struct err_msg *why)
{
    if (!w->model)
        TRY(model_describe(&w->info, w->o.model, w->o.random_weights, why));
    TRY(thresholds_load(&w->file, w->o.thresholds, why));
    const struct thresholds_expect expect = {.model = w->info.fingerprint,
                                             .n_layers = w->info.n_layers,
                                             .n_heads = w->info.n_heads,
                                             .softmax_scale = w->info.softmax_scale,
                                             .rope = w->info.rope};
    TRY(thresholds_check(w->file, &expect, why));
    const struct thresholds_meta *meta = thresholds_meta(w->file);
    const int32_t *k = thresholds_k(w->file, &w->n_levels);
    w->policy.abs = *thresholds_view(w->file);
    w->t = (float *)w->policy.abs.t; /* the file's; only read */
    w->n_blocks = w->policy.abs.n_blocks;
    w->set = meta->set;
    w->rel_128 = meta->rel_128;
    w->rel_64 = meta->rel_64;
    w->rel_heads[0] = meta->rel_128_heads;
    w->rel_heads[1] = meta->rel_64_heads;
    w->o.gate_rows = meta->gate_rows == KV_BLOCK_TOKENS ? 0 : 1;
    for (int32_t i = 0; i < w->n_levels; i++)
        w->levels[i].k = w->k[i] = k[i];
    calibrate_one_k(w);
    if (meta->head_k)
        memcpy(w->head_k, meta->head_k,
               (size_t)w->n_levels * (size_t)w->info.n_layers * (size_t)w->info.n_heads *
                   sizeof *w->head_k);
    return calibrate_check_auto(&w->o, w->k, w->n_levels, why);
}
