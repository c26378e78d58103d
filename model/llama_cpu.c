/* The graph on the CPU: f32 activations, one pass after the other over the worker pool. */
#include "model/llama.h"

#include "core/clock.h"
#include "core/mem.h"
#include "core/pool.h"
#include "kvcache/kv_store.h"
#include "model/gemm.h"
#include "model/nn.h"
#include "model/rope.h"
#include "model/sampler.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { KV_SPAN = 64 /* tokens whose K and V one task writes */ };

/* Consecutive rows of one sequence. */
struct kv_span {
    int32_t row, pos, n;
    const int32_t *pages;
};

/* Activations, all f32; n is max_tokens, rounded up for the last GEMM tile. */
struct activations {
    float *residual; /* [n, hidden] */
    float *hidden;   /* [n, hidden] normed input of a block, then its output */
    float *qkv;      /* [n, qkv_width] */
    float *attn;     /* [n, n_heads * head_dim] */
    float *gate_up;  /* [n, 2 n_inter] */
    float *act;      /* [n, n_inter] */
    float *last;     /* [max_outputs, hidden] residuals of the output rows, then their norms */
    float *slice;    /* [max_outputs, vocab_width] this rank's logits */
    float *slices;   /* [n_ranks, outputs of the step, vocab_width]; NULL: one rank */
    float *logits;   /* [max_outputs, vocab] on rank 0; one rank's slice is that already */
};

/* What a narrow last layer attends to: the sequences of which llama_last_rows wants any row. */
struct last_layer {
    struct attn_rows *rows;     /* [max_outputs] of all sequences of the step */
    struct attn_seq *seqs;      /* [max_outputs] */
    int32_t *of;                /* [max_outputs] sequences of the step */
    struct attn_counts *counts; /* [max_outputs] */
    int32_t n;
    bool narrow;
};

/* Rows that a layer's products and norms work on: all of the step, or the output rows, packed. */
struct live_rows {
    int32_t n;
    float *residual;
    const float *attn;
};

struct llama_cpu_state {
    struct llama base;
    struct dev *dev;
    struct comm *comm;
    const struct llama_config *c;
    const struct llama_shard *shard;
    const struct llama_weights *w;
    struct gemm *gemm;
    struct gemm_plan qkv_plan, o_plan, gate_up_plan, down_plan, head_plan;
    int32_t max_tokens, max_outputs;
    int32_t q_width, kv_width, qkv_width; /* of this rank */
    struct activations a;
    void *memory; /* behind the activations */
    size_t memory_bytes;
    void *cos_sin; /* rope.h */
    size_t cos_sin_bytes;
    const struct kv_view *kv;
    void *workspace;
    size_t workspace_bytes;
    struct kv_span *spans; /* of the step */
    int32_t n_spans;
    struct last_layer last; /* of a step in which it is narrow */
    struct attn_policy policy;
    struct attn_counts *head_counts; /* [n_layers, n_heads] since creation */
    struct sampler *sampler;         /* rank 0 */
};

static int make_plans(struct llama_cpu_state *m, struct err_msg *why)
{
    const int32_t hidden = m->c->hidden_size, n_inter = m->shard->n_inter;
    TRY(gemm_open(&m->gemm, m->dev));
    TRY(gemm_plan(m->gemm, &m->qkv_plan, m->qkv_width, hidden, why));
    TRY(gemm_plan(m->gemm, &m->o_plan, hidden, m->q_width, why));
    TRY(gemm_plan(m->gemm, &m->gate_up_plan, 2 * n_inter, hidden, why));
    TRY(gemm_plan(m->gemm, &m->down_plan, hidden, n_inter, why));
    return gemm_plan(m->gemm, &m->head_plan, m->shard->vocab_width, hidden, why);
}

