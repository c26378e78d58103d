/* RULER prompts: the same random numbers as Python's, prompts that a judge of its own takes apart
 * and answers, distributions, vocabulary files. tests/test_prompts.py and e2e/test_eval.py compare
 * with models/needle/make_prompts.py, token by token. */
#include "core/mem.h"
#include "eval/mt.h"
#include "eval/ruler.h"
#include "tests/ruler_case.h"
#include "tests/test.h"

#include <jansson.h>

#define TOKENS TEST_ROOT "/models/needle/tokens.json"

static struct ruler *ruler_new(void)
{
    struct ruler_vocab v;
    struct err_msg why = {""};
    struct ruler *r;
    if (ruler_vocab_load(&v, TOKENS, &why) < 0)
        fail_msg("%s", why.text);
    assert_int_equal(v.tasks, (1 << RULER_N_TASKS) - 1);
    ruler_create(&r, &v);
    return r;
}

static struct ruler_prompt prompt_new(struct ruler *r, enum ruler_task task, int32_t length,
                                      uint64_t seed)
{
    struct ruler_prompt p;
    struct err_msg why = {""};
    ruler_seed(r, seed);
    if (ruler_make(r, &p, task, length, &why) < 0)
        fail_msg("%s", why.text);
    assert_int_equal(p.n_tokens, length - 128);
    assert_int_equal(p.task, task);
    return p;
}

