#include "model/config.h"

#include "model/json_read.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_CONFIG_BYTES = 4 << 20 };

static const char *const rope_names[] = {
    [ROPE_DEFAULT] = "default", [ROPE_LINEAR] = "linear", [ROPE_LLAMA3] = "llama3"};

static int check_architecture(const struct jread *j, struct err_msg *why)
{
    const json_t *list = jread_get(j, "architectures");
    const char *type = NULL;

    TRY(jread_string(j, "model_type", &type, why));
    if (!list && !type)
        return err_set(why, ERR_CONFIG, "%s: architectures is missing", j->file);
    if (list) {
        const char *name = json_string_value(json_array_get(list, 0));
        if (json_array_size(list) != 1 || !name)
            return err_set(why, ERR_CONFIG, "%s: architectures is not a list of one name", j->file);
        if (strcmp(name, "LlamaForCausalLM") != 0)
            return err_set(why, ERR_UNSUPPORTED,
                           "%s: architectures is %.64s; only LlamaForCausalLM is supported",
                           j->file, name);
    }
    if (type && strcmp(type, "llama") != 0)
        return err_set(why, ERR_UNSUPPORTED, "%s: model_type is %.64s; only llama is supported",
                       j->file, type);
    return 0;
}

/* Weight formats are checked tensor by tensor; the field only has to make sense. */
static int check_dtype(const struct jread *j, const char *field, struct err_msg *why)
{
    const char *t = NULL;
    TRY(jread_string(j, field, &t, why));
    if (t && strcmp(t, "float32") != 0 && strcmp(t, "float16") != 0 && strcmp(t, "bfloat16") != 0)
        return err_set(why, ERR_UNSUPPORTED, "%s: %s is %.64s, not float32, float16 or bfloat16",
                       j->file, field, t);
    return 0;
}

static int check_rotary_fraction(const struct jread *j, struct err_msg *why)
{
    double fraction = 1.0;
    TRY(jread_double(j, "partial_rotary_factor", 0.0, &fraction, why));
    if (fraction != 1.0)
        return err_set(why, ERR_UNSUPPORTED, "%s: %spartial_rotary_factor is %g; only 1 is",
                       j->file, j->prefix, fraction);
    return 0;
}

/* Fields that would change the arithmetic if they were set. */
static int check_unsupported(const struct jread *j, struct err_msg *why)
{
    static const char *const absent[] = {"quantization_config", "sliding_window"};
    const char *act = "silu";

    TRY(jread_string(j, "hidden_act", &act, why));
    if (strcmp(act, "silu") != 0)
        return err_set(why, ERR_UNSUPPORTED, "%s: hidden_act is %.64s; only silu is supported",
                       j->file, act);
    TRY(check_dtype(j, "torch_dtype", why));
    TRY(check_dtype(j, "dtype", why));
    TRY(check_rotary_fraction(j, why));
    for (size_t i = 0; i < sizeof absent / sizeof *absent; i++) {
        if (jread_get(j, absent[i]))
            return err_set(why, ERR_UNSUPPORTED, "%s: %s is not supported", j->file, absent[i]);
    }
    return 0;
}

static int read_sizes(struct llama_config *c, const struct jread *j, struct err_msg *why)
{
    static const char *const required[] = {"vocab_size", "hidden_size", "intermediate_size",
                                           "num_hidden_layers", "num_attention_heads"};
    for (size_t i = 0; i < sizeof required / sizeof *required; i++)
        TRY(jread_require(j, required[i], why));
    TRY(jread_i32(j, "vocab_size", 1, 1 << 24, &c->vocab_size, why));
    TRY(jread_i32(j, "hidden_size", 1, 1 << 17, &c->hidden_size, why));
    TRY(jread_i32(j, "intermediate_size", 1, 1 << 20, &c->intermediate_size, why));
    TRY(jread_i32(j, "num_hidden_layers", 1, 1024, &c->n_layers, why));
    TRY(jread_i32(j, "num_attention_heads", 1, 1024, &c->n_heads, why));
    c->n_kv_heads = c->n_heads;
    TRY(jread_i32(j, "num_key_value_heads", 1, 1024, &c->n_kv_heads, why));
    if (c->n_heads % c->n_kv_heads != 0)
        return err_set(why, ERR_CONFIG,
                       "%s: num_key_value_heads is %d and does not divide num_attention_heads %d",
                       j->file, c->n_kv_heads, c->n_heads);
    c->max_position = 2048; /* transformers' default */
    TRY(jread_i32(j, "max_position_embeddings", 1, 1 << 27, &c->max_position, why));
    return 0;
}

