/* calibration/calibrate and samples: selection beside a sort, the -inf rule, means over samples of
 * different lengths, halves of a block, independence of chunks and threads; reading and splitting
 * samples. All on made-up maxima: no model. */
#include "tests/test.h"

#include "calibration/calibrate.h"
#include "calibration/samples.h"
#include "core/dev.h"
#include "core/pool.h"

#include <stdbool.h>

static int descending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

static void selection(void **state)
{
    (void)state;
    enum { MAX_N = 300 };
    struct rng r = test_rng("select", 1);
    for (int round = 0; round < 3000; round++) {
        float v[MAX_N], sorted[MAX_N];
        int32_t n = rng_range(&r, 2, MAX_N), ranks[5], n_ranks = 0;
        int kind = rng_range(&r, 0, 3); /* distinct, many equal, all equal, sorted */
        for (int32_t i = 0; i < n; i++) {
            v[i] = kind == 0   ? (float)rng_normal(&r)
                   : kind == 1 ? (float)rng_range(&r, 0, 3)
                   : kind == 2 ? 1.0f
                               : (float)i;
        }
        memcpy(sorted, v, sizeof v);
        qsort(sorted, (size_t)n, sizeof *sorted, descending);
        for (int32_t k = rng_range(&r, 1, 20); k < n && n_ranks < 5; k += rng_range(&r, 1, 90))
            ranks[n_ranks++] = k;
        calib_select(v, n, ranks, n_ranks);
        for (int32_t i = 0; i < n_ranks; i++) {
            assert_true(v[ranks[i] - 1] == sorted[ranks[i] - 1]);
            assert_true(v[ranks[i]] == sorted[ranks[i]]);
        }
        qsort(v, (size_t)n, sizeof *v, descending);
        assert_memory_equal(v, sorted, (size_t)n * sizeof *v); /* nothing lost */
    }
}

enum { LAYERS = 2, HEADS = 3, NB = 12, PAGES = 2 * NB, LEVELS = 3 };
static const int32_t levels[LEVELS] = {1, 4, 9};

/* One sample's maxima: [LAYERS][HEADS][groups][PAGES]. */
struct maxima {
    int32_t n_tokens, gate_rows, n_groups;
    float *v;
};

static struct maxima make(struct rng *r, int32_t n_tokens, int32_t gate_rows)
{
    struct maxima m = {n_tokens, gate_rows, (n_tokens + gate_rows - 1) / gate_rows, NULL};
    size_t n = (size_t)LAYERS * HEADS * (size_t)m.n_groups * PAGES;
    m.v = malloc(n * sizeof *m.v);
    assert_non_null(m.v);
    for (size_t i = 0; i < n; i++)
        m.v[i] = (float)(rng_normal(r) * 4);
    /* What a kernel leaves alone must not be read: the diagonal and beyond. */
    for (int32_t lh = 0; lh < LAYERS * HEADS; lh++) {
        for (int32_t g = 0; g < m.n_groups; g++) {
            for (int32_t p = g * gate_rows / 128 * 2; p < PAGES; p++)
                m.v[(lh * m.n_groups + g) * PAGES + p] = NAN;
        }
    }
    return m;
}

/* Feeds a sample in chunks of `chunk` tokens, each with its own copy of the groups. */
static int feed(struct calib *c, const struct maxima *m, int32_t chunk)
{
    for (int32_t pos = 0; pos < m->n_tokens; pos += chunk) {
        int32_t n = m->n_tokens - pos < chunk ? m->n_tokens - pos : chunk;
        int32_t groups = (n + m->gate_rows - 1) / m->gate_rows, first = pos / m->gate_rows;
        for (int layer = 0; layer < LAYERS; layer++) {
            float *v = malloc((size_t)HEADS * (size_t)groups * PAGES * sizeof *v);
            assert_non_null(v);
            for (int32_t h = 0; h < HEADS; h++) {
                memcpy(v + h * groups * PAGES,
                       m->v + ((layer * HEADS + h) * m->n_groups + first) * PAGES,
                       (size_t)groups * PAGES * sizeof *v);
            }
            calib_tiles(c, layer, pos, n, v, groups, PAGES);
            free(v);
        }
    }
    return calib_end_sample(c, m->n_tokens, NULL);
}

