/* Which implementation of the graph a device gets. */
#include "model/llama.h"

#ifdef WITH_CUDA
#    include "model/llama_cuda.h"
#endif

const struct llama_ops *llama_ops_of(const struct dev *d)
{
#ifdef WITH_CUDA
    if (d->ops == &dev_cuda)
        return &llama_cuda;
#endif
    (void)d;
    return &llama_cpu;
}

bool llama_is_narrow(const struct llama_input *in)
{
    return !in->all_rows && in->n_outputs < in->n_rows;
}

/* Whether all rows of a sequence are attended to: lost mass is sampled in all layers; and generated
 * rows other than the last, and that an output, are a replay's. */
static bool is_whole(const struct attn_seq *s, bool output)
{
    const int32_t end = s->pos + s->n_rows;
    const int32_t made = s->prompt_end > s->pos ? end - s->prompt_end : s->n_rows;
    return s->choice.lost_mass || made > 1 || (made == 1 && !output);
}

/* From the start of the row's block, or of the sequence, to the end of either. */
static struct attn_rows block_of(const struct attn_seq *s, int32_t row)
{
    const int32_t in_block = (s->pos + row - s->row) % KV_BLOCK_TOKENS;
    const int32_t first = row - in_block > s->row ? row - in_block : s->row;
    const int32_t block_end = row - in_block + KV_BLOCK_TOKENS, seq_end = s->row + s->n_rows;
    return (struct attn_rows){first, (block_end < seq_end ? block_end : seq_end) - first};
}

bool llama_last_rows(const struct llama_input *in, struct attn_rows *out)
{
    int32_t next = 0;
    bool any = false;
    for (int32_t i = 0; i < in->n_seqs; i++) {
        const struct attn_seq *s = &in->seqs[i];
        const bool output = next < in->n_outputs && in->outputs[next] < s->row + s->n_rows;
        if (is_whole(s, output))
            out[i] = (struct attn_rows){s->row, s->n_rows};
        else
            out[i] = output ? block_of(s, in->outputs[next]) : (struct attn_rows){0};
        next += output;
        any |= out[i].n_rows > 0;
    }
    return any;
}

int llama_create(struct llama **out, const struct llama_setup *setup, struct err_msg *why)
{
    return llama_ops_of(setup->dev)->create(out, setup, why);
}

void llama_destroy(struct llama *m)
{
    if (m)
        m->ops->destroy(m);
}

int llama_bind_cache(struct llama *m, const struct kv_view *kv, struct err_msg *why)
{
    return m->ops->bind_cache(m, kv, why);
}

int llama_set_policy(struct llama *m, const struct attn_policy *policy, struct err_msg *why)
{
    return m->ops->set_policy(m, policy, why);
}

int llama_run(struct llama *m, const struct llama_input *in, struct llama_times *times)
{
    return m->ops->run(m, in, times);
}

const float *llama_logits(struct llama *m, int32_t i)
{
    return m->ops->logits(m, i);
}

int llama_head_counts(struct llama *m, struct attn_counts *out, int64_t stride)
{
    return m->ops->head_counts(m, out, stride);
}