static int32_t padded_tokens(const struct llama_cpu_state *m)
{
    const struct gemm_plan *plans[] = {&m->qkv_plan, &m->o_plan, &m->gate_up_plan, &m->down_plan};
    int32_t most = 0;
    for (size_t i = 0; i < sizeof plans / sizeof *plans; i++) {
        int32_t rows = gemm_padded_rows(plans[i], m->max_tokens);
        most = rows > most ? rows : most;
    }
    return most;
}

/* Hands out [rows, width] from base, or only counts while base is NULL. */
static float *carve(float *base, size_t *used, int32_t rows, int32_t width)
{
    float *p = base ? base + *used : NULL;
    *used += ((size_t)rows * (size_t)width + 15) & ~(size_t)15;
    return p;
}

static void lay_out_logits(struct llama_cpu_state *m, float *base, size_t *used)
{
    struct activations *a = &m->a;
    const struct llama_shard *s = m->shard;
    const int32_t rows = gemm_padded_rows(&m->head_plan, m->max_outputs);

    a->last = carve(base, used, rows, m->c->hidden_size);
    a->slice = carve(base, used, rows, s->vocab_width);
    a->logits = a->slice;
    if (s->n_ranks == 1)
        return;
    a->slices = carve(base, used, m->max_outputs * s->n_ranks, s->vocab_width);
    a->logits = s->rank == 0 ? carve(base, used, m->max_outputs, m->c->vocab_size) : NULL;
}

static size_t lay_out(struct llama_cpu_state *m, float *base)
{
    struct activations *a = &m->a;
    const int32_t rows = padded_tokens(m), hidden = m->c->hidden_size;
    size_t used = 0;

    a->residual = carve(base, &used, rows, hidden);
    a->hidden = carve(base, &used, rows, hidden);
    a->qkv = carve(base, &used, rows, m->qkv_width);
    a->attn = carve(base, &used, rows, m->q_width);
    a->gate_up = carve(base, &used, rows, 2 * m->shard->n_inter);
    a->act = carve(base, &used, rows, m->shard->n_inter);
    lay_out_logits(m, base, &used);
    return used * sizeof(float);
}

/* dev_alloc whose error says what the memory was for. */
static int take(struct llama_cpu_state *m, void **out, size_t bytes, const char *what,
                struct err_msg *why)
{
    struct err_msg inner = {{0}};
    int err = dev_alloc(m->dev, out, bytes, &inner);
    return err < 0 ? err_set(why, err, "%s: %.300s", what, err_why(&inner, err)) : 0;
}

static int take_memory(struct llama_cpu_state *m, int64_t max_position, struct err_msg *why)
{
    char what[96];
    m->memory_bytes = lay_out(m, NULL);
    (void)snprintf(what, sizeof what, "activations of %d tokens, logits of %d sequences",
                   m->max_tokens, m->max_outputs);
    TRY(take(m, &m->memory, m->memory_bytes, what, why));
    (void)lay_out(m, m->memory);
    m->cos_sin_bytes = (size_t)max_position * (size_t)m->c->head_dim * sizeof(float);
    (void)snprintf(what, sizeof what, "rotary table of %lld positions", (long long)max_position);
    TRY(take(m, &m->cos_sin, m->cos_sin_bytes, what, why));
    rope_fill(m->cos_sin, &m->c->rope, m->c->head_dim, max_position);
    return 0;
}

static void destroy(struct llama *base)
{
    struct llama_cpu_state *m = (struct llama_cpu_state *)base;
    gemm_close(m->gemm);
    dev_release(m->dev, m->memory, m->memory_bytes);
    dev_release(m->dev, m->cos_sin, m->cos_sin_bytes);
    dev_release(m->dev, m->workspace, m->workspace_bytes);
    sampler_destroy(m->sampler);
    mem_free(m->head_counts);
    mem_free(m->spans);
    mem_free(m->last.rows);
    mem_free(m->last.seqs);
    mem_free(m->last.of);
    mem_free(m->last.counts);
    mem_free(m);
}

