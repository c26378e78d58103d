/* One step on the device: pack what it needs, one copy there, the kernels, one copy back, one wait.
 */
#define LOG_MODULE "model"
#include "core/clock.h"
#include "kvcache/kv_store_cuda.h"
#include "model/llama_cuda_internal.h"
#include "model/nn_cuda.h"

#include <string.h>

/* ---- packing ---- */

static struct upload_piece take_rows(struct llama_cuda_state *m, int32_t n)
{
    return upload_take(&m->up, (size_t)n * sizeof(int32_t));
}

/* Slots and tails of all rows; padding is written nowhere. */
static void pack_slots(const struct llama_input *in, int32_t rows, int32_t *slots, int32_t *tails)
{
    int32_t used = 0;
    for (int32_t i = 0; in && i < in->n_seqs; i++) {
        const struct attn_seq *s = &in->seqs[i];
        kv_append_rows(slots + s->row, tails + s->row, s->pages, s->pos, s->n_rows);
        used += s->n_rows;
    }
    for (int32_t i = used; i < rows; i++) {
        slots[i] = -1;
        tails[i] = 0;
    }
}

/* Which rows' logits are computed, and where those of an output are then found. */
static void pack_outputs(struct llama_cuda_state *m, const struct llama_input *in, int32_t rows,
                         bool all_outputs)
{
    struct cuda_rows *s = &m->step;
    const int32_t wanted = in ? in->n_outputs : 0;
    s->n_outputs = all_outputs ? rows : wanted;
    const struct upload_piece p = take_rows(m, s->n_outputs), q = take_rows(m, s->n_outputs);
    int32_t *rows_of = p.host, *owned = q.host;
    s->outputs = p.dev;
    s->owned = q.dev;
    for (int32_t i = 0; i < s->n_outputs; i++) {
        rows_of[i] = all_outputs ? i : in->outputs[i];
        owned[i] = s->half == 0 || llama_cuda_owns_row(m, rows_of[i]) ? rows_of[i] : -1;
    }
    for (int32_t i = 0; i < wanted; i++)
        m->output_row[i] = all_outputs ? in->outputs[i] : i;
}

static void pack_rows(struct llama_cuda_state *m, const struct llama_input *in, int32_t rows)
{
    struct cuda_rows *s = &m->step;
    const struct upload_piece ids = take_rows(m, rows), positions = take_rows(m, rows),
                              slots = take_rows(m, rows), tails = take_rows(m, rows);
    const size_t n = in ? (size_t)in->n_rows : 0, pad = (size_t)rows - n;
    s->n = rows;
    s->ids = ids.dev;
    s->positions = positions.dev;
    s->slots = slots.dev;
    s->tails = tails.dev;
    if (n > 0) {
        memcpy(ids.host, in->ids, n * sizeof(int32_t));
        memcpy(positions.host, in->positions, n * sizeof(int32_t));
    }
    memset((int32_t *)ids.host + n, 0, pad * sizeof(int32_t));
    memset((int32_t *)positions.host + n, 0, pad * sizeof(int32_t));
    pack_slots(in, rows, slots.host, tails.host);
}

/* The order is fixed: a captured step finds everything where it was. */
void llama_cuda_pack(struct llama_cuda_state *m, const struct llama_input *in, int32_t rows,
                     bool all_outputs)
{
    struct attn_cuda_step attn = {0};
    if (in)
        attn = (struct attn_cuda_step){in->seqs, in->n_seqs, 0, NULL};
    m->step.narrow = in && !all_outputs && llama_is_narrow(in);
    attn.cut = llama_cuda_split_step(m, in);
    if (m->step.narrow) {
        m->step.attends_last = llama_last_rows(in, m->last_rows);
        attn.last = m->last_rows;
    }
    m->up.used = 0;
    struct upload_piece results = upload_take(&m->up, m->results_bytes);
    struct upload_piece draws =
        upload_take(&m->up, (size_t)m->max_outputs * sizeof(struct sampler_cuda_seq));
    memset(results.host, 0, m->counts_bytes);
    m->step.draws = draws.dev;
    pack_rows(m, in, rows);
    pack_outputs(m, in, rows, all_outputs);
    if (in && in->draws)
        llama_cuda_pack_draws(m, in, draws.host);
    attn_cuda_plan(m->attn, &attn, &m->up, results.dev);
}

