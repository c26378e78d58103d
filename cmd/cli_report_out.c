#include "cmd/cli_report.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <string.h>

/* Label, JSON name and heading of each series, in the order of enum report_metric. */
static const struct {
    const char *label, *key, *heading;
} names[REPORT_N] = {
    {"TTFT", "ttft", "Time to First Token"},
    {"TPOT", "tpot", "Time per Output Token (excl. 1st token)"},
    {"ITL", "itl", "Inter-token Latency"},
    {"E2EL", "e2el", "End-to-end Latency"},
    {"Client Queue Time", "client_queue_time", "Client-side Queueing"},
};

static void line_int(FILE *to, const char *label, int64_t value)
{
    (void)fprintf(to, "%-40s %-10lld\n", label, (long long)value);
}

static void line_real(FILE *to, const char *label, double value)
{
    (void)fprintf(to, "%-40s %-10.2f\n", label, value);
}

static void heading(FILE *to, const char *text, char fill)
{
    int n = (int)strlen(text), left = (50 - n) / 2, right = 50 - n - left;
    for (int i = 0; i < left; i++)
        (void)fputc(fill, to);
    (void)fputs(text, to);
    for (int i = 0; i < right; i++)
        (void)fputc(fill, to);
    (void)fputc('\n', to);
}

/* all: every metric of all requests, or of a class. */
static void print_series(const struct report_series *all, const struct report_options *o, int m,
                         FILE *to)
{
    char label[64];
    const struct report_series *s = &all[m];
    heading(to, names[m].heading, '-');
    (void)snprintf(label, sizeof label, "Mean %s (ms):", names[m].label);
    line_real(to, label, s->mean);
    (void)snprintf(label, sizeof label, "Median %s (ms):", names[m].label);
    line_real(to, label, s->median);
    for (int32_t i = 0; i < o->n_percentiles; i++) {
        (void)snprintf(label, sizeof label, "P%g %s (ms):", o->percentiles[i], names[m].label);
        line_real(to, label, s->percentiles[i]);
    }
}

static void print_all_series(const struct report_series *all, const struct report_options *o,
                             FILE *to)
{
    for (int m = 0; m < REPORT_N; m++) {
        if (m != REPORT_QUEUE || o->max_concurrency)
            print_series(all, o, m, to);
    }
}

static void print_class(const struct report_class *c, const struct load_class *is,
                        const struct report_options *o, FILE *to)
{
    char title[64];
    (void)snprintf(title, sizeof title, " Prompts of %d, %d generated ", is->input_len,
                   is->output_len);
    heading(to, title, '=');
    line_int(to, "Successful requests:", c->completed);
    line_int(to, "Failed requests:", c->failed);
    (void)fprintf(to, "%-40s %-10.4f\n", "Measured density:", c->density);
    print_all_series(c->series, o, to);
}

void report_print(const struct report *r, const struct report_options *o, FILE *to)
{
    heading(to, " Serving Benchmark Result ", '=');
    line_int(to, "Successful requests:", r->completed);
    line_int(to, "Failed requests:", r->failed);
    if (o->max_concurrency)
        line_int(to, "Maximum request concurrency:", o->max_concurrency);
    if (isfinite(o->request_rate))
        line_real(to, "Request rate configured (RPS):", o->request_rate);
    line_real(to, "Benchmark duration (s):", o->duration_s);
    line_int(to, "Total input tokens:", r->total_input);
    line_int(to, "Total generated tokens:", r->total_output);
    line_real(to, "Request throughput (req/s):", r->request_throughput);
    if (o->slo.any)
        line_real(to, "Request goodput (req/s):", r->request_goodput);
    line_real(to, "Output token throughput (tok/s):", r->output_throughput);
    line_real(to, "Peak output token throughput (tok/s):", r->peak_output);
    line_real(to, "Peak concurrent requests:", r->peak_concurrent);
    line_real(to, "Total token throughput (tok/s):", r->total_token_throughput);
    print_all_series(r->series, o, to);
    heading(to, "Attention and Prefix Cache", '-');
    (void)fprintf(to, "%-40s %-10.4f\n", "Measured density:", r->density);
    line_int(to, "Prefix cache hit tokens:", r->total_cached);
    line_real(to, "Prefix cache hit rate (%):",
              r->total_input ? 100.0 * (double)r->total_cached / (double)r->total_input : 0.0);
    line_int(to, "Preemptions:", r->preemptions);
    for (int32_t c = 0; c < o->n_classes; c++)
        print_class(&r->classes[c], &o->classes[c], o, to);
    heading(to, "", '=');
}

