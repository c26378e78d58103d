/* Instructions of gemm_decode.cu: wgmma with x as its narrow operand, bulk tensor copies of two
 * dimensions, clusters. Names follow the PTX ISA, as in attention/ptx.cuh. */
#ifndef MODEL_GEMM_DECODE_CUH
#define MODEL_GEMM_DECODE_CUH

#include "attention/ptx.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

/* D[64, N] += A[64, 16] B[N, 16]^T, both K-major in shared memory; N = 16 or 32 by the width of D.
 */
#define WGMMA_16(type)                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type                       \
                 " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, 0, 0;\n"                     \
                 : WGMMA_OP_4("+f", d, 0), WGMMA_OP_4("+f", d, 4)                                  \
                 : "l"(a), "l"(b))
#define WGMMA_32(type)                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                       \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "       \
                 "%16, %17, 1, 1, 1, 0, 0;\n"                                                      \
                 : WGMMA_OP_16("+f", d, 0)                                                         \
                 : "l"(a), "l"(b))

__device__ __forceinline__ void wgmma_rows(float (&d)[8], uint64_t a, uint64_t b, __nv_bfloat16)
{
    WGMMA_16("bf16");
}

__device__ __forceinline__ void wgmma_rows(float (&d)[8], uint64_t a, uint64_t b, __half)
{
    WGMMA_16("f16");
}

__device__ __forceinline__ void wgmma_rows(float (&d)[16], uint64_t a, uint64_t b, __nv_bfloat16)
{
    WGMMA_32("bf16");
}

__device__ __forceinline__ void wgmma_rows(float (&d)[16], uint64_t a, uint64_t b, __half)
{
    WGMMA_32("f16");
}

#undef WGMMA_16
#undef WGMMA_32

__device__ __forceinline__ void tma_load_2d(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                            int c0, int c1, uint64_t hint)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "l"(hint)
                 : "memory");
}

/* ---- clusters ---- */

/* Of all threads of all its blocks; orders nothing. */
__device__ __forceinline__ void cluster_sync(void)
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

/* At the same barrier of another thread block, which must not be gone. */
__device__ __forceinline__ void mbar_arrive_at(uint32_t bar, uint32_t block)
{
    asm volatile("{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [a];\n}" ::"r"(bar),
                 "r"(block)
                 : "memory");
}

/* The same place in the shared memory of another thread block. */
__device__ __forceinline__ uint32_t shared_of_block(uint32_t addr, uint32_t block)
{
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(addr), "r"(block));
    return there;
}

/* 16 bytes into another thread block; its barrier counts them. */
__device__ __forceinline__ void store_async(uint32_t there, float x, float y, float z, float w,
                                            uint32_t bar_there)
{
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, "
                 "%3, %4}, [%5];" ::"r"(there),
                 "f"(x), "f"(y), "f"(z), "f"(w), "r"(bar_there)
                 : "memory");
}

#endif
