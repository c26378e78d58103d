/* Products on a GPU, the library's and our own for few rows, beside double precision: both dtypes,
 * 16-bit and f32 results, shapes that no tile divides. Products with what follows on them
 * beside the kernels that they stand for; a chain of kernels that begin early beside the same ones
 * one by one. */
#include "core/dev_cuda.h"
#include "model/gemm_cublas.h"
#include "model/gemm_decode.h"
#include "model/gemm_skinny.h"
#include "model/gemm_swiglu.h"
#include "model/nn_cuda.h"
#include "tests/cuda_case.h"

#include <float.h>

enum { MAX_ROWS = 300 };

/* Our own kernels, each with its number of rows. */
static const struct way {
    const char *name;
    int32_t rows;
    int skinny; /* the variant of gemm_skinny.h; 0: gemm_decode.h */
} ways[] = {
    {"skinny 1", GEMM_SKINNY_ROWS, 1},
    {"skinny 2", GEMM_SKINNY_ROWS, 2},
    {"decode", GEMM_DECODE_ROWS, 0},
};
enum { N_WAYS = sizeof ways / sizeof *ways };
static struct gemm_decode *decode;
static struct gemm_swiglu swiglu;

/* With a queue of four that products use in turn: a product and the next may be at work together.
 */
static struct gemm_skinny with_queue(const struct gemm_skinny *s)
{
    static uint32_t *queues;
    static unsigned next;
    struct gemm_skinny p = *s;
    if (!queues) {
        const uint32_t zeros[8] = {0};
        queues = device_copy(zeros, sizeof zeros);
    }
    p.queue = queues + (size_t)(2 * (next++ % 4));
    return p;
}

static int run_plain(const struct way *w, const struct gemm_skinny *s, int dtype, bool f32)
{
    void *stream = dev_cuda_stream(dev);
    const struct gemm_skinny p = with_queue(s);
    return w->skinny ? gemm_skinny_launch(&p, w->skinny, dtype, f32, stream)
                     : gemm_decode_run(decode, s, f32 ? GEMM_DECODE_F32 : GEMM_DECODE_PLAIN, NULL,
                                       dtype, stream);
}

static int run_swiglu(const struct way *w, const struct gemm_skinny *s, int dtype)
{
    void *stream = dev_cuda_stream(dev);
    const struct gemm_skinny p = with_queue(s);
    return w->skinny ? gemm_skinny_swiglu(&p, w->skinny, dtype, stream)
                     : gemm_decode_run(decode, s, GEMM_DECODE_SWIGLU, NULL, dtype, stream);
}

static int run_append(const struct way *w, const struct gemm_skinny *s, const struct kv_append *a,
                      int dtype)
{
    void *stream = dev_cuda_stream(dev);
    const struct gemm_skinny p = with_queue(s);
    return w->skinny ? gemm_skinny_append(&p, a, w->skinny, dtype, stream)
                     : gemm_decode_run(decode, s, GEMM_DECODE_APPEND, a, dtype, stream);
}

struct product {
    int32_t rows, n, k;
    int dtype; /* 0 bf16, 1 f16 */
    bool f32;
    bool exact;          /* of few bits: sums are the same in every order */
    uint16_t *x, *w;     /* host */
    double *want, *size; /* [rows, n] and the sums of magnitudes, for the bound */
    void *d_x, *d_w;
};

/* Quarters from -1/2 to 1/2. */
static uint16_t *coarse16(size_t n, int dtype, struct rng *rng)
{
    uint16_t *x = host_alloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = to16(0.25f * (float)rng_range(rng, -2, 2), dtype);
    return x;
}

static void make(struct product *p, struct rng *rng)
{
    const size_t rows = (size_t)p->rows, n = (size_t)p->n, k = (size_t)p->k;
    p->x = p->exact ? coarse16(rows * k, p->dtype, rng) : random16(rows * k, p->dtype, 1.0, rng);
    p->w = p->exact ? coarse16(n * k, p->dtype, rng) : random16(n * k, p->dtype, 0.1, rng);
    p->want = host_alloc(rows * n * sizeof(double));
    p->size = host_alloc(rows * n * sizeof(double));
    for (size_t r = 0; r < rows; r++) {
        for (size_t c = 0; c < n; c++) {
            for (size_t i = 0; i < k; i++) {
                double v = (double)from16(p->x[r * k + i], p->dtype) *
                           (double)from16(p->w[c * k + i], p->dtype);
                p->want[r * n + c] += v;
                p->size[r * n + c] += fabs(v);
            }
        }
    }
    p->d_x = device_copy(p->x, rows * k * 2);
    p->d_w = device_copy(p->w, n * k * 2);
}

