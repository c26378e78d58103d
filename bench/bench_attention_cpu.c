/* The CPU attention beside OpenBLAS sgemm on the same cores in the same run.
 *
 * One layer, a prompt of --tokens in one call, structured random tensors (sink, topics, noise).
 * ABS thresholds come from the calibration rule on the same tensors: tile_max of a dense run, then
 * per query block the midpoint of the k-th and (k+1)-th largest page maximum, k chosen so that
 * sum(min(k, A_i) + diag) / sum(A_i + diag) is the target density. ln(lambda) of REL is bisected to
 * the same density. The last query block of every variant is checked against the double-precision
 * oracle before anything is timed.
 *
 * GFLOP/s counts visible (query, key) pairs only: 4 * head_dim flops each. */
#include "bench/harness.h"

#include "attention/attention.h"
#include "attention/attn_cpu.h"
#include "attention/attn_tile.h"
#include "core/conf.h"
#include "core/mem.h"
#include "core/pool.h"
#include "tests/oracle.h"

#include <cblas.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct options {
    int64_t tokens, threads, reps, heads, kv_heads, gemm;
    bool bf16, cpu_time, json;
    int tile;
};

#define FIELD(member) .offset = offsetof(struct options, member)

static const struct conf_opt opts[] = {
    {"tokens", CONF_INT, FIELD(tokens), .def = "16384", .min = 256, .max = 131072, .arg = "N",
     .help = "prompt length, a multiple of 128"},
    {"threads", CONF_INT, FIELD(threads), .def = "0", .min = 0, .max = 256, .arg = "N",
     .help = "worker threads of both sides; 0 is one per processor"},
    {"reps", CONF_INT, FIELD(reps), .def = "7", .min = 1, .max = BENCH_REPS, .arg = "N",
     .help = "repetitions; medians are printed"},
    {"heads", CONF_INT, FIELD(heads), .def = "2", .min = 1, .max = 64, .arg = "N",
     .help = "query heads"},
    {"kv-heads", CONF_INT, FIELD(kv_heads), .def = "1", .min = 1, .max = 64, .arg = "N",
     .help = "KV heads"},
    {"gemm", CONF_INT, FIELD(gemm), .def = "2048", .min = 64, .max = 8192, .arg = "N",
     .help = "size of the square sgemm"},
    {"tile", CONF_ENUM, FIELD(tile), .def = "auto", .choices = {"auto", "avx512", "avx2", "c"},
     .arg = "NAME", .help = "tile functions of the attention"},
    {"bf16", CONF_BOOL, FIELD(bf16), .def = "false", .help = "a bf16 cache instead of f32"},
    {"cpu-time", CONF_BOOL, FIELD(cpu_time), .def = "false",
     .help =
         "measure CPU time, which other users of the machine do not stretch; needs --threads 1"},
    {"json", CONF_BOOL, FIELD(json), .def = "false", .help = "one JSON object per head_dim"},
};

static const struct conf_program program = {"bench_attention_cpu [options]",
                                            "Times the CPU attention beside OpenBLAS sgemm.", opts,
                                            sizeof opts / sizeof *opts};

/* ---- the problem ---- */

struct bench {
    const struct options *o;
    const struct attn_tile_ops *tile;
    int32_t n, heads, head_dim, n_blocks, n_pages;
    struct kv_view kv;
    void *k, *v;
    int32_t *pages;
    float *q, *out;
    struct dev *dev;
    void *workspace;
    float *max; /* tile_max of the dense run */
    float *gemm[3];
};

