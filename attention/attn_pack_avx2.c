/* A page's keys, transposed, and its values, padded: bf16 becomes f32 on the way. The AVX-512 table
 * uses these too: transposing 8 x 8 takes 3 shuffles of half a vector where 16 x 16 takes 4 of a
 * whole one, and where 512-bit shuffles run at half the rate (Zen 4) that is 0.22 us against 0.40
 * us for a page of head_dim 64. */
#include <immintrin.h>

#include "attention/attn_pack.h"
#include "attention/attn_tile.h"

enum { VL = 8 };

#define INLINE static inline __attribute__((always_inline))

INLINE __m256 load(const void *src, enum dtype t, size_t i)
{
    if (t == DTYPE_F32)
        return _mm256_loadu_ps((const float *)src + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)src + i));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE float load_one(const void *src, enum dtype t, size_t i)
{
    return t == DTYPE_F32 ? ((const float *)src)[i] : dtype_bf16_f32(((const uint16_t *)src)[i]);
}

/* Integer maximum of |x|'s bits: NaN sorts above infinity, so it is never lost. */
INLINE __m256i max_bits(__m256 x, __m256i top)
{
    __m256i abs = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_max_epi32(abs, top);
}

static uint32_t widest(__m256i x)
{
    uint32_t lane[VL], top = 0;
    _mm256_storeu_si256((__m256i *)lane, x);
    for (int i = 0; i < VL; i++)
        top = lane[i] > top ? lane[i] : top;
    return top;
}

/* 8 x 8: pairs and quads within 128-bit lanes, then the lanes. */
INLINE void transpose(__m256 x[VL])
{
    __m256 t[VL];
#pragma GCC unroll 2
    for (int i = 0; i < VL; i += 4) {
        __m256 a = _mm256_unpacklo_ps(x[i], x[i + 1]);
        __m256 b = _mm256_unpackhi_ps(x[i], x[i + 1]);
        __m256 c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]);
        __m256 d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);
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

INLINE float pack_k(float *kt, const void *k, enum dtype t, int32_t head_dim)
{
    const size_t d = (size_t)head_dim, whole = d / VL * VL;
    __m256i bits = _mm256_setzero_si256();
    for (size_t i = 0; i < whole; i += VL) {
        for (size_t j = 0; j < KV_PAGE_TOKENS; j += VL) {
            __m256 x[VL];
#pragma GCC unroll 8
            for (size_t r = 0; r < VL; r++) {
                x[r] = load(k, t, (j + r) * d + i);
                bits = max_bits(x[r], bits);
            }
            transpose(x);
#pragma GCC unroll 8
            for (size_t r = 0; r < VL; r++)
                _mm256_storeu_ps(kt + (i + r) * KV_PAGE_TOKENS + j, x[r]);
        }
    }
    uint32_t top = widest(bits);
    for (size_t i = whole; i < d; i++) {
        for (size_t j = 0; j < KV_PAGE_TOKENS; j++) {
            float x = load_one(k, t, j * d + i);
            uint32_t u = dtype_f32_bits(x) & 0x7fffffffu;
            top = u > top ? u : top;
            kt[i * KV_PAGE_TOKENS + j] = x;
        }
    }
    return dtype_bits_f32(top);
}

/* The type is a constant in each call, so that the loops above do not ask for it. */
float attn_pack_k_avx2(float *kt, const void *k, enum dtype t, int32_t head_dim)
{
    return t == DTYPE_F32 ? pack_k(kt, k, DTYPE_F32, head_dim)
                          : pack_k(kt, k, DTYPE_BF16, head_dim);
}

void attn_pack_v_avx2(float *v, const void *src, enum dtype t, int32_t head_dim)
{
    const size_t d = (size_t)head_dim, dv = (size_t)attn_tile_dv(head_dim);
    const size_t whole = d / VL * VL;
    for (size_t j = 0; j < KV_PAGE_TOKENS; j++, v += dv) {
        for (size_t i = 0; i < whole; i += VL)
            _mm256_storeu_ps(v + i, load(src, t, j * d + i));
        for (size_t i = whole; i < d; i++)
            v[i] = load_one(src, t, j * d + i);
        for (size_t i = d; i < dv; i++)
            v[i] = 0.0f;
    }
}
