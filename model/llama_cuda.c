#define LOG_MODULE "model"
#include "model/llama_cuda.h"

#include "core/clock.h"
#include "core/log.h"
#include "core/mem.h"
#include "model/llama_cuda_internal.h"
#include "model/rope.h"
#include "model/weights_cuda.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { HISTORY_TOKENS = 1 << 18 /* and more where one sequence may be longer */ };

/* dev_alloc whose error says what the memory was for. */
static int take(struct llama_cuda_state *m, void *out, size_t bytes, const char *what,
                struct err_msg *why)
{
    struct err_msg inner = {{0}};
    void *memory = NULL;
    int err = dev_alloc(m->dev, &memory, bytes, &inner);
    if (err < 0)
        return err_set(why, err, "%s: %.300s", what, err_why(&inner, err));
    memcpy(out, &memory, sizeof memory);
    return 0;
}

static int make_plans(struct llama_cuda_state *m, struct err_msg *why)
{
    const int32_t hidden = m->c->hidden_size, n_inter = m->shard->n_inter, rows = m->max_tokens;
    struct gemm_cublas *g = m->gemm;
    TRY(gemm_cublas_plan(g, &m->qkv_plan, m->qkv_width, hidden, rows, m->dtype, why));
    TRY(gemm_cublas_plan(g, &m->o_plan, hidden, m->q_width, rows, m->dtype, why));
    TRY(gemm_cublas_plan(g, &m->gate_up_plan, 2 * n_inter, hidden, rows, m->dtype, why));
    TRY(gemm_cublas_plan(g, &m->down_plan, hidden, n_inter, rows, m->dtype, why));
    return gemm_cublas_plan(g, &m->head_plan, m->shard->vocab_width, hidden, m->max_outputs,
                            DTYPE_F32, why);
}

/* Hands out bytes from base, or only counts while base is NULL. */
static void *carve(char *base, size_t *used, int32_t rows, int32_t width, size_t size)
{
    char *p = base ? base + *used : NULL;
    *used += ((size_t)rows * (size_t)width * size + 255) & ~(size_t)255;
    return p;
}

static void lay_out_logits(struct llama_cuda_state *m, char *base, size_t *used)
{
    struct cuda_activations *a = &m->a;
    const struct llama_shard *s = m->shard;
    const int32_t rows = m->out_rows;

    a->last = carve(base, used, rows, m->c->hidden_size, dtype_bytes(m->dtype));
    a->slice = carve(base, used, rows, s->vocab_width, sizeof(float));
    a->logits = a->slice;
    if (s->n_ranks == 1)
        return;
    a->slices = carve(base, used, rows * s->n_ranks, s->vocab_width, sizeof(float));
    a->logits = s->rank == 0 ? carve(base, used, rows, m->c->vocab_size, sizeof(float)) : NULL;
}

static size_t lay_out(struct llama_cuda_state *m, char *base)
{
    struct cuda_activations *a = &m->a;
    const int32_t rows = m->rows, hidden = m->c->hidden_size, n_inter = m->shard->n_inter;
    const size_t size = dtype_bytes(m->dtype);
    size_t used = 0;

    a->residual = carve(base, &used, rows, hidden, size);
    a->hidden = carve(base, &used, rows, hidden, size);
    /* between halves and behind them, room for parts of rows that ranks do not divide */
    a->delta = carve(base, &used, rows + 2 * m->shard->n_ranks, hidden, size);
    a->qkv = carve(base, &used, rows, m->qkv_width, size);
    a->attn = carve(base, &used, rows, m->q_width, size);
    a->gate_up = carve(base, &used, rows, 2 * n_inter, size);
    a->act = carve(base, &used, rows, n_inter, size);
    lay_out_logits(m, base, &used);
    return used;
}

static int fill_rope(struct llama_cuda_state *m, struct err_msg *why)
{
    float *table = mem_try_aligned(1, m->cos_sin_bytes);
    if (!table)
        return err_set(why, -ENOMEM, "no host memory for the rotary table");
    rope_fill(table, &m->c->rope, m->c->head_dim, m->max_position);
    int err = dev_upload(m->dev, m->cos_sin, table, m->cos_sin_bytes);
    mem_free(table);
    return err;
}