static int read_head_dim(struct llama_config *c, const struct jread *j, struct err_msg *why)
{
    c->head_dim = 0;
    TRY(jread_i32(j, "head_dim", 1, INT32_MAX, &c->head_dim, why));
    if (c->head_dim == 0) {
        if (c->hidden_size % c->n_heads != 0)
            return err_set(why, ERR_CONFIG,
                           "%s: head_dim is missing and num_attention_heads %d does not divide "
                           "hidden_size %d",
                           j->file, c->n_heads, c->hidden_size);
        c->head_dim = c->hidden_size / c->n_heads;
    }
    if (c->head_dim > LLAMA_MAX_HEAD_DIM || c->head_dim % 2 != 0)
        return err_set(why, ERR_UNSUPPORTED, "%s: head_dim is %d; even values to %d are supported",
                       j->file, c->head_dim, LLAMA_MAX_HEAD_DIM);
    return 0;
}

static int read_rope_type(enum rope_type *out, const struct jread *j, struct err_msg *why)
{
    const char *field = jread_get(j, "rope_type") ? "rope_type" : "type";
    const char *name = "default";

    TRY(jread_string(j, field, &name, why));
    for (int t = ROPE_DEFAULT; t <= ROPE_LLAMA3; t++) {
        if (strcmp(name, rope_names[t]) == 0) {
            *out = (enum rope_type)t;
            return 0;
        }
    }
    return err_set(why, ERR_UNSUPPORTED,
                   "%s: %s%s is %.64s; default, linear and llama3 are supported", j->file,
                   j->prefix, field, name);
}

/* The members of rope_scaling or rope_parameters; theta is left alone where it is not given. */
static int read_rope_object(struct rope_config *r, const struct jread *j, struct err_msg *why)
{
    TRY(read_rope_type(&r->type, j, why));
    TRY(jread_double(j, "rope_theta", 0.0, &r->theta, why));
    TRY(check_rotary_fraction(j, why));
    if (r->type == ROPE_DEFAULT)
        return 0;
    TRY(jread_require(j, "factor", why));
    TRY(jread_double(j, "factor", 0.0, &r->factor, why));
    if (r->type == ROPE_LINEAR)
        return 0;
    TRY(jread_require(j, "low_freq_factor", why));
    TRY(jread_require(j, "high_freq_factor", why));
    TRY(jread_require(j, "original_max_position_embeddings", why));
    TRY(jread_double(j, "low_freq_factor", 0.0, &r->low_freq_factor, why));
    TRY(jread_double(j, "high_freq_factor", 0.0, &r->high_freq_factor, why));
    TRY(jread_i32(j, "original_max_position_embeddings", 1, 1 << 27, &r->original_max_position,
                  why));
    if (r->high_freq_factor <= r->low_freq_factor)
        return err_set(why, ERR_CONFIG, "%s: %shigh_freq_factor %g is not above low_freq_factor %g",
                       j->file, j->prefix, r->high_freq_factor, r->low_freq_factor);
    return 0;
}

static bool rope_equal(const struct rope_config *a, const struct rope_config *b)
{
    return a->type == b->type && a->theta == b->theta && a->factor == b->factor &&
           a->low_freq_factor == b->low_freq_factor && a->high_freq_factor == b->high_freq_factor &&
           a->original_max_position == b->original_max_position;
}

static int check_rope_object(const struct jread *j, const char *field, const json_t *v,
                             struct err_msg *why)
{
    if (v && !json_is_object(v))
        return err_set(why, ERR_CONFIG, "%s: %s is not an object", j->file, field);
    return 0;
}

/* transformers 4: rope_theta and rope_scaling; 5: rope_parameters. A folder may carry both, which
 * then must agree: there is no telling which of two different ones it was trained with. */
static int read_rope(struct rope_config *r, const struct jread *j, struct err_msg *why)
{
    const json_t *old = jread_get(j, "rope_scaling"), *new = jread_get(j, "rope_parameters");
    const struct jread jold = {old, j->file, "rope_scaling."};
    const struct jread jnew = {new, j->file, "rope_parameters."};

    TRY(check_rope_object(j, "rope_scaling", old, why));
    TRY(check_rope_object(j, "rope_parameters", new, why));
    *r = (struct rope_config){.type = ROPE_DEFAULT, .theta = 10000.0};
    TRY(jread_double(j, "rope_theta", 0.0, &r->theta, why));
    struct rope_config second = *r;
    if (old)
        TRY(read_rope_object(r, &jold, why));
    if (!new)
        return 0;
    TRY(read_rope_object(&second, &jnew, why));
    bool both = old || jread_get(j, "rope_theta");
    if (both && !rope_equal(r, &second))
        return err_set(why, ERR_CONFIG,
                       "%s: rope_parameters contradicts rope_theta and rope_scaling", j->file);
    *r = second;
    return 0;
}

