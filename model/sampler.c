#include "model/sampler.h"

#include "core/mem.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

/* One worker's memory. `order` is a heap of candidate ids at its front and, growing from its back,
 * the ids already taken from it in descending order: together they fill the array. */
struct scratch {
    float *logits;   /* processed */
    double *weights; /* [vocab] */
    int32_t *order;  /* [vocab] */
    int32_t *counts; /* [vocab] occurrences; all zero between calls */
    int32_t n_heap, vocab;
};

struct sampler {
    int32_t vocab;
    int n_workers;
    struct scratch *workers;
    int32_t n_eos;
    int32_t eos_ids[BATCH_MAX_STOP];
};

int sampler_create(struct sampler **out, int32_t vocab_size, int n_workers, const int32_t *eos_ids,
                   int32_t n_eos)
{
    ASSERT(n_eos <= BATCH_MAX_STOP);
    struct sampler *s = mem_zalloc(1, sizeof *s);
    s->vocab = vocab_size;
    s->n_workers = n_workers;
    s->n_eos = n_eos;
    if (n_eos > 0)
        memcpy(s->eos_ids, eos_ids, (size_t)n_eos * sizeof *eos_ids);
    s->workers = mem_zalloc((size_t)n_workers, sizeof *s->workers);
    for (int i = 0; i < n_workers; i++) {
        struct scratch *w = &s->workers[i];
        w->vocab = vocab_size;
        w->logits = mem_try_aligned((size_t)vocab_size, sizeof *w->logits);
        w->weights = mem_try_aligned((size_t)vocab_size, sizeof *w->weights);
        w->order = mem_try_aligned((size_t)vocab_size, sizeof *w->order);
        w->counts = mem_try_aligned((size_t)vocab_size, sizeof *w->counts);
        if (!w->logits || !w->weights || !w->order || !w->counts) {
            sampler_destroy(s);
            return -ENOMEM;
        }
    }
    *out = s;
    return 0;
}

void sampler_destroy(struct sampler *s)
{
    if (!s)
        return;
    for (int i = 0; i < s->n_workers; i++) {
        mem_free(s->workers[i].logits);
        mem_free(s->workers[i].weights);
        mem_free(s->workers[i].order);
        mem_free(s->workers[i].counts);
    }
    mem_free(s->workers);
    mem_free(s);
}

static uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* SplitMix64's finaliser over the counter, keyed twice by the seed so that neighbouring seeds do
 * not give shifted copies of one stream. */
double sampler_uniform(uint64_t seed, int64_t position)
{
    uint64_t key = mix(seed + 0x9e3779b97f4a7c15u);
    uint64_t bits = mix(mix(key + (uint64_t)position * 0x9e3779b97f4a7c15u) ^ key);
    return (double)(bits >> 11) * 0x1p-53;
}

/* Counts ids of tokens [from, to); `clear` undoes it, touching only what was counted. */
static void count_tokens(struct scratch *w, const int32_t *tokens, int32_t from, int32_t to)
{
    for (int32_t i = from; i < to; i++) {
        if ((uint32_t)tokens[i] < (uint32_t)w->vocab)
            w->counts[tokens[i]]++;
    }
}

static void clear_counts(struct scratch *w, const int32_t *tokens, int32_t from, int32_t to)
{
    for (int32_t i = from; i < to; i++) {
        if ((uint32_t)tokens[i] < (uint32_t)w->vocab)
            w->counts[tokens[i]] = 0;
    }
}

static void penalise_repetition(struct scratch *w, const struct batch_seq *seq, int32_t n_known)
{
    const float r = seq->sampling->repetition_penalty;
    if (r == 1.0f)
        return;
    for (int32_t i = 0; i < n_known; i++) {
        int32_t id = seq->tokens[i];
        if ((uint32_t)id >= (uint32_t)w->vocab || w->counts[id]++ > 0)
            continue;
        float *l = &w->logits[id];
        *l = *l > 0.0f ? *l / r : *l * r;
    }
    clear_counts(w, seq->tokens, 0, n_known);
}