/* The definition, by sorting. */
static double expected(const struct maxima *samples, int n, int32_t k, int layer, int head,
                       int32_t block)
{
    double sum = 0;
    int count = 0;
    for (int s = 0; s < n; s++) {
        const struct maxima *m = &samples[s];
        int32_t halves = 128 / m->gate_rows;
        if (m->n_tokens < (block + 1) * 128)
            continue;
        for (int32_t half = 0; half < halves; half++) {
            float v[PAGES];
            int32_t a = 2 * block, g = block * halves + half;
            memcpy(v, m->v + ((layer * HEADS + head) * m->n_groups + g) * PAGES, sizeof v);
            qsort(v, (size_t)a, sizeof *v, descending);
            sum += a <= k ? (double)-INFINITY : ((double)v[k - 1] + (double)v[k]) / 2 / halves;
        }
        count++;
    }
    return sum / count;
}

static struct calib *create(int32_t gate_rows, struct pool *pool)
{
    struct calib *c = NULL;
    struct calib_config cfg = {LAYERS, HEADS, NB, gate_rows, levels, LEVELS, pool, NULL};
    assert_ok(calib_create(&c, &cfg, NULL));
    return c;
}

static void means(int32_t gate_rows)
{
    /* Full, cut inside a block, short, shorter than the first gated block; nobody fills the last.
     */
    static const int32_t lengths[] = {11 * 128, 9 * 128 + 100, 5 * 128 + 64,
                                      300,      100,           11 * 128 + 1};
    enum { N = sizeof lengths / sizeof *lengths };
    struct rng r = test_rng("means", 2);
    struct maxima m[N];
    struct calib *c = create(gate_rows, NULL);
    float t[LEVELS * LAYERS * HEADS * NB];
    for (int s = 0; s < N; s++) {
        m[s] = make(&r, lengths[s], gate_rows);
        assert_ok(feed(c, &m[s], 128 * rng_range(&r, 1, 12)));
    }
    assert_int_equal(calib_filled_blocks(c), 11);
    assert_ok(calib_thresholds(c, t, NULL));
    for (int s = 0; s < LEVELS; s++) {
        for (int l = 0; l < LAYERS; l++) {
            for (int h = 0; h < HEADS; h++) {
                for (int32_t i = 0; i < NB; i++) {
                    float got = t[((s * LAYERS + l) * HEADS + h) * NB + i];
                    int32_t row = i < 11 ? i : 10;
                    if (2 * row <= levels[s])
                        assert_true(got == -INFINITY);
                    else
                        assert_close((double)got, expected(m, N, levels[s], l, h, row), 0, 1e-6);
                }
            }
        }
    }
    for (int s = 0; s < N; s++)
        free(m[s].v);
    calib_destroy(c);
}

static void means_128(void **state)
{
    (void)state;
    means(128);
}

static void means_64(void **state)
{
    (void)state;
    means(64);
}

/* The last rows of a sample, and what they give block i of a level by the definition: the mean over
 * rows of the midpoint among 2i + 1 of the row's pages. */
static double expected_row(const float *max, int32_t pos, int32_t n_rows, int32_t head, int32_t k,
                           int32_t block)
{
    double sum = 0;
    for (int32_t r = 0; r < n_rows; r++) {
        float v[PAGES];
        const int32_t want = 2 * block + 1, n = (pos + r) / 64;
        for (int32_t j = 0; j < want; j++) {
            const double at = want == 1 ? n - 1 : j * (double)(n - 1) / (want - 1);
            v[j] = max[(head * n_rows + r) * PAGES + (int32_t)floor(at + 0.5)];
        }
        qsort(v, (size_t)want, sizeof *v, descending);
        sum += ((double)v[k - 1] + (double)v[k]) / 2;
    }
    return sum / n_rows;
}

