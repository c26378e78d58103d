/* Sampling, one thread block a sequence; see sampler_cuda.h for the rules and sampler_select.cuh
 * for how a place in the descending order is found. The logits of one sequence (half a MiB for 128K
 * tokens) stay in L2. Passes over them: a plain greedy step one; a draw from all tokens two; a draw
 * with top-k and top-p one that processes, one that weighs, and one for the places that are sought
 * (the last kept by top-k, the last kept by top-p, the drawn one), or three where thousands of
 * tokens are kept. What limits them are latency and double-precision exponentials, not bandwidth.
 */
#include "core/pack.cuh"
#include "model/sampler_cuda.h"
#include "model/sampler_select.cuh"

#include <cuda_runtime.h>
#include <math_constants.h>

/* Occurrences of a token among those known: the top bit for the prompt, below it the output's.
 * What may not be drawn has all bits. */
#define IN_PROMPT 0x80000000u
#define BARRED    0xffffffffu

/* Per sequence: processed logits, occurrences; both [vocab], rounded up to 32 bytes. */
static __host__ __device__ size_t workspace_row(int32_t vocab)
{
    return ((size_t)vocab + 7) / 8 * 8;
}

size_t sampler_cuda_workspace_bytes(int32_t vocab, int32_t n_seqs)
{
    return (size_t)n_seqs * workspace_row(vocab) * (sizeof(float) + sizeof(uint32_t));
}

/* model/sampler.c's sampler_uniform. */
__device__ uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

__device__ __noinline__ double uniform(uint64_t seed, int64_t position)
{
    const uint64_t key = mix(seed + 0x9e3779b97f4a7c15ull);
    const uint64_t bits = mix(mix(key + (uint64_t)position * 0x9e3779b97f4a7c15ull) ^ key);
    return (double)(bits >> 11) * 0x1p-53;
}

__device__ __forceinline__ bool is_finite(float x)
{
    return fabsf(x) <= 3.402823466e38f; /* false for NaN */
}

__device__ void write_token(struct batch_token *out, int32_t token, bool numeric)
{
    struct batch_token t = {};
    t.token = token;
    t.numeric = numeric;
    *out = t;
}

/* ---- greedy ---- */

template <typename T, int W>
__global__ void __launch_bounds__(SELECT_THREADS)
    greedy(const __grid_constant__ struct sampler_cuda s)
{
    __shared__ uint64_t sums[WARPS];
    const int32_t row = s.seqs[blockIdx.x].row;
    const T *logits = (const T *)s.logits + row * s.ld;
    float best = -CUDART_INF_F;
    int32_t id = 0;
    bool bad = false;
    if (row < 0) {
        if (threadIdx.x == 0)
            write_token(&s.out[blockIdx.x], -1, false);
        return;
    }
#pragma unroll 4
    for (int i = threadIdx.x * W; i < s.vocab; i += SELECT_THREADS * W) {
        float x[W];
        load_pack<W>(x, logits + i);
#pragma unroll
        for (int k = 0; k < W; k++) {
            bad |= !is_finite(x[k]);
            id = x[k] > best ? i + k : id;
            best = fmaxf(best, x[k]);
        }
    }
    /* a thread without tokens has -inf, which loses against every finite logit */
    const uint64_t top = block_max(entry_of(best, id), sums);
    const bool numeric = __syncthreads_or(bad);
    if (threadIdx.x == 0)
        write_token(&s.out[blockIdx.x], numeric ? -1 : entry_id(top), numeric);
}

/* ---- all other sequences ---- */

/* Marks known and barred tokens in counts, for the sequences that need it. */
__device__ __noinline__ void mark_tokens(const struct sampler_cuda_seq &p, const int32_t *tokens,
                                         uint32_t *counts, int32_t vocab, bool penalties)
{
    for (int i = threadIdx.x; i < vocab; i += SELECT_THREADS)
        counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; penalties && i < p.n_known; i += SELECT_THREADS) {
        const int32_t id = tokens[p.history + i];
        if ((uint32_t)id >= (uint32_t)vocab)
            continue;
        if (i < p.prompt_len)
            atomicOr(&counts[id], IN_PROMPT);
        else
            atomicAdd(&counts[id], 1);
    }
    __syncthreads();
    if (threadIdx.x < p.n_barred && (uint32_t)p.barred[threadIdx.x] < (uint32_t)vocab)
        counts[p.barred[threadIdx.x]] = BARRED;
    __syncthreads();
}