static int open_sampler(struct llama_cpu_state *m, struct err_msg *why)
{
    if (m->shard->rank != 0)
        return 0;
    int err = sampler_create(&m->sampler, m->c->vocab_size, pool_size(m->dev->pool), m->c->eos_ids,
                             m->c->n_eos);
    return err < 0 ? err_set(why, err, "no memory for sampling") : 0;
}

static void take_last_layer(struct last_layer *l, int32_t max_outputs)
{
    const size_t n = (size_t)max_outputs;
    l->rows = mem_zalloc(n, sizeof *l->rows);
    l->seqs = mem_zalloc(n, sizeof *l->seqs);
    l->of = mem_zalloc(n, sizeof *l->of);
    l->counts = mem_zalloc(n, sizeof *l->counts);
}

static int create(struct llama **out, const struct llama_setup *setup, struct err_msg *why)
{
    struct llama_cpu_state *m = mem_zalloc(1, sizeof *m);
    m->base.ops = &llama_cpu;
    m->dev = setup->dev;
    m->comm = setup->comm;
    m->c = setup->config;
    m->shard = setup->shard;
    m->w = setup->weights;
    m->max_tokens = setup->max_tokens;
    m->max_outputs = setup->max_outputs;
    m->q_width = m->shard->n_heads * m->c->head_dim;
    m->kv_width = m->shard->n_kv_heads * m->c->head_dim;
    m->qkv_width = m->q_width + 2 * m->kv_width;
    m->spans = mem_zalloc((size_t)m->max_tokens, sizeof *m->spans);
    m->head_counts =
        mem_zalloc((size_t)m->c->n_layers * (size_t)m->shard->n_heads, sizeof *m->head_counts);
    take_last_layer(&m->last, m->max_outputs);
    int err = make_plans(m, why);
    if (err == 0)
        err = take_memory(m, setup->max_position, why);
    if (err == 0)
        err = open_sampler(m, why);
    if (err < 0) {
        destroy(&m->base);
        return err;
    }
    *out = &m->base;
    return 0;
}

static int bind_cache(struct llama *base, const struct kv_view *kv, struct err_msg *why)
{
    struct llama_cpu_state *m = (struct llama_cpu_state *)base;
    const int32_t n_heads = m->shard->n_heads;
    if (attn_cpu.supports(n_heads, kv) < 0)
        return err_set(why, ERR_UNSUPPORTED, "attention: %d heads, %d KV heads, head_dim %d",
                       n_heads, kv->n_kv_heads, kv->head_dim);
    m->kv = kv;
    m->workspace_bytes = attn_cpu.workspace_bytes(n_heads, kv, m->dev);
    if (m->workspace_bytes == 0)
        return 0;
    return take(m, &m->workspace, m->workspace_bytes, "attention workspace", why);
}

static int set_policy(struct llama *base, const struct attn_policy *policy, struct err_msg *why)
{
    (void)why;
    ((struct llama_cpu_state *)base)->policy = *policy;
    return 0;
}

/* One matrix product, timed. */
static void product(const struct llama_cpu_state *m, const struct gemm_plan *plan, float *y,
                    const float *x, const float *w, int32_t rows, struct llama_times *times)
{
    int64_t start = clock_monotonic_us(NULL);
    gemm_run(m->gemm, plan, y, x, w, rows);
    times->gemm_us += clock_monotonic_us(NULL) - start;
}

/* Adds up the ranks' shares of a block's output. */
static int reduce(const struct llama_cpu_state *m, float *x, int32_t rows,
                  struct llama_times *times)
{
    if (m->shard->n_ranks == 1)
        return 0;
    int64_t start = clock_monotonic_us(NULL);
    TRY(comm_all_reduce(m->comm, x, (size_t)rows * (size_t)m->c->hidden_size));
    times->comm_us += clock_monotonic_us(NULL) - start;
    return 0;
}

