/* model/sampler.h on a CUDA device: the same steps in the same order, ties to the lower id, the
 * same random numbers. Draws are exact up to the rounding of the weights, which are fixed-point
 * numbers (2^-44 of the likeliest token's weight) so that sums do not depend on the order of
 * threads: a token differs from the CPU's where the random number falls within about 1e-10 of a
 * boundary. Launchers are asynchronous on `stream` (a cudaStream_t), capturable in a graph,
 * allocate nothing and return a cudaError_t as int. Pointers are device memory unless they say
 * host. */
#ifndef MODEL_SAMPLER_CUDA_H
#define MODEL_SAMPLER_CUDA_H

#include "model/batch.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SAMPLER_BF16, SAMPLER_F16, SAMPLER_F32 }; /* of the logits */
enum {
    SAMPLER_MAX_BARRED = 2 * BATCH_MAX_STOP,
    SAMPLER_MAX_VOCAB = 1 << 18 /* so that sums of weights fit */
};

/* What one sequence's next token is drawn by. */
struct sampler_cuda_seq {
    float temperature, top_p, min_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    int32_t top_k, n_logprobs;
    uint64_t seed;
    int64_t history; /* tokens[history + i]: token at position i; read only with penalties */
    int32_t n_known; /* positions before the one that is drawn */
    int32_t prompt_len;
    int32_t row; /* of the logits; -1: no token is drawn (out.token = -1) */
    int32_t n_barred;
    int32_t barred[SAMPLER_MAX_BARRED]; /* ids that may not be drawn now (min_tokens) */
};

struct sampler_cuda {
    const void *logits; /* [*, ld], unchanged */
    int64_t ld;
    int logits_type;
    int32_t vocab, n_seqs;
    const struct sampler_cuda_seq *seqs; /* [n_seqs] */
    const int32_t *tokens;               /* histories of the sequences with penalties */
    void *workspace;                     /* of sampler_cuda_draw */
    struct batch_token *out;             /* [n_seqs]; device or pinned host memory */
};

/* The likeliest token of each sequence, nothing else: for steps whose sequences are all
 * sampler_cuda_is_plain. Reads only `row` of each sequence. */
int sampler_cuda_greedy(const struct sampler_cuda *s, void *stream);
/* Every sequence by its own rules, plain ones too. */
int sampler_cuda_draw(const struct sampler_cuda *s, void *stream);
/* Bytes, for up to n_seqs sequences. Needs no initialisation. */
size_t sampler_cuda_workspace_bytes(int32_t vocab, int32_t n_seqs);

/* ---- host: filling the structures from a batch ---- */

static inline bool sampler_cuda_has_penalty(const struct batch_sampling *p)
{
    return p->repetition_penalty != 1.0f || p->presence_penalty != 0.0f ||
           p->frequency_penalty != 0.0f;
}

static inline bool sampler_cuda_is_plain(const struct batch_sampling *p)
{
    return !(p->temperature > 0.0f) && !sampler_cuda_has_penalty(p) && p->n_logprobs < 1 &&
           p->min_tokens < 1;
}

/* history: where seq->tokens [start + n_tokens] was uploaded to (0 without penalties). */
static inline void sampler_cuda_set(struct sampler_cuda_seq *out, const struct batch_seq *seq,
                                    int32_t row, int64_t history, const int32_t *eos_ids,
                                    int32_t n_eos)
{
    const struct batch_sampling *p = seq->sampling;
    out->temperature = p->temperature;
    out->top_p = p->top_p;
    out->min_p = p->min_p;
    out->repetition_penalty = p->repetition_penalty;
    out->presence_penalty = p->presence_penalty;
    out->frequency_penalty = p->frequency_penalty;
    out->top_k = p->top_k;
    out->n_logprobs = p->n_logprobs;
    out->seed = p->seed;
    out->history = history;
    out->n_known = seq->start + seq->n_tokens;
    out->prompt_len = seq->prompt_len;
    out->row = row;
    out->n_barred = 0;
    if (p->min_tokens < 1 || out->n_known - out->prompt_len >= p->min_tokens)
        return;
    for (int32_t i = 0; i < p->n_stop; i++)
        out->barred[out->n_barred++] = p->stop_ids[i];
    for (int32_t i = 0; i < n_eos && !p->ignore_eos; i++)
        out->barred[out->n_barred++] = eos_ids[i];
}

#ifdef __cplusplus
}
#endif
#endif
