/* Tokens of a step, drawn on the device. Only sequences with penalties need their known tokens
 * there; these go into memory of a fixed size, a range of sequences after the other if need be. */
#include "model/llama_cuda_internal.h"

#include <string.h>

/* Tokens of a sequence that its penalties look at. */
static int64_t history_of(const struct batch_seq *s)
{
    return sampler_cuda_has_penalty(s->sampling) ? (int64_t)s->start + s->n_tokens : 0;
}

/* How many sequences from `first` on have histories that fit together. */
static int32_t fit_range(const struct llama_cuda_state *m, const struct llama_input *in,
                         int32_t first)
{
    int64_t used = 0;
    int32_t i = first;
    for (; i < in->n_seqs; i++) {
        used += in->output_of[i] < 0 ? 0 : history_of(&in->draws[i]);
        if (used > m->history_len)
            break;
    }
    ASSERT(i > first); /* history_len holds the longest sequence */
    return i - first;
}

void llama_cuda_pack_draws(struct llama_cuda_state *m, const struct llama_input *in,
                           struct sampler_cuda_seq *to)
{
    for (int32_t i = 0; i < in->n_seqs;) {
        int32_t n = fit_range(m, in, i);
        int64_t used = 0;
        for (int32_t end = i + n; i < end; i++) {
            to[i] = (struct sampler_cuda_seq){.row = -1};
            if (in->output_of[i] < 0)
                continue;
            sampler_cuda_set(&to[i], &in->draws[i], m->output_row[in->output_of[i]], used,
                             m->c->eos_ids, m->c->n_eos);
            used += history_of(&in->draws[i]);
        }
    }
}

static bool all_plain(const struct llama_input *in)
{
    for (int32_t i = 0; i < in->n_seqs; i++) {
        if (in->output_of[i] >= 0 && !sampler_cuda_is_plain(in->draws[i].sampling))
            return false;
    }
    return true;
}

/* Sends the histories of a range. The host memory is free: only a range after the first waits. */
static int send_histories(struct llama_cuda_state *m, const struct llama_input *in, int32_t first,
                          int32_t n)
{
    int64_t used = 0;
    for (int32_t i = first; i < first + n; i++) {
        int64_t len = in->output_of[i] < 0 ? 0 : history_of(&in->draws[i]);
        memcpy(m->history_host + used, in->draws[i].tokens, (size_t)len * sizeof(int32_t));
        used += len;
    }
    if (used == 0)
        return 0;
    return dev_cuda_upload_async(m->dev, m->history, m->history_host,
                                 (size_t)used * sizeof(int32_t));
}

int llama_cuda_draw(struct llama_cuda_state *m, const struct llama_input *in,
                    struct batch_token *out)
{
    struct sampler_cuda s = {.logits = m->a.logits,
                             .ld = m->c->vocab_size,
                             .logits_type = SAMPLER_F32,
                             .vocab = m->c->vocab_size,
                             .tokens = m->history,
                             .workspace = m->sampler};
    if (all_plain(in)) {
        s.n_seqs = in->n_seqs;
        s.seqs = m->step.draws;
        s.out = out;
        CUDA_TRY(sampler_cuda_greedy(&s, m->stream));
        return 0;
    }
    for (int32_t first = 0; first < in->n_seqs; first += s.n_seqs) {
        s.n_seqs = fit_range(m, in, first);
        s.seqs = m->step.draws + first;
        s.out = out + first;
        if (first > 0)
            TRY(dev_sync(m->dev));
        TRY(send_histories(m, in, first, s.n_seqs));
        CUDA_TRY(sampler_cuda_draw(&s, m->stream));
    }
    return 0;
}
