#include "cmd/calibrate_report.h"

#include "core/clock.h"
#include "kvcache/kv_view.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <string.h>

void calibrate_progress_begin(struct calibrate_progress *p, const char *phase, int64_t total)
{
    p->phase = phase;
    p->done = 0;
    p->total = total;
    p->start_us = clock_monotonic_us(NULL);
    p->last_us = 0;
    calibrate_progress_add(p, 0);
}

void calibrate_progress_add(void *progress, int32_t n_tokens)
{
    struct calibrate_progress *p = progress;
    int64_t now = clock_monotonic_us(NULL);
    p->done += n_tokens;
    if (!p->to || now - p->last_us < 100000) { /* ten a second */
        return;
    }
    p->last_us = now;
    double seconds = (double)(now - p->start_us) / 1e6;
    (void)fprintf(p->to, "\r%s %" PRId64 " of %" PRId64 " tokens, %.0f tokens/s\033[K", p->phase,
                  p->done, p->total, seconds > 0 ? (double)p->done / seconds : 0);
    (void)fflush(p->to);
}

void calibrate_progress_end(struct calibrate_progress *p)
{
    if (p->to)
        (void)fprintf(p->to, "\r\033[K");
}

void calibrate_density_add(struct calibrate_density *d, double predicted, double measured)
{
    d->min = d->n == 0 || measured < d->min ? measured : d->min;
    d->max = d->n == 0 || measured > d->max ? measured : d->max;
    d->predicted = (d->predicted * d->n + predicted) / (d->n + 1);
    d->sum += measured;
    d->sum_squares += measured * measured;
    d->n++;
}

double calibrate_density_mean(const struct calibrate_density *d)
{
    return d->n ? d->sum / d->n : (double)NAN;
}

double calibrate_density_std(const struct calibrate_density *d)
{
    double mean = calibrate_density_mean(d);
    double variance = d->n ? d->sum_squares / d->n - mean * mean : 0;
    return variance > 0 ? sqrt(variance) : 0;
}

double calibrate_head_density(const struct calibrate_report *r, int32_t level, int32_t head)
{
    const struct attn_counts *c =
        &r->heads[(size_t)level * (size_t)r->n_layers * (size_t)r->n_heads + (size_t)head];
    return (double)c->kept / (double)c->reachable;
}

int32_t calibrate_head_k(const struct calibrate_report *r, int32_t level, int32_t head)
{
    return r->head_k[(size_t)level * (size_t)r->n_layers * (size_t)r->n_heads + (size_t)head];
}

double calibrate_head_predicted(const struct calibrate_report *r, int32_t level, int32_t head)
{
    const int32_t k = calibrate_head_k(r, level, head);
    double kept = 0, pages = 0;
    for (int32_t i = 0; i < r->n_held_out; i++) {
        const struct calibrate_held_out *h = &r->held_out[i];
        kept += thresholds_predicted_density(k, h->n_tokens, r->meta->gate_rows) * h->pages;
        pages += h->pages;
    }
    return kept / pages;
}

void calibrate_k_range(const struct calibrate_report *r, int32_t level, int32_t *min, int32_t *max)
{
    *min = *max = calibrate_head_k(r, level, 0);
    for (int32_t i = 1; i < r->n_layers * r->n_heads; i++) {
        const int32_t k = calibrate_head_k(r, level, i);
        *min = k < *min ? k : *min;
        *max = k > *max ? k : *max;
    }
}

/* What is predicted where nothing was measured. */
static double level_predicted(const struct calibrate_report *r, int32_t level)
{
    const int64_t n = (int64_t)r->n_layers * r->n_heads;
    return thresholds_heads_density(r->head_k + level * n, n, r->meta->n_max, r->meta->gate_rows);
}

