/* Products on a GPU, the library's and our own for few rows, beside double precision: both dtypes,
 * 16-bit and f32 results, shapes that no tile divides. */
#include "core/dev_cuda.h"
#include "model/gemm_cublas.h"
#include "model/gemm_skinny.h"
#include "tests/cuda_case.h"

#include <float.h>

enum { MAX_ROWS = 300 };

struct product {
    int32_t rows, n, k;
    int dtype; /* 0 bf16, 1 f16 */
    bool f32;
    uint16_t *x, *w;     /* host */
    double *want, *size; /* [rows, n] and the sums of magnitudes, for the bound */
    void *d_x, *d_w;
};

static void make(struct product *p, struct rng *rng)
{
    const size_t rows = (size_t)p->rows, n = (size_t)p->n, k = (size_t)p->k;
    p->x = random16(rows * k, p->dtype, 1.0, rng);
    p->w = random16(n * k, p->dtype, 0.1, rng);
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

static void test_skinny(void **state)
{
    static const int32_t shapes[][2] = {{8, 8},     {40, 136},  {64, 1024}, {256, 264},
                                        {520, 512}, {24, 3000}, {1000, 128}};
    struct rng rng = test_rng("gemm_skinny", 21);
    (void)state;
    for (size_t i = 0; i < 2 * sizeof shapes / sizeof *shapes; i++) {
        for (int32_t rows = 1; rows <= GEMM_SKINNY_ROWS; rows += rows < 3 || rows > 14 ? 1 : 3) {
            struct product p = {rows, shapes[i / 2][0], shapes[i / 2][1], (int)(i % 2),
                                .f32 = rng_range(&rng, 0, 1) == 1};
            make(&p, &rng);
            for (int v = 1; v <= GEMM_SKINNY_VARIANTS; v++) {
                void *y = poisoned(&p);
                const struct gemm_skinny s = {y, p.d_x, p.d_w, rows, p.n, p.k};
                assert_int_equal(gemm_skinny_launch(&s, v, p.dtype, p.f32, dev_cuda_stream(dev)),
                                 0);
                check(&p, y, v == 1 ? "variant 1" : "variant 2");
            }
            drop(&p);
        }
    }
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
            assert_ok(gemm_cublas_tune(g, plan, y, p.d_x, &w, 1, p.rows));
            assert_ok(gemm_cublas_run(g, plan, y, p.d_x, p.d_w, p.rows));
            check(&p, y, "tuned");
        }
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
        cmocka_unit_test(test_skinny),
        cmocka_unit_test(test_library),
        cmocka_unit_test(test_buckets),
    };
    if (!have_device())
        return 77;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dev_close(dev);
    return failed;
}
