/* config.json: both generations of transformers, and an error that names the field for everything
 * that is wrong or not supported. */
#include "model/config.h"
#include "tests/test.h"

#include <jansson.h>
#include <limits.h>
#include <unistd.h>

static const char base[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"vocab_size\":100,"
    "\"hidden_size\":64,\"intermediate_size\":128,\"num_hidden_layers\":2,"
    "\"num_attention_heads\":8,\"num_key_value_heads\":2,\"hidden_act\":\"silu\","
    "\"max_position_embeddings\":4096,\"rms_norm_eps\":1e-5,\"rope_theta\":500000.0,"
    "\"tie_word_embeddings\":false,\"torch_dtype\":\"bfloat16\",\"bos_token_id\":1,"
    "\"eos_token_id\":2}";

/* base with the members of `patch` (a JSON object) put over it; "-name": null removes one. */
static int parse_patched(struct llama_config *c, const char *patch, struct err_msg *why)
{
    const char *key;
    json_t *value, *root = json_loads(base, 0, NULL), *over = json_loads(patch, 0, NULL);
    assert_non_null(root);
    if (!over)
        fail_msg("bad patch %s", patch);
    json_object_foreach(over, key, value)
    {
        if (key[0] == '-')
            (void)json_object_del(root, key + 1);
        else
            (void)json_object_set(root, key, value);
    }
    char *text = json_dumps(root, 0);
    int err = llama_config_parse(c, text, strlen(text), "config.json", why);
    free(text);
    json_decref(root);
    json_decref(over);
    return err;
}

static void parse_ok(struct llama_config *c, const char *patch)
{
    struct err_msg why = {{0}};
    int err = parse_patched(c, patch, &why);
    if (err < 0)
        fail_msg("%s: %s", patch, err_why(&why, err));
}

static void test_fields(void **state)
{
    struct llama_config c;
    char text[64];
    (void)state;

    parse_ok(&c, "{}");
    assert_int_equal(c.vocab_size, 100);
    assert_int_equal(c.hidden_size, 64);
    assert_int_equal(c.intermediate_size, 128);
    assert_int_equal(c.n_layers, 2);
    assert_int_equal(c.n_heads, 8);
    assert_int_equal(c.n_kv_heads, 2);
    assert_int_equal(c.head_dim, 8);
    assert_int_equal(c.max_position, 4096);
    assert_close(c.rms_eps, 1e-5, 0, 1e-15);
    assert_int_equal(c.rope.type, ROPE_DEFAULT);
    assert_close(c.rope.theta, 500000.0, 0, 0);
    assert_false(c.tied || c.attention_bias || c.mlp_bias);
    assert_int_equal(c.bos_id, 1);
    assert_int_equal(c.n_eos, 1);
    assert_int_equal(c.eos_ids[0], 2);
    llama_rope_text(text, sizeof text, &c.rope);
    assert_string_equal(text, "default theta=500000");

    parse_ok(&c, "{\"head_dim\":32,\"tie_word_embeddings\":true,\"attention_bias\":true,"
                 "\"mlp_bias\":true,\"eos_token_id\":[9,2,9,5],\"bos_token_id\":null}");
    assert_int_equal(c.head_dim, 32);
    assert_true(c.tied && c.attention_bias && c.mlp_bias);
    assert_int_equal(c.bos_id, -1);
    assert_int_equal(c.n_eos, 3);
    assert_int_equal(c.eos_ids[0], 2);
    assert_int_equal(c.eos_ids[1], 5);
    assert_int_equal(c.eos_ids[2], 9);
}

/* What transformers assumes where a field is absent. */
static void test_defaults(void **state)
{
    struct llama_config c;
    (void)state;
    parse_ok(&c, "{\"-num_key_value_heads\":0,\"-rope_theta\":0,\"-rms_norm_eps\":0,"
                 "\"-tie_word_embeddings\":0,\"-torch_dtype\":0,\"-bos_token_id\":0,"
                 "\"-eos_token_id\":0,\"-hidden_act\":0,\"-model_type\":0,\"head_dim\":null,"
                 "\"-max_position_embeddings\":0,\"rope_scaling\":null}");
    assert_int_equal(c.n_kv_heads, 8);
    assert_int_equal(c.head_dim, 8);
    assert_close(c.rope.theta, 10000.0, 0, 0);
    assert_close(c.rms_eps, 1e-6, 0, 1e-15);
    assert_false(c.tied);
    assert_int_equal(c.bos_id, -1);
    assert_int_equal(c.n_eos, 0);
    assert_int_equal(c.max_position, 2048);
}

#define LLAMA3                                                                                     \
    "\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"                             \
    "\"original_max_position_embeddings\":8192"

static void test_rope(void **state)
{
    struct llama_config c, d;
    char text[64];
    (void)state;

    parse_ok(&c, "{\"rope_scaling\":{\"rope_type\":\"llama3\"," LLAMA3 "}}");
    assert_int_equal(c.rope.type, ROPE_LLAMA3);
    assert_close(c.rope.factor, 8.0, 0, 0);
    assert_int_equal(c.rope.original_max_position, 8192);
    llama_rope_text(text, sizeof text, &c.rope);
    assert_string_equal(text, "llama3 theta=500000 factor=8");

    parse_ok(&d, "{\"-rope_theta\":0,\"rope_parameters\":{\"rope_type\":\"llama3\","
                 "\"rope_theta\":500000.0," LLAMA3 "}}");
    assert_memory_equal(&c, &d, sizeof c);
    parse_ok(&d, "{\"rope_scaling\":{\"type\":\"llama3\"," LLAMA3 "},\"rope_parameters\":{"
                 "\"rope_type\":\"llama3\",\"rope_theta\":500000.0," LLAMA3 "}}");
    assert_memory_equal(&c, &d, sizeof c);

    parse_ok(&c, "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":2}}");
    assert_int_equal(c.rope.type, ROPE_LINEAR);
    assert_close(c.rope.factor, 2.0, 0, 0);
    parse_ok(&c, "{\"rope_scaling\":{\"type\":\"default\"}}");
    assert_int_equal(c.rope.type, ROPE_DEFAULT);
}

