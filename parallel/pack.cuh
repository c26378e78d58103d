#ifndef PARALLEL_PACK_CUH
#define PARALLEL_PACK_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

/* 16 bytes as floats, added and packed again. */
template <class T>
struct pack;

template <>
struct pack<float> {
    enum { N = 4 };
    static __device__ __forceinline__ float at(const uint4 &u, int i)
    {
        return __uint_as_float((&u.x)[i]);
    }
    static __device__ __forceinline__ uint4 make(const float *f)
    {
        return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]),
                          __float_as_uint(f[3]));
    }
};

template <class T>
struct pack {
    enum { N = 8 };
    static __device__ __forceinline__ float at(const uint4 &u, int i)
    {
        const unsigned short bits = static_cast<unsigned short>((&u.x)[i / 2] >> (i % 2 * 16));
        return static_cast<float>(reinterpret_cast<const T &>(bits));
    }
    static __device__ __forceinline__ uint4 make(const float *f)
    {
        uint4 u;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const T lo = static_cast<T>(f[2 * i]), hi = static_cast<T>(f[2 * i + 1]);
            (&u.x)[i] = reinterpret_cast<const unsigned short &>(lo) |
                        static_cast<unsigned>(reinterpret_cast<const unsigned short &>(hi)) << 16;
        }
        return u;
    }
};

#endif
