#define LOG_MODULE "gemm"
#include "model/gemm_cublas.h"

#include "core/log.h"
#include "core/mem.h"
#include "model/gemm_decode.h"
#include "model/gemm_skinny.h"
#include "model/gemm_swiglu.h"
#include "model/nn_cuda.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

enum {
    WORKSPACE_BYTES = 32 << 20, /* what cuBLAS itself takes on Hopper */
    QUEUES = 16,                /* of gemm_skinny.h, used in turn */
    QUEUE_BYTES = 8 * QUEUES,
    N_CANDIDATES = 6, /* algorithms looked at when tuning */
    TUNE_RUNS = 6,
    TUNE_CHAIN = 8,       /* products that follow each other in a run: of few rows, they overlap */
    TUNE_CHAIN_ROWS = 64, /* at most, for that */
    DECODE_FROM = 9       /* rows; with fewer, gemm_skinny.h makes the shorter step */
};

/* Share of a time, at most, for a choice to replace an earlier one. Below 1, the library's own
 * order stands where times differ by chance, so that another start chooses alike. Our kernel may be
 * a little slower: in a step it overlaps with others than itself, and does their work besides. */
#define TUNE_GAIN 0.98f
#define TUNE_OURS 1.04f
/* And gemm_decode.h more so, but for the logits: kernels of one launch shape begin early beside
 * each other, those of several in turn do not, so one layer's products are better all made by it.
 */
#define TUNE_DECODE 1.10f

/* What we call of the library, by name. */
#define CUBLAS_FUNCTIONS(XX)                                                                       \
    XX(cublasLtCreate)                                                                             \
    XX(cublasLtDestroy)                                                                            \
    XX(cublasLtGetVersion)                                                                         \
    XX(cublasLtMatmul)                                                                             \
    XX(cublasLtMatmulAlgoGetHeuristic)                                                             \
    XX(cublasLtMatmulDescInit_internal)                                                            \
    XX(cublasLtMatmulDescSetAttribute)                                                             \
    XX(cublasLtMatmulPreferenceInit_internal)                                                      \
    XX(cublasLtMatmulPreferenceSetAttribute)                                                       \
    XX(cublasLtMatrixLayoutInit_internal)

struct library {
    void *handle;
#define XX(name) __typeof__(&(name)) name; /* NOLINT(bugprone-macro-parentheses) */
    CUBLAS_FUNCTIONS(XX)
#undef XX
};

struct gemm_cublas {
    struct dev *dev;
    struct library lib;
    cublasLtHandle_t lt;
    cudaStream_t stream;
    cudaDataType_t type;
    void *workspace;
    int queue; /* the last one used */
    struct gemm_decode *decode;
    struct gemm_swiglu swiglu;
};

/* How a product is made: by an algorithm of the library, or by a kernel of our own. */
struct gemm_choice {
    cublasLtMatmulAlgo_t algo;
    int skinny;  /* 0 or the variant of gemm_skinny.h */
    bool decode; /* gemm_decode.h */
    bool swiglu; /* gemm_swiglu.h, where SwiGLU follows */
};

struct gemm_cublas_plan {
    int32_t n, k, n_buckets;
    cudaDataType_t y_type;
    cublasLtMatmulDescOpaque_t op;
    struct gemm_choice *choices; /* [n_buckets] */
};

/* Few rows are decode batches, each bucket a graph; many rows are chunks of prompts, where the
 * tiles of 128 rows matter, and then not even these. */
static const int32_t small[] = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256};
enum { N_SMALL = sizeof small / sizeof *small, FINE_END = 2048, COARSE_END = 8192 };

static int32_t bucket_index(int32_t rows)
{
    int32_t i = 0;
    if (rows > COARSE_END) {
        i = N_SMALL + (FINE_END - 256) / 128 + (COARSE_END - FINE_END) / 512;
        return i + (rows - COARSE_END + 2047) / 2048 - 1;
    }
    if (rows > FINE_END)
        return N_SMALL + (FINE_END - 256) / 128 + (rows - FINE_END + 511) / 512 - 1;
    if (rows > 256)
        return N_SMALL + (rows - 256 + 127) / 128 - 1;
    while (small[i] < rows)
        i++;
    return i;
}