static uint64_t mix(uint64_t *s)
{
    uint64_t z = (*s += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* Roughly normal: the sum of four uniforms, scaled to unit variance. */
static float noise(uint64_t *s)
{
    float sum = 0;
    for (int i = 0; i < 4; i++)
        sum += (float)(mix(s) >> 40) * 0x1p-24f - 0.5f;
    return sum * 1.7320508f;
}

enum { TOPICS = 24, TOPIC_TOKENS = 192 };

/* A token's direction: stretches of text keep to one of a few topics and come back to it. */
static const float *topic_of(const float *topics, int32_t token, int32_t d)
{
    uint64_t s = (uint64_t)(token / TOPIC_TOKENS) + 77;
    return topics + (size_t)(mix(&s) % TOPICS) * (size_t)d;
}

static void fill(struct bench *b)
{
    const int32_t d = b->head_dim, kv_heads = b->kv.n_kv_heads;
    uint64_t s = 20261121;
    float *topics = mem_alloc(sizeof(float) * TOPICS * (size_t)d);
    float *row = mem_alloc(sizeof(float) * (size_t)d);
    for (int32_t i = 0; i < TOPICS * d; i++)
        topics[i] = noise(&s);
    for (int32_t t = 0; t < b->n; t++) {
        const float *topic = topic_of(topics, t, d);
        for (int32_t i = 0; i < b->heads * d; i++)
            b->q[(size_t)t * (size_t)(b->heads * d) + (size_t)i] =
                noise(&s) + 0.7f * topic[i % d] + (i % d == 0 ? 3.0f : 0.0f);
        for (int32_t h = 0; h < kv_heads; h++) {
            size_t at = kv_tile_offset(&b->kv, b->pages[t / KV_PAGE_TOKENS], h) +
                        (size_t)(t % KV_PAGE_TOKENS) * (size_t)d;
            for (int32_t i = 0; i < d; i++)
                row[i] = noise(&s) + 0.7f * topic[i] + (i == 0 && t < 4 ? 20.0f : 0.0f);
            dtype_from_f32((char *)b->k + at * dtype_bytes(b->kv.dtype), b->kv.dtype, row,
                           (size_t)d);
            for (int32_t i = 0; i < d; i++)
                row[i] = noise(&s);
            dtype_from_f32((char *)b->v + at * dtype_bytes(b->kv.dtype), b->kv.dtype, row,
                           (size_t)d);
        }
    }
    mem_free(topics);
    mem_free(row);
}

static void *must(void *p)
{
    if (!p) {
        (void)fprintf(stderr, "bench_attention_cpu: out of memory\n");
        exit(1); // NOLINT(concurrency-mt-unsafe)
    }
    return p;
}

/* The table --tile names, or NULL where this processor cannot run it. */
static const struct attn_tile_ops *chosen_tile(const struct options *o)
{
    static const char *const choices[] = {"", "avx512", "avx2", "c"};
    const struct attn_tile_ops *tables[ATTN_TILE_TABLES + 1];
    attn_tile_list(tables);
    if (o->tile == 0)
        return tables[0];
    for (int i = 0; tables[i]; i++) {
        if (strcmp(tables[i]->name, choices[o->tile]) == 0)
            return tables[i];
    }
    return NULL;
}

/* A step through the pool that reaches every page: the page table is not sequential. */
static int32_t page_step(int32_t n_pages)
{
    int32_t step = 5;
    for (; step > 1; step--) {
        int32_t a = n_pages, b = step;
        while (b) {
            int32_t r = a % b;
            a = b;
            b = r;
        }
        if (a == 1)
            break;
    }
    return step;
}

static void open_bench(struct bench *b, const struct options *o, int32_t head_dim, struct dev *dev)
{
    *b = (struct bench){.o = o, .tile = chosen_tile(o), .head_dim = head_dim, .dev = dev};
    b->n = (int32_t)o->tokens / KV_BLOCK_TOKENS * KV_BLOCK_TOKENS;
    b->heads = (int32_t)o->heads;
    b->n_blocks = b->n / KV_BLOCK_TOKENS;
    b->n_pages = b->n / KV_PAGE_TOKENS;
    b->kv = (struct kv_view){.dtype = o->bf16 ? DTYPE_BF16 : DTYPE_F32,
                             .n_layers = 1,
                             .n_pages = b->n_pages,
                             .n_kv_heads = (int32_t)o->kv_heads,
                             .head_dim = head_dim,
                             .k = &b->k,
                             .v = &b->v};
    size_t pool = (size_t)b->n * (size_t)o->kv_heads * (size_t)head_dim;
    size_t rows = (size_t)b->n * (size_t)o->heads * (size_t)head_dim;
    b->k = must(mem_try_aligned(pool, dtype_bytes(b->kv.dtype)));
    b->v = must(mem_try_aligned(pool, dtype_bytes(b->kv.dtype)));
    b->q = must(mem_try_aligned(rows, sizeof(float)));
    b->out = must(mem_try_aligned(rows, sizeof(float)));
    b->pages = must(mem_try_aligned((size_t)b->n_pages, sizeof *b->pages));
    for (int32_t i = 0; i < b->n_pages; i++)
        b->pages[i] = (int32_t)((int64_t)i * page_step(b->n_pages) % b->n_pages);
    b->workspace = must(mem_try_aligned(attn_cpu.workspace_bytes(b->heads, &b->kv, dev), 1));
    b->max = must(mem_try_aligned((size_t)b->heads * (size_t)b->n_blocks * (size_t)b->n_pages,
                                  sizeof(float)));
    size_t side = (size_t)o->gemm;
    for (int i = 0; i < 3; i++)
        b->gemm[i] = must(mem_try_aligned(side * side, sizeof(float)));
    fill(b);
}

static void close_bench(struct bench *b)
{
    mem_free(b->k);
    mem_free(b->v);
    mem_free(b->q);
    mem_free(b->out);
    mem_free(b->pages);
    mem_free(b->workspace);
    mem_free(b->max);
    for (int i = 0; i < 3; i++)
        mem_free(b->gemm[i]);
}

/* ---- variants ---- */

struct variant {
    struct bench *b;
    struct attn_policy policy;
    struct attn_choice choice;
    int32_t pos, n_rows, prompt_end; /* rows of one call */
    int32_t n_seqs;                  /* decode: that many sequences over the same pages */
    struct attn_tile_max *tile_max;
    struct attn_counts counts;
    float *thresholds;
    double target;
};

enum { DECODE_SEQS = 16 };

static void run_variant(void *arg)
{
    struct variant *v = arg;
    struct bench *b = v->b;
    struct attn_seq seqs[DECODE_SEQS];
    struct attn_counts counts[DECODE_SEQS] = {0};
    for (int32_t i = 0; i < v->n_seqs; i++)
        seqs[i] = (struct attn_seq){.row = i * v->n_rows,
                                    .n_rows = v->n_rows,
                                    .pos = v->pos,
                                    .prompt_end = v->prompt_end,
                                    .pages = b->pages,
                                    .choice = v->choice};
    size_t row = (size_t)b->heads * (size_t)b->head_dim;
    struct attn_problem p = {.n_heads = b->heads,
                             .scale = (float)(1 / sqrt((double)b->head_dim)),
                             .q = b->q + (size_t)v->pos * row,
                             .out = b->out + (size_t)v->pos * row,
                             .q_stride = (int64_t)row,
                             .out_stride = (int64_t)row,
                             .seqs = seqs,
                             .n_seqs = v->n_seqs,
                             .seq_counts = counts,
                             .tile_max = v->tile_max,
                             .workspace = b->workspace};
    if (v->n_seqs > 1)
        p.q = b->q, p.out = b->out;
    int err = attn_cpu_run_with(b->tile, &p, &b->kv, &v->policy, b->dev);
    ASSERT(err == 0);
    v->counts = counts[0];
}

static void run_gemm(void *arg)
{
    const struct bench *b = arg;
    int n = (int)b->o->gemm;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, n, n, 1, b->gemm[0], n, b->gemm[1], n,
                0, b->gemm[2], n);
}

static struct variant whole(struct bench *b)
{
    return (struct variant){.b = b, .n_rows = b->n, .prompt_end = b->n, .n_seqs = 1};
}

static double density(const struct variant *v)
{
    return (double)v->counts.kept / (double)v->counts.reachable;
}

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* The smallest k whose predicted density reaches the target. */
static int32_t k_for(const struct bench *b, double target)
{
    const int32_t diag = KV_BLOCK_TOKENS / KV_PAGE_TOKENS;
    for (int32_t k = 1;; k++) {
        double kept = 0, all = 0;
        for (int32_t i = 0; i < b->n_blocks; i++) {
            kept += (diag * i < k ? diag * i : k) + diag;
            all += diag * i + diag;
        }
        if (kept >= target * all)
            return k;
    }
}

/* Midpoint of the k-th and (k+1)-th largest off-diagonal page maximum, -inf where at most k exist.
 */
static void calibrate(struct bench *b, int32_t k, float *thresholds)
{
    float *sorted = mem_alloc((size_t)b->n_pages * sizeof *sorted);
    for (int32_t h = 0; h < b->heads; h++) {
        for (int32_t i = 0; i < b->n_blocks; i++) {
            const size_t at = (size_t)h * (size_t)b->n_blocks + (size_t)i;
            const int32_t n = i * (KV_BLOCK_TOKENS / KV_PAGE_TOKENS);
            memcpy(sorted, b->max + at * (size_t)b->n_pages, (size_t)n * sizeof *sorted);
            qsort(sorted, (size_t)n, sizeof *sorted, descending);
            thresholds[at] = n > k ? (sorted[k - 1] + sorted[k]) / 2 : -INFINITY;
        }
    }
    mem_free(sorted);
}

static struct variant abs_variant(struct bench *b, double target)
{
    struct variant v = whole(b);
    size_t n = (size_t)b->heads * (size_t)b->n_blocks;
    v.thresholds = mem_alloc(n * sizeof(float));
    v.target = target;
    v.choice = (struct attn_choice){.gate = ATTN_GATE_ABS, .gate_rows = 128};
    v.policy.abs = (struct attn_thresholds){.t = v.thresholds,
                                            .n_levels = 1,
                                            .n_layers = 1,
                                            .n_heads = b->heads,
                                            .n_blocks = b->n_blocks,
                                            .head_stride = b->n_blocks};
    if (target < 1) {
        calibrate(b, k_for(b, target), v.thresholds);
    } else {
        for (size_t i = 0; i < n; i++)
            v.thresholds[i] = -INFINITY;
    }
    return v;
}

/* ln(lambda) is bisected on the last eighth of the prompt. */
static struct variant rel_variant(struct bench *b, double target)
{
    struct variant v = whole(b);
    float lo = -40, hi = 0; /* density falls as ln_lambda grows */
    v.target = target;
    v.choice = (struct attn_choice){.gate = ATTN_GATE_REL, .gate_rows = 128};
    if (target >= 1) {
        v.choice.ln_lambda = -INFINITY;
        return v;
    }
    for (int i = 0; i < 10; i++) {
        struct variant tail = v;
        tail.pos = b->n - b->n / 8 / KV_BLOCK_TOKENS * KV_BLOCK_TOKENS;
        tail.n_rows = b->n - tail.pos;
        tail.choice.ln_lambda = v.choice.ln_lambda = (lo + hi) / 2;
        run_variant(&tail);
        if (density(&tail) > target)
            lo = v.choice.ln_lambda;
        else
            hi = v.choice.ln_lambda;
    }
    return v;
}

/* ---- the check before timing ---- */

static double max_diff(const float *got, const double *want, size_t n)
{
    double top = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)got[i] - want[i]);
        top = d > top || isnan(d) ? d : top;
    }
    return top;
}

