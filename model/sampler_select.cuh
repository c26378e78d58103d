/* Finding a place in the descending order of a vocabulary without sorting it, by one thread block.
 *
 * The order is that of 64-bit entries (logit as an ordered integer, complement of the id): all
 * different, so that equal logits follow each other by rising id. A place is where a running sum,
 * of tokens or of their weights, first exceeds a target. Weights are fixed-point integers: their
 * sums do not depend on the order in which threads add.
 *
 *   bins    one pass sorts all tokens into bins that are linear in the logit; of each bin the
 * number and the weight are known. Bell-shaped logits spread well over them, so that threads seldom
 * meet at a counter. find    scans the bins, takes the one where the sum crosses the target, and,
 * while it has more than SELECT_LIST tokens, splits it again by entry. What is left is sorted.
 */
#ifndef MODEL_SAMPLER_SELECT_CUH
#define MODEL_SAMPLER_SELECT_CUH

#include <stdint.h>

enum {
    SELECT_THREADS = 512,
    BINS_EACH = 2, /* that a thread scans */
    LIST_EACH = 4,
    SELECT_BINS = BINS_EACH * SELECT_THREADS,
    SELECT_LIST = LIST_EACH * SELECT_THREADS,
    WARPS = SELECT_THREADS / 32
};

/* A token's weight in units of 2^-44 of the likeliest one's; 2^18 of them fit into 63 bits. */
#define WEIGHT_ONE 0x1p44

struct bins {
    uint32_t count[SELECT_BINS];
    uint32_t low[SELECT_BINS], high[SELECT_BINS]; /* of the weight */
};

struct found_bin {
    uint64_t before, weight_before; /* sum of the bins above it: of the measure, of weights */
    uint64_t count_before;
    uint32_t bin, count;
};

struct found_entry {
    uint64_t entry, weight_through; /* weight of all entries down to this one, itself included */
};

/* Shared memory of the thread block. */
struct select_memory {
    struct bins all, part;
    uint64_t list[SELECT_LIST];
    uint64_t sums[WARPS];
    struct found_bin bin;
    struct found_entry entry;
    uint32_t n_list;
    uint32_t n_prefix; /* list has the first n_prefix entries of the vocabulary, sorted */
};

/* The vocabulary of one sequence, after penalties. */
struct vocabulary {
    const float *logits;
    int32_t n;
    float max, bin_scale; /* bins per logit */
    double max_exact, per_temperature;
};

/* ---- entries ---- */

__device__ __forceinline__ uint64_t entry_of(float logit, int32_t id)
{
    const uint32_t u = __float_as_uint(logit + 0.0f); /* -0 equals 0 */
    const uint32_t key = u & 0x80000000u ? ~u : u | 0x80000000u;
    return (uint64_t)key << 32 | (uint32_t)~id;
}

__device__ __forceinline__ int32_t entry_id(uint64_t entry)
{
    return (int32_t) ~(uint32_t)entry;
}

__device__ __forceinline__ float entry_logit(uint64_t entry)
{
    const uint32_t key = (uint32_t)(entry >> 32);
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ double relative_probability(const struct vocabulary &v, float logit)
{
    return exp(((double)logit - v.max_exact) * v.per_temperature);
}

__device__ __forceinline__ uint64_t weight_of(const struct vocabulary &v, float logit)
{
    const double x = ((double)logit - v.max_exact) * v.per_temperature;
    return x < -32.0 ? 0 : __double2ull_rn(exp(x) * WEIGHT_ONE); /* below, it rounds to 0 */
}

/* Falls with the logit, so that bins are in descending order; -inf is in the last one. */
__device__ __forceinline__ int bin_of(const struct vocabulary &v, float logit)
{
    return min(SELECT_BINS - 1, __float2int_rz((v.max - logit) * v.bin_scale));
}

/* f(logit, id) for those of the tokens [begin, end) that fall to one of n threads, by rising id.
 * begin is a multiple of 4, the logits are 16-byte aligned. 64 bytes a thread are in flight: with
 * fewer, a pass is all latency. */
template <typename F>
__device__ __forceinline__ void each_token(const struct vocabulary &v, int begin, int end,
                                           int thread, int n, F f)
{
    constexpr int batch = 4;
    const float4 *logits = (const float4 *)v.logits;
    const int last = end / 4;
    if (begin >= end)
        return;
    for (int at = begin / 4 + thread; at < last; at += batch * n) {
        float4 x[batch];
#pragma unroll
        for (int k = 0; k < batch; k++)
            if (at + k * n < last)
                x[k] = logits[at + k * n];
#pragma unroll
        for (int k = 0; k < batch; k++) {
            const int id = 4 * (at + k * n);
            if (at + k * n < last)
                f(x[k].x, id), f(x[k].y, id + 1), f(x[k].z, id + 2), f(x[k].w, id + 3);
        }
    }
    for (int id = 4 * last + thread; id < end; id += n)
        f(v.logits[id], id);
}

/* The same for the whole vocabulary and the whole thread block. */
template <typename F>
__device__ __forceinline__ void every_token(const struct vocabulary &v, F f)
{
    each_token(v, 0, v.n, threadIdx.x, SELECT_THREADS, f);
}

/* ---- sums over the thread block; every thread must take part ---- */

__device__ __forceinline__ uint64_t block_sum(uint64_t x, uint64_t *sums)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int o = 16; o; o /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, o);
    __syncthreads();
    if (lane == 0)
        sums[warp] = x;
    __syncthreads();
    x = lane < WARPS ? sums[lane] : 0;
    for (int o = 16; o; o /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

__device__ __forceinline__ uint64_t block_max(uint64_t x, uint64_t *sums)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int o = 16; o; o /= 2)
        x = max(x, __shfl_xor_sync(0xffffffffu, x, o));
    __syncthreads();
    if (lane == 0)
        sums[warp] = x;
    __syncthreads();
    x = lane < WARPS ? sums[lane] : 0;
    for (int o = 16; o; o /= 2)
        x = max(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}

