/* Row-wise and pointwise kernels, all limited by memory bandwidth: every operand is read once in
 * 16-byte accesses, and what a kernel needs twice stays in registers. Shapes of the grid depend on
 * the width alone, so that a row's sums are added in the same order whatever the batch. */
#include "core/early.cuh"
#include "core/pack.cuh"
#include "model/nn_cuda.h"
#include "model/swiglu.cuh"

#include <cuda_runtime.h>

enum { MAX_WARPS = 32, THREADS = 256, FILL_BLOCKS = 2048 };

/* Runs CALL with T as the number format and W as the pack. */
#define DISPATCH(dtype, wide, CALL)                                                                \
    do {                                                                                           \
        if ((dtype) == 0 && (wide))                                                                \
            CALL(__nv_bfloat16, PACK);                                                             \
        else if ((dtype) == 0)                                                                     \
            CALL(__nv_bfloat16, 1);                                                                \
        else if (wide)                                                                             \
            CALL(__half, PACK);                                                                    \
        else                                                                                       \
            CALL(__half, 1);                                                                       \
    } while (0)

static unsigned blocks_for(int64_t n, int per_block)
{
    return (unsigned)((n + per_block - 1) / per_block);
}

/* A row-wise launch: row blockIdx.x, pack blockIdx.y * blockDim.x + threadIdx.x of `chunks`. */
struct row_shape {
    int chunks;
    unsigned threads;
    dim3 grid;
};

static struct row_shape shape_rows(int32_t n, int32_t width, bool wide)
{
    struct row_shape s;
    s.chunks = wide ? width / PACK : width;
    s.threads = s.chunks < THREADS ? (unsigned)(s.chunks + 31) / 32 * 32 : THREADS;
    s.grid = dim3((unsigned)n, blocks_for(s.chunks, (int)s.threads));
    return s;
}

/* ---- gather ---- */

template <typename T, int W>
__global__ void __launch_bounds__(THREADS)
    gather(T *out, const T *table, const int32_t *ids, int chunks, int32_t n_table)
{
    const int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= chunks)
        return;
    const int32_t id = ids[blockIdx.x];
    T *to = out + ((int64_t)blockIdx.x * chunks + c) * W;
    if ((uint32_t)id < (uint32_t)n_table)
        *(pack<T, W> *)to = *(const pack<T, W> *)(table + ((int64_t)id * chunks + c) * W);
    else
        clear_pack<W>(to);
}

int nn_cuda_gather(void *out, const void *table, const int32_t *ids, int32_t n, int32_t width,
                   int32_t n_table, int dtype, void *stream)
{
    const bool wide = width % PACK == 0 && aligned16(out) && aligned16(table);
    if (n == 0)
        return 0;
    const struct row_shape s = shape_rows(n, width, wide);
#define CALL(T, W)                                                                                 \
    gather<T, W><<<s.grid, s.threads, 0, (cudaStream_t)stream>>>((T *)out, (const T *)table, ids,  \
                                                                 s.chunks, n_table)
    DISPATCH(dtype, wide, CALL);
#undef CALL
    return (int)cudaGetLastError();
}

/* ---- residual and norm ---- */

