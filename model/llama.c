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