static void test_errors(void **state)
{
    static const struct {
        const char *patch;
        int code;
        const char *field;
    } cases[] = {
        {"{\"architectures\":[\"MistralForCausalLM\"]}", ERR_UNSUPPORTED, "architectures"},
        {"{\"architectures\":[]}", ERR_CONFIG, "architectures"},
        {"{\"architectures\":\"LlamaForCausalLM\"}", ERR_CONFIG, "architectures"},
        {"{\"-architectures\":0,\"-model_type\":0}", ERR_CONFIG, "architectures"},
        {"{\"model_type\":\"qwen2\"}", ERR_UNSUPPORTED, "model_type"},
        {"{\"hidden_act\":\"gelu\"}", ERR_UNSUPPORTED, "hidden_act"},
        {"{\"hidden_act\":5}", ERR_CONFIG, "hidden_act"},
        {"{\"torch_dtype\":\"float64\"}", ERR_UNSUPPORTED, "torch_dtype"},
        {"{\"dtype\":\"int8\"}", ERR_UNSUPPORTED, "dtype"},
        {"{\"quantization_config\":{}}", ERR_UNSUPPORTED, "quantization_config"},
        {"{\"sliding_window\":4096}", ERR_UNSUPPORTED, "sliding_window"},
        {"{\"partial_rotary_factor\":0.5}", ERR_UNSUPPORTED, "partial_rotary_factor"},
        {"{\"-vocab_size\":0}", ERR_CONFIG, "vocab_size is missing"},
        {"{\"vocab_size\":null}", ERR_CONFIG, "vocab_size is missing"},
        {"{\"vocab_size\":0}", ERR_CONFIG, "vocab_size"},
        {"{\"vocab_size\":4294967297}", ERR_CONFIG, "vocab_size"},
        {"{\"vocab_size\":\"100\"}", ERR_CONFIG, "vocab_size"},
        {"{\"vocab_size\":100.0}", ERR_CONFIG, "vocab_size"},
        {"{\"hidden_size\":-64}", ERR_CONFIG, "hidden_size"},
        {"{\"-hidden_size\":0}", ERR_CONFIG, "hidden_size"},
        {"{\"-intermediate_size\":0}", ERR_CONFIG, "intermediate_size"},
        {"{\"-num_hidden_layers\":0}", ERR_CONFIG, "num_hidden_layers"},
        {"{\"num_hidden_layers\":0}", ERR_CONFIG, "num_hidden_layers"},
        {"{\"-num_attention_heads\":0}", ERR_CONFIG, "num_attention_heads"},
        {"{\"num_key_value_heads\":3}", ERR_CONFIG, "num_key_value_heads"},
        {"{\"num_attention_heads\":6,\"num_key_value_heads\":6}", ERR_CONFIG, "head_dim"},
        {"{\"head_dim\":257}", ERR_UNSUPPORTED, "head_dim"},
        {"{\"head_dim\":7}", ERR_UNSUPPORTED, "head_dim"},
        {"{\"head_dim\":0}", ERR_CONFIG, "head_dim"},
        {"{\"max_position_embeddings\":0}", ERR_CONFIG, "max_position_embeddings"},
        {"{\"rms_norm_eps\":0}", ERR_CONFIG, "rms_norm_eps"},
        {"{\"rms_norm_eps\":\"x\"}", ERR_CONFIG, "rms_norm_eps"},
        {"{\"rope_theta\":-1}", ERR_CONFIG, "rope_theta"},
        {"{\"rope_scaling\":[]}", ERR_CONFIG, "rope_scaling"},
        {"{\"rope_scaling\":{\"type\":\"dynamic\",\"factor\":2}}", ERR_UNSUPPORTED,
         "rope_scaling.type"},
        {"{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":2}}", ERR_UNSUPPORTED,
         "rope_scaling.rope_type"},
        {"{\"rope_scaling\":{\"type\":\"linear\"}}", ERR_CONFIG, "rope_scaling.factor"},
        {"{\"rope_scaling\":{\"type\":\"linear\",\"factor\":0}}", ERR_CONFIG,
         "rope_scaling.factor"},
        {"{\"rope_scaling\":{\"type\":\"llama3\",\"factor\":8}}", ERR_CONFIG,
         "rope_scaling.low_freq_factor"},
        {"{\"rope_scaling\":{\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,"
         "\"high_freq_factor\":4,\"original_max_position_embeddings\":8192}}",
         ERR_CONFIG, "rope_scaling.high_freq_factor"},
        {"{\"rope_parameters\":{\"rope_type\":\"longrope\"}}", ERR_UNSUPPORTED,
         "rope_parameters.rope_type"},
        {"{\"rope_parameters\":{\"partial_rotary_factor\":0.25}}", ERR_UNSUPPORTED,
         "rope_parameters.partial_rotary_factor"},
        {"{\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":10000.0}}", ERR_CONFIG,
         "rope_parameters contradicts"},
        {"{\"tie_word_embeddings\":1}", ERR_CONFIG, "tie_word_embeddings"},
        {"{\"attention_bias\":\"no\"}", ERR_CONFIG, "attention_bias"},
        {"{\"mlp_bias\":0}", ERR_CONFIG, "mlp_bias"},
        {"{\"bos_token_id\":100}", ERR_CONFIG, "bos_token_id"},
        {"{\"eos_token_id\":100}", ERR_CONFIG, "eos_token_id"},
        {"{\"eos_token_id\":[2,-1]}", ERR_CONFIG, "eos_token_id"},
        {"{\"eos_token_id\":\"</s>\"}", ERR_CONFIG, "eos_token_id"},
        {"{\"eos_token_id\":[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]}", ERR_UNSUPPORTED,
         "eos_token_id"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct llama_config c;
        struct err_msg why = {{0}};
        int err = parse_patched(&c, cases[i].patch, &why);
        if (err != cases[i].code || !strstr(why.text, cases[i].field) ||
            !strstr(why.text, "config.json"))
            fail_msg("%s: %d '%s', want '%s'", cases[i].patch, err, why.text, cases[i].field);
    }
}