/* The sum of x over the thread block, in a fixed order; every thread gets it. */
__device__ __forceinline__ float block_sum(float x)
{
    __shared__ float part[MAX_WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int o = 16; o; o /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, o);
    if (lane == 0)
        part[warp] = x;
    __syncthreads();
    x = lane < (int)blockDim.x / 32 ? part[lane] : 0.0f;
#pragma unroll
    for (int o = 16; o; o /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

/* One pack of residual and x. All of a thread's are loaded before the first is stored. */
template <typename T, int W>
struct operands {
    pack<T, W> residual, x;
};

template <typename T, int W>
__device__ __forceinline__ void load_operands(struct operands<T, W> *o,
                                              const struct nn_cuda_norm &p, int64_t at)
{
    o->residual = *(const pack<T, W> *)((const T *)p.residual + at);
    if (p.x)
        o->x = *(const pack<T, W> *)((const T *)p.x + at);
}

/* x, with its other shares. */
template <typename T, int W>
__device__ __forceinline__ void add_shares(float (&x)[W], const struct nn_cuda_norm &p, int64_t at)
{
    for (int j = 0; j < p.n_more; j++) {
        float more[W];
        load_pack<W>(more, (const T *)p.more + j * p.more_rows * p.width + at);
#pragma unroll
        for (int i = 0; i < W; i++)
            x[i] += more[i];
    }
}

/* residual + (x + more + bias) as it reads after rounding; stored where something was added. */
template <typename T, int W>
__device__ __forceinline__ void add_operands(float (&sum)[W], struct operands<T, W> *o,
                                             const struct nn_cuda_norm &p, int64_t at, int col)
{
    float x[W], b[W] = {};
    if (p.x) {
        if (p.bias)
            load_pack<W>(b, (const T *)p.bias + col);
#pragma unroll
        for (int i = 0; i < W; i++)
            x[i] = to_f32(o->x.v[i]);
        add_shares<T, W>(x, p, at);
#pragma unroll
        for (int i = 0; i < W; i++)
            from_f32(&o->residual.v[i], to_f32(o->residual.v[i]) + (x[i] + b[i]));
        *(pack<T, W> *)((T *)p.residual + at) = o->residual;
    }
#pragma unroll
    for (int i = 0; i < W; i++)
        sum[i] = to_f32(o->residual.v[i]);
}

template <int W>
__device__ __forceinline__ float squares(const float (&x)[W])
{
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < W; i++)
        sum += x[i] * x[i];
    return sum;
}

template <typename T, int W>
__device__ __forceinline__ void norm_pack(const struct nn_cuda_norm &p, const float (&x)[W],
                                          const pack<T, W> &w, float scale, int col)
{
    float y[W];
#pragma unroll
    for (int i = 0; i < W; i++)
        y[i] = to_f32(w.v[i]) * (x[i] * scale);
    store_pack<W>((T *)p.out + (int64_t)blockIdx.x * p.width + col, y);
}

/* One thread block a row; it reads its weights before it waits for the row. KEEP packs of a thread
 * stay in registers between the two passes; KEEP 0: rows of any width, whose second pass reads the
 * rounded sum again (mostly from L1). */
template <typename T, int W, int KEEP>
__global__ void residual_norm(const __grid_constant__ struct nn_cuda_norm p)
{
    const int step = blockDim.x * W, first = threadIdx.x * W;
    struct operands<T, W> o[KEEP ? KEEP : 1];
    pack<T, W> w[KEEP ? KEEP : 1];
    float x[KEEP ? KEEP : 1][W], sum = 0.0f;
    begin_next();
#pragma unroll
    for (int k = 0; k < KEEP; k++)
        if (p.out && first + k * step < p.width)
            w[k] = *(const pack<T, W> *)((const T *)p.weight + first + k * step);
    wait_for_inputs();
    const int64_t row = p.rows ? p.rows[blockIdx.x] : (int64_t)blockIdx.x, start = row * p.width;
    if (KEEP) {
#pragma unroll
        for (int k = 0; k < KEEP; k++)
            if (first + k * step < p.width)
                load_operands(&o[k], p, start + first + k * step);
#pragma unroll
        for (int k = 0; k < KEEP; k++) {
            if (first + k * step < p.width) {
                add_operands(x[k], &o[k], p, start + first + k * step, first + k * step);
                sum += squares(x[k]);
            }
        }
    } else {
        for (int col = first; col < p.width; col += step) {
            load_operands(&o[0], p, start + col);
            add_operands(x[0], &o[0], p, start + col, col);
            sum += squares(x[0]);
        }
    }
    if (!p.out)
        return;
    const float scale = rsqrtf(block_sum(sum) / (float)p.width + p.eps);
    if (KEEP) {
#pragma unroll
        for (int k = 0; k < KEEP; k++)
            if (first + k * step < p.width)
                norm_pack<T, W>(p, x[k], w[k], scale, first + k * step);
    } else {
        for (int col = first; col < p.width; col += step) {
            load_pack<W>(x[0], (const T *)p.residual + start + col);
            w[0] = *(const pack<T, W> *)((const T *)p.weight + col);
            norm_pack<T, W>(p, x[0], w[0], scale, col);
        }
    }
}

template <typename T, int W>
static cudaError_t launch_norm(const struct nn_cuda_norm *p, cudaStream_t stream)
{
    constexpr bool keep = W == PACK;
    const int chunks = (p->width + W - 1) / W;
    const int threads = chunks < THREADS ? (chunks + 31) / 32 * 32 : THREADS;
    void (*kernel)(struct nn_cuda_norm) = residual_norm<T, W, 0>;
    if (keep && chunks <= threads)
        kernel = residual_norm < T, W, keep ? 1 : 0 > ;
    else if (keep && chunks <= 2 * threads)
        kernel = residual_norm < T, W, keep ? 2 : 0 > ;
    else if (keep && chunks <= 4 * threads)
        kernel = residual_norm < T, W, keep ? 4 : 0 > ;
    const struct launch l = {dim3((unsigned)p->n), (unsigned)threads, 0, p->early, stream};
    return launch_early(kernel, l, *p);
}

int nn_cuda_residual_norm(const struct nn_cuda_norm *p, int dtype, void *stream)
{
    const bool wide = p->width % PACK == 0 && aligned16(p->out) && aligned16(p->residual) &&
                      aligned16(p->x) && aligned16(p->more) && aligned16(p->bias) &&
                      aligned16(p->weight);
    if (p->n == 0)
        return 0;
    if (p->width < 1)
        return (int)cudaErrorInvalidValue;
    cudaError_t e;
#define CALL(T, W) e = launch_norm<T, W>(p, (cudaStream_t)stream)
    DISPATCH(dtype, wide, CALL);
#undef CALL
    return (int)e;
}

/* ---- pointwise ---- */

template <typename T, int W>
__global__ void __launch_bounds__(THREADS)
    swiglu(T *out, const T *gate_up, const T *bias, int chunks)
{
    const int c = blockIdx.y * blockDim.x + threadIdx.x, col = c * W, width = chunks * W;
    begin_next();
    wait_for_inputs();
    if (c >= chunks)
        return;
    const T *in = gate_up + (int64_t)blockIdx.x * 2 * width + col;
    float g[W], u[W], y[W];
    load_pack<W>(g, in);
    load_pack<W>(u, in + width);
    if (bias) {
        float bg[W], bu[W];
        load_pack<W>(bg, bias + col);
        load_pack<W>(bu, bias + width + col);
#pragma unroll
        for (int k = 0; k < W; k++)
            g[k] += bg[k], u[k] += bu[k];
    }
#pragma unroll
    for (int k = 0; k < W; k++)
        y[k] = swiglu_of(g[k], u[k]);
    store_pack<W>(out + (int64_t)blockIdx.x * width + col, y);
}

int nn_cuda_swiglu(void *out, const void *gate_up, const void *bias, int32_t n, int32_t width,
                   int dtype, void *stream)
{
    const bool wide = width % PACK == 0 && aligned16(out) && aligned16(gate_up) && aligned16(bias);
    if (n == 0)
        return 0;
    const struct row_shape s = shape_rows(n, width, wide);
    const struct launch l = {s.grid, s.threads, 0, true, stream};
    cudaError_t e;
#define CALL(T, W)                                                                                 \
    e = launch_early(swiglu<T, W>, l, (T *)out, (const T *)gate_up, (const T *)bias, s.chunks)
    DISPATCH(dtype, wide, CALL);
#undef CALL
    return (int)e;
}

template <typename T, int W>
__global__ void __launch_bounds__(THREADS) add_bias(T *x, const T *bias, int chunks)
{
    const int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= chunks)
        return;
    float a[W], b[W];
    T *to = x + ((int64_t)blockIdx.x * chunks + c) * W;
    load_pack<W>(a, to);
    load_pack<W>(b, bias + c * W);
#pragma unroll
    for (int k = 0; k < W; k++)
        a[k] += b[k];
    store_pack<W>(to, a);
}

