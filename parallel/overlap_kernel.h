/* The launcher of overlap.c's kernel. */
#ifndef PARALLEL_OVERLAP_KERNEL_H
#define PARALLEL_OVERLAP_KERNEL_H

#include "core/dtype.h"

#include <cuda_runtime_api.h>

#include <stddef.h>

#ifdef __cplusplus
extern "C"
#endif
    /* buf += other, in f32, rounded once; both at multiples of 16 bytes, as is their size. */
    cudaError_t
    overlap_add_launch(void *buf, const void *other, size_t bytes, enum dtype dt,
                       cudaStream_t stream);

#endif
