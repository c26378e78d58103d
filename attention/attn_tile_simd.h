/* The tile functions, written once over a vector type. Included by attn_tile_avx2.c and
 * attn_tile_avx512.c after they have defined
 *   vec, VL (floats in it), NV (vectors across a register tile: ROW_TILE * NV accumulators)
 *   vec_zero set1 load store mul sub add max fma exp, hmax hsum first
 * The including file is compiled for its instruction set; nothing here is called on another.
 *
 * Register tile: 6 rows x NV vectors. Each accumulator runs over the inner dimension alone and in
 * order, which is all that row independence asks for. With 24 accumulators (AVX-512) a step is 4
 * loads, 6 broadcasts and 24 FMAs. */
#include "attention/attn_exp.h"
#include "attention/attn_tile.h"

#include <math.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#    define UNROLL _Pragma("clang loop unroll(full)")
#else
#    define UNROLL _Pragma("GCC unroll 16")
#endif

enum { ROW_TILE = 6 };

/* a [rows, lda] times b [n, ldb], columns 0 .. nv * VL - 1. */
struct product {
    const float *a, *b;
    int32_t lda, ldb, n;
};

INLINE void multiply(vec *acc, int mr, int nv, struct product x)
{
    for (int32_t i = 0; i < x.n; i++) {
        vec b[NV];
        UNROLL
        for (int c = 0; c < nv; c++)
            b[c] = vec_load(x.b + (size_t)i * (size_t)x.ldb + (size_t)c * VL);
        UNROLL
        for (int r = 0; r < mr; r++) {
            vec a = vec_set1(x.a[(size_t)r * (size_t)x.lda + (size_t)i]);
            UNROLL
            for (int c = 0; c < nv; c++)
                acc[r * nv + c] = vec_fma(a, b[c], acc[r * nv + c]);
        }
    }
}

/* mr rows of scores; a row's maximum is gathered while the scores are still in registers. */
INLINE void qk_rows(float *s, float *row_max, struct product x, int mr)
{
    for (int32_t j = 0; j < KV_PAGE_TOKENS; j += NV * VL) {
        vec acc[ROW_TILE * NV];
        UNROLL
        for (int i = 0; i < mr * NV; i++)
            acc[i] = vec_zero();
        multiply(acc, mr, NV, (struct product){x.a, x.b + j, x.lda, x.ldb, x.n});
        UNROLL
        for (int r = 0; r < mr; r++) {
            vec top = acc[(size_t)r * NV];
            UNROLL
            for (int c = 0; c < NV; c++) {
                vec_store(s + (size_t)r * KV_PAGE_TOKENS + j + (ptrdiff_t)c * VL, acc[r * NV + c]);
                top = vec_max(top, acc[r * NV + c]);
            }
            float t = vec_hmax(top);
            row_max[r] = j == 0 || t > row_max[r] ? t : row_max[r];
        }
    }
}

static void tile_qk(float *s, float *row_max, const float *q, const float *kt, int32_t rows,
                    int32_t head_dim)
{
    for (int32_t r = 0, n; r < rows; r += n) {
        struct product x = {q + (size_t)r * (size_t)head_dim, kt, head_dim, KV_PAGE_TOKENS,
                            head_dim};
        float *out = s + (size_t)r * KV_PAGE_TOKENS;
        n = rows - r < ROW_TILE ? rows - r : ROW_TILE;
        switch (n) {
        case 1: qk_rows(out, row_max + r, x, 1); break;
        case 2: qk_rows(out, row_max + r, x, 2); break;
        case 3: qk_rows(out, row_max + r, x, 3); break;
        case 4: qk_rows(out, row_max + r, x, 4); break;
        case 5: qk_rows(out, row_max + r, x, 5); break;
        default: qk_rows(out, row_max + r, x, ROW_TILE); break;
        }
    }
}

INLINE void pv_columns(float *o, int32_t dv, const float *alpha, struct product x, int mr, int nv)
{
    vec acc[ROW_TILE * NV];
    UNROLL
    for (int r = 0; r < mr; r++) {
        vec f = vec_set1(alpha[r]);
        UNROLL
        for (int c = 0; c < nv; c++)
            acc[r * nv + c] = vec_mul(f, vec_load(o + (size_t)r * (size_t)dv + (size_t)c * VL));
    }
    multiply(acc, mr, nv, x);
    UNROLL
    for (int r = 0; r < mr; r++) {
        UNROLL
        for (int c = 0; c < nv; c++)
            vec_store(o + (size_t)r * (size_t)dv + (size_t)c * VL, acc[r * nv + c]);
    }
}

INLINE void pv_rows(float *o, int32_t dv, const float *alpha, struct product x, int mr)
{
    int32_t d = 0;
    const float *v = x.b;
    for (; d + NV * VL <= dv; d += NV * VL) {
        x.b = v + d;
        pv_columns(o + d, dv, alpha, x, mr, NV);
    }
    for (; d + VL <= dv; d += VL) {
        x.b = v + d;
        pv_columns(o + d, dv, alpha, x, mr, 1);
    }
}

static void tile_pv(float *o, const float *p, const float *v, const float *alpha, int32_t rows,
                    int32_t keys, int32_t dv)
{
    for (int32_t r = 0, n; r < rows; r += n) {
        struct product x = {p + (size_t)r * KV_PAGE_TOKENS, v, KV_PAGE_TOKENS, dv, keys};
        float *out = o + (size_t)r * (size_t)dv;
        n = rows - r < ROW_TILE ? rows - r : ROW_TILE;
        switch (n) {
        case 1: pv_rows(out, dv, alpha + r, x, 1); break;
        case 2: pv_rows(out, dv, alpha + r, x, 2); break;
        case 3: pv_rows(out, dv, alpha + r, x, 3); break;
        case 4: pv_rows(out, dv, alpha + r, x, 4); break;
        case 5: pv_rows(out, dv, alpha + r, x, 5); break;
        default: pv_rows(out, dv, alpha + r, x, ROW_TILE); break;
        }
    }
}

/* ref is m', or 0 where the row has seen nothing but -inf: then every p is 0, as it should. */
static void tile_softmax(float *s, float *m, float *l, float *alpha, const float *row_max,
                         int32_t rows)
{
    enum { N = KV_PAGE_TOKENS / VL };
    for (int32_t r = 0; r < rows; r++, s += KV_PAGE_TOKENS) {
        float top = row_max[r] > m[r] ? row_max[r] : m[r];
        float ref = top == -INFINITY ? 0.0f : top;
        vec base = vec_set1(ref), sum = vec_zero();
        UNROLL
        for (int c = 0; c < N; c++) {
            vec p = vec_exp(vec_sub(vec_load(s + (size_t)c * VL), base));
            vec_store(s + (size_t)c * VL, p);
            sum = vec_add(sum, p);
        }
        alpha[r] = top == m[r] ? 1.0f : vec_first(vec_exp(vec_set1(m[r] - ref)));
        l[r] = l[r] * alpha[r] + vec_hsum(sum);
        m[r] = top;
    }
}