/* Two samples; the second ends earlier. Pages from a row's own on are not to be read: NaN. */
static void rows_of_the_end(void **state)
{
    (void)state;
    static const int32_t ends[] = {11 * 128 + 7, 8 * 128 + 100};
    enum { ROWS = 13 };
    struct rng r = test_rng("rows", 6);
    float max[2][LAYERS][HEADS * ROWS * PAGES], t[LEVELS * LAYERS * HEADS * NB];
    struct pool *pool = NULL;
    assert_ok(pool_create(&pool, 2));
    for (int threads = 0; threads < 2; threads++) {
        struct calib *c = create(1, threads ? pool : NULL);
        for (int s = 0; s < 2; s++) {
            const int32_t pos = ends[s] - ROWS;
            for (int l = 0; l < LAYERS; l++) {
                for (int32_t i = 0; i < HEADS * ROWS * PAGES; i++) {
                    const int32_t own = (pos + i / PAGES % ROWS) / 64;
                    max[s][l][i] = i % PAGES < own ? (float)(rng_normal(&r) * 4) : NAN;
                }
                calib_rows(c, l, pos, ROWS, max[s][l], ROWS, PAGES);
            }
            assert_ok(calib_end_sample(c, ends[s], NULL));
        }
        assert_int_equal(calib_filled_blocks(c), 11);
        assert_ok(calib_thresholds(c, t, NULL));
        for (int32_t i = 0; i < LEVELS * LAYERS * HEADS * NB; i++) {
            const int32_t block = i % NB < 11 ? i % NB : 10, head = i / NB % HEADS;
            const int32_t layer = i / NB / HEADS % LAYERS, k = levels[i / NB / HEADS / LAYERS];
            double want = 0;
            const int n = block < 8 ? 2 : 1;
            if (2 * block + 1 <= k) {
                assert_true(t[i] == -INFINITY);
                continue;
            }
            for (int s = 0; s < n; s++)
                want += expected_row(max[s][layer], ends[s] - ROWS, ROWS, head, k, block) / n;
            assert_close((double)t[i], want, 0, 1e-6);
        }
        max[0][0][5] = INFINITY; /* head 0, row 0, page 5 */
        calib_rows(c, 0, ends[0] - ROWS, ROWS, max[0][0], ROWS, PAGES);
        assert_int_equal(calib_end_sample(c, ends[0], NULL), ERR_NUMERIC);
        calib_destroy(c);
    }
    pool_destroy(pool);
}

/* On the sample itself the strict gate keeps exactly k pages of each block that has more. */
static void keeps_k(void **state)
{
    (void)state;
    struct rng r = test_rng("keeps_k", 3);
    struct maxima m = make(&r, NB * 128, 128);
    struct calib *c = create(128, NULL);
    float t[LEVELS * LAYERS * HEADS * NB];
    assert_ok(feed(c, &m, 512));
    assert_ok(calib_thresholds(c, t, NULL));
    for (int s = 0; s < LEVELS; s++) {
        for (int lh = 0; lh < LAYERS * HEADS; lh++) {
            for (int32_t i = 0; i < NB; i++) {
                int32_t kept = 0;
                for (int32_t p = 0; p < 2 * i; p++) {
                    kept +=
                        !(m.v[(lh * NB + i) * PAGES + p] < t[(s * LAYERS * HEADS + lh) * NB + i]);
                }
                assert_int_equal(kept, 2 * i < levels[s] ? 2 * i : levels[s]);
            }
        }
    }
    free(m.v);
    calib_destroy(c);
}

/* The same bits whatever the chunks and the number of threads. */
static void same_bits(void **state)
{
    (void)state;
    struct rng r = test_rng("same_bits", 4);
    struct pool *pool = NULL;
    float t[2][LEVELS * LAYERS * HEADS * NB];
    struct maxima m[2] = {make(&r, NB * 128, 64), make(&r, NB * 128 - 200, 64)};
    assert_ok(pool_create(&pool, 3));
    for (int run = 0; run < 2; run++) {
        struct calib *c = create(64, run ? pool : NULL);
        assert_ok(feed(c, &m[0], run ? 128 : 2048));
        assert_ok(feed(c, &m[1], run ? 640 : 256));
        assert_ok(calib_thresholds(c, t[run], NULL));
        calib_destroy(c);
    }
    assert_memory_equal(t[0], t[1], sizeof t[0]);
    free(m[0].v);
    free(m[1].v);
    pool_destroy(pool);
}