static void drop(struct product *p)
{
    dev_release(dev, p->d_x, 0);
    dev_release(dev, p->d_w, 0);
    free(p->x);
    free(p->w);
    free(p->want);
    free(p->size);
}

/* f32 sums in any order, then one rounding; rows of y behind the last stay as they were. */
static void check(const struct product *p, void *d_y, const char *what)
{
    const size_t n = (size_t)p->rows * (size_t)p->n, size = p->f32 ? 4 : 2;
    const double ulp = p->f32 ? 0.0 : p->dtype ? 0x1p-11 : 0x1p-8;
    unsigned char *y = host_alloc((n + (size_t)p->n) * size);
    device_take(y, d_y, (n + (size_t)p->n) * size);
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        float f;
        memcpy(&h, y + i * size, sizeof h);
        memcpy(&f, y + i * size, p->f32 ? sizeof f : sizeof h);
        const double got = p->f32 ? (double)f : (double)from16(h, p->dtype);
        const double bound = ulp * fabs(p->want[i]) + p->k * (double)FLT_EPSILON * p->size[i];
        if (!(fabs(got - p->want[i]) <= bound))
            fail_msg("%s, %d x %d x %d, dtype %d: y[%zu] = %.9g, want %.9g", what, p->rows, p->n,
                     p->k, p->dtype, i, got, p->want[i]);
    }
    for (size_t i = n * size; i < (n + (size_t)p->n) * size; i++)
        assert_int_equal(y[i], 0xff);
    free(y);
}

static void *poisoned(const struct product *p)
{
    return device_copy(NULL, ((size_t)p->rows + 1) * (size_t)p->n * (p->f32 ? 4 : 2));
}

/* The same bits again and again, whatever the thread blocks leave each other. */
static void check_again(const struct product *p, const struct way *w, const struct gemm_skinny *s)
{
    const size_t bytes = (size_t)p->rows * (size_t)p->n * (p->f32 ? 4 : 2);
    unsigned char *want = host_alloc(bytes), *got = host_alloc(bytes);
    struct gemm_skinny again = *s;
    for (int i = 0; i < 4; i++) {
        again.y = poisoned(p);
        for (int j = 0; j <= i; j++)
            assert_int_equal(run_plain(w, &again, p->dtype, p->f32), 0);
        device_take(i == 0 ? want : got, again.y, bytes);
        if (i > 0)
            assert_memory_equal(got, want, bytes);
    }
    free(want);
    free(got);
}

static void check_plain(const struct way *w, const struct product *p)
{
    void *y = poisoned(p);
    const struct gemm_skinny s = {
        .y = y, .x = p->d_x, .w = p->d_w, .rows = p->rows, .n = p->n, .k = p->k};
    assert_int_equal(run_plain(w, &s, p->dtype, p->f32), 0);
    check(p, y, w->name);
    check_again(p, w, &s);
}

static void test_plain(void **state)
{
    static const int32_t shapes[][2] = {{8, 8},     {40, 136},   {64, 1024}, {256, 264}, {520, 512},
                                        {24, 3000}, {1000, 128}, {391, 72},  {2050, 200}};
    static const int32_t counts[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32};
    struct rng rng = test_rng("gemm_skinny", 21);
    (void)state;
    for (size_t i = 0; i < 2 * sizeof shapes / sizeof *shapes; i++) {
        for (size_t c = i % 3; c < sizeof counts / sizeof *counts; c += 3) {
            struct product p = {counts[c], shapes[i / 2][0], shapes[i / 2][1], (int)(i % 2),
                                .f32 = rng_range(&rng, 0, 1) == 1};
            make(&p, &rng);
            for (int w = 0; w < N_WAYS; w++) {
                if (p.rows <= ways[w].rows)
                    check_plain(&ways[w], &p);
            }
            drop(&p);
        }
    }
}

