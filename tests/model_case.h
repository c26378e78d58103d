/* A model with its device and pages, and the shortest way to run a batch through it. */
#ifndef TESTS_MODEL_CASE_H
#define TESTS_MODEL_CASE_H

#include "core/dev.h"
#include "model/model.h"

#include <stdbool.h>
#include <stdint.h>

enum { CASE_MAX_SEQS = 16 };

struct model_case {
    struct dev *dev;
    struct model *model;
    struct batch_token tokens[CASE_MAX_SEQS];
    struct batch_counts counts[CASE_MAX_SEQS];
    struct batch_result result;
    bool all_rows; /* of its steps: batch.h */
};

/* Fails the test when the model does not open. */
void model_case_open(struct model_case *c, const char *dir, int n_threads, int32_t max_tokens,
                     int64_t max_position, int32_t n_pages, enum dtype kv_dtype);
void model_case_close(struct model_case *c);

extern const struct batch_sampling case_greedy;

/* [start, start + n) of tokens, sampled greedily, dense. */
struct batch_seq case_seq(const int32_t *tokens, int32_t start, int32_t n, int32_t prompt_len,
                          const int32_t *pages, int32_t n_pages);
/* Runs n_seqs sequences in one step and returns model_step's code. */
int case_step(struct model_case *c, const struct batch_seq *seqs, int32_t n_seqs);

#endif
