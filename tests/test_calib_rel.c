/* calibration/calib_rel: the law comes back from counts that follow it, from whole prompts and
 * their beginnings, below lambda = 1 and beyond; what has no law is refused. */
#include "tests/test.h"

#include "calibration/calib_rel.h"
#include "model/batch.h"

enum { LAYERS = 2, HEADS = 3, BINS = CALIB_REL_BELOW_1 + 1 };

/* Decisions off the diagonal of one head over n tokens, multiple of 128. */
static double decisions(int32_t rows, int32_t n)
{
    const double blocks = n / 128;
    return blocks * (blocks - 1) * (128.0 / rows);
}

/* Fills the counts so that the share skipped of all pages, diagonal included, is the law's. */
static void fill(struct calib_rel *r, int32_t n, double ln_a, double b)
{
    const struct attn_rel_counts *c = calib_rel_counts(r);
    assert_int_equal(c->n_edges, CALIB_REL_BELOW_1);
    for (int i = 0; i < LAYERS * 2 * HEADS; i++) {
        const int32_t rows = i / HEADS % 2 ? 64 : 128;
        const double off = decisions(rows, n), all = off + n / 128 * (rows == 64 ? 3.0 : 2.0);
        uint64_t *bins = c->bins + (size_t)i * BINS, before = 0;
        for (int e = 0; e < CALIB_REL_BELOW_1; e++) {
            double s = ((double)c->edges[e] + log(n) - ln_a) / b * all / off;
            s = s < 0 ? 0 : s > 1 ? 1 : s;
            const uint64_t skipped = (uint64_t)llround(s * off);
            bins[e] = skipped - before;
            before = skipped;
        }
        bins[CALIB_REL_BELOW_1] = (uint64_t)off - before;
    }
}

static void trials_increase(void **state)
{
    (void)state;
    const float *t = calib_rel_trials();
    assert_close(exp((double)t[0]), 1e-6, 0, 1e-5);
    for (int i = 0; i < CALIB_REL_TRIALS; i++)
        assert_true((t[i] < 0) == (i < CALIB_REL_BELOW_1) && (i == 0 || t[i] > t[i - 1]));
    assert_close(exp((double)t[CALIB_REL_BELOW_1 - 1]), 0.99, 0, 1e-5);
    assert_true(t[CALIB_REL_TRIALS - 1] == THRESHOLDS_REL_LN_MAX);
}

static void the_law_comes_back(void **state)
{
    (void)state;
    static const int32_t lengths[] = {8192, 2048, 16384};
    struct calib_rel *r = NULL;
    struct thresholds_rel f;
    struct err_msg why = {""};
    calib_rel_create(&r, LAYERS, HEADS);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        for (int32_t at = 512; at <= lengths[i]; at += 512) { /* the beginning has the law too */
            fill(r, at, 2.5, 9);
            calib_rel_reached(r, at, at == lengths[i]);
        }
    }
    for (int32_t rows = 64; rows <= 128; rows += 64) {
        if (calib_rel_fit(r, rows, &f, &why) < 0)
            fail_msg("%s", why.text);
        assert_close(f.ln_a, 2.5, 0.05, 0);
        assert_close(f.b, 9, 0.05, 0);
        assert_true(f.r2 > 0.999 && f.min >= 0.1 && f.max <= 0.9);
        for (int i = 0; i < THRESHOLDS_REL_KNOTS; i++)
            assert_close(f.knots[i], 2.5 + 9 * (i + 1) / 10.0, 0.15, 0);
        assert_close(thresholds_rel_ln_lambda(&f, 0.6, 10000), 2.5 + 9 * 0.4 - log(10000), 0.15, 0);
    }
    for (int e = 1; e < CALIB_REL_BELOW_1; e++)
        assert_true(calib_rel_skipped(r, 64, e, 1, 2) >= calib_rel_skipped(r, 64, e - 1, 1, 2));
    calib_rel_destroy(r);
    calib_rel_destroy(NULL);
}

/* Gated runs, where only densities are known. */
static void from_gated_runs(void **state)
{
    (void)state;
    struct calib_rel *r = NULL;
    struct thresholds_rel f;
    calib_rel_create(&r, LAYERS, HEADS);
    for (int e = 0; e < CALIB_REL_TRIALS; e++) {
        for (int32_t at = 1000; at <= 4000; at += 1000) {
            const double s = ((double)calib_rel_trials()[e] + log(at) - 1) / 12;
            calib_rel_gated(r, 128, e, 1 - s, at, at == 4000);
        }
    }
    assert_ok(calib_rel_fit(r, 128, &f, NULL));
    assert_close(f.ln_a, 1, 1e-4, 0);
    assert_close(f.b, 12, 1e-4, 0);
    assert_int_equal(calib_rel_fit(r, 64, &f, NULL), ERR_INVALID); /* nothing was run with 64 */
    calib_rel_destroy(r);
}

