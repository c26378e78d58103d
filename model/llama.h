/* The layer graph of a Llama over a batch of chunks: rows of all sequences concatenated, K and V
 * written into the cache's pages, attention through them, logits for the rows that are asked for.
 * Knows tensors and pages, not requests. Every part is row-local (nn.h, gemm.h, attention.h), so a
 * token's hidden state has the same bits in any batch and chunking.
 * Source: Llama 2 (arXiv 2307.09288), GQA (arXiv 2305.13245). */
#ifndef MODEL_LLAMA_H
#define MODEL_LLAMA_H

#include "attention/attention.h"
#include "attention/attn_cuda.h"
#include "core/dev.h"
#include "model/batch.h"
#include "model/config.h"
#include "model/weights.h"
#include "parallel/comm.h"

struct llama_ops;

/* Common head of every implementation, which embeds it first. */
struct llama {
    const struct llama_ops *ops;
};

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
    const int32_t *outputs; /* [n_outputs] rows whose logits are wanted; the same on every rank */
    int32_t n_outputs;
    bool all_rows; /* see llama_is_narrow */
    /* Tokens to draw, rank 0 only; NULL: none. output_of [n_seqs] is an index into outputs or -1,
     * which gives token -1. */
    const struct batch_seq *draws;
    const int32_t *output_of;
    struct batch_token *tokens;            /* [n_seqs] */
    struct attn_counts *seq_counts;        /* [n_seqs], written */
    struct attn_tile_max *tile_max;        /* CPU; NULL: none */
    const struct attn_cuda_probe *dev_max; /* a GPU; NULL: none */
    /* memory of the device, bins [n_layers, 2, n_heads, n_edges + 1]; on a GPU for steps whose
     * prompts have no gate; NULL: none */
    const struct attn_rel_counts *rel_counts;
    /* After each layer's attention where one of the maxima is set; on a GPU it enqueues. */
    int (*on_tiles)(void *arg, int layer);
    void *on_tiles_arg;
};

/* attention_us, gemm_us and comm_us are 0 where a step is one captured graph. */
struct llama_times {
    int64_t attention_us, gemm_us;
    int64_t comm_us; /* sums over the ranks, waiting for slower ones included */
    int64_t wait_us; /* the host computed or waited for the device */
};

/* One table per kind of device; the functions below say what each does. */
struct llama_ops {
    const char *name;
    bool half;                             /* computes in bf16 or f16, else in f32 */
    const struct weights_stage_ops *stage; /* how weights reach its memory; NULL: directly */
    int (*create)(struct llama **out, const struct llama_setup *setup, struct err_msg *why);
    void (*destroy)(struct llama *m);
    int (*bind_cache)(struct llama *m, const struct kv_view *kv, struct err_msg *why);
    int (*set_policy)(struct llama *m, const struct attn_policy *policy, struct err_msg *why);
    int (*run)(struct llama *m, const struct llama_input *in, struct llama_times *times);
    const float *(*logits)(struct llama *m, int32_t i);
    int (*head_counts)(struct llama *m, struct attn_counts *out, int64_t stride);
};

extern const struct llama_ops llama_cpu;

const struct llama_ops *llama_ops_of(const struct dev *d);

/* Whether the last layer is narrow. Of it, all rows' K and V are wanted and nothing else but the
 * rows of outputs, so it computes the attention of those rows' blocks, which decide together what
 * is kept, and the rest of the output rows alone: no bit of a logit depends on what is left out.
 * Counters count what is computed. all_rows: it is not narrow, for those who want its pages. */
bool llama_is_narrow(const struct llama_input *in);
/* Of each sequence, the rows whose attention a narrow last layer computes: out [n_seqs]. All of one
 * whose lost mass is measured, and of one with generated rows besides the output (it was
 * preempted), whose kernel on a GPU plans all layers alike. False: there are none. */
bool llama_last_rows(const struct llama_input *in, struct attn_rows *out);

/* By the setup's device. What the setup points to must outlive the graph, but for the setup itself.
 */
MUST_CHECK int llama_create(struct llama **out, const struct llama_setup *setup,
                            struct err_msg *why);
void llama_destroy(struct llama *m); /* accepts NULL */
/* Before the first forward: the cache, and the memory attention needs for it. */
MUST_CHECK int llama_bind_cache(struct llama *m, const struct kv_view *kv, struct err_msg *why);
/* This rank's slice of the policy, copied shallowly; a device takes memory for the thresholds.
 * Between steps only. Without a call every head visits all pages. */
MUST_CHECK int llama_set_policy(struct llama *m, const struct attn_policy *policy,
                                struct err_msg *why);
/* A whole step. Tokens and counters are there when it returns. */
MUST_CHECK int llama_run(struct llama *m, const struct llama_input *in, struct llama_times *times);
/* [vocab_size] of output i of the last step, on the host until the next call; rank 0 only. */
const float *llama_logits(struct llama *m, int32_t i);
/* Counters since creation: layer l's n_heads go to out + l * stride. */
MUST_CHECK int llama_head_counts(struct llama *m, struct attn_counts *out, int64_t stride);

#endif
