/* The pointwise and row-wise operations of a Llama layer, on the device's worker pool.
 * Every row is computed by itself and in a fixed order, so that a row's bits depend on nothing but
 * the row: not on the batch, its size, or the number of threads. Matrices are row-major f32. */
#ifndef MODEL_NN_H
#define MODEL_NN_H

#include "core/dev.h"

#include <stdint.h>

/* out [n, width] = rows ids[i] of table [*, width] */
void nn_gather(struct dev *d, float *out, const float *table, const int32_t *ids, int32_t n,
               int32_t width);
/* out [n, width] = x / sqrt(mean(x^2) + eps) * weight; out may be x */
void nn_rms_norm(struct dev *d, float *out, const float *x, const float *weight, int32_t n,
                 int32_t width, float eps);

struct nn_rope {
    const float *cos_sin; /* rope.h */
    int32_t n_heads;      /* heads at the start of every row that are rotated: q, then k */
    int32_t head_dim;
    int64_t stride; /* floats between rows */
};
/* Rotates x [n, stride] in place; element i pairs with i + head_dim / 2 (rotate-half). */
void nn_rope(struct dev *d, float *x, const struct nn_rope *r, const int32_t *positions, int32_t n);
/* out [n, width] = silu(g) * u, rows of gate_up are g [width], u [width] */
void nn_swiglu(struct dev *d, float *out, const float *gate_up, int32_t n, int32_t width);
/* x [n, width] += bias [width] */
void nn_add_bias(struct dev *d, float *x, const float *bias, int32_t n, int32_t width);
/* x [n, width] += y + bias; bias may be NULL */
void nn_residual(struct dev *d, float *x, const float *y, const float *bias, int32_t n,
                 int32_t width);

#endif