int32_t calibrate_heads_off(const struct calibrate_report *r, int32_t level, int32_t *worst)
{
    double farthest = 0;
    int32_t n = 0;
    *worst = 0;
    for (int32_t i = 0; i < r->n_layers * r->n_heads; i++) {
        const double d =
            fabs(calibrate_head_density(r, level, i) - calibrate_head_predicted(r, level, i));
        n += d > CALIBRATE_TOLERANCE;
        if (d > farthest) {
            farthest = d;
            *worst = i;
        }
    }
    return n;
}

static void warn_of_heads(const struct calibrate_report *r, FILE *to)
{
    for (int32_t i = 0; i < r->n_levels; i++) {
        int32_t worst, n = calibrate_heads_off(r, i, &worst);
        if (n == 0)
            continue;
        (void)fprintf(to,
                      "warning: k=%d: %d of %d heads are more than %.2f from the prediction, layer "
                      "%d head %d farthest at %.3f\n",
                      r->levels[i].k, n, r->n_layers * r->n_heads, CALIBRATE_TOLERANCE,
                      worst / r->n_heads, worst % r->n_heads, calibrate_head_density(r, i, worst));
    }
}

static void show_heads(const struct calibrate_report *r, FILE *to)
{
    for (int32_t i = 0; r->meta->head_k && i < r->n_levels; i++) {
        int32_t min, max;
        calibrate_k_range(r, i, &min, &max);
        (void)fprintf(to, "k=%d: heads keep %d to %d pages", r->levels[i].k, min, max);
        if (r->lost)
            (void)fprintf(to, "; softmax mass lost %.5f predicted, %.5f with %d for all",
                          r->lost[i].own, r->lost[i].one, r->levels[i].k);
        (void)fputc('\n', to);
    }
}

static void show_rel(const struct calibrate_report *r, FILE *to)
{
    const struct thresholds_rel *fits[] = {&r->meta->rel_128, &r->meta->rel_64};
    for (int i = 0; i < 2 && fits[i]->b > 0; i++) {
        (void)fprintf(
            to,
            "REL, %d rows: lambda * tokens = exp(%.3f + %.3f S), S skipped; r2 %.3f, from S "
            "%.2f to %.2f\n",
            i ? 64 : 128, fits[i]->ln_a, fits[i]->b, fits[i]->r2, fits[i]->min, fits[i]->max);
    }
    for (int32_t i = 0; i < r->n_rel_levels; i++) {
        const struct calibrate_density *d = &r->rel_levels[i];
        if (d->n)
            (void)fprintf(to, "%8s %10.3f %10.3f %8.3f    [%.3f %.3f]\n", "rel", d->predicted,
                          calibrate_density_mean(d), calibrate_density_std(d), d->min, d->max);
    }
}

/* Of generated rows: at the ends of the held-out samples, else predicted at the calibrated length.
 */
static double decode_predicted(const struct calibrate_report *r, int32_t level)
{
    const struct calibrate_density *d = &r->decode[level];
    const int64_t n_max = (int64_t)r->meta->decode.n_blocks * KV_BLOCK_TOKENS;
    return d->n ? d->predicted : thresholds_row_density(d->k, n_max);
}

static void show_decode(const struct calibrate_report *r, FILE *to)
{
    for (int32_t i = 0; i < r->n_decode; i++) {
        const struct calibrate_density *d = &r->decode[i];
        (void)fprintf(to, "generated rows, k=%d: predicted %.3f", d->k, decode_predicted(r, i));
        if (d->n)
            (void)fprintf(to, ", measured %.3f +- %.3f [%.3f %.3f]", calibrate_density_mean(d),
                          calibrate_density_std(d), d->min, d->max);
        (void)fputc('\n', to);
    }
}

static json_t *decode_json(const struct calibrate_report *r)
{
    json_t *levels = json_array();
    for (int32_t i = 0; i < r->n_decode; i++) {
        const struct calibrate_density *d = &r->decode[i];
        json_t *o = json_pack("{s:i,s:f,s:i}", "k", d->k, "predicted", decode_predicted(r, i),
                              "held_out", d->n);
        if (o && d->n) {
            (void)json_object_set_new(o, "measured", json_real(calibrate_density_mean(d)));
            (void)json_object_set_new(o, "std", json_real(calibrate_density_std(d)));
        }
        (void)json_array_append_new(levels, o);
    }
    return levels;
}

