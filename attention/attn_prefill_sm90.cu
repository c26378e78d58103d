/* Gated causal prefill over the paged cache for Hopper (sm_90a).
 * O = softmax(scale * Q K^T) V over the pages the policy keeps; a tile is 128 query rows (one
 * absolute block of one head).
 *
 * Roles. Warpgroup 0 loads: warp 0 takes tiles from the queue and copies Q, warp 1 copies K, warp 2
 * copies V, and only pages that were voted for. Warpgroups 1 and 2 compute 64 rows each, by one of
 * two paths: attn_prefill_dense_sm90.cuh where nothing of a tile can be skipped, two pages a step;
 * attn_prefill_gated_sm90.cuh elsewhere, one page a step.
 *
 * Shared memory, head_dim 128: Q 2 x 32 KiB, K 6 x 16 KiB, V 4 x 16 KiB, then barriers. O leaves
 * through the Q slot of its tile. Registers: 240 a consumer, 24 a producer.
 * Source: BSFA (arXiv 2512.07011) section 4; FlashAttention-3 (arXiv 2407.08608) section 3. */
#include "attention/attn_prefill_dense_sm90.cuh"
#include "attention/attn_prefill_gated_sm90.cuh"
#include "attention/attn_prefill_load_sm90.cuh"

template <int D>
__device__ __forceinline__ struct tile_rows
tile_rows_make(const struct consumer<D> &c, const struct tile_info *info, const struct sm90_args &a)
{
    using L = smem_layout<D>;
    struct tile_rows t;
    const int row0 = c.warp * 16 + c.lane / 4;
    t.diag_at = __shfl_sync(0xffffffffu, info->diag_at, 0);
    t.n_pages = __shfl_sync(0xffffffffu, tile_places(info), 0);
    t.q = desc_k_major(c.smem + L::q + c.q.slot() * L::q_bytes + c.group * (64 * 128));
    t.flags = (row0 >= info->row_begin && row0 < info->row_end ? ROW0_VALID : 0) |
              (row0 + 8 >= info->row_begin && row0 + 8 < info->row_end ? ROW1_VALID : 0) |
              (info->rows64 ? ROWS64 : 0) | (info->n_diag == 2 ? TWO_DIAGONAL : 0);
    t.gate = info->gate;
    t.scale_log2 = a.scale_log2;
    return t;
}

template <int D, int DT, int GATE>
__device__ __forceinline__ void consume(uint32_t smem, unsigned char *smem_ptr,
                                        const struct sm90_args &a)
{
    using L = smem_layout<D>;
    struct consumer<D> c = {
    };
    c.smem = smem;
    c.warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32 - 4, 0);
    c.group = c.warp / 4;
    c.lane = threadIdx.x & 31;
    for (;;) {
        const struct tile_info *info = (const struct tile_info *)(smem_ptr + L::info) + c.q.slot();
        mbar_wait(smem + L::q_full + 8 * c.q.slot(), c.q.parity());
        if (info->seq < 0)
            break;
        const struct tile_rows t = tile_rows_make(c, info, a);
        struct row_state st = {{-INFINITY, -INFINITY}, {SHIFT_MIN, SHIFT_MIN}, {0.0f, 0.0f}};
        float o[D / 2];
#pragma unroll
        for (int i = 0; i < D / 2; i++)
            asm volatile("mov.f32 %0, 0f00000000;" : "=f"(o[i]));
        if (GATE == SM90_GATE_NONE || info->dense)
            attend_dense<D, DT>(c, t, st, o);
        else
            attend_gated<D, DT, GATE>(c, t, st, o);
        c.round += tile_rounds(info);
        write_rows<D, DT>(c, a, info, st, o);
        fence_proxy_async();
        __syncwarp();
        if (c.lane == 0)
            mbar_arrive(smem + L::q_empty + 8 * c.q.slot());
        c.q.next();
    }
}

/* ---- the kernel ---- */

template <int D, int GATE>
__device__ __forceinline__ void init_barriers(uint32_t smem)
{
    using L = smem_layout<D>;
    for (int i = 0; i < Q_SLOTS; i++) {
        mbar_init(smem + L::q_full + 8 * i, 1);
        mbar_init(smem + L::q_empty + 8 * i, CONSUMER_WARPS + 2);
    }
    for (int i = 0; i < K_SLOTS; i++) {
        mbar_init(smem + L::k_full + 8 * i, 1);
        mbar_init(smem + L::k_empty + 8 * i, CONSUMER_WARPS + (GATE != SM90_GATE_NONE));
    }
    for (int i = 0; i < VOTE_SLOTS; i++)
        mbar_init(smem + L::vote_full + 8 * i, CONSUMER_WARPS);
    for (int i = 0; i < L::v_slots; i++) {
        mbar_init(smem + L::v_full + 8 * i, 1);
        mbar_init(smem + L::v_empty + 8 * i, CONSUMER_WARPS);
    }
    mbar_fence_init();
}

