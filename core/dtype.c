#include "core/dtype.h"

void dtype_to_f32(float *dst, const void *src, enum dtype t, size_t n)
{
    const uint16_t *h = src;
    switch (t) {
    case DTYPE_F32: memcpy(dst, src, n * sizeof *dst); break;
    case DTYPE_F16:
        for (size_t i = 0; i < n; i++)
            dst[i] = dtype_f16_f32(h[i]);
        break;
    case DTYPE_BF16:
        for (size_t i = 0; i < n; i++)
            dst[i] = dtype_bf16_f32(h[i]);
        break;
    }
}

void dtype_from_f32(void *dst, enum dtype t, const float *src, size_t n)
{
    uint16_t *h = dst;
    switch (t) {
    case DTYPE_F32: memcpy(dst, src, n * sizeof *src); break;
    case DTYPE_F16:
        for (size_t i = 0; i < n; i++)
            h[i] = dtype_f32_f16(src[i]);
        break;
    case DTYPE_BF16:
        for (size_t i = 0; i < n; i++)
            h[i] = dtype_f32_bf16(src[i]);
        break;
    }
}