/* The last block of a whole run against the oracle: false and a line on stderr when it is off. */
static bool check(struct variant *v, const char *name)
{
    struct bench *b = v->b;
    const size_t row = (size_t)b->heads * (size_t)b->head_dim;
    const size_t n = KV_BLOCK_TOKENS * row;
    struct attn_seq seq = {.n_rows = KV_BLOCK_TOKENS,
                           .pos = b->n - KV_BLOCK_TOKENS,
                           .prompt_end = b->n,
                           .pages = b->pages,
                           .choice = v->choice};
    struct attn_problem p = {.n_heads = b->heads,
                             .scale = (float)(1 / sqrt((double)b->head_dim)),
                             .q = b->q + (size_t)seq.pos * row,
                             .q_stride = (int64_t)row,
                             .seqs = &seq,
                             .n_seqs = 1};
    struct oracle o = {.out = mem_zalloc(n, sizeof(double)),
                       .lse = mem_zalloc(KV_BLOCK_TOKENS * (size_t)b->heads, sizeof(double)),
                       .out_f32 = mem_zalloc(n, sizeof(float))};
    run_variant(v);
    oracle_attention(&o, &p, &b->kv, &v->policy);
    double ours = max_diff(b->out + (size_t)seq.pos * row, o.out, n);
    double naive = max_diff(o.out_f32, o.out, n);
    bool ok = ours <= 2 * naive + 1e-5 || o.margin < 1e-5;
    if (!ok)
        (void)fprintf(stderr, "%s: off by %g, naive f32 by %g\n", name, ours, naive);
    mem_free(o.out);
    mem_free(o.lse);
    mem_free(o.out_f32);
    return ok;
}

