/* The end of a piece of the Hopper decode kernel: the rows of the warps become one result, and the
 * parts of a cut task too. */
#ifndef ATTENTION_ATTN_DECODE_MERGE_SM90_CUH
#define ATTENTION_ATTN_DECODE_MERGE_SM90_CUH

#include "attention/attn_decode_page_sm90.cuh"

/* A partial result of four columns of a row. */
struct dec_part {
    float shift, l; /* shift: base-2 units, -inf if nothing was kept */
    float4 o;
};

__device__ __forceinline__ void part_add(struct dec_part &x, float2 state, float4 o)
{
    const float top = max_nan(x.shift, state.x);
    const float fx = x.shift == -INFINITY ? 0.0f : ex2(x.shift - top);
    const float fy = state.x == -INFINITY ? 0.0f : ex2(state.x - top);
    x.shift = top;
    x.l = fmaf(x.l, fx, __fmul_rn(state.y, fy));
    x.o.x = fmaf(x.o.x, fx, __fmul_rn(o.x, fy)), x.o.y = fmaf(x.o.y, fx, __fmul_rn(o.y, fy));
    x.o.z = fmaf(x.o.z, fx, __fmul_rn(o.z, fy)), x.o.w = fmaf(x.o.w, fx, __fmul_rn(o.w, fy));
}

/* What a warp has counted lies behind its rows. */
template <int D>
__device__ __forceinline__ uint2 *warp_counts(unsigned char *smem, int warp)
{
    using L = dec_layout<D>;
    return (uint2 *)(smem + L::v + warp * L::slots * L::tile_bytes + DEC_ROWS * L::o_stride * 4);
}

/* Leaves this warp's rows in its V ring, their state and the pages they have seen and kept. */
template <int D>
__device__ __forceinline__ void leave_rows(const struct dec_warp<D> &w,
                                           const struct dec_state<D> &st, const struct dec_rows &r,
                                           unsigned char *smem)
{
    using L = dec_layout<D>;
    float *o = (float *)(smem + L::v + w.warp * L::slots * L::tile_bytes);
    float2 *state = (float2 *)(smem + L::state) + w.warp * DEC_ROWS;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = w.lane / 4 + 8 * i;
        float l = st.l[i];
        l += __shfl_xor_sync(DEC_ALL, l, 1);
        l += __shfl_xor_sync(DEC_ALL, l, 2);
        if (row >= r.n)
            continue;
        if ((w.lane & 3) == 0) {
            state[row] = make_float2(st.m[i] == -INFINITY ? -INFINITY : st.shift[i], l);
            warp_counts<D>(smem, w.warp)[row] = make_uint2(r.seen[i], r.kept[i]);
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(float2 *)(o + row * L::o_stride + 8 * n + 2 * (w.lane & 3)) =
                make_float2(st.o[n][2 * i], st.o[n][2 * i + 1]);
    }
}

template <int D, int DT>
__device__ __forceinline__ void write_out(const struct dec_args &a, const struct dec_piece &p,
                                          const struct dec_part &x, int row, int col)
{
    const int group = a.n_heads / a.n_kv_heads, packed = p.tile * DEC_ROWS + row;
    const int head = p.kv_head * group + packed % group;
    const int64_t q_row = p.row + packed / group;
    const float inv = x.l == 0.0f ? 0.0f : 1.0f / x.l;
    *(uint2 *)((uint16_t *)a.out + q_row * a.out_stride + head * D + col) =
        make_uint2(pack2<DT>(x.o.x * inv, x.o.y * inv), pack2<DT>(x.o.z * inv, x.o.w * inv));
    if (a.lse && col == 0)
        a.lse[q_row * a.n_heads + head] =
            x.l == 0.0f ? -INFINITY : (x.shift + log2f(x.l)) * DEC_LN2;
}

/* Where slot's rows and states lie in the workspace. */
template <int D>
__device__ __forceinline__ float4 *slot_rows(const struct dec_args &a, int slot)
{
    return (float4 *)(a.workspace + (int64_t)slot * DEC_ROWS * D);
}

template <int D>
__device__ __forceinline__ float2 *slot_states(const struct dec_args &a, int slot)
{
    return (float2 *)(a.workspace + (int64_t)2 * a.n_shares * DEC_ROWS * D) + slot * DEC_ROWS;
}