static void refusals(void **state)
{
    (void)state;
    static const int32_t bad[] = {4, 4}, zero[] = {0};
    static struct dev device;
    static const struct {
        struct calib_config cfg;
        const char *says;
    } cases[] = {
        {{0, 1, 1, 128, levels, 1, NULL, NULL}, "0 layers"},
        {{1, 1, 0, 128, levels, 1, NULL, NULL}, "no sample has 128 tokens"},
        {{1, 1, 1, 32, levels, 1, NULL, NULL}, "gate_rows is 32"},
        {{1, 1, 1, 1, levels, 1, NULL, &device}, "gate_rows is 1"},
        {{1, 1, 1, 128, levels, 0, NULL, NULL}, "0 levels"},
        {{1, 1, 1, 128, bad, 2, NULL, NULL}, "k[1] = 4"},
        {{1, 1, 1, 128, zero, 1, NULL, NULL}, "k[0] = 0"},
    };
    struct rng r = test_rng("refusals", 5);
    struct err_msg why = {""};
    struct calib *c = NULL;
    float t[LEVELS * LAYERS * HEADS * NB];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(calib_create(&c, &cases[i].cfg, &why), ERR_INVALID);
        if (!strstr(why.text, cases[i].says))
            fail_msg("'%s' lacks '%s'", why.text, cases[i].says);
    }
    c = create(128, NULL);
    assert_int_equal(calib_thresholds(c, t, &why), ERR_INVALID); /* no sample yet */
    struct maxima m = make(&r, 512, 128);
    m.v[(1 * m.n_groups + 3) * PAGES + 5] = NAN; /* layer 0, head 1, block 3, page 5 */
    assert_int_equal(feed(c, &m, 512), ERR_NUMERIC);
    free(m.v);
    calib_destroy(c);
    calib_destroy(NULL);
}

/* ---- samples -------------------------------------------------------------------------------- */

static int read_text(struct samples *s, const char *text, int32_t vocab, int32_t max_len,
                     struct err_msg *why)
{
    char copy[4096];
    (void)snprintf(copy, sizeof copy, "%s", text);
    FILE *in = fmemopen(copy, strlen(copy), "r");
    assert_non_null(in);
    int err = samples_read(s, in, "FILE", vocab, max_len, why);
    (void)fclose(in);
    return err;
}

static void samples_good(void **state)
{
    (void)state;
    struct samples s;
    struct err_msg why = {""};
    if (read_text(&s,
                  "{\"task\":\"a\",\"prompt\":[1,2,3],\"more\":{}}\n\n"
                  "{\"tokens\":[9],\"expected\":[1,2]}\r\n"
                  "  {\"prompt\":[4,5,6,7],\"expected\":[8]}\n"
                  "{\"prompt\":[1],\"expected\":\"text\"}",
                  10, 3, &why) < 0) {
        fail_msg("%s", why.text);
    }
    assert_int_equal(s.n, 4);
    assert_string_equal(s.items[0].task, "a");
    assert_int_equal(s.items[0].n_tokens, 3);
    assert_int_equal(s.items[0].tokens[2], 3);
    assert_string_equal(s.items[1].task, "");
    assert_int_equal(s.items[1].tokens[0], 9);
    assert_int_equal(s.items[2].line, 4);
    assert_int_equal(s.items[2].n_tokens, 3); /* cut, and its answer with it */
    assert_true(s.items[0].n_answer == 0 && s.items[1].n_answer == 2);
    assert_true(s.items[2].n_answer == 0 && s.items[3].n_answer == 0);
    assert_true(s.items[1].n_tokens == 1 && s.items[1].tokens[2] == 2);
    const int32_t all[] = {0, 1, 2, 3};
    const uint64_t prompts = samples_hash(&s, all, 4), answers = samples_hash_answers(&s, all, 4);
    assert_int_equal(samples_longest(&s, all + 1, 1), 1);
    assert_int_equal(samples_longest_answered(&s, all + 1, 1), 3);
    assert_int_equal(samples_check(&s, "FILE", 10, NULL), 0);
    s.items[1].tokens[2] = 10;
    assert_int_equal(samples_check(&s, "FILE", 10, NULL), ERR_FORMAT);
    assert_true(samples_hash(&s, all, 4) == prompts);
    assert_true(samples_hash_answers(&s, all, 4) != answers);
    samples_free(&s);
}

