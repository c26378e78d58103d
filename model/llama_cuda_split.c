/* Layers of a long step over ranks, in two halves of its rows. Every rank keeps a part of the rows
 * of each half: their residual, their sum over the ranks and their norm. What a half's products
 * leave is scattered, so that each rank adds up its part, and the norms of the parts are gathered,
 * both while the other half is computed:
 *
 *   stream    | qkv 1 | norm 2 | attention 1, o 1 | qkv 2 | norm 1 | attention 2, o 2 |
 *   beside it [ sum down 2 ]   [     norms 2     ][ sum o 1 ]      [     norms 1      ][
 *
 *   stream    | gate, up 1 | norm 2 | down 1 | gate, up 2 | norm 1 | down 2 |
 *   beside it [   sum o 2  ]        [norms 2][ sum down 1 ]        [norms 1 ][
 *
 * Attention of the first half needs no keys of the second, which sees them all. Where the decode
 * kernel has rows in both halves, or page maxima are wanted, attention runs once for all rows,
 * behind qkv 2. Everything but a product's choice of algorithm and the order of a sum is by row, so
 * the rows have the bits of an unsplit step unless the library's algorithms for half as many rows
 * round otherwise (gemm_cublas.h). */
#define LOG_MODULE "model"
#include "model/llama_cuda_internal.h"
#include "model/nn_cuda.h"

enum { SPLIT_ROWS = 1024 /* below, half a product costs as much as a whole one */ };

struct half {
    int32_t first, n,
        delta;          /* rows; delta: its first row of the products, apart from the other's */
    const void *hidden; /* [n, hidden] input of its next product */
    bool gathering;     /* it is on its way */
};

/* ---- what is split, and where ---- */

/* The first half is the longer one, and fills its bucket of products. */
static int32_t first_half(int32_t rows)
{
    return gemm_cublas_bucket((rows + 1) / 2);
}

int llama_cuda_reserve_rows(struct llama_cuda_state *m, struct err_msg *why)
{
    const struct comm_rows rows = {.max = first_half(m->max_tokens) + KV_BLOCK_TOKENS,
                                   .width = m->c->hidden_size,
                                   .dt = m->dtype};
    if (m->shard->n_ranks == 1 || m->max_tokens < SPLIT_ROWS)
        return 0;
    return comm_reserve_rows(m->comm, &rows, why);
}

int32_t llama_cuda_split_rows(const struct llama_cuda_state *m, int32_t rows)
{
    const bool split = m->shard->n_ranks > 1 && rows >= SPLIT_ROWS && comm_overlaps(m->comm);
    return split ? first_half(rows) : 0;
}

/* Whether products may begin at any row: they want 256 bytes of alignment. */
static bool begins_anywhere(const struct llama_cuda_state *m)
{
    const int32_t any = m->c->hidden_size | m->qkv_width | m->q_width | m->shard->n_inter;
    return (size_t)any * dtype_bytes(m->dtype) % 256 == 0;
}

/* A sequence is divided between blocks, so that gates decide about the same rows and no page is
 * half filled when the first half's attention reads it. */
static int32_t between_blocks(const struct llama_input *in, int32_t row)
{
    for (int32_t i = 0; i < in->n_seqs; i++) {
        const struct attn_seq *s = &in->seqs[i];
        const int32_t end = s->row + s->n_rows, over = (s->pos + row - s->row) % KV_BLOCK_TOKENS;
        if (row <= s->row || row >= end || over == 0)
            continue;
        const int32_t cut = row + KV_BLOCK_TOKENS - over;
        return cut < end ? cut : end;
    }
    return row;
}

int32_t llama_cuda_split_step(struct llama_cuda_state *m, const struct llama_input *in)
{
    const int32_t first = in ? llama_cuda_split_rows(m, in->n_rows) : 0;
    m->step.half = first;
    if (first == 0 || m->probed)
        return 0;
    const int32_t cut = between_blocks(in, first);
    if (cut % KV_BLOCK_TOKENS != 0 && !begins_anywhere(m))
        return 0;
    m->step.half = cut;
    return cut;
}

