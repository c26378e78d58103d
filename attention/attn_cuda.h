/* Attention of whole steps on a Hopper GPU: the seam between the layer graph and the two kernels.
 *
 * A step is planned once and run for every layer. Sequences are split into prompt rows, which go to
 * the prefill kernel under their gate, and generated rows, up to DEC_MAX_TOKENS of which go to the
 * decode kernel; longer runs of generated rows (a resumed request) are prefilled densely, or if
 * they have a gate cut into such as the decode kernel takes. A step has a launch for each gate and
 * gate_rows of prompts in it; sequences without a gate join the first. The decode kernel's launch
 * has a gate where any of its rows has one.
 *
 * q, k, v and out of all steps are in the same memory, so tensor maps are made once. What a plan
 * needs on the device is packed into the step's upload. The pieces of a step without prompt rows
 * have addresses that depend only on how much was packed before, so a captured launch replays with
 * new plans.
 *
 * Rows whose lost softmax mass is measured (attn_lost.h) are computed twice: by the decode kernel
 * without a gate, whose output is then overwritten, and by the prefill kernel; their two
 * LSEs make the figure. A step in which no row is measured launches nothing for it.
 *
 * Counters are those of attention.h, but for densely recomputed generated rows, which count in row
 * groups of 128. */
#ifndef ATTENTION_ATTN_CUDA_H
#define ATTENTION_ATTN_CUDA_H

#include "attention/attention.h"
#include "core/upload.h"

struct attn_cuda;

struct attn_cuda_config {
    struct dev *dev;
    const struct kv_view *kv;
    int32_t n_heads; /* query heads of this rank */
    int32_t max_seqs, max_rows;
    int64_t max_position;
    float scale;
    const void *q; /* [q_rows, q_stride] device, dtype of the cache */
    void *out;     /* [q_rows, out_stride] */
    int32_t q_rows;
    int64_t q_stride, out_stride;
};

/* ERR_UNSUPPORTED outside the kernels' shapes: head_dim 64 or 128, bf16 or f16. */
MUST_CHECK int attn_cuda_create(struct attn_cuda **out, const struct attn_cuda_config *cfg,
                                struct err_msg *why);
void attn_cuda_destroy(struct attn_cuda *a); /* accepts NULL */
/* Takes memory for thresholds and visits. policy->heads is borrowed until the next call. */
MUST_CHECK int attn_cuda_set_policy(struct attn_cuda *a, const struct attn_policy *policy,
                                    struct err_msg *why);
/* Room that the largest plan takes in an upload, under the present policy. */
size_t attn_cuda_upload_bytes(const struct attn_cuda *a);
/* Counters of a step: this many bytes on the device, zero before it. */
size_t attn_cuda_counts_bytes(const struct attn_cuda *a);

/* A step. cut > 0: rows before it and from it on can be run apart; a sequence that it divides is
 * divided at a multiple of a block. last: all that the last layer need compute of a sequence's
 * prompt rows: whole blocks of them, but for what the sequence does not have; all rows, where its
 * lost mass is measured. */
struct attn_cuda_step {
    const struct attn_seq *seqs;
    int32_t n_seqs;
    int32_t cut;
    const struct attn_rows *last; /* [n_seqs]; NULL: everything */
};

/* Plans a step. counts: device memory of attn_cuda_counts_bytes. */
void attn_cuda_plan(struct attn_cuda *a, const struct attn_cuda_step *step, struct upload *u,
                    void *counts);
/* Page maxima of prompt rows, on the device. max == NULL: none are wanted. */
struct attn_cuda_probe {
    int32_t *max; /* [n_heads, max_groups, max_pages] of one layer: see page_max in attn_sm90.h */
    int32_t max_groups,
        max_pages;     /* cover every step: groups of its rows, pages of its positions */
    int32_t gate_rows; /* 128 or 64: of a group; a gated sequence's must be the same */
};

/* From the next plan on each layer of a step leaves its maxima, and clears what was there before:
 * what reads them is enqueued between layers. Steps then have one sequence whose rows start on a
 * block. Results are those of the same step without a probe. */
void attn_cuda_set_probe(struct attn_cuda *a, const struct attn_cuda_probe *probe);
/* What the REL gate would do (attention.h), for every layer that is run from now on: edges, and
 * bins [n_layers, 2, n_heads, n_edges + 1], are the device's. A kernel of its own computes QK once
 * more; results have their bits. For prompts without a gate. NULL: nothing is counted. */
enum { ATTN_CUDA_REL_EDGES = 31 }; /* at most */
void attn_cuda_set_rel_counts(struct attn_cuda *a, const struct attn_rel_counts *counts);
/* Enqueues one layer of the planned step. ERR_UNSUPPORTED: a probe under the REL gate or a steered
 * one; counting what that would do while a prompt has a gate. */
MUST_CHECK int attn_cuda_run(struct attn_cuda *a, int layer);
/* The same in two halves, 0 and then 1, where the step was planned with a cut: rows before it,
 * which see no keys of the others, and the rest. False where only the whole can be run: the decode
 * kernel's rows are on both sides. */
bool attn_cuda_has_halves(const struct attn_cuda *a);
MUST_CHECK int attn_cuda_run_half(struct attn_cuda *a, int layer, int half);
/* The planned step takes the decode kernel with a gate even if none of its rows has one: the same
 * bits. For a step that is captured empty, under a policy with decode thresholds. */
void attn_cuda_use_decode_gate(struct attn_cuda *a);
/* Whether the plan has rows for the decode kernel alone. */
bool attn_cuda_is_decode(const struct attn_cuda *a);
/* Adds up the counters that the step left (host copy) into out [n_seqs]. */
void attn_cuda_counts(const struct attn_cuda *a, const void *counts, struct attn_counts *out,
                      int32_t n_seqs);
/* Counters since creation, [n_layers, n_heads]; waits for the device. */
MUST_CHECK int attn_cuda_head_counts(struct attn_cuda *a, struct attn_counts *out);

#endif