int llama_cuda_send(struct llama_cuda_state *m)
{
    return dev_cuda_upload_async(m->dev, m->up.dev, m->up.host, m->up.used);
}

/* ---- kernels ---- */

int llama_cuda_product(struct llama_cuda_state *m, const struct gemm_cublas_plan *plan, void *y,
                       const void *x, const void *w, int32_t rows)
{
    TRY(llama_cuda_mark(m, PART_GEMM));
    TRY(gemm_cublas_run(m->gemm, plan, y, x, w, rows));
    return llama_cuda_mark(m, PART_OTHER);
}

/* Adds up the ranks' shares of so many rows. */
static int reduce(struct llama_cuda_state *m, void *rows, int32_t n_rows)
{
    const size_t n = (size_t)n_rows * (size_t)m->c->hidden_size;
    if (m->shard->n_ranks == 1)
        return 0;
    TRY(llama_cuda_mark(m, PART_COMM));
    TRY(comm_all_reduce_dev(m->comm, rows, n, m->dtype, m->stream));
    return llama_cuda_mark(m, PART_OTHER);
}

/* A block's output, y = x w^T. Of many rows on one rank the product adds it to the residual itself,
 * which is a pass over memory less; otherwise it is left for the next norm. */
static int block_product(struct llama_cuda_state *m, const struct gemm_cublas_plan *plan,
                         const void *x, const void *w, const void *bias)
{
    const int32_t n = m->live.n;
    if (n > GRAPH_MAX_ROWS && m->shard->n_ranks == 1 && !bias && !gemm_cublas_is_ours(plan, n)) {
        m->live.delta = NULL;
        TRY(llama_cuda_mark(m, PART_GEMM));
        TRY(gemm_cublas_add(m->gemm, plan, m->live.residual, x, w, n));
        return llama_cuda_mark(m, PART_OTHER);
    }
    m->live.delta = m->a.delta;
    TRY(llama_cuda_product(m, plan, m->a.delta, x, w, n));
    return reduce(m, m->a.delta, n);
}

/* residual += delta + bias, where there is one; hidden = norm(residual). */
static int add_norm(struct llama_cuda_state *m, const void *bias, const void *weight)
{
    const struct nn_cuda_norm norm = {.out = m->a.hidden,
                                      .residual = m->live.residual,
                                      .x = m->live.delta,
                                      .bias = bias,
                                      .weight = weight,
                                      .n = m->live.n,
                                      .width = m->c->hidden_size,
                                      .eps = (float)m->c->rms_eps,
                                      .early = m->shard->n_ranks == 1};
    CUDA_TRY(nn_cuda_residual_norm(&norm, dev_cuda_dtype(m->dtype), m->stream));
    return 0;
}

/* Where a layer's q, k and v go. */
static struct kv_append append_of(const struct llama_cuda_state *m, int layer)
{
    return (struct kv_append){.qkv = m->a.qkv,
                              .bias = m->w->layers[layer].qkv_bias,
                              .cos_sin = m->cos_sin,
                              .positions = m->step.positions,
                              .slots = m->step.slots,
                              .tails = m->step.tails,
                              .k = m->kv->k[layer],
                              .v = m->kv->v[layer],
                              .stride = m->qkv_width,
                              .n_rows = m->step.n,
                              .n_heads = m->shard->n_heads,
                              .n_kv_heads = m->shard->n_kv_heads,
                              .head_dim = m->c->head_dim};
}

/* Of rows [first, first + n). */
static int append(struct llama_cuda_state *m, int layer, int32_t first, int32_t n)
{
    struct kv_append p = append_of(m, layer);
    p.qkv = (char *)p.qkv + (size_t)first * (size_t)m->qkv_width * dtype_bytes(m->dtype);
    p.positions += first;
    p.slots += first;
    p.tails += first;
    p.n_rows = n;
    CUDA_TRY(kv_append_cuda(&p, dev_cuda_dtype(m->dtype), m->stream));
    return 0;
}

