/* Prompts of the RULER tasks over token ids, at any length, from a seed: needles in a haystack,
 * variable tracking, common and frequent words, questions over documents. What a task is, token by
 * token, is written in models/needle/tokens.json; this follows it exactly, and draws in the order
 * of models/needle/make_prompts.py, so that a seed gives the same prompt in both.
 *
 * A nominal length L has a prompt of L - 128 tokens, which leaves room for the answer.
 * Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language
 * Models?", arXiv 2404.06654. */
#ifndef EVAL_RULER_H
#define EVAL_RULER_H

#include "core/err.h"
#include "eval/score.h"
#include "eval/vocab.h"

#include <stdint.h>

enum {
    RULER_ANSWER_ROOM = 128,
    RULER_MIN_LENGTH = 512,
    RULER_MAX_LENGTH = 1 << 20,
    RULER_MAX_ANSWER = 64,
};

/* Part of the expected answer. */
struct ruler_span {
    int32_t at, n;
};

struct ruler_prompt {
    enum ruler_task task;
    int32_t length;  /* nominal */
    int32_t *tokens; /* [n_tokens] */
    int32_t n_tokens;
    int32_t expected[RULER_MAX_ANSWER]; /* ends in EOS */
    int32_t n_expected;
    struct ruler_span refs[SCORE_MAX_REFS]; /* what the score looks for */
    int32_t n_refs;
};

struct ruler;
void ruler_create(struct ruler **out, const struct ruler_vocab *vocab);
void ruler_destroy(struct ruler *r); /* accepts NULL */
/* Begins the sequence that the next prompts are drawn from. */
void ruler_seed(struct ruler *r, uint64_t seed);
/* The next prompt; release with ruler_prompt_deinit. ERR_INVALID: the vocabulary file does not
 * define the task, or the length is out of bounds. */
MUST_CHECK int ruler_make(struct ruler *r, struct ruler_prompt *out, enum ruler_task task,
                          int32_t length, struct err_msg *why);
void ruler_prompt_deinit(struct ruler_prompt *p); /* accepts zeroed memory */

/* Which set a prompt belongs to. The sets' seeds differ, so that no prompt of one is drawn for
 * another, whatever the seeds. */
enum ruler_set { RULER_EVALUATE, RULER_CALIBRATE };

/* The seed of one prompt of a set, below 2^53: JSON keeps it. */
uint64_t ruler_sample_seed(uint64_t seed, enum ruler_set set, enum ruler_task task, int32_t length,
                           int32_t index);
/* How an answer to p is scored; borrows from p. */
void ruler_score_key(struct score_key *out, const struct ruler_prompt *p);

#endif
