/* Number formats on disk and in the cache, and their exact conversions. */
#ifndef CORE_DTYPE_H
#define CORE_DTYPE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum dtype { DTYPE_F32, DTYPE_F16, DTYPE_BF16 };

static inline size_t dtype_bytes(enum dtype t)
{
    return t == DTYPE_F32 ? 4 : 2;
}

static inline const char *dtype_name(enum dtype t)
{
    static const char *const text[] = {"f32", "f16", "bf16"};
    return text[t];
}

static inline float dtype_bits_f32(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline uint32_t dtype_f32_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float dtype_bf16_f32(uint16_t b)
{
    return dtype_bits_f32((uint32_t)b << 16);
}

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t dtype_f32_bf16(float f)
{
    uint32_t u = dtype_f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float dtype_f16_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exp = (h >> 10) & 0x1fu;
    uint32_t man = h & 0x3ffu;
    if (exp == 0) { /* zero or subnormal: man * 2^-24 */
        float v = (float)man * 0x1p-24f;
        return sign ? -v : v;
    }
    if (exp == 31)
        return dtype_bits_f32(sign | 0x7f800000u | (man << 13));
    return dtype_bits_f32(sign | ((exp + 112u) << 23) | (man << 13));
}

/* Round to nearest even; over 65504 becomes infinite, NaN stays NaN. */
static inline uint16_t dtype_f32_f16(float f)
{
    const uint32_t u = dtype_f32_bits(f), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
    if (mag > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u);
    if (mag >= 0x47800000u) /* 65536 and more */
        return (uint16_t)(sign | 0x7c00u);
    if (mag < 0x38800000u) { /* subnormal: adding 0.5 leaves multiples of 2^-24 in the low bits */
        const float half = dtype_bits_f32(mag) + 0.5f;
        return (uint16_t)(sign | (dtype_f32_bits(half) - 0x3f000000u));
    }
    /* a mantissa that rounds up carries into the exponent, at the top into infinity */
    return (uint16_t)(sign | ((mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13));
}

/* Any format to f32; src holds n values of type t. */
void dtype_to_f32(float *dst, const void *src, enum dtype t, size_t n);
/* f32 to any format. */
void dtype_from_f32(void *dst, enum dtype t, const float *src, size_t n);

#endif
