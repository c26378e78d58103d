/* What the tests and the bench share: a random paged problem on the device and the runner. */
#ifndef TESTS_ATTN_SM90_HARNESS_H
#define TESTS_ATTN_SM90_HARNESS_H
#include "attention/attn_sm90_plan.h"
#include "tests/attn_sm90_ref.h"

#include <cuda_runtime_api.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CK(e)                                                                                      \
    do {                                                                                           \
        cudaError_t e_ = (e);                                                                      \
        if (e_ != cudaSuccess) {                                                                   \
            printf("CUDA %s at %s:%d\n", cudaGetErrorString(e_), __FILE__, __LINE__);              \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

struct world {
    struct sm90_shape shape;
    int n_seqs, rows, pool_pages;
    struct sm90_seq seqs[64]; /* host copy */
    int *table[64];           /* device page tables */
    uint16_t *q, *k, *v, *out;
    float *lse;
    struct sm90_seq *d_seqs;
    struct sm90_tile *tiles;
    int64_t n_tiles;
    uint32_t *queue;
    struct sm90_maps maps;
    struct sm90_args args;
    struct sm90_counts *counts; /* [n_heads] */
    int n_sms;
    size_t l2_section; /* bytes of K and V that share the L2 cache */
};

/* Sequences with (pos, n_rows); kv length pos + n_rows each, pages shuffled over the pool. */
static inline void world_make(struct world *w, int heads, int kv, int d, int dtype, int n_seqs,
                              const int (*span)[2], uint64_t seed)
{
    memset(w, 0, sizeof *w);
    w->shape = (struct sm90_shape){heads, kv, d, dtype};
    w->n_seqs = n_seqs;
    w->l2_section = 32u << 20;
    int total = 0, used = 0;
    for (int i = 0; i < n_seqs; i++)
        total += (span[i][0] + span[i][1] + 63) / 64;
    w->pool_pages = total + 3;
    int *perm = malloc((size_t)w->pool_pages * 4);
    for (int i = 0; i < w->pool_pages; i++)
        perm[i] = i;
    uint64_t x = seed * 2654435761u + 12345;
    for (int i = w->pool_pages - 1; i > 0; i--) {
        x = x * 6364136223846793005ull + 1442695040888963407ull;
        int j = (int)((x >> 33) % (uint64_t)(i + 1)), t = perm[i];
        perm[i] = perm[j];
        perm[j] = t;
    }
    for (int i = 0; i < n_seqs; i++) {
        int n = (span[i][0] + span[i][1] + 63) / 64;
        CK(cudaMalloc((void **)&w->table[i], (size_t)n * 4));
        CK(cudaMemcpy(w->table[i], perm + used, (size_t)n * 4, cudaMemcpyHostToDevice));
        used += n;
        w->seqs[i] = (struct sm90_seq){.row = w->rows,
                                       .n_rows = span[i][1],
                                       .pos = span[i][0],
                                       .gate_rows = 128,
                                       .pages = w->table[i],
                                       .ln_lambda = -INFINITY};
        w->rows += span[i][1];
    }
    free(perm);
    size_t qn = (size_t)w->rows * (size_t)(heads * d),
           pn = (size_t)w->pool_pages * (size_t)(kv * 64 * d);
    CK(cudaMalloc((void **)&w->q, qn * 2));
    CK(cudaMalloc((void **)&w->out, qn * 2));
    CK(cudaMalloc((void **)&w->k, pn * 2));
    CK(cudaMalloc((void **)&w->v, pn * 2));
    CK(cudaMalloc((void **)&w->lse, (size_t)w->rows * (size_t)heads * 4));
    CK(cudaMalloc((void **)&w->d_seqs, sizeof w->seqs));
    CK(cudaMalloc((void **)&w->queue, 8));
    CK(cudaMemset(w->queue, 0, 8));
    CK(cudaMalloc((void **)&w->counts, (size_t)heads * sizeof *w->counts));
    ref_fill_normal(w->q, (int64_t)qn, seed + 1, 1.0f, dtype);
    ref_fill_normal(w->k, (int64_t)pn, seed + 2, 1.0f, dtype);
    ref_fill_normal(w->v, (int64_t)pn, seed + 3, 1.0f, dtype);
    int dev = 0;
    CK(cudaDeviceGetAttribute(&w->n_sms, cudaDevAttrMultiProcessorCount, dev));
    if (sm90_maps_make(&w->maps, &w->shape, w->q, w->rows, heads * d, w->k, w->v, w->pool_pages)) {
        printf("tensor maps rejected\n");
        exit(1);
    }
    w->args = (struct sm90_args){.queue = w->queue,
                                 .seqs = w->d_seqs,
                                 .out = w->out,
                                 .lse = w->lse,
                                 .out_stride = heads * d,
                                 .n_heads = heads,
                                 .n_kv_heads = kv,
                                 .n_pages = w->pool_pages,
                                 .scale = 1.0f / sqrtf((float)d)};
}

/* After a change of w->seqs. */
static inline void world_plan(struct world *w)
{
    if (w->tiles)
        cudaFree(w->tiles);
    w->n_tiles = sm90_tile_count(w->seqs, w->n_seqs, w->shape.n_heads);
    struct sm90_tile *t = malloc((size_t)w->n_tiles * sizeof *t);
    w->n_tiles = sm90_tiles_make(t, w->seqs, w->n_seqs, &w->shape, w->l2_section);
    CK(cudaMalloc((void **)&w->tiles, (size_t)w->n_tiles * sizeof *t));
    CK(cudaMemcpy(w->tiles, t, (size_t)w->n_tiles * sizeof *t, cudaMemcpyHostToDevice));
    free(t);
    CK(cudaMemcpy(w->d_seqs, w->seqs, sizeof w->seqs, cudaMemcpyHostToDevice));
    w->args.tiles = w->tiles;
    w->args.gate_rows = w->seqs[0].gate_rows;
    w->args.n_tiles = (int)w->n_tiles;
}

static inline int world_run(struct world *w, int gate)
{
    return sm90_prefill_launch(&w->maps, &w->args, w->shape.head_dim, w->shape.dtype, gate,
                               w->n_sms, 0);
}

static inline void world_free(struct world *w)
{
    for (int i = 0; i < w->n_seqs; i++)
        cudaFree(w->table[i]);
    cudaFree(w->q), cudaFree(w->k), cudaFree(w->v), cudaFree(w->out), cudaFree(w->lse);
    cudaFree(w->d_seqs), cudaFree(w->queue), cudaFree(w->counts), cudaFree(w->tiles);
}

static inline struct ref_problem world_ref(const struct world *w, int seq, int row_step)
{
    const struct sm90_seq *s = &w->seqs[seq];
    return (struct ref_problem){.q = w->q,
                                .k = w->k,
                                .v = w->v,
                                .dtype = w->shape.dtype,
                                .head_dim = w->shape.head_dim,
                                .n_heads = w->shape.n_heads,
                                .n_kv_heads = w->shape.n_kv_heads,
                                .row = s->row,
                                .n_rows = s->n_rows,
                                .pos = s->pos,
                                .row_step = row_step,
                                .pages = s->pages,
                                .n_blocks = (s->pos + s->n_rows + 127) / 128,
                                .n_pages = (s->pos + s->n_rows + 127) / 128 * 2,
                                .scale = w->args.scale};
}

static inline float of16(uint16_t b, int dtype)
{
    if (dtype == 0) {
        uint32_t u = (uint32_t)b << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
    int e = (b >> 10) & 31, m = b & 1023;
    float f = e == 0    ? ldexpf((float)m, -24)
              : e == 31 ? (m ? NAN : INFINITY)
                        : ldexpf((float)(m | 1024), e - 25);
    return b & 0x8000 ? -f : f;
}
#endif
