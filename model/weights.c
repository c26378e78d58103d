#include "model/weights.h"

#include "core/hash.h"
#include "core/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum {
    NAME_MAX_LEN = 96,
    ALIGN_BYTES = 256, /* what cuBLAS likes best */
    VOCAB_STEP = 16    /* slices of a 16-bit embedding start aligned so where 8 divides hidden */
};

/* One rank's slice is the whole, as it is. */
static int32_t vocab_width(int32_t vocab_size, int32_t n_ranks)
{
    if (n_ranks == 1)
        return vocab_size;
    int32_t rows = vocab_size / n_ranks + (vocab_size % n_ranks != 0);
    return (rows + VOCAB_STEP - 1) / VOCAB_STEP * VOCAB_STEP;
}

int32_t llama_shard_vocab_rows(const struct llama_shard *s, const struct llama_config *c, int rank)
{
    const int64_t left = c->vocab_size - (int64_t)rank * s->vocab_width;
    return left < 0 ? 0 : left < s->vocab_width ? (int32_t)left : s->vocab_width;
}

int llama_shard_make(struct llama_shard *s, const struct llama_config *c, int rank, int n_ranks,
                     struct err_msg *why)
{
    if (c->n_heads % n_ranks != 0)
        return err_set(why, ERR_CONFIG, "num_attention_heads %d cannot be split over %d ranks",
                       c->n_heads, n_ranks);
    if (c->n_kv_heads % n_ranks != 0 && n_ranks % c->n_kv_heads != 0)
        return err_set(why, ERR_CONFIG, "num_key_value_heads %d cannot be split over %d ranks",
                       c->n_kv_heads, n_ranks);
    if (c->intermediate_size % n_ranks != 0)
        return err_set(why, ERR_CONFIG, "intermediate_size %d cannot be split over %d ranks",
                       c->intermediate_size, n_ranks);
    *s = (struct llama_shard){.rank = rank,
                              .n_ranks = n_ranks,
                              .n_heads = c->n_heads / n_ranks,
                              .n_kv_heads = c->n_kv_heads < n_ranks ? 1 : c->n_kv_heads / n_ranks,
                              .n_inter = c->intermediate_size / n_ranks,
                              .vocab_width = vocab_width(c->vocab_size, n_ranks)};
    s->head = rank * s->n_heads;
    s->kv_head = (int32_t)((int64_t)rank * c->n_kv_heads / n_ranks);
    s->inter = rank * s->n_inter;
    s->vocab = rank * s->vocab_width;
    s->n_vocab = llama_shard_vocab_rows(s, c, rank);
    return 0;
}

/* The loading in progress. In the first pass memory is NULL and only `used` advances. */
struct loader {
    const struct safetensors *st; /* NULL: drawn */
    const struct llama_config *c;
    const struct llama_shard *shard;
    struct weights_sink sink;
    char *memory;
    size_t used; /* bytes */
    const struct weights_progress *progress;
    uint64_t done, total;
    struct err_msg *why;
};

static void advance(void *arg, uint64_t bytes)
{
    struct loader *l = arg;
    l->done += bytes;
    if (l->progress->fn)
        l->progress->fn(l->progress->arg, l->done, l->total);
}

static int storage_dtype(const struct st_tensor *t, enum dtype *out, struct err_msg *why)
{
    switch (t->dtype) {
    case ST_F32: *out = DTYPE_F32; return 0;
    case ST_F16: *out = DTYPE_F16; return 0;
    case ST_BF16: *out = DTYPE_BF16; return 0;
    default:
        return err_set(why, ERR_UNSUPPORTED, "tensor '%s': dtype %s; F32, F16 and BF16 are",
                       t->name, st_dtype_name(t->dtype));
    }
}

/* Finds a tensor and holds its shape: [rows, width], or [width] where rows is 0. */
static int find_tensor(const struct loader *l, const char *name, int64_t rows, int64_t width,
                       const struct st_tensor **out)
{
    const int64_t matrix[2] = {rows, width};
    const int64_t *shape = rows ? matrix : matrix + 1;
    const int n_dims = rows ? 2 : 1;
    const struct st_tensor *t = safetensors_find(l->st, name);

    if (!t)
        return err_set(l->why, ERR_MISMATCH, "tensor '%s' is missing", name);
    if (t->n_dims != n_dims || memcmp(t->shape, shape, (size_t)n_dims * sizeof *shape) != 0) {
        char got[96], want[96];
        return err_set(l->why, ERR_MISMATCH, "tensor '%s' has shape %s, config.json calls for %s",
                       name, st_shape_text(got, sizeof got, t->shape, t->n_dims),
                       st_shape_text(want, sizeof want, shape, n_dims));
    }
    *out = t;
    return 0;
}