static void test_refused(void **state)
{
    const struct gemm_skinny odd = {.rows = 1, .n = 9, .k = 8};
    const struct gemm_skinny heads = {.rows = 1, .n = 21, .k = 8};
    const struct kv_append a = {.n_rows = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = 7};
    (void)state;
    for (int w = 0; w < N_WAYS; w++) {
        const struct gemm_skinny many = {.rows = ways[w].rows + 1, .n = 8, .k = 8};
        assert_int_not_equal(run_swiglu(&ways[w], &odd, 0), 0);
        assert_int_not_equal(run_append(&ways[w], &heads, &a, 0), 0);
        assert_int_not_equal(run_plain(&ways[w], &many, 0, false), 0);
    }
}

static void check_swiglu(const struct way *w, int32_t rows, int32_t n, int32_t k, bool with_bias,
                         struct rng *rng)
{
    const int dtype = rng_range(rng, 0, 1);
    const size_t bytes = ((size_t)rows + 1) * (size_t)n / 2 * 2;
    void *stream = dev_cuda_stream(dev);
    struct product p = {rows, n, k, dtype, .f32 = false, .exact = true};
    make(&p, rng);
    uint16_t *bias = random16((size_t)n, dtype, 1.0, rng);
    unsigned char *got = host_alloc(bytes), *want = host_alloc(bytes);
    void *d_bias = device_copy(bias, (size_t)n * 2), *both = poisoned(&p);
    void *d_got = device_copy(NULL, bytes), *d_want = device_copy(NULL, bytes);
    struct gemm_skinny s = {.y = both, .x = p.d_x, .w = p.d_w, .rows = rows, .n = n, .k = k};
    assert_int_equal(run_plain(w, &s, dtype, false), 0);
    assert_int_equal(
        nn_cuda_swiglu(d_want, both, with_bias ? d_bias : NULL, rows, n / 2, dtype, stream), 0);
    s.y = d_got;
    s.bias = with_bias ? d_bias : NULL;
    assert_int_equal(run_swiglu(w, &s, dtype), 0);
    device_take(got, d_got, bytes);
    device_take(want, d_want, bytes);
    assert_memory_equal(got, want, bytes); /* what is behind the last row, too */
    check(&p, both, w->name);
    dev_release(dev, d_bias, 0);
    free(bias);
    free(got);
    free(want);
    drop(&p);
}

static void test_swiglu(void **state)
{
    static const int32_t shapes[][2] = {{16, 8},    {40, 136},    {96, 1024},
                                        {248, 520}, {1040, 3000}, {1302, 64}};
    struct rng rng = test_rng("gemm_skinny_swiglu", 23);
    (void)state;
    for (size_t i = 0; i < 4 * sizeof shapes / sizeof *shapes; i++) { /* some of each */
        for (int w = 0; w < N_WAYS; w++)
            check_swiglu(&ways[w], rng_range(&rng, 1, ways[w].rows), shapes[i / 4][0],
                         shapes[i / 4][1], i % 2 == 1, &rng);
    }
}

/* Many rows: the host's sums, rounded, under nn_cuda_swiglu. */
static void check_many(int32_t rows, int32_t n, int32_t k, int dtype, struct rng *rng)
{
    const size_t bytes = ((size_t)rows + 1) * (size_t)n / 2 * 2, all = (size_t)rows * (size_t)n;
    void *stream = dev_cuda_stream(dev);
    struct product p = {rows, n, k, dtype, .f32 = false, .exact = true};
    make(&p, rng);
    uint16_t *both = host_alloc(all * sizeof *both);
    unsigned char *got = host_alloc(bytes), *want = host_alloc(bytes);
    for (size_t i = 0; i < all; i++)
        both[i] = to16((float)p.want[i], dtype);
    void *d_both = device_copy(both, all * sizeof *both), *d_want = device_copy(NULL, bytes);
    assert_int_equal(nn_cuda_swiglu(d_want, d_both, NULL, rows, n / 2, dtype, stream), 0);
    device_take(want, d_want, bytes);
    for (int i = 0; i < 3; i++) {
        void *y = device_copy(NULL, bytes);
        const struct gemm_skinny s = {.y = y, .x = p.d_x, .w = p.d_w, .rows = rows, .n = n, .k = k};
        for (int j = 0; j <= i; j++)
            assert_int_equal(gemm_swiglu_run(&swiglu, &s, dtype, stream), 0);
        device_take(got, y, bytes);
        assert_memory_equal(got, want, bytes); /* what is behind the last row, too */
    }
    dev_release(dev, d_both, 0);
    free(both);
    free(got);
    free(want);
    drop(&p);
}

