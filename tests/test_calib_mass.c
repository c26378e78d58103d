/* calibration/calib_mass: the split of a budget beside a search through all splits; curves of lost
 * mass beside a sum by definition; what is chosen costs what was asked for; samples written and
 * read back count alike. All on made-up maxima and mass: no model. */
#include "tests/test.h"

#include "calibration/calib_mass.h"
#include "calibration/thresholds.h"
#include "core/mem.h"
#include "core/pool.h"
#include "model/model.h"

#include <stdbool.h>

enum { LAYERS = 2, HEADS = 3, ROWS = LAYERS * HEADS, NB = 9, PAGES = 2 * NB };

/* ---- the rule on bare numbers ---- */

enum { SPLIT_ROWS = 4, SPLIT_N = 5 };

static double total(const double *values, const int32_t *pick, bool by_row)
{
    double sum = 0;
    for (int r = 0; r < SPLIT_ROWS; r++)
        sum += values[(by_row ? r * SPLIT_N : 0) + pick[r]];
    return sum;
}

/* The least loss of all splits that cost no more than `most`. */
static double best_split(const double *cost, const double *lost, double most)
{
    double best = INFINITY;
    for (int i = 0; i < SPLIT_N * SPLIT_N * SPLIT_N * SPLIT_N; i++) {
        const int32_t pick[SPLIT_ROWS] = {i % SPLIT_N, i / SPLIT_N % SPLIT_N,
                                          i / SPLIT_N / SPLIT_N % SPLIT_N,
                                          i / SPLIT_N / SPLIT_N / SPLIT_N};
        if (total(cost, pick, false) <= most + 1e-9)
            best = fmin(best, total(lost, pick, true));
    }
    return best;
}

/* With equal steps of cost and convex curves the split is the best of all. */
static void convex_split_is_the_best(void **state)
{
    static const double cost[SPLIT_N] = {1, 2, 3, 4, 5};
    struct rng r = test_rng("budget", 1);
    bool uneven = false;
    (void)state;
    for (int round = 0; round < 100; round++) {
        double lost[SPLIT_ROWS * SPLIT_N];
        for (int row = 0; row < SPLIT_ROWS; row++) {
            double gain = 0, *at = lost + (size_t)row * SPLIT_N;
            at[SPLIT_N - 1] = 0;
            for (int i = SPLIT_N - 1; i-- > 0;)
                at[i] = at[i + 1] + (gain += rng_range(&r, 0, 1000) * (row + 1) * 0.01);
        }
        int32_t before[SPLIT_ROWS] = {0};
        for (int budget = SPLIT_ROWS; budget <= SPLIT_ROWS * SPLIT_N; budget++) {
            int32_t pick[SPLIT_ROWS];
            calib_budget(cost, lost, SPLIT_ROWS, SPLIT_N, budget, pick);
            assert_close(total(cost, pick, false), budget, 1e-9, 0);
            assert_close(total(lost, pick, true), best_split(cost, lost, budget), 1e-9, 1e-9);
            for (int row = 0; row < SPLIT_ROWS; row++) {
                uneven = uneven || pick[row] != pick[0];
                assert_true(pick[row] >= before[row]);
                before[row] = pick[row];
            }
        }
    }
    assert_true(uneven);
}

/* A curve whose gain comes late is worth its mean: 0 0 0 90 over three steps is 30 each, more than
 * 20 once and less than 40. */
static void late_gains_count_by_their_mean(void **state)
{
    static const double cost[4] = {0, 1, 2, 3};
    static const double lost[3 * 4] = {90, 90, 90, 0, 20, 0, 0, 0, 40, 0, 0, 0};
    static const int32_t want[6][3] = {{0, 0, 0}, {0, 0, 1}, {1, 0, 1},
                                       {2, 0, 1}, {3, 0, 1}, {3, 1, 1}};
    (void)state;
    for (int budget = 0; budget < 6; budget++) {
        int32_t pick[3];
        calib_budget(cost, lost, 3, 4, budget, pick);
        assert_memory_equal(pick, want[budget], sizeof pick);
    }
    int32_t pick[3];
    calib_budget(cost, lost, 3, 4, 0.4, pick); /* less than half a step: without it */
    assert_int_equal(pick[2], 0);
    calib_budget(cost, lost, 3, 4, 0.6, pick);
    assert_int_equal(pick[2], 1);
    calib_budget(cost, lost, 3, 1, 7, pick); /* nothing to choose */
    assert_true(pick[0] == 0 && pick[1] == 0 && pick[2] == 0);
}

