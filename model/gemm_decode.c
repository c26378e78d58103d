#include "model/gemm_decode.h"

#include "core/mem.h"
#include "model/gemm_map.h"

#include <cuda_runtime_api.h>

struct gemm_decode {
    gemm_map_fn map;
    int32_t clusters;
};

int gemm_decode_open(struct gemm_decode **out, struct err_msg *why)
{
    const gemm_map_fn map = gemm_map_open();
    if (!map)
        return err_set(why, ERR_CUDA, "the driver has no tensor maps");
    struct gemm_decode *g = mem_zalloc(1, sizeof *g);
    g->map = map;
    g->clusters = gemm_decode_clusters();
    *out = g;
    return 0;
}

void gemm_decode_close(struct gemm_decode *g)
{
    mem_free(g);
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
    int err = gemm_map(g->map, &s.w, p->w, p->n, p->k, s.w_rows, dtype);
    if (err == (int)cudaSuccess)
        err = gemm_map(g->map, &s.x, p->x, p->rows, p->k, p->rows > 16 ? 32 : 16, dtype);
    return err == (int)cudaSuccess ? gemm_decode_launch(&s, dtype, stream) : err;
}
