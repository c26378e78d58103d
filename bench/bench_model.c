/* Speed of a model's steps: one prompt prefilled densely in chunks, then decode steps at several
 * batch sizes, with the time of each part, the host's own part, and the processor time of all. CSV:
 * ms and tokens/s, medians for decode; also the bytes that a decode step has to read, each weight
 * and each key and value once, and their rate. */
#include "bench/harness.h"
#include "cmd/device.h"
#include "core/clock.h"
#include "core/conf.h"
#include "core/log.h"
#include "core/mem.h"
#include "model/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_SEQS = 64, DECODE_STEPS = 15, WARM_UP_US = 300000 };

struct options {
    char *model, *device;
    int64_t prompt, chunk, threads, tables;
    bool random, verbose;
};

#define AT(f) offsetof(struct options, f)

// clang-format off
static const struct conf_opt opts[] = {
    {"model", CONF_TEXT, AT(model), "models/needle", 0, 0, {0}, "DIR", "the model"},
    {"random-weights", CONF_BOOL, AT(random), "false", 0, 0, {0}, NULL, "read config.json only"},
    {"device", CONF_TEXT, AT(device), "cpu", 0, 0, {0}, "DEVICE", DEVICE_HELP},
    {"prompt", CONF_INT, AT(prompt), "16384", 1, 1e7, {0}, "N", "tokens"},
    {"chunk", CONF_INT, AT(chunk), "2048", 1, 1e6, {0}, "N", "tokens a step"},
    {"threads", CONF_INT, AT(threads), "0", 0, 1024, {0}, "N", "0: one a processor"},
    {"verbose", CONF_BOOL, AT(verbose), "false", 0, 0, {0}, NULL, "log what is tuned"},
    {"tables", CONF_INT, AT(tables), "1", 1, MAX_SEQS, {0}, "N",
     "page tables that decoding sequences have: 1 is the prompt's for all, more are empty pages"},
};
// clang-format on

static const struct conf_program program = {"bench_model [options]",
                                            "Times prefill and decode steps of a model.", opts,
                                            sizeof opts / sizeof *opts};

static const struct batch_sampling greedy = {
    .top_p = 1.0f, .repetition_penalty = 1.0f, .ignore_eos = true};

struct bench {
    struct dev *dev;
    struct model *model;
    int32_t n_prompt, chunk, n_tables;
    int32_t *tokens, *pages; /* [n_tables, pages of a sequence] */
    struct batch_result r;
};

static void must(int err, const struct err_msg *why)
{
    if (err < 0) {
        (void)fprintf(stderr, "bench_model: %s\n", err_why(why, err));
        exit(1); // NOLINT(concurrency-mt-unsafe)
    }
}

static void step(struct bench *b, const struct batch_seq *seqs, int32_t n)
{
    struct batch batch = {.n_seqs = n, .seqs = seqs};
    for (int32_t i = 0; i < n; i++)
        batch.n_tokens += seqs[i].n_tokens;
    must(model_step(b->model, &batch, &b->r), NULL);
}

static struct batch_seq input(const struct bench *b, int32_t start, int32_t n)
{
    return (struct batch_seq){.tokens = b->tokens,
                              .start = start,
                              .n_tokens = n,
                              .prompt_len = b->n_prompt,
                              .pages = b->pages, /* of table 0 */
                              .n_pages = kv_pages_for(b->n_prompt + KV_PAGE_TOKENS),
                              .sample = start + n >= b->n_prompt,
                              .sampling = &greedy};
}

/* Processor time of all threads, us: what the work costs, whoever else uses the machine. */
static double cpu_us(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (double)ts.tv_sec * 1e6 + (double)ts.tv_nsec / 1e3;
}

enum { TOTAL, GEMM, ATTENTION, HOST, N_TIMES };

static void print_row(const char *what, int32_t n_seqs, int32_t n_tokens, const double us[N_TIMES],
                      double cpu, double read_bytes)
{
    printf("%s,%d,%d,%.3f,%.3f,%.3f,%.3f,%.2f,%.0f", what, n_seqs, n_tokens, us[TOTAL] / 1e3,
           us[GEMM] / 1e3, us[ATTENTION] / 1e3, us[HOST] / 1e3, cpu / 1e3,
           n_tokens * 1e6 / us[TOTAL]);
    if (read_bytes > 0)
        printf(",%.3f,%.0f\n", read_bytes / 1e9, read_bytes / us[TOTAL] / 1e3);
    else
        printf(",,\n");
}

/* Where sequence i decodes: as in a served batch, all over a page, which the first one begins if
 * the prompt fills its last. */
static int32_t place_of(const struct bench *b, int32_t i)
{
    return b->n_prompt + i * 13 % KV_PAGE_TOKENS;
}

/* Of a decode step: all weights but the embedding, and the K and V of every sequence. */
static double step_bytes(const struct bench *b, int32_t n_seqs)
{
    const struct model_info *i = model_info(b->model);
    const double hidden = i->hidden_size, head_dim = i->head_dim;
    const double layer =
        hidden * head_dim * 2 * (i->n_heads + i->n_kv_heads) + 3 * hidden * i->intermediate_size;
    const double token = 2 * head_dim * i->n_kv_heads * i->n_layers;
    double tokens = 0;
    for (int32_t k = 0; k < n_seqs; k++)
        tokens += place_of(b, k) + 1.0;
    return (layer * i->n_layers + hidden * i->vocab_size) * (double)dtype_bytes(i->dtype) +
           tokens * token * (double)dtype_bytes(i->kv_dtype);
}

static void times_of(const struct batch_result *r, double us[N_TIMES])
{
    us[TOTAL] = (double)r->total_us;
    us[GEMM] = (double)r->gemm_us;
    us[ATTENTION] = (double)r->attention_us;
    us[HOST] = (double)r->host_us;
}