/* Rounds where model/sampler.c does. */
__device__ __forceinline__ float penalise(const struct sampler_cuda_seq &p, float l, uint32_t count)
{
    const uint32_t in_output = count & ~IN_PROMPT;
    if (count == BARRED)
        return -CUDART_INF_F;
    if (count && p.repetition_penalty != 1.0f)
        l = l > 0.0f ? __fdiv_rn(l, p.repetition_penalty) : __fmul_rn(l, p.repetition_penalty);
    if (in_output)
        l = __fsub_rn(
            l, __fadd_rn(__fmul_rn(p.frequency_penalty, (float)in_output), p.presence_penalty));
    return l;
}

/* What a pass over the logits finds out. */
struct survey {
    float best, lowest; /* lowest: of those above -inf */
    int32_t best_id;
    bool bad;
};

/* W logits from `id` on: checks, processes, stores. */
template <int W, typename T>
__device__ __forceinline__ void process_pack(struct survey *y, const struct sampler_cuda_seq &p,
                                             const pack<T, W> &raw, float *logits,
                                             const uint32_t *counts, int id)
{
    pack<float, W> x;
    pack<uint32_t, W> count;
    if (counts)
        count = *(const pack<uint32_t, W> *)(counts + id);
#pragma unroll
    for (int k = 0; k < W; k++) {
        float l = to_f32(raw.v[k]);
        y->bad |= !is_finite(l);
        if (counts)
            l = penalise(p, l, count.v[k]);
        if (l > y->best) {
            y->best = l;
            y->best_id = id + k;
        }
        y->lowest = l > -CUDART_INF_F ? fminf(y->lowest, l) : y->lowest;
        x.v[k] = l;
    }
    *(pack<float, W> *)(logits + id) = x;
}

/* Copies and processes the logits; the likeliest token goes to *best. False when the model gave
 * something that is not a number. Two packs a thread are in flight. */
template <int W, typename T>
__device__ bool process(struct select_memory *m, struct vocabulary *v, int32_t *best,
                        const struct sampler_cuda_seq &p, const T *raw, float *logits,
                        const uint32_t *counts)
{
    constexpr int step = SELECT_THREADS * W;
    struct survey y = {-CUDART_INF_F, CUDART_INF_F, 0, false};
    for (int i = threadIdx.x * W; i < v->n; i += 2 * step) {
        const bool two = i + step < v->n;
        pack<T, W> first = *(const pack<T, W> *)(raw + i), second;
        if (two)
            second = *(const pack<T, W> *)(raw + i + step);
        process_pack<W>(&y, p, first, logits, counts, i);
        if (two)
            process_pack<W>(&y, p, second, logits, counts, i + step);
    }
    if (__syncthreads_or(y.bad))
        return false;
    const uint64_t top = block_max(entry_of(y.best, y.best_id), m->sums);
    const float lowest = entry_logit(~block_max(~entry_of(y.lowest, 0), m->sums));
    *best = entry_id(top);
    v->logits = logits;
    v->max = entry_logit(top);
    v->max_exact = (double)v->max;
    v->per_temperature = p.temperature > 0.0f ? 1.0 / (double)p.temperature : 1.0;
    const double range = v->max_exact - (double)lowest;
    v->bin_scale = range > 0.0 ? (float)fmin(SELECT_BINS / range, 1e30) : 1.0f;
    return is_finite(v->max);
}

/* Fills m->all. Returns how many tokens min-p keeps (all, where it is off); *total is the weight of
 * all tokens. */
__device__ __noinline__ uint64_t fill_bins(struct select_memory *m, const struct vocabulary &v,
                                           float min_p, uint64_t *total)
{
    uint64_t kept = 0, sum = 0;
    if (threadIdx.x == 0)
        m->n_prefix = 0;
    bins_clear(&m->all);
    every_token(v, [&](float logit, int) {
        const uint64_t weight = weight_of(v, logit);
        bins_add(&m->all, bin_of(v, logit), weight);
        sum += weight;
        if (min_p > 0.0f) {
            const double x = relative_probability(v, logit);
            kept += x >= (double)min_p && x != 0.0;
        }
    });
    *total = block_sum(sum, m->sums);
    return min_p > 0.0f ? block_sum(kept, m->sums) : (uint64_t)v.n;
}