/* ---- the report ---- */

static double dense_flops(const struct bench *b)
{
    return 4.0 * b->head_dim * b->heads * (0.5 * b->n * (b->n + 1.0));
}

enum {
    GEMM,
    DENSE,
    ABS_1,
    ABS_50,
    ABS_25,
    ABS_10,
    REL_1,
    REL_50,
    REL_25,
    REL_10,
    DEC_1,
    DEC_16,
    N_VARIANTS
};

static const char *const names[N_VARIANTS] = {"sgemm",    "dense",    "ABS T=-inf", "ABS 0.50",
                                              "ABS 0.25", "ABS 0.10", "REL l=0",    "REL 0.50",
                                              "REL 0.25", "REL 0.10", "decode x1",  "decode x16"};

static void print_text(const struct bench *b, const struct bench_variant *t,
                       const struct variant *v)
{
    const int reps = (int)b->o->reps;
    const double gemm = 2.0 * pow((double)b->o->gemm, 3) / t[GEMM].median_s * 1e-9;
    const double dense = dense_flops(b) / t[DENSE].median_s * 1e-9;
    const double share = bench_ratio(&t[GEMM], &t[DENSE], reps) * dense_flops(b) /
                         (2.0 * pow((double)b->o->gemm, 3));
    printf("\nhead_dim %d\n\n", b->head_dim);
    printf("| variant | density | ms | GFLOP/s of matrix work | over dense | 2/(1+density) "
           "|\n");
    printf("|---|---|---|---|---|---|\n");
    printf("| sgemm %lld^3 | | %.1f | %.1f | | |\n", (long long)b->o->gemm, t[GEMM].median_s * 1e3,
           gemm);
    printf("| dense | 1 | %.1f | %.1f (%.0f%% of sgemm) | 1.00x | |\n", t[DENSE].median_s * 1e3,
           dense, share * 100);
    for (int i = ABS_1; i <= REL_10; i++) {
        double rho = density(&v[i]);
        printf("| %s | %.3f | %.1f | | %.2fx | %.2fx |\n", names[i], rho, t[i].median_s * 1e3,
               bench_ratio(&t[DENSE], &t[i], reps), 2 / (1 + rho));
    }
    for (int i = DEC_1; i <= DEC_16; i++) {
        double bytes = 2.0 * v[i].n_seqs * b->n * b->kv.n_kv_heads * b->head_dim *
                       (double)dtype_bytes(b->kv.dtype);
        printf("| %s | 1 | %.3f | %.1f GB/s of K and V | %.0f tokens/s a layer | |\n", names[i],
               t[i].median_s * 1e3, bytes / t[i].median_s * 1e-9, v[i].n_seqs / t[i].median_s);
    }
}