/* Merges the warps' rows: to the output, or for a part of a task to the workspace. */
template <int D, int DT>
__device__ __forceinline__ void merge_warps(const struct dec_args &a, const struct dec_piece &p,
                                            int n_rows, const unsigned char *smem)
{
    using L = dec_layout<D>;
    for (int i = threadIdx.x; i < n_rows * (D / 4); i += DEC_THREADS) {
        const int row = i / (D / 4), col = i % (D / 4) * 4;
        struct dec_part x = {-INFINITY, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
#pragma unroll
        for (int w = 0; w < DEC_WARPS; w++) {
            const float *o = (const float *)(smem + L::v + w * L::slots * L::tile_bytes);
            part_add(x, ((const float2 *)(smem + L::state))[w * DEC_ROWS + row],
                     *(const float4 *)(o + row * L::o_stride + col));
        }
        if (p.n_parts == 1) {
            write_out<D, DT>(a, p, x, row, col);
            continue;
        }
        slot_rows<D>(a, p.slot)[i] = x.o;
        if (col == 0)
            slot_states<D>(a, p.slot)[row] = make_float2(x.shift, x.l);
    }
}

/* The thread block that brings the last part of a task merges them all. The counter of a task is
 * that of the share where it begins: no share begins two cut tasks. */
template <int D, int DT>
__device__ __forceinline__ void merge_parts(const struct dec_args &a, const struct dec_piece &p,
                                            int n_rows, volatile uint32_t *last)
{
    const int share = p.first_slot / 2;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *last = atomicAdd(a.arrived + share, 1u) == (uint32_t)p.n_parts - 1;
        __threadfence();
    }
    __syncthreads();
    if (!*last)
        return;
    if (threadIdx.x == 0)
        a.arrived[share] = 0;
    for (int i = threadIdx.x; i < n_rows * (D / 4); i += DEC_THREADS) {
        const int row = i / (D / 4);
        struct dec_part x = {-INFINITY, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
        for (int part = 0; part < p.n_parts; part += DEC_MERGE) {
            float2 state[DEC_MERGE];
            float4 o[DEC_MERGE];
#pragma unroll
            for (int j = 0; j < DEC_MERGE; j++) {
                const int k = min(part + j, p.n_parts - 1);
                const int slot = k == 0 ? p.first_slot : 2 * (share + k);
                state[j] = __ldcg(slot_states<D>(a, slot) + row);
                o[j] = __ldcg(slot_rows<D>(a, slot) + i);
            }
#pragma unroll
            for (int j = 0; j < DEC_MERGE; j++)
                if (part + j < p.n_parts)
                    part_add(x, state[j], o[j]);
        }
        write_out<D, DT>(a, p, x, row, i % (D / 4) * 4);
    }
}

__device__ __forceinline__ void add_counts(struct sm90_counts *to, const unsigned (&n)[3])
{
    if (n[0])
        atomicAdd(&to->reachable, n[0]);
    if (n[1])
        atomicAdd(&to->visited, n[1]);
    if (n[2])
        atomicAdd(&to->kept, n[2]);
}

/* Adds up in one warp what all have counted: thread blocks meet at few addresses, and atomics of
 * every warp would hold up the merge. */
template <int D>
__device__ __forceinline__ void count_pages(const struct dec_args &a, const struct dec_piece &p,
                                            int n_rows, unsigned char *smem)
{
    const int row = threadIdx.x, group = a.n_heads / a.n_kv_heads, at = p.tile * DEC_ROWS + row;
    unsigned n[3] = {0, 0, 0};
    if ((!a.seq_counts && !a.head_counts) || row >= 32)
        return;
    if (row < n_rows) {
        n[0] = p.begin == 0 ? (p.pos + at / group) / DEC_PAGE + 1 : 0;
        for (int w = 0; w < DEC_WARPS; w++) {
            const uint2 c = warp_counts<D>(smem, w)[row];
            n[1] += c.x, n[2] += c.y;
        }
        if (a.head_counts)
            add_counts(a.head_counts + p.kv_head * group + at % group, n);
    }
    for (int j = 0; j < 3; j++)
        n[j] = __reduce_add_sync(DEC_ALL, n[j]);
    if (a.seq_counts && row == 0)
        add_counts(a.seq_counts + p.seq, n);
}

#endif
