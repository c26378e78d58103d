/* Layers of a long step over ranks, in two halves of its rows, so that one half's sum over the
 * ranks runs under the other half's products:
 *
 *   o of half 1 | o of half 2 | MLP of half 1 | MLP of half 2 | qkv of half 1, of half 2 |
 * attention [   sum o 1   ][    sum o 2   ][  sum down 1 ][   sum down 2  ]
 *
 * Attention runs once for all rows: by then K and V of both halves are there. Everything but a
 * product's choice of algorithm is by row, so the rows have the bits of an unsplit step unless the
 * library's algorithms for half as many rows round otherwise (gemm_cublas.h). */
#define LOG_MODULE "model"
#include "model/llama_cuda_internal.h"
#include "model/nn_cuda.h"

enum { SPLIT_ROWS = 1024 /* below, half a product costs as much as a whole one */ };

struct half {
    int32_t first, n;
};

/* The first half is the longer one, and fills its bucket of products. */
static int32_t first_half(int32_t rows)
{
    return gemm_cublas_bucket((rows + 1) / 2);
}

int llama_cuda_reserve_sums(struct llama_cuda_state *m, struct err_msg *why)
{
    const size_t row = (size_t)m->c->hidden_size * dtype_bytes(m->dtype);
    if (m->shard->n_ranks == 1 || m->max_tokens < SPLIT_ROWS)
        return 0;
    return comm_reserve_sums(m->comm, (size_t)first_half(m->max_tokens) * row, why);
}

int32_t llama_cuda_split_rows(const struct llama_cuda_state *m, int32_t rows)
{
    const bool split = m->shard->n_ranks > 1 && rows >= SPLIT_ROWS && comm_overlaps(m->comm);
    return split ? first_half(rows) : 0;
}

static void *at(const struct llama_cuda_state *m, void *rows, int32_t row, int32_t width)
{
    return (char *)rows + (size_t)row * (size_t)width * dtype_bytes(m->dtype);
}

static int product(struct llama_cuda_state *m, const struct gemm_cublas_plan *plan, void *y,
                   const void *x, const void *w, int32_t rows)
{
    TRY(llama_cuda_mark(m, PART_GEMM));
    TRY(gemm_cublas_run(m->gemm, plan, y, x, w, rows));
    return llama_cuda_mark(m, PART_OTHER);
}

static int begin_sum(struct llama_cuda_state *m, const struct half *h)
{
    const int32_t hidden = m->c->hidden_size;
    return comm_sum_begin(m->comm, at(m, m->a.delta, h->first, hidden),
                          (size_t)h->n * (size_t)hidden, m->dtype, m->stream);
}

static int end_sum(struct llama_cuda_state *m, const void **more)
{
    TRY(llama_cuda_mark(m, PART_COMM));
    TRY(comm_sum_end(m->comm, m->stream, more));
    return llama_cuda_mark(m, PART_OTHER);
}

/* residual += delta + bias, with the sum over the ranks; hidden = norm(residual). */
static int add_norm(struct llama_cuda_state *m, const struct half *h, bool delta, const void *bias,
                    const void *weight)
{
    const int32_t hidden = m->c->hidden_size;
    struct nn_cuda_norm norm = {.out = at(m, m->a.hidden, h->first, hidden),
                                .residual = at(m, m->a.residual, h->first, hidden),
                                .x = delta ? at(m, m->a.delta, h->first, hidden) : NULL,
                                .bias = bias,
                                .weight = weight,
                                .n = h->n,
                                .width = hidden,
                                .eps = (float)m->c->rms_eps};
    if (delta)
        TRY(end_sum(m, &norm.more));
    CUDA_TRY(nn_cuda_residual_norm(&norm, dev_cuda_dtype(m->dtype), m->stream));
    return 0;
}

static int qkv(struct llama_cuda_state *m, int layer, const struct half *h)
{
    const struct llama_layer *w = &m->w->layers[layer];
    const int32_t hidden = m->c->hidden_size;
    TRY(add_norm(m, h, layer > 0, layer > 0 ? w[-1].down_bias : NULL, w->attn_norm));
    return product(m, m->qkv_plan, at(m, m->a.qkv, h->first, m->qkv_width),
                   at(m, m->a.hidden, h->first, hidden), w->qkv, h->n);
}

static int o(struct llama_cuda_state *m, int layer, const struct half *h)
{
    TRY(product(m, m->o_plan, at(m, m->a.delta, h->first, m->c->hidden_size),
                at(m, m->a.attn, h->first, m->q_width), m->w->layers[layer].o, h->n));
    return begin_sum(m, h);
}

static int mlp(struct llama_cuda_state *m, int layer, const struct half *h)
{
    const struct llama_layer *w = &m->w->layers[layer];
    const int32_t hidden = m->c->hidden_size, n_inter = m->shard->n_inter;
    void *gate_up = at(m, m->a.gate_up, h->first, 2 * n_inter);
    void *act = at(m, m->a.act, h->first, n_inter);

    TRY(add_norm(m, h, true, w->o_bias, w->mlp_norm));
    TRY(product(m, m->gate_up_plan, gate_up, at(m, m->a.hidden, h->first, hidden), w->gate_up,
                h->n));
    CUDA_TRY(nn_cuda_swiglu(act, gate_up, w->gate_up_bias, h->n, n_inter, dev_cuda_dtype(m->dtype),
                            m->stream));
    TRY(product(m, m->down_plan, at(m, m->a.delta, h->first, hidden), act, w->down, h->n));
    return begin_sum(m, h);
}

int llama_cuda_split_layers(struct llama_cuda_state *m, llama_cuda_layer_fn attend)
{
    const int32_t first = llama_cuda_split_rows(m, m->step.n);
    const struct half halves[2] = {{0, first}, {first, m->step.n - first}};

    for (int layer = 0; layer < m->c->n_layers; layer++) {
        TRY(llama_cuda_mark_layer(m, layer));
        for (int i = 0; i < 2; i++)
            TRY(qkv(m, layer, &halves[i]));
        TRY(attend(m, layer));
        for (int i = 0; i < 2; i++)
            TRY(o(m, layer, &halves[i]));
        for (int i = 0; i < 2; i++)
            TRY(mlp(m, layer, &halves[i]));
    }
    TRY(llama_cuda_mark_layer(m, m->c->n_layers));
    TRY(end_sum(m, NULL));
    return end_sum(m, NULL);
}
