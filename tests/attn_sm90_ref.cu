/* See attn_sm90_ref.h. */
#include "tests/attn_sm90_ref.h"
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>
#include <mma.h>

__device__ inline uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
__global__ void fill_normal(uint16_t *p, int64_t n, uint64_t seed, float scale, int dtype)
{
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x) {
        uint64_t r = mix(mix(seed) + (uint64_t)i);
        float u = ((float)(uint32_t)(r >> 40) + 0.5f) * (1.0f / 16777216.0f);
        float w = (float)(uint32_t)(r & 0xffffff) * (1.0f / 16777216.0f);
        float x = sqrtf(-2.0f * logf(u)) * cospif(2.0f * w) * scale;
        if (dtype == 0)
            ((__nv_bfloat16 *)p)[i] = __float2bfloat16(x);
        else
            ((__half *)p)[i] = __float2half(x);
    }
}
void ref_fill_normal(void *p, int64_t n, uint64_t seed, float scale, int dtype)
{
    fill_normal<<<2048, 256>>>((uint16_t *)p, n, seed, scale, dtype);
}
__device__ inline float load16(const void *p, int64_t i, int dtype)
{
    return dtype == 0 ? __bfloat162float(((const __nv_bfloat16 *)p)[i])
                      : __half2float(((const __half *)p)[i]);
}
__device__ inline double round16(double x, int dtype)
{
    return dtype == 0 ? (double)__bfloat162float(__float2bfloat16((float)x))
                      : (double)__half2float(__float2half((float)x));
}
__device__ inline double exp_t(double x)
{
    return exp(x);
}
__device__ inline float exp_t(float x)
{
    return expf(x);
}

template <typename F, bool NAIVE>
__global__ void ref_attn(struct ref_problem p, double *out, double *lse)
{
    extern __shared__ char raw[];
    F *s = (F *)raw;
    __shared__ F red[128];
    const int D = p.head_dim, t = threadIdx.x, head = blockIdx.y;
    const int r = blockIdx.x * p.row_step, pos = p.pos + r, n = pos + 1;
    const int kvh = head / (p.n_heads / p.n_kv_heads), block = pos / 128;
    const int64_t qrow = ((int64_t)(p.row + r) * p.n_heads + head) * D;
    F m = -CUDART_INF_F;
    for (int j = t; j < n; j += 128) {
        int page = j / 64;
        bool keep = page / 2 == block || !p.keep ||
                    p.keep[(((int64_t)(pos % 128 / 64) * p.n_heads + head) * p.n_blocks + block) *
                               p.n_pages +
                           page];
        F a = -CUDART_INF_F;
        if (keep) {
            int64_t kr = (((int64_t)p.pages[page] * p.n_kv_heads + kvh) * 64 + j % 64) * D;
            a = 0;
            for (int d = 0; d < D; d++)
                a += (F)load16(p.q, qrow + d, p.dtype) * (F)load16(p.k, kr + d, p.dtype);
            a *= (F)p.scale;
        }
        s[j] = a;
        m = a > m || a != a ? a : m;
    }
    red[t] = m;
    __syncthreads();
    for (int i = 0; i < 128; i++)
        m = red[i] > m || red[i] != red[i] ? red[i] : m;
    __syncthreads();
    F l = 0;
    for (int j = t; j < n; j += 128) {
        F e = s[j] == -CUDART_INF_F ? (F)0 : exp_t(s[j] - m);
        l += e;
        s[j] = NAIVE ? (F)round16((double)e, p.dtype) : e;
    }
    red[t] = l;
    __syncthreads();
    l = 0;
    for (int i = 0; i < 128; i++)
        l += red[i];
    if (t < D) {
        F o = 0;
        for (int j = 0; j < n; j++) {
            if (s[j] == (F)0)
                continue;
            o += s[j] *
                 (F)load16(p.v,
                           (((int64_t)p.pages[j / 64] * p.n_kv_heads + kvh) * 64 + j % 64) * D + t,
                           p.dtype);
        }
        double x = (double)(o / l);
        out[qrow + t] = NAIVE ? round16(x, p.dtype) : x;
    }
    if (t == 0)
        lse[(int64_t)(p.row + r) * p.n_heads + head] = (double)m + log((double)l);
}
template <typename F, bool NAIVE>
static void launch_ref(const struct ref_problem *p, double *out, double *lse)
{
    size_t smem = sizeof(F) * (size_t)(p->pos + p->n_rows);
    cudaFuncSetAttribute(ref_attn<F, NAIVE>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         200 * 1024);
    dim3 grid((p->n_rows + p->row_step - 1) / p->row_step, p->n_heads);
    ref_attn<F, NAIVE><<<grid, 128, smem>>>(*p, out, lse);
}
void ref_attn_f64(const struct ref_problem *p, double *out, double *lse)
{
    launch_ref<double, false>(p, out, lse);
}
void ref_attn_naive(const struct ref_problem *p, double *out, double *lse)
{
    launch_ref<float, true>(p, out, lse);
}

