/* Tile functions for AVX2 with FMA: 8 floats a vector, 12 accumulators. This file alone is compiled
 * with -mavx2 -mfma; see attn_tile.c for when it is used. */
#include <immintrin.h>

#include "attention/attn_exp.h"

#include <stdint.h>

enum { VL = 8, NV = 2 };
typedef __m256 vec;
typedef __m256i veci;

#define VEC_FN static inline __attribute__((always_inline))

VEC_FN vec vec_zero(void)
{
    return _mm256_setzero_ps();
}

VEC_FN vec vec_set1(float x)
{
    return _mm256_set1_ps(x);
}

VEC_FN vec vec_load(const float *p)
{
    return _mm256_loadu_ps(p);
}

VEC_FN vec vec_load_bf16(const uint16_t *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

VEC_FN void vec_store(float *p, vec x)
{
    _mm256_storeu_ps(p, x);
}

VEC_FN vec vec_mul(vec a, vec b)
{
    return _mm256_mul_ps(a, b);
}

VEC_FN vec vec_add(vec a, vec b)
{
    return _mm256_add_ps(a, b);
}

VEC_FN vec vec_sub(vec a, vec b)
{
    return _mm256_sub_ps(a, b);
}

VEC_FN vec vec_max(vec a, vec b)
{
    return _mm256_max_ps(a, b);
}

VEC_FN vec vec_fma(vec a, vec b, vec c)
{
    return _mm256_fmadd_ps(a, b, c);
}

VEC_FN float vec_first(vec x)
{
    return _mm256_cvtss_f32(x);
}

VEC_FN float vec_hmax(vec x)
{
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}

VEC_FN float vec_hsum(vec x)
{
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}

/* The comparison is true for NaN too ("not less than, unordered"), so NaN comes through. */
VEC_FN vec vec_exp(vec t)
{
    vec live = _mm256_cmp_ps(t, _mm256_set1_ps(EXP_LO), _CMP_NLT_UQ);
    const vec log2e = _mm256_set1_ps(EXP_LOG2E);
    vec n = _mm256_round_ps(_mm256_mul_ps(t, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec r = _mm256_fnmadd_ps(n, _mm256_set1_ps(EXP_LN2_HI), t);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(EXP_LN2_LO), r);
    vec p = _mm256_set1_ps(EXP_C6);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_C5));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_C4));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_C3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    veci e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_and_ps(live, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), e)));
}

VEC_FN veci veci_zero(void)
{
    return _mm256_setzero_si256();
}

VEC_FN veci vec_abs_max_bits(vec x, veci top)
{
    veci abs = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_max_epi32(abs, top);
}

VEC_FN uint32_t veci_hmax(veci x)
{
    int32_t lane[VL], top = 0;
    _mm256_storeu_si256((veci *)lane, x);
    for (int i = 0; i < VL; i++)
        top = lane[i] > top ? lane[i] : top;
    return (uint32_t)top;
}

/* 8 x 8: pairs and quads within 128-bit lanes, then the lanes. */
VEC_FN void vec_transpose(vec x[VL])
{
    vec t[VL];
#pragma GCC unroll 2
    for (int i = 0; i < VL; i += 4) {
        vec a = _mm256_unpacklo_ps(x[i], x[i + 1]), b = _mm256_unpackhi_ps(x[i], x[i + 1]);
        vec c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]), d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}

#include "attention/attn_tile_simd.h"

const struct attn_tile_ops attn_tile_avx2 = {
    .name = "avx2",
    .pack_k = tile_pack_k,
    .pack_v = tile_pack_v,
    .qk = tile_qk,
    .softmax = tile_softmax,
    .pv = tile_pv,
};
