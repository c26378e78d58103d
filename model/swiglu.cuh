/* What is done at the end of a product, the same bits wherever it is computed. */
#ifndef MODEL_SWIGLU_CUH
#define MODEL_SWIGLU_CUH

#include "core/pack.cuh"

/* A sum as it reads after rounding to T, with its bias. */
template <typename T>
__device__ __forceinline__ float rounded(float x, const void *bias, int col)
{
    T y;
    from_f32(&y, x);
    return to_f32(y) + (bias ? to_f32(((const T *)bias)[col]) : 0.0f);
}

/* silu(gate) * up. */
__device__ __forceinline__ float swiglu_of(float gate, float up)
{
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

#endif
