/* Logits against transformers in fp32: the random variants of data/llama and the trained needle
 * model. Relative difference of a position: max |ours - theirs| / max |theirs|, at most 1e-4. */
#include "model/safetensors.h"
#include "tests/model_case.h"
#include "tests/test.h"

#include <jansson.h>
#include <limits.h>

enum { N_PROMPT = 191, MAX_PAGES = 8 };

static double relative_difference(const float *got, const float *want, int32_t n)
{
    double diff = 0.0, most = 0.0;
    for (int32_t i = 0; i < n; i++) {
        diff = fmax(diff, fabs((double)got[i] - (double)want[i]));
        most = fmax(most, fabs((double)want[i]));
        if (!isfinite(got[i]))
            return INFINITY;
    }
    return diff / most;
}

static const void *golden_tensor(const struct safetensors *st, const char *name, size_t *n)
{
    const struct st_tensor *t = safetensors_find(st, name);
    assert_non_null(t);
    *n = (size_t)t->shape[0];
    return t->data;
}

/* Chunks end at every golden position: prefill to N_PROMPT, then single generated tokens. */
static void check_variant(const char *name)
{
    static const int32_t pages[MAX_PAGES] = {5, 2, 7, 0, 1, 3, 4, 6};
    char dir[PATH_MAX], path[PATH_MAX + 32];
    struct safetensors *st;
    struct model_case c;
    size_t n_tokens, n_pos, n_rows;
    double worst = 0.0;

    (void)snprintf(dir, sizeof dir, "%s/llama/%s", TEST_DATA, name);
    (void)snprintf(path, sizeof path, "%s/golden.safetensors", dir);
    assert_ok(safetensors_open(&st, path, NULL));
    const int32_t *tokens = golden_tensor(st, "tokens", &n_tokens);
    const int32_t *positions = golden_tensor(st, "positions", &n_pos);
    const float *logits = golden_tensor(st, "logits", &n_rows);
    model_case_open(&c, dir, 2, 256, 512, MAX_PAGES, DTYPE_F32);
    const int32_t vocab = model_info(c.model)->vocab_size;
    int32_t at = 0;
    for (size_t i = 0; i < n_pos; i++) {
        struct batch_seq s =
            case_seq(tokens, at, positions[i] + 1 - at, N_PROMPT, pages, MAX_PAGES);
        assert_ok(case_step(&c, &s, 1));
        at = positions[i] + 1;
        worst = fmax(worst, relative_difference(model_last_logits(c.model, 0),
                                                logits + i * (size_t)vocab, vocab));
    }
    printf("# %s: relative difference %.2e\n", name, worst);
    assert_true(worst <= 1e-4);
    model_case_close(&c);
    safetensors_close(st);
}

static void test_variants(void **state)
{
    static const char *const names[] = {"mha_tied",  "gqa_head_dim", "mqa_f16",   "biases",
                                        "llama3_v4", "llama3_v5",    "linear_v4", "linear_v5",
                                        "sharded",   "head_dim_256"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        check_variant(names[i]);
}

static int32_t read_ids(const json_t *list, int32_t *ids)
{
    int32_t n = (int32_t)json_array_size(list);
    for (int32_t i = 0; i < n; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(list, (size_t)i));
    return n;
}

/* The prompt's logits, then 16 greedy tokens. */
static void check_needle_case(struct model_case *c, const json_t *k)
{
    static const int32_t pages[MAX_PAGES] = {3, 1, 0, 7, 6, 5, 4, 2};
    int32_t tokens[512], greedy[16];
    float want[512];
    const json_t *logits = json_object_get(k, "logits");
    const int32_t n = read_ids(json_object_get(k, "prompt"), tokens);

    assert_int_equal(read_ids(json_object_get(k, "greedy16"), greedy), 16);
    for (size_t i = 0; i < 512; i++)
        want[i] = (float)json_number_value(json_array_get(logits, i));
    for (int32_t i = 0; i < 16; i++) {
        int32_t start = i == 0 ? 0 : n + i - 1;
        struct batch_seq s = case_seq(tokens, start, n + i - start, n, pages, MAX_PAGES);
        assert_ok(case_step(c, &s, 1));
        if (i == 0) {
            double d = relative_difference(model_last_logits(c->model, 0), want, 512);
            printf("# needle %s: relative difference %.2e\n",
                   json_string_value(json_object_get(k, "task")), d);
            assert_true(d <= 1e-4);
        }
        assert_int_equal(c->tokens[0].token, greedy[i]);
        tokens[n + i] = greedy[i];
    }
}

static void test_needle(void **state)
{
    struct model_case c;
    json_t *root = json_load_file(TEST_DATA "/llama/needle.json", 0, NULL);
    const json_t *cases = json_object_get(root, "cases");
    (void)state;

    assert_int_equal(json_array_size(cases), 3);
    model_case_open(&c, TEST_ROOT "/models/needle", 2, 512, 1024, MAX_PAGES, DTYPE_F32);
    for (size_t i = 0; i < 3; i++)
        check_needle_case(&c, json_array_get(cases, i));
    model_case_close(&c);
    json_decref(root);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_variants),
        cmocka_unit_test(test_needle),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
