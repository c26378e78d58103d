/* Packing with AVX2, for the AVX2 and the AVX-512 tables. Meaning: struct attn_tile_ops. */
#ifndef ATTENTION_ATTN_PACK_H
#define ATTENTION_ATTN_PACK_H

#include "core/dtype.h"

#include <stdint.h>

float attn_pack_k_avx2(float *kt, const void *k, enum dtype t, int32_t head_dim);
void attn_pack_v_avx2(float *v, const void *src, enum dtype t, int32_t head_dim);

#endif