int32_t gemm_cublas_bucket(int32_t rows)
{
    if (rows > COARSE_END)
        return (rows + 2047) / 2048 * 2048;
    if (rows > FINE_END)
        return (rows + 511) / 512 * 512;
    if (rows > 256)
        return (rows + 127) / 128 * 128;
    return small[bucket_index(rows)];
}

static int failed(const char *what, cublasStatus_t s)
{
    log_error("%s failed: cuBLAS status %d", what, (int)s);
    return ERR_CUBLAS;
}

static int load_library(struct library *lib, struct err_msg *why)
{
    static const char *const names[] = {"libcublasLt.so.13",
                                        SLUICE_CUDA_LIBRARIES "/libcublasLt.so.13"};
    for (size_t i = 0; !lib->handle && i < sizeof names / sizeof *names; i++)
        lib->handle = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!lib->handle)
        return err_set(why, ERR_CUBLAS, "a CUDA device needs libcublasLt.so.13: %s",
                       dlerror()); // NOLINT(concurrency-mt-unsafe): one thread opens devices
#define XX(name)                                                                                   \
    {                                                                                              \
        void *symbol = dlsym(lib->handle, #name);                                                  \
        if (!symbol)                                                                               \
            return err_set(why, ERR_CUBLAS, "libcublasLt has no " #name);                          \
        memcpy(&lib->name, &symbol, sizeof symbol);                                                \
    }
    CUBLAS_FUNCTIONS(XX)
#undef XX
    return 0;
}

int gemm_cublas_open(struct gemm_cublas **out, struct dev *d, enum dtype dtype, void *stream,
                     struct err_msg *why)
{
    struct err_msg inner = {{0}};
    struct gemm_cublas *g = mem_zalloc(1, sizeof *g);
    g->dev = d;
    g->stream = stream;
    g->type = dtype == DTYPE_F16 ? CUDA_R_16F : CUDA_R_16BF;
    int err = load_library(&g->lib, why);
    if (err < 0)
        goto fail;
    cublasStatus_t s = g->lib.cublasLtCreate(&g->lt);
    if (s != CUBLAS_STATUS_SUCCESS) {
        g->lt = NULL;
        err = err_set(why, ERR_CUBLAS, "cublasLtCreate: status %d", (int)s);
        goto fail;
    }
    err = dev_alloc(d, &g->workspace, WORKSPACE_BYTES + QUEUE_BYTES, &inner);
    if (err < 0) {
        (void)err_set(why, err, "workspace of cuBLAS: %.300s", err_why(&inner, err));
        goto fail;
    }
    if (cudaMemsetAsync((char *)g->workspace + WORKSPACE_BYTES, 0, QUEUE_BYTES, stream) !=
        cudaSuccess) {
        err = err_set(why, ERR_CUDA, "workspace of cuBLAS: cannot be cleared");
        goto fail;
    }
    err = gemm_decode_open(&g->decode, why);
    if (err < 0)
        goto fail;
    g->swiglu = gemm_swiglu_open();
    log_debug("cublasLt version=%zu", g->lib.cublasLtGetVersion());
    *out = g;
    return 0;
fail:
    gemm_cublas_close(g);
    return err;
}

void gemm_cublas_close(struct gemm_cublas *g)
{
    if (!g)
        return;
    gemm_decode_close(g->decode);
    dev_release(g->dev, g->workspace, WORKSPACE_BYTES + QUEUE_BYTES);
    if (g->lt)
        (void)g->lib.cublasLtDestroy(g->lt);
    if (g->lib.handle)
        (void)dlclose(g->lib.handle);
    mem_free(g);
}

struct layouts {
    cublasLtMatrixLayoutOpaque_t w, x, y;
};

/* cuBLAS is column-major: it computes y^T [n, rows] = w x^T, where w is stored as [k, n]. */
static cublasStatus_t make_layouts(const struct gemm_cublas *g, const struct gemm_cublas_plan *p,
                                   int32_t rows, struct layouts *l)
{
    const struct library *lib = &g->lib;
    const uint64_t n = (uint64_t)p->n, k = (uint64_t)p->k, m = (uint64_t)rows;
    cublasStatus_t s =
        lib->cublasLtMatrixLayoutInit_internal(&l->w, sizeof l->w, g->type, k, n, p->k);
    if (s == CUBLAS_STATUS_SUCCESS)
        s = lib->cublasLtMatrixLayoutInit_internal(&l->x, sizeof l->x, g->type, k, m, p->k);
    if (s == CUBLAS_STATUS_SUCCESS)
        s = lib->cublasLtMatrixLayoutInit_internal(&l->y, sizeof l->y, p->y_type, n, m, p->n);
    return s;
}

static int find_algos(const struct gemm_cublas *g, struct gemm_cublas_plan *p, int32_t rows,
                      cublasLtMatmulHeuristicResult_t *found, int wanted, int *n)
{
    const size_t workspace = WORKSPACE_BYTES;
    cublasLtMatmulPreferenceOpaque_t pref;
    struct layouts l;
    cublasStatus_t s = make_layouts(g, p, rows, &l);
    if (s == CUBLAS_STATUS_SUCCESS)
        s = g->lib.cublasLtMatmulPreferenceInit_internal(&pref, sizeof pref);
    if (s == CUBLAS_STATUS_SUCCESS)
        s = g->lib.cublasLtMatmulPreferenceSetAttribute(
            &pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    if (s == CUBLAS_STATUS_SUCCESS)
        s = g->lib.cublasLtMatmulAlgoGetHeuristic(g->lt, &p->op, &l.w, &l.x, &l.y, &l.y, &pref,
                                                  wanted, found, n);
    if (s != CUBLAS_STATUS_SUCCESS)
        return failed("cublasLtMatmulAlgoGetHeuristic", s);
    return *n > 0 ? 0 : ERR_CUBLAS;
}

int gemm_cublas_plan(struct gemm_cublas *g, struct gemm_cublas_plan **out, int32_t n, int32_t k,
                     int32_t max_rows, enum dtype y_dtype, struct err_msg *why)
{
    const cublasOperation_t transpose = CUBLAS_OP_T;
    if (n % 8 || k % 8)
        return err_set(why, ERR_UNSUPPORTED,
                       "a matrix of %d x %d: on a CUDA device both are multiples of 8", n, k);
    struct gemm_cublas_plan *p = mem_zalloc(1, sizeof *p);
    p->n = n;
    p->k = k;
    p->y_type = y_dtype == DTYPE_F32 ? CUDA_R_32F : g->type;
    p->n_buckets = bucket_index(max_rows) + 1;
    p->choices = mem_zalloc((size_t)p->n_buckets, sizeof *p->choices);
    cublasStatus_t s = g->lib.cublasLtMatmulDescInit_internal(&p->op, sizeof p->op,
                                                              CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (s == CUBLAS_STATUS_SUCCESS)
        s = g->lib.cublasLtMatmulDescSetAttribute(&p->op, CUBLASLT_MATMUL_DESC_TRANSA, &transpose,
                                                  sizeof transpose);
    int err = s == CUBLAS_STATUS_SUCCESS ? 0 : failed("cublasLtMatmulDescInit", s);
    for (int32_t rows = 1; err == 0 && rows <= gemm_cublas_bucket(max_rows);
         rows = gemm_cublas_bucket(rows) + 1) {
        const int32_t bucket = gemm_cublas_bucket(rows);
        cublasLtMatmulHeuristicResult_t best;
        int found = 0;
        err = find_algos(g, p, bucket, &best, 1, &found);
        p->choices[bucket_index(bucket)].algo = best.algo;
    }
    if (err < 0) {
        gemm_cublas_plan_free(p);
        return err_set(why, err, "cuBLAS has no algorithm for a matrix of %d x %d", n, k);
    }
    *out = p;
    return 0;
}

void gemm_cublas_plan_free(struct gemm_cublas_plan *p)
{
    if (!p)
        return;
    mem_free(p->choices);
    mem_free(p);
}

static int launched(int cuda_error)
{
    return cuda_error == (int)cudaSuccess ? 0 : ERR_CUDA;
}

static int decode(const struct gemm_cublas *g, const struct gemm_skinny *product,
                  enum gemm_decode_mode mode, const struct kv_append *a)
{
    return launched(gemm_decode_run(g->decode, product, mode, a, g->type == CUDA_R_16F, g->stream));
}

/* y = x w^T + beta y, by the library. */
static int library_multiply(const struct gemm_cublas *g, const struct gemm_cublas_plan *p,
                            const struct gemm_choice *c, const struct gemm_skinny *product,
                            float beta)
{
    const float one = 1.0f;
    struct layouts l;
    cublasStatus_t s = make_layouts(g, p, product->rows, &l);
    cublasLtMatmulDescOpaque_t op = p->op;
    if (s == CUBLAS_STATUS_SUCCESS)
        s = g->lib.cublasLtMatmul(g->lt, &op, &one, product->w, &l.w, product->x, &l.x, &beta,
                                  product->y, &l.y, product->y, &l.y, &c->algo, g->workspace,
                                  WORKSPACE_BYTES, g->stream);
    return s == CUBLAS_STATUS_SUCCESS ? 0 : ERR_CUBLAS;
}

static int multiply(const struct gemm_cublas *g, const struct gemm_cublas_plan *p,
                    const struct gemm_choice *c, const struct gemm_skinny *product)
{
    if (c->decode)
        return decode(g, product, p->y_type == CUDA_R_32F ? GEMM_DECODE_F32 : GEMM_DECODE_PLAIN,
                      NULL);
    if (c->skinny)
        return launched(gemm_skinny_launch(product, c->skinny, g->type == CUDA_R_16F,
                                           p->y_type == CUDA_R_32F, g->stream));
    return library_multiply(g, p, c, product, 0.0f);
}

static const struct gemm_choice *choice_of(const struct gemm_cublas_plan *p, int32_t rows)
{
    const int32_t bucket = bucket_index(rows);
    ASSERT(rows > 0 && bucket < p->n_buckets);
    return &p->choices[bucket];
}

static int report(int err, const struct gemm_cublas_plan *p, int32_t rows)
{
    if (err < 0)
        log_error("matrix product failed rows=%d n=%d k=%d: %s", rows, p->n, p->k, err_str(err));
    return err;
}

static uint32_t *next_queue(struct gemm_cublas *g)
{
    g->queue = (g->queue + 1) % QUEUES;
    return (uint32_t *)((char *)g->workspace + WORKSPACE_BYTES) + (size_t)(2 * g->queue);
}

int gemm_cublas_run(struct gemm_cublas *g, const struct gemm_cublas_plan *p, void *y, const void *x,
                    const void *w, int32_t rows)
{
    const struct gemm_skinny product = {
        .y = y, .x = x, .w = w, .rows = rows, .n = p->n, .k = p->k, .queue = next_queue(g)};
    return report(multiply(g, p, choice_of(p, rows), &product), p, rows);
}

int gemm_cublas_add(struct gemm_cublas *g, const struct gemm_cublas_plan *p, void *y, const void *x,
                    const void *w, int32_t rows)
{
    const struct gemm_skinny product = {.y = y, .x = x, .w = w, .rows = rows, .n = p->n, .k = p->k};
    const struct gemm_choice *c = choice_of(p, rows);
    ASSERT(!c->skinny && !c->decode);
    return report(library_multiply(g, p, c, &product, 1.0f), p, rows);
}

bool gemm_cublas_is_ours(const struct gemm_cublas_plan *p, int32_t rows)
{
    return choice_of(p, rows)->skinny || choice_of(p, rows)->decode;
}

bool gemm_cublas_has_swiglu(const struct gemm_cublas_plan *p, int32_t rows, bool biased)
{
    return gemm_cublas_is_ours(p, rows) || (choice_of(p, rows)->swiglu && !biased);
}

/* By a kernel that has SwiGLU at its end. */
static int with_swiglu(const struct gemm_cublas *g, const struct gemm_choice *c,
                       const struct gemm_skinny *product)
{
    const int dtype = g->type == CUDA_R_16F;
    if (c->decode)
        return decode(g, product, GEMM_DECODE_SWIGLU, NULL);
    return launched(c->skinny ? gemm_skinny_swiglu(product, c->skinny, dtype, g->stream)
                              : gemm_swiglu_run(&g->swiglu, product, dtype, g->stream));
}

int gemm_cublas_swiglu(struct gemm_cublas *g, const struct gemm_cublas_plan *p, void *y,
                       const void *x, const void *w, const void *bias, int32_t rows)
{
    const struct gemm_skinny product = {.y = y,
                                        .x = x,
                                        .w = w,
                                        .rows = rows,
                                        .n = p->n,
                                        .k = p->k,
                                        .bias = bias,
                                        .queue = next_queue(g)};
    ASSERT(gemm_cublas_has_swiglu(p, rows, bias != NULL));
    return report(with_swiglu(g, choice_of(p, rows), &product), p, rows);
}

int gemm_cublas_append(struct gemm_cublas *g, const struct gemm_cublas_plan *p, const void *x,
                       const void *w, const struct kv_append *a)
{
    const struct gemm_skinny product = {
        .x = x, .w = w, .rows = a->n_rows, .n = p->n, .k = p->k, .queue = next_queue(g)};
    const struct gemm_choice *c = choice_of(p, a->n_rows);
    return report(c->decode ? decode(g, &product, GEMM_DECODE_APPEND, a)
                            : launched(gemm_skinny_append(&product, a, c->skinny,
                                                          g->type == CUDA_R_16F, g->stream)),
                  p, a->n_rows);
}

struct tuner {
    struct gemm_cublas *g;
    const struct gemm_cublas_plan *p;
    struct gemm_trial on;
    bool activates; /* SwiGLU follows on the product */
    int next;       /* of on.w */
    cudaEvent_t events[2];
};

static int enqueue_one(struct tuner *t, const struct gemm_choice *c, struct gemm_skinny *product)
{
    const struct gemm_cublas *g = t->g;
    if (!t->activates)
        return multiply(g, t->p, c, product);
    if (!c->swiglu) {
        TRY(multiply(g, t->p, c, product));
        return launched(nn_cuda_swiglu(t->on.act, t->on.y, NULL, t->on.rows, t->p->n / 2,
                                       g->type == CUDA_R_16F, g->stream));
    }
    product->y = t->on.act;
    return with_swiglu(g, c, product);
}

/* Enqueues n products, each over other weights. */
static int enqueue(struct tuner *t, const struct gemm_choice *c, int n)
{
    for (int i = 0; i < n; i++) {
        struct gemm_skinny product = {.y = t->on.y,
                                      .x = t->on.x,
                                      .w = t->on.w[t->next++ % t->on.n_w],
                                      .rows = t->on.rows,
                                      .n = t->p->n,
                                      .k = t->p->k,
                                      .queue = next_queue(t->g)};
        TRY(enqueue_one(t, c, &product));
    }
    return 0;
}

/* Milliseconds of one product, the least of a few; negative: the algorithm does not run. */
static float time_choice(struct tuner *t, const struct gemm_choice *c)
{
    const int chain = t->on.rows <= TUNE_CHAIN_ROWS ? TUNE_CHAIN : 1;
    float best = -1.0f;
    for (int i = 0; i < TUNE_RUNS; i++) {
        float ms = 0.0f;
        (void)cudaEventRecord(t->events[0], t->g->stream);
        if (enqueue(t, c, chain) < 0)
            return -1.0f;
        (void)cudaEventRecord(t->events[1], t->g->stream);
        if (cudaEventSynchronize(t->events[1]) != cudaSuccess ||
            cudaEventElapsedTime(&ms, t->events[0], t->events[1]) != cudaSuccess)
            return -1.0f;
        ms /= (float)chain;
        if (i > 0 && (best < 0.0f || ms < best)) /* the first loads the kernel */
            best = ms;
    }
    return best;
}

/* Keeps a choice that takes less than `share` of the time of the best so far, which it returns. */
static float try_choice(struct tuner *t, struct gemm_cublas_plan *p, const struct gemm_choice *c,
                        float best, float share)
{
    float ms = time_choice(t, c);
    if (ms < 0.0f || (best >= 0.0f && ms >= best * share))
        return best;
    p->choices[bucket_index(t->on.rows)] = *c;
    return ms;
}

static int tune(struct tuner *t, struct gemm_cublas_plan *p)
{
    cublasLtMatmulHeuristicResult_t found[N_CANDIDATES];
    float best = -1.0f, library;
    int n = 0;
    TRY(find_algos(t->g, p, t->on.rows, found, N_CANDIDATES, &n));
    for (int i = 0; i < n; i++) {
        const struct gemm_choice c = {.algo = found[i].algo};
        best = try_choice(t, p, &c, best, TUNE_GAIN);
    }
    library = best;
    for (int v = 1; t->on.rows <= GEMM_SKINNY_ROWS && v <= GEMM_SKINNY_VARIANTS; v++) {
        const struct gemm_choice c = {.skinny = v};
        best = try_choice(t, p, &c, best, v == 1 ? TUNE_OURS : TUNE_GAIN);
    }
    if (t->on.rows >= DECODE_FROM && t->on.rows <= GEMM_DECODE_ROWS)
        best = try_choice(t, p, &(struct gemm_choice){.decode = true}, best,
                          p->y_type == CUDA_R_32F ? TUNE_GAIN : TUNE_DECODE);
    if (best < 0.0f)
        return ERR_CUBLAS;
    log_debug("tuned n=%d k=%d rows=%d skinny=%d decode=%d us=%.1f library_us=%.1f GB/s=%.0f "
              "TFLOP/s=%.1f",
              p->n, p->k, t->on.rows, p->choices[bucket_index(t->on.rows)].skinny,
              p->choices[bucket_index(t->on.rows)].decode, (double)best * 1e3,
              (double)library * 1e3, 2.0 * p->n * p->k / ((double)best * 1e6),
              2.0 * p->n * p->k * t->on.rows / ((double)best * 1e9));
    return 0;
}

/* Whether SwiGLU is computed at the end of the product, for these rows and fewer. */
static void tune_swiglu(struct tuner *t, struct gemm_cublas_plan *p)
{
    const struct gemm_choice fused = {.swiglu = true};
    t->activates = true;
    const float apart = time_choice(t, choice_of(p, t->on.rows)), one = time_choice(t, &fused);
    const bool wins = one >= 0.0f && (apart < 0.0f || one < apart);
    log_debug("tuned n=%d k=%d rows=%d and SwiGLU us=%.1f apart_us=%.1f", p->n, p->k, t->on.rows,
              (double)one * 1e3, (double)apart * 1e3);
    for (int32_t rows = 1; rows <= t->on.rows; rows = gemm_cublas_bucket(rows) + 1) {
        const int32_t bucket = gemm_cublas_bucket(rows);
        p->choices[bucket_index(bucket)].swiglu =
            wins && gemm_swiglu_fills(&t->g->swiglu, bucket, p->n);
    }
}

int gemm_cublas_tune(struct gemm_cublas *g, struct gemm_cublas_plan *p, const struct gemm_trial *on)
{
    struct tuner t = {.g = g, .p = p, .on = *on};
    int err = ERR_CUDA;
    t.on.rows = gemm_cublas_bucket(on->rows);
    if (cudaEventCreate(&t.events[0]) == cudaSuccess &&
        cudaEventCreate(&t.events[1]) == cudaSuccess)
        err = tune(&t, p);
    if (err == 0 && on->act && !gemm_cublas_is_ours(p, t.on.rows) &&
        gemm_swiglu_fills(&g->swiglu, t.on.rows, p->n))
        tune_swiglu(&t, p);
    for (int i = 0; i < 2; i++) {
        if (t.events[i])
            (void)cudaEventDestroy(t.events[i]);
    }
    return err;
}