/* A compiler pass for plain sm_90, which lacks wgmma, makes an empty kernel. */
template <int D, int DT, int GATE>
__global__ void __launch_bounds__(THREADS, 1)
    attn_prefill(const __grid_constant__ struct sm90_maps maps,
                 const __grid_constant__ struct sm90_args args)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) unsigned char smem_ptr[];
    const uint32_t smem = smem_addr(smem_ptr);
    if (threadIdx.x == 0) {
        tma_prefetch_map(&maps.q);
        tma_prefetch_map(&maps.k);
        tma_prefetch_map(&maps.v);
        init_barriers<D, GATE>(smem);
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        reg_dec<PRODUCER_REGS>();
        if (threadIdx.x == 0)
            produce_q<D, GATE>(smem, smem_ptr, maps, args);
        else if (threadIdx.x / 32 == 1)
            produce_k<D>(smem, smem_ptr, maps, args);
        else if (threadIdx.x / 32 == 2)
            produce_v<D, GATE>(smem, smem_ptr, maps, args);
    } else {
        reg_inc<CONSUMER_REGS>();
        consume<D, DT, GATE>(smem, smem_ptr, args);
    }
#endif
}

template <int D, int DT, int GATE>
static cudaError_t launch(const struct sm90_maps *maps, const struct sm90_args *args, int n_sms,
                          cudaStream_t stream)
{
    cudaError_t e =
        cudaFuncSetAttribute(attn_prefill<D, DT, GATE>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             smem_layout<D>::bytes);
    if (e != cudaSuccess)
        return e;
    int grid = args->n_tiles < n_sms ? args->n_tiles : n_sms;
    struct sm90_args filled = *args;
    filled.scale_log2 = args->scale * LOG2E;
    attn_prefill<D, DT, GATE><<<grid, THREADS, smem_layout<D>::bytes, stream>>>(*maps, filled);
    return cudaGetLastError();
}

struct kernel_entry {
    int head_dim, dtype, gate;
    cudaError_t (*launch)(const struct sm90_maps *, const struct sm90_args *, int, cudaStream_t);
};

static const struct kernel_entry kernels[] = {
    {128, DT_BF16, SM90_GATE_NONE, launch<128, DT_BF16, SM90_GATE_NONE>},
    {128, DT_BF16, SM90_GATE_ABS, launch<128, DT_BF16, SM90_GATE_ABS>},
    {128, DT_BF16, SM90_GATE_REL, launch<128, DT_BF16, SM90_GATE_REL>},
    {128, DT_F16, SM90_GATE_NONE, launch<128, DT_F16, SM90_GATE_NONE>},
    {128, DT_F16, SM90_GATE_ABS, launch<128, DT_F16, SM90_GATE_ABS>},
    {128, DT_F16, SM90_GATE_REL, launch<128, DT_F16, SM90_GATE_REL>},
    {64, DT_BF16, SM90_GATE_NONE, launch<64, DT_BF16, SM90_GATE_NONE>},
    {64, DT_BF16, SM90_GATE_ABS, launch<64, DT_BF16, SM90_GATE_ABS>},
    {64, DT_BF16, SM90_GATE_REL, launch<64, DT_BF16, SM90_GATE_REL>},
    {64, DT_F16, SM90_GATE_NONE, launch<64, DT_F16, SM90_GATE_NONE>},
    {64, DT_F16, SM90_GATE_ABS, launch<64, DT_F16, SM90_GATE_ABS>},
    {64, DT_F16, SM90_GATE_REL, launch<64, DT_F16, SM90_GATE_REL>},
};

int sm90_prefill_launch(const struct sm90_maps *maps, const struct sm90_args *args, int head_dim,
                        int dtype, int gate, int n_sms, void *stream)
{
    for (const struct kernel_entry &k : kernels)
        if (k.head_dim == head_dim && k.dtype == dtype && k.gate == gate)
            return (int)k.launch(maps, args, n_sms, (cudaStream_t)stream);
    return (int)cudaErrorInvalidValue;
}