/* Where a slice's elements come from. */
static int find_source(const struct loader *l, const char *name, int64_t rows,
                       struct weights_slice *s)
{
    const struct st_tensor *t = NULL;
    if (!l->st) {
        bool norm = strstr(name, "norm") != NULL;
        s->dtype = l->sink.dtype;
        s->seed = hash_bytes(name, strlen(name), 0);
        s->mean = norm ? 1.0f : 0.0f;
        s->std = norm ? 0.0f : 0.02f;
        return 0;
    }
    TRY(find_tensor(l, name, rows, s->width, &t));
    s->src = t->data;
    return storage_dtype(t, &s->dtype, l->why);
}

/* Loads a part of a tensor to the next free place. `s` says which part; rows of the whole tensor
 * come as `rows` (0: a vector). */
static int load_slice(struct loader *l, const char *name, int64_t rows, struct weights_slice s)
{
    TRY(find_source(l, name, rows, &s));
    const size_t n = (size_t)(s.n_rows * s.n_cols);
    if (l->memory && n > 0)
        TRY(weights_fill(&l->sink, l->memory + l->used, &s));
    else if (!l->memory)
        l->total += n * dtype_bytes(s.dtype);
    l->used += n * dtype_bytes(l->sink.dtype);
    return 0;
}

static int load_rows(struct loader *l, const char *name, int64_t rows, int64_t width, int64_t row,
                     int64_t n_rows)
{
    return load_slice(
        l, name, rows,
        (struct weights_slice){.row = row, .n_rows = n_rows, .n_cols = width, .width = width});
}

static int load_cols(struct loader *l, const char *name, int64_t rows, int64_t width, int64_t col,
                     int64_t n_cols)
{
    return load_slice(
        l, name, rows,
        (struct weights_slice){.n_rows = rows, .col = col, .n_cols = n_cols, .width = width});
}

/* Elements [at, at + n) of a vector. */
static int load_vector(struct loader *l, const char *name, int64_t width, int64_t at, int64_t n)
{
    return load_slice(l, name, 0,
                      (struct weights_slice){.n_rows = 1, .col = at, .n_cols = n, .width = width});
}

static const void *here(const struct loader *l)
{
    return l->memory ? l->memory + l->used : NULL;
}

/* Where every matrix and vector starts. */
static void align(struct loader *l)
{
    l->used = (l->used + ALIGN_BYTES - 1) & ~(size_t)(ALIGN_BYTES - 1);
}

static const char *layer_name(char *name, int32_t layer, const char *rest)
{
    (void)snprintf(name, NAME_MAX_LEN, "model.layers.%d.%s", layer, rest);
    return name;
}

/* One of the projections that are split by rows: its slice of the weight or of the bias. */
static int load_part(struct loader *l, int32_t layer, const char *proj, const char *kind,
                     int64_t rows, int64_t row, int64_t n_rows)
{
    char rest[48], name[NAME_MAX_LEN];
    (void)snprintf(rest, sizeof rest, "%s.%s", proj, kind);
    (void)layer_name(name, layer, rest);
    if (strcmp(kind, "bias") == 0)
        return load_vector(l, name, rows, row, n_rows);
    return load_rows(l, name, rows, l->c->hidden_size, row, n_rows);
}

static int load_qkv(struct loader *l, int32_t layer, const char *kind)
{
    const struct llama_config *c = l->c;
    const struct llama_shard *s = l->shard;
    const int64_t d = c->head_dim;

    TRY(load_part(l, layer, "self_attn.q_proj", kind, c->n_heads * d, s->head * d, s->n_heads * d));
    TRY(load_part(l, layer, "self_attn.k_proj", kind, c->n_kv_heads * d, s->kv_head * d,
                  s->n_kv_heads * d));
    TRY(load_part(l, layer, "self_attn.v_proj", kind, c->n_kv_heads * d, s->kv_head * d,
                  s->n_kv_heads * d));
    align(l);
    return 0;
}

