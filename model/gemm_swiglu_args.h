/* What gemm_swiglu.c hands to gemm_swiglu.cu. */
#ifndef MODEL_GEMM_SWIGLU_ARGS_H
#define MODEL_GEMM_SWIGLU_ARGS_H

#include <cuda.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    SWIGLU_ROWS = 128, /* of x in a tile */
    SWIGLU_COLS = 128, /* of y in a tile */
    SWIGLU_BLOCKS = 2  /* thread blocks of a cluster: tiles above each other */
};

struct swiglu_args {
    CUtensorMap w, x, y; /* boxes (gemm_map.h) of 64, SWIGLU_ROWS and 64 rows */
    int32_t rows, width, k;
};

int gemm_swiglu_launch(const struct swiglu_args *s, int32_t clusters, int dtype, void *stream);

#ifdef __cplusplus
}
#endif
#endif
