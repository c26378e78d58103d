/* Rotary position table: cos and sin of position * frequency, as transformers computes them.
 * Frequencies and angles are rounded to f32 at the same places as there, because the models were
 * trained with those angles: at position 30000 an angle in f32 is off by 1e-3 from the exact one,
 * and exact angles would differ from the reference by that much.
 * Source: RoFormer (arXiv 2104.09864); transformers modeling_rope_utils.py (linear, llama3). */
#ifndef MODEL_ROPE_H
#define MODEL_ROPE_H

#include "model/config.h"

/* inv_freq [head_dim / 2] */
void rope_frequencies(float *inv_freq, const struct rope_config *r, int32_t head_dim);
/* cos_sin [n_positions, 2, head_dim / 2]: a position's cosines, then its sines. head_dim <=
 * LLAMA_MAX_HEAD_DIM. */
void rope_fill(float *cos_sin, const struct rope_config *r, int32_t head_dim, int64_t n_positions);

#endif