static void print_json(const struct bench *b, const struct bench_variant *t,
                       const struct variant *v)
{
    const int reps = (int)b->o->reps;
    printf("{\"head_dim\": %d, \"tokens\": %d, \"sgemm_gflops\": %.2f, \"dense_gflops\": %.2f",
           b->head_dim, b->n, 2.0 * pow((double)b->o->gemm, 3) / t[GEMM].median_s * 1e-9,
           dense_flops(b) / t[DENSE].median_s * 1e-9);
    printf(", \"variants\": [");
    for (int i = DENSE; i < N_VARIANTS; i++)
        printf("%s{\"name\": \"%s\", \"ms\": %.4f, \"density\": %.4f, \"over_dense\": %.4f}",
               i == DENSE ? "" : ", ", names[i], t[i].median_s * 1e3, density(&v[i]),
               bench_ratio(&t[DENSE], &t[i], reps));
    printf("]}\n");
}

static struct variant decode_variant(struct bench *b, int32_t n_seqs)
{
    return (struct variant){.b = b, .pos = b->n - 1, .n_rows = 1, .n_seqs = n_seqs};
}

static void make_variants(struct bench *b, struct variant *v)
{
    struct attn_tile_max max = {
        .max = b->max, .n_groups = b->n_blocks, .n_pages = b->n_pages, .gate_rows = 128};
    static const double targets[] = {1, 0.5, 0.25, 0.1};
    v[DENSE] = whole(b);
    v[DENSE].tile_max = &max;
    run_variant(&v[DENSE]);
    v[DENSE].tile_max = NULL;
    for (int i = 0; i < 4; i++) {
        v[ABS_1 + i] = abs_variant(b, targets[i]);
        v[REL_1 + i] = rel_variant(b, targets[i]);
    }
    v[DEC_1] = decode_variant(b, 1);
    v[DEC_16] = decode_variant(b, DECODE_SEQS);
}

