/* One wrapper for each PTX instruction the Hopper kernels use; nothing else lives here.
 * Why not CUTLASS: the kernels need some twenty instructions, and the page gate must control their
 * order exactly. Names follow the PTX ISA (sections 9.7.13 mbarrier, 9.7.9.27 bulk tensor copy,
 * 9.7.15 wgmma, 9.7.19.5 setmaxnreg). */
#ifndef ATTENTION_PTX_CUH
#define ATTENTION_PTX_CUH

#include <cuda.h>
#include <stdint.h>

enum { DT_BF16 = 0, DT_F16 = 1 };

/* L2 hints for bulk tensor copies, as created by createpolicy. */
#define L2_EVICT_FIRST 0x12F0000000000000ull
#define L2_EVICT_LAST  0x14F0000000000000ull

__device__ __forceinline__ uint32_t smem_addr(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* True in one lane of a warp that has converged. */
__device__ __forceinline__ bool elect_one(void)
{
    uint32_t one;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(one));
    return one != 0;
}

/* ---- mbarrier ---- */

__device__ __forceinline__ void mbar_init(uint32_t bar, uint32_t count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

__device__ __forceinline__ void mbar_fence_init(void)
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbar_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}

/* How long a wait may suspend its warp before it looks again: without it the loading warps' waits
 * are a quarter of all instructions. */
#define SUSPEND_NS 1000000

/* Waits until the phase of that parity has completed. */
__device__ __forceinline__ void mbar_wait(uint32_t bar, uint32_t parity)
{
    asm volatile("{\n.reg .pred p;\n"
                 "WAIT:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %2;\n"
                 "@p bra DONE;\n"
                 "bra WAIT;\n"
                 "DONE:\n}" ::"r"(bar),
                 "r"(parity), "r"(SUSPEND_NS)
                 : "memory");
}

/* ---- bulk tensor copies (TMA), global to shared ---- */

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load_3d(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                            int c0, int c1, int c2, uint64_t hint)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "l"(hint)
                 : "memory");
}

__device__ __forceinline__ void tma_load_4d(uint32_t dst, const CUtensorMap *map, uint32_t bar,
                                            int c0, int c1, int c2, int c3, uint64_t hint)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(hint)
                 : "memory");
}

/* Generic-proxy accesses of shared memory before this are ordered before later async-proxy ones. */
__device__ __forceinline__ void fence_proxy_async(void)
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- named barriers ---- */

__device__ __forceinline__ void bar_sync(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Nothing, for a moment. */
__device__ __forceinline__ void nap(void)
{
    asm volatile("nanosleep.u32 0;");
}

/* A barrier of `threads` that also tells whether x holds for any of them. */
__device__ __forceinline__ bool bar_any(int id, int threads, bool x)
{
    uint32_t any;
    asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\n"
                 "bar.red.or.pred q, %2, %3, p;\nselp.u32 %0, 1, 0, q;\n}"
                 : "=r"(any)
                 : "r"((uint32_t)x), "r"(id), "r"(threads)
                 : "memory");
    return any != 0;
}

/* ---- registers ---- */

template <int N>
__device__ __forceinline__ void reg_inc(void)
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void reg_dec(void)
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* ---- arithmetic ---- */

__device__ __forceinline__ float ex2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Maximum that keeps NaN, unlike fmaxf. */
__device__ __forceinline__ float max_nan(float a, float b)
{
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

/* Two floats to one register, lo in the low half. */
template <int DT>
__device__ __forceinline__ uint32_t pack2(float lo, float hi)
{
    uint32_t r;
    if (DT == DT_BF16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    }
    return r;
}

__device__ __forceinline__ int ld_shared_s32(uint32_t src)
{
    int x;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(src) : "memory");
    return x;
}

__device__ __forceinline__ void st_shared_s32(uint32_t dst, int x)
{
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(dst), "r"(x) : "memory");
}

/* gridDim.x, read where it is used and not kept in a register. */
__device__ __forceinline__ uint32_t grid_blocks(void)
{
    uint32_t n;
    asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(n));
    return n;
}

/* ---- asynchronous copies, global to shared, and products of a warp ---- */

__device__ __forceinline__ void cp_async_16(uint32_t dst, const void *src)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}