static void test_not_json(void **state)
{
    static const char *const texts[] = {"", "[]", "{", "{\"a\":1,\"a\":2}", "{\"a\":1e999}"};
    (void)state;
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        struct llama_config c;
        struct err_msg why = {{0}};
        assert_true(llama_config_parse(&c, texts[i], strlen(texts[i]), "bad.json", &why) < 0);
        assert_non_null(strstr(why.text, "bad.json"));
    }
}

static void write_text(const char *dir, const char *name, const char *text)
{
    char path[PATH_MAX];
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "we");
    assert_non_null(f);
    assert_true(fputs(text, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

static void test_folder(void **state)
{
    char dir[] = "/tmp/sluice-test-XXXXXX", path[64];
    struct llama_config c;
    struct err_msg why = {{0}};
    (void)state;

    assert_non_null(mkdtemp(dir));
    assert_true(llama_config_load(&c, dir, &why) < 0);
    assert_non_null(strstr(why.text, "config.json"));
    write_text(dir, "config.json", base);
    assert_ok(llama_config_load(&c, dir, &why));
    assert_int_equal(c.n_eos, 1);
    write_text(dir, "generation_config.json", "{\"eos_token_id\":[7,2]}");
    assert_ok(llama_config_load(&c, dir, &why));
    assert_int_equal(c.n_eos, 2);
    assert_int_equal(c.eos_ids[1], 7);
    write_text(dir, "generation_config.json", "{\"eos_token_id\":700}");
    assert_int_equal(llama_config_load(&c, dir, &why), ERR_CONFIG);
    assert_non_null(strstr(why.text, "generation_config.json: eos_token_id"));
    (void)snprintf(path, sizeof path, "%s/generation_config.json", dir);
    assert_int_equal(unlink(path), 0);
    (void)snprintf(path, sizeof path, "%s/config.json", dir);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(dir), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fields),   cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_rope),     cmocka_unit_test(test_errors),
        cmocka_unit_test(test_not_json), cmocka_unit_test(test_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
