/* Internal to attention/ and its tests: the CPU kernel with a chosen table of tile functions. */
#ifndef ATTENTION_ATTN_CPU_H
#define ATTENTION_ATTN_CPU_H

#include "attention/attention.h"
#include "attention/attn_tile.h"

MUST_CHECK int attn_cpu_run_with(const struct attn_tile_ops *tile, const struct attn_problem *p,
                                 const struct kv_view *kv, const struct attn_policy *policy,
                                 struct dev *d);

#endif