void calibrate_report_text(const struct calibrate_report *r, FILE *to)
{
    const struct thresholds_meta *m = r->meta;
    if (m->imported)
        (void)fprintf(to, "%s: imported, up to %d tokens, gate rows %d\n", r->model, m->n_max,
                      m->gate_rows);
    else
        (void)fprintf(to, "%s: %d samples, up to %d tokens, gate rows %d, %.1f s\n", r->model,
                      m->n_samples, m->n_max, m->gate_rows, r->seconds);
    (void)fprintf(to, "%8s %10s %10s %8s %16s\n", "k", "predicted", "measured", "+-", "[min max]");
    for (int32_t i = 0; i < r->n_levels; i++) {
        const struct calibrate_density *d = &r->levels[i];
        if (d->n == 0) {
            (void)fprintf(to, "%8d %10.3f %10s\n", d->k, level_predicted(r, i), "-");
            continue;
        }
        (void)fprintf(to, "%8d %10.3f %10.3f %8.3f    [%.3f %.3f]\n", d->k, d->predicted,
                      calibrate_density_mean(d), calibrate_density_std(d), d->min, d->max);
    }
    show_heads(r, to);
    show_rel(r, to);
    show_decode(r, to);
    if (r->levels[0].n)
        warn_of_heads(r, to);
    if (r->n_resumed)
        (void)fprintf(to, "%d samples were done by an earlier run\n", r->n_resumed);
    if (r->levels[0].n)
        (void)fprintf(to, "measured on %d held-out samples; auto: ", r->levels[0].n);
    else
        (void)fprintf(to, "predicted at %d tokens, no held-out samples; auto: ", m->n_max);
    if (m->auto_rows && m->auto_density > 0)
        (void)fprintf(to, "REL of %d rows at density %.3g from %d tokens on\n", m->auto_rows,
                      m->auto_density, m->auto_min);
    else if (m->auto_rows)
        (void)fprintf(to, "REL of %d rows at lambda %.4g from %d tokens on\n", m->auto_rows,
                      exp(m->auto_ln_lambda), m->auto_min);
    else if (m->auto_k)
        (void)fprintf(to, "k=%d from %d tokens on\n", m->auto_k, m->auto_min);
    else
        (void)fprintf(to, "dense\n");
    if (r->out) {
        (void)fprintf(to, "wrote %s: [%d, %d, %d, %d] thresholds\n", r->out, r->n_levels,
                      r->n_layers, r->n_heads, r->n_blocks);
    }
}

static void add_heads_json(const struct calibrate_report *r, int32_t level, json_t *o)
{
    int32_t min, max;
    json_t *layers = json_array();
    calibrate_k_range(r, level, &min, &max);
    for (int32_t l = 0; l < r->n_layers; l++) {
        json_t *heads = json_array();
        for (int32_t h = 0; h < r->n_heads; h++)
            (void)json_array_append_new(
                heads, json_integer(calibrate_head_k(r, level, l * r->n_heads + h)));
        (void)json_array_append_new(layers, heads);
    }
    (void)json_object_set_new(o, "head_k", layers);
    (void)json_object_set_new(o, "k_min", json_integer(min));
    (void)json_object_set_new(o, "k_max", json_integer(max));
    if (r->lost) {
        (void)json_object_set_new(o, "lost", json_real(r->lost[level].own));
        (void)json_object_set_new(o, "lost_one_k", json_real(r->lost[level].one));
    }
}

