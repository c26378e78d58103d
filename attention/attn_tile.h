/* The arithmetic of one page on one CPU core: five functions over small tiles, one table per
 * instruction set. Internal to attention/; tests include it to force a table.
 *
 * Every function computes a row from that row's data alone, in an order that depends neither on how
 * many rows the call has nor on the row's place among them. Row independence (attention.h) rests on
 * this: the row tiles of 6, 5, .. 1 rows differ in speed only.
 *
 *   kt  [head_dim, 64]   a page's keys, transposed: a vector holds neighbouring keys
 *   v   [64, dv]         a page's values; dv = head_dim rounded up to ATTN_DV, padding zero
 *   q   [rows, head_dim] queries, already times the scale: scores are natural logits
 *   s   [rows, 64]       scores, replaced by probabilities
 *   o   [rows, dv]       unnormalised output
 *   m, l, alpha, row_max [rows] running maximum and sum, this page's factor for o, this page's max
 *
 * Source: FlashAttention-2 (arXiv 2307.08691) section 3; register tiles as in BLIS. */
#ifndef ATTENTION_ATTN_TILE_H
#define ATTENTION_ATTN_TILE_H

#include "core/dtype.h"
#include "kvcache/kv_view.h"

#include <stdint.h>

enum { ATTN_DV = 16 }; /* floats in the widest vector */

static inline int32_t attn_tile_dv(int32_t head_dim)
{
    return (head_dim + ATTN_DV - 1) / ATTN_DV * ATTN_DV;
}

struct attn_tile_ops {
    const char *name;
    /* Transposes a page's keys. Returns the largest |k| of the page, NaN if any is NaN. */
    float (*pack_k)(float *kt, const void *k, enum dtype t, int32_t head_dim);
    void (*pack_v)(float *v, const void *src, enum dtype t, int32_t head_dim);
    /* s[r][j] = sum over i = 0 .. head_dim - 1, in that order, of q[r][i] * kt[i][j], fused;
     * row_max[r] = max over all 64 keys (meaningless where the row has a NaN). */
    void (*qk)(float *s, float *row_max, const float *q, const float *kt, int32_t rows,
               int32_t head_dim);
    /* m' = max(m, row_max), s = exp(s - m'), alpha = exp(m - m'), l = l * alpha + sum of s.
     * s = -inf gives exactly 0; NaN stays NaN; results under e^-86 become 0. */
    void (*softmax)(float *s, float *m, float *l, float *alpha, const float *row_max, int32_t rows);
    /* o[r] = o[r] * alpha[r] + sum over j = 0 .. keys - 1, in that order, of p[r][j] * v[j], fused.
     * The other keys' values are not read. */
    void (*pv)(float *o, const float *p, const float *v, const float *alpha, int32_t rows,
               int32_t keys, int32_t dv);
};

extern const struct attn_tile_ops attn_tile_c; /* runs anywhere */
#if defined(__x86_64__)
extern const struct attn_tile_ops attn_tile_avx2;   /* AVX2, FMA */
extern const struct attn_tile_ops attn_tile_avx512; /* AVX-512 F, DQ */
#endif

enum { ATTN_TILE_TABLES = 3 };
/* The tables this processor can run, best first, then NULL. */
void attn_tile_list(const struct attn_tile_ops *out[ATTN_TILE_TABLES + 1]);
const struct attn_tile_ops *attn_tile_best(void);

#endif
