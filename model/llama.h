/* The layer graph of a Llama over a batch of chunks: rows of all sequences concatenated, K and V
 * written into the cache's pages, attention through them, logits for the rows that are asked for.
 * Knows tensors and pages, not requests. Every part is row-local (nn.h, gemm.h, attention.h), so a
 * token's hidden state has the same bits in any batch and chunking.
 * Source: Llama 2 (arXiv 2307.09288), GQA (arXiv 2305.13245). */
#ifndef MODEL_LLAMA_H
#define MODEL_LLAMA_H

#include "attention/attention.h"
#include "core/dev.h"
#include "model/config.h"
#include "model/weights.h"
#include "parallel/comm.h"

struct llama;

struct llama_setup {
    struct dev *dev;
    struct comm *comm; /* NULL: one rank */
    const struct llama_config *config;
    const struct llama_shard *shard;
    const struct llama_weights *weights;
    int32_t max_tokens, max_outputs;
    int64_t max_position;
};

/* One step. Rows [seqs[i].row, + n_rows) are sequence i's; rows of all sequences are contiguous. */
struct llama_input {
    int32_t n_rows, n_seqs;
    const int32_t *ids, *positions; /* [n_rows] */
    const struct attn_seq *seqs;
    const int32_t *outputs; /* [n_outputs] rows whose logits are wanted; rank 0 only */
    int32_t n_outputs;
    struct attn_counts *seq_counts;  /* [n_seqs], added to */
    struct attn_counts *head_counts; /* layer l's n_heads start at l * head_stride; added to */
    int64_t head_stride;
    struct attn_tile_max *tile_max; /* NULL: none */
    /* After each layer's attention where tile_max is set. */
    void (*on_tiles)(void *arg, int layer);
    void *on_tiles_arg;
};

struct llama_times {
    int64_t attention_us, gemm_us;
};

/* What the setup points to must outlive the graph, but for the setup itself. */
MUST_CHECK int llama_create(struct llama **out, const struct llama_setup *setup,
                            struct err_msg *why);
void llama_destroy(struct llama *m); /* accepts NULL */
/* Before the first forward: the cache, and the memory attention needs for it. */
MUST_CHECK int llama_bind_cache(struct llama *m, const struct kv_view *kv, struct err_msg *why);
MUST_CHECK int llama_forward(struct llama *m, const struct llama_input *in,
                             const struct attn_policy *policy, struct llama_times *times);
/* [vocab_size] of output i of the last forward. */
const float *llama_logits(const struct llama *m, int32_t i);

#endif