static void penalise_output(struct scratch *w, const struct batch_seq *seq, int32_t n_known)
{
    const struct batch_sampling *p = seq->sampling;
    if ((p->presence_penalty == 0.0f && p->frequency_penalty == 0.0f) || seq->prompt_len >= n_known)
        return;
    count_tokens(w, seq->tokens, seq->prompt_len, n_known);
    for (int32_t i = seq->prompt_len; i < n_known; i++) {
        int32_t id = seq->tokens[i];
        if ((uint32_t)id >= (uint32_t)w->vocab || w->counts[id] == 0)
            continue;
        w->logits[id] -= p->frequency_penalty * (float)w->counts[id] + p->presence_penalty;
        w->counts[id] = 0;
    }
}

static void bar(struct scratch *w, const int32_t *ids, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        if ((uint32_t)ids[i] < (uint32_t)w->vocab)
            w->logits[ids[i]] = -INFINITY;
    }
}

/* Copies and processes the logits; false when the model gave something that is not a number. */
static bool process(const struct sampler *s, struct scratch *w, const float *logits,
                    const struct batch_seq *seq)
{
    const struct batch_sampling *p = seq->sampling;
    const int32_t n_known = seq->start + seq->n_tokens;
    for (int32_t i = 0; i < w->vocab; i++) {
        if (!isfinite(logits[i]))
            return false;
        w->logits[i] = logits[i];
    }
    penalise_repetition(w, seq, n_known);
    penalise_output(w, seq, n_known);
    if (p->min_tokens > 0 && n_known - seq->prompt_len < p->min_tokens) {
        bar(w, p->stop_ids, p->n_stop);
        if (!p->ignore_eos)
            bar(w, s->eos_ids, s->n_eos);
    }
    return true;
}

/* Descending by logit; among equals the lower id first. */
static bool comes_before(const struct scratch *w, int32_t a, int32_t b)
{
    return w->logits[a] != w->logits[b] ? w->logits[a] > w->logits[b] : a < b;
}

static void sift_down(struct scratch *w, int32_t at)
{
    const int32_t id = w->order[at];
    for (;;) {
        int32_t child = 2 * at + 1;
        if (child >= w->n_heap)
            break;
        if (child + 1 < w->n_heap && comes_before(w, w->order[child + 1], w->order[child]))
            child++;
        if (!comes_before(w, w->order[child], id))
            break;
        w->order[at] = w->order[child];
        at = child;
    }
    w->order[at] = id;
}

static void heap_build(struct scratch *w)
{
    w->n_heap = w->vocab;
    for (int32_t i = 0; i < w->vocab; i++)
        w->order[i] = i;
    for (int32_t i = w->vocab / 2 - 1; i >= 0; i--)
        sift_down(w, i);
}

/* The id at rank i of the descending order, taking from the heap as far as needed. */
static int32_t ranked(struct scratch *w, int32_t i)
{
    while (w->vocab - w->n_heap <= i) {
        int32_t top = w->order[0];
        w->n_heap--;
        w->order[0] = w->order[w->n_heap];
        w->order[w->n_heap] = top;
        if (w->n_heap > 1)
            sift_down(w, 0);
    }
    return w->order[w->vocab - 1 - i];
}

static int32_t argmax(const struct scratch *w)
{
    int32_t best = 0;
    for (int32_t i = 1; i < w->vocab; i++) {
        if (w->logits[i] > w->logits[best])
            best = i;
    }
    return best;
}

/* Probability of id relative to the most likely token, at the sequence's temperature. */
static double weight(const struct scratch *w, int32_t id, double max, double temperature)
{
    return exp(((double)w->logits[id] - max) / temperature);
}

/* Draws from all tokens, in the order of their ids. */
static int32_t draw_any(struct scratch *w, double u, double max, double temperature)
{
    double total = 0.0, sum = 0.0;
    int32_t last = 0;
    for (int32_t i = 0; i < w->vocab; i++) {
        w->weights[i] = weight(w, i, max, temperature);
        total += w->weights[i];
    }
    for (int32_t i = 0; i < w->vocab; i++) {
        if (w->weights[i] == 0.0)
            continue;
        sum += w->weights[i];
        last = i;
        if (sum > u * total)
            break;
    }
    return last;
}