static void plan_spans(struct llama_cpu_state *m, const struct llama_input *in)
{
    m->n_spans = 0;
    for (int32_t i = 0; i < in->n_seqs; i++) {
        const struct attn_seq *s = &in->seqs[i];
        for (int32_t at = 0; at < s->n_rows; at += KV_SPAN) {
            int32_t n = s->n_rows - at < KV_SPAN ? s->n_rows - at : KV_SPAN;
            m->spans[m->n_spans++] = (struct kv_span){s->row + at, s->pos + at, n, s->pages};
        }
    }
}

static void plan_last_layer(struct llama_cpu_state *m, const struct llama_input *in)
{
    struct last_layer *l = &m->last;
    l->n = 0;
    l->narrow = llama_is_narrow(in);
    ASSERT(in->n_seqs <= m->max_outputs);
    (void)llama_last_rows(in, l->rows);
    for (int32_t i = 0; i < in->n_seqs; i++) {
        struct attn_seq s = in->seqs[i];
        if (l->rows[i].n_rows == 0)
            continue;
        s.pos += l->rows[i].row - s.row;
        s.row = l->rows[i].row;
        s.n_rows = l->rows[i].n_rows;
        l->seqs[l->n] = s;
        l->of[l->n++] = i;
    }
    memset(l->counts, 0, (size_t)l->n * sizeof *l->counts);
}

struct kv_job {
    const struct llama_cpu_state *m;
    int layer;
};

static void write_span(void *arg, int task, int worker)
{
    const struct kv_job *j = arg;
    const struct llama_cpu_state *m = j->m;
    const struct kv_span *s = &m->spans[task];
    const float *k = m->a.qkv + (size_t)s->row * (size_t)m->qkv_width + m->q_width;
    (void)worker;
    kv_store_write_cpu(m->kv, j->layer, s->pages, s->pos, s->n, k, k + m->kv_width,
                       (size_t)m->qkv_width);
}

/* The layer's part of what the step counts. */
static struct attn_rel_counts rel_counts_of(const struct llama_cpu_state *m,
                                            const struct llama_input *in, int layer)
{
    struct attn_rel_counts c = in->rel_counts ? *in->rel_counts : (struct attn_rel_counts){0};
    if (in->rel_counts)
        c.bins += (ptrdiff_t)layer * 2 * m->shard->n_heads * (c.n_edges + 1);
    return c;
}

static bool is_narrow(const struct llama_cpu_state *m, int layer)
{
    return layer == m->c->n_layers - 1 && m->last.narrow;
}

static int attend(struct llama_cpu_state *m, const struct llama_input *in, int layer,
                  struct llama_times *times)
{
    const bool last = is_narrow(m, layer);
    const struct attn_rel_counts rel = rel_counts_of(m, in, layer);
    const struct attn_problem p = {
        .layer = layer,
        .n_heads = m->shard->n_heads,
        .scale = 1.0f / sqrtf((float)m->c->head_dim),
        .q = m->a.qkv,
        .out = m->a.attn,
        .q_stride = m->qkv_width,
        .out_stride = m->q_width,
        .seqs = last ? m->last.seqs : in->seqs,
        .n_seqs = last ? m->last.n : in->n_seqs,
        .seq_counts = last ? m->last.counts : in->seq_counts,
        .head_counts = m->head_counts + (ptrdiff_t)layer * m->shard->n_heads,
        .tile_max = in->tile_max,
        .rel_counts = in->rel_counts ? &rel : NULL,
        .workspace = m->workspace,
    };
    int64_t start = clock_monotonic_us(NULL);
    TRY(attn_cpu.run(&p, m->kv, &m->policy, m->dev));
    times->attention_us += clock_monotonic_us(NULL) - start;
    return in->tile_max ? in->on_tiles(in->on_tiles_arg, layer) : 0;
}

static void add_counts(struct attn_counts *to, const struct attn_counts *from)
{
    to->reachable += from->reachable;
    to->visited += from->visited;
    to->kept += from->kept;
    to->sampled += from->sampled;
    to->lost += from->lost;
}

/* What follows is of the output rows alone: packs their residuals, and what attention left of them
 * where q was. */
