/* Host side of the Hopper prefill kernel: tensor maps of a layer and the tile list of a step. */
#ifndef ATTENTION_ATTN_SM90_PLAN_H
#define ATTENTION_ATTN_SM90_PLAN_H

#include "attention/attn_sm90.h"

#include <stddef.h>

struct sm90_shape {
    int32_t n_heads, n_kv_heads, head_dim;
    int dtype; /* 0 bf16, 1 f16 */
};

/* 0 or -1: the driver rejected the shape (a pointer or stride that is no multiple of 16 bytes). */
int sm90_maps_make(struct sm90_maps *maps, const struct sm90_shape *shape, const void *q,
                   int64_t q_rows, int64_t q_stride, const void *k, const void *v, int32_t n_pages);

/* At most this many tiles are made: the query blocks of all heads that the sequences need. */
int64_t sm90_tile_count(const struct sm90_seq *seqs, int n_seqs, int n_heads);
/* Fills tiles: sections of KV heads whose K and V share the L2 cache, and within a section the
 * longest blocks first with the heads of a block adjacent; the shortest quarter of all sections
 * comes last. A sequence of no rows has none. Returns how many. Allocates nothing. */
int64_t sm90_tiles_make(struct sm90_tile *tiles, const struct sm90_seq *seqs, int n_seqs,
                        const struct sm90_shape *shape, size_t l2_bytes);

#endif