/* Tokens that min-p and top-k leave, from rank 0 on; their total weight goes to *total. */
static int32_t count_kept(struct scratch *w, const struct batch_sampling *p, double max,
                          double *total)
{
    int32_t n = 0, limit = p->top_k > 0 && p->top_k < w->vocab ? p->top_k : w->vocab;
    *total = 0.0;
    if (limit == w->vocab && !(p->min_p > 0.0f)) { /* top-p alone: no need to rank them all */
        for (int32_t i = 0; i < w->vocab; i++)
            *total += weight(w, i, max, (double)p->temperature);
        return limit;
    }
    for (; n < limit; n++) {
        double x = weight(w, ranked(w, n), max, (double)p->temperature);
        if (n > 0 && (x < (double)p->min_p || x == 0.0))
            break;
        *total += x;
    }
    return n;
}

/* Draws from the front of the descending order. The heap has been built. */
static int32_t draw_truncated(struct scratch *w, const struct batch_sampling *p, double u,
                              double max)
{
    double total, share = 0.0, sum = 0.0;
    int32_t n = count_kept(w, p, max, &total), kept = 0;

    for (; kept < n && (kept == 0 || share < (double)p->top_p * total); kept++) {
        double x = weight(w, ranked(w, kept), max, (double)p->temperature);
        if (kept > 0 && x == 0.0)
            break;
        share += x;
    }
    for (int32_t i = 0; i < kept; i++) {
        sum += weight(w, ranked(w, i), max, (double)p->temperature);
        if (sum > u * share)
            return ranked(w, i);
    }
    return ranked(w, kept - 1);
}

static void log_probs(struct scratch *w, struct batch_token *out, const struct batch_sampling *p,
                      double max)
{
    double total = 0.0;
    for (int32_t i = 0; i < w->vocab; i++)
        total += exp((double)w->logits[i] - max);
    // cppcheck-suppress invalidFunctionArg ; the likeliest token alone adds 1
    const double norm = max + log(total);
    out->logprob = (float)((double)w->logits[out->token] - norm);
    if (p->n_logprobs < 1)
        return;
    out->n_top = p->n_logprobs < BATCH_MAX_LOGPROBS ? p->n_logprobs : BATCH_MAX_LOGPROBS;
    if (out->n_top > w->vocab)
        out->n_top = w->vocab;
    for (int32_t i = 0; i < out->n_top; i++) {
        out->top_ids[i] = ranked(w, i);
        if (isinf(w->logits[out->top_ids[i]])) { /* barred tokens are no alternatives */
            out->n_top = i;
            break;
        }
        out->top_logprobs[i] = (float)((double)w->logits[out->top_ids[i]] - norm);
    }
}

void sampler_draw(struct sampler *s, int worker, struct batch_token *out, const float *logits,
                  const struct batch_seq *seq)
{
    const struct batch_sampling *p = seq->sampling;
    struct scratch *w = &s->workers[worker];

    *out = (struct batch_token){.token = -1};
    if (!process(s, w, logits, seq)) {
        out->numeric = true;
        return;
    }
    const int32_t best = argmax(w);
    const double max = (double)w->logits[best];
    if (!isfinite(max)) { /* penalties overflowed, or every token of the vocabulary is barred */
        out->numeric = true;
        return;
    }
    const bool truncated = p->top_k > 0 || p->top_p < 1.0f || p->min_p > 0.0f;
    const bool greedy = !(p->temperature > 0.0f);
    if ((truncated && !greedy) || p->n_logprobs > 0)
        heap_build(w);
    const double u = sampler_uniform(p->seed, (int64_t)seq->start + seq->n_tokens);
    if (greedy)
        out->token = best;
    else if (truncated)
        out->token = draw_truncated(w, p, u, max);
    else
        out->token = draw_any(w, u, max, (double)p->temperature);
    if (p->n_logprobs > 0)
        log_probs(w, out, p, max);
}
