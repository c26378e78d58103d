/* Tile functions for AVX2 with FMA: 8 floats a vector, 12 accumulators. This file alone is compiled
 * with -mavx2 -mfma; see attn_tile.c for when it is used. */
#include <immintrin.h>

#include "attention/attn_exp.h"
#include "attention/attn_pack.h"

enum { VL = 8, NV = 2 };
typedef __m256 vec;

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
    __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_and_ps(live, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), e)));
}

#include "attention/attn_tile_simd.h"

const struct attn_tile_ops attn_tile_avx2 = {
    .name = "avx2",
    .pack_k = attn_pack_k_avx2,
    .pack_v = attn_pack_v_avx2,
    .qk = tile_qk,
    .softmax = tile_softmax,
    .pv = tile_pv,
};