static int take_memory(struct llama_cuda_state *m, struct err_msg *why)
{
    char what[96];
    m->memory_bytes = lay_out(m, NULL);
    (void)snprintf(what, sizeof what, "activations of %d tokens, logits of %d sequences",
                   m->max_tokens, m->max_outputs);
    TRY(take(m, &m->memory, m->memory_bytes, what, why));
    (void)lay_out(m, m->memory);
    m->cos_sin_bytes = (size_t)m->max_position * (size_t)m->c->head_dim * sizeof(float);
    (void)snprintf(what, sizeof what, "rotary table of %" PRId64 " positions", m->max_position);
    TRY(take(m, &m->cos_sin, m->cos_sin_bytes, what, why));
    TRY(fill_rope(m, why));
    if (m->shard->rank != 0)
        return 0;
    m->sampler_bytes = sampler_cuda_workspace_bytes(m->c->vocab_size, m->max_outputs);
    TRY(take(m, &m->sampler, m->sampler_bytes, "sampling", why));
    const size_t history = (size_t)m->history_len * sizeof *m->history;
    TRY(take(m, &m->history, history, "known tokens of sequences with penalties", why));
    void *host = NULL;
    TRY(dev_cuda_pin_alloc(m->dev, &host, history, why));
    m->history_host = host;
    return 0;
}

static int make_marks(struct llama_cuda_state *m)
{
    struct cuda_marks *k = &m->marks;
    k->max = 40 * m->c->n_layers + 16; /* a split layer, and what is around layers */
    k->events = mem_zalloc((size_t)k->max, sizeof *k->events);
    k->parts = mem_zalloc((size_t)k->max, sizeof *k->parts);
    for (int32_t i = 0; i < k->max; i++)
        CUDA_TRY(cudaEventCreate(&k->events[i]));
    return 0;
}

/* Weights of one kind over all layers, for tuning. */
static void collect(const struct llama_cuda_state *m, const void **w, size_t offset)
{
    for (int32_t i = 0; i < m->c->n_layers; i++)
        memcpy(&w[i], (const char *)&m->w->layers[i] + offset, sizeof w[i]);
}

static int tune_rows(struct llama_cuda_state *m, int32_t rows, const void **w)
{
    const struct cuda_activations *a = &m->a;
    const struct {
        struct gemm_cublas_plan *plan;
        size_t weights;
        void *y, *act;
        const void *x;
    } products[] = {
        {m->qkv_plan, offsetof(struct llama_layer, qkv), a->qkv, NULL, a->hidden},
        {m->o_plan, offsetof(struct llama_layer, o), a->delta, NULL, a->attn},
        {m->gate_up_plan, offsetof(struct llama_layer, gate_up), a->gate_up, a->act, a->hidden},
        {m->down_plan, offsetof(struct llama_layer, down), a->delta, NULL, a->act},
    };
    const struct gemm_trial head = {.y = a->slice,
                                    .x = a->last,
                                    .w = (const void *const *)&m->w->lm_head,
                                    .n_w = 1,
                                    .rows = rows};
    for (size_t i = 0; i < sizeof products / sizeof *products; i++) {
        const struct gemm_trial trial = {.y = products[i].y,
                                         .act = products[i].act,
                                         .x = products[i].x,
                                         .w = w,
                                         .n_w = m->c->n_layers,
                                         .rows = rows};
        collect(m, w, products[i].weights);
        TRY(gemm_cublas_tune(m->gemm, products[i].plan, &trial));
    }
    return rows > m->out_rows ? 0 : gemm_cublas_tune(m->gemm, m->head_plan, &head);
}

/* Where time is weights read (decode batches), and for whole chunks. */
static int tune(struct llama_cuda_state *m, struct err_msg *why)
{
    const int64_t start = clock_monotonic_us(NULL);
    const void **w = mem_zalloc((size_t)m->c->n_layers, sizeof *w);
    int err = 0;
    for (int32_t rows = 1; err == 0 && rows <= m->out_rows && rows <= m->rows;
         rows = gemm_cublas_bucket(rows) + 1)
        err = tune_rows(m, gemm_cublas_bucket(rows), w);
    if (err == 0)
        err = tune_rows(m, m->rows, w);
    if (err == 0 && llama_cuda_split_rows(m, m->max_tokens) > 0)
        err = tune_rows(m, llama_cuda_split_rows(m, m->max_tokens), w);
    mem_free((void *)w);
    if (err < 0)
        return err_set(why, err, "cannot time the matrix products: %s", err_str(err));
    log_info("tuned matrix products ms=%" PRId64, (clock_monotonic_us(NULL) - start) / 1000);
    return 0;
}