bool llama_cuda_owns_row(const struct llama_cuda_state *m, int32_t row)
{
    const int32_t half = m->step.half, first = row < half ? 0 : half;
    const int32_t n = row < half ? half : m->step.n - half;
    const int owner = m->c->n_layers > 1 ? (row - first) / comm_part(m->comm, n) : 0;
    return owner == m->comm->rank;
}

/* ---- rows ---- */

static void *at(const struct llama_cuda_state *m, const void *rows, int32_t row, int32_t width)
{
    return (char *)rows + (size_t)row * (size_t)width * dtype_bytes(m->dtype);
}

/* The input of a half's next product is there. */
static int arrive(struct llama_cuda_state *m, struct half *h)
{
    if (!h->gathering)
        return 0;
    h->gathering = false;
    TRY(llama_cuda_mark(m, PART_COMM));
    TRY(comm_gather_end(m->comm, m->stream));
    return llama_cuda_mark(m, PART_OTHER);
}

static int scatter(struct llama_cuda_state *m, const struct half *h)
{
    return comm_scatter_begin(m->comm, at(m, m->a.delta, h->delta, m->c->hidden_size), h->n,
                              m->stream);
}

/* Of this rank's part: residual += delta + bias, summed over the ranks; its norm goes to all. */
static int share_norm(struct llama_cuda_state *m, struct half *h, const void *bias,
                      const void *weight)
{
    const int32_t width = m->c->hidden_size, rank = m->comm->rank;
    const int32_t row = rank * comm_part(m->comm, h->n);
    void *all = comm_gather_rows(m->comm);
    struct comm_shares shares;
    TRY(llama_cuda_mark(m, PART_COMM));
    TRY(comm_scatter_end(m->comm, m->stream, &shares));
    TRY(llama_cuda_mark(m, PART_OTHER));
    const struct nn_cuda_norm norm = {.out = at(m, all, row, width),
                                      .residual = at(m, m->a.residual, h->first + row, width),
                                      .x = at(m, m->a.delta, h->delta + row, width),
                                      .more = shares.rows,
                                      .n_more = shares.n,
                                      .more_rows = shares.pitch,
                                      .bias = bias,
                                      .weight = weight,
                                      .n = comm_part_rows(m->comm, h->n, rank),
                                      .width = width,
                                      .eps = (float)m->c->rms_eps};
    CUDA_TRY(nn_cuda_residual_norm(&norm, dev_cuda_dtype(m->dtype), m->stream));
    h->hidden = all;
    h->gathering = true;
    return comm_gather_begin(m->comm, h->n, m->stream);
}

/* The first norm, which every rank makes of all rows: nothing is to be summed. */
static int first_norm(struct llama_cuda_state *m, struct half *h)
{
    const int32_t width = m->c->hidden_size;
    const struct nn_cuda_norm norm = {.out = at(m, m->a.hidden, h->first, width),
                                      .residual = at(m, m->a.residual, h->first, width),
                                      .weight = m->w->layers[0].attn_norm,
                                      .n = h->n,
                                      .width = width,
                                      .eps = (float)m->c->rms_eps};
    CUDA_TRY(nn_cuda_residual_norm(&norm, dev_cuda_dtype(m->dtype), m->stream));
    h->hidden = norm.out;
    return 0;
}

/* ---- a layer ---- */

static int qkv(struct llama_cuda_state *m, const struct llama_layer *w, struct half *h)
{
    TRY(arrive(m, h));
    return llama_cuda_product(m, m->qkv_plan, at(m, m->a.qkv, h->first, m->qkv_width), h->hidden,
                              w->qkv, h->n);
}

static int o(struct llama_cuda_state *m, const struct llama_layer *w, const struct half *h)
{
    TRY(llama_cuda_product(m, m->o_plan, at(m, m->a.delta, h->delta, m->c->hidden_size),
                           at(m, m->a.attn, h->first, m->q_width), w->o, h->n));
    return scatter(m, h);
}

