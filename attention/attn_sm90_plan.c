/* See attn_sm90_plan.h. Tensor maps are encoded by the driver through the runtime's entry-point
 * query, so that nothing links against libcuda. */
#include "attention/attn_sm90_plan.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdlib.h>

enum { PAGE = 64, BLOCK = 128, HALF = 64, TAIL_PART = 4 };

typedef CUresult (*encode_fn)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

struct box {
    cuuint32_t rank;
    cuuint64_t dim[4], stride[3]; /* strides in bytes, of dimensions 1.. */
    cuuint32_t box[4];
};

/* No promotion in the L2 cache: where rows of 128 bytes are taken out of rows of 256, each would
 * ask for the other as well, a quarter more requests than memory's rate leaves room for. */
static int encode(encode_fn fn, CUtensorMap *map, int dtype, const void *base, const struct box *b)
{
    const cuuint32_t ones[4] = {1, 1, 1, 1};
    CUresult r = fn(map, dtype ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                    b->rank, (void *)(uintptr_t)base, b->dim, b->stride, b->box, ones,
                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                    CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
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

/* Blocks a and b (or -1) of head h, or block a of h and g. */
static struct sm90_tile pair(int seq, int32_t a, int32_t b, int h, int g, int group)
{
    return (struct sm90_tile){.block = {a, b},
                              .head = {(uint16_t)h, (uint16_t)g},
                              .kv_head = (uint16_t)(h / group),
                              .seq = (uint16_t)seq};
}

/* Blocks b and b + 1 of the heads [begin, end). */
static struct sm90_tile *two_blocks(struct sm90_tile *to, int seq, int32_t b, int begin, int end,
                                    int group)
{
    for (int h = begin; h < end; h++)
        *to++ = pair(seq, b, b + 1, h, h, group);
    return to;
}

/* Block b of the heads [begin, end), which are all of some KV heads: two of a KV head at a time. */
static struct sm90_tile *one_block(struct sm90_tile *to, int seq, int32_t b, int begin, int end,
                                   int group)
{
    for (int h = begin; h < end; h++) {
        const bool two = h % group + 1 < group;
        *to++ = pair(seq, b, two ? b : -1, h, two ? h + 1 : h, group);
        h += two;
    }
    return to;
}

/* Blocks that all sections leave to the end of the list: short tiles level the thread blocks'
 * times, and what they read is small. */
static int32_t tail_blocks(const struct sm90_seq *s)
{
    return s->pos == 0 ? (last_block(s) + 1) / TAIL_PART / 2 * 2 : 0;
}

/* Blocks of all sequences, the tails or what comes before them, longest first. */
static struct sm90_tile *section_tiles(struct sm90_tile *to, const struct sm90_seq *seqs,
                                       int n_seqs, bool tail, int begin, int end, int group)
{
    struct sm90_tile *const start = to;
    for (int i = 0; i < n_seqs; i++) {
        if (seqs[i].n_rows == 0)
            continue;
        const int32_t cut = first_block(&seqs[i]) + tail_blocks(&seqs[i]);
        const int32_t first = tail ? first_block(&seqs[i]) : cut;
        int32_t b = tail ? cut - 1 : last_block(&seqs[i]);
        for (; b > first; b -= 2)
            to = two_blocks(to, i, b - 1, begin, end, group);
        if (b == first)
            to = one_block(to, i, b, begin, end, group);
    }
    if (n_seqs > 1)
        qsort(start, (size_t)(to - start), sizeof *start, by_length);
    return to;
}

int64_t sm90_tiles_make(struct sm90_tile *tiles, const struct sm90_seq *seqs, int n_seqs,
                        const struct sm90_shape *shape, size_t l2_bytes)
{
    struct sm90_tile *const start = tiles;
    size_t kv_bytes = 1; /* of one KV head over all sequences */
    for (int i = 0; i < n_seqs; i++)
        kv_bytes += (size_t)(seqs[i].pos + seqs[i].n_rows) * (size_t)shape->head_dim * 4;
    const int group = shape->n_heads / shape->n_kv_heads, n_kv = shape->n_kv_heads;
    const size_t fit = l2_bytes / kv_bytes;
    const int sections = fit >= (size_t)n_kv ? 1
                         : fit > 1           ? (int)((size_t)(n_kv - 1) / fit) + 1
                                             : n_kv;
    const int step = (n_kv + sections - 1) / sections;
    for (int kv = 0; kv < n_kv; kv += step) {
        const int end = kv + step < n_kv ? kv + step : n_kv;
        tiles = section_tiles(tiles, seqs, n_seqs, false, kv * group, end * group, group);
    }
    tiles = section_tiles(tiles, seqs, n_seqs, true, 0, shape->n_heads, group);
    return tiles - start;
}
