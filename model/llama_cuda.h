/* The layer graph on a CUDA device: tensor-core products, Hopper attention, 16-bit activations with
 * f32 arithmetic in between, tokens drawn on the device. A step is one copy there, kernels, one
 * copy back and one wait; steps of generated tokens alone replay a captured graph. */
#ifndef MODEL_LLAMA_CUDA_H
#define MODEL_LLAMA_CUDA_H

#include "model/llama.h"

extern const struct llama_ops llama_cuda;

#endif
