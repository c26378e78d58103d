/* Adds what a peer's copy engine has brought. Of two numbers the sum has the same bits in either
 * order, so both ranks compute the same. Bound by memory: 3 bytes moved for each of the sum. */
#include "parallel/overlap_kernel.h"
#include "parallel/pack.cuh"

enum { THREADS = 256, VECTOR = 16, TURNS = 4 };

template <class T>
static __global__ void __launch_bounds__(THREADS)
    overlap_add_kernel(uint4 *buf, const uint4 *other, size_t n)
{
    const size_t first = static_cast<size_t>(blockIdx.x) * THREADS * TURNS + threadIdx.x;
    uint4 a[TURNS], b[TURNS];
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const size_t i = first + t * THREADS;
        if (i < n) {
            a[t] = buf[i];
            b[t] = __ldcs(other + i);
        }
    }
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const size_t i = first + t * THREADS;
        float sum[pack<T>::N];
        if (i >= n)
            break;
#pragma unroll
        for (int k = 0; k < pack<T>::N; k++)
            sum[k] = pack<T>::at(a[t], k) + pack<T>::at(b[t], k);
        buf[i] = pack<T>::make(sum);
    }
}

extern "C" cudaError_t overlap_add_launch(void *buf, const void *other, size_t bytes, enum dtype dt,
                                          cudaStream_t stream)
{
    const size_t n = bytes / VECTOR;
    const unsigned blocks = static_cast<unsigned>((n + THREADS * TURNS - 1) / (THREADS * TURNS));
    uint4 *p = static_cast<uint4 *>(buf);
    const uint4 *q = static_cast<const uint4 *>(other);

    switch (dt) {
    case DTYPE_F32: overlap_add_kernel<float><<<blocks, THREADS, 0, stream>>>(p, q, n); break;
    case DTYPE_F16: overlap_add_kernel<__half><<<blocks, THREADS, 0, stream>>>(p, q, n); break;
    case DTYPE_BF16:
        overlap_add_kernel<__nv_bfloat16><<<blocks, THREADS, 0, stream>>>(p, q, n);
        break;
    }
    return cudaGetLastError();
}
