/* What the files of the graph on a CUDA device share: llama_cuda.c (memory, the table),
 * llama_cuda_step.c (one step), llama_cuda_split.c (a long one over ranks),
 * llama_cuda_times.c, llama_cuda_graph.c (captured steps), llama_cuda_draw.c (tokens). */
#ifndef MODEL_LLAMA_CUDA_INTERNAL_H
#define MODEL_LLAMA_CUDA_INTERNAL_H

#include "attention/attn_cuda.h"
#include "core/dev_cuda.h"
#include "model/gemm_cublas.h"
#include "model/llama.h"
#include "model/sampler_cuda.h"

#include <cuda_runtime_api.h>

enum {
    GRAPH_MAX_ROWS = 256, /* rows of the largest step that is captured */
    MAX_GRAPHS = 32,
    TIMED_ROWS = 512 /* steps of fewer rows are not timed part by part */
};

/* Activations in the model's dtype; n is the bucket of max_tokens, o that of max_outputs. */
struct cuda_activations {
    void *residual; /* [n, hidden] */
    void *hidden;   /* [n, hidden] normed input of a block */
    void *delta;    /* [n, hidden] its output, not yet added to residual */
    void *qkv;      /* [n, qkv_width] */
    void *attn;     /* [n, n_heads * head_dim] */
    void *gate_up;  /* [n, 2 n_inter] */
    void *act;      /* [n, n_inter] */
    void *last;     /* [o, hidden] output rows: their norms, or in a narrow layer residuals */
    float *slice;   /* [o, vocab_width] f32, this rank's logits */
    float *slices;  /* [n_ranks, outputs of the step, vocab_width]; NULL: one rank */
    float *logits;  /* [o, vocab] on rank 0; one rank's slice is that already */
};

/* Where a step's rows lie on the device, and on the host while they are packed. */
struct cuda_rows {
    int32_t n;                 /* with padding */
    bool narrow, attends_last; /* the last layer is (llama.h), and has attention */
    int32_t half;              /* > 0: a long step over ranks, in two halves; rows of the first */
    const int32_t *ids, *positions, *slots, *tails;
    const int32_t *outputs; /* [n_outputs] */
    const int32_t *owned;   /* [n_outputs] the same, -1 where another rank has the residual */
    int32_t n_outputs;
    const struct sampler_cuda_seq *draws; /* [max_outputs] */
};

/* Rows that products and norms work on: all of the step, or the output rows, packed. */
struct cuda_live {
    int32_t n;
    void *residual;
    const void *delta; /* a block's output that the next norm adds to it; NULL: it has it */
    const void *attn;
};

/* A captured step. */
struct cuda_graph {
    cudaGraphExec_t exec;
    int32_t rows;
    bool gated; /* generated rows may have a gate */
};

/* Parts of a step whose time is told. */
enum cuda_part { PART_OTHER, PART_GEMM, PART_ATTENTION, PART_COMM, PART_UNTIMED, N_PARTS };

struct cuda_marks {
    bool on, paused;       /* the step is timed; but not this layer */
    int32_t n_timed;       /* layers */
    int32_t n_layer_marks; /* those up to the end of the last layer */
    cudaEvent_t *events;   /* [max] */
    uint8_t *parts;        /* of the interval that begins there */
    int32_t n, max;
};

struct llama_cuda_state {
    struct llama base;
    struct dev *dev;
    struct comm *comm;
    const struct llama_config *c;
    const struct llama_shard *shard;
    const struct llama_weights *w;
    enum dtype dtype;
    cudaStream_t stream;
    int32_t max_tokens, max_outputs, rows, out_rows; /* rows: with padding */
    int64_t max_position;
    int32_t q_width, kv_width, qkv_width; /* of this rank */

    struct gemm_cublas *gemm;
    struct gemm_cublas_plan *qkv_plan, *o_plan, *gate_up_plan, *down_plan, *head_plan;
    struct cuda_activations a;
    void *memory; /* behind the activations */
    size_t memory_bytes;
    float *cos_sin; /* rope.h */
    size_t cos_sin_bytes;
    void *sampler; /* workspace */
    size_t sampler_bytes;

    const struct kv_view *kv;
    struct attn_policy policy;
    struct attn_cuda *attn;
    /* What a step sends; it begins with the results, which come back by one copy: counters of
     * attention, then batch_token [max_outputs]. */
    struct upload up;
    size_t counts_bytes, results_bytes;
    /* Known tokens of sequences with penalties. */
    int32_t *history_host, *history;
    int64_t history_len;