/* Less than a tile of anything, no whole tiles, more tiles than clusters, a band that is not full.
 */
static void test_swiglu_many(void **state)
{
    static const int32_t shapes[][3] = {{1, 16, 8},       {300, 272, 64},   {129, 528, 200},
                                        {1000, 4368, 72}, {2500, 2608, 40}, {256, 512, 1032}};
    const struct gemm_skinny odd = {.rows = 300, .n = 24, .k = 8},
                             deep = {.rows = 300, .n = 16, .k = 9};
    struct rng rng = test_rng("gemm_swiglu", 27);
    (void)state;
    for (size_t i = 0; i < 2 * sizeof shapes / sizeof *shapes; i++)
        check_many(shapes[i / 2][0], shapes[i / 2][1], shapes[i / 2][2], (int)(i % 2), &rng);
    assert_int_not_equal(gemm_swiglu_run(&swiglu, &odd, 0, dev_cuda_stream(dev)), 0);
    assert_int_not_equal(gemm_swiglu_run(&swiglu, &deep, 0, dev_cuda_stream(dev)), 0);
}

static unsigned char *taken(void *p, size_t bytes)
{
    unsigned char *out = host_alloc(bytes);
    device_take(out, p, bytes);
    return out;
}

/* Tuned with SwiGLU behind: what is chosen for so many rows, beside product and SwiGLU apart. */
static void check_chosen(struct gemm_cublas *g, const struct gemm_cublas_plan *plan,
                         const struct product *p, const struct gemm_trial *on, int32_t rows)
{
    const size_t bytes = ((size_t)rows + 1) * (size_t)p->n / 2 * 2;
    void *got = device_copy(NULL, bytes), *want = device_copy(NULL, bytes);
    unsigned char *a, *b;
    assert_true(gemm_cublas_has_swiglu(plan, rows, false));
    assert_false(gemm_cublas_has_swiglu(plan, rows, true));
    assert_ok(gemm_cublas_swiglu(g, plan, got, p->d_x, p->d_w, NULL, rows));
    assert_ok(gemm_cublas_run(g, plan, on->y, p->d_x, p->d_w, rows));
    assert_int_equal(
        nn_cuda_swiglu(want, on->y, NULL, rows, p->n / 2, p->dtype, dev_cuda_stream(dev)), 0);
    a = taken(got, bytes);
    b = taken(want, bytes);
    assert_memory_equal(a, b, bytes); /* sums are exact; what is behind the last row, too */
    free(a);
    free(b);
    dev_release(dev, got, 0);
    dev_release(dev, want, 0);
}

