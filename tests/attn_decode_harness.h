/* What the decode tests and bench share: a random ragged batch on the device, its plan and runner.
 */
#ifndef TESTS_ATTN_DECODE_HARNESS_H
#define TESTS_ATTN_DECODE_HARNESS_H
#include "attention/attn_decode_sm90.h"
#include "tests/attn_decode_ref.h"
#include "tests/attn_sm90_harness.h"

enum { DEC_MAX_SEQS = 1024 };

struct dec_world {
    struct dec_shape shape;
    int n_seqs, rows, pool_pages, n_sms;
    struct dec_seq seqs[DEC_MAX_SEQS]; /* host copy */
    int n_pages[DEC_MAX_SEQS];
    int *host_table, *table; /* all page tables end to end; capacity table_len */
    size_t table_len;
    uint16_t *q, *k, *v, *out;
    float *lse;
    struct dec_seq *d_seqs;
    struct dec_plan plan; /* host */
    int32_t n_pieces;
    const struct attn_head_policy *heads; /* host, or NULL */
    struct sm90_counts *counts;           /* [n_heads], then [DEC_MAX_SEQS] */
    struct sm90_maps maps;
    struct dec_args args;
};

static inline void *dec_device(size_t n)
{
    void *p;
    CK(cudaMalloc(&p, n));
    return p;
}

static inline size_t dec_q_len(const struct dec_world *w)
{
    return (size_t)w->rows * (size_t)(w->shape.n_heads * w->shape.head_dim);
}

static inline size_t dec_pool_len(const struct dec_world *w)
{
    return (size_t)w->pool_pages * (size_t)(w->shape.n_kv_heads * 64 * w->shape.head_dim);
}

/* Deals the pages of a shuffled pool to the sequences and copies the tables to the device. */
static inline void dec_deal(struct dec_world *w, uint64_t seed)
{
    int *perm = malloc((size_t)w->pool_pages * sizeof *perm), used = 0;
    uint64_t x = seed * 2654435761u + 12345;
    for (int i = 0; i < w->pool_pages; i++)
        perm[i] = i;
    for (int i = w->pool_pages - 1; i > 0; i--) {
        x = x * 6364136223846793005ull + 1442695040888963407ull;
        int j = (int)((x >> 33) % (uint64_t)(i + 1)), t = perm[i];
        perm[i] = perm[j];
        perm[j] = t;
    }
    for (int i = 0; i < w->n_seqs; i++) {
        w->seqs[i].pages = w->table + used;
        used += w->n_pages[i];
    }
    memcpy(w->host_table, perm, (size_t)used * sizeof *perm);
    CK(cudaMemcpy(w->table, perm, (size_t)used * sizeof *perm, cudaMemcpyHostToDevice));
    free(perm);
}

/* Sets the sequences to (pos, n_rows); they must fit what dec_make sized the buffers for. */
static inline void dec_spans(struct dec_world *w, int n_seqs, const int (*span)[2])
{
    w->n_seqs = n_seqs;
    w->rows = 0;
    for (int i = 0; i < n_seqs; i++) {
        w->n_pages[i] = (span[i][0] + span[i][1] + 63) / 64;
        w->seqs[i] = (struct dec_seq){
            .row = w->rows, .n_rows = span[i][1], .pos = span[i][0], .ln_lambda = -INFINITY};
        w->rows += span[i][1];
    }
}

static inline void dec_args_make(struct dec_world *w)
{
    const struct dec_shape *s = &w->shape;
    const size_t pieces = dec_plan_max_pieces(s, w->n_seqs, DEC_MAX_TOKENS);
    w->plan.pieces = malloc(pieces * sizeof *w->plan.pieces);
    w->plan.first = malloc(((size_t)s->n_shares + 1) * sizeof *w->plan.first);
    w->d_seqs = dec_device(sizeof w->seqs);
    w->counts = dec_device(((size_t)s->n_heads + DEC_MAX_SEQS) * sizeof *w->counts);
    uint32_t *arrived = dec_device((size_t)s->n_shares * 4);
    CK(cudaMemset(arrived, 0, (size_t)s->n_shares * 4));
    float *workspace = dec_device(dec_workspace_bytes(s));
    CK(cudaMemset(workspace, 0xff, dec_workspace_bytes(s)));
    w->args = (struct dec_args){.pieces = dec_device(pieces * sizeof *w->plan.pieces),
                                .first = dec_device(((size_t)s->n_shares + 1) * 4),
                                .seqs = w->d_seqs,
                                .q = w->q,
                                .out = w->out,
                                .lse = w->lse,
                                .q_stride = s->n_heads * s->head_dim,
                                .out_stride = s->n_heads * s->head_dim,
                                .n_heads = s->n_heads,
                                .n_kv_heads = s->n_kv_heads,
                                .n_shares = s->n_shares,
                                .scale = 1.0f / sqrtf((float)s->head_dim),
                                .workspace = workspace,
                                .arrived = arrived,
                                .t_blocks = 1};
}

