/* How weights reach the memory of a CUDA device. */
#ifndef MODEL_WEIGHTS_CUDA_H
#define MODEL_WEIGHTS_CUDA_H

#include "model/weights_fill.h"

extern const struct weights_stage_ops weights_stage_cuda;

#endif