/* Few columns of x: there a product and SwiGLU apart move three times as much. */
static void check_tuned(int dtype, struct rng *rng)
{
    enum { ROWS = 2048, N = 25600, K = 128 };
    const enum dtype t = dtype ? DTYPE_F16 : DTYPE_BF16;
    struct product p = {.rows = ROWS, .n = N, .k = K, .dtype = dtype};
    struct gemm_cublas *g;
    struct gemm_cublas_plan *plan;
    struct err_msg why = {{0}};
    p.x = coarse16((size_t)ROWS * K, dtype, rng);
    p.w = coarse16((size_t)N * K, dtype, rng);
    p.d_x = device_copy(p.x, (size_t)ROWS * K * 2);
    p.d_w = device_copy(p.w, (size_t)N * K * 2);
    const void *w = p.d_w;
    const struct gemm_trial on = {.y = device_copy(NULL, (size_t)ROWS * N * 2),
                                  .act = device_copy(NULL, (size_t)ROWS * N),
                                  .x = p.d_x,
                                  .w = &w,
                                  .n_w = 1,
                                  .rows = ROWS};
    assert_ok(gemm_cublas_open(&g, dev, t, dev_cuda_stream(dev), &why));
    assert_ok(gemm_cublas_plan(g, &plan, N, K, ROWS, t, &why));
    assert_false(gemm_cublas_has_swiglu(plan, ROWS, false)); /* nothing is tuned yet */
    assert_ok(gemm_cublas_tune(g, plan, &on));
    check_chosen(g, plan, &p, &on, ROWS);
    check_chosen(g, plan, &p, &on, ROWS / 2 + 77);          /* a smaller bucket */
    assert_false(gemm_cublas_has_swiglu(plan, 300, false)); /* too few to fill a device */
    gemm_cublas_plan_free(plan);
    gemm_cublas_close(g);
    dev_release(dev, on.y, 0);
    dev_release(dev, on.act, 0);
    drop(&p);
}

static void test_tuned(void **state)
{
    struct rng rng = test_rng("gemm_tuned", 28);
    (void)state;
    check_tuned(0, &rng);
    check_tuned(1, &rng);
}

/* Memory of a layer's cache and of the rows that go there, as kv_append_cuda has it. */
struct cache {
    struct kv_append a;
    size_t pool_bytes, qkv_bytes;
};

enum { C_PAGES = 2 * GEMM_DECODE_ROWS + 2, C_POSITIONS = 500 };

static void make_cache(struct cache *c, int32_t rows, int32_t heads, int32_t kv_heads,
                       int32_t head_dim, struct rng *rng)
{
    int32_t slots[GEMM_DECODE_ROWS], positions[GEMM_DECODE_ROWS], tails[GEMM_DECODE_ROWS];
    const int32_t width = (heads + 2 * kv_heads) * head_dim;
    float *table = host_alloc((size_t)C_POSITIONS * (size_t)head_dim * sizeof *table);
    for (int32_t i = 0; i < C_POSITIONS * head_dim; i++)
        table[i] = (float)rng_normal(rng);
    for (int32_t i = 0; i < rows; i++) { /* a page each */
        const int32_t in_page = rng_range(rng, 0, KV_PAGE_TOKENS - 1);
        slots[i] = i % 5 == 4 ? -1 : (rows - i) * 2 * KV_PAGE_TOKENS + in_page;
        tails[i] = i % 2 ? 0 : KV_PAGE_TOKENS - 1 - in_page;
        positions[i] = rng_range(rng, 0, C_POSITIONS - 1);
    }
    c->pool_bytes = (size_t)C_PAGES * (size_t)(kv_heads * KV_PAGE_TOKENS * head_dim) * 2;
    c->qkv_bytes = (size_t)rows * (size_t)width * 2;
    c->a = (struct kv_append){
        .qkv = device_copy(NULL, c->qkv_bytes),
        .cos_sin = device_copy(table, (size_t)C_POSITIONS * (size_t)head_dim * sizeof *table),
        .positions = device_copy(positions, sizeof positions),
        .slots = device_copy(slots, sizeof slots),
        .tails = device_copy(tails, sizeof tails),
        .k = device_copy(NULL, c->pool_bytes),
        .v = device_copy(NULL, c->pool_bytes),
        .stride = width,
        .n_rows = rows,
        .n_heads = heads,
        .n_kv_heads = kv_heads,
        .head_dim = head_dim};
    free(table);
}

/* The same numbers up to one rounding: the compiler may fuse a rotation's products otherwise. What
 * neither wrote is still the poison. */
static void same16(const unsigned char *got, const unsigned char *want, size_t n, int dtype)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t a, b;
        memcpy(&a, got + 2 * i, sizeof a);
        memcpy(&b, want + 2 * i, sizeof b);
        const double x = (double)from16(a, dtype), y = (double)from16(b, dtype);
        if (a != b && !(fabs(x - y) <= fabs(y) * (dtype ? 0x1p-10 : 0x1p-7) + 1e-5))
            fail_msg("element %zu: %.9g, want %.9g", i, x, y);
    }
}