static int gate_up(struct llama_cuda_state *m, const struct llama_layer *w, struct half *h)
{
    const int32_t n_inter = m->shard->n_inter;
    TRY(arrive(m, h));
    return llama_cuda_activate(m, w, at(m, m->a.act, h->first, n_inter),
                               at(m, m->a.gate_up, h->first, 2 * n_inter), h->hidden, h->n);
}

static int down(struct llama_cuda_state *m, const struct llama_layer *w, const struct half *h)
{
    TRY(llama_cuda_product(m, m->down_plan, at(m, m->a.delta, h->delta, m->c->hidden_size),
                           at(m, m->a.act, h->first, m->shard->n_inter), w->down, h->n));
    return scatter(m, h);
}

/* From the first half's input on to where its next norm is on its way and the second half's last
 * sum is. */
static int layer(struct llama_cuda_state *m, int l, struct half *h, llama_cuda_attend_fn attend)
{
    const struct llama_layer *w = &m->w->layers[l];
    const bool halves = attn_cuda_has_halves(m->attn);
    const void *next_norm = l + 1 < m->c->n_layers ? w[1].attn_norm : m->w->norm;

    TRY(qkv(m, w, &h[0]));
    if (l > 0)
        TRY(share_norm(m, &h[1], w[-1].down_bias, w->attn_norm));
    if (halves) {
        TRY(attend(m, l, 0));
        TRY(o(m, w, &h[0]));
    }
    TRY(qkv(m, w, &h[1]));
    if (!halves) {
        TRY(attend(m, l, ATTEND_ALL));
        TRY(o(m, w, &h[0]));
    }
    TRY(share_norm(m, &h[0], w->o_bias, w->mlp_norm));
    if (halves)
        TRY(attend(m, l, 1));
    TRY(o(m, w, &h[1]));
    TRY(gate_up(m, w, &h[0]));
    TRY(share_norm(m, &h[1], w->o_bias, w->mlp_norm));
    TRY(down(m, w, &h[0]));
    TRY(gate_up(m, w, &h[1]));
    TRY(share_norm(m, &h[0], w->down_bias, next_norm));
    return down(m, w, &h[1]);
}

/* The last layer up to its attention, where that is all that is computed of every row. */
static int narrow_layer(struct llama_cuda_state *m, int l, struct half *h,
                        llama_cuda_attend_fn attend)
{
    const struct llama_layer *w = &m->w->layers[l];
    TRY(qkv(m, w, &h[0]));
    if (l > 0)
        TRY(share_norm(m, &h[1], w[-1].down_bias, w->attn_norm));
    TRY(qkv(m, w, &h[1]));
    return attend(m, l, ATTEND_ALL);
}

/* A half's last norms to where outputs are looked up. */
static int keep(struct llama_cuda_state *m, struct half *h)
{
    const int32_t width = m->c->hidden_size;
    TRY(arrive(m, h));
    CUDA_TRY(cudaMemcpyAsync(at(m, m->a.hidden, h->first, width), h->hidden,
                             (size_t)h->n * (size_t)width * dtype_bytes(m->dtype),
                             cudaMemcpyDeviceToDevice, m->stream));
    return 0;
}

int llama_cuda_split_layers(struct llama_cuda_state *m, llama_cuda_attend_fn attend)
{
    const int32_t first = m->step.half, n_layers = m->c->n_layers;
    struct half h[2] = {
        {.n = first}, {.first = first, .n = m->step.n - first, .delta = first + m->comm->n_ranks}};

    TRY(first_norm(m, &h[0]));
    TRY(first_norm(m, &h[1]));
    for (int l = 0; l < n_layers - m->step.narrow; l++) {
        TRY(llama_cuda_mark_layer(m, l));
        TRY(layer(m, l, h, attend));
    }
    if (m->step.narrow) {
        TRY(llama_cuda_mark_layer(m, n_layers - 1));
        return narrow_layer(m, n_layers - 1, h, attend);
    }
    TRY(llama_cuda_mark_layer(m, n_layers));
    TRY(keep(m, &h[0]));
    TRY(share_norm(m, &h[1], m->w->layers[n_layers - 1].down_bias, m->w->norm));
    return keep(m, &h[1]);
}
