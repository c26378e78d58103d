/* What one step costs the loop thread: sched_plan + sched_update at 256 running requests, on one
 * core, with an executor that only fills in tokens. Each row keeps the batch full: who finishes is
 * replaced, and `waiting` more stand in the queue. Time is taken per step, submit separately.
 *
 *   bench_scheduler [--json] [steps]      microseconds: median, 90th and 99th percentile, largest
 */
#include "core/mem.h"
#include "scheduler/scheduler.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { RUNNING = 256, BUDGET = 2048 + RUNNING, STEPS = 3000, MAX_PROMPT = 32768 };

struct row {
    const char *name;
    int32_t prompt;  /* tokens, +- a quarter */
    int32_t hit;     /* percent of the prompt that all requests share */
    int32_t out;     /* tokens generated, +- a half */
    int32_t waiting; /* kept in the queue beyond the batch */
    int32_t tenants;
    int32_t slots; /* 0: RUNNING; more: the pool, just large enough for RUNNING, is the limit */
};

/* Outputs are long enough for the prefills of the replacements to keep up. */
static const struct row rows[] = {
    {"decode only", 512, 0, 1 << 20, 0, 1, 0},
    {"decode, 32 waiting", 512, 0, 1 << 20, 32, 1, 0},
    {"512-token prompts", 512, 0, 256, 32, 4, 0},
    {"4K prompts", 4096, 0, 1024, 32, 4, 0},
    {"4K prompts, 90% cached", 4096, 90, 256, 32, 4, 0},
    {"32K prompts", 32768, 0, 8192, 32, 4, 0},
    {"32K prompts, 90% cached", 32768, 90, 1024, 32, 4, 0},
    {"pool full, head blocked", 512, 0, 256, 96, 4, 320},
    {"256 tenants", 512, 0, 256, 32, 256, 0},
    {"10,000 waiting, 1,000 tenants", 512, 0, 256, 10000, 1000, 0},
};
enum { N_ROWS = sizeof rows / sizeof *rows };

struct bench {
    const struct row *row;
    struct kv_cache *kv;
    struct sched *sched;
    struct batch_result result;
    int32_t *prompt; /* shared part first */
    uint64_t rng;
    int64_t submit_ns, n_submits;
    uint64_t n_events;
};

struct figures {
    double p50, p90, p99, max, submit, running;
};