/* Sum of the x of all lower threads. */
__device__ __forceinline__ uint64_t block_scan(uint64_t x, uint64_t *sums)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint64_t through = x, above = 0;
    for (int o = 1; o < 32; o *= 2) {
        const uint64_t y = __shfl_up_sync(0xffffffffu, through, o);
        through += lane >= o ? y : 0;
    }
    __syncthreads();
    if (lane == 31)
        sums[warp] = through;
    __syncthreads();
    for (int i = 0; i < warp; i++)
        above += sums[i];
    return above + through - x;
}

/* ---- bins ---- */

__device__ __forceinline__ void bins_clear(struct bins *b)
{
    __syncthreads();
    for (int i = threadIdx.x; i < SELECT_BINS; i += SELECT_THREADS)
        b->count[i] = b->low[i] = b->high[i] = 0;
    __syncthreads();
}

__device__ __forceinline__ void bins_add(struct bins *b, int bin, uint64_t weight)
{
    const uint32_t low = (uint32_t)weight;
    uint32_t high = (uint32_t)(weight >> 32);
    atomicAdd(&b->count[bin], 1);
    if (low) {
        const uint32_t old = atomicAdd(&b->low[bin], low);
        high += old + low < old; /* the carry */
    }
    if (high)
        atomicAdd(&b->high[bin], high);
}

/* The bin where the measure exceeds target, to m->bin. */
__device__ __noinline__ void bins_find(struct select_memory *m, const struct bins *b,
                                       bool by_weight, uint64_t target)
{
    uint64_t weight[BINS_EACH], measure[BINS_EACH], weights = 0, measures = 0, counts = 0;
    const int first = BINS_EACH * threadIdx.x;
    __syncthreads();
    for (int k = 0; k < BINS_EACH; k++) {
        weight[k] = (uint64_t)b->high[first + k] << 32 | b->low[first + k];
        measure[k] = by_weight ? weight[k] : b->count[first + k];
        weights += weight[k];
        measures += measure[k];
        counts += b->count[first + k];
    }
    uint64_t before = block_scan(measures, m->sums);
    uint64_t weight_before = by_weight ? before : block_scan(weights, m->sums);
    uint64_t count_before = by_weight ? block_scan(counts, m->sums) : before;
    for (int k = 0; k < BINS_EACH; k++) {
        const uint32_t count = b->count[first + k];
        if (before <= target && target - before < measure[k])
            m->bin = {before, weight_before, count_before, (uint32_t)(first + k), count};
        before += measure[k];
        weight_before += weight[k];
        count_before += count;
    }
    __syncthreads();
}

/* What is left of the vocabulary during a search: entries of one bin within [low, high]. */
struct remainder {
    int bin;
    uint64_t low, high;
    uint32_t count;
};

__device__ __forceinline__ bool remains(const struct vocabulary &v, const struct remainder &r,
                                        float logit, uint64_t entry)
{
    return bin_of(v, logit) == r.bin && entry >= r.low && entry <= r.high;
}

/* Splits what remains evenly between its first and last entry; m->part has the bins. Returns the
 * binary logarithm of their width. */
__device__ __noinline__ int split(struct select_memory *m, const struct vocabulary &v,
                                  struct remainder *r)
{
    uint64_t least = ~0ull, most = 0;
    every_token(v, [&](float logit, int id) {
        const uint64_t e = entry_of(logit, id);
        if (remains(v, *r, logit, e)) {
            least = min(least, e);
            most = max(most, e);
        }
    });
    r->low = ~block_max(~least, m->sums);
    r->high = block_max(most, m->sums);
    const int bits = 64 - __clzll((long long)(r->high - r->low));
    const int shift = max(0, bits - 10);
    static_assert(SELECT_BINS == 1 << 10, "ten bits choose a bin");
    bins_clear(&m->part);
    every_token(v, [&](float logit, int id) {
        const uint64_t e = entry_of(logit, id);
        if (remains(v, *r, logit, e))
            bins_add(&m->part, (int)((r->high - e) >> shift), weight_of(v, logit));
    });
    return shift;
}

