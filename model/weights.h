/* The parameters of a LlamaForCausalLM as the layer graph wants them: f32, this rank's share, q/k/v
 * and gate/up joined into one matrix each. Tensor parallelism (Megatron-LM, arXiv 1909.08053): q,
 * k, v, gate and up are split by rows, o and down by columns, so that a layer needs two
 * all-reduces; with more ranks than KV heads several ranks hold the same KV head. The embedding is
 * whole on every rank; the output projection is on rank 0 alone, which is the one that samples.
 *
 * Every tensor of the files must be one that the configuration calls for, and the other way round:
 * an ignored bias would be a silently different model. */
#ifndef MODEL_WEIGHTS_H
#define MODEL_WEIGHTS_H

#include "core/dev.h"
#include "model/config.h"
#include "model/safetensors.h"

#include <stdint.h>

/* What one rank computes of every layer. */
struct llama_shard {
    int32_t rank, n_ranks;
    int32_t head, n_heads;       /* query heads [head, head + n_heads) of the model */
    int32_t kv_head, n_kv_heads; /* KV heads they read */
    int32_t inter, n_inter;      /* rows of gate and up */
};

/* Refuses counts that the ranks do not divide. */
MUST_CHECK int llama_shard_make(struct llama_shard *s, const struct llama_config *c, int rank,
                                int n_ranks, struct err_msg *why);

/* Biases are NULL where the model has none. Those of o and down are added after the all-reduce. */
struct llama_layer {
    const float *attn_norm;              /* [hidden] */
    const float *qkv, *qkv_bias;         /* [(n_heads + 2 n_kv_heads) * head_dim, hidden] */
    const float *o, *o_bias;             /* [hidden, n_heads * head_dim] */
    const float *mlp_norm;               /* [hidden] */
    const float *gate_up, *gate_up_bias; /* [2 n_inter, hidden]: gate, then up */
    const float *down, *down_bias;       /* [hidden, n_inter] */
};

struct llama_weights {
    struct llama_layer *layers;
    const float *embed;   /* [vocab, hidden] */
    const float *norm;    /* [hidden] */
    const float *lm_head; /* [vocab, hidden]; embed where tied; NULL on followers */
    struct dev *dev;
    float *memory; /* all of the above */
    size_t bytes;
};

struct weights_progress {
    void (*fn)(void *arg, uint64_t done, uint64_t total); /* bytes of the files; may be NULL */
    void *arg;
};

MUST_CHECK int weights_load(struct llama_weights *out, struct dev *d, const struct safetensors *st,
                            const struct llama_config *c, const struct llama_shard *shard,
                            const struct weights_progress *progress, struct err_msg *why);
void weights_release(struct llama_weights *w); /* accepts a zeroed struct */

#endif
