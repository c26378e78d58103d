/* What gemm_decode.c hands to gemm_decode.cu. */
#ifndef MODEL_GEMM_DECODE_ARGS_H
#define MODEL_GEMM_DECODE_ARGS_H

#include "model/gemm_skinny.h"

#include <cuda.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    DECODE_ROWS = 32,
    DECODE_COLUMNS = 64 /* in a box of the tensor maps: 128 bytes, swizzled */
};

enum decode_mode { DECODE_PLAIN, DECODE_F32, DECODE_SWIGLU, DECODE_APPEND };

struct decode_args {
    CUtensorMap w, x; /* boxes of w_rows and of 16 or 32 rows */
    struct gemm_skinny p;
    struct kv_append append; /* DECODE_APPEND */
    int32_t mode;
    int32_t half, w_rows; /* rows of w in either half of a unit, which w_rows divides */
    int32_t clusters;     /* gemm_decode_clusters */
};

/* How many clusters of thread blocks the device has room for at once. */
int gemm_decode_clusters(void);
int gemm_decode_launch(const struct decode_args *s, int dtype, void *stream);

#ifdef __cplusplus
}
#endif
#endif
