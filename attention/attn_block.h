/* One task of the CPU kernel: the rows of a query block against the pages they walk. Internal to
 * attention/. */
#ifndef ATTENTION_ATTN_BLOCK_H
#define ATTENTION_ATTN_BLOCK_H

#include "attention/attention.h"
#include "attention/attn_plan.h"
#include "attention/attn_tile.h"

/* What all tasks of a call share. */
struct attn_job {
    const struct attn_problem *p;
    const struct kv_view *kv;
    const struct attn_policy *policy;
    const struct attn_tile_ops *tile;
    const struct attn_plan *plan;
    char *scratch; /* n_workers times attn_scratch_bytes */
    size_t scratch_bytes;
};

/* One worker's scratch; a multiple of 64. */
size_t attn_scratch_bytes(int32_t head_dim);
/* A pool_fn: arg is the job, task an index into plan->order. */
void attn_block_run(void *arg, int task, int worker);

#endif