/* First, second and thousandth draw of random.Random(seed) in CPython 3.11. */
static void numbers_are_pythons(void **state)
{
    (void)state;
    static const struct {
        uint64_t seed;
        double first, second, last;
    } cases[] = {
        {0, 0x1.b0580f98a7dbep-1, 0x1.84129978f9c1ap-1, 0x1.ebf1437477ccep-2},
        {1, 0x1.132d8f91b7584p-3, 0x1.b1e2d5b3584f8p-1, 0x1.699b1d0fc4300p-1},
        {42, 0x1.4762f307200c5p-1, 0x1.99c6b5eeb2060p-6, 0x1.b5fd9157363f8p-1},
        {1099511627781, 0x1.023e2261153dcp-1, 0x1.130d0ad4f7578p-2, 0x1.ab004381a402cp-1},
        {9007199254740991, 0x1.820cb51f0a138p-4, 0x1.c87274c0a9504p-3, 0x1.c8d8c3a3497c3p-1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct mt m;
        mt_seed(&m, cases[i].seed);
        assert_close(mt_unit(&m), cases[i].first, 0, 0);
        assert_close(mt_unit(&m), cases[i].second, 0, 0);
        for (int k = 2; k < 999; k++)
            (void)mt_unit(&m);
        assert_close(mt_unit(&m), cases[i].last, 0, 0);
    }
}

static void same_answer(const struct ruler_found *f, const int32_t *expected, int32_t n,
                        const char *task)
{
    if (f->n_answer != n || memcmp(f->answer, expected, (size_t)n * sizeof *expected) != 0)
        fail_msg("%s: another answer than the prompt's", task);
}

static void judge(const struct ruler_prompt *p)
{
    struct ruler_found f;
    const char *task = ruler_task_name(p->task);
    ruler_case_solve(&f, &(struct ruler_case){task, p->tokens, p->n_tokens});
    same_answer(&f, p->expected, p->n_expected, task);
    assert_int_equal(f.n_refs, p->n_refs);
    for (int32_t i = 0; i < f.n_refs; i++) {
        assert_int_equal(f.ref_len[i], p->refs[i].n);
        assert_memory_equal(f.refs[i], p->expected + p->refs[i].at,
                            (size_t)p->refs[i].n * sizeof(int32_t));
    }
}

static void every_prompt_has_its_form_and_its_answer(void **state)
{
    (void)state;
    static const int32_t lengths[] = {512, 513, 1000, 4096, 8192, 131072};
    struct ruler *r = ruler_new();
    for (int t = 0; t < RULER_N_TASKS; t++) {
        for (size_t l = 0; l < sizeof lengths / sizeof lengths[0]; l++) {
            for (uint64_t seed = 1; seed <= (lengths[l] > 5000 ? 2 : 12); seed++) {
                struct ruler_prompt p = prompt_new(r, (enum ruler_task)t, lengths[l], seed);
                judge(&p);
                ruler_prompt_deinit(&p);
            }
        }
    }
    ruler_destroy(r);
}

static int32_t read_ids(int32_t *out, const json_t *list)
{
    int32_t n = (int32_t)json_array_size(list);
    for (int32_t i = 0; i < n; i++)
        out[i] = (int32_t)json_integer_value(json_array_get(list, (size_t)i));
    return n;
}

/* What the training program wrote passes the same judge: it asks for no form of its own. */
static void training_prompts_have_that_form(void **state)
{
    (void)state;
    FILE *f = fopen(TEST_ROOT "/models/needle/samples.jsonl", "re");
    assert_non_null(f);
    int lines = 0;
    for (json_t *o; (o = json_loadf(f, JSON_DISABLE_EOF_CHECK, NULL)) != NULL; lines++) {
        int32_t *prompt = mem_alloc(json_array_size(json_object_get(o, "prompt")) * sizeof *prompt);
        int32_t expected[CASE_MAX_ANSWER];
        struct ruler_found found;
        const char *task = json_string_value(json_object_get(o, "task"));
        int32_t n = read_ids(prompt, json_object_get(o, "prompt"));
        ruler_case_solve(&found, &(struct ruler_case){task, prompt, n});
        same_answer(&found, expected, read_ids(expected, json_object_get(o, "expected")), task);
        mem_free(prompt);
        json_decref(o);
    }
    (void)fclose(f);
    assert_true(lines >= 12);
}

static void same_prompt(struct ruler *r, struct ruler *other, enum ruler_task task, bool want,
                        uint64_t a, uint64_t b)
{
    struct ruler_prompt p = prompt_new(r, task, 2048, a), q = prompt_new(other, task, 2048, b);
    bool same = p.n_tokens == q.n_tokens &&
                memcmp(p.tokens, q.tokens, (size_t)p.n_tokens * sizeof *p.tokens) == 0;
    assert_int_equal(same, want);
    ruler_prompt_deinit(&p);
    ruler_prompt_deinit(&q);
}

static void a_seed_is_a_prompt(void **state)
{
    (void)state;
    struct ruler *a = ruler_new(), *b = ruler_new();
    for (int t = 0; t < RULER_N_TASKS; t++) {
        enum ruler_task task = (enum ruler_task)t;
        same_prompt(a, b, task, true, 7, 7); /* though a has made others before */
        same_prompt(a, a, task, false, 7, 8);
    }
    ruler_destroy(a);
    ruler_destroy(b);
}

static int ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Both sets, two seeds, all tasks, two lengths, 200 prompts: no seed twice, all below 2^53. */
static void sets_have_no_prompt_in_common(void **state)
{
    (void)state;
    enum { N = 200, ALL = 2 * 2 * RULER_N_TASKS * 2 * N };
    uint64_t *seeds = mem_alloc(ALL * sizeof *seeds);
    int n = 0;
    for (uint64_t seed = 1; seed <= 2; seed++) {
        for (int set = 0; set < 2; set++) {
            for (int t = 0; t < RULER_N_TASKS; t++) {
                for (int32_t i = 0; i < 2 * N; i++) {
                    seeds[n++] = ruler_sample_seed(seed, (enum ruler_set)set, (enum ruler_task)t,
                                                   i < N ? 8192 : 16384, i % N);
                    assert_true(seeds[n - 1] < 1ull << 53);
                    assert_int_equal(seeds[n - 1] & 1, set); /* for ever disjoint */
                }
            }
        }
    }
    assert_int_equal(n, ALL);
    qsort(seeds, ALL, sizeof *seeds, ascending);
    for (int i = 1; i < ALL; i++)
        assert_true(seeds[i] != seeds[i - 1]);
    mem_free(seeds);
}

/* Pearson's statistic against equal shares. */
static double chi_square(const int32_t *counts, int32_t n_bins)
{
    double sum = 0.0, x = 0.0;
    for (int32_t i = 0; i < n_bins; i++)
        sum += counts[i];
    for (int32_t i = 0; i < n_bins; i++)
        x += (counts[i] - sum / n_bins) * (counts[i] - sum / n_bins) / (sum / n_bins);
    return x;
}

/* 99.9% of chi-square with n degrees of freedom, after Wilson and Hilferty. */
static double chi_limit(double n)
{
    double c = 1.0 - 2.0 / (9.0 * n) + 3.09 * sqrt(2.0 / (9.0 * n));
    return n * c * c * c;
}

static void needles_lie_anywhere(void **state)
{
    (void)state;
    enum { BINS = 8, N = 800 };
    struct ruler *r = ruler_new();
    static const enum ruler_task tasks[] = {RULER_SINGLE_1, RULER_SINGLE_2};
    for (int t = 0; t < 2; t++) {
        int32_t places[BINS] = {0}, values[128] = {0}, keys[128] = {0};
        for (uint64_t seed = 0; seed < N; seed++) {
            struct ruler_prompt p = prompt_new(r, tasks[t], 1400, seed);
            struct ruler_found f;
            ruler_case_solve(&f,
                             &(struct ruler_case){ruler_task_name(p.task), p.tokens, p.n_tokens});
            places[f.first_fact * BINS / p.n_tokens]++;
            for (int i = 0; i < 5; i++)
                values[f.refs[0][i] - T_VALUE]++;
            for (int i = 0; i < 3; i++)
                keys[p.tokens[f.first_fact + 1 + i] - T_KEY]++;
            ruler_prompt_deinit(&p);
        }
        assert_true(chi_square(places, BINS) < chi_limit(BINS - 1));
        assert_true(chi_square(values, 128) < chi_limit(127));
        assert_true(chi_square(keys, 128) < chi_limit(127));
    }
    ruler_destroy(r);
}

/* Shares of the three most frequent words against those of 1 / rank^2 over 128 ranks. */
static void words_follow_their_law(void **state)
{
    (void)state;
    struct ruler *r = ruler_new();
    struct ruler_prompt p = prompt_new(r, RULER_FWE, 131072, 3);
    double norm = 0.0, n = p.n_tokens - 3;
    for (int i = 1; i <= 128; i++)
        norm += 1.0 / i / i;
    for (int k = 0; k < 3; k++) {
        double share = 0.0, want = 1.0 / (k + 1) / (k + 1) / norm;
        for (int32_t i = 1; i < p.n_tokens - 2; i++)
            share += (p.tokens[i] == p.expected[k]) / n;
        assert_close(share, want, 4.0 * sqrt(want * (1.0 - want) / n), 0);
    }
    ruler_prompt_deinit(&p);
    ruler_destroy(r);
}

/* Successors of an essay's tokens have Zipf's law: the first is drawn in 32.26% of all cases,
 * and tables of two ranks may coincide, which only adds to that. */
static void essays_follow_their_law(void **state)
{
    (void)state;
    struct ruler *r = ruler_new();
    struct ruler_prompt p = prompt_new(r, RULER_SINGLE_2, 131072, 5);
    int32_t pairs = 0, firsts = 0, sentences = 0, stops = 0;
    for (int32_t i = 2; i < p.n_tokens - 20; i++) {
        int32_t a = p.tokens[i - 1], b = p.tokens[i];
        stops += b == T_STOP;
        sentences += b != T_STOP;
        if (a < T_FILLER || b < T_FILLER || a >= T_KEY || b >= T_KEY)
            continue;
        uint32_t h = (uint32_t)(a - T_FILLER) * 2654435761u + 12345u;
        h = (h ^ h >> 15) * 0x2c1b3c6du;
        h = (h ^ h >> 12) * 0x297a2d39u;
        firsts += T_FILLER + (int32_t)((h ^ h >> 15) % 224) == b;
        pairs++;
    }
    assert_close((double)firsts / pairs, 0.3226487 + 0.004, 0.01, 0);
    assert_close((double)(sentences + stops) / stops, 21.0, 0.3, 0); /* 12 .. 30, uniform */
    ruler_prompt_deinit(&p);
    ruler_destroy(r);
}

static void lengths_and_tasks_are_checked(void **state)
{
    (void)state;
    struct ruler_vocab v;
    struct err_msg why = {""};
    struct ruler_prompt p;
    struct ruler *r;
    assert_int_equal(ruler_vocab_load(&v, TOKENS, &why), 0);
    v.tasks &= ~(1u << RULER_CWE);
    ruler_create(&r, &v);
    assert_int_equal(ruler_make(r, &p, RULER_VT, 511, &why), ERR_INVALID);
    assert_non_null(strstr(why.text, "511"));
    assert_int_equal(ruler_make(r, &p, RULER_VT, 1 << 21, &why), ERR_INVALID);
    assert_int_equal(ruler_make(r, &p, RULER_CWE, 1024, &why), ERR_INVALID);
    assert_non_null(strstr(why.text, "tasks.cwe is missing"));
    ruler_destroy(r);
    v.tasks |= 1u << RULER_CWE;
    v.key.n = 400;
    ruler_create(&r, &v);
    assert_int_equal(ruler_make(r, &p, RULER_CWE, 512, &why), ERR_INVALID);
    assert_non_null(strstr(why.text, "400 words"));
    ruler_destroy(r);
    assert_int_equal(ruler_task_find("qa_2"), RULER_QA_2);
    assert_int_equal(ruler_task_find("qa_3"), -1);
}

/* tokens.json with one member replaced. */
static char *changed(const char *path, const char *value)
{
    json_t *o = json_load_file(TOKENS, 0, NULL), *in = o;
    char copy[64], *dot;
    (void)snprintf(copy, sizeof copy, "%s", path);
    char *name = copy;
    while ((dot = strchr(name, '.')) != NULL) {
        *dot = '\0';
        in = json_object_get(in, name);
        name = dot + 1;
    }
    (void)json_object_set_new(in, name, json_loads(value, JSON_DECODE_ANY, NULL));
    char *text = json_dumps(o, 0);
    json_decref(o);
    return text;
}

static void bad_vocabularies_are_named(void **state)
{
    (void)state;
    static const struct {
        const char *path, *value, *says;
    } cases[] = {
        {"vocab_size", "0", "vocab_size is not"},
        {"vocab_size", "\"512\"", "vocab_size is not"},
        {"vocab_size", "1e3", "vocab_size is not"},
        {"vocab_size", "400", "ranges.value_D is not [first, last]"},
        {"special", "[]", "special is not an object"},
        {"special.EOS", "null", "special.EOS is not a token id below vocab_size, 512"},
        {"special.EOS", "512", "special.EOS is not"},
        {"special.EOS", "-1", "special.EOS is not"},
        {"special.SEP", "8", "special.SEP is the same token as special.ASSIGN, 8"},
        {"special.STOP", "300", "ranges.key_W holds special.STOP, 300"},
        {"ranges", "3", "ranges is not an object"},
        {"ranges.key_W", "[256]", "ranges.key_W is not [first, last]"},
        {"ranges.key_W", "[256, 255]", "ranges.key_W is not [first, last]"},
        {"ranges.key_W", "[256, 383.5]", "ranges.key_W is not [first, last]"},
        {"ranges.key_W", "[256, 260]", "ranges.key_W has 5 tokens, at least 16"},
        {"ranges.key_W", "[200, 383]", "ranges.key_W overlaps ranges.filler_F"},
        {"ranges.relation", "[16, 16]", "ranges.relation has 1 tokens"},
        {"tasks", "\"all\"", "tasks is not an object"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct ruler_vocab v;
        struct err_msg why = {""};
        char *text = changed(cases[i].path, cases[i].value);
        assert_int_equal(ruler_vocab_parse(&v, text, &why), ERR_FORMAT);
        if (!strstr(why.text, cases[i].says))
            fail_msg("%s: '%s', want '%s'", cases[i].path, why.text, cases[i].says);
        free(text);
    }
    struct ruler_vocab v;
    struct err_msg why = {""};
    assert_int_equal(ruler_vocab_parse(&v, "{\"vocab_size\": 5,", &why), ERR_FORMAT);
    assert_non_null(strstr(why.text, "line 1"));
    assert_int_equal(ruler_vocab_parse(&v, "[1]", &why), ERR_FORMAT);
    assert_true(ruler_vocab_load(&v, "/nonexistent/tokens.json", &why) < 0);
    assert_non_null(strstr(why.text, "/nonexistent/tokens.json"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(numbers_are_pythons),
        cmocka_unit_test(every_prompt_has_its_form_and_its_answer),
        cmocka_unit_test(training_prompts_have_that_form),
        cmocka_unit_test(a_seed_is_a_prompt),
        cmocka_unit_test(sets_have_no_prompt_in_common),
        cmocka_unit_test(needles_lie_anywhere),
        cmocka_unit_test(words_follow_their_law),
        cmocka_unit_test(essays_follow_their_law),
        cmocka_unit_test(lengths_and_tasks_are_checked),
        cmocka_unit_test(bad_vocabularies_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