/* A random part of `share`: the running sum that the drawn token must exceed. */
__device__ __forceinline__ uint64_t draw_target(const struct sampler_cuda_seq &p, uint64_t share)
{
    return min((uint64_t)(uniform(p.seed, p.n_known) * (double)share), share - 1);
}

/* Draws from all tokens, in the order of their ids: a warp sums a stretch of them, then all threads
 * look into the stretch where the number falls. */
__device__ __noinline__ int32_t draw_any(struct select_memory *m, const struct vocabulary &v,
                                         const struct sampler_cuda_seq &p)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int stretch = (v.n + 4 * WARPS - 1) / (4 * WARPS) * 4;
    uint64_t sum = 0, before = 0;
    each_token(v, warp * stretch, min((warp + 1) * stretch, v.n), lane, 32,
               [&](float logit, int) { sum += weight_of(v, logit); });
    for (int o = 16; o; o /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, o);
    uint64_t total = block_sum(lane == 0 ? sum : 0, m->sums);
    uint64_t target = draw_target(p, total);
    before = block_scan(lane == 0 ? sum : 0, m->sums);
    if (lane == 0 && before <= target && target - before < sum)
        m->bin = {before, before, 0, (uint32_t)warp, 0};
    __syncthreads();
    target -= m->bin.before;

    const int each = (stretch + SELECT_THREADS - 1) / SELECT_THREADS;
    const int start = (int)m->bin.bin * stretch, end = min(start + stretch, v.n);
    const int first = start + threadIdx.x * each;
    sum = 0;
    for (int i = first; i < min(first + each, end); i++)
        sum += weight_of(v, v.logits[i]);
    before = block_scan(sum, m->sums);
    if (before <= target && target - before < sum) {
        int i = first;
        for (uint64_t w; target - before >= (w = weight_of(v, v.logits[i])); i++)
            before += w;
        m->entry.entry = entry_of(v.logits[i], i);
    }
    __syncthreads();
    return entry_id(m->entry.entry);
}

/* Draws from what min-p, top-k and top-p leave, in descending order. m->all has been filled. */
__device__ __noinline__ int32_t draw_truncated(struct select_memory *m, const struct vocabulary &v,
                                               const struct sampler_cuda_seq &p,
                                               uint64_t min_p_keeps, uint64_t total)
{
    const uint64_t n = (uint64_t)v.n;
    const uint64_t limit = p.top_k > 0 ? min((uint64_t)p.top_k, n) : n;
    const uint64_t kept = min(limit, max(min_p_keeps, (uint64_t)1));
    uint64_t share = total;
    if (kept < n)
        share = select_find(m, v, false, kept - 1).weight_through;
    if (p.top_p < 1.0f) {
        const double goal = ceil((double)p.top_p * (double)share);
        const uint64_t least = goal < 1.0 ? 1 : min((uint64_t)goal, share);
        share = select_find(m, v, true, least - 1).weight_through;
    }
    return entry_id(select_find(m, v, true, draw_target(p, share)).entry);
}

/* m->all has been filled; total as fill_bins gave it. */
__device__ __noinline__ void log_probs(struct select_memory *m, struct vocabulary v,
                                       struct batch_token *out, int32_t token, int32_t n_logprobs,
                                       uint64_t total)
{
    const int32_t n = min(min(n_logprobs, (int32_t)BATCH_MAX_LOGPROBS), v.n);
    const uint64_t last = select_find(m, v, false, (uint64_t)n - 1).entry;
    if (v.per_temperature != 1.0) { /* the weights so far were those of another temperature */
        uint64_t sum = 0;
        v.per_temperature = 1.0;
        every_token(v, [&](float logit, int) { sum += weight_of(v, logit); });
        total = block_sum(sum, m->sums);
    }
    const double norm = v.max_exact + log((double)total / WEIGHT_ONE);
    if (m->n_prefix < (uint32_t)n) { /* select_find has synchronised */
        collect(m, v, [&](float, uint64_t e) { return e >= last; });
        sort_list(m->list, (uint32_t)n);
    }
    if (threadIdx.x != 0)
        return;
    out->logprob = (float)((double)v.logits[token] - norm);
    for (int i = 0; i < n; i++) {
        const float logit = entry_logit(m->list[i]);
        if (!is_finite(logit)) /* barred tokens are no alternatives */
            break;
        out->top_ids[i] = entry_id(m->list[i]);
        out->top_logprobs[i] = (float)((double)logit - norm);
        out->n_top = i + 1;
    }
}