static void samples_bad(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"", "FILE: no samples"},
        {"\n \n", "FILE: no samples"},
        {"{\"prompt\":[1]}\nnonsense\n", "FILE:2: column"},
        {"[1,2]", "FILE:1: no array `prompt` or `tokens`"},
        {"{\"prompt\":3}", "FILE:1: no array"},
        {"{\"prompt\":[]}", "FILE:1: prompt has 0 tokens"},
        {"{\"tokens\":[1,2.5]}", "FILE:1: tokens[1] is not an integer"},
        {"{\"prompt\":[1,10]}", "FILE:1: prompt[1] = 10 is outside 0 to 9"},
        {"{\"prompt\":[-1]}", "FILE:1: prompt[0] = -1 is outside"},
        {"{\"prompt\":[99999999999]}", "FILE:1: prompt[0] = 99999999999 is outside"},
        {"{\"prompt\":[1],\"task\":7}", "FILE:1: task is not a string"},
        {"{\"prompt\":[1],\"expected\":[2,10]}", "FILE:1: expected[1] = 10 is outside 0 to 9"},
        {"{\"prompt\":[1],\"expected\":[[]]}", "FILE:1: expected[0] is not an integer"},
        {"{\"prompt\":[1],\"prompt\":[2]}", "FILE:1: column"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct samples s;
        struct err_msg why = {""};
        int err = cases[i][0][0] ? read_text(&s, cases[i][0], 10, 0, &why)
                                 : read_text(&s, " ", 10, 0, &why);
        assert_int_equal(err, ERR_FORMAT);
        if (!strstr(why.text, cases[i][1]))
            fail_msg("'%s' lacks '%s'", why.text, cases[i][1]);
    }
}

static void samples_parts(void **state)
{
    (void)state;
    struct sample items[10];
    struct samples s = {items, 10};
    struct samples_split p;
    int32_t tokens[10];
    for (int i = 0; i < 10; i++) {
        tokens[i] = i;
        items[i] = (struct sample){.n_tokens = 1 + i % 3, .tokens = tokens};
        (void)snprintf(items[i].task, sizeof items[i].task, "%s", i % 2 ? "vt" : "niah_x");
    }
    samples_split(&p, &s, "niah_", 0, 2);
    assert_int_equal(p.n_calibrate, 5);
    assert_int_equal(p.n_held_out, 2);
    assert_int_equal(p.held_out[0], 1);
    assert_int_equal(p.held_out[1], 5); /* spread over 1, 3, 5, 7, 9 */
    assert_int_equal(samples_longest(&s, p.calibrate, p.n_calibrate), 3);
    uint64_t h = samples_hash(&s, p.calibrate, 5);
    assert_true(h == samples_hash(&s, p.calibrate, 5) && h != samples_hash(&s, p.calibrate, 4));
    samples_split_free(&p);
    samples_split(&p, &s, NULL, 3, 4);
    assert_int_equal(p.n_calibrate, 3);
    assert_int_equal(p.calibrate[2], 4); /* spread over 0 to 5 */
    assert_int_equal(p.n_held_out, 4);
    assert_int_equal(p.held_out[0], 6);
    samples_split_free(&p);
    samples_split(&p, &s, NULL, 0, 10);
    assert_int_equal(p.n_calibrate, 0);
    samples_split_free(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(selection),   cmocka_unit_test(means_128),
        cmocka_unit_test(means_64),    cmocka_unit_test(rows_of_the_end),
        cmocka_unit_test(keeps_k),     cmocka_unit_test(same_bits),
        cmocka_unit_test(refusals),    cmocka_unit_test(samples_good),
        cmocka_unit_test(samples_bad), cmocka_unit_test(samples_parts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