static void destroy(struct llama *base)
{
    struct llama_cuda_state *m = llama_cuda_of(base);
    llama_cuda_drop_graphs(m);
    attn_cuda_destroy(m->attn);
    gemm_cublas_plan_free(m->qkv_plan);
    gemm_cublas_plan_free(m->o_plan);
    gemm_cublas_plan_free(m->gate_up_plan);
    gemm_cublas_plan_free(m->down_plan);
    gemm_cublas_plan_free(m->head_plan);
    gemm_cublas_close(m->gemm);
    dev_release(m->dev, m->memory, m->memory_bytes);
    dev_release(m->dev, m->cos_sin, m->cos_sin_bytes);
    dev_release(m->dev, m->sampler, m->sampler_bytes);
    dev_release(m->dev, m->history, (size_t)m->history_len * sizeof *m->history);
    dev_release(m->dev, m->up.dev, m->up.bytes);
    dev_cuda_pin_free(m->dev, m->up.host);
    dev_cuda_pin_free(m->dev, m->history_host);
    for (int32_t i = 0; m->marks.events && i < m->marks.max; i++) {
        if (m->marks.events[i])
            (void)cudaEventDestroy(m->marks.events[i]);
    }
    mem_free(m->marks.events);
    mem_free(m->marks.parts);
    mem_free(m->output_row);
    mem_free(m->last_rows);
    mem_free(m->logits_host);
    mem_free(m);
}

static struct llama_cuda_state *make_state(const struct llama_setup *setup)
{
    struct llama_cuda_state *m = mem_zalloc(1, sizeof *m);
    m->base.ops = &llama_cuda;
    m->dev = setup->dev;
    m->comm = setup->comm;
    m->c = setup->config;
    m->shard = setup->shard;
    m->w = setup->weights;
    m->dtype = setup->weights->dtype;
    m->stream = dev_cuda_stream(setup->dev);
    m->max_tokens = setup->max_tokens;
    m->max_outputs = setup->max_outputs;
    m->rows = gemm_cublas_bucket(m->max_tokens);
    m->out_rows = gemm_cublas_bucket(m->max_outputs);
    m->max_position = setup->max_position;
    m->history_len = m->max_position > HISTORY_TOKENS ? m->max_position : HISTORY_TOKENS;
    m->q_width = m->shard->n_heads * m->c->head_dim;
    m->kv_width = m->shard->n_kv_heads * m->c->head_dim;
    m->qkv_width = m->q_width + 2 * m->kv_width;
    m->output_row = mem_zalloc((size_t)m->max_outputs, sizeof *m->output_row);
    m->last_rows = mem_zalloc((size_t)m->max_outputs, sizeof *m->last_rows);
    m->logits_host = mem_zalloc((size_t)m->c->vocab_size, sizeof *m->logits_host);
    return m;
}

static int check(const struct llama_cuda_state *m, struct err_msg *why)
{
    if (m->c->head_dim != 64 && m->c->head_dim != 128)
        return err_set(why, ERR_UNSUPPORTED, "head_dim %d: on a GPU 64 and 128 are",
                       m->c->head_dim);
    if (m->c->vocab_size > SAMPLER_MAX_VOCAB)
        return err_set(why, ERR_UNSUPPORTED, "vocab_size %d: on a GPU at most %d", m->c->vocab_size,
                       SAMPLER_MAX_VOCAB);
    if (m->shard->n_ranks > 1 && (!m->comm || !m->comm->ops->all_reduce_dev))
        return err_set(why, ERR_UNSUPPORTED, "ranks on GPUs need NCCL");
    return 0;
}

static int create(struct llama **out, const struct llama_setup *setup, struct err_msg *why)
{
    struct llama_cuda_state *m = make_state(setup);
    int err = check(m, why);
    if (err == 0)
        err = gemm_cublas_open(&m->gemm, m->dev, m->dtype, m->stream, why);
    if (err == 0)
        err = make_plans(m, why);
    if (err == 0)
        err = take_memory(m, why);
    if (err == 0)
        err = make_marks(m);
    if (err == 0)
        err = llama_cuda_reserve_rows(m, why);
    if (err == 0)
        err = tune(m, why);
    if (err < 0) {
        destroy(&m->base);
        return err;
    }
    *out = &m->base;
    return 0;
}

