#include "cmd/cli_report.h"

#include "core/mem.h"

#include <math.h>
#include <stdlib.h>

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double at_rank(const double *sorted, int32_t n, double p)
{
    if (n == 0)
        return 0.0;
    double at = p / 100.0 * (n - 1);
    int32_t lo = (int32_t)floor(at);
    int32_t hi = lo + 1 < n ? lo + 1 : lo;
    return sorted[lo] + (sorted[hi] - sorted[lo]) * (at - lo);
}

double report_percentile(double *values, int32_t n, double p)
{
    qsort(values, (size_t)n, sizeof *values, ascending);
    return at_rank(values, n, p);
}

/* values in seconds, sorted in place; the result in milliseconds. */
static void summarise(struct report_series *out, double *values, int32_t n,
                      const struct report_options *o)
{
    double sum = 0.0, square = 0.0;
    *out = (struct report_series){0};
    if (n == 0)
        return;
    for (int32_t i = 0; i < n; i++)
        sum += values[i];
    out->mean = sum / n * 1000.0;
    for (int32_t i = 0; i < n; i++)
        square += (values[i] - sum / n) * (values[i] - sum / n);
    out->std = sqrt(square / n) * 1000.0;
    out->median = report_percentile(values, n, 50.0) * 1000.0;
    for (int32_t i = 0; i < o->n_percentiles; i++)
        out->percentiles[i] = at_rank(values, n, o->percentiles[i]) * 1000.0;
}

static double tpot(const struct bench_sample *s)
{
    return s->output_len > 1 ? (s->latency_s - s->ttft_s) / (s->output_len - 1) : 0.0;
}

static bool is_good(const struct bench_sample *s, const struct report_slo *slo)
{
    return s->ttft_s * 1000.0 <= slo->ttft_ms && tpot(s) * 1000.0 <= slo->tpot_ms &&
           s->latency_s * 1000.0 <= slo->e2el_ms;
}

/* Which values of a sample belong to a metric: appends them to out, returns their number. */
static int32_t values_of(const struct bench_sample *s, enum report_metric m, double *out)
{
    switch (m) {
    case REPORT_TTFT: *out = s->ttft_s; return 1;
    case REPORT_E2EL: *out = s->latency_s; return 1;
    case REPORT_QUEUE: *out = s->queue_s; return 1;
    case REPORT_TPOT: *out = tpot(s); return s->output_len > 1;
    case REPORT_ITL:
        for (int32_t i = 0; i < s->n_itls; i++)
            out[i] = s->itls[i];
        return s->n_itls;
    case REPORT_N: break;
    }
    return 0;
}

struct edge {
    double at;
    int step;
};

/* At equal times departures come first: intervals are half-open. */
static int by_time(const void *a, const void *b)
{
    const struct edge *x = a, *y = b;
    if (x->at < y->at || x->at > y->at)
        return x->at < y->at ? -1 : 1;
    return x->step - y->step;
}

static int32_t peak_concurrency(const struct bench_sample *samples, int32_t n)
{
    struct edge *edges = mem_zalloc((size_t)n * 2 + 1, sizeof *edges);
    int32_t n_edges = 0, now = 0, peak = 0;
    for (int32_t i = 0; i < n; i++) {
        if (!samples[i].ok)
            continue;
        edges[n_edges++] = (struct edge){samples[i].start_s, 1};
        edges[n_edges++] = (struct edge){samples[i].start_s + samples[i].latency_s, -1};
    }
    qsort(edges, (size_t)n_edges, sizeof *edges, by_time);
    for (int32_t i = 0; i < n_edges; i++) {
        now += edges[i].step;
        peak = now > peak ? now : peak;
    }
    mem_free(edges);
    return peak;
}

/* Tokens of one sample per second since `from`. A message may carry several tokens (a slow reader's
 * are merged), so its tokens are spread over its messages evenly. */
static void add_tokens(const struct bench_sample *s, double from, double *bins, int32_t n_bins)
{
    double at = s->start_s + s->ttft_s - from;
    double each = (double)s->output_len / (s->n_itls + 1);
    for (int32_t i = 0; i <= s->n_itls; i++) {
        if (i > 0)
            at += s->itls[i - 1];
        if (at >= 0.0 && at < n_bins)
            bins[(int32_t)at] += each;
    }
}

