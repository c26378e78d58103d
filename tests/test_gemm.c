/* The matrix product: right, and the same bits for a row wherever it stands. */
#include "core/dev.h"
#include "core/mem.h"
#include "model/gemm.h"
#include "tests/test.h"

struct shape {
    int32_t n, k;
};

/* Small models, the needle model, ragged panels, the OpenBLAS small-matrix limit on both sides. */
static const struct shape shapes[] = {{64, 32},   {1, 1},      {7, 384},    {40, 32},
                                      {640, 384}, {384, 384},  {1536, 384}, {384, 768},
                                      {512, 384}, {100, 1000}, {300, 65},   {257, 129}};

static float *random_matrix(struct rng *rng, size_t rows, size_t cols)
{
    float *m = mem_try_aligned(rows * cols, sizeof *m);
    assert_non_null(m);
    for (size_t i = 0; i < rows * cols; i++)
        m[i] = (float)rng_normal(rng);
    return m;
}

static void check_value(float y, const float *x, const float *w, int32_t k)
{
    double sum = 0.0, size = 0.0;
    for (int32_t i = 0; i < k; i++) {
        double p = (double)x[i] * (double)w[i];
        sum += p;
        size += fabs(p);
    }
    assert_close((double)y, sum, 1e-6 * size, 0);
}

static void check_values(const float *y, const float *x, const float *w, int32_t rows,
                         struct shape s)
{
    for (int32_t i = 0; i < rows; i++) {
        for (int32_t j = 0; j < s.n; j++)
            check_value(y[i * s.n + j], x + (size_t)i * (size_t)s.k, w + (size_t)j * (size_t)s.k,
                        s.k);
    }
}

static void test_values(void **state)
{
    struct rng rng = test_rng("gemm values", 31);
    struct dev *d;
    struct gemm *g;
    (void)state;

    assert_ok(dev_open(&d, &dev_cpu, 0, 2, NULL));
    assert_ok(gemm_open(&g, d));
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const struct shape s = shapes[i];
        const int32_t rows = rng_range(&rng, 1, 20);
        struct gemm_plan plan;
        assert_ok(gemm_plan(g, &plan, s.n, s.k, NULL));
        const size_t padded = (size_t)gemm_padded_rows(&plan, rows);
        printf("# [%d, %d]: panel %d granule %d tiles %#x%s\n", s.n, s.k, plan.panel, plan.granule,
               plan.tiles, plan.transposed ? " transposed" : "");
        float *x = random_matrix(&rng, padded, (size_t)s.k),
              *w = random_matrix(&rng, (size_t)s.n, (size_t)s.k),
              *y = random_matrix(&rng, padded, (size_t)s.n);
        gemm_run(g, &plan, y, x, w, rows);
        check_values(y, x, w, rows, s);
        mem_free(x);
        mem_free(w);
        mem_free(y);
    }
    gemm_close(g);
    dev_close(d);
}

struct bench {
    struct gemm *g[3]; /* one, two and three threads */
    struct dev *d[3];
};

static void bench_open(struct bench *b)
{
    for (int i = 0; i < 3; i++) {
        assert_ok(dev_open(&b->d[i], &dev_cpu, 0, i + 1, NULL));
        assert_ok(gemm_open(&b->g[i], b->d[i]));
    }
}

static void bench_close(struct bench *b)
{
    for (int i = 0; i < 3; i++) {
        gemm_close(b->g[i]);
        dev_close(b->d[i]);
    }
}

/* Random selections of rows, in random order and number, some of them poisoned: the healthy ones
 * have the bits of the full product. */
static void check_rows(struct bench *b, struct rng *rng, struct shape s)
{
    enum { ROWS = 333, ROUNDS = 12 };
    struct gemm_plan plan;
    assert_ok(gemm_plan(b->g[0], &plan, s.n, s.k, NULL));
    const size_t padded = (size_t)gemm_padded_rows(&plan, ROWS), k = (size_t)s.k, n = (size_t)s.n;
    float *x = random_matrix(rng, padded, k), *w = random_matrix(rng, n, k),
          *want = random_matrix(rng, padded, n), *px = random_matrix(rng, padded, k),
          *got = random_matrix(rng, padded, n);

    gemm_run(b->g[0], &plan, want, x, w, ROWS);
    for (int round = 0; round < ROUNDS; round++) {
        int32_t pick[ROWS], rows = rng_range(rng, 1, round % 2 ? ROWS : 24);
        for (int32_t i = 0; i < rows; i++) {
            pick[i] = rng_range(rng, 0, ROWS - 1);
            memcpy(px + (size_t)i * k, x + (size_t)pick[i] * k, k * sizeof *x);
            if (rng_range(rng, 0, 9) == 0) {
                px[(size_t)i * k + (size_t)rng_range(rng, 0, s.k - 1)] = NAN;
                pick[i] = -1;
            }
        }
        gemm_run(b->g[rng_range(rng, 0, 2)], &plan, got, px, w, rows);
        for (int32_t i = 0; i < rows; i++) {
            const float *y = got + (size_t)i * n;
            if (pick[i] < 0)
                assert_true(isnan(y[0]));
            else if (memcmp(y, want + (size_t)pick[i] * n, n * sizeof *y) != 0)
                fail_msg("[%d, %d]: row %d of %d differs", s.n, s.k, i, rows);
        }
    }
    mem_free(x);
    mem_free(w);
    mem_free(want);
    mem_free(px);
    mem_free(got);
}

static void test_row_bits(void **state)
{
    struct rng rng = test_rng("gemm rows", 32);
    struct bench b;
    (void)state;
    bench_open(&b);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        check_rows(&b, &rng, shapes[i]);
    for (int i = 0; i < 6; i++)
        check_rows(&b, &rng, (struct shape){rng_range(&rng, 1, 400), rng_range(&rng, 1, 400)});
    bench_close(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_row_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
