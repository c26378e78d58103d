/* Tensor maps of matrices: what bulk copies on a Hopper GPU read and write tiles by. */
#ifndef MODEL_GEMM_MAP_H
#define MODEL_GEMM_MAP_H

#include <cuda.h>
#include <stdint.h>

enum { GEMM_MAP_COLUMNS = 64 /* of a box: 128 bytes, swizzled */ };

/* The driver's cuTensorMapEncodeTiled. */
typedef CUresult (*gemm_map_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

#ifdef __cplusplus
extern "C" {
#endif

/* Found through the runtime, so that nothing links against libcuda; NULL: the driver has none. */
gemm_map_fn gemm_map_open(void);
/* Of m [rows, k], 16-bit, 16-byte aligned, k divisible by 8, in boxes of box_rows rows: what a box
 * has beyond it reads as zero and is not written. dtype: 0 bf16, 1 f16. Returns a cudaError_t. */
int gemm_map(gemm_map_fn fn, CUtensorMap *to, const void *m, int32_t rows, int32_t k,
             int32_t box_rows, int dtype);

#ifdef __cplusplus
}
#endif

#endif
