/* Tile functions for AVX-512 (F and DQ): 16 floats a vector, 24 accumulators. This file alone is
 * compiled with -mavx512*; see attn_tile.c for when it is used. */
#include <immintrin.h>

#include "attention/attn_exp.h"

#include <stdint.h>

enum { VL = 16, NV = 4 };
typedef __m512 vec;
typedef __m512i veci;

#define VEC_FN static inline __attribute__((always_inline))

VEC_FN vec vec_zero(void)
{
    return _mm512_setzero_ps();
}

VEC_FN vec vec_set1(float x)
{
    return _mm512_set1_ps(x);
}

VEC_FN vec vec_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

VEC_FN vec vec_load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

VEC_FN void vec_store(float *p, vec x)
{
    _mm512_storeu_ps(p, x);
}

VEC_FN vec vec_mul(vec a, vec b)
{
    return _mm512_mul_ps(a, b);
}

VEC_FN vec vec_add(vec a, vec b)
{
    return _mm512_add_ps(a, b);
}

VEC_FN vec vec_sub(vec a, vec b)
{
    return _mm512_sub_ps(a, b);
}

VEC_FN vec vec_max(vec a, vec b)
{
    return _mm512_max_ps(a, b);
}

VEC_FN vec vec_fma(vec a, vec b, vec c)
{
    return _mm512_fmadd_ps(a, b, c);
}

VEC_FN float vec_first(vec x)
{
    return _mm512_cvtss_f32(x);
}

VEC_FN float vec_hmax(vec x)
{
    return _mm512_reduce_max_ps(x);
}

VEC_FN float vec_hsum(vec x)
{
    return _mm512_reduce_add_ps(x);
}

/* The mask is true for NaN too ("not less than, unordered"), so NaN comes through. */
VEC_FN vec vec_exp(vec t)
{
    __mmask16 live = _mm512_cmp_ps_mask(t, _mm512_set1_ps(EXP_LO), _CMP_NLT_UQ);
    const vec log2e = _mm512_set1_ps(EXP_LOG2E);
    vec n = _mm512_roundscale_ps(_mm512_mul_ps(t, log2e),
                                 _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec r = _mm512_fnmadd_ps(n, _mm512_set1_ps(EXP_LN2_HI), t);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(EXP_LN2_LO), r);
    vec p = _mm512_set1_ps(EXP_C6);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_C3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(live, p, n);
}

VEC_FN veci veci_zero(void)
{
    return _mm512_setzero_si512();
}

VEC_FN veci vec_abs_max_bits(vec x, veci top)
{
    veci abs = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    return _mm512_max_epi32(abs, top);
}

VEC_FN uint32_t veci_hmax(veci x)
{
    return (uint32_t)_mm512_reduce_max_epi32(x);
}

/* 16 x 16 in four stages: pairs and quads within 128-bit lanes, then the lanes themselves. */
VEC_FN void vec_transpose(vec x[VL])
{
    vec t[VL];
#pragma GCC unroll 4
    for (int i = 0; i < VL; i += 4) {
        vec a = _mm512_unpacklo_ps(x[i], x[i + 1]), b = _mm512_unpackhi_ps(x[i], x[i + 1]);
        vec c = _mm512_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
        t[i] = _mm512_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vec a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
        vec b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
        vec c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
        vec d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
        x[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        x[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
        x[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
        x[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

#include "attention/attn_tile_simd.h"

const struct attn_tile_ops attn_tile_avx512 = {
    .name = "avx512",
    .pack_k = tile_pack_k,
    .pack_v = tile_pack_v,
    .qk = tile_qk,
    .softmax = tile_softmax,
    .pv = tile_pv,
};
