/* What gemm_decode.c hands to gemm_decode.cu, and what gemm_decode.h shares with it. */
#ifndef MODEL_GEMM_DECODE_ARGS_H
#define MODEL_GEMM_DECODE_ARGS_H

#include "model/gemm_skinny.h"

#include <cuda.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { GEMM_DECODE_ROWS = 32 };

enum gemm_decode_mode {
    GEMM_DECODE_PLAIN,  /* y of the dtype */
    GEMM_DECODE_F32,    /* y f32 */
    GEMM_DECODE_SWIGLU, /* gemm_skinny_swiglu; n is even */
    GEMM_DECODE_APPEND  /* gemm_skinny_append; head_dim divides by 64 */
};

struct decode_args {
    CUtensorMap w, x; /* boxes (gemm_map.h) of w_rows and of 16 or 32 rows */
    struct gemm_skinny p;
    struct kv_append append; /* GEMM_DECODE_APPEND */
    enum gemm_decode_mode mode;
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