/* A dense run counts the trials below 1, gated runs of the same prompt add the others: the knots go
 * beyond lambda = 1, as does what a density gets. */
static void beyond_1(void **state)
{
    (void)state;
    enum { LENGTH = 4096 };
    struct calib_rel *r = NULL;
    struct thresholds_rel f;
    const double ln_a = log(LENGTH) - 4.2, b = 7; /* S is 0.6 at lambda = 1 */
    calib_rel_create(&r, LAYERS, HEADS);
    fill(r, LENGTH, ln_a, b);
    calib_rel_reached(r, LENGTH, true);
    for (int32_t rows = 64; rows <= 128; rows += 64) {
        for (int e = CALIB_REL_BELOW_1; e < CALIB_REL_TRIALS; e++) {
            const double s = ((double)calib_rel_trials()[e] + 4.2) / b;
            calib_rel_gated(r, rows, e, 1 - (s < 1 ? s : 1), LENGTH, true);
        }
        assert_ok(calib_rel_fit(r, rows, &f, NULL));
        assert_close(f.knots[4], ln_a + 0.5 * b, 0.1, 0);
        assert_close(f.knots[7], ln_a + 0.8 * b, 0.1, 0);
        assert_close(f.knots[8], ln_a + 0.9 * b, 0.1, 0);
        assert_close(thresholds_rel_ln_lambda(&f, 0.2, LENGTH), 0.8 * b - 4.2, 0.1, 0);
        assert_close(thresholds_rel_ln_lambda(&f, 0.6, LENGTH), 0.4 * b - 4.2, 0.1, 0);
        assert_true(thresholds_rel_ln_lambda(&f, 0.001, 64) == (double)THRESHOLDS_REL_LN_MAX);
    }
    calib_rel_destroy(r);
}

static void no_law(void **state)
{
    (void)state;
    struct err_msg why = {""};
    for (int kind = 0; kind < 3; kind++) {
        struct calib_rel *r = NULL;
        struct thresholds_rel f;
        calib_rel_create(&r, LAYERS, HEADS);
        for (int e = 0; kind > 0 && e < CALIB_REL_TRIALS; e++)
            calib_rel_gated(r, 64, e, kind == 1 ? 0.5 : 0.2 + 0.03 * e, 4000, true);
        assert_int_equal(calib_rel_fit(r, 64, &f, &why), ERR_INVALID);
        assert_non_null(strstr(why.text, "no law follows"));
        calib_rel_destroy(r);
    }
}

/* Where the curve bends the knots follow it and the law does not. */
static void a_bent_curve(void **state)
{
    (void)state;
    struct calib_rel *r = NULL;
    struct thresholds_rel f;
    calib_rel_create(&r, LAYERS, HEADS);
    for (int prompt = 0; prompt < 2; prompt++) {
        for (int e = 0; e < CALIB_REL_TRIALS; e++) {
            const double x = ((double)calib_rel_trials()[e] + 14) / 19, shift = prompt ? 0.1 : -0.1;
            calib_rel_gated(r, 64, e, 1 - (x * x * 0.6 + 0.15 + shift), 16384, true);
        }
    }
    assert_ok(calib_rel_fit(r, 64, &f, NULL));
    for (int i = 1; i < 7; i++) { /* S from 0.2 to 0.7 lies on the curve, 0.8 beyond it */
        const double x = sqrt(((i + 1) / 10.0 - 0.15) / 0.6);
        assert_close(f.knots[i], x * 19 - 14 + log(16384), 0.3, 0);
    }
    assert_close(f.knots[7] - f.knots[6], f.b / 10, 1e-9, 0);
    assert_true(f.r2 < 0.99);
    calib_rel_destroy(r);
}

/* Where the length enters otherwise than the law says, knots know it. */
static void length_is_no_factor(void **state)
{
    (void)state;
    struct calib_rel *r = NULL;
    struct thresholds_rel f;
    calib_rel_create(&r, LAYERS, HEADS);
    for (int e = 0; e < CALIB_REL_TRIALS; e++) {
        for (int32_t at = 1024; at <= 16384;
             at *= 2) { /* ln(lambda) = -9 + 11 S - 0.4 ln(at / 16384) */
            const double s = ((double)calib_rel_trials()[e] + 9 + 0.4 * log(at / 16384.0)) / 11;
            calib_rel_gated(r, 128, e, 1 - s, at, at == 16384);
        }
    }
    assert_ok(calib_rel_fit(r, 128, &f, NULL));
    assert_close(f.ln_tokens, log(16384), 1e-6, 0);
    for (int i = 1; i < THRESHOLDS_REL_KNOTS; i++)
        assert_close(f.slopes[i], 0.6, 1e-3, 0);
    for (int64_t n = 2048; n <= 131072; n *= 4)
        for (double density = 0.25; density < 0.8; density += 0.1)
            assert_close(thresholds_rel_ln_lambda(&f, density, n),
                         -9 + 11 * (1 - density) - 0.4 * log((double)n / 16384), 0.02, 0);
    calib_rel_destroy(r);
}

