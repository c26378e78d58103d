/* Scores of answers, and intervals around them. */
#include "core/mem.h"
#include "eval/interval.h"
#include "eval/ruler.h"
#include "tests/test.h"

#include <jansson.h>

enum { EOS = 2 };

static struct score_key key_of(const int32_t *expected, int32_t n)
{
    return (struct score_key){.expected = {expected, n}};
}

static void score_counts_references(void **state)
{
    (void)state;
    static const int32_t expected[] = {10, 11, 5, 12, 13, EOS}, one[] = {10, 11}, two[] = {12, 13};
    struct score_key key = key_of(expected, 6);
    key.refs[0] = (struct score_ids){one, 2};
    key.refs[1] = (struct score_ids){two, 2};
    key.n_refs = 2;
    static const struct {
        int32_t answer[8], n;
        double score, any;
        bool exact;
    } cases[] = {
        {{10, 11, 5, 12, 13, EOS}, 6, 1, 1, true},
        {{10, 11, 5, 12, 13}, 5, 1, 1, true},      /* stopped for its length */
        {{10, 11, 5, 12, 13, 9}, 6, 1, 1, true},   /* no end token */
        {{12, 13, 10, 11}, 4, 1, 1, false},        /* in any order */
        {{10, 11, EOS, 12, 13}, 5, 0.5, 1, false}, /* nothing counts after the end */
        {{10, 9, 11, 12, 13}, 5, 0.5, 1, false},   /* side by side */
        {{9, 9, 9, 9, 9, 10, 11}, 7, 0, 0, false}, /* nor beyond the expected length */
        {{9, 9, 9, 9, 10, 11}, 6, 0.5, 1, false},
        {{10}, 1, 0, 0, false},
        {{0}, 0, 0, 0, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        key.any = false;
        assert_close(score_ruler(&key, cases[i].answer, cases[i].n), cases[i].score, 0, 0);
        key.any = true;
        assert_close(score_ruler(&key, cases[i].answer, cases[i].n), cases[i].any, 0, 0);
        assert_int_equal(score_exact(&key, cases[i].answer, cases[i].n), cases[i].exact);
    }
}

/* The definition of tokens.json once more, on text: tokens are words between blanks. */
static double by_text(const json_t *o, const int32_t *answer, int32_t n)
{
    const json_t *expected = json_object_get(o, "expected"), *refs = json_object_get(o, "refs");
    char text[1024] = " ", ref[256];
    size_t at = 1, found = 0;
    for (int32_t i = 0; i < n && i < (int32_t)json_array_size(expected) && answer[i] != EOS; i++)
        at += (size_t)snprintf(text + at, sizeof text - at, "%d ", answer[i]);
    for (size_t i = 0; i < json_array_size(refs); i++) {
        const json_t *ids = json_array_get(refs, i);
        at = (size_t)snprintf(ref, sizeof ref, " ");
        for (size_t k = 0; k < json_array_size(ids); k++)
            at += (size_t)snprintf(ref + at, sizeof ref - at, "%d ",
                                   (int)json_integer_value(json_array_get(ids, k)));
        found += strstr(text, ref) != NULL;
    }
    return (double)found / (double)json_array_size(refs);
}

static int32_t read_ids(int32_t *out, const json_t *list)
{
    int32_t n = (int32_t)json_array_size(list);
    for (int32_t i = 0; i < n; i++)
        out[i] = (int32_t)json_integer_value(json_array_get(list, (size_t)i));
    return n;
}

/* The answers of every task of samples.jsonl, whole, cut, and with tokens changed or moved. */
static void scores_are_those_of_the_definition(void **state)
{
    (void)state;
    struct rng rng = test_rng("scores", 11);
    FILE *f = fopen(TEST_ROOT "/models/needle/samples.jsonl", "re");
    assert_non_null(f);
    int lines = 0, between = 0;
    for (json_t *o; (o = json_loadf(f, JSON_DISABLE_EOF_CHECK, NULL)) != NULL; lines++) {
        int32_t want[64], refs[SCORE_MAX_REFS][8], answer[64];
        int32_t n = read_ids(want, json_object_get(o, "expected"));
        struct score_key key = key_of(want, n);
        const json_t *list = json_object_get(o, "refs");
        for (; key.n_refs < (int32_t)json_array_size(list); key.n_refs++) {
            int32_t *to = refs[key.n_refs];
            int32_t len = read_ids(to, json_array_get(list, (size_t)key.n_refs));
            key.refs[key.n_refs] = (struct score_ids){to, len};
        }
        assert_close(score_ruler(&key, want, n), 1, 0, 0);
        assert_true(score_exact(&key, want, n) && score_exact(&key, want, n - 1));
        for (int tries = 0; tries < 50; tries++) {
            memcpy(answer, want, sizeof answer);
            int32_t m = rng_range(&rng, 0, n);
            for (int32_t k = rng_range(&rng, 0, 2); k > 0; k--)
                answer[rng_range(&rng, 0, n - 1)] = want[rng_range(&rng, 0, n - 1)];
            double got = score_ruler(&key, answer, m);
            assert_close(got, by_text(o, answer, m), 1e-15, 0);
            between += got > 0 && got < 1;
        }
        json_decref(o);
    }
    (void)fclose(f);
    assert_true(lines >= 12 && between > 20);
}

/* Wilson's limits as tables have them: 81 of 263 (Newcombe 1998, "Two-sided confidence intervals
 * for the single proportion", table I), 15 of 148, 0 of 20, 29 of 29. */
static void means_have_wilsons_interval(void **state)
{
    (void)state;
    static const struct {
        int32_t hits, n;
        double low, high;
    } cases[] = {{81, 263, 0.2553, 0.3662},
                 {15, 148, 0.0624, 0.1605},
                 {0, 20, 0.0, 0.1611},
                 {1, 29, 0.0061, 0.1718}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        double x[263] = {0};
        for (int32_t k = 0; k < cases[i].hits; k++)
            x[k] = 1;
        struct interval v = interval_mean(x, cases[i].n);
        assert_close(v.mean, (double)cases[i].hits / cases[i].n, 1e-12, 0);
        assert_close(v.low, cases[i].low, 5e-5, 0);
        assert_close(v.high, cases[i].high, 5e-5, 0);
    }
    struct interval none = interval_mean(NULL, 0), two = interval_difference(NULL, NULL, 0);
    assert_true(none.low <= 0 && none.high >= 1 && two.low <= -1 && two.high >= 1);
}

/* How often the interval holds the true difference, over pairs that depend on each other: a shared
 * coin decides both, else each has its own. */
static double coverage(struct rng *rng, int32_t n, double p, double q, double shared, bool halves)
{
    enum { TRIALS = 3000 };
    double *x = mem_alloc((size_t)n * sizeof *x), *y = mem_alloc((size_t)n * sizeof *y);
    int held = 0;
    for (int t = 0; t < TRIALS; t++) {
        for (int32_t i = 0; i < n; i++) {
            double u = rng_unit(rng), v = rng_unit(rng) < shared ? u : rng_unit(rng);
            x[i] = halves ? ((u < p) + (rng_unit(rng) < p)) / 2.0 : u < p;
            y[i] = halves ? ((v < q) + (rng_unit(rng) < q)) / 2.0 : v < q;
        }
        struct interval d = interval_difference(x, y, n);
        held += d.low <= p - q + 1e-12 && p - q <= d.high + 1e-12;
    }
    mem_free(x);
    mem_free(y);
    return (double)held / TRIALS;
}

static void differences_are_covered(void **state)
{
    (void)state;
    struct rng rng = test_rng("coverage", 5);
    static const struct {
        int32_t n;
        double p, q, shared;
    } cases[] = {{200, 0.95, 0.95, 0.9}, {200, 0.9, 0.97, 0.9}, {200, 0.5, 0.6, 0.0},
                 {48, 0.9, 0.95, 0.8},   {48, 0.99, 0.99, 0.5}, {16, 0.7, 0.9, 0.5}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        double c = coverage(&rng, cases[i].n, cases[i].p, cases[i].q, cases[i].shared, false);
        if (c < 0.935)
            fail_msg("case %zu: %.3f of the intervals hold the difference, want 0.95", i, c);
        c = coverage(&rng, cases[i].n, cases[i].p, cases[i].q, cases[i].shared, true);
        if (c < 0.935)
            fail_msg("case %zu, halves: %.3f of the intervals hold the difference", i, c);
    }
    /* And they are not simply wide: unpaired coins of equal odds. */
    double c = coverage(&rng, 200, 0.5, 0.5, 0.0, false);
    assert_true(c < 0.97);
}

/* Pairs that agree leave no more doubt than one pair in n could bring. */
static void pairs_narrow_a_difference(void **state)
{
    (void)state;
    double x[200], y[200];
    for (int i = 0; i < 200; i++)
        x[i] = y[i] = i % 5 != 0;
    struct interval same = interval_difference(x, y, 200);
    assert_close(same.mean, 0, 0, 0);
    assert_true(same.low < 0 && same.low > -0.02 && same.high > 0 && same.high < 0.02);
    for (int i = 0; i < 200; i++) /* as many right, but others */
        y[i] = (i + 1) % 5 != 0;
    struct interval other = interval_difference(x, y, 200);
    assert_true(other.high - other.low > 3 * (same.high - same.low));
    for (int i = 0; i < 200; i++)
        x[i] = y[i] = 1;
    struct interval all = interval_difference(x, y, 200);
    assert_close(all.low, -all.high, 1e-12, 0);
    assert_close(all.high, 0.0188, 2e-4, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(score_counts_references),
        cmocka_unit_test(scores_are_those_of_the_definition),
        cmocka_unit_test(means_have_wilsons_interval),
        cmocka_unit_test(differences_are_covered),
        cmocka_unit_test(pairs_narrow_a_difference),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