static int add_eos(struct llama_config *c, const struct jread *j, const json_t *v,
                   struct err_msg *why)
{
    int32_t at = 0;
    int64_t id = json_integer_value(v);
    if (!json_is_integer(v) || id < 0 || id >= c->vocab_size)
        return err_set(why, ERR_CONFIG, "%s: eos_token_id is not an id below vocab_size %d",
                       j->file, c->vocab_size);
    while (at < c->n_eos && c->eos_ids[at] < id)
        at++;
    if (at < c->n_eos && c->eos_ids[at] == id)
        return 0;
    if (c->n_eos == BATCH_MAX_STOP)
        return err_set(why, ERR_UNSUPPORTED, "%s: eos_token_id has more than %d ids", j->file,
                       BATCH_MAX_STOP);
    memmove(&c->eos_ids[at + 1], &c->eos_ids[at], (size_t)(c->n_eos - at) * sizeof *c->eos_ids);
    c->eos_ids[at] = (int32_t)id;
    c->n_eos++;
    return 0;
}

static int read_eos(struct llama_config *c, const struct jread *j, struct err_msg *why)
{
    const json_t *v = jread_get(j, "eos_token_id");
    if (!v)
        return 0;
    if (!json_is_array(v))
        return add_eos(c, j, v, why);
    for (size_t i = 0; i < json_array_size(v); i++)
        TRY(add_eos(c, j, json_array_get(v, i), why));
    return 0;
}

static int read_config(struct llama_config *c, const struct jread *j, struct err_msg *why)
{
    TRY(check_architecture(j, why));
    TRY(check_unsupported(j, why));
    TRY(read_sizes(c, j, why));
    TRY(read_head_dim(c, j, why));
    TRY(read_rope(&c->rope, j, why));
    c->rms_eps = 1e-6;
    TRY(jread_double(j, "rms_norm_eps", 0.0, &c->rms_eps, why));
    TRY(jread_bool(j, "tie_word_embeddings", &c->tied, why));
    TRY(jread_bool(j, "attention_bias", &c->attention_bias, why));
    TRY(jread_bool(j, "mlp_bias", &c->mlp_bias, why));
    c->bos_id = -1;
    TRY(jread_i32(j, "bos_token_id", 0, c->vocab_size - 1, &c->bos_id, why));
    return read_eos(c, j, why);
}

int llama_config_parse(struct llama_config *out, const char *json, size_t len, const char *name,
                       struct err_msg *why)
{
    json_t *root;
    *out = (struct llama_config){.bos_id = -1};
    TRY(jread_buffer(&root, json, len, name, why));
    const struct jread j = {root, name, ""};
    int err = read_config(out, &j, why);
    json_decref(root);
    return err;
}

static int read_generation_config(struct llama_config *c, const char *dir, struct err_msg *why)
{
    char path[PATH_MAX];
    json_t *root;

    if (snprintf(path, sizeof path, "%s/generation_config.json", dir) >= (int)sizeof path)
        return err_set(why, -ENAMETOOLONG, "%.200s/...: path too long", dir);
    int err = jread_file(&root, path, MAX_CONFIG_BYTES, why);
    if (err == -ENOENT)
        return 0;
    if (err < 0)
        return err;
    const struct jread j = {root, path, ""};
    err = read_eos(c, &j, why);
    json_decref(root);
    return err;
}

int llama_config_load(struct llama_config *out, const char *dir, struct err_msg *why)
{
    char path[PATH_MAX];
    json_t *root;

    *out = (struct llama_config){.bos_id = -1};
    if (snprintf(path, sizeof path, "%s/config.json", dir) >= (int)sizeof path)
        return err_set(why, -ENAMETOOLONG, "%.200s/...: path too long", dir);
    TRY(jread_file(&root, path, MAX_CONFIG_BYTES, why));
    const struct jread j = {root, path, ""};
    int err = read_config(out, &j, why);
    json_decref(root);
    if (err < 0)
        return err;
    return read_generation_config(out, dir, why);
}

void llama_rope_text(char *text, size_t size, const struct rope_config *rope)
{
    if (rope->type == ROPE_DEFAULT)
        (void)snprintf(text, size, "default theta=%g", rope->theta);
    else
        (void)snprintf(text, size, "%s theta=%g factor=%g", rope_names[rope->type], rope->theta,
                       rope->factor);
}
