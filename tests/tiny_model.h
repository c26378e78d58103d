/* Writes a small random Llama to a temporary folder: config.json and model.safetensors. */
#ifndef TESTS_TINY_MODEL_H
#define TESTS_TINY_MODEL_H

#include "core/dtype.h"

#include <stdbool.h>
#include <stdint.h>

struct tiny_model {
    int32_t vocab, hidden, inter, n_layers, n_heads, n_kv_heads, head_dim;
    bool tied, biases, llama3; /* llama3: its rope scaling */
    enum dtype dtype;          /* DTYPE_BF16 or DTYPE_F16, of the file */
    uint64_t seed;
    char dir[64]; /* out: the folder */
};

/* Fails the test where the folder cannot be written. */
void tiny_model_write(struct tiny_model *t);
void tiny_model_remove(struct tiny_model *t);

#endif
