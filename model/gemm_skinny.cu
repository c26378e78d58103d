/* See gemm_skinny.h. A thread block makes 16 MT columns of y, for up to 8 NT rows. Its eight warps
 * share out k in chunks of 128 and add up their parts at the end. w is the A operand of the tensor
 * core (m16n8k16: 16 rows of w, 8 rows of x), straight from memory: each thread reads 16 bytes, 8
 * neighbours along k, of rows g and g + 8, where the instruction wants pairs that lie 8 apart. The
 * order of k is free as long as x is read alike, so pairs 0 and 1 of the eight feed one instruction
 * and pairs 2 and 3 the next. Four lanes read 64 contiguous bytes of a row.
 *
 * Before it waits for the kernel before it, a thread block asks for the first chunks of w.
 *
 * Bound by memory: a warp has 4 MT KiB of w on its way, a multiprocessor 64 KiB and more. */
#include "core/pack.cuh"
#include "model/gemm_skinny.h"

#include <cuda_runtime.h>

enum { WARPS = 8, BLOCKS_K = 4 /* of 32 in a chunk */, CHUNK = 32 * BLOCKS_K };

__device__ __forceinline__ void from_f32(float *out, float x)
{
    *out = x;
}

__device__ __forceinline__ uint4 load_once(const void *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* Until the kernel before this one has finished and its writes can be read. */
__device__ __forceinline__ void wait_for_inputs(void)
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1, __nv_bfloat16)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, "
                 "%6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1, __half)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, "
                 "%6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Asks for the warp's first chunk of w, a line of 128 bytes a lane: it does not depend on the
 * kernel before this one. */
template <typename T, int MT>
__device__ __forceinline__ void prefetch(const T *w, int n, int k, int first)
{
    const int lane = threadIdx.x & 31, at = (threadIdx.x >> 5) * CHUNK + lane % 2 * 64;
#pragma unroll
    for (int i = 0; i < MT; i++) {
        const int row = first + 16 * i + lane / 2;
        if (at < k && row < n)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(w + (size_t)row * k + at));
    }
}

/* This warp's part of the products, in the layout of the accumulators. */
template <typename T, int MT, int NT>
__device__ __forceinline__ void multiply(float (&acc)[MT][NT][4], const T *x, const T *w, int rows,
                                         int n, int k, int first)
{
    const int warp = threadIdx.x >> 5, group = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    for (int at = warp * CHUNK; at < k; at += WARPS * CHUNK) {
        uint4 a[BLOCKS_K][MT][2], b[BLOCKS_K][NT];
#pragma unroll
        for (int u = 0; u < BLOCKS_K; u++) {
            const int kk = at + 32 * u + 8 * quad;
#pragma unroll
            for (int i = 0; i < 2 * MT; i++) {
                const int row = first + 8 * i + group;
                a[u][i / 2][i % 2] = kk < k && row < n ? load_once(w + (size_t)row * k + kk) : zero;
            }
        }
#pragma unroll
        for (int u = 0; u < BLOCKS_K; u++) {
            const int kk = at + 32 * u + 8 * quad;
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const int row = 8 * j + group;
                b[u][j] = kk < k && row < rows ? *(const uint4 *)(x + (size_t)row * k + kk) : zero;
            }
        }
#pragma unroll
        for (int u = 0; u < BLOCKS_K; u++) {
#pragma unroll
            for (int i = 0; i < MT; i++) {
                const uint4 lo = a[u][i][0], hi = a[u][i][1];
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    mma(acc[i][j], lo.x, hi.x, lo.y, hi.y, b[u][j].x, b[u][j].y, T());
                    mma(acc[i][j], lo.z, hi.z, lo.w, hi.w, b[u][j].z, b[u][j].w, T());
                }
            }
        }
    }
}

template <typename T, typename Y, int MT, int NT>
__global__ void __launch_bounds__(32 * WARPS, 2) skinny(struct gemm_skinny p)
{
    enum { COLS = 16 * MT, ROWS = 8 * NT, PITCH = COLS + 1 };
    __shared__ float part[WARPS][ROWS][PITCH];
    const int warp = threadIdx.x >> 5, group = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
    const int first = blockIdx.x * COLS;
    float acc[MT][NT][4] = {};

    prefetch<T, MT>((const T *)p.w, p.n, p.k, first);
    wait_for_inputs();
    multiply<T, MT, NT>(acc, (const T *)p.x, (const T *)p.w, p.rows, p.n, p.k, first);
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++)
                part[warp][8 * j + 2 * quad + e % 2][16 * i + 8 * (e / 2) + group] = acc[i][j][e];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < COLS * ROWS; i += 32 * WARPS) {
        const int row = i / COLS, col = i % COLS;
        float sum = 0.0f;
#pragma unroll
        for (int o = 0; o < WARPS; o++)
            sum += part[o][row][col];
        if (row < p.rows && first + col < p.n)
            from_f32((Y *)p.y + (size_t)row * p.n + first + col, sum);
    }
}

template <typename T, typename Y, int MT, int NT>
static int launch(const struct gemm_skinny *p, void *stream)
{
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)((p->n + 16 * MT - 1) / (16 * MT)));
    config.blockDim = dim3(32 * WARPS);
    config.stream = (cudaStream_t)stream;
    config.attrs = &early;
    config.numAttrs = 1;
    return (int)cudaLaunchKernelEx(&config, skinny<T, Y, MT, NT>, *p);
}

template <typename T, typename Y>
static int choose(const struct gemm_skinny *p, int variant, void *stream)
{
    if (p->rows > 8)
        return variant == 1 ? launch<T, Y, 1, 2>(p, stream) : launch<T, Y, 2, 2>(p, stream);
    return variant == 1 ? launch<T, Y, 1, 1>(p, stream) : launch<T, Y, 2, 1>(p, stream);
}

template <typename T>
static int choose_y(const struct gemm_skinny *p, int variant, int y_f32, void *stream)
{
    return y_f32 ? choose<T, float>(p, variant, stream) : choose<T, T>(p, variant, stream);
}

extern "C" int gemm_skinny_launch(const struct gemm_skinny *p, int variant, int dtype, int y_f32,
                                  void *stream)
{
    if (p->rows < 1 || p->rows > GEMM_SKINNY_ROWS || p->k % 8 || variant < 1 ||
        variant > GEMM_SKINNY_VARIANTS)
        return (int)cudaErrorInvalidValue;
    return dtype == 0 ? choose_y<__nv_bfloat16>(p, variant, y_f32, stream)
                      : choose_y<__half>(p, variant, y_f32, stream);
}