static json_t *level_json(const struct calibrate_report *r, int32_t level)
{
    const struct calibrate_density *d = &r->levels[level];
    int32_t worst;
    double predicted = d->n ? d->predicted : level_predicted(r, level);
    json_t *o = json_pack("{s:i,s:f,s:i}", "k", d->k, "predicted", predicted, "held_out", d->n);
    if (o && d->n) {
        (void)json_object_set_new(o, "measured", json_real(calibrate_density_mean(d)));
        (void)json_object_set_new(o, "std", json_real(calibrate_density_std(d)));
        (void)json_object_set_new(o, "min", json_real(d->min));
        (void)json_object_set_new(o, "max", json_real(d->max));
        (void)json_object_set_new(o, "heads_off",
                                  json_integer(calibrate_heads_off(r, level, &worst)));
    }
    if (o && r->meta->head_k)
        add_heads_json(r, level, o);
    return o;
}

static json_t *rel_json(const struct calibrate_report *r)
{
    const struct thresholds_rel *fits[] = {&r->meta->rel_128, &r->meta->rel_64};
    json_t *all = json_array(), *levels = json_array();
    for (int i = 0; i < 2 && fits[i]->b > 0; i++) {
        (void)json_array_append_new(all, json_pack("{s:i,s:f,s:f,s:f,s:f,s:f}", "gate_rows",
                                                   i ? 64 : 128, "ln_a", fits[i]->ln_a, "b",
                                                   fits[i]->b, "r2", fits[i]->r2, "min",
                                                   fits[i]->min, "max", fits[i]->max));
    }
    for (int32_t i = 0; i < r->n_rel_levels && r->rel_levels[i].n; i++) {
        const struct calibrate_density *d = &r->rel_levels[i];
        (void)json_array_append_new(
            levels, json_pack("{s:f,s:f,s:f,s:f,s:f}", "wanted", d->predicted, "measured",
                              calibrate_density_mean(d), "std", calibrate_density_std(d), "min",
                              d->min, "max", d->max));
    }
    return json_pack("{s:o,s:o}", "fits", all, "levels", levels);
}

static json_t *held_out_json(const struct calibrate_held_out *h, int32_t n_levels)
{
    json_t *measured = json_array();
    for (int32_t i = 0; i < n_levels; i++)
        (void)json_array_append_new(measured, json_real(h->density[i]));
    return json_pack("{s:s,s:i,s:i,s:o}", "task", h->task, "line", h->line, "tokens", h->n_tokens,
                     "measured", measured);
}

int calibrate_report_json(const struct calibrate_report *r, FILE *to)
{
    const struct thresholds_meta *m = r->meta;
    json_t *levels = json_array(), *held_out = json_array();
    for (int32_t i = 0; i < r->n_levels; i++)
        (void)json_array_append_new(levels, level_json(r, i));
    for (int32_t i = 0; i < r->n_held_out; i++)
        (void)json_array_append_new(held_out, held_out_json(&r->held_out[i], r->n_levels));
    json_t *o = json_pack(
        "{s:s,s:s?,s:s,s:b,s:i,s:i,s:i,s:i,s:[i,i,i,i],s:i,s:i,s:i,s:f,s:f,s:f,s:o,s:o,s:o,s:o}",
        "model", r->model, "out", r->out, "how", r->how, "imported", m->imported, "samples",
        m->n_samples, "resumed", r->n_resumed, "n_max", m->n_max, "gate_rows", m->gate_rows,
        "shape", r->n_levels, r->n_layers, r->n_heads, r->n_blocks, "auto_k", m->auto_k, "auto_min",
        m->auto_min, "auto_rows", m->auto_rows, "auto_density", m->auto_density, "auto_ln_lambda",
        m->auto_ln_lambda, "seconds", r->seconds, "levels", levels, "rel", rel_json(r), "decode",
        decode_json(r), "held_out", held_out);
    int failed = !o || json_dumpf(o, to, JSON_COMPACT | JSON_REAL_PRECISION(6)) < 0;
    json_decref(o);
    return failed || fputc('\n', to) == EOF ? -EIO : 0;
}