/* q of all rows into qkv, k and v into their pages. */
static int project(struct llama_cuda_state *m, int layer)
{
    const struct llama_layer *w = &m->w->layers[layer];
    if (gemm_cublas_is_ours(m->qkv_plan, m->step.n)) {
        const struct kv_append p = append_of(m, layer);
        TRY(llama_cuda_mark(m, PART_GEMM));
        TRY(gemm_cublas_append(m->gemm, m->qkv_plan, m->a.hidden, w->qkv, &p));
        return llama_cuda_mark(m, PART_OTHER);
    }
    TRY(llama_cuda_product(m, m->qkv_plan, m->a.qkv, m->a.hidden, w->qkv, m->step.n));
    return append(m, layer, 0, m->step.n);
}

int llama_cuda_activate(struct llama_cuda_state *m, const struct llama_layer *w, void *act,
                        void *gate_up, const void *hidden, int32_t n)
{
    if (gemm_cublas_has_swiglu(m->gate_up_plan, n, w->gate_up_bias != NULL)) {
        TRY(llama_cuda_mark(m, PART_GEMM));
        TRY(gemm_cublas_swiglu(m->gemm, m->gate_up_plan, act, hidden, w->gate_up, w->gate_up_bias,
                               n));
        return llama_cuda_mark(m, PART_OTHER);
    }
    TRY(llama_cuda_product(m, m->gate_up_plan, gate_up, hidden, w->gate_up, n));
    CUDA_TRY(nn_cuda_swiglu(act, gate_up, w->gate_up_bias, n, m->shard->n_inter,
                            dev_cuda_dtype(m->dtype), m->stream));
    return 0;
}

static bool is_narrow(const struct llama_cuda_state *m, int layer)
{
    return m->step.narrow && layer == m->c->n_layers - 1;
}

static int attention(struct llama_cuda_state *m, int layer, int half)
{
    if (is_narrow(m, layer) && !m->step.attends_last)
        return 0;
    TRY(llama_cuda_mark(m, PART_ATTENTION));
    TRY(half == ATTEND_ALL ? attn_cuda_run(m->attn, layer)
                           : attn_cuda_run_half(m->attn, layer, half));
    TRY(llama_cuda_mark(m, PART_OTHER));
    return m->probed ? m->probed->on_tiles(m->probed->on_tiles_arg, layer) : 0;
}

static int attend(struct llama_cuda_state *m, int layer, int half)
{
    const int32_t first = half == 1 ? m->step.half : 0;
    const int32_t end = half == 0 ? m->step.half : m->step.n;
    TRY(append(m, layer, first, end - first));
    return attention(m, layer, half);
}

/* What follows is of the output rows alone: packs their residuals, and what attention left of them
 * where q was. Of a step whose rows are split over the ranks, each has its part of the residuals.
 */
static int narrow(struct llama_cuda_state *m)
{
    const struct cuda_activations *a = &m->a;
    const int32_t n = m->step.n_outputs, dtype = dev_cuda_dtype(m->dtype);
    m->live = (struct cuda_live){.n = n, .residual = a->last, .attn = a->qkv};
    if (n == 0)
        return 0;
    CUDA_TRY(nn_cuda_gather(a->qkv, a->attn, m->step.outputs, n, m->q_width, m->step.n, dtype,
                            m->stream));
    CUDA_TRY(nn_cuda_gather(a->last, a->residual, m->step.owned, n, m->c->hidden_size, m->step.n,
                            dtype, m->stream));
    return m->step.half > 0 ? reduce(m, a->last, n) : 0;
}

/* o(attention), of all rows or in a narrow last layer of those that are left. */
static int close_attention(struct llama_cuda_state *m, int layer)
{
    const struct llama_layer *w = &m->w->layers[layer];
    if (is_narrow(m, layer))
        TRY(narrow(m));
    return m->live.n > 0 ? block_product(m, m->o_plan, m->live.attn, w->o, w->o_bias) : 0;
}