    struct cuda_rows step;
    struct cuda_live live;
    struct attn_rows *last_rows;      /* [max_outputs] llama_last_rows of the step */
    const struct llama_input *probed; /* the step whose page maxima are wanted, or NULL */
    bool captured;                    /* the last step was a graph: row i's logits are at row i */
    int32_t *output_row; /* [max_outputs] row of the logits of output i of the last step */
    float *logits_host;  /* [vocab] for llama_logits */
    struct cuda_graph graphs[MAX_GRAPHS];
    int32_t n_graphs;
    struct cuda_marks marks;
};

/* llama_cuda_step.c. Packs n_rows rows, padded to `rows`; in NULL: nothing but padding. */
void llama_cuda_pack(struct llama_cuda_state *m, const struct llama_input *in, int32_t rows,
                     bool all_outputs);
MUST_CHECK int llama_cuda_send(struct llama_cuda_state *m);
/* y = x w^T of so many rows, timed as a product. */
MUST_CHECK int llama_cuda_product(struct llama_cuda_state *m, const struct gemm_cublas_plan *plan,
                                  void *y, const void *x, const void *w, int32_t rows);
/* act [n, n_inter] = silu(gate(hidden)) * up(hidden), by way of gate_up [n, 2 n_inter] where that
 * is faster. */
MUST_CHECK int llama_cuda_activate(struct llama_cuda_state *m, const struct llama_layer *w,
                                   void *act, void *gate_up, const void *hidden, int32_t n);
/* Enqueues all kernels of the packed step up to the logits. */
MUST_CHECK int llama_cuda_layers(struct llama_cuda_state *m);
/* Waits for all that is enqueued; a peer that dies does not leave us waiting. */
MUST_CHECK int llama_cuda_wait(struct llama_cuda_state *m);
MUST_CHECK int llama_cuda_run(struct llama *base, const struct llama_input *in,
                              struct llama_times *times);

/* llama_cuda_split.c. Memory for what ranks share out of the longest step that is split;
 * collective. */
MUST_CHECK int llama_cuda_reserve_rows(struct llama_cuda_state *m, struct err_msg *why);
/* Rows of the first half of a step of `rows`, more or less; 0: it is not split. */
int32_t llama_cuda_split_rows(const struct llama_cuda_state *m, int32_t rows);
/* Sets step.half; returns it where attention can be divided there too, else 0. in NULL: not split.
 */
int32_t llama_cuda_split_step(struct llama_cuda_state *m, const struct llama_input *in);
/* Whether this rank has the residual of a row that is split over the ranks. */
bool llama_cuda_owns_row(const struct llama_cuda_state *m, int32_t row);
/* K and V into the cache, then attention, of the rows of half 0 or 1, or of all. */
enum { ATTEND_ALL = -1 };
typedef int (*llama_cuda_attend_fn)(struct llama_cuda_state *m, int layer, int half);
/* All layers of the packed step, whose half is > 0. The last norm of every row is left in hidden;
 * where the last layer is narrow, it is left after its attention. */
MUST_CHECK int llama_cuda_split_layers(struct llama_cuda_state *m, llama_cuda_attend_fn attend);

/* llama_cuda_times.c. Ends the part that runs and begins another; nothing while a step is not
 * timed. */
MUST_CHECK int llama_cuda_mark(struct llama_cuda_state *m, enum cuda_part part);
/* Before every layer, and with layer n_layers after the last. */
MUST_CHECK int llama_cuda_mark_layer(struct llama_cuda_state *m, int layer);
MUST_CHECK int llama_cuda_add_times(struct llama_cuda_state *m, struct llama_times *times);

/* llama_cuda_graph.c. */
MUST_CHECK int llama_cuda_capture(struct llama_cuda_state *m, struct err_msg *why);
void llama_cuda_drop_graphs(struct llama_cuda_state *m);
/* The graph of the fewest rows that holds so many, or NULL. */
const struct cuda_graph *llama_cuda_find_graph(const struct llama_cuda_state *m, int32_t rows,
                                               bool gated);

/* llama_cuda_draw.c. Fills the sampler's structures in the upload; then enqueues the draws. */
void llama_cuda_pack_draws(struct llama_cuda_state *m, const struct llama_input *in,
                           struct sampler_cuda_seq *to);
MUST_CHECK int llama_cuda_draw(struct llama_cuda_state *m, const struct llama_input *in,
                               struct batch_token *out);

static inline struct llama_cuda_state *llama_cuda_of(struct llama *base)
{
    return (struct llama_cuda_state *)base;
}

#endif