/* Sorts list [n] descending; n <= SELECT_LIST. Bitonic, over the next power of two. */
__device__ __noinline__ void sort_list(uint64_t *list, uint32_t n)
{
    uint32_t size = 2;
    while (size < n)
        size *= 2;
    for (uint32_t i = n + threadIdx.x; i < size; i += SELECT_THREADS)
        list[i] = 0;
    for (uint32_t run = 2; run <= size; run *= 2) {
        for (uint32_t gap = run / 2; gap; gap /= 2) {
            __syncthreads();
            for (uint32_t i = threadIdx.x; i < size / 2; i += SELECT_THREADS) {
                const uint32_t a = 2 * i - (i & (gap - 1)), b = a + gap;
                const uint64_t x = list[a], y = list[b];
                if ((x < y) == ((a & run) == 0)) {
                    list[a] = y;
                    list[b] = x;
                }
            }
        }
    }
    __syncthreads();
}

/* Entries for which `keep` holds, to m->list; at most SELECT_LIST exist. */
template <typename F>
__device__ __forceinline__ void collect(struct select_memory *m, const struct vocabulary &v, F keep)
{
    __syncthreads();
    if (threadIdx.x == 0)
        m->n_list = 0;
    __syncthreads();
    every_token(v, [&](float logit, int id) {
        const uint64_t e = entry_of(logit, id);
        if (keep(logit, e))
            m->list[atomicAdd(&m->n_list, 1)] = e;
    });
    __syncthreads();
}

/* Looks for the place in the sorted list [n]; false when the measure does not reach target there.
 */
__device__ __noinline__ bool list_find(struct select_memory *m, const struct vocabulary &v,
                                       uint32_t n, bool by_weight, uint64_t target,
                                       uint64_t weight_before)
{
    uint64_t weight[LIST_EACH], measure[LIST_EACH], weights = 0, measures = 0;
    const uint32_t first = LIST_EACH * threadIdx.x;
    bool found = false;
    for (uint32_t k = 0; k < LIST_EACH; k++) {
        const bool used = first + k < n;
        weight[k] = used ? weight_of(v, entry_logit(m->list[first + k])) : 0;
        measure[k] = by_weight ? weight[k] : used;
        weights += weight[k];
        measures += measure[k];
    }
    uint64_t before = block_scan(measures, m->sums);
    weight_before += by_weight ? before : block_scan(weights, m->sums);
    for (uint32_t k = 0; k < LIST_EACH; k++) {
        weight_before += weight[k];
        if (before <= target && target - before < measure[k]) {
            m->entry = {m->list[first + k], weight_before};
            found = true;
        }
        before += measure[k];
    }
    return __syncthreads_or(found);
}

/* Makes the list the sorted first n entries: those of the bins down to `bin`. */
__device__ void make_prefix(struct select_memory *m, const struct vocabulary &v, int bin,
                            uint32_t n)
{
    collect(m, v, [&](float logit, uint64_t) { return bin_of(v, logit) <= bin; });
    sort_list(m->list, n);
    if (threadIdx.x == 0)
        m->n_prefix = n;
}

/* The first entry of the descending order down to which the measure exceeds target (which is less
 * than the measure of the vocabulary). m->all has been filled, m->n_prefix is 0 at first. */
__device__ __noinline__ struct found_entry
select_find(struct select_memory *m, const struct vocabulary &v, bool by_weight, uint64_t target)
{
    __syncthreads();
    const uint32_t n_prefix = m->n_prefix;
    if (n_prefix > 0 && list_find(m, v, n_prefix, by_weight, target, 0))
        return m->entry;
    bins_find(m, &m->all, by_weight, target);
    struct remainder r = {(int)m->bin.bin, 0, ~0ull, m->bin.count};
    uint64_t weight_before = m->bin.weight_before;
    const uint64_t through = m->bin.count_before + r.count;
    if (through <= SELECT_LIST) {
        make_prefix(m, v, r.bin, (uint32_t)through);
        (void)list_find(m, v, (uint32_t)through, by_weight, target, 0);
        return m->entry;
    }
    target -= m->bin.before;
    while (r.count > SELECT_LIST) {
        const int shift = split(m, v, &r);
        bins_find(m, &m->part, by_weight, target);
        r.high -= (uint64_t)m->bin.bin << shift;
        const uint64_t width = 1ull << shift;
        r.low = r.high - r.low < width ? r.low : r.high - (width - 1);
        r.count = m->bin.count;
        weight_before += m->bin.weight_before;
        target -= m->bin.before;
    }
    collect(m, v, [&](float logit, uint64_t e) { return remains(v, r, logit, e); });
    sort_list(m->list, r.count);
    if (threadIdx.x == 0)
        m->n_prefix = 0;
    (void)list_find(m, v, r.count, by_weight, target, weight_before);
    return m->entry;
}

#endif
