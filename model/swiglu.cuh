/* silu(gate) * up, the same bits wherever it is computed. */
#ifndef MODEL_SWIGLU_CUH
#define MODEL_SWIGLU_CUH

__device__ __forceinline__ float swiglu_of(float gate, float up)
{
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

#endif