static void same_pool(void *got, void *want, size_t bytes, int dtype)
{
    unsigned char *a = taken(got, bytes), *b = taken(want, bytes);
    same16(a, b, bytes / 2, dtype);
    free(a);
    free(b);
}

/* q of the rows that have a slot; what stands in other places of qkv is nobody's. */
static void same_q(const struct cache *got, const struct cache *want, int dtype)
{
    const struct kv_append *a = &got->a;
    unsigned char *x = taken(a->qkv, got->qkv_bytes), *y = taken(want->a.qkv, got->qkv_bytes);
    for (int32_t i = 0; i < a->n_rows; i++) {
        if (i % 5 != 4)
            same16(x + i * a->stride * 2, y + i * a->stride * 2,
                   (size_t)a->n_heads * (size_t)a->head_dim, dtype);
    }
    free(x);
    free(y);
}

static void check_append(const struct way *w, int32_t rows, const int32_t *heads, int32_t k,
                         bool with_bias, struct rng *rng)
{
    const int32_t n = (heads[0] + 2 * heads[1]) * heads[2];
    const int dtype = rng_range(rng, 0, 1);
    void *stream = dev_cuda_stream(dev);
    struct product p = {rows, n, k, dtype, .f32 = false, .exact = true};
    struct cache got, want;
    make(&p, rng);
    make_cache(&got, rows, heads[0], heads[1], heads[2], rng);
    want = got;
    want.a.qkv = device_copy(NULL, got.qkv_bytes);
    want.a.k = device_copy(NULL, got.pool_bytes);
    want.a.v = device_copy(NULL, got.pool_bytes);
    uint16_t *bias = random16((size_t)n, dtype, 1.0, rng);
    void *d_bias = device_copy(bias, (size_t)n * 2);
    got.a.bias = want.a.bias = with_bias ? d_bias : NULL;
    const struct gemm_skinny s = {
        .y = want.a.qkv, .x = p.d_x, .w = p.d_w, .rows = rows, .n = n, .k = k};
    assert_int_equal(run_plain(w, &s, dtype, false), 0);
    assert_int_equal(kv_append_cuda(&want.a, dtype, stream), 0);
    assert_int_equal(run_append(w, &s, &got.a, dtype), 0);
    same_q(&got, &want, dtype);
    same_pool(got.a.k, want.a.k, got.pool_bytes, dtype);
    same_pool(got.a.v, want.a.v, got.pool_bytes, dtype);
    dev_release(dev, (void *)(uintptr_t)got.a.cos_sin, 0);
    dev_release(dev, (void *)(uintptr_t)got.a.positions, 0);
    dev_release(dev, (void *)(uintptr_t)got.a.slots, 0);
    dev_release(dev, (void *)(uintptr_t)got.a.tails, 0);
    dev_release(dev, d_bias, 0);
    free(bias);
    drop(&p);
}

static void test_append(void **state)
{
    static const int32_t heads[][3] = {{4, 2, 64}, {4, 1, 128}, {3, 3, 64}, {8, 2, 128}};
    struct rng rng = test_rng("gemm_skinny_append", 25);
    (void)state;
    for (size_t i = 0; i < 4 * sizeof heads / sizeof *heads; i++) {
        for (int w = 0; w < N_WAYS; w++)
            check_append(&ways[w], rng_range(&rng, 1, ways[w].rows), heads[i / 4],
                         8 * rng_range(&rng, 1, 200), i % 2 == 1, &rng);
    }
}

/* ---- kernels that begin before the one before them has ended ---- */

enum { C_HIDDEN = 1024, C_INTER = 2816, C_LAYERS = 3, C_STEPS = 300 };

struct chain {
    int32_t rows;
    const struct way *up_way, *down_way;
    void *up[C_LAYERS], *down[C_LAYERS], *norm;
    void *residual, *hidden, *act, *delta;
    void *bias;
    bool alone; /* each kernel waits until the one before it is gone */
};

static void launched(const struct chain *c, int err)
{
    assert_int_equal(err, 0);
    if (c->alone)
        assert_ok(dev_sync(dev));
}