int nn_cuda_add_bias(void *x, const void *bias, int32_t n, int32_t width, int dtype, void *stream)
{
    const bool wide = width % PACK == 0 && aligned16(x) && aligned16(bias);
    if (n == 0)
        return 0;
    const struct row_shape s = shape_rows(n, width, wide);
#define CALL(T, W)                                                                                 \
    add_bias<T, W>                                                                                 \
        <<<s.grid, s.threads, 0, (cudaStream_t)stream>>>((T *)x, (const T *)bias, s.chunks)
    DISPATCH(dtype, wide, CALL);
#undef CALL
    return (int)cudaGetLastError();
}

template <typename T>
__global__ void __launch_bounds__(THREADS) widen(float *out, const T *x, int64_t n)
{
    const int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    if (i < n)
        out[i] = to_f32(x[i]);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) narrow(T *out, const float *x, int64_t n)
{
    const int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    if (i < n)
        from_f32(&out[i], x[i]);
}

int nn_cuda_to_f32(float *out, const void *x, int64_t n, int dtype, void *stream)
{
    const unsigned blocks = blocks_for(n, THREADS);
    if (n == 0)
        return 0;
    if (dtype == 0)
        widen<<<blocks, THREADS, 0, (cudaStream_t)stream>>>(out, (const __nv_bfloat16 *)x, n);
    else
        widen<<<blocks, THREADS, 0, (cudaStream_t)stream>>>(out, (const __half *)x, n);
    return (int)cudaGetLastError();
}

