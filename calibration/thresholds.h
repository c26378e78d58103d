/* Threshold files: safetensors holding `thresholds` f32 [S, L, H, NB] and `k` i32 [S], with
 * metadata (all strings): format "sluice-thresholds", version "1", model (fingerprint, 16 hex
 * digits), gate_rows, page "64", rope, softmax_scale, n_max (tokens), samples, set (hash of the
 * calibration set, 16 hex digits), auto_k (level that `--sparse auto` chooses), auto_min (prompt
 * tokens below which auto is dense), and source "imported" where another program's file was
 * converted (import.h): samples may then be 0, unknown. Optional, and ignored by readers that do
 * not know them: rel_128 and rel_64 (struct thresholds_rel, 24 numbers, or 14: without
 * what follows the knots), auto_density or auto_ln_lambda and auto_rows, head_k (S * L * H whole
 * numbers, where each head keeps pages of its own: k then only names the level). Two more tensors,
 * both or neither: `decode` f32 [S', L, H, NB'] and `decode_k` i32 [S'], the same for generated
 * rows, which decide alone (policy.h), with levels and a length of their own. Programs from before
 * those refuse a file that has them, by the number of its tensors. Two more, both or neither:
 * `rel_128_heads` and `rel_64_heads` f32 [P, L, H], what the REL gate of so many rows is steered
 * to: the shares of their pages that heads keep at steps of lambda, whose mean (but for the last
 * layer, which computes one block of a prompt) falls from step to step. T[s][l][h][i] gates query
 * head h of layer l at absolute query block i (128 tokens); natural scaled-logit units. Levels are
 * stored by increasing k; NB is n_max in blocks. -inf (dense) and +inf (diagonal only) are values,
 * NaN is not. Every error names the file and the field. Source: BSFA section 4.2-4.3. */
#ifndef CALIBRATION_THRESHOLDS_H
#define CALIBRATION_THRESHOLDS_H

#include "attention/policy.h"
#include "core/err.h"

#include <stdbool.h>
#include <stddef.h>

struct thresholds;
struct batch_policy;

enum { THRESHOLDS_REL_KNOTS = 9 };

/* Largest ln(lambda) that is tried, and that a density may get. */
#define THRESHOLDS_REL_LN_MAX 5.0f

/* How the REL gate of so many rows reaches a density (calib_rel.h): lambda times the prompt's
 * tokens as a function of S, the share of its pages that is skipped. b 0: not calibrated. */
struct thresholds_rel {
    double ln_a, b;  /* the law, a exp(b S) */
    double r2;       /* share of the variance of ln(lambda * tokens) that the law explains */
    double min, max; /* S of the points it was fitted to */
    double knots[THRESHOLDS_REL_KNOTS];  /* what was seen: ln(lambda * tokens) at S = 0.1, 0.2, ...,
                                            0.9 of prompts of exp(ln_tokens); increasing */
    double ln_tokens;                    /* 0: of any length, as the law has it */
    double slopes[THRESHOLDS_REL_KNOTS]; /* by which a knot grows with ln(tokens) */
};

/* ln(lambda) for a density in (0, 1] at n_tokens: between the knots of that length, and beyond them
 * as the law goes on. Slopes hold for lengths up to 64 times apart. At most THRESHOLDS_REL_LN_MAX,
 * at least -60. */
double thresholds_rel_ln_lambda(const struct thresholds_rel *r, double density, int64_t n_tokens);

/* t [n_steps, n_layers, n_heads]: see struct attn_policy. */
struct thresholds_rel_heads {
    const float *t; /* NULL: none */
    int32_t n_steps;
};

/* As kernels see it. */
struct attn_thresholds thresholds_rel_heads_view(const struct thresholds_rel_heads *r,
                                                 int32_t n_layers, int32_t n_heads);
/* Steers a sequence by rel->steer: sets level and blend, between which heads keep a mean density of
 * a prompt of n_tokens, each block its diagonal pages at least (at most the first step's density,
 * at least the last's), and moves ln_lambda to where steering begins. False where such a view has
 * no steps: nothing is set. */
bool thresholds_rel_steer(const struct attn_thresholds *heads, double density, int64_t n_tokens,
                          struct batch_policy *rel);

/* Thresholds of generated rows: t [n_levels, n_layers, n_heads, n_blocks], k [n_levels] pages that
 * a row keeps besides the one of its own token. */
struct thresholds_decode {
    const float *t; /* NULL: none */
    const int32_t *k;
    int32_t n_levels, n_blocks;
};