/* Memory for the largest upload under the present policy. */
static int take_upload(struct llama_cuda_state *m, struct err_msg *why)
{
    void *host = NULL;
    dev_release(m->dev, m->up.dev, m->up.bytes);
    dev_cuda_pin_free(m->dev, m->up.host);
    m->up = (struct upload){0};
    m->counts_bytes = upload_round(attn_cuda_counts_bytes(m->attn));
    m->results_bytes = m->counts_bytes + (size_t)m->max_outputs * sizeof(struct batch_token);
    m->up.bytes = upload_round(m->results_bytes) +
                  upload_round((size_t)m->max_outputs * sizeof(struct sampler_cuda_seq)) +
                  4 * upload_round((size_t)m->rows * sizeof(int32_t)) +
                  2 * upload_round((size_t)m->out_rows * sizeof(int32_t)) +
                  attn_cuda_upload_bytes(m->attn);
    TRY(take(m, &m->up.dev, m->up.bytes, "the plan of a step", why));
    TRY(dev_cuda_pin_alloc(m->dev, &host, m->up.bytes, why));
    m->up.host = host;
    return 0;
}

/* What depends on the cache and the policy. */
static int prepare(struct llama_cuda_state *m, struct err_msg *why)
{
    TRY(attn_cuda_set_policy(m->attn, &m->policy, why));
    TRY(take_upload(m, why));
    return llama_cuda_capture(m, why);
}

static int bind_cache(struct llama *base, const struct kv_view *kv, struct err_msg *why)
{
    struct llama_cuda_state *m = llama_cuda_of(base);
    const struct attn_cuda_config cfg = {.dev = m->dev,
                                         .kv = kv,
                                         .n_heads = m->shard->n_heads,
                                         .max_seqs = m->max_outputs,
                                         .max_rows = m->max_tokens,
                                         .max_position = m->max_position,
                                         .scale = 1.0f / sqrtf((float)m->c->head_dim),
                                         .q = m->a.qkv,
                                         .out = m->a.attn,
                                         .q_rows = m->rows,
                                         .q_stride = m->qkv_width,
                                         .out_stride = m->q_width};
    m->kv = kv;
    TRY(attn_cuda_create(&m->attn, &cfg, why));
    return prepare(m, why);
}

static int set_policy(struct llama *base, const struct attn_policy *policy, struct err_msg *why)
{
    struct llama_cuda_state *m = llama_cuda_of(base);
    m->policy = *policy;
    return m->attn ? prepare(m, why) : 0;
}

static const float *logits(struct llama *base, int32_t i)
{
    struct llama_cuda_state *m = llama_cuda_of(base);
    const size_t vocab = (size_t)m->c->vocab_size;
    if (dev_download(m->dev, m->logits_host, m->a.logits + (size_t)m->output_row[i] * vocab,
                     vocab * sizeof(float)) < 0)
        memset(m->logits_host, 0, vocab * sizeof(float));
    return m->logits_host;
}

static int head_counts(struct llama *base, struct attn_counts *out, int64_t stride)
{
    struct llama_cuda_state *m = llama_cuda_of(base);
    const size_t n = (size_t)m->shard->n_heads, n_layers = (size_t)m->c->n_layers;
    if (!m->attn)
        return 0;
    struct attn_counts *all = mem_zalloc(n_layers * n, sizeof *all);
    int err = attn_cuda_head_counts(m->attn, all);
    for (size_t l = 0; err == 0 && l < n_layers; l++)
        memcpy(out + (int64_t)l * stride, all + l * n, n * sizeof *out);
    mem_free(all);
    return err;
}

const struct llama_ops llama_cuda = {
    .name = "cuda",
    .half = true,
    .stage = &weights_stage_cuda,
    .create = create,
    .destroy = destroy,
    .bind_cache = bind_cache,
    .set_policy = set_policy,
    .run = llama_cuda_run,
    .logits = logits,
    .head_counts = head_counts,
};
