/* A batch of sequences over a paged pool, for the attention tests: builds random tensors and page
 * tables, runs any cutting of the sequences into chunks, and gathers the rows by position.
 * Every float of the pool that no token has written yet is NaN, so that a read behind a sequence's
 * end shows. */
#ifndef TESTS_ATTENTION_CASE_H
#define TESTS_ATTENTION_CASE_H

#include "attention/attention.h"
#include "attention/attn_tile.h"
#include "oracle.h"
#include "test.h"

enum { CASE_SEQS = 8, CASE_LAYERS = 2 };

struct case_config {
    int32_t n_heads, n_kv_heads, head_dim;
    enum dtype dtype;
    int32_t n_seqs;
    int32_t len[CASE_SEQS], prompt_end[CASE_SEQS];
    double sharpness; /* 1: scores of about unit variance */
    int32_t n_threads;
};

struct case_seq {
    int32_t len, prompt_end, n_pages;
    int32_t written; /* tokens in the cache */
    int32_t *pages;
    struct attn_choice choice;
    float *q;     /* [len, n_heads, head_dim] */
    float *k, *v; /* [len, n_kv_heads, head_dim], already rounded to the cache's type */
    float *out;   /* results by position */
    float *lse;   /* [len, n_heads] */
    struct attn_counts counts;
};

struct attn_case {
    struct case_config c;
    struct rng rng;
    struct kv_view kv;
    void *pools[2][CASE_LAYERS];
    struct case_seq seqs[CASE_SEQS];
    struct attn_policy policy;
    struct attn_head_policy *heads; /* storage for policy.heads */
    float *thresholds;              /* storage for policy.abs.t */
    float *decode;                  /* likewise for policy.decode.t */
    float *densities[2];            /* and for policy.rel_128.t and rel_64.t */
    float *pages;                   /* and for policy.abs_pages.t */
    int32_t layer;
    float scale;
    struct dev *dev;
    void *workspace;
    struct attn_counts *head_counts;
    struct attn_tile_max *tile_max;
    const struct attn_rel_counts *rel_counts;
    const struct attn_tile_ops *tile;
};

struct case_chunk {
    int32_t seq, pos, n;
};

void case_open(struct attn_case *t, const struct case_config *c, struct rng *rng);
/* One sequence of 2 KV heads, each with `group` query heads; f32. */
void case_open_one(struct attn_case *t, struct rng *rng, int32_t len, int32_t prompt_end,
                   int32_t head_dim, int32_t group);
void case_close(struct attn_case *t);
/* A new cache: pages dealt anew, nothing written, counts and outputs cleared. */
void case_reset(struct attn_case *t);
/* Random thresholds [n_levels, layers, heads, n_blocks] around the scores that occur. */
void case_thresholds(struct attn_case *t, int32_t n_levels, int32_t n_blocks, double lo, double hi);
/* The same of generated rows. */
void case_decode_thresholds(struct attn_case *t, int32_t n_levels, int32_t n_blocks, double lo,
                            double hi);
/* Random densities and pages [n_levels, layers, heads] for REL and ABS to be steered to. */
void case_densities(struct attn_case *t, int32_t n_levels);
/* Every head SINK_LOCAL or ALL at random. */
void case_visits(struct attn_case *t);
/* One batch; writes the chunks' tokens to the cache first. Returns attn_cpu's result. */
int case_run(struct attn_case *t, const struct case_chunk *chunks, int32_t n);
/* The whole of every sequence, in one batch. */
void case_run_whole(struct attn_case *t);
/* The check with each table of tile functions that this processor has. */
void case_each_table(struct attn_case *t, void (*check)(struct attn_case *));
/* attn_validate refuses the problem and names the field. */
void case_expect_invalid(const struct attn_case *t, const struct attn_problem *p,
                         const char *field);
/* Runs whole sequences on every table of tile functions and compares outputs, LSE, counts and lost
 * mass (unless a decision is a tie) with the oracle: |ours - f64| <= 2 |naive f32 - f64| + atol, in
 * the maximum norm. */
void case_check_oracle(struct attn_case *t, double atol);
/* A copy of the outputs of a run, to compare later runs with. */
struct case_bits {
    float *out[CASE_SEQS], *lse[CASE_SEQS];
    struct attn_counts counts[CASE_SEQS];
};
void case_save(const struct attn_case *t, struct case_bits *bits);
void case_assert_bits(const struct attn_case *t, const struct case_bits *bits);
void case_drop(struct case_bits *bits);

#endif