static int load_gate_up(struct loader *l, int32_t layer, const char *kind)
{
    const int64_t rows = l->c->intermediate_size;
    TRY(load_part(l, layer, "mlp.gate_proj", kind, rows, l->shard->inter, l->shard->n_inter));
    TRY(load_part(l, layer, "mlp.up_proj", kind, rows, l->shard->inter, l->shard->n_inter));
    align(l);
    return 0;
}

static int load_hidden_vector(struct loader *l, int32_t layer, const char *rest)
{
    char name[NAME_MAX_LEN];
    const int64_t n = l->c->hidden_size;
    TRY(load_vector(l, layer_name(name, layer, rest), n, 0, n));
    align(l);
    return 0;
}

static int load_attention(struct loader *l, int32_t layer, struct llama_layer *w)
{
    char name[NAME_MAX_LEN];
    const struct llama_config *c = l->c;
    const int64_t d = c->head_dim;

    w->attn_norm = here(l);
    TRY(load_hidden_vector(l, layer, "input_layernorm.weight"));
    w->qkv = here(l);
    TRY(load_qkv(l, layer, "weight"));
    w->o = here(l);
    TRY(load_cols(l, layer_name(name, layer, "self_attn.o_proj.weight"), c->hidden_size,
                  c->n_heads * d, l->shard->head * d, l->shard->n_heads * d));
    align(l);
    if (!c->attention_bias)
        return 0;
    w->qkv_bias = here(l);
    TRY(load_qkv(l, layer, "bias"));
    w->o_bias = here(l);
    return load_hidden_vector(l, layer, "self_attn.o_proj.bias");
}

static int load_mlp(struct loader *l, int32_t layer, struct llama_layer *w)
{
    char name[NAME_MAX_LEN];
    const struct llama_config *c = l->c;

    w->mlp_norm = here(l);
    TRY(load_hidden_vector(l, layer, "post_attention_layernorm.weight"));
    w->gate_up = here(l);
    TRY(load_gate_up(l, layer, "weight"));
    w->down = here(l);
    TRY(load_cols(l, layer_name(name, layer, "mlp.down_proj.weight"), c->hidden_size,
                  c->intermediate_size, l->shard->inter, l->shard->n_inter));
    align(l);
    if (!c->mlp_bias)
        return 0;
    w->gate_up_bias = here(l);
    TRY(load_gate_up(l, layer, "bias"));
    w->down_bias = here(l);
    return load_hidden_vector(l, layer, "mlp.down_proj.bias");
}

/* Skips rows of the hidden width; device memory is zeroed. */
static void pad_rows(struct loader *l, int64_t n_rows)
{
    l->used += (size_t)(n_rows * l->c->hidden_size) * dtype_bytes(l->sink.dtype);
}

static int load_embedding(struct loader *l, struct llama_weights *w)
{
    const struct llama_shard *s = l->shard;
    const int64_t vocab = l->c->vocab_size, hidden = l->c->hidden_size;

    w->embed = here(l);
    TRY(load_rows(l, "model.embed_tokens.weight", vocab, hidden, 0, vocab));
    if (l->c->tied) /* the last ranks' slices of it go beyond its end */
        pad_rows(l, (int64_t)s->n_ranks * s->vocab_width - vocab);
    align(l);
    return 0;
}

static int load_output(struct loader *l, struct llama_weights *w)
{
    const struct llama_shard *s = l->shard;
    const int64_t vocab = l->c->vocab_size, hidden = l->c->hidden_size;

    if (l->c->tied) {
        const size_t at = (size_t)(s->vocab * hidden) * dtype_bytes(l->sink.dtype);
        w->lm_head = w->embed ? (const char *)w->embed + at : NULL;
        return 0;
    }
    w->lm_head = here(l);
    TRY(load_rows(l, "lm_head.weight", vocab, hidden, s->vocab, s->n_vocab));
    pad_rows(l, s->vocab_width - s->n_vocab);
    return 0;
}

/* One pass over everything, in a fixed order; see struct loader. */
static int load_all(struct loader *l, struct llama_weights *w)
{
    const struct llama_config *c = l->c;
    const int64_t hidden = c->hidden_size;

    TRY(load_embedding(l, w));
    for (int32_t i = 0; i < c->n_layers; i++) {
        TRY(load_attention(l, i, &w->layers[i]));
        TRY(load_mlp(l, i, &w->layers[i]));
    }
    w->norm = here(l);
    TRY(load_vector(l, "model.norm.weight", hidden, 0, hidden));
    align(l);
    return load_output(l, w);
}

