/* Chooses a sequence's next token from its logits: penalties, truncation, a draw, log
 * probabilities. Deterministic: the random number is a pure function of (seed, position of the
 * token), sums run in a fixed order, and among equal logits the lower id comes first everywhere.
 *
 * Order of the steps, as in vLLM: repetition, then frequency and presence penalties; stop tokens
 * barred below min_tokens; [log probabilities are taken here]; temperature; min-p; top-k; top-p.
 *   repetition   l > 0 ? l / r : l * r, once for every id among the known tokens
 *   frequency    l -= f * occurrences in the output;   presence  l -= p for every id in the output
 *   min-p        keeps p >= min_p * max p              top-p     the shortest prefix of the
 *                descending order whose share of what min-p and top-k left reaches top_p */
#ifndef MODEL_SAMPLER_H
#define MODEL_SAMPLER_H

#include "core/err.h"
#include "model/batch.h"

#include <stdint.h>

struct sampler;

/* Scratch for n_workers concurrent calls; -ENOMEM. eos_ids are copied. */
MUST_CHECK int sampler_create(struct sampler **out, int32_t vocab_size, int n_workers,
                              const int32_t *eos_ids, int32_t n_eos);
void sampler_destroy(struct sampler *s); /* accepts NULL */
/* The token at position seq->start + seq->n_tokens. Logits [vocab_size] are not changed. Calls of
 * different workers may run at the same time. */
void sampler_draw(struct sampler *s, int worker, struct batch_token *out, const float *logits,
                  const struct batch_seq *seq);
/* Uniform in [0, 1). */
double sampler_uniform(uint64_t seed, int64_t position);

#endif