static inline void dec_make(struct dec_world *w, int heads, int kv, int d, int dtype, int n_seqs,
                            const int (*span)[2], uint64_t seed)
{
    memset(w, 0, sizeof *w);
    CK(cudaDeviceGetAttribute(&w->n_sms, cudaDevAttrMultiProcessorCount, 0));
    w->shape = (struct dec_shape){heads, kv, d, dtype, dec_shares(w->n_sms)};
    dec_spans(w, n_seqs, span);
    for (int i = 0; i < n_seqs; i++)
        w->table_len += (size_t)w->n_pages[i];
    w->pool_pages = (int)w->table_len + 3;
    w->host_table = malloc(w->table_len * 4);
    w->table = dec_device(w->table_len * 4);
    dec_deal(w, seed);
    w->q = dec_device(dec_q_len(w) * 2);
    w->out = dec_device(dec_q_len(w) * 2);
    w->k = dec_device(dec_pool_len(w) * 2);
    w->v = dec_device(dec_pool_len(w) * 2);
    w->lse = dec_device((size_t)w->rows * (size_t)heads * 4);
    ref_fill_normal(w->q, (int64_t)dec_q_len(w), seed + 1, 1.0f, dtype);
    ref_fill_normal(w->k, (int64_t)dec_pool_len(w), seed + 2, 1.0f, dtype);
    ref_fill_normal(w->v, (int64_t)dec_pool_len(w), seed + 3, 1.0f, dtype);
    const struct sm90_shape s = {heads, kv, d, dtype};
    if (sm90_maps_make(&w->maps, &s, w->q, w->rows, heads * d, w->k, w->v, w->pool_pages)) {
        printf("tensor maps rejected\n");
        exit(1);
    }
    dec_args_make(w);
}

/* After a change of w->seqs, w->heads or the tables. */
static inline void dec_plan(struct dec_world *w)
{
    w->n_pieces = dec_plan_make(&w->plan, &w->shape, w->seqs, w->n_seqs, w->heads);
    CK(cudaMemcpy((void *)w->args.pieces, w->plan.pieces,
                  (size_t)w->n_pieces * sizeof *w->plan.pieces, cudaMemcpyHostToDevice));
    CK(cudaMemcpy((void *)w->args.first, w->plan.first, ((size_t)w->shape.n_shares + 1) * 4,
                  cudaMemcpyHostToDevice));
    CK(cudaMemcpy(w->d_seqs, w->seqs, sizeof w->seqs, cudaMemcpyHostToDevice));
}

static inline int dec_run(struct dec_world *w, int gate)
{
    return decode_sm90_launch(&w->maps, &w->args, w->shape.head_dim, w->shape.dtype, gate, NULL);
}

static inline void dec_free(struct dec_world *w)
{
    cudaFree(w->q), cudaFree(w->k), cudaFree(w->v), cudaFree(w->out), cudaFree(w->lse);
    cudaFree(w->d_seqs), cudaFree(w->counts), cudaFree(w->table);
    cudaFree((void *)w->args.pieces), cudaFree((void *)w->args.first);
    cudaFree(w->args.workspace), cudaFree(w->args.arrived);
    free(w->plan.pieces), free(w->plan.first), free(w->host_table);
}

static inline struct dec_ref dec_ref_of(const struct dec_world *w, int seq)
{
    const struct dec_seq *s = &w->seqs[seq];
    return (struct dec_ref){.q = w->q,
                            .k = w->k,
                            .v = w->v,
                            .dtype = w->shape.dtype,
                            .head_dim = w->shape.head_dim,
                            .n_heads = w->shape.n_heads,
                            .n_kv_heads = w->shape.n_kv_heads,
                            .row = s->row,
                            .n_rows = s->n_rows,
                            .pos = s->pos,
                            .n_pages = w->n_pages[seq],
                            .pages = s->pages,
                            .scale = w->args.scale};
}
#endif
