#include "model/gemm_map.h"

#include <cuda_runtime_api.h>
#include <string.h>

gemm_map_fn gemm_map_open(void)
{
    enum cudaDriverEntryPointQueryResult found;
    void *entry = NULL;
    gemm_map_fn fn = NULL;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                         &found) == cudaSuccess &&
        found == cudaDriverEntryPointSuccess)
        memcpy(&fn, &entry, sizeof fn);
    return fn;
}

int gemm_map(gemm_map_fn fn, CUtensorMap *to, const void *m, int32_t rows, int32_t k,
             int32_t box_rows, int dtype)
{
    const cuuint32_t ones[2] = {1, 1}, box[2] = {GEMM_MAP_COLUMNS, (cuuint32_t)box_rows};
    const cuuint64_t dims[2] = {(cuuint64_t)k, (cuuint64_t)rows}, pitch = (cuuint64_t)k * 2;
    CUresult r =
        fn(to, dtype ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
           (void *)(uintptr_t)m, /* NOLINT(performance-no-int-to-ptr): nothing is written here */
           dims, &pitch, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
           CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return (int)(r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue);
}
