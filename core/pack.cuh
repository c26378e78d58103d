/* 16-bit numbers in device code: W of them are one access (16 bytes for W = 8), arithmetic is in
 * f32. W = 1 is the same code for widths and addresses that do not divide. */
#ifndef CORE_PACK_CUH
#define CORE_PACK_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

enum { PACK = 8 /* of 16-bit numbers in 16 bytes */ };

template <typename T, int W>
struct alignas(sizeof(T) * W) pack {
    T v[W];
};

__device__ __forceinline__ float to_f32(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}

__device__ __forceinline__ float to_f32(__half x)
{
    return __half2float(x);
}

__device__ __forceinline__ float to_f32(float x)
{
    return x;
}

__device__ __forceinline__ void from_f32(__nv_bfloat16 *out, float x)
{
    *out = __float2bfloat16_rn(x);
}

__device__ __forceinline__ void from_f32(__half *out, float x)
{
    *out = __float2half_rn(x);
}

__device__ __forceinline__ void from_f32(float *out, float x)
{
    *out = x;
}

template <int W, typename T>
__device__ __forceinline__ void load_pack(float (&out)[W], const T *p)
{
    const pack<T, W> x = *(const pack<T, W> *)p;
#pragma unroll
    for (int i = 0; i < W; i++)
        out[i] = to_f32(x.v[i]);
}

template <int W, typename T>
__device__ __forceinline__ void store_pack(T *p, const float (&x)[W])
{
    pack<T, W> out;
#pragma unroll
    for (int i = 0; i < W; i++)
        from_f32(&out.v[i], x[i]);
    *(pack<T, W> *)p = out;
}

template <int W, typename T>
__device__ __forceinline__ void clear_pack(T *p)
{
    if (W == PACK)
        *(uint4 *)p = make_uint4(0, 0, 0, 0);
    else
        store_pack<W>(p, {});
}

/* f32 tables and biases read by everyone: through the read-only cache. */
template <int W>
__device__ __forceinline__ void load_table(float (&out)[W], const float *p)
{
    if (W % 4 == 0) {
#pragma unroll
        for (int i = 0; i < W; i += 4) {
            const float4 x = __ldg((const float4 *)(p + i));
            out[i] = x.x, out[i + 1] = x.y, out[i + 2] = x.z, out[i + 3] = x.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < W; i++)
            out[i] = __ldg(p + i);
    }
}

/* Sixteen-byte accesses are possible; NULL is. */
__host__ __device__ __forceinline__ bool aligned16(const void *p)
{
    return ((uintptr_t)p & 15) == 0;
}

#endif
