#include "tests/tiny_model.h"

#include "tests/test.h"

#include <unistd.h>

enum { HEADER_BYTES = 1 << 16 };

struct writer {
    const struct tiny_model *t;
    FILE *data;
    char *header;
    size_t header_len, offset;
    struct rng rng;
};

/* One tensor of random elements around `mean`. cols 0: a vector. */
static void tensor(struct writer *w, const char *name, int64_t rows, int64_t cols, double mean,
                   double std)
{
    const int64_t n = rows * (cols ? cols : 1);
    char shape[48];
    (void)snprintf(shape, sizeof shape, cols ? "[%lld,%lld]" : "[%lld]", (long long)rows,
                   (long long)cols);
    w->header_len +=
        (size_t)snprintf(w->header + w->header_len, HEADER_BYTES - w->header_len,
                         "%c\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
                         w->header_len ? ',' : '{', name, w->t->dtype == DTYPE_F16 ? "F16" : "BF16",
                         shape, w->offset, w->offset + (size_t)n * 2);
    w->offset += (size_t)n * 2;
    for (int64_t i = 0; i < n; i++) {
        const float f = (float)(mean + std * rng_normal(&w->rng));
        uint16_t h;
        dtype_from_f32(&h, w->t->dtype, &f, 1);
        assert_int_equal(fwrite(&h, 2, 1, w->data), 1);
    }
}

static void layer_tensor(struct writer *w, int layer, const char *rest, int64_t rows, int64_t cols,
                         double mean, double std)
{
    char name[96];
    (void)snprintf(name, sizeof name, "model.layers.%d.%s", layer, rest);
    tensor(w, name, rows, cols, mean, std);
}

static void layer(struct writer *w, int l)
{
    const struct tiny_model *t = w->t;
    const int64_t q = (int64_t)t->n_heads * t->head_dim, kv = (int64_t)t->n_kv_heads * t->head_dim;
    const double in = 1.0 / sqrt((double)t->hidden);
    layer_tensor(w, l, "input_layernorm.weight", t->hidden, 0, 1.0, 0.1);
    layer_tensor(w, l, "post_attention_layernorm.weight", t->hidden, 0, 1.0, 0.1);
    layer_tensor(w, l, "self_attn.q_proj.weight", q, t->hidden, 0.0, 1.5 * in);
    layer_tensor(w, l, "self_attn.k_proj.weight", kv, t->hidden, 0.0, 1.5 * in);
    layer_tensor(w, l, "self_attn.v_proj.weight", kv, t->hidden, 0.0, in);
    layer_tensor(w, l, "self_attn.o_proj.weight", t->hidden, q, 0.0, 1.0 / sqrt((double)q));
    layer_tensor(w, l, "mlp.gate_proj.weight", t->inter, t->hidden, 0.0, in);
    layer_tensor(w, l, "mlp.up_proj.weight", t->inter, t->hidden, 0.0, in);
    layer_tensor(w, l, "mlp.down_proj.weight", t->hidden, t->inter, 0.0,
                 1.0 / sqrt((double)t->inter));
    if (!t->biases)
        return;
    layer_tensor(w, l, "self_attn.q_proj.bias", q, 0, 0.0, 0.1);
    layer_tensor(w, l, "self_attn.k_proj.bias", kv, 0, 0.0, 0.1);
    layer_tensor(w, l, "self_attn.v_proj.bias", kv, 0, 0.0, 0.1);
    layer_tensor(w, l, "self_attn.o_proj.bias", t->hidden, 0, 0.0, 0.1);
    layer_tensor(w, l, "mlp.gate_proj.bias", t->inter, 0, 0.0, 0.1);
    layer_tensor(w, l, "mlp.up_proj.bias", t->inter, 0, 0.0, 0.1);
    layer_tensor(w, l, "mlp.down_proj.bias", t->hidden, 0, 0.0, 0.1);
}

static FILE *open_in(const struct tiny_model *t, const char *name, const char *mode)
{
    char path[128];
    (void)snprintf(path, sizeof path, "%s/%s", t->dir, name);
    FILE *f = fopen(path, mode);
    assert_non_null(f);
    return f;
}

static void write_weights(const struct tiny_model *t)
{
    struct writer w = {.t = t, .rng = {t->seed}};
    w.data = tmpfile();
    w.header = calloc(1, HEADER_BYTES);
    assert_non_null(w.data);
    assert_non_null(w.header);
    tensor(&w, "model.embed_tokens.weight", t->vocab, t->hidden, 0.0, 1.0);
    for (int l = 0; l < t->n_layers; l++)
        layer(&w, l);
    tensor(&w, "model.norm.weight", t->hidden, 0, 1.0, 0.1);
    if (!t->tied)
        tensor(&w, "lm_head.weight", t->vocab, t->hidden, 0.0, 2.0 / sqrt((double)t->hidden));
    w.header[w.header_len++] = '}';

    FILE *f = open_in(t, "model.safetensors", "wb");
    const uint64_t len = w.header_len;
    unsigned char buf[4096];
    size_t n;
    assert_int_equal(fwrite(&len, 8, 1, f), 1);
    assert_int_equal(fwrite(w.header, w.header_len, 1, f), 1);
    rewind(w.data);
    while ((n = fread(buf, 1, sizeof buf, w.data)) > 0)
        assert_int_equal(fwrite(buf, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
    (void)fclose(w.data);
    free(w.header);
}

void tiny_model_write(struct tiny_model *t)
{
    (void)snprintf(t->dir, sizeof t->dir, "/tmp/sluice-tiny-XXXXXX");
    assert_non_null(mkdtemp(t->dir));
    FILE *f = open_in(t, "config.json", "w");
    (void)fprintf(
        f,
        "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"vocab_size\":%d,"
        "\"hidden_size\":%d,\"intermediate_size\":%d,\"num_hidden_layers\":%d,"
        "\"num_attention_heads\":%d,\"num_key_value_heads\":%d,\"head_dim\":%d,"
        "\"hidden_act\":\"silu\",\"max_position_embeddings\":8192,\"rms_norm_eps\":1e-05,"
        "\"rope_theta\":500000.0,\"rope_scaling\":%s,\"tie_word_embeddings\":%s,"
        "\"attention_bias\":%s,\"mlp_bias\":%s,\"bos_token_id\":1,\"eos_token_id\":2}\n",
        t->vocab, t->hidden, t->inter, t->n_layers, t->n_heads, t->n_kv_heads, t->head_dim,
        t->llama3 ? "{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
                    "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":1024}"
                  : "null",
        t->tied ? "true" : "false", t->biases ? "true" : "false", t->biases ? "true" : "false");
    assert_int_equal(fclose(f), 0);
    write_weights(t);
}

void tiny_model_remove(struct tiny_model *t)
{
    static const char *const names[] = {"config.json", "model.safetensors"};
    char path[128];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        (void)snprintf(path, sizeof path, "%s/%s", t->dir, names[i]);
        (void)unlink(path);
    }
    (void)rmdir(t->dir);
}
