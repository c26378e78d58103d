/* RULER's scoring over token ids, as models/needle/tokens.json defines it. An answer is looked at
 * up to its end token and to the length of the expected one; a reference is found when its tokens
 * occur there side by side. The score is the share of references found (string_match_all), or,
 * where any will do, 1 when one is found (string_match_part: the question-answering tasks).
 * Source: Hsieh et al., "RULER", arXiv 2404.06654, scripts/eval/synthetic/constants.py. */
#ifndef EVAL_SCORE_H
#define EVAL_SCORE_H

#include <stdbool.h>
#include <stdint.h>

enum { SCORE_MAX_REFS = 16 };

struct score_ids {
    const int32_t *ids; /* borrowed */
    int32_t n;
};

struct score_key {
    struct score_ids expected; /* ends in the end token */
    struct score_ids refs[SCORE_MAX_REFS];
    int32_t n_refs; /* at least 1 */
    bool any;
};

/* 0 to 1. */
double score_ruler(const struct score_key *key, const int32_t *answer, int32_t n);
/* Whether the answer begins with the expected tokens, up to but without their end token. */
bool score_exact(const struct score_key *key, const int32_t *answer, int32_t n);

#endif
