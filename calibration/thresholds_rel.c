/* A density asked of a threshold file: REL's lambda for it, and what heads are steered to under
 * either gate. */
#include "attention/attn_steer.h"
#include "calibration/thresholds_file.h"
#include "kvcache/kv_view.h"
#include "model/batch.h"

#include <math.h>

/* The knots of prompts of exp(ln_tokens); where lines of other slopes cross, none falls. */
static void knots_at(const struct thresholds_rel *r, double ln_tokens,
                     double out[THRESHOLDS_REL_KNOTS])
{
    const double far = log(64), off = r->ln_tokens > 0 ? ln_tokens - r->ln_tokens : 0;
    const double by = off > far ? far : off < -far ? -far : off;
    for (int i = 0; i < THRESHOLDS_REL_KNOTS; i++) {
        out[i] = r->knots[i] + r->slopes[i] * by;
        if (i > 0 && out[i] < out[i - 1])
            out[i] = out[i - 1];
    }
}

double thresholds_rel_ln_lambda(const struct thresholds_rel *r, double density, int64_t n_tokens)
{
    const double at = (1 - density) * 10 - 1; /* in knots */
    const double ln_tokens = log((double)(n_tokens > 0 ? n_tokens : 1));
    double knots[THRESHOLDS_REL_KNOTS], ln = -ln_tokens;
    knots_at(r, ln_tokens, knots);
    if (at <= 0) {
        ln += knots[0] + r->b * at / 10;
    } else if (at >= THRESHOLDS_REL_KNOTS - 1) {
        ln += knots[THRESHOLDS_REL_KNOTS - 1] + r->b * (at - (THRESHOLDS_REL_KNOTS - 1)) / 10;
    } else {
        const int i = (int)at;
        ln += knots[i] + (knots[i + 1] - knots[i]) * (at - i);
    }
    if (ln > (double)THRESHOLDS_REL_LN_MAX)
        return (double)THRESHOLDS_REL_LN_MAX;
    return ln > -60 ? ln : -60;
}

/* Layers that a served prompt's density is of: the last computes one block (model/llama.h). */
static int32_t counted_layers(const struct attn_thresholds *v)
{
    return v->n_layers > 1 ? v->n_layers - 1 : 1;
}

double thresholds_rel_mean(const struct attn_thresholds *v, int32_t level)
{
    const int32_t n_layers = counted_layers(v);
    const float *t = v->t + level * v->level_stride;
    double sum = 0;
    for (int32_t l = 0; l < n_layers; l++) {
        for (int32_t h = 0; h < v->n_heads; h++)
            sum += (double)t[l * v->layer_stride + h * v->head_stride];
    }
    return sum / ((double)n_layers * (double)v->n_heads);
}

struct attn_thresholds thresholds_rel_heads_view(const struct thresholds_rel_heads *r,
                                                 int32_t n_layers, int32_t n_heads)
{
    return (struct attn_thresholds){.t = r->t,
                                    .n_levels = r->n_steps,
                                    .n_layers = n_layers,
                                    .n_heads = n_heads,
                                    .n_blocks = 1,
                                    .level_stride = (int64_t)n_layers * n_heads,
                                    .layer_stride = n_heads,
                                    .head_stride = 1};
}

/* Pages that a head keeps in row groups that reach 2 i + reach pages, i from 0 to n - 1, of which
 * `diag` are diagonal and kept in any case. */
static double kept_pages(double density, double n, double reach, double diag)
{
    double few = ceil((diag / density - reach) / 2); /* groups whose share is below that */
    few = !(few < n) ? n : few > 0 ? few : 0;
    return diag * few + density * (n * (n - 1) - few * (few - 1) + reach * (n - few));
}

/* Mean over heads of the density that they come to between two steps. */
static double reached_density(const struct attn_thresholds *v, int32_t gate_rows, int32_t level,
                              double blend, int64_t n_tokens)
{
    const int32_t n_layers = counted_layers(v);
    const double n = ceil((double)n_tokens / KV_BLOCK_TOKENS);
    const bool halves = gate_rows < KV_BLOCK_TOKENS;
    const double all = n * (n - 1) + 2 * n + (halves ? n * (n - 1) + n : 0);
    double sum = 0;
    for (int32_t l = 0; l < n_layers; l++) {
        for (int32_t h = 0; h < v->n_heads; h++) {
            const float *t =
                v->t + level * v->level_stride + l * v->layer_stride + h * v->head_stride;
            const double density = (1 - blend) * (double)t[0] + blend * (double)t[v->level_stride];
            sum += kept_pages(density, n, 2, 2) + (halves ? kept_pages(density, n, 1, 1) : 0);
        }
    }
    return sum / ((double)n_layers * (double)v->n_heads) / all;
}

bool thresholds_rel_steer(const struct attn_thresholds *heads, double density, int64_t n_tokens,
                          struct batch_policy *rel)
{
    int32_t lo = 0, hi = heads->n_levels - 1;
    double from = 0, to = 1;
    if (!heads->t || hi < 1 || n_tokens < 1)
        return false;
    while (hi - lo > 1) { /* the first step's density or less, more than the last's */
        const int32_t mid = lo + (hi - lo) / 2;
        if (reached_density(heads, rel->gate_rows, mid, 0, n_tokens) >= density)
            lo = mid;
        else
            hi = mid;
    }
    while (to - from > 1e-3) {
        const double mid = (from + to) / 2;
        if (reached_density(heads, rel->gate_rows, lo, mid, n_tokens) >= density)
            from = mid;
        else
            to = mid;
    }
    rel->level = (int16_t)lo;
    rel->blend = (float)to;
    rel->ln_lambda = (float)attn_steer_start((double)rel->ln_lambda, (double)rel->steer);
    return true;
}

void thresholds_abs_steer(const struct thresholds *t, double density, int64_t n_tokens,
                          struct batch_policy *abs)
{
    const int32_t rows = thresholds_meta(t)->gate_rows;
    abs->blend = 1;
    if (!(density > 0))
        return;
    int32_t n_levels, of_level = thresholds_k(t, &n_levels)[abs->level];
    if (thresholds_meta(t)->head_k) { /* the level's k is a name: what heads keep on the mean */
        const double level = thresholds_level_density(t, abs->level, n_tokens);
        of_level = thresholds_k_for_density(level < 1 ? level : 1, n_tokens, rows);
    }
    const int32_t wanted = thresholds_k_for_density(density, n_tokens, rows); /* or a part less */
    abs->blend = (float)((wanted - 0.5) / of_level);
}