static void narrow(struct llama_cpu_state *m, const struct llama_input *in, struct live_rows *rows)
{
    const struct activations *a = &m->a;
    const int32_t n = in->n_outputs;
    for (int32_t i = 0; i < m->last.n; i++)
        add_counts(&in->seq_counts[m->last.of[i]], &m->last.counts[i]);
    nn_gather(m->dev, a->last, a->residual, in->outputs, n, m->c->hidden_size);
    nn_gather(m->dev, a->qkv, a->attn, in->outputs, n, m->q_width);
    *rows = (struct live_rows){n, a->last, a->qkv};
}

/* residual += o(attention(norm(residual))) */
static int attention_block(struct llama_cpu_state *m, const struct llama_input *in, int layer,
                           struct live_rows *rows, struct llama_times *times)
{
    const struct llama_layer *w = &m->w->layers[layer];
    const struct activations *a = &m->a;
    const int32_t n = in->n_rows, hidden = m->c->hidden_size;
    const struct nn_rope rope = {.cos_sin = m->cos_sin,
                                 .n_heads = m->shard->n_heads + m->shard->n_kv_heads,
                                 .head_dim = m->c->head_dim,
                                 .stride = m->qkv_width};
    struct kv_job job = {m, layer};

    nn_rms_norm(m->dev, a->hidden, a->residual, w->attn_norm, n, hidden, (float)m->c->rms_eps);
    product(m, &m->qkv_plan, a->qkv, a->hidden, w->qkv, n, times);
    if (w->qkv_bias)
        nn_add_bias(m->dev, a->qkv, w->qkv_bias, n, m->qkv_width);
    nn_rope(m->dev, a->qkv, &rope, in->positions, n);
    pool_run(m->dev->pool, write_span, &job, m->n_spans);
    if (!is_narrow(m, layer) || m->last.n > 0)
        TRY(attend(m, in, layer, times));
    if (is_narrow(m, layer))
        narrow(m, in, rows);
    if (rows->n == 0)
        return 0;
    product(m, &m->o_plan, a->hidden, rows->attn, w->o, rows->n, times);
    TRY(reduce(m, a->hidden, rows->n, times));
    nn_residual(m->dev, rows->residual, a->hidden, w->o_bias, rows->n, hidden);
    return 0;
}

/* residual += down(silu(gate(x)) * up(x)) with x = norm(residual) */
static int mlp_block(struct llama_cpu_state *m, int layer, const struct live_rows *rows,
                     struct llama_times *times)
{
    const struct llama_layer *w = &m->w->layers[layer];
    const struct activations *a = &m->a;
    const int32_t n = rows->n, hidden = m->c->hidden_size, n_inter = m->shard->n_inter;

    if (n == 0)
        return 0;
    nn_rms_norm(m->dev, a->hidden, rows->residual, w->mlp_norm, n, hidden, (float)m->c->rms_eps);
    product(m, &m->gate_up_plan, a->gate_up, a->hidden, w->gate_up, n, times);
    if (w->gate_up_bias)
        nn_add_bias(m->dev, a->gate_up, w->gate_up_bias, n, 2 * n_inter);
    nn_swiglu(m->dev, a->act, a->gate_up, n, n_inter);
    product(m, &m->down_plan, a->hidden, a->act, w->down, n, times);
    TRY(reduce(m, a->hidden, n, times));
    nn_residual(m->dev, rows->residual, a->hidden, w->down_bias, n, hidden);
    return 0;
}