/* residual and delta of o(attention(norm(residual + delta))) */
static int attention_block(struct llama_cuda_state *m, int layer)
{
    const struct llama_layer *w = &m->w->layers[layer];

    TRY(add_norm(m, layer > 0 ? w[-1].down_bias : NULL, w->attn_norm));
    TRY(project(m, layer));
    TRY(attention(m, layer, ATTEND_ALL));
    return close_attention(m, layer);
}

/* The same of down(silu(gate(x)) * up(x)) with x = norm(residual + delta). */
static int mlp_block(struct llama_cuda_state *m, int layer)
{
    const struct llama_layer *w = &m->w->layers[layer];
    const struct cuda_activations *a = &m->a;

    if (m->live.n == 0)
        return 0;
    TRY(add_norm(m, w->o_bias, w->mlp_norm));
    TRY(llama_cuda_activate(m, w, a->act, a->gate_up, a->hidden, m->live.n));
    return block_product(m, m->down_plan, a->act, w->down, w->down_bias);
}

/* The ranks' slices of the logits, put together on rank 0, which samples. */
static int gather(struct llama_cuda_state *m)
{
    const struct llama_shard *s = m->shard;
    const size_t rows = (size_t)m->step.n_outputs, width = (size_t)s->vocab_width;
    const size_t pitch = (size_t)m->c->vocab_size * sizeof(float);

    if (s->n_ranks == 1)
        return 0;
    TRY(llama_cuda_mark(m, PART_COMM));
    TRY(comm_all_gather_dev(m->comm, m->a.slices, m->a.slice, rows * width, DTYPE_F32, m->stream));
    TRY(llama_cuda_mark(m, PART_OTHER));
    for (int r = 0; r < s->n_ranks && s->rank == 0; r++) {
        const size_t n = (size_t)llama_shard_vocab_rows(s, m->c, r) * sizeof(float);
        if (n > 0)
            CUDA_TRY(cudaMemcpy2DAsync(
                m->a.logits + (size_t)r * width, pitch, m->a.slices + (size_t)r * rows * width,
                width * sizeof(float), n, rows, cudaMemcpyDeviceToDevice, m->stream));
    }
    return 0;
}

/* The last norm of the output rows; out: where it is. */
static int last_norm(struct llama_cuda_state *m, void **out)
{
    const struct cuda_activations *a = &m->a;
    const int32_t width = m->c->hidden_size, dtype = dev_cuda_dtype(m->dtype);
    const bool packed = m->step.narrow;
    const struct nn_cuda_norm norm = {.out = packed ? a->hidden : a->last,
                                      .residual = m->live.residual,
                                      .x = m->live.delta,
                                      .bias = m->w->layers[m->c->n_layers - 1].down_bias,
                                      .weight = m->w->norm,
                                      .rows = packed ? NULL : m->step.outputs,
                                      .n = m->step.n_outputs,
                                      .width = width,
                                      .eps = (float)m->c->rms_eps,
                                      .early = m->shard->n_ranks == 1};
    *out = norm.out;
    CUDA_TRY(m->step.half > 0 && !packed
                 ? nn_cuda_gather(a->last, a->hidden, m->step.outputs, norm.n, width, m->step.n,
                                  dtype, m->stream)
                 : nn_cuda_residual_norm(&norm, dtype, m->stream));
    return 0;
}

static int output_block(struct llama_cuda_state *m)
{
    const int32_t n = m->step.n_outputs;
    void *last = NULL;
    if (n == 0)
        return 0;
    TRY(last_norm(m, &last));
    TRY(llama_cuda_product(m, m->head_plan, m->a.slice, last, m->w->lm_head, n));
    return gather(m);
}