static int run_dim(const struct options *o, int32_t head_dim, struct dev *dev)
{
    struct bench b;
    struct variant v[N_VARIANTS] = {0};
    struct bench_variant t[N_VARIANTS] = {0};
    int bad = 0;

    open_bench(&b, o, head_dim, dev);
    make_variants(&b, v);
    for (int i = DENSE; i <= REL_10; i++)
        bad += !check(&v[i], names[i]);
    for (int i = 0; i < N_VARIANTS; i++)
        t[i] = (struct bench_variant){.name = names[i], .fn = run_variant, .arg = &v[i]};
    t[GEMM].fn = run_gemm;
    t[GEMM].arg = &b;
    if (!bad) {
        bench_run(t, N_VARIANTS, (int)o->reps, o->cpu_time ? BENCH_CPU : BENCH_WALL);
        (o->json ? print_json : print_text)(&b, t, v);
    }
    for (int i = 0; i < N_VARIANTS; i++)
        mem_free(v[i].thresholds);
    close_bench(&b);
    return bad;
}

static void print_head(const struct options *o, const struct dev *dev)
{
    char cpu[128], date[64];
    bench_cpu_name(cpu, sizeof cpu);
    bench_date(date, sizeof date);
    printf("%s, %d threads, tile functions %s, %s cache, %lld tokens, %lld query / %lld KV heads, "
           "medians of %lld, %s time, %s, sluice %s\n",
           cpu, pool_size(dev->pool), chosen_tile(o)->name, o->bf16 ? "bf16" : "f32",
           (long long)o->tokens, (long long)o->heads, (long long)o->kv_heads, (long long)o->reps,
           o->cpu_time ? "CPU" : "wall", date, SLUICE_VERSION);
}

int main(int argc, char **argv)
{
    struct options o = {0};
    struct err_msg why = {{0}};
    struct dev *dev = NULL;

    conf_defaults(&program, &o);
    if (conf_wants_help(argc, argv)) {
        conf_help(&program, stdout);
        return 0;
    }
    int err = conf_args(&program, &o, argc, argv, NULL, 0, NULL, &why);
    if (err == 0)
        err = dev_open(&dev, &dev_cpu, 0, (int)o.threads, &why);
    if (err < 0 || !dev) {
        (void)fprintf(stderr, "bench_attention_cpu: %s\n", err_why(&why, err));
        return 2;
    }
    if (!chosen_tile(&o) || (o.cpu_time && o.threads != 1)) {
        (void)fprintf(stderr, "bench_attention_cpu: %s\n",
                      chosen_tile(&o) ? "--cpu-time needs --threads 1"
                                      : "--tile: this processor cannot run it");
        dev_close(dev);
        return 2;
    }
    openblas_set_num_threads(pool_size(dev->pool));
    if (!o.json)
        print_head(&o, dev);
    int bad = run_dim(&o, 64, dev) + run_dim(&o, 128, dev);
    dev_close(dev);
    conf_free(&program, &o);
    return bad ? 1 : 0;
}