/* delta = down(swiglu(up(norm(residual += delta)))), as a decode step has it. */
static void chain_layer(const struct chain *c, int layer)
{
    void *stream = dev_cuda_stream(dev);
    const struct nn_cuda_norm norm = {.out = c->hidden,
                                      .residual = c->residual,
                                      .x = c->delta,
                                      .bias = c->bias,
                                      .weight = c->norm,
                                      .n = c->rows,
                                      .width = C_HIDDEN,
                                      .eps = 1e-5f,
                                      .early = true};
    const struct gemm_skinny up = {.y = c->act,
                                   .x = c->hidden,
                                   .w = c->up[layer],
                                   .rows = c->rows,
                                   .n = 2 * C_INTER,
                                   .k = C_HIDDEN,
                                   .bias = c->bias};
    const struct gemm_skinny down = {.y = c->delta,
                                     .x = c->act,
                                     .w = c->down[layer],
                                     .rows = c->rows,
                                     .n = C_HIDDEN,
                                     .k = C_INTER};
    launched(c, nn_cuda_residual_norm(&norm, 0, stream));
    launched(c, run_swiglu(c->up_way, &up, 0));
    launched(c, run_plain(c->down_way, &down, 0, false));
}

static void chain_run(struct chain *c, const uint16_t *x, unsigned char *out)
{
    const size_t bytes = (size_t)c->rows * C_HIDDEN * 2;
    assert_ok(dev_upload(dev, c->residual, x, bytes));
    assert_ok(dev_upload(dev, c->delta, x, bytes));
    for (int i = 0; i < C_STEPS; i++)
        chain_layer(c, i % C_LAYERS);
    assert_ok(dev_download(dev, out, c->residual, bytes));
}

static void *random_device(size_t n, double scale, struct rng *rng)
{
    uint16_t *x = random16(n, 0, scale, rng);
    void *p = device_copy(x, n * 2);
    free(x);
    return p;
}

static void test_chain(void **state)
{
    const size_t most = (size_t)GEMM_DECODE_ROWS * C_HIDDEN;
    struct rng rng = test_rng("chain", 24);
    struct chain c = {.norm = random_device(C_HIDDEN, 1.0, &rng),
                      .bias = random_device((size_t)2 * C_INTER, 0.1, &rng)};
    unsigned char *want = host_alloc(most * 2), *got = host_alloc(most * 2);
    (void)state;
    for (int i = 0; i < C_LAYERS; i++) {
        c.up[i] = random_device((size_t)2 * C_INTER * C_HIDDEN, 0.05, &rng);
        c.down[i] = random_device((size_t)C_HIDDEN * C_INTER, 0.05, &rng);
    }
    c.residual = device_copy(NULL, most * 2);
    c.hidden = device_copy(NULL, most * 2);
    c.delta = device_copy(NULL, most * 2);
    c.act = device_copy(NULL, (size_t)GEMM_DECODE_ROWS * C_INTER * 2);
    for (int i = 0; i < 2 * N_WAYS; i++) { /* each kind after its own kind and after others */
        c.up_way = &ways[i % N_WAYS];
        c.down_way = &ways[i < N_WAYS ? i : (i + 1 + i / 2) % N_WAYS];
        const int32_t fit = c.up_way->rows < c.down_way->rows ? c.up_way->rows : c.down_way->rows;
        c.rows = rng_range(&rng, 1, fit);
        uint16_t *x = random16((size_t)c.rows * C_HIDDEN, 0, 1.0, &rng);
        const size_t bytes = (size_t)c.rows * C_HIDDEN * 2;
        c.alone = true;
        chain_run(&c, x, want);
        c.alone = false;
        for (int again = 0; again < 3; again++) {
            memset(got, 0, bytes);
            chain_run(&c, x, got);
            assert_memory_equal(got, want, bytes);
        }
        free(x);
    }
    for (int i = 0; i < C_LAYERS; i++) {
        dev_release(dev, c.up[i], 0);
        dev_release(dev, c.down[i], 0);
    }
    dev_release(dev, c.residual, 0);
    dev_release(dev, c.hidden, 0);
    dev_release(dev, c.delta, 0);
    dev_release(dev, c.act, 0);
    dev_release(dev, c.norm, 0);
    dev_release(dev, c.bias, 0);
    free(want);
    free(got);
}