static int layers(struct llama_cuda_state *m)
{
    const int last = m->c->n_layers - 1;
    m->live = (struct cuda_live){.n = m->step.n, .residual = m->a.residual, .attn = m->a.attn};
    if (m->step.half > 0) {
        TRY(llama_cuda_split_layers(m, attend));
        if (!m->step.narrow)
            return 0;
        TRY(close_attention(m, last));
        return mlp_block(m, last);
    }
    for (int layer = 0; layer <= last; layer++) {
        TRY(llama_cuda_mark_layer(m, layer));
        TRY(attention_block(m, layer));
        TRY(mlp_block(m, layer));
    }
    return llama_cuda_mark_layer(m, last + 1);
}

int llama_cuda_layers(struct llama_cuda_state *m)
{
    m->marks.n = 0;
    m->marks.paused = false;
    TRY(llama_cuda_mark(m, PART_OTHER));
    CUDA_TRY(nn_cuda_gather(m->a.residual, m->w->embed, m->step.ids, m->step.n, m->c->hidden_size,
                            m->c->vocab_size, dev_cuda_dtype(m->dtype), m->stream));
    TRY(layers(m));
    TRY(output_block(m));
    return llama_cuda_mark(m, PART_OTHER);
}

/* ---- the step ---- */

/* The graph that this step fits, or NULL. */
static const struct cuda_graph *graph_of(const struct llama_cuda_state *m,
                                         const struct llama_input *in)
{
    bool gated = false;
    for (int32_t i = 0; i < in->n_seqs; i++) {
        if (in->seqs[i].pos < in->seqs[i].prompt_end)
            return NULL;
        if (in->seqs[i].n_rows != 1)
            return NULL;
        gated |= in->seqs[i].choice.decode_gate != ATTN_GATE_NONE;
    }
    return llama_cuda_find_graph(m, in->n_rows, gated);
}

static int enqueue(struct llama_cuda_state *m, const struct llama_input *in)
{
    const struct cuda_graph *graph = graph_of(m, in);
    m->captured = graph != NULL;
    m->marks.on = in->n_rows >= TIMED_ROWS;
    llama_cuda_pack(m, in, graph ? graph->rows : in->n_rows, m->captured);
    TRY(llama_cuda_send(m));
    if (graph)
        CUDA_TRY(cudaGraphLaunch(graph->exec, m->stream));
    else
        TRY(llama_cuda_layers(m));
    if (in->draws)
        TRY(llama_cuda_draw(m, in, (struct batch_token *)(void *)(m->up.dev + m->counts_bytes)));
    return dev_cuda_download_async(m->dev, m->up.host, m->up.dev, m->results_bytes);
}

int llama_cuda_wait(struct llama_cuda_state *m)
{
    if (m->shard->n_ranks > 1)
        return comm_wait_stream(m->comm, m->stream, 0);
    return dev_sync(m->dev);
}

int llama_cuda_run(struct llama *base, const struct llama_input *in, struct llama_times *times)
{
    struct llama_cuda_state *m = llama_cuda_of(base);
    const struct attn_cuda_probe none = {0};
    ASSERT(m->attn && in->n_rows <= m->max_tokens && in->n_outputs <= m->max_outputs);
    ASSERT(in->n_seqs <= m->max_outputs);
    if (in->tile_max)
        return ERR_UNSUPPORTED; /* page maxima stay on the device: dev_max */
    TRY(dev_cuda_bind(m->dev));
    m->probed = in->dev_max ? in : NULL;
    attn_cuda_set_probe(m->attn, in->dev_max ? in->dev_max : &none);
    attn_cuda_set_rel_counts(m->attn, in->rel_counts);
    int err = enqueue(m, in);
    m->probed = NULL;
    TRY(err);
    const int64_t start = clock_monotonic_us(NULL);
    TRY(llama_cuda_wait(m));
    times->wait_us = clock_monotonic_us(NULL) - start;
    attn_cuda_counts(m->attn, m->up.host, in->seq_counts, in->n_seqs);
    if (in->draws)
        memcpy(in->tokens, m->up.host + m->counts_bytes, (size_t)in->n_seqs * sizeof *in->tokens);
    return llama_cuda_add_times(m, times);
}