/* one thread block per (query block, head); a thread is a row */
__global__ void page_max_simple(struct ref_problem p, float *max)
{
    const int head = blockIdx.y, t = threadIdx.x, D = p.head_dim;
    const int block = p.pos / 128 + blockIdx.x, pos = block * 128 + t;
    const int kvh = head / (p.n_heads / p.n_kv_heads);
    const bool valid = pos >= p.pos && pos < p.pos + p.n_rows;
    __shared__ float red[128];
    for (int page = 0; page < 2 * block; page++) {
        float m = -CUDART_INF_F;
        if (valid)
            for (int j = 0; j < 64; j++) {
                double a = 0;
                int64_t kr = (((int64_t)p.pages[page] * p.n_kv_heads + kvh) * 64 + j) * D;
                int64_t qr = ((int64_t)(p.row + pos - p.pos) * p.n_heads + head) * D;
                for (int d = 0; d < D; d++)
                    a +=
                        (double)load16(p.q, qr + d, p.dtype) * (double)load16(p.k, kr + d, p.dtype);
                m = fmaxf(m, (float)(a * (double)p.scale));
            }
        red[t] = m;
        __syncthreads();
        if (t < 2) {
            m = -CUDART_INF_F;
            for (int i = 0; i < 64; i++)
                m = fmaxf(m, red[64 * t + i]);
            max[(((int64_t)t * p.n_heads + head) * p.n_blocks + block) * p.n_pages + page] = m;
        }
        __syncthreads();
    }
}
void ref_page_max(const struct ref_problem *p, float *max)
{
    dim3 grid((p->pos + p->n_rows - 1) / 128 - p->pos / 128 + 1, p->n_heads);
    page_max_simple<<<grid, 128>>>(*p, max);
}

__device__ inline unsigned key_of(float f)
{
    unsigned u = __float_as_uint(f);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ inline float of_key(unsigned u)
{
    return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}
template <typename T, int D>
__global__ void page_max_fast(struct ref_problem p, float *max)
{
    using namespace nvcuda;
    extern __shared__ unsigned keys[];
    const int block = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, warp = threadIdx.x / 32;
    const int kvh = head / (p.n_heads / p.n_kv_heads);
    for (int i = threadIdx.x; i < 2 * block; i += blockDim.x)
        keys[i] = 0;
    __syncthreads();
    wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a[D / 16];
    const T *q =
        (const T *)p.q + ((int64_t)(p.row + block * 128 + warp * 16) * p.n_heads + head) * D;
    for (int i = 0; i < D / 16; i++)
        wmma::load_matrix_sync(a[i], q + 16 * i, p.n_heads * D);
    for (int page = 0; page < 2 * block; page++) {
        const T *k = (const T *)p.k + ((int64_t)p.pages[page] * p.n_kv_heads + kvh) * 64 * D;
        float m = -CUDART_INF_F;
        for (int n = 0; n < 4; n++) {
            wmma::fragment<wmma::accumulator, 16, 16, 16, float> c;
            wmma::fill_fragment(c, 0.0f);
            for (int i = 0; i < D / 16; i++) {
                wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> b;
                wmma::load_matrix_sync(b, k + n * 16 * D + 16 * i, D);
                wmma::mma_sync(c, a[i], b, c);
            }
            for (int i = 0; i < c.num_elements; i++)
                m = fmaxf(m, c.x[i]);
        }
        for (int o = 16; o; o /= 2)
            m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, o));
        if (threadIdx.x % 32 == 0)
            atomicMax(&keys[page], key_of(m * p.scale));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * block; i += blockDim.x)
        max[((int64_t)head * p.n_blocks + block) * p.n_pages + i] = of_key(keys[i]);
}
void ref_page_max_fast(const struct ref_problem *p, float *max)
{
    dim3 grid(p->n_rows / 128, p->n_heads);
    size_t smem = (size_t)p->n_pages * 4;
    if (p->dtype == 0 && p->head_dim == 128)
        page_max_fast<__nv_bfloat16, 128><<<grid, 256, smem>>>(*p, max);
    else if (p->dtype == 0)
        page_max_fast<__nv_bfloat16, 64><<<grid, 256, smem>>>(*p, max);
}
__device__ unsigned kth(const float *x, int n, int k, int *count)
{
    unsigned v = 0;
    for (int bit = 31; bit >= 0; bit--) { /* largest v with at least k keys >= v */
        unsigned trial = v | 1u << bit;
        if (threadIdx.x == 0)
            *count = 0;
        __syncthreads();
        int c = 0;
        for (int i = threadIdx.x; i < n; i += blockDim.x)
            c += key_of(x[i]) >= trial;
        atomicAdd(count, c);
        __syncthreads();
        if (*count >= k)
            v = trial;
        __syncthreads();
    }
    return v;
}
__global__ void thresholds(const float *max, float *t, int n_blocks, int n_pages,
                           const int *k_of_head)
{
    __shared__ int count;
    const int block = blockIdx.x, head = blockIdx.y, n = 2 * block, k = k_of_head[head];
    const float *x = max + ((int64_t)head * n_blocks + block) * n_pages;
    float v = -CUDART_INF_F;
    if (n > k && k > 0) {
        float a = of_key(kth(x, n, k, &count)), b = of_key(kth(x, n, k + 1, &count));
        v = 0.5f * (a + b);
    } else if (n > k) {
        v = CUDART_INF_F;
    }
    if (threadIdx.x == 0)
        t[(int64_t)head * n_blocks + block] = v;
}
void ref_thresholds(const float *max, float *t, int n_heads, int n_blocks, int n_pages,
                    const int *k_of_head)
{
    dim3 grid(n_blocks, n_heads);
    thresholds<<<grid, 128>>>(max, t, n_blocks, n_pages, k_of_head);
}