static void prefill(struct bench *b)
{
    double us[N_TIMES] = {0}, now[N_TIMES];
    const double cpu = cpu_us();
    for (int32_t at = 0; at < b->n_prompt;) {
        int32_t n = b->n_prompt - at < b->chunk ? b->n_prompt - at : b->chunk;
        struct batch_seq s = input(b, at, n);
        step(b, &s, 1);
        times_of(&b->r, now);
        for (int i = 0; i < N_TIMES; i++)
            us[i] += now[i];
        at += n;
    }
    print_row("prefill", 1, b->n_prompt, us, cpu_us() - cpu, 0);
}

/* Sequences of one table share its pages, and the first cleans what others write: the work is that
 * of a batch, the values are not. A GPU that has just computed a prompt at its limit of power runs
 * its first steps slower. */
static void decode(struct bench *b, int32_t n_seqs)
{
    double us[N_TIMES][DECODE_STEPS], median[N_TIMES], now[N_TIMES];
    struct batch_seq seqs[MAX_SEQS];
    for (int32_t i = 0; i < n_seqs; i++) {
        seqs[i] = input(b, place_of(b, i), 1);
        seqs[i].pages += (ptrdiff_t)(i % b->n_tables) * seqs[i].n_pages;
    }
    const int64_t start = clock_monotonic_us(NULL);
    do {
        step(b, seqs, n_seqs);
    } while (clock_monotonic_us(NULL) - start < WARM_UP_US);
    const double cpu = cpu_us();
    for (int k = 0; k < DECODE_STEPS; k++) {
        step(b, seqs, n_seqs);
        times_of(&b->r, now);
        for (int i = 0; i < N_TIMES; i++)
            us[i][k] = now[i];
    }
    for (int i = 0; i < N_TIMES; i++)
        median[i] = bench_median(us[i], DECODE_STEPS);
    print_row("decode", n_seqs, n_seqs, median, (cpu_us() - cpu) / DECODE_STEPS,
              step_bytes(b, n_seqs));
}

static void open_bench(struct bench *b, const struct options *o)
{
    struct err_msg why = {{0}};
    const int32_t n_pages = kv_pages_for(b->n_prompt + KV_PAGE_TOKENS) * b->n_tables;
    must(device_open(&b->dev, o->device, 0, (int)o->threads, &why), &why);
    const struct model_config cfg = {.dir = o->model,
                                     .random_weights = o->random,
                                     .dev = b->dev,
                                     .dtype = MODEL_DTYPE_AUTO,
                                     .kv_dtype =
                                         b->dev->ops == &dev_cpu ? DTYPE_BF16 : MODEL_DTYPE_AUTO,
                                     .max_seqs = MAX_SEQS,
                                     .max_tokens = b->chunk > MAX_SEQS ? b->chunk : MAX_SEQS,
                                     .max_position = b->n_prompt + KV_PAGE_TOKENS};
    must(model_open(&b->model, &cfg, &why), &why);
    must(model_take_pages(b->model, n_pages, &why), &why);
    b->tokens = mem_zalloc((size_t)b->n_prompt + KV_PAGE_TOKENS, sizeof *b->tokens);
    for (int32_t i = 0; i < b->n_prompt + KV_PAGE_TOKENS; i++)
        b->tokens[i] = (int32_t)(((uint32_t)i * 2654435761u >> 8) %
                                 (uint32_t)model_info(b->model)->vocab_size);
    b->pages = mem_zalloc((size_t)n_pages, sizeof *b->pages);
    for (int32_t i = 0; i < n_pages; i++)
        b->pages[i] = i;
    b->r.tokens = mem_zalloc(MAX_SEQS, sizeof *b->r.tokens);
    b->r.counts = mem_zalloc(MAX_SEQS, sizeof *b->r.counts);
}

static void run(const struct options *o)
{
    struct bench b = {
        .n_prompt = (int32_t)o->prompt, .chunk = (int32_t)o->chunk, .n_tables = (int32_t)o->tables};
    char cpu[128], date[64];
    open_bench(&b, o);
    const struct model_info *info = model_info(b.model);
    bench_cpu_name(cpu, sizeof cpu);
    bench_date(date, sizeof date);
    printf("# %s, %s, device %s, %s, %s, chunk %d, cache %s\n", date, cpu, b.dev->ops->name,
           info->name, dtype_name(info->dtype), b.chunk, dtype_name(info->kv_dtype));
    printf("what,sequences,tokens,total_ms,gemm_ms,attention_ms,host_ms,cpu_ms,tokens_per_s,"
           "read_gb,gb_per_s\n");
    for (int i = b.dev->ops == &dev_cpu; i < 2; i++) /* a GPU's first pass loads its kernels */
        prefill(&b);
    for (int32_t n = 1; n <= MAX_SEQS; n *= 2)
        decode(&b, n);
    model_close(b.model);
    dev_close(b.dev);
    mem_free(b.tokens);
    mem_free(b.pages);
    mem_free(b.r.tokens);
    mem_free(b.r.counts);
}

int main(int argc, char **argv)
{
    struct options o = {0};
    struct err_msg why = {{0}};
    conf_defaults(&program, &o);
    if (conf_wants_help(argc, argv)) {
        conf_help(&program, stdout);
        return 0;
    }
    int err = conf_args(&program, &o, argc, argv, NULL, 0, NULL, &why);
    if (err < 0) {
        (void)fprintf(stderr, "bench_model: %s\n", err_why(&why, err));
        return 2;
    }
    log_set_level(o.verbose ? LOG_DEBUG : LOG_WARN);
    run(&o);
    conf_free(&program, &o);
    return 0;
}
