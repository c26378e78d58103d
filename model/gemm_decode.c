/* See gemm_decode.h. Tensor maps are encoded by the driver through the runtime's entry-point query,
 * so that nothing links against libcuda. */
#include "model/gemm_decode.h"

#include "core/mem.h"

#include <cuda_runtime_api.h>
#include <string.h>

typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

struct gemm_decode {
    encode_fn encode;
    int32_t clusters;
};

int gemm_decode_open(struct gemm_decode **out, struct err_msg *why)
{
    enum cudaDriverEntryPointQueryResult found;
    void *entry = NULL;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                         &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
        return err_set(why, ERR_CUDA, "the driver has no tensor maps");
    struct gemm_decode *g = mem_zalloc(1, sizeof *g);
    memcpy(&g->encode, &entry, sizeof entry);
    g->clusters = gemm_decode_clusters();
    *out = g;
    return 0;
}

void gemm_decode_close(struct gemm_decode *g)
{
    mem_free(g);
}

/* Of a matrix [rows, k]; what a box has beyond it reads as zero. */
static int map(const struct gemm_decode *g, CUtensorMap *to, const void *m, int rows, int k,
               int box_rows, int dtype)
{
    const cuuint32_t ones[2] = {1, 1}, box[2] = {DECODE_COLUMNS, (cuuint32_t)box_rows};
    const cuuint64_t dims[2] = {(cuuint64_t)k, (cuuint64_t)rows}, pitch = (cuuint64_t)k * 2;
    CUresult r = g->encode(
        to, dtype ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
        (void *)(uintptr_t)m, /* NOLINT(performance-no-int-to-ptr): it is read only */
        dims, &pitch, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return (int)(r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue);
}

/* Rows of a unit's half, so that clusters which go through units in rounds do equal work. A box of
 * w_rows may not reach over the end of half a head. */
static void cut(struct decode_args *s)
{
    int64_t best = 0;
    for (int32_t half = 64; half >= 32; half -= s->mode == GEMM_DECODE_APPEND ? 16 : 8) {
        const int64_t units = (s->p.n + 2 * half - 1) / (2 * half);
        const int64_t rounds = (units + s->clusters - 1) / s->clusters;
        if (best && rounds * half >= best)
            continue;
        best = rounds * half;
        s->half = half;
    }
    s->w_rows = s->half;
    while (s->mode == GEMM_DECODE_APPEND && s->append.head_dim / 2 % s->w_rows)
        s->w_rows = s->w_rows == 48 ? 16 : s->w_rows / 2;
}

int gemm_decode_run(const struct gemm_decode *g, const struct gemm_skinny *p,
                    enum gemm_decode_mode mode, const struct kv_append *append, int dtype,
                    void *stream)
{
    struct decode_args s = {.p = *p, .mode = mode, .clusters = g->clusters};
    if (append)
        s.append = *append;
    if (s.clusters < 1 || (append && append->head_dim % 64))
        return (int)cudaErrorInvalidValue;
    cut(&s);
    int err = map(g, &s.w, p->w, p->n, p->k, s.w_rows, dtype);
    if (err == (int)cudaSuccess)
        err = map(g, &s.x, p->x, p->rows, p->k, p->rows > 16 ? 32 : 16, dtype);
    return err == (int)cudaSuccess ? gemm_decode_launch(&s, dtype, stream) : err;
}
