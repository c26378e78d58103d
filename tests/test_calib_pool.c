/* calibration/calib_pool: the grid of ranks; thresholds under which the samples together keep the
 * level's share of pages, counted on the maxima themselves; one sample gives what the mean gives;
 * smoothing beside its definition. */
#include "tests/test.h"

#include "calibration/calib_pool.h"
#include "core/pool.h"

#include <stdbool.h>

enum { LAYERS = 2, HEADS = 2, NB = 40, PAGES = 2 * NB, SAMPLES = 6, LEVELS = 3 };
static const int32_t levels[LEVELS] = {2, 11, 40};

static void grid(void **state)
{
    (void)state;
    struct rng r = test_rng("grid", 1);
    for (int round = 0; round < 500; round++) {
        int32_t k[CALIB_MAX_LEVELS], got[CALIB_MAX_LEVELS], n = rng_range(&r, 1, 20), at = 0;
        const int32_t blocks = rng_range(&r, 1, round & 1 ? 9000 : 30);
        for (int32_t i = 0; i < n; i++)
            k[i] = (i ? k[i - 1] : 0) + rng_range(&r, 1, 300);
        if (round == 0) {
            n = CALIB_MAX_LEVELS;
            for (int32_t i = 0; i < n; i++)
                k[i] = i + 1;
        }
        const int32_t n_got = calib_pool_grid(got, k, n, blocks);
        assert_true(n_got >= n && n_got <= CALIB_MAX_LEVELS);
        for (int32_t i = 0; i < n_got; i++) {
            assert_true(got[i] > (i ? got[i - 1] : 0));
            at += at < n && k[at] == got[i];
        }
        assert_int_equal(at, n);
    }
}

/* Maxima [LAYERS][HEADS][NB][PAGES] of samples that differ in level and spread. */
static float *make(struct rng *r, int sample)
{
    float *v = malloc(sizeof *v * LAYERS * HEADS * NB * PAGES);
    assert_non_null(v);
    for (int i = 0; i < LAYERS * HEADS * NB * PAGES; i++)
        v[i] = (float)(rng_normal(r) * (1 + sample % 3) + sample * 1.5);
    return v;
}

static void feed(struct calib *c, const float *v, int32_t n_tokens)
{
    for (int layer = 0; layer < LAYERS; layer++)
        calib_tiles(c, layer, 0, n_tokens, v + (size_t)layer * HEADS * NB * PAGES, NB, PAGES);
    assert_ok(calib_end_sample(c, n_tokens, NULL));
}

static int32_t kept(const float *v, int row, int32_t block, float t)
{
    int32_t n = 0;
    for (int32_t p = 0; p < 2 * block; p++)
        n += !(v[(row * NB + block) * PAGES + p] < t);
    return n;
}

/* Over the pool k pages a block, but for the grid; the mean of thresholds is far from it. */
static void density_is_met(void **state)
{
    (void)state;
    struct rng r = test_rng("pool", 2);
    struct pool *workers = NULL;
    float *v[SAMPLES], t[LEVELS * LAYERS * HEADS * NB], mean[LEVELS * LAYERS * HEADS * NB];
    int32_t grid_k[CALIB_MAX_LEVELS], lengths[SAMPLES];
    struct calib *c = NULL;
    struct calib_pool *pool = NULL;
    double off[2] = {0, 0}, n = 0;
    assert_ok(pool_create(&workers, 3));
    const int32_t n_grid = calib_pool_grid(grid_k, levels, LEVELS, NB);
    const struct calib_config cfg = {LAYERS, HEADS, NB, 128, grid_k, n_grid, workers, NULL};
    assert_ok(calib_create(&c, &cfg, NULL));
    assert_ok(calib_pool_create(&pool, &cfg, SAMPLES, NULL));
    for (int s = 0; s < SAMPLES; s++) {
        v[s] = make(&r, s);
        lengths[s] = s == 2 ? 30 * 128 + 5 : (NB - 1) * 128; /* nobody fills the last block */
        feed(c, v[s], lengths[s]);
        assert_ok(calib_pool_add(pool, calib_sample(c), lengths[s]));
    }
    assert_ok(calib_pool_thresholds(pool, levels, LEVELS, t, NULL));
    float *all = malloc(sizeof *all * (size_t)n_grid * LAYERS * HEADS * NB);
    assert_non_null(all);
    assert_ok(calib_thresholds(c, all, NULL));
    for (int s = 0, g = 0; s < LEVELS; s++) {
        while (grid_k[g] != levels[s])
            g++;
        memcpy(mean + s * LAYERS * HEADS * NB, all + g * LAYERS * HEADS * NB,
               sizeof(float) * LAYERS * HEADS * NB);
    }
    for (int i = 0; i < LEVELS * LAYERS * HEADS * NB; i++) {
        const int32_t block = i % NB, row = i / NB % (LAYERS * HEADS);
        const int32_t k = levels[i / NB / (LAYERS * HEADS)];
        if (2 * block <= k) {
            assert_true(t[i] == -INFINITY);
            continue;
        }
        if (block == NB - 1) {
            assert_true(t[i] == t[i - 1]);
            continue;
        }
        double got = 0, by_mean = 0, count = 0;
        for (int s = 0; s < SAMPLES; s++) {
            if (lengths[s] < (block + 1) * 128)
                continue;
            got += kept(v[s], row, block, t[i]);
            by_mean += kept(v[s], row, block, mean[i]);
            count++;
        }
        assert_close(got / count, k, 2.01 / count, 0.05); /* of two maxima, and the grid */
        off[0] += fabs(got / count - k);
        off[1] += fabs(by_mean / count - k);
        n++;
    }
    assert_true(off[0] / n < 0.5 && off[1] / n > 2);
    for (int s = 0; s < SAMPLES; s++)
        free(v[s]);
    free(all);
    calib_destroy(c);
    calib_pool_destroy(pool);
    pool_destroy(workers);
}