/* Heads that keep what was counted, diagonal pages among it; trials that change nothing are left
 * out; the last layer is told and does not count. */
static void steps_of_heads(void **state)
{
    (void)state;
    enum { N = 4096, PROMPTS = 2, COUNTED = 3 };
    struct calib_rel *r = NULL;
    float steps[CALIB_REL_STEPS][LAYERS][HEADS];
    const double off = decisions(128, N), all = off + 2.0 * N / 128;
    calib_rel_create(&r, LAYERS, HEADS);
    for (int prompt = 0; prompt < PROMPTS; prompt++) {
        const struct attn_rel_counts *c = calib_rel_counts(r);
        for (int l = 0; l < LAYERS; l++) {
            for (int h = 0; h < HEADS;
                 h++) { /* a head skips a share at trial 2, then nothing more */
                uint64_t *bins = c->bins + (size_t)((2 * l) * HEADS + h) * BINS;
                bins[2] = (uint64_t)(off / 4) * (uint64_t)h;
                bins[BINS - 1] = (uint64_t)off - bins[2];
            }
        }
        calib_rel_reached(r, N, true);
        for (int e = CALIB_REL_BELOW_1; e < CALIB_REL_TRIALS; e++) {
            struct attn_counts heads[LAYERS * HEADS];
            for (int i = 0; i < LAYERS * HEADS; i++) {
                const bool skips = e >= CALIB_REL_BELOW_1 + COUNTED && i < HEADS;
                heads[i] = (struct attn_counts){.reachable = 1000,
                                                .kept = skips ? 100 + 100 * (uint64_t)i : 770};
            }
            calib_rel_heads(r, 128, e, heads);
        }
    }
    /* without a gate, at trial 2, at one with 0.77 - which is above that and left out - then 0.2 */
    assert_int_equal(calib_rel_steps(r, 128, &steps[0][0][0]), 3);
    for (int h = 0; h < HEADS; h++) {
        assert_true(steps[0][0][h] == 1 && steps[0][1][h] == 1);
        assert_close(steps[1][0][h], 1 - floor(off / 4) * h / all, 1e-6, 0);
        assert_close(steps[2][0][h], 0.1 + 0.1 * h, 1e-6, 0);
        assert_close(steps[2][1][h], 0.77, 1e-6, 0);
    }
    assert_int_equal(calib_rel_steps(r, 64, &steps[0][0][0]), 1); /* nothing was counted */
    calib_rel_destroy(r);
}

/* Steered to a density, heads that are due less than their diagonal keep that all the same, and the
 * others are due so much less: summed over blocks one by one. */
static void diagonals_are_paid_for(void **state)
{
    (void)state;
    enum { L = 3, H = 2, STEPS = 4 };
    float t[STEPS][L][H];
    struct rng r = test_rng("diagonals", 21);
    for (int i = 0; i < STEPS * L * H; i++) /* falling for every head */
        (&t[0][0][0])[i] = (float)(rng_unit(&r) * 0.2 + (STEPS - 1 - i / (L * H)) * 0.2);
    const struct thresholds_rel_heads heads = {&t[0][0][0], STEPS};
    const struct attn_thresholds view = thresholds_rel_heads_view(&heads, L, H);
    for (int i = 0; i < 40; i++) {
        const int32_t n = rng_range(&r, 1, 9000), rows = i % 2 ? 64 : 128;
        const double density = 0.1 + 0.5 * rng_unit(&r);
        struct batch_policy p = {.gate_rows = (uint8_t)rows, .steer = 1};
        double kept = 0, all = 0, least = 0;
        assert_true(thresholds_rel_steer(&view, density, n, &p));
        for (int h = 0; h < (L - 1) * H; h++) {
            const double from = (double)(&t[p.level][0][0])[h],
                         to = (double)(&t[p.level + 1][0][0])[h];
            const double due = from + (double)p.blend * (to - from);
            for (int b = 0; b <= (n - 1) / 128; b++) {
                for (int g = 0; g < 128 / rows; g++) {
                    const int diag = rows == 64 ? 1 + g : 2, reach = 2 * b + diag;
                    kept += fmax(due * reach, diag);
                    least += fmax((double)(&t[STEPS - 1][0][0])[h] * reach, diag);
                    all += reach;
                }
            }
        }
        if (kept / all < density - 1e-3 || least / all < density) /* else no step is low enough */
            assert_close(kept / all, density, 1e-3, 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(length_is_no_factor),
        cmocka_unit_test(trials_increase),
        cmocka_unit_test(the_law_comes_back),
        cmocka_unit_test(from_gated_runs),
        cmocka_unit_test(beyond_1),
        cmocka_unit_test(no_law),
        cmocka_unit_test(a_bent_curve),
        cmocka_unit_test(steps_of_heads),
        cmocka_unit_test(diagonals_are_paid_for),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