struct thresholds_meta {
    uint64_t model;    /* struct model_info.fingerprint */
    uint64_t set;      /* hash of the calibration samples */
    int32_t gate_rows; /* 128 or 64 */
    int32_t n_max;     /* calibrated positions, tokens; beyond them the last block's row is used */
    int32_t n_samples; /* 0: unknown, where imported */
    bool imported;     /* not calibrated by this program */
    float softmax_scale;
    char rope[64];
    int32_t auto_k; /* 0: auto is dense */
    int32_t auto_min;
    struct thresholds_rel rel_128, rel_64;
    /* 128 or 64: auto is the REL gate of so many rows, not auto_k; at auto_density where that is
     * above 0, else at auto_ln_lambda. */
    int32_t auto_rows;
    double auto_density, auto_ln_lambda;
    /* [S, L, H] pages that each head keeps, none fewer than a level before; NULL: the level's k.
     * Borrowed: a loaded file's lives as long as it. */
    const int32_t *head_k;
    struct thresholds_decode decode;                         /* likewise borrowed */
    struct thresholds_rel_heads rel_128_heads, rel_64_heads; /* likewise */
};

MUST_CHECK int thresholds_load(struct thresholds **out, const char *path, struct err_msg *why);
/* From memory, for tests and fuzzing; copies what it keeps. */
MUST_CHECK int thresholds_parse(struct thresholds **out, const void *data, size_t len,
                                const char *name, struct err_msg *why);
/* t [S, L, H, NB], k [S] increasing. Written to a temporary name, then renamed. */
MUST_CHECK int thresholds_save(const char *path, const struct thresholds_meta *meta, const float *t,
                               const int32_t *k, int32_t n_levels, int32_t n_layers,
                               int32_t n_heads, int32_t n_blocks, struct err_msg *why);
void thresholds_free(struct thresholds *t); /* accepts NULL */

const struct thresholds_meta *thresholds_meta(const struct thresholds *t);
/* The whole tensor as kernels see it; lives as long as t. */
const struct attn_thresholds *thresholds_view(const struct thresholds *t);
/* Those of generated rows; t == NULL: the file has none. */
const struct attn_thresholds *thresholds_decode_view(const struct thresholds *t);
/* Pages that heads keep at the levels, [S, L, H, 1]: what ABS is steered to. */
const struct attn_thresholds *thresholds_pages_view(const struct thresholds *t);
/* Steers a sequence of a level by abs->steer to a density of its n_tokens, or, density 0, to the
 * level's own pages: sets blend, by which the level's pages come to it. */
void thresholds_abs_steer(const struct thresholds *t, double density, int64_t n_tokens,
                          struct batch_policy *abs);
/* What REL of 128 or 64 rows is steered to; t == NULL: the file has none. */
const struct attn_thresholds *thresholds_rel_view(const struct thresholds *t, int32_t gate_rows);
const int32_t *thresholds_k(const struct thresholds *t, int32_t *n_levels);
/* Index of the level with exactly this k, or ERR_INVALID with the list of those there are. */
MUST_CHECK int thresholds_level(const struct thresholds *t, int32_t k, struct err_msg *why);
/* Hash of what decides gates (tensors, shape, gate_rows, model): part of the policy fingerprint
 * that seeds the prefix cache. The same for the same content, whatever wrote the file. */
uint64_t thresholds_hash(const struct thresholds *t);

/* What a model must agree on; ERR_MISMATCH names the first field that differs, the
 * model's fingerprint last: what else differs says more. */
struct thresholds_expect {
    uint64_t model;
    int32_t n_layers, n_heads;
    float softmax_scale;
    const char *rope;
};
MUST_CHECK int thresholds_check(const struct thresholds *t, const struct thresholds_expect *e,
                                struct err_msg *why);

/* Predicted density of level k over a prompt of n_tokens: sum_i(min(k, A_i) + diag) / sum_i(A_i +
 * diag), R11, in the units of struct attn_counts. With gate_rows 64 both halves of block i choose
 * among the same A_i = 2i pages; the first half has one diagonal page, the second two. */
double thresholds_predicted_density(int32_t k, int64_t n_tokens, int32_t gate_rows);
/* The mean of that over n heads with a k each. */
double thresholds_heads_density(const int32_t *k, int64_t n, int64_t n_tokens, int32_t gate_rows);
/* Of a level of the file, by what its heads keep; grows with the level. */
double thresholds_level_density(const struct thresholds *t, int32_t level, int64_t n_tokens);
/* The smallest level that is predicted to reach the density, or the largest. */
int32_t thresholds_level_for(const struct thresholds *t, double density, int64_t n_tokens);
/* Predicted density of a generated row at position n_tokens that keeps k of the A pages before its
 * own: (min(k, A) + 1) / (A + 1). */
double thresholds_row_density(int32_t k, int64_t n_tokens);
/* Of a level of the file's decode thresholds; grows with the level. */
double thresholds_decode_density(const struct thresholds *t, int32_t level, int64_t n_tokens);
/* The smallest k whose predicted density reaches `density` (in (0, 1]) at n_tokens, at least 1. */
int32_t thresholds_k_for_density(double density, int64_t n_tokens, int32_t gate_rows);

#endif
