/* One-shot all-reduce over peer memory; see peer_reduce.h for the protocol.
 *
 * At most 32 blocks of 512 threads, 16 bytes a thread and turn. Bound by NVLink's latency, some
 * microseconds for each of the two one-way trips (flag out, data back), below about 256 KiB, by its
 * bandwidth above. A block meets only the same block of its peers, so the blocks need not all run
 * at once. */
#include "parallel/pack.cuh"
#include "parallel/peer_reduce_kernel.h"

static __device__ __forceinline__ void store_release(uint32_t *p, uint32_t v)
{
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

static __device__ __forceinline__ uint32_t load_acquire(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

static __device__ __forceinline__ uint4 *half_of(const peer_view &v, int rank, uint32_t call)
{
    unsigned char *data = reinterpret_cast<unsigned char *>(v.regions[rank] + 1);
    return reinterpret_cast<uint4 *>(data + (call & 1) * v.half_bytes);
}

/* Thread t tells rank t that this block's copy is there, and waits for rank t's. The release covers
 * the whole block's writes because of the barrier before it, the acquire its reads because of the
 * barrier after. */
static __device__ __forceinline__ void meet(const peer_view &v, uint32_t call)
{
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(v.n_ranks)) {
        store_release(&v.regions[threadIdx.x]->flags[blockIdx.x][v.rank], call);
        const uint32_t *flag = &v.regions[v.rank]->flags[blockIdx.x][threadIdx.x];
        for (unsigned spin = 1; static_cast<int>(load_acquire(flag) - call) < 0; spin++) {
            if (spin % 1024 == 0 && load_acquire(v.abort))
                break;
        }
    }
    __syncthreads();
}

/* The sum of element i of all ranks, in rank order; four loads are under way at a time. */
template <class T>
static __device__ __forceinline__ uint4 sum(const peer_view &v, uint32_t call, size_t i)
{
    float acc[pack<T>::N] = {};
    for (int first = 0; first < v.n_ranks; first += 4) {
        uint4 in[4] = {};
#pragma unroll
        for (int r = 0; r < 4; r++) {
            if (first + r < v.n_ranks)
                in[r] = half_of(v, first + r, call)[i];
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            if (first + r < v.n_ranks) {
#pragma unroll
                for (int k = 0; k < pack<T>::N; k++)
                    acc[k] =
                        first + r == 0 ? pack<T>::at(in[0], k) : acc[k] + pack<T>::at(in[r], k);
            }
        }
    }
    return pack<T>::make(acc);
}

/* The last block through counts the call. */
static __device__ __forceinline__ void leave(peer_region *mine, uint32_t call)
{
    __syncthreads(); /* every thread has used n_calls */
    if (threadIdx.x == 0 && atomicAdd(&mine->n_done, 1) == gridDim.x - 1) {
        mine->n_done = 0;
        mine->n_calls = call;
    }
}

template <class T>
static __global__ void __launch_bounds__(PEER_THREADS, 1)
    peer_reduce_kernel(const __grid_constant__ peer_view v, uint4 *buf, size_t n)
{
    peer_region *mine = v.regions[v.rank];
    const uint32_t call = mine->n_calls + 1;
    const size_t begin = static_cast<size_t>(blockIdx.x) * PEER_THREADS + threadIdx.x;
    const size_t stride = static_cast<size_t>(gridDim.x) * PEER_THREADS;

    uint4 *copy = half_of(v, v.rank, call);
    for (size_t i = begin; i < n; i += stride)
        copy[i] = buf[i];
    meet(v, call);
    for (size_t i = begin; i < n; i += stride)
        buf[i] = sum<T>(v, call, i);
    leave(mine, call);
}

extern "C" cudaError_t peer_reduce_launch(const struct peer_view *v, void *buf, size_t bytes,
                                          enum dtype dt, cudaStream_t stream)
{
    const size_t n = bytes / PEER_VECTOR, wanted = (n + PEER_THREADS - 1) / PEER_THREADS;
    const unsigned blocks = static_cast<unsigned>(wanted < PEER_BLOCKS ? wanted : PEER_BLOCKS);
    uint4 *p = static_cast<uint4 *>(buf);

    switch (dt) {
    case DTYPE_F32: peer_reduce_kernel<float><<<blocks, PEER_THREADS, 0, stream>>>(*v, p, n); break;
    case DTYPE_F16:
        peer_reduce_kernel<__half><<<blocks, PEER_THREADS, 0, stream>>>(*v, p, n);
        break;
    case DTYPE_BF16:
        peer_reduce_kernel<__nv_bfloat16><<<blocks, PEER_THREADS, 0, stream>>>(*v, p, n);
        break;
    }
    return cudaGetLastError();
}
