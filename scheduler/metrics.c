#include "scheduler/metrics.h"

#include "core/err.h"

#include <ctype.h>
#include <inttypes.h>
#include <string.h>

/* Bucket bounds are vLLM's. */
static const double ttft_bounds[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                     1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
static const double itl_bounds[] = {.01, .025, .05, .075, .1,  .15, .2, .3, .4, .5,
                                    .75, 1,    2.5, 5,    7.5, 10,  20, 40, 80};
static const double latency_bounds[] = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                        30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
static const double token_bounds[] = {1,     2,      5,      10,     20,     50,    100,
                                      200,   500,    1000,   2000,   5000,   10000, 20000,
                                      50000, 100000, 200000, 500000, 1000000};
static const double iteration_bounds[] = {1,   8,    16,   32,   64,   128,  256,
                                          512, 1024, 2048, 4096, 8192, 16384};
static const double step_bounds[] = {.0001, .0005, .001, .0025, .005, .01, .025, .05,
                                     .1,    .25,   .5,   1,     2.5,  5,   10,   60};
static const double schedule_bounds[] = {.000005, .00001, .000025, .00005, .0001,
                                         .00025,  .0005,  .001,    .01,    .1};

#define HIST(h, table)                                                                             \
    do {                                                                                           \
        (h).bounds = (table);                                                                      \
        (h).n = (int)(sizeof(table) / sizeof *(table));                                            \
    } while (0)

void metrics_init(struct metrics *m)
{
    memset(m, 0, sizeof *m);
    HIST(m->ttft, ttft_bounds);
    HIST(m->itl, itl_bounds);
    HIST(m->e2e, latency_bounds);
    HIST(m->queue, latency_bounds);
    HIST(m->prefill, latency_bounds);
    HIST(m->decode, latency_bounds);
    HIST(m->prompt_tokens, token_bounds);
    HIST(m->generation_tokens, token_bounds);
    HIST(m->max_tokens, token_bounds);
    HIST(m->iteration_tokens, iteration_bounds);
    HIST(m->step, step_bounds);
    HIST(m->schedule, schedule_bounds);
}

void metrics_observe(struct metrics_hist *h, double v)
{
    int i = 0;
    while (i < h->n && v > h->bounds[i])
        i++;
    h->counts[i]++;
    h->sum += v;
}

void metrics_error(struct metrics *m, int code)
{
    m->n_failed++;
    for (int i = 0; i < m->n_errors; i++) {
        if (m->errors[i].code == code) {
            m->errors[i].count++;
            return;
        }
    }
    if (m->n_errors < METRICS_MAX_ERRORS)
        m->errors[m->n_errors++] = (struct metrics_error){code, 1};
}

static double seconds(int64_t from, int64_t to)
{
    return (double)(to - from) * 1e-6;
}

void metrics_finish(struct metrics *m, const struct request *r, int64_t now_us)
{
    metrics_observe(&m->e2e, seconds(r->submit_us, now_us));
    metrics_observe(&m->prompt_tokens, r->n_prompt);
    metrics_observe(&m->generation_tokens, req_generated(r));
    metrics_observe(&m->max_tokens, r->max_total - r->n_prompt);
    if (r->scheduled_us)
        metrics_observe(&m->queue, seconds(r->submit_us, r->scheduled_us));
    if (r->first_token_us) {
        metrics_observe(&m->prefill, seconds(r->scheduled_us, r->first_token_us));
        metrics_observe(&m->decode, seconds(r->first_token_us, r->last_token_us));
    }
}

/* A label value: quotes, backslashes and control characters cannot leave it. */
static void write_label(const char *s, FILE *to)
{
    for (; *s; s++) {
        if (*s == '"' || *s == '\\')
            (void)fputc('\\', to);
        (void)fputc(iscntrl((unsigned char)*s) ? '_' : *s, to);
    }
}

struct writer {
    FILE *to;
    const char *model;
};

static void labels(const struct writer *w, const char *extra)
{
    (void)fputs("{model_name=\"", w->to);
    write_label(w->model, w->to);
    (void)fprintf(w->to, "\",engine=\"0\"%s%s}", *extra ? "," : "", extra);
}

static void head(const struct writer *w, const char *name, const char *type, const char *help)
{
    (void)fprintf(w->to, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void sample(const struct writer *w, const char *name, const char *extra, double v)
{
    (void)fputs(name, w->to);
    labels(w, extra);
    (void)fprintf(w->to, " %.17g\n", v);
}

static void scalar(const struct writer *w, const char *name, const char *type, const char *help,
                   double v)
{
    head(w, name, type, help);
    sample(w, name, "", v);
}

static void histogram(const struct writer *w, const char *name, const char *help,
                      const struct metrics_hist *h)
{
    char line[96], le[48];
    uint64_t total = 0;
    head(w, name, "histogram", help);
    for (int i = 0; i <= h->n; i++) {
        total += h->counts[i];
        if (i < h->n)
            (void)snprintf(le, sizeof le, "le=\"%.9g\"", h->bounds[i]);
        else
            (void)snprintf(le, sizeof le, "le=\"+Inf\"");
        (void)snprintf(line, sizeof line, "%s_bucket", name);
        sample(w, line, le, (double)total);
    }
    (void)snprintf(line, sizeof line, "%s_sum", name);
    sample(w, line, "", h->sum);
    (void)snprintf(line, sizeof line, "%s_count", name);
    sample(w, line, "", (double)total);
}

static void write_gauges(const struct writer *w, const struct metrics_view *v)
{
    char info[128];
    const struct kv_cache_stats *kv = &v->kv;
    scalar(w, "vllm:num_requests_running", "gauge", "Requests in a batch.", v->sched.n_running);
    scalar(w, "vllm:num_requests_waiting", "gauge", "Requests in the queue.", v->sched.n_waiting);
    scalar(w, "vllm:kv_cache_usage_perc", "gauge", "Share of cache pages in use, 0 to 1.",
           kv->n_pages ? (double)kv->used_pages / kv->n_pages : 0);
    head(w, "vllm:cache_config_info", "gauge", "Cache configuration.");
    (void)snprintf(info, sizeof info, "block_size=\"%d\",cache_dtype=\"%s\",num_gpu_blocks=\"%d\"",
                   KV_PAGE_TOKENS, v->cache_dtype, kv->n_pages);
    sample(w, "vllm:cache_config_info", info, 1);
    scalar(w, "sluice_queue_tokens", "gauge", "Prompt tokens waiting.",
           (double)v->sched.waiting_tokens);
    scalar(w, "sluice_kv_pages_peak", "gauge", "Most pages ever in use at once.",
           kv->peak_used_pages);
    scalar(w, "sluice_clients", "gauge", "Open connections.", v->n_clients);
    scalar(w, "sluice_client_outbuf_bytes", "gauge", "Bytes not yet taken by clients.",
           (double)v->outbuf_bytes);
    scalar(w, "sluice_step_age_seconds", "gauge",
           "Time since the last finished step while work exists.", v->step_age);
}

static void write_counters(const struct writer *w, const struct metrics_view *v)
{
    const struct sched_stats *s = &v->sched;
    char label[64];
    scalar(w, "vllm:prompt_tokens_total", "counter", "Prompt tokens of admitted requests.",
           (double)s->prompt_tokens);
    scalar(w, "vllm:generation_tokens_total", "counter", "Tokens generated.",
           (double)s->generated_tokens);
    scalar(w, "vllm:num_preemptions_total", "counter", "Preemptions.", (double)s->n_preempted);
    scalar(w, "vllm:prefix_cache_queries_total", "counter", "Tokens looked up in the prefix cache.",
           (double)v->kv.query_tokens);
    scalar(w, "vllm:prefix_cache_hits_total", "counter", "Tokens found in the prefix cache.",
           (double)v->kv.hit_tokens);
    head(w, "vllm:request_success_total", "counter", "Finished requests by reason.");
    for (int f = REQ_FINISH_STOP; f <= REQ_FINISH_SHUTDOWN; f++) {
        (void)snprintf(label, sizeof label, "finished_reason=\"%s\"",
                       req_finish_name((enum req_finish)f));
        sample(w, "vllm:request_success_total", label, (double)s->finished[f]);
    }
    head(w, "sluice_requests_rejected_total", "counter", "Requests refused or failed, by error.");
    for (int i = 0; i < v->m->n_errors; i++) {
        (void)snprintf(label, sizeof label, "code=\"%s\"", err_name(v->m->errors[i].code));
        sample(w, "sluice_requests_rejected_total", label, (double)v->m->errors[i].count);
    }
    scalar(w, "sluice_steps_total", "counter", "Steps run.", (double)s->n_steps);
    scalar(w, "sluice_attention_seconds_total", "counter", "Device time in attention.",
           (double)v->m->attention_us * 1e-6);
    scalar(w, "sluice_gemm_seconds_total", "counter", "Device time in matrix products.",
           (double)v->m->gemm_us * 1e-6);
    scalar(w, "sluice_host_seconds_total", "counter",
           "Host time of steps: planning, packing, launching.", (double)v->m->host_us * 1e-6);
    scalar(w, "sluice_sparse_blocks_total", "counter",
           "Pages causally reachable by what is computed, over layers, heads and row groups.",
           (double)s->counts.reachable);
    scalar(w, "sluice_sparse_blocks_visited_total", "counter", "Of those, scored.",
           (double)s->counts.visited);
    scalar(w, "sluice_sparse_blocks_kept_total", "counter", "Of those, used.",
           (double)s->counts.kept);
    scalar(w, "sluice_lost_mass_samples_total", "counter",
           "Prompt rows and heads whose lost softmax mass was measured.",
           (double)s->counts.sampled);
    scalar(w, "sluice_lost_mass_total", "counter", "Lost softmax mass, summed over those.",
           s->counts.lost);
    scalar(w, "sluice_decode_blocks_total", "counter",
           "The same of generated tokens: pages reachable, over layers and heads.",
           (double)s->decode_counts.reachable);
    scalar(w, "sluice_decode_blocks_kept_total", "counter", "Of those, used.",
           (double)s->decode_counts.kept);
}

void metrics_write(const struct metrics_view *v, FILE *to)
{
    const struct writer w = {to, v->model_name};
    const struct metrics *m = v->m;

    write_gauges(&w, v);
    write_counters(&w, v);
    histogram(&w, "vllm:time_to_first_token_seconds", "Submission to first token.", &m->ttft);
    histogram(&w, "vllm:inter_token_latency_seconds", "Between tokens of one request.", &m->itl);
    histogram(&w, "vllm:e2e_request_latency_seconds", "Submission to the end.", &m->e2e);
    histogram(&w, "vllm:request_queue_time_seconds", "Submission to first scheduling.", &m->queue);
    histogram(&w, "vllm:request_prefill_time_seconds", "First scheduling to first token.",
              &m->prefill);
    histogram(&w, "vllm:request_decode_time_seconds", "First to last token.", &m->decode);
    histogram(&w, "vllm:request_prompt_tokens", "Prompt length.", &m->prompt_tokens);
    histogram(&w, "vllm:request_generation_tokens", "Generated length.", &m->generation_tokens);
    histogram(&w, "vllm:request_params_max_tokens", "Generation limit asked for.", &m->max_tokens);
    histogram(&w, "vllm:iteration_tokens_total", "Tokens a step.", &m->iteration_tokens);
    histogram(&w, "sluice_step_duration_seconds", "Time of a step.", &m->step);
    histogram(&w, "sluice_schedule_duration_seconds", "Host time to plan and to apply a step.",
              &m->schedule);
}
