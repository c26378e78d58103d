/* What one step computes, without requests: rows, sequences, page tables. Rank 0 makes it from the
 * batch; followers read it from rank 0's message and compute the same. The message is for processes
 * of one build (native byte order, no versions), but its counts are checked all the same.
 *   message: u64 step id, i32 n_seqs, n_rows, n_outputs, all_rows; n_seqs headers (struct
 * plan_seq); n_rows token ids; n_outputs rows; the page tables, one after the other. n_seqs == 0
 * means stop.
 */
#ifndef MODEL_STEP_PLAN_H
#define MODEL_STEP_PLAN_H

#include "attention/attention.h"
#include "model/batch.h"

#include <stddef.h>
#include <stdint.h>

struct plan_limits {
    int32_t max_seqs, max_tokens;
    int64_t max_position;
    int32_t vocab_size;
    int32_t n_pages;
    int32_t n_levels;        /* of thresholds */
    int32_t n_decode_levels; /* of thresholds of generated rows */
    int32_t n_page_levels;   /* of thresholds whose pages are known: those can be steered */
    int32_t n_rel_steps[2];  /* between which REL is steered: of 128 rows, of 64 */
};

struct step_plan {
    struct plan_limits limits;
    uint64_t step_id;
    int32_t n_rows, n_seqs, n_outputs;
    int32_t *ids, *positions; /* [max_tokens] */
    struct attn_seq *seqs;    /* [max_seqs] */
    int32_t *outputs;         /* [max_seqs] rows whose logits are wanted, ascending */
    bool all_rows;            /* of the last layer are computed */
};

/* Takes memory for the largest step. limits.n_pages and those of levels may be set later. */
void step_plan_init(struct step_plan *p, const struct plan_limits *limits);
void step_plan_deinit(struct step_plan *p); /* accepts a zeroed struct */
/* ERR_INVALID, with the sequence and the field named, when the batch breaks a rule of batch.h,
 * attention.h or the limits. Page tables are borrowed from the batch. */
MUST_CHECK int step_plan_from_batch(struct step_plan *p, const struct batch *b,
                                    struct err_msg *why);

size_t step_plan_max_message(int32_t max_seqs, int32_t max_tokens, int64_t max_position);
/* Returns the length; buf holds step_plan_max_message bytes. */
size_t step_plan_encode(const struct step_plan *p, void *buf);
size_t step_plan_encode_stop(void *buf);
/* ERR_PROTOCOL when the message does not hold together. Page tables point into buf. */
MUST_CHECK int step_plan_decode(struct step_plan *p, const void *buf, size_t len, bool *stop);

#endif