/* The ranks' slices of the logits, put together on rank 0, which samples. */
static int gather(const struct llama_cpu_state *m, int32_t rows, struct llama_times *times)
{
    const struct activations *a = &m->a;
    const struct llama_shard *s = m->shard;
    const size_t width = (size_t)s->vocab_width, vocab = (size_t)m->c->vocab_size;

    if (s->n_ranks == 1)
        return 0;
    const int64_t start = clock_monotonic_us(NULL);
    TRY(comm_all_gather(m->comm, a->slices, a->slice, (size_t)rows * width));
    times->comm_us += clock_monotonic_us(NULL) - start;
    const float *from = a->slices;
    for (int r = 0; r < s->n_ranks && s->rank == 0; r++) {
        const size_t n = (size_t)llama_shard_vocab_rows(s, m->c, r);
        float *to = a->logits + (size_t)r * width;
        for (int32_t i = 0; i < rows && n > 0; i++)
            memcpy(to + (size_t)i * vocab, from + (size_t)i * width, n * sizeof *to);
        from += (size_t)rows * width;
    }
    return 0;
}

static int forward(struct llama_cpu_state *m, const struct llama_input *in,
                   struct llama_times *times)
{
    const struct activations *a = &m->a;
    const int32_t hidden = m->c->hidden_size;
    struct live_rows rows = {in->n_rows, a->residual, a->attn};

    ASSERT(m->kv && in->n_rows <= m->max_tokens && in->n_outputs <= m->max_outputs);
    plan_spans(m, in);
    plan_last_layer(m, in);
    nn_gather(m->dev, a->residual, m->w->embed, in->ids, in->n_rows, hidden);
    for (int layer = 0; layer < m->c->n_layers; layer++) {
        TRY(attention_block(m, in, layer, &rows, times));
        TRY(mlp_block(m, layer, &rows, times));
    }
    if (in->n_outputs == 0)
        return 0;
    if (rows.residual != a->last)
        nn_gather(m->dev, a->last, a->residual, in->outputs, in->n_outputs, hidden);
    nn_rms_norm(m->dev, a->last, a->last, m->w->norm, in->n_outputs, hidden, (float)m->c->rms_eps);
    product(m, &m->head_plan, a->slice, a->last, m->w->lm_head, in->n_outputs, times);
    return gather(m, in->n_outputs, times);
}

struct draw_job {
    struct llama_cpu_state *m;
    const struct llama_input *in;
};

static void draw_one(void *arg, int task, int worker)
{
    const struct draw_job *j = arg;
    const int32_t output = j->in->output_of[task];
    struct batch_token *out = &j->in->tokens[task];
    if (output < 0)
        *out = (struct batch_token){.token = -1};
    else
        sampler_draw(j->m->sampler, worker, out,
                     j->m->a.logits + (size_t)output * (size_t)j->m->c->vocab_size,
                     &j->in->draws[task]);
}

static int run(struct llama *base, const struct llama_input *in, struct llama_times *times)
{
    struct llama_cpu_state *m = (struct llama_cpu_state *)base;
    struct draw_job job = {m, in};
    const int64_t start = clock_monotonic_us(NULL);

    memset(in->seq_counts, 0, (size_t)in->n_seqs * sizeof *in->seq_counts);
    TRY(forward(m, in, times));
    if (in->draws)
        pool_run(m->dev->pool, draw_one, &job, in->n_seqs);
    times->wait_us = clock_monotonic_us(NULL) - start;
    return 0;
}

static const float *logits(struct llama *base, int32_t i)
{
    const struct llama_cpu_state *m = (struct llama_cpu_state *)base;
    return m->a.logits + (size_t)i * (size_t)m->c->vocab_size;
}

static int head_counts(struct llama *base, struct attn_counts *out, int64_t stride)
{
    const struct llama_cpu_state *m = (struct llama_cpu_state *)base;
    const size_t n = (size_t)m->shard->n_heads;
    for (int32_t l = 0; l < m->c->n_layers; l++)
        memcpy(out + l * stride, m->head_counts + (size_t)l * n, n * sizeof *out);
    return 0;
}

const struct llama_ops llama_cpu = {
    .name = "cpu",
    .create = create,
    .destroy = destroy,
    .bind_cache = bind_cache,
    .set_policy = set_policy,
    .run = run,
    .logits = logits,
    .head_counts = head_counts,
};
