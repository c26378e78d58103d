/* Steps that ranks are compared by: chunks of prompts, steps with no, some and all sequences
 * sampled, and generated tokens of several sequences together. */
#ifndef TESTS_RANK_SCRIPT_H
#define TESTS_RANK_SCRIPT_H

#include "model/batch.h"

#include <stdint.h>

enum {
    SCRIPT_SEQS = 3,
    SCRIPT_STEPS = 8,
    SCRIPT_PAGES_PER_SEQ = 4,
    SCRIPT_PAGES = SCRIPT_SEQS * SCRIPT_PAGES_PER_SEQ,
    SCRIPT_MAX_LEN = 256,
    SCRIPT_MAX_TOKENS = 256 /* of a step */
};

/* Not to be copied: seqs point into it. */
struct rank_script {
    int32_t vocab;
    int32_t tokens[SCRIPT_SEQS][SCRIPT_MAX_LEN];
    int32_t len[SCRIPT_SEQS]; /* known tokens */
    int32_t pages[SCRIPT_SEQS][SCRIPT_PAGES_PER_SEQ];
    struct batch_seq seqs[SCRIPT_SEQS]; /* of the step; id: which sequence */
    int32_t n_seqs;
};

void rank_script_init(struct rank_script *s, int32_t vocab);
/* Sets seqs and n_seqs for a step, 0 to SCRIPT_STEPS - 1, in order. */
void rank_script_step(struct rank_script *s, int32_t step);
/* The step's tokens [n_seqs] become known where a sequence has come to its end. */
void rank_script_grow(struct rank_script *s, const struct batch_token *tokens);

#endif
