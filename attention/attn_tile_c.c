/* Tile functions in plain C, for processors without a table of their own. The inner loops run over
 * neighbouring keys or columns, so that a compiler can use whatever vectors there are. */
#include "attention/attn_exp.h"
#include "attention/attn_tile.h"

#include <math.h>
#include <string.h>

enum { W = 16 }; /* accumulators a loop keeps */

/* Adding and taking away 1.5 * 2^23 rounds to the nearest integer, without a call to rintf. */
static const float ROUND = 0x1.8p23f;

static float exp_c(float t)
{
    if (t < EXP_LO)
        return 0.0f;
    if (!(t <= 88.0f)) /* NaN, or a row that holds one */
        return t;
    float n = (t * EXP_LOG2E + ROUND) - ROUND;
    float r = (t - n * EXP_LN2_HI) - n * EXP_LN2_LO;
    float p = EXP_C6;
    p = p * r + EXP_C5;
    p = p * r + EXP_C4;
    p = p * r + EXP_C3;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * dtype_bits_f32((uint32_t)((int32_t)n + 127) << 23);
}

/* acc[c] += sum over i < n of a[i] * b[i][c], in order. */
static void multiply(float acc[W], const float *a, const float *b, int32_t ldb, int32_t n)
{
    float x[W];
    memcpy(x, acc, sizeof x); /* a local copy, so that it may live in registers */
    for (int32_t i = 0; i < n; i++, b += ldb) {
        for (int c = 0; c < W; c++)
            x[c] += a[i] * b[c];
    }
    memcpy(acc, x, sizeof x);
}

static void qk_c(float *s, float *row_max, const float *q, const float *kt, int32_t rows,
                 int32_t head_dim)
{
    for (int32_t r = 0; r < rows; r++, s += KV_PAGE_TOKENS, q += head_dim) {
        float top = -INFINITY;
        memset(s, 0, KV_PAGE_TOKENS * sizeof *s);
        for (int32_t j = 0; j < KV_PAGE_TOKENS; j += W)
            multiply(s + j, q, kt + j, KV_PAGE_TOKENS, head_dim);
        for (int32_t j = 0; j < KV_PAGE_TOKENS; j++)
            top = s[j] > top ? s[j] : top;
        row_max[r] = top;
    }
}

static void softmax_c(float *s, float *m, float *l, float *alpha, const float *row_max,
                      int32_t rows)
{
    for (int32_t r = 0; r < rows; r++, s += KV_PAGE_TOKENS) {
        float top = row_max[r] > m[r] ? row_max[r] : m[r];
        float ref = top == -INFINITY ? 0.0f : top;
        float sum = 0.0f;
        for (int32_t j = 0; j < KV_PAGE_TOKENS; j++) {
            s[j] = exp_c(s[j] - ref);
            sum += s[j];
        }
        alpha[r] = top == m[r] ? 1.0f : exp_c(m[r] - ref);
        l[r] = l[r] * alpha[r] + sum;
        m[r] = top;
    }
}

static void pv_c(float *o, const float *p, const float *v, const float *alpha, int32_t rows,
                 int32_t keys, int32_t dv)
{
    for (int32_t r = 0; r < rows; r++, o += dv, p += KV_PAGE_TOKENS) {
        for (int32_t d = 0; d < dv; d++)
            o[d] *= alpha[r];
        for (int32_t d = 0; d < dv; d += W)
            multiply(o + d, p, v + d, dv, keys);
    }
}

static float scalar(const void *src, enum dtype t, size_t i)
{
    return t == DTYPE_F32 ? ((const float *)src)[i] : dtype_bf16_f32(((const uint16_t *)src)[i]);
}

static float pack_k_c(float *kt, const void *k, enum dtype t, int32_t head_dim)
{
    const size_t d = (size_t)head_dim;
    uint32_t top = 0; /* bits of |k|: NaN sorts above infinity, so it is never lost */
    for (size_t j = 0; j < KV_PAGE_TOKENS; j++) {
        for (size_t i = 0; i < d; i++) {
            float x = scalar(k, t, j * d + i);
            uint32_t u = dtype_f32_bits(x) & 0x7fffffffu;
            top = u > top ? u : top;
            kt[i * KV_PAGE_TOKENS + j] = x;
        }
    }
    return dtype_bits_f32(top);
}

static void pack_v_c(float *v, const void *src, enum dtype t, int32_t head_dim)
{
    const size_t d = (size_t)head_dim, dv = (size_t)attn_tile_dv(head_dim);
    for (size_t j = 0; j < KV_PAGE_TOKENS; j++, v += dv) {
        for (size_t i = 0; i < d; i++)
            v[i] = scalar(src, t, j * d + i);
        for (size_t i = d; i < dv; i++)
            v[i] = 0.0f;
    }
}

const struct attn_tile_ops attn_tile_c = {
    .name = "c",
    .pack_k = pack_k_c,
    .pack_v = pack_v_c,
    .qk = qk_c,
    .softmax = softmax_c,
    .pv = pv_c,
};
