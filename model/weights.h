/* The parameters of a LlamaForCausalLM as the layer graph wants them: in its dtype, this rank's
 * share, in the device's memory, q/k/v and gate/up joined into one matrix each. Tensor parallelism
 * (Megatron-LM, arXiv 1909.08053): q, k, v, gate and up are split by rows, o and down by columns,
 * so that a layer needs two all-reduces; with more ranks than KV heads several ranks hold the same
 * KV head. The embedding is whole on every rank. The output projection is split by rows, that is by
 * the vocabulary, into slices of one width on all ranks, so that the ranks' logits can be gathered;
 * the last slices hold fewer rows or none, and zeros behind them.
 *
 * Every tensor of the files must be one that the configuration calls for, and the other way round:
 * an ignored bias would be a silently different model. */
#ifndef MODEL_WEIGHTS_H
#define MODEL_WEIGHTS_H

#include "core/dev.h"
#include "core/dtype.h"
#include "model/config.h"
#include "model/safetensors.h"
#include "model/weights_fill.h"

#include <stdint.h>

/* What one rank computes of every layer. */
struct llama_shard {
    int32_t rank, n_ranks;
    int32_t head, n_heads;       /* query heads [head, head + n_heads) of the model */
    int32_t kv_head, n_kv_heads; /* KV heads they read */
    int32_t inter, n_inter;      /* rows of gate and up */
    /* Rows [vocab, vocab + n_vocab) of the output projection, which come padded to vocab_width.
     * That is the same on every rank, and vocab is rank * vocab_width. */
    int32_t vocab, n_vocab, vocab_width;
};

/* Rows of the output projection that a rank holds, without padding: 0 to vocab_width. */
int32_t llama_shard_vocab_rows(const struct llama_shard *s, const struct llama_config *c, int rank);

/* Refuses counts that the ranks do not divide. */
MUST_CHECK int llama_shard_make(struct llama_shard *s, const struct llama_config *c, int rank,
                                int n_ranks, struct err_msg *why);

/* Biases are NULL where the model has none. Those of o and down are added after the all-reduce. */
struct llama_layer {
    const void *attn_norm;              /* [hidden] */
    const void *qkv, *qkv_bias;         /* [(n_heads + 2 n_kv_heads) * head_dim, hidden] */
    const void *o, *o_bias;             /* [hidden, n_heads * head_dim] */
    const void *mlp_norm;               /* [hidden] */
    const void *gate_up, *gate_up_bias; /* [2 n_inter, hidden]: gate, then up */
    const void *down, *down_bias;       /* [hidden, n_inter] */
};

struct llama_weights {
    struct llama_layer *layers;
    const void *embed;   /* [vocab, hidden] */
    const void *norm;    /* [hidden] */
    const void *lm_head; /* [vocab_width, hidden] of the shard; a part of embed where tied */
    enum dtype dtype;    /* of all of them */
    struct dev *dev;
    void *memory; /* all of the above */
    size_t bytes;
};

struct weights_progress {
    void (*fn)(void *arg, uint64_t done, uint64_t total); /* bytes of the files; may be NULL */
    void *arg;
};

struct weights_config {
    struct dev *dev;
    enum dtype dtype;
    const struct weights_stage_ops *stage; /* of the device; NULL: the host writes its memory */
    const struct safetensors *st; /* NULL: norms are 1, the rest is drawn from N(0, 0.02) */
    const struct llama_config *config;
    const struct llama_shard *shard;
    struct weights_progress progress;
};

MUST_CHECK int weights_load(struct llama_weights *out, const struct weights_config *cfg,
                            struct err_msg *why);
/* The 16-bit dtype nearest to the files': f16 where the embedding is, else bf16. */
enum dtype weights_dtype16(const struct safetensors *st);
void weights_release(struct llama_weights *w); /* accepts a zeroed struct */

#endif