/* Added to what is there. */
static void check_added(struct gemm_cublas *g, const struct gemm_cublas_plan *plan,
                        const struct product *p, struct rng *rng)
{
    const size_t n = (size_t)p->rows * (size_t)p->n, all = n + (size_t)p->n;
    const double ulp = p->dtype ? 0x1p-11 : 0x1p-8;
    if (p->f32 || gemm_cublas_is_ours(plan, p->rows))
        return;
    uint16_t *before = random16(all, p->dtype, 3.0, rng), *got = host_alloc(all * sizeof *got);
    void *y = device_copy(before, all * sizeof *before);
    assert_ok(gemm_cublas_add(g, plan, y, p->d_x, p->d_w, p->rows));
    device_take(got, y, all * sizeof *got);
    for (size_t i = 0; i < n; i++) {
        const double was = (double)from16(before[i], p->dtype), want = was + p->want[i];
        const double bound = ulp * (fabs(want) + fabs(p->want[i])) + /* the product, then the sum */
                             p->k * (double)FLT_EPSILON * (p->size[i] + fabs(was));
        assert_close(from16(got[i], p->dtype), want, bound, 0);
    }
    assert_memory_equal(got + n, before + n, (all - n) * sizeof *got);
    free(before);
    free(got);
}

/* Every row count from 1 on finds an algorithm, before and after tuning. */
static void check_library(int dtype, bool f32, struct rng *rng)
{
    static const int32_t counts[] = {1, 3, 8, 17, 33, 130, 256, 257, MAX_ROWS};
    const enum dtype t = dtype ? DTYPE_F16 : DTYPE_BF16;
    struct gemm_cublas *g;
    struct gemm_cublas_plan *plan;
    struct err_msg why = {{0}};
    assert_ok(gemm_cublas_open(&g, dev, t, dev_cuda_stream(dev), &why));
    assert_ok(gemm_cublas_plan(g, &plan, 264, 520, MAX_ROWS, f32 ? DTYPE_F32 : t, &why));
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        struct product p = {counts[i], 264, 520, dtype, .f32 = f32};
        make(&p, rng);
        void *y = poisoned(&p);
        assert_ok(gemm_cublas_run(g, plan, y, p.d_x, p.d_w, p.rows));
        check(&p, y, "library");
        if (gemm_cublas_bucket(p.rows) == p.rows) { /* memory for the whole bucket */
            const void *w = p.d_w;
            y = poisoned(&p);
            const struct gemm_trial trial = {.y = y, .x = p.d_x, .w = &w, .n_w = 1, .rows = p.rows};
            assert_ok(gemm_cublas_tune(g, plan, &trial));
            assert_ok(gemm_cublas_run(g, plan, y, p.d_x, p.d_w, p.rows));
            check(&p, y, "tuned");
        }
        check_added(g, plan, &p, rng);
        drop(&p);
    }
    gemm_cublas_plan_free(plan);
    assert_int_equal(gemm_cublas_plan(g, &plan, 12, 520, 8, t, &why), ERR_UNSUPPORTED);
    gemm_cublas_close(g);
}

static void test_library(void **state)
{
    struct rng rng = test_rng("gemm_cublas", 22);
    (void)state;
    for (int i = 0; i < 4; i++)
        check_library(i % 2, i > 1, &rng);
}

static void test_buckets(void **state)
{
    (void)state;
    for (int32_t rows = 1, last = 0; rows <= 20000; rows++) {
        const int32_t b = gemm_cublas_bucket(rows);
        assert_true(b >= rows && b >= last);
        assert_int_equal(gemm_cublas_bucket(b), b);
        last = b;
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plain),   cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_append),  cmocka_unit_test(test_swiglu_many),
        cmocka_unit_test(test_chain),   cmocka_unit_test(test_library),
        cmocka_unit_test(test_tuned),   cmocka_unit_test(test_buckets),
        cmocka_unit_test(test_refused),
    };
    if (!have_device())
        return 77;
    assert_ok(gemm_decode_open(&decode, NULL));
    swiglu = gemm_swiglu_open();
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    gemm_decode_close(decode);
    dev_close(dev);
    return failed;
}