static double peak_tokens(const struct bench_sample *samples, int32_t n)
{
    double from = HUGE_VAL, to = 0.0, peak = 0.0;
    for (int32_t i = 0; i < n; i++) {
        if (samples[i].ok) {
            from = fmin(from, samples[i].start_s);
            to = fmax(to, samples[i].start_s + samples[i].latency_s);
        }
    }
    if (!isfinite(from))
        return 0.0;
    int32_t n_bins = (int32_t)ceil(to - from) + 1;
    double *bins = mem_zalloc((size_t)n_bins, sizeof *bins);
    for (int32_t i = 0; i < n; i++) {
        if (samples[i].ok)
            add_tokens(&samples[i], from, bins, n_bins);
    }
    for (int32_t i = 0; i < n_bins; i++)
        peak = fmax(peak, bins[i]);
    mem_free(bins);
    return peak;
}

static void totals(struct report *out, const struct bench_sample *samples, int32_t n,
                   const struct report_options *o)
{
    uint64_t reachable = 0, kept = 0;
    int32_t good = 0;
    for (int32_t i = 0; i < n; i++) {
        const struct bench_sample *s = &samples[i];
        if (!s->ok) {
            out->failed++;
            continue;
        }
        out->completed++;
        out->total_input += s->input_len;
        out->total_output += s->output_len;
        out->total_cached += s->cached;
        out->preemptions += s->preemptions;
        reachable += s->reachable;
        kept += s->kept;
        good += is_good(s, &o->slo);
    }
    double d = o->duration_s > 0.0 ? o->duration_s : HUGE_VAL;
    out->density = reachable ? (double)kept / (double)reachable : 1.0;
    out->request_throughput = out->completed / d;
    out->request_goodput = good / d;
    out->output_throughput = (double)out->total_output / d;
    out->total_token_throughput = (double)(out->total_input + out->total_output) / d;
}

enum { ALL_CLASSES = -1 };

static bool is_of(const struct bench_sample *s, int32_t class)
{
    return class == ALL_CLASSES || s->class == class;
}

/* Every metric of a class's samples; values is scratch for all of them. */
static void all_series(struct report_series out[REPORT_N], const struct bench_sample *samples,
                       int32_t n, int32_t class, double *values, const struct report_options *o)
{
    for (int m = 0; m < REPORT_N; m++) {
        int32_t n_values = 0;
        for (int32_t i = 0; i < n; i++) {
            if (samples[i].ok && is_of(&samples[i], class))
                n_values += values_of(&samples[i], (enum report_metric)m, values + n_values);
        }
        summarise(&out[m], values, n_values, o);
    }
}

static void class_totals(struct report_class *out, const struct bench_sample *samples, int32_t n,
                         int32_t class)
{
    uint64_t reachable = 0, kept = 0;
    for (int32_t i = 0; i < n; i++) {
        const struct bench_sample *s = &samples[i];
        if (!is_of(s, class))
            continue;
        out->completed += s->ok;
        out->failed += !s->ok;
        reachable += s->ok ? s->reachable : 0;
        kept += s->ok ? s->kept : 0;
    }
    out->density = reachable ? (double)kept / (double)reachable : 1.0;
}

void report_compute(struct report *out, const struct bench_sample *samples, int32_t n,
                    const struct report_options *o)
{
    size_t room = 1;
    *out = (struct report){0};
    totals(out, samples, n, o);
    out->peak_output = peak_tokens(samples, n);
    out->peak_concurrent = peak_concurrency(samples, n);
    for (int32_t i = 0; i < n; i++)
        room += (size_t)samples[i].n_itls + 1;
    double *values = mem_zalloc(room, sizeof *values);
    all_series(out->series, samples, n, ALL_CLASSES, values, o);
    for (int32_t c = 0; c < o->n_classes; c++) {
        class_totals(&out->classes[c], samples, n, c);
        all_series(out->classes[c].series, samples, n, c, values, o);
    }
    mem_free(values);
}
