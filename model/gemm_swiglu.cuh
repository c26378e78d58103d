/* Instructions of gemm_swiglu.cu beyond those of gemm_decode.cuh: wgmma over 256 columns, bulk
 * tensor copies to several thread blocks of a cluster and out of shared memory. Names follow the
 * PTX ISA, as in attention/ptx.cuh. */
#ifndef MODEL_GEMM_SWIGLU_CUH
#define MODEL_GEMM_SWIGLU_CUH

#include "model/gemm_decode.cuh"

/* D[64, 256] += A[64, 16] B[256, 16]^T, both K-major in shared memory. */
#define WGMMA_256(type)                                                                            \
    asm volatile(                                                                                  \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                               \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                 \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "         \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "         \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "         \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "         \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "         \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
        "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "     \
        "%125, %126, %127}, %128, %129, 1, 1, 1, 0, 0;\n"                                          \
        : WGMMA_OP_64("+f", d), WGMMA_OP_64("+f", (d + 64))                                        \
        : "l"(a), "l"(b))

__device__ __forceinline__ void wgmma_256(float (&d)[128], uint64_t a, uint64_t b, __nv_bfloat16)
{
    WGMMA_256("bf16");
}

__device__ __forceinline__ void wgmma_256(float (&d)[128], uint64_t a, uint64_t b, __half)
{
    WGMMA_256("f16");
}

#undef WGMMA_256

/* To the same place in the thread blocks of the mask, and bytes to the barriers there. */
__device__ __forceinline__ void tma_load_2d_cluster(uint32_t dst, const CUtensorMap *map,
                                                    uint32_t bar, int c0, int c1, uint16_t blocks)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "h"(blocks)
                 : "memory");
}

/* Of the box, what lies within the matrix. In this thread's bulk group. */
__device__ __forceinline__ void tma_store_2d(const CUtensorMap *map, uint32_t src, int c0, int c1)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
        "r"(src), "r"(c0), "r"(c1)
        : "memory");
}

__device__ __forceinline__ void tma_store_commit(void)
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Until shared memory may be written again. */
__device__ __forceinline__ void tma_store_wait_read(void)
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ void tma_store_wait(void)
{
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#endif
