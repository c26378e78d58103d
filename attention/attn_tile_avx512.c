/* Tile functions for AVX-512 (F and DQ): 16 floats a vector, 24 accumulators. This file alone is
 * compiled with -mavx512*; see attn_tile.c for when it is used. */
#include <immintrin.h>

#include "attention/attn_exp.h"
#include "attention/attn_pack.h"

enum { VL = 16, NV = 4 };
typedef __m512 vec;

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

#include "attention/attn_tile_simd.h"

const struct attn_tile_ops attn_tile_avx512 = {
    .name = "avx512",
    .pack_k = attn_pack_k_avx2,
    .pack_v = attn_pack_v_avx2,
    .qk = tile_qk,
    .softmax = tile_softmax,
    .pv = tile_pv,
};
