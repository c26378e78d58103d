/* Speed of a model's steps: one prompt prefilled densely in chunks, then decode steps at several
 * batch sizes over that prompt's pages, with the time of each part and
 * the processor time of all.
 *
 *   bench_model DIR [prompt tokens] [chunk] [threads]      CSV: ms and tokens/s (medians for
 * decode) */
#include "bench/harness.h"
#include "core/mem.h"
#include "model/gemm.h"
#include "model/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_SEQS = 64, DECODE_STEPS = 15 };

static const struct batch_sampling greedy = {
    .top_p = 1.0f, .repetition_penalty = 1.0f, .ignore_eos = true};

struct bench {
    struct dev *dev;
    struct model *model;
    int32_t n_prompt, chunk;
    int32_t *tokens, *pages;
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
                              .pages = b->pages,
                              .n_pages = kv_pages_for(b->n_prompt + 1),
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

static void print_row(const char *what, int32_t n_seqs, int32_t n_tokens, const double us[3],
                      double cpu)
{
    printf("%s,%d,%d,%.2f,%.2f,%.2f,%.2f,%.2f,%.0f\n", what, n_seqs, n_tokens, us[0] / 1e3,
           us[1] / 1e3, us[2] / 1e3, (us[0] - us[1] - us[2]) / 1e3, cpu / 1e3,
           n_tokens * 1e6 / us[0]);
}

static void prefill(struct bench *b)
{
    double us[3] = {0};
    const double cpu = cpu_us();
    for (int32_t at = 0; at < b->n_prompt;) {
        int32_t n = b->n_prompt - at < b->chunk ? b->n_prompt - at : b->chunk;
        struct batch_seq s = input(b, at, n);
        step(b, &s, 1);
        us[0] += (double)b->r.total_us;
        us[1] += (double)b->r.gemm_us;
        us[2] += (double)b->r.attention_us;
        at += n;
    }
    print_row("prefill", 1, b->n_prompt, us, cpu_us() - cpu);
}

/* All sequences read the same pages and write the same last token: the work is that of a batch. */
static void decode(struct bench *b, int32_t n_seqs)
{
    double us[3][DECODE_STEPS], median[3];
    struct batch_seq seqs[MAX_SEQS];
    for (int32_t i = 0; i < n_seqs; i++)
        seqs[i] = input(b, b->n_prompt, 1);
    const double cpu = cpu_us();
    for (int k = 0; k < DECODE_STEPS; k++) {
        step(b, seqs, n_seqs);
        us[0][k] = (double)b->r.total_us;
        us[1][k] = (double)b->r.gemm_us;
        us[2][k] = (double)b->r.attention_us;
    }
    for (int i = 0; i < 3; i++)
        median[i] = bench_median(us[i], DECODE_STEPS);
    print_row("decode", n_seqs, n_seqs, median, (cpu_us() - cpu) / DECODE_STEPS);
}

static void open_bench(struct bench *b, const char *dir, int n_threads)
{
    struct err_msg why = {{0}};
    const int32_t n_pages = kv_pages_for(b->n_prompt + 1);
    must(dev_open(&b->dev, &dev_cpu, 0, n_threads, &why), &why);
    const struct model_config cfg = {.dir = dir,
                                     .dev = b->dev,
                                     .kv_dtype = DTYPE_BF16,
                                     .max_seqs = MAX_SEQS,
                                     .max_tokens = b->chunk > MAX_SEQS ? b->chunk : MAX_SEQS,
                                     .max_position = b->n_prompt + 1};
    must(model_open(&b->model, &cfg, &why), &why);
    must(model_take_pages(b->model, n_pages, &why), &why);
    b->tokens = mem_zalloc((size_t)b->n_prompt + 1, sizeof *b->tokens);
    for (int32_t i = 0; i <= b->n_prompt; i++)
        b->tokens[i] = (int32_t)(((uint32_t)i * 2654435761u >> 8) %
                                 (uint32_t)model_info(b->model)->vocab_size);
    b->pages = mem_zalloc((size_t)n_pages, sizeof *b->pages);
    for (int32_t i = 0; i < n_pages; i++)
        b->pages[i] = i;
    b->r.tokens = mem_zalloc(MAX_SEQS, sizeof *b->r.tokens);
    b->r.counts = mem_zalloc(MAX_SEQS, sizeof *b->r.counts);
}

int main(int argc, char **argv)
{
    struct bench b = {.n_prompt = argc > 2 ? atoi(argv[2]) : 16384, // NOLINT(cert-err34-c)
                      .chunk = argc > 3 ? atoi(argv[3]) : 2048};    // NOLINT(cert-err34-c)
    char cpu[128], date[64];
    if (argc < 2 || b.n_prompt < 1 || b.chunk < 1) {
        (void)fprintf(stderr, "usage: bench_model DIR [prompt tokens] [chunk] [threads]\n");
        return 2;
    }
    open_bench(&b, argv[1], argc > 4 ? atoi(argv[4]) : 0); // NOLINT(cert-err34-c)
    bench_cpu_name(cpu, sizeof cpu);
    bench_date(date, sizeof date);
    printf("# %s, %s, OpenBLAS %s, %s, chunk %d, bf16 cache\n", date, cpu, gemm_backend(),
           model_info(b.model)->name, b.chunk);
    printf("what,sequences,tokens,total_ms,gemm_ms,attention_ms,other_ms,cpu_ms,tokens_per_s\n");
    prefill(&b);
    for (int32_t n = 1; n <= MAX_SEQS; n *= 2)
        decode(&b, n);
    model_close(b.model);
    dev_close(b.dev);
    mem_free(b.tokens);
    mem_free(b.pages);
    mem_free(b.r.tokens);
    mem_free(b.r.counts);
    return 0;
}