static int64_t now_ns(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static void must(int err, const struct err_msg *why)
{
    if (err < 0) {
        (void)fprintf(stderr, "bench_scheduler: %s\n", err_why(why, err));
        exit(1); // NOLINT(concurrency-mt-unsafe)
    }
}

static int32_t draw(struct bench *b, int32_t lo, int32_t hi)
{
    b->rng = b->rng * 6364136223846793005u + 1442695040888963407u;
    return lo + (int32_t)((b->rng >> 33) % (uint64_t)(hi - lo + 1));
}

static void on_event(void *ctx, const struct request *r)
{
    (void)r;
    ((struct bench *)ctx)->n_events++;
}

static void on_token(void *ctx, const struct request *r, const struct batch_token *t)
{
    (void)t;
    on_event(ctx, r);
}

static void submit(struct bench *b)
{
    const struct row *w = b->row;
    int32_t n = draw(b, w->prompt - w->prompt / 4, w->prompt);
    int32_t shared = (int32_t)((int64_t)w->prompt * 3 / 4 * w->hit / 100);
    for (int i = 0; i < 4 && shared + i < n; i++) /* enough to part ways */
        b->prompt[shared + i] = draw(b, 0, 1 << 20);
    struct req_params p = {.prompt = b->prompt,
                           .n_prompt = n,
                           .max_tokens = draw(b, w->out / 2, w->out + w->out / 2),
                           .sampling = {.ignore_eos = true}};
    struct err_msg why = {""};
    struct request *r;
    (void)snprintf(p.tenant, sizeof p.tenant, "t%d", draw(b, 1, w->tenants));
    int64_t t = now_ns();
    must(sched_submit(b->sched, &p, t / 1000, &r, &why), &why);
    b->submit_ns += now_ns() - t;
    b->n_submits++;
}

static void refill(struct bench *b)
{
    struct sched_stats st;
    sched_get_stats(b->sched, &st);
    for (int32_t n = st.n_running + st.n_waiting; n < RUNNING + b->row->waiting; n++)
        submit(b);
}

/* One step; the time inside the scheduler. */
static int64_t step(struct bench *b)
{
    int64_t t = now_ns();
    const struct batch *batch = sched_plan(b->sched, t / 1000);
    int64_t plan = now_ns() - t;
    for (int32_t i = 0; i < batch->n_seqs; i++)
        b->result.tokens[i].token = batch->seqs[i].sample ? 7 : -1;
    t = now_ns();
    sched_update(b->sched, 0, &b->result, t / 1000);
    return plan + now_ns() - t;
}

static void open_bench(struct bench *b, const struct row *w)
{
    int32_t longest = w->prompt + (w->out > MAX_PROMPT ? MAX_PROMPT : 2 * w->out);
    int32_t pages = kv_pages_for(longest);
    int32_t slots = w->slots ? w->slots : RUNNING;
    const struct kv_cache_config kv = {.n_pages = w->slots ? RUNNING * pages * 5 / 8
                                                           : (RUNNING + 8) * pages,
                                       .max_seqs = slots,
                                       .max_pages_per_seq = pages,
                                       .prefix_cache = true};
    const struct sched_config cfg = {.max_running = slots,
                                     .token_budget = BUDGET,
                                     .max_partial_prefills = 4,
                                     .max_long_partial = 2,
                                     .long_prefill_tokens = 4096,
                                     .watermark_pages = kv.n_pages / 100,
                                     .max_queued = 20000,
                                     .max_queued_tokens = (int64_t)1 << 40,
                                     .max_model_len = longest};
    const struct sched_events ev = {on_event, on_token, on_event, b};
    struct err_msg why = {""};
    *b = (struct bench){.row = w, .rng = 1};
    b->prompt = mem_zalloc(MAX_PROMPT + 4, sizeof *b->prompt);
    b->result.tokens = mem_zalloc((size_t)slots, sizeof *b->result.tokens);
    b->result.counts = mem_zalloc((size_t)slots, sizeof *b->result.counts);
    must(kv_cache_create(&b->kv, &kv, &why), &why);
    must(sched_create(&b->sched, &cfg, b->kv, &ev, &why), &why);
}

static void close_bench(struct bench *b)
{
    sched_destroy(b->sched);
    kv_cache_destroy(b->kv);
    mem_free(b->prompt);
    mem_free(b->result.tokens);
    mem_free(b->result.counts);
}

static int by_time(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Until the batch is full of requests of all ages. */
static void warm_up(struct bench *b)
{
    struct sched_stats st = {.n_running = 0};
    for (int i = 0; i < 1000 || (st.n_running < RUNNING - 4 && i < 20000); i++) {
        refill(b);
        (void)step(b);
        sched_get_stats(b->sched, &st);
    }
    b->submit_ns = b->n_submits = 0;
}

/* Of sorted times. */
static double percentile_us(const int64_t *ns, int32_t n, int32_t percent)
{
    int32_t at = (n - 1) * percent / 100;
    return (double)ns[at] / 1e3;
}

static struct figures measure(const struct row *w, int32_t n_steps)
{
    int64_t *ns = mem_zalloc((size_t)n_steps, sizeof *ns), running = 0;
    struct sched_stats st;
    struct bench b = {.row = w};
    open_bench(&b, w);
    warm_up(&b);
    for (int32_t i = 0; i < n_steps; i++) {
        refill(&b);
        ns[i] = step(&b);
        sched_get_stats(b.sched, &st);
        running += st.n_running;
    }
    qsort(ns, (size_t)n_steps, sizeof *ns, by_time);
    struct figures f = {
        .p50 = percentile_us(ns, n_steps, 50),
        .p90 = percentile_us(ns, n_steps, 90),
        .p99 = percentile_us(ns, n_steps, 99),
        .max = percentile_us(ns, n_steps, 100),
        .submit = b.n_submits ? (double)b.submit_ns / (double)b.n_submits / 1e3 : 0,
        .running = (double)running / n_steps,
    };
    close_bench(&b);
    mem_free(ns);
    return f;
}

static void print_row(const struct row *w, const struct figures *f, bool json, bool first)
{
    if (json) {
        printf("%s\n  {\"case\": \"%s\", \"running\": %.1f, \"waiting\": %d, \"p50_us\": %.2f, "
               "\"p90_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f, \"submit_us\": %.2f}",
               first ? "" : ",", w->name, f->running, w->waiting, f->p50, f->p90, f->p99, f->max,
               f->submit);
        return;
    }
    if (first)
        printf("%-30s %8s %8s %8s %8s %8s %8s %8s\n", "us per step", "running", "waiting", "p50",
               "p90", "p99", "max", "submit");
    printf("%-30s %8.1f %8d %8.2f %8.2f %8.2f %8.2f %8.2f\n", w->name, f->running, w->waiting,
           f->p50, f->p90, f->p99, f->max, f->submit);
}

int main(int argc, char **argv)
{
    int32_t n_steps = STEPS;
    bool json = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--json") == 0)
            json = true;
        else if (strtol(argv[i], NULL, 10) >= 100)
            n_steps = (int32_t)strtol(argv[i], NULL, 10);
        else {
            (void)fprintf(stderr, "usage: bench_scheduler [--json] [steps >= 100]\n");
            return 2;
        }
    }
    printf("%s", json ? "[" : "");
    for (int i = 0; i < N_ROWS; i++) {
        struct figures f = measure(&rows[i], n_steps);
        print_row(&rows[i], &f, json, i == 0);
        (void)fflush(stdout);
    }
    printf("%s", json ? "\n]\n" : "");
    return 0;
}