__device__ __forceinline__ void cp_async_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most N groups of this thread's copies are in flight. */
template <int N>
__device__ __forceinline__ void cp_async_wait(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Four 8x8 matrices of 16-bit elements, one row address a lane. */
__device__ __forceinline__ void ldsm_x4(uint32_t (&r)[4], uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}

/* D[16, 8] += A[16, 16] B[16, 8]. Lane 4 g + t holds rows g and g + 8, columns 2 t and 2 t + 1 of
 * D; of A and B the same pairs along the inner dimension, and those 8 further. */
template <int DT>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t *a, uint32_t b0,
                                          uint32_t b1)
{
    if (DT == DT_BF16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

/* ---- wgmma ---- */

/* Registers written before this may be read by the wgmma that follow. */
__device__ __forceinline__ void wgmma_fence(void)
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most N groups are in flight. */
template <int N>
__device__ __forceinline__ void wgmma_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* Pins registers in program order: the compiler cannot know that wgmma writes them later. */
template <int N>
__device__ __forceinline__ void wgmma_pin(float (&r)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(r[i])::"memory");
}

template <int N>
__device__ __forceinline__ void wgmma_pin(uint32_t (&r)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+r"(r[i])::"memory");
}

/* Zeros written here and not later: accumulators must not be written while products are in flight.
 */
template <int N>
__device__ __forceinline__ void wgmma_zero(float (&r)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("mov.f32 %0, 0f00000000;" : "=f"(r[i])::"memory");
}

/* The lists of 32 and 64 accumulators, as text of the instruction and as operands. */
#define WGMMA_TEXT_32                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                      \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define WGMMA_TEXT_64                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                      \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define WGMMA_OP_4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define WGMMA_OP_16(c, d, i)                                                                       \
    WGMMA_OP_4(c, d, i), WGMMA_OP_4(c, d, i + 4), WGMMA_OP_4(c, d, i + 8), WGMMA_OP_4(c, d, i + 12)
#define WGMMA_OP_32(c, d) WGMMA_OP_16(c, d, 0), WGMMA_OP_16(c, d, 16)
#define WGMMA_OP_64(c, d) WGMMA_OP_32(c, d), WGMMA_OP_16(c, d, 32), WGMMA_OP_16(c, d, 48)

/* D[64, 64] (+)= A[64, 16] B[64, 16]^T, both K-major in shared memory. FIRST: D is overwritten. */
template <int DT, bool FIRST>
__device__ __forceinline__ void wgmma_qk(float (&d)[32], uint64_t a, uint64_t b)
{
#define WGMMA_QK(type, add, c)                                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " WGMMA_TEXT_32     \
                 "%32, %33, " add ", 1, 1, 0, 0;\n"                                                \
                 : WGMMA_OP_32(c, d)                                                               \
                 : "l"(a), "l"(b))
    if (DT == DT_BF16 && FIRST)
        WGMMA_QK("bf16", "0", "=f");
    else if (DT == DT_BF16)
        WGMMA_QK("bf16", "1", "+f");
    else if (FIRST)
        WGMMA_QK("f16", "0", "=f");
    else
        WGMMA_QK("f16", "1", "+f");
#undef WGMMA_QK
}

/* D[64, 128] += A[64, 16] B[16, 128], A in registers, B MN-major in shared memory. */
template <int DT>
__device__ __forceinline__ void wgmma_pv(float (&d)[64], const uint32_t *a, uint64_t b)
{
#define WGMMA_PV(type)                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " WGMMA_TEXT_64    \
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"                                        \
                 : WGMMA_OP_64("+f", d)                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if (DT == DT_BF16)
        WGMMA_PV("bf16");
    else
        WGMMA_PV("f16");
#undef WGMMA_PV
}

/* D[64, 64] += A[64, 16] B[16, 64], likewise. */
template <int DT>
__device__ __forceinline__ void wgmma_pv(float (&d)[32], const uint32_t *a, uint64_t b)
{
#define WGMMA_PV(type)                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " WGMMA_TEXT_32     \
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"                                        \
                 : WGMMA_OP_32("+f", d)                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if (DT == DT_BF16)
        WGMMA_PV("bf16");
    else
        WGMMA_PV("f16");
#undef WGMMA_PV
}

#endif