/* ---- curves ---- */

/* Maxima and mass [LAYERS, HEADS, groups, PAGES]; heads differ in how much their first pages hold.
 */
static void make(struct rng *r, float *max, float *mass, int32_t groups)
{
    for (int32_t i = 0; i < ROWS * groups * PAGES; i++) {
        const int32_t head = i / PAGES / groups;
        max[i] = (float)rng_range(r, 0, 40);
        mass[i] = expf(max[i] * 0.05f * (float)head) * 1e-3f * (float)rng_range(r, 1, 9);
    }
}

/* Mass of all but the k pages with the largest maxima, of pages [0, n). */
static double lost_by_definition(const float *max, const float *mass, int32_t n, int32_t k)
{
    bool kept[PAGES] = {false};
    double lost = 0;
    for (int32_t round = 0; round < k && round < n; round++) {
        int32_t best = -1;
        for (int32_t j = 0; j < n; j++) {
            if (!kept[j] &&
                (best < 0 || max[j] > max[best] || (max[j] == max[best] && mass[j] < mass[best])))
                best = j;
        }
        kept[best] = true;
    }
    for (int32_t j = 0; j < n; j++)
        lost += kept[j] ? 0 : (double)mass[j];
    return lost;
}

static struct calib_mass *create(int32_t gate_rows, int32_t *k, struct pool *pool,
                                 struct calib_config *cfg)
{
    struct calib_mass *m = NULL;
    *cfg = (struct calib_config){.n_layers = LAYERS,
                                 .n_heads = HEADS,
                                 .n_blocks = NB,
                                 .gate_rows = gate_rows,
                                 .k = k,
                                 .n_levels = calib_mass_candidates(k, NB),
                                 .pool = pool};
    calib_mass_create(&m, cfg);
    return m;
}

static void feed(struct calib_mass *m, const float *max, const float *mass, int32_t groups)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        const size_t at = (size_t)layer * HEADS * (size_t)groups * PAGES;
        const struct model_mass tiles = {layer, 0, NB * 128, max + at, mass + at, groups, PAGES};
        calib_mass_tiles(m, &tiles);
    }
}

static void curves_are_the_mass_beyond_k(void **state)
{
    struct rng r = test_rng("mass", 2);
    struct pool *pool = NULL;
    (void)state;
    assert_ok(pool_create(&pool, 2));
    for (int32_t rows = 64; rows <= 128; rows += 64) {
        const int32_t halves = 128 / rows, groups = NB * halves;
        const size_t n = (size_t)ROWS * (size_t)groups * PAGES;
        float *max = mem_zalloc(n, sizeof *max), *mass = mem_zalloc(n, sizeof *mass);
        int32_t k[CALIB_MAX_LEVELS];
        struct calib_config cfg;
        struct calib_mass *m = create(rows, k, rows == 64 ? pool : NULL, &cfg);
        double want[ROWS][PAGES] = {{0}};
        for (int sample = 0; sample < 2; sample++) {
            make(&r, max, mass, groups);
            feed(m, max, mass, groups);
            assert_ok(calib_mass_end_sample(m, NB * 128 + 77, NULL));
            for (int32_t i = 0; i < ROWS * groups; i++) {
                for (int32_t kept = 1; kept < PAGES; kept++)
                    want[i / groups][kept] +=
                        lost_by_definition(max + (size_t)i * PAGES, mass + (size_t)i * PAGES,
                                           i % groups / halves * 2, kept) /
                        (2 * groups);
            }
        }
        for (int32_t head = 0; head < ROWS; head++) {
            for (int32_t i = 0; i < cfg.n_levels; i++)
                assert_close(calib_mass_lost(m, head, k[i]), want[head][k[i]], 1e-9, 1e-12);
        }
        assert_int_equal(cfg.n_levels, 2 * (NB - 1) - 1); /* all there are */
        assert_true(want[ROWS - 1][4] > 0);
        calib_mass_destroy(m);
        mem_free(max);
        mem_free(mass);
    }
    pool_destroy(pool);
}

/* The heads' density is the budget's to within half a step, heads that hold more get more, and a
 * larger budget takes from none. */