/* Whether the configuration has a place for this name of a layer's tensor. */
static bool layer_tensor_known(const struct llama_config *c, const char *rest)
{
    static const char *const always[] = {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "self_attn.rotary_emb.inv_freq" /* old files: computed, not read */};
    static const char *const attention[] = {"self_attn.q_proj.bias", "self_attn.k_proj.bias",
                                            "self_attn.v_proj.bias", "self_attn.o_proj.bias"};
    static const char *const mlp[] = {"mlp.gate_proj.bias", "mlp.up_proj.bias",
                                      "mlp.down_proj.bias"};
    for (size_t i = 0; i < sizeof always / sizeof *always; i++) {
        if (strcmp(rest, always[i]) == 0)
            return true;
    }
    for (size_t i = 0; c->attention_bias && i < sizeof attention / sizeof *attention; i++) {
        if (strcmp(rest, attention[i]) == 0)
            return true;
    }
    for (size_t i = 0; c->mlp_bias && i < sizeof mlp / sizeof *mlp; i++) {
        if (strcmp(rest, mlp[i]) == 0)
            return true;
    }
    return false;
}

static bool tensor_known(const struct llama_config *c, const char *name)
{
    int32_t layer;
    int at = 0;
    if (strcmp(name, "model.embed_tokens.weight") == 0 || strcmp(name, "model.norm.weight") == 0 ||
        strcmp(name, "lm_head.weight") == 0) /* a tied model's is a copy and not read */
        return true;
    // NOLINTNEXTLINE(cert-err34-c): an overflowing number fails the range check or the name
    return sscanf(name, "model.layers.%9" SCNd32 ".%n", &layer, &at) == 1 && at > 0 && layer >= 0 &&
           layer < c->n_layers && layer_tensor_known(c, name + at);
}

static int check_strangers(const struct safetensors *st, const struct llama_config *c,
                           struct err_msg *why)
{
    for (size_t i = 0; i < safetensors_count(st); i++) {
        const char *name = safetensors_at(st, i)->name;
        if (!tensor_known(c, name))
            return err_set(why, ERR_MISMATCH,
                           "tensor '%.96s' has no place in the model that config.json describes",
                           name);
    }
    return 0;
}

enum dtype weights_dtype16(const struct safetensors *st)
{
    const struct st_tensor *t = safetensors_find(st, "model.embed_tokens.weight");
    return t && t->dtype == ST_F16 ? DTYPE_F16 : DTYPE_BF16;
}

/* Sizes everything, takes the memory, fills it. */
static int load_twice(struct loader *l, struct llama_weights *out)
{
    struct err_msg inner = {{0}};
    TRY(load_all(l, out));
    out->bytes = l->used;
    int err = dev_alloc(out->dev, &out->memory, out->bytes, &inner);
    if (err < 0)
        return err_set(l->why, err, "weights: %.300s", err_why(&inner, err));
    l->memory = out->memory;
    l->used = 0;
    TRY(weights_sink_open(&l->sink, l->why));
    err = load_all(l, out);
    int closed = weights_sink_close(&l->sink);
    return err < 0 ? err : closed;
}

int weights_load(struct llama_weights *out, const struct weights_config *cfg, struct err_msg *why)
{
    struct loader l = {.st = cfg->st,
                       .c = cfg->config,
                       .shard = cfg->shard,
                       .progress = &cfg->progress,
                       .why = why,
                       .sink = {.dev = cfg->dev,
                                .dtype = cfg->dtype,
                                .ops = cfg->stage,
                                .done = advance,
                                .done_arg = &l}};

    *out = (struct llama_weights){.dev = cfg->dev, .dtype = cfg->dtype};
    if (cfg->st)
        TRY(check_strangers(cfg->st, cfg->config, why));
    out->layers = mem_zalloc((size_t)cfg->config->n_layers, sizeof *out->layers);
    int err = load_twice(&l, out);
    if (err < 0)
        weights_release(out);
    return err;
}

void weights_release(struct llama_weights *w)
{
    if (w->memory)
        dev_release(w->dev, w->memory, w->bytes);
    mem_free(w->layers);
    *w = (struct llama_weights){0};
}
