/* See attn_sm90_plan.h. Tensor maps are encoded by the driver through the runtime's entry-point
 * query, so that nothing links against libcuda. */
#include "attention/attn_sm90_plan.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>

enum { PAGE = 64, BLOCK = 128, HALF = 64 };

typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

struct box {
    cuuint32_t rank;
    cuuint64_t dim[4], stride[3]; /* strides in bytes, of dimensions 1.. */
    cuuint32_t box[4];
};

static int encode(encode_fn fn, CUtensorMap *map, int dtype, const void *base, const struct box *b)
{
    const cuuint32_t ones[4] = {1, 1, 1, 1};
    CUresult r = fn(map, dtype ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                    b->rank, (void *)(uintptr_t)base, b->dim, b->stride, b->box, ones,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? 0 : -1;
}

int sm90_maps_make(struct sm90_maps *maps, const struct sm90_shape *shape, const void *q,
                   int64_t q_rows, int64_t q_stride, const void *k, const void *v, int32_t n_pages)
{
    void *entry = NULL;
    enum cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                         &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
        return -1;
    encode_fn fn = (encode_fn)(uintptr_t)entry;
    const cuuint64_t halves = (cuuint64_t)shape->head_dim / HALF;
    const cuuint64_t row_bytes = (cuuint64_t)shape->head_dim * 2;
    const struct box bq = {3,
                           {HALF, (cuuint64_t)shape->n_heads * halves, (cuuint64_t)q_rows, 0},
                           {HALF * 2, (cuuint64_t)q_stride * 2, 0},
                           {HALF, 1, BLOCK, 0}};
    const struct box bk = {
        4,
        {HALF, PAGE, halves, (cuuint64_t)n_pages * (cuuint64_t)shape->n_kv_heads},
        {row_bytes, HALF * 2, PAGE * row_bytes},
        {HALF, PAGE, (cuuint32_t)halves, 1}};
    if (encode(fn, &maps->q, shape->dtype, q, &bq) || encode(fn, &maps->k, shape->dtype, k, &bk))
        return -1;
    return encode(fn, &maps->v, shape->dtype, v, &bk);
}

static int32_t first_block(const struct sm90_seq *s)
{
    return s->pos / BLOCK;
}

static int32_t last_block(const struct sm90_seq *s)
{
    return (s->pos + s->n_rows - 1) / BLOCK;
}

int64_t sm90_tile_count(const struct sm90_seq *seqs, int n_seqs, int n_heads)
{
    int64_t n = 0;
    for (int i = 0; i < n_seqs; i++)
        n += (int64_t)(last_block(&seqs[i]) - first_block(&seqs[i]) + 1) * n_heads;
    return n;
}

/* Longest first; then by sequence and head, so that heads that share K and V stay together. */
static int by_length(const void *pa, const void *pb)
{
    const struct sm90_tile *a = pa, *b = pb;
    if (a->block[0] != b->block[0])
        return a->block[0] > b->block[0] ? -1 : 1;
    if (a->seq != b->seq)
        return a->seq < b->seq ? -1 : 1;
    return (a->head[0] > b->head[0]) - (a->head[0] < b->head[0]);
}

static struct sm90_tile pair(int seq, int32_t block, int a, int b, int group)
{
    return (struct sm90_tile){.block = {block, b < 0 ? -1 : block},
                              .head = {(uint16_t)a, (uint16_t)(b < 0 ? 0 : b)},
                              .kv_head = {(uint16_t)(a / group), (uint16_t)(b < 0 ? 0 : b / group)},
                              .seq = (uint16_t)seq};
}

/* The tiles of one block: heads [begin, end) in pairs. With an odd number of heads to a KV head,
 * the last of one KV head goes with the last of the next. */
static struct sm90_tile *block_tiles(struct sm90_tile *to, int seq, int32_t block, int begin,
                                     int end, int group)
{
    int left = -1;
    for (int kv = begin; kv < end; kv += group) {
        for (int h = kv; h + 1 < kv + group; h += 2)
            *to++ = pair(seq, block, h, h + 1, group);
        if (group % 2 == 0)
            continue;
        const int last = kv + group - 1;
        if (left >= 0)
            *to++ = pair(seq, block, left, last, group);
        left = left >= 0 ? -1 : last;
    }
    if (left >= 0)
        *to++ = pair(seq, block, left, -1, group);
    return to;
}

int64_t sm90_tiles_make(struct sm90_tile *tiles, const struct sm90_seq *seqs, int n_seqs,
                        const struct sm90_shape *shape, size_t l2_bytes)
{
    struct sm90_tile *const start = tiles;
    size_t kv_bytes = 1; /* of one KV head over all sequences */
    for (int i = 0; i < n_seqs; i++)
        kv_bytes += (size_t)(seqs[i].pos + seqs[i].n_rows) * (size_t)shape->head_dim * 4;
    const int group = shape->n_heads / shape->n_kv_heads;
    size_t fit = l2_bytes / kv_bytes;
    int kv_step = fit < 1 ? 1 : fit > (size_t)shape->n_kv_heads ? shape->n_kv_heads : (int)fit;
    if (group % 2 && kv_step % 2)
        kv_step++; /* heads of two KV heads share a tile */
    for (int kv = 0; kv < shape->n_kv_heads; kv += kv_step) {
        int kv_end = kv + kv_step < shape->n_kv_heads ? kv + kv_step : shape->n_kv_heads;
        struct sm90_tile *section = tiles;
        for (int i = 0; i < n_seqs; i++)
            for (int32_t b = last_block(&seqs[i]); b >= first_block(&seqs[i]); b--)
                tiles = block_tiles(tiles, i, b, kv * group, kv_end * group, group);
        if (n_seqs > 1)
            qsort(section, (size_t)(tiles - section), sizeof *section, by_length);
    }
    return tiles - start;
}