static void choice_meets_the_density(void **state)
{
    enum { N = ROWS * NB * PAGES };
    struct rng r = test_rng("choice", 3);
    float *max = mem_zalloc(N, sizeof *max), *mass = mem_zalloc(N, sizeof *mass);
    int32_t k[CALIB_MAX_LEVELS], before[ROWS] = {0}, head_k[ROWS];
    struct calib_config cfg;
    struct calib_mass *m = create(128, k, NULL, &cfg), *again = create(128, k, NULL, &cfg);
    (void)state;
    make(&r, max, mass, NB);
    feed(m, max, mass, NB);
    memcpy(calib_mass_sample(again), calib_mass_sample(m),
           sizeof(double) * (size_t)cfg.n_levels * ROWS);
    assert_ok(calib_mass_end_sample(m, NB * 128, NULL));
    assert_ok(calib_mass_end_sample(again, NB * 128, NULL));
    const double step = thresholds_predicted_density(2, NB * 128, 128) -
                        thresholds_predicted_density(1, NB * 128, 128);
    for (int i = 35; i <= 95; i += 10) {
        int32_t same[ROWS];
        double lost = 0, lost_one = 0;
        calib_mass_choose(m, i * 0.01, NB * 128, head_k);
        calib_mass_choose(again, i * 0.01, NB * 128, same);
        assert_memory_equal(same, head_k, sizeof same);
        const double density = thresholds_heads_density(head_k, ROWS, NB * 128, 128);
        assert_close(density, i * 0.01, step / ROWS / 2 + 1e-9, 0);
        const int32_t one = thresholds_k_for_density(density + 1e-9, NB * 128, 128) - 1;
        for (int32_t h = 0; h < ROWS; h++) {
            assert_true(head_k[h] >= before[h]);
            before[h] = head_k[h];
            lost += calib_mass_lost(m, h, head_k[h]);
            lost_one += calib_mass_lost(m, h, one > 0 ? one : 1);
        }
        assert_true(lost < lost_one); /* one k for all, at no more density, loses more */
    }
    calib_mass_destroy(m);
    calib_mass_destroy(again);
    mem_free(max);
    mem_free(mass);
}

static void mass_that_is_not_finite(void **state)
{
    enum { N = ROWS * NB * PAGES };
    struct rng r = test_rng("nan mass", 4);
    float *max = mem_zalloc(N, sizeof *max), *mass = mem_zalloc(N, sizeof *mass);
    int32_t k[CALIB_MAX_LEVELS];
    struct calib_config cfg;
    struct calib_mass *m = create(128, k, NULL, &cfg);
    struct err_msg why = {""};
    (void)state;
    make(&r, max, mass, NB);
    mass[(ROWS - 1) * NB * PAGES + (NB - 1) * PAGES + 3] = NAN;
    feed(m, max, mass, NB);
    assert_int_equal(calib_mass_end_sample(m, NB * 128, &why), ERR_NUMERIC);
    assert_non_null(strstr(why.text, "NaN"));
    make(&r, max, mass, NB);
    feed(m, max, mass, NB);
    assert_ok(calib_mass_end_sample(m, NB * 128, NULL)); /* nothing of it was left */
    assert_true(isfinite(calib_mass_lost(m, ROWS - 1, 3)));
    calib_mass_destroy(m);
    calib_mass_destroy(NULL);
    mem_free(max);
    mem_free(mass);
}

static void candidates_of_few_blocks(void **state)
{
    int32_t k[CALIB_MAX_LEVELS];
    (void)state;
    assert_int_equal(calib_mass_candidates(k, 1), 1);
    assert_int_equal(k[0], 1);
    assert_int_equal(calib_mass_candidates(k, 2), 1);
    assert_int_equal(calib_mass_candidates(k, 4), 5);
    assert_int_equal(k[4], 5);
    assert_int_equal(calib_mass_candidates(k, 1000), CALIB_MAX_LEVELS);
    assert_int_equal(k[CALIB_MAX_LEVELS - 1], 1997);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(convex_split_is_the_best),
        cmocka_unit_test(late_gains_count_by_their_mean),
        cmocka_unit_test(curves_are_the_mass_beyond_k),
        cmocka_unit_test(choice_meets_the_density),
        cmocka_unit_test(mass_that_is_not_finite),
        cmocka_unit_test(candidates_of_few_blocks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