/* One sample, or many equal ones: the midpoints themselves. */
static void equal_samples(void **state)
{
    (void)state;
    struct rng r = test_rng("pool", 3);
    int32_t grid_k[CALIB_MAX_LEVELS];
    struct calib *c = NULL;
    struct calib_pool *pool = NULL;
    float t[LAYERS * HEADS * NB];
    const int32_t n_grid = calib_pool_grid(grid_k, &levels[1], 1, NB);
    const struct calib_config cfg = {LAYERS, HEADS, NB, 128, grid_k, n_grid, NULL, NULL};
    float *v = make(&r, 1), *all = malloc(sizeof *all * (size_t)n_grid * LAYERS * HEADS * NB);
    assert_non_null(all);
    assert_ok(calib_create(&c, &cfg, NULL));
    assert_ok(calib_pool_create(&pool, &cfg, 2, NULL));
    struct err_msg why = {""};
    assert_int_equal(calib_pool_thresholds(pool, &levels[1], 1, t, &why), ERR_INVALID);
    for (int s = 0; s < 2; s++) {
        feed(c, v, NB * 128);
        assert_ok(calib_pool_add(pool, calib_sample(c), NB * 128));
        assert_ok(calib_pool_thresholds(pool, &levels[1], 1, t, NULL));
        assert_ok(calib_thresholds(c, all, NULL));
        int g = 0;
        while (grid_k[g] != levels[1])
            g++;
        for (int i = 0; i < LAYERS * HEADS * NB; i++) {
            const float want = all[g * LAYERS * HEADS * NB + i];
            assert_true(t[i] == want || (double)fabsf(t[i] - want) < 1e-6);
        }
    }
    free(v);
    free(all);
    calib_destroy(c);
    calib_pool_destroy(pool);
    calib_pool_destroy(NULL);
}

/* The isotonic fit: min over ends of max over beginnings of means. */
static void smooth(void **state)
{
    (void)state;
    enum { ROWS = 5, COLS = 30, FIRST = 4 };
    struct rng r = test_rng("smooth", 4);
    float t[ROWS * COLS], before[ROWS * COLS];
    for (int i = 0; i < ROWS * COLS; i++)
        before[i] = i % COLS < FIRST ? -INFINITY : (float)(rng_normal(&r) + i % COLS * 0.05);
    memcpy(t, before, sizeof t);
    calib_smooth(t, ROWS, COLS, FIRST);
    for (int row = 0; row < ROWS; row++) {
        for (int i = 0; i < COLS; i++) {
            const float *b = before + row * COLS;
            double least = INFINITY;
            if (i < FIRST) {
                assert_true(t[row * COLS + i] == -INFINITY);
                continue;
            }
            for (int end = i; end < COLS; end++) {
                double most = -INFINITY;
                for (int begin = FIRST; begin <= i; begin++) {
                    double sum = 0;
                    for (int j = begin; j <= end; j++)
                        sum += (double)b[j];
                    most = fmax(most, sum / (end - begin + 1));
                }
                least = fmin(least, most);
            }
            assert_close((double)t[row * COLS + i], least, 1e-5, 0);
        }
    }
    calib_smooth(t, 1, COLS, COLS); /* nothing is gated */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(grid),
        cmocka_unit_test(density_is_met),
        cmocka_unit_test(equal_samples),
        cmocka_unit_test(smooth),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