int nn_cuda_from_f32(void *out, const float *x, int64_t n, int dtype, void *stream)
{
    const unsigned blocks = blocks_for(n, THREADS);
    if (n == 0)
        return 0;
    if (dtype == 0)
        narrow<<<blocks, THREADS, 0, (cudaStream_t)stream>>>((__nv_bfloat16 *)out, x, n);
    else
        narrow<<<blocks, THREADS, 0, (cudaStream_t)stream>>>((__half *)out, x, n);
    return (int)cudaGetLastError();
}

/* ---- random weights ---- */

__device__ __forceinline__ uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* SplitMix64 over the element's index, keyed by the seed; Box and Muller make it normal. */
__device__ __forceinline__ float hash_normal(uint64_t key, uint64_t index)
{
    const uint64_t bits = mix(key + index * 0x9e3779b97f4a7c15ull);
    const float u = ((float)(uint32_t)(bits >> 40) + 0.5f) * 0x1p-24f;
    const float v = (float)(uint32_t)(bits & 0xffffff) * 0x1p-24f;
    return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) fill(const __grid_constant__ struct nn_cuda_fill f)
{
    const uint64_t key = mix(f.seed + 0x9e3779b97f4a7c15ull);
    const int64_t step = (int64_t)gridDim.x * THREADS, n = f.n_rows * f.n_cols;
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n; i += step) {
        const int64_t at = (f.row + i / f.n_cols) * f.pitch + f.col + i % f.n_cols;
        from_f32((T *)f.out + i, f.mean + f.std * hash_normal(key, (uint64_t)at));
    }
}

int nn_cuda_fill_normal(const struct nn_cuda_fill *f, int dtype, void *stream)
{
    if (f->n_rows * f->n_cols == 0)
        return 0;
    if (dtype == 0)
        fill<__nv_bfloat16><<<FILL_BLOCKS, THREADS, 0, (cudaStream_t)stream>>>(*f);
    else
        fill<__half><<<FILL_BLOCKS, THREADS, 0, (cudaStream_t)stream>>>(*f);
    return (int)cudaGetLastError();
}