template <typename T, int W>
__global__ void __launch_bounds__(SELECT_THREADS)
    draw(const __grid_constant__ struct sampler_cuda s)
{
    __shared__ struct select_memory memory;
    struct select_memory *m = &memory;
    const struct sampler_cuda_seq &p = s.seqs[blockIdx.x];
    struct batch_token *out = &s.out[blockIdx.x];
    struct vocabulary v = {};
    const size_t row = workspace_row(s.vocab);
    float *logits = (float *)s.workspace + 2 * row * blockIdx.x;
    uint32_t *counts = (uint32_t *)logits + row;
    const bool penalties =
        p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
    const bool truncated = p.top_k > 0 || p.top_p < 1.0f || p.min_p > 0.0f;
    const bool is_greedy = !(p.temperature > 0.0f);
    uint64_t total = 0, kept = 0;
    int32_t token = -1;

    v.n = s.vocab;
    if (p.row >= 0 && (penalties || p.n_barred > 0))
        mark_tokens(p, s.tokens, counts, s.vocab, penalties);
    else
        counts = NULL;
    if (p.row < 0 ||
        !process<W>(m, &v, &token, p, (const T *)s.logits + p.row * s.ld, logits, counts)) {
        if (threadIdx.x == 0)
            write_token(out, -1, p.row >= 0);
        return;
    }
    if ((truncated && !is_greedy) || p.n_logprobs > 0)
        kept = fill_bins(m, v, is_greedy ? 0.0f : p.min_p, &total);
    if (!is_greedy)
        token = truncated ? draw_truncated(m, v, p, kept, total) : draw_any(m, v, p);
    if (threadIdx.x == 0)
        write_token(out, token, false);
    if (p.n_logprobs > 0)
        log_probs(m, v, out, token, p.n_logprobs, total);
}

/* ---- launchers ---- */

static bool valid(const struct sampler_cuda *s)
{
    return s->vocab >= 1 && s->vocab <= SAMPLER_MAX_VOCAB && s->ld >= s->vocab && s->n_seqs >= 0 &&
           s->logits_type >= SAMPLER_BF16 && s->logits_type <= SAMPLER_F32;
}

template <typename T>
static cudaError_t launch(const struct sampler_cuda *s, bool plain, cudaStream_t stream)
{
    constexpr int W = 16 / sizeof(T);
    const bool wide = s->vocab % W == 0 && s->ld % W == 0 && aligned16(s->logits);
    if (plain && wide)
        greedy<T, W><<<s->n_seqs, SELECT_THREADS, 0, stream>>>(*s);
    else if (plain)
        greedy<T, 1><<<s->n_seqs, SELECT_THREADS, 0, stream>>>(*s);
    else if (wide)
        draw<T, W><<<s->n_seqs, SELECT_THREADS, 0, stream>>>(*s);
    else
        draw<T, 1><<<s->n_seqs, SELECT_THREADS, 0, stream>>>(*s);
    return cudaGetLastError();
}

static int sample(const struct sampler_cuda *s, bool plain, void *stream)
{
    if (!valid(s))
        return (int)cudaErrorInvalidValue;
    if (s->n_seqs == 0)
        return 0;
    switch (s->logits_type) {
    case SAMPLER_BF16: return (int)launch<__nv_bfloat16>(s, plain, (cudaStream_t)stream);
    case SAMPLER_F16: return (int)launch<__half>(s, plain, (cudaStream_t)stream);
    default: return (int)launch<float>(s, plain, (cudaStream_t)stream);
    }
}

int sampler_cuda_greedy(const struct sampler_cuda *s, void *stream)
{
    return sample(s, true, stream);
}

int sampler_cuda_draw(const struct sampler_cuda *s, void *stream)
{
    return sample(s, false, stream);
}