static json_t *lists(const struct bench_sample *samples, int32_t n)
{
    static const char *const keys[] = {"input_lens", "output_lens", "cached_lens", "ttfts",
                                       "latencies",  "start_times", "queue_times", "densities"};
    enum { N_KEYS = sizeof keys / sizeof keys[0] };
    json_t *out = json_object(), *list[N_KEYS], *itls = json_array(), *errors = json_array();
    for (int k = 0; k < N_KEYS; k++) {
        list[k] = json_array();
        (void)json_object_set_new(out, keys[k], list[k]);
    }
    (void)json_object_set_new(out, "itls", itls);
    (void)json_object_set_new(out, "errors", errors);
    for (int32_t i = 0; i < n; i++) {
        const struct bench_sample *s = &samples[i];
        double density = s->reachable ? (double)s->kept / (double)s->reachable : 1.0;
        json_t *gaps = json_array();
        json_t *values[N_KEYS] = {json_integer(s->input_len), json_integer(s->output_len),
                                  json_integer(s->cached),    json_real(s->ttft_s),
                                  json_real(s->latency_s),    json_real(s->start_s),
                                  json_real(s->queue_s),      json_real(density)};
        for (int k = 0; k < N_KEYS; k++)
            (void)json_array_append_new(list[k], values[k]);
        for (int32_t j = 0; j < s->n_itls; j++)
            (void)json_array_append_new(gaps, json_real(s->itls[j]));
        (void)json_array_append_new(itls, gaps);
        (void)json_array_append_new(errors, json_string(s->error));
    }
    return out;
}

static void json_series(json_t *out, const struct report_series *all,
                        const struct report_options *o)
{
    char key[64];
    for (int m = 0; m < REPORT_N; m++) {
        const struct report_series *s = &all[m];
        if (m == REPORT_QUEUE && !o->max_concurrency)
            continue;
        (void)snprintf(key, sizeof key, "mean_%s_ms", names[m].key);
        (void)json_object_set_new(out, key, json_real(s->mean));
        (void)snprintf(key, sizeof key, "median_%s_ms", names[m].key);
        (void)json_object_set_new(out, key, json_real(s->median));
        (void)snprintf(key, sizeof key, "std_%s_ms", names[m].key);
        (void)json_object_set_new(out, key, json_real(s->std));
        for (int32_t i = 0; i < o->n_percentiles; i++) {
            (void)snprintf(key, sizeof key, "p%g_%s_ms", o->percentiles[i], names[m].key);
            (void)json_object_set_new(out, key, json_real(s->percentiles[i]));
        }
    }
}

static json_t *json_classes(const struct report *r, const struct report_options *o)
{
    json_t *list = json_array();
    for (int32_t i = 0; i < o->n_classes; i++) {
        const struct report_class *c = &r->classes[i];
        json_t *out = json_pack("{s:i, s:i, s:i, s:i, s:f}", "input_len", o->classes[i].input_len,
                                "output_len", o->classes[i].output_len, "completed", c->completed,
                                "failed", c->failed, "density", c->density);
        json_series(out, c->series, o);
        (void)json_array_append_new(list, out);
    }
    return list;
}

int report_write_json(const struct report *r, const struct report_options *o,
                      const struct bench_sample *samples, int32_t n, const char *path,
                      struct err_msg *why)
{
    json_t *goodput = o->slo.any ? json_real(r->request_goodput) : json_null();
    json_t *rate = isfinite(o->request_rate) ? json_real(o->request_rate) : json_string("inf");
    json_t *concurrency = o->max_concurrency ? json_integer(o->max_concurrency) : json_null();
    json_t *out = json_pack(
        "{s:f, s:i, s:i, s:I, s:I, s:f, s:o, s:f, s:f, s:f, s:i, s:o, s:o, s:f, s:I, s:I}",
        "duration", o->duration_s, "completed", r->completed, "failed", r->failed,
        "total_input_tokens", (json_int_t)r->total_input, "total_output_tokens",
        (json_int_t)r->total_output, "request_throughput", r->request_throughput, "request_goodput",
        goodput, "output_throughput", r->output_throughput, "total_token_throughput",
        r->total_token_throughput, "max_output_tokens_per_s", r->peak_output,
        "max_concurrent_requests", r->peak_concurrent, "request_rate", rate, "max_concurrency",
        concurrency, "density", r->density, "cached_tokens", (json_int_t)r->total_cached,
        "preemptions", (json_int_t)r->preemptions);
    json_series(out, r->series, o);
    if (o->n_classes)
        (void)json_object_set_new(out, "classes", json_classes(r, o));
    json_t *per_request = lists(samples, n);
    (void)json_object_update(out, per_request);
    json_decref(per_request);
    int err = strcmp(path, "-") == 0 ? json_dumpf(out, stdout, JSON_INDENT(1))
                                     : json_dump_file(out, path, JSON_INDENT(1));
    json_decref(out);
    return err < 0 ? err_set(why, -errno, "cannot write %s: %s", path, err_str(-errno)) : 0;
}
