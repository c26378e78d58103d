/* The CPU backend's table: checks, the workspace's layout and the loop over planned tasks. The work
 * of a task is in attn_block.c, the arithmetic in attn_tile_*.c.
 *
 * Workspace: the plan, then one scratch area per worker. Its size depends on head_dim and the
 * number of workers alone, so it is taken once, at start. */
#include "attention/attn_cpu.h"

#include "attention/attn_block.h"
#include "attention/attn_plan.h"
#include "core/pool.h"

#include <stdalign.h>

enum { ALIGN = 64, MAX_HEAD_DIM = 256 };

static size_t plan_bytes(void)
{
    return (sizeof(struct attn_plan) + ALIGN - 1) / ALIGN * ALIGN;
}

static int supports(int32_t n_heads, const struct kv_view *kv)
{
    if (kv->dtype != DTYPE_F32 && kv->dtype != DTYPE_BF16)
        return ERR_INVALID;
    if (kv->head_dim < 1 || kv->head_dim > MAX_HEAD_DIM)
        return ERR_INVALID;
    if (kv->n_kv_heads < 1 || n_heads < 1 || n_heads % kv->n_kv_heads)
        return ERR_INVALID;
    return 0;
}

static size_t workspace_bytes(int32_t n_heads, const struct kv_view *kv, struct dev *d)
{
    (void)n_heads;
    return ALIGN + plan_bytes() + (size_t)pool_size(d->pool) * attn_scratch_bytes(kv->head_dim);
}

int attn_cpu_run_with(const struct attn_tile_ops *tile, const struct attn_problem *p,
                      const struct kv_view *kv, const struct attn_policy *policy, struct dev *d)
{
    TRY(supports(p->n_heads, kv));
    TRY(attn_validate(p, kv, policy, NULL));
    uintptr_t base = ((uintptr_t)p->workspace + ALIGN - 1) & ~(uintptr_t)(ALIGN - 1);
    struct attn_plan *plan = (struct attn_plan *)base; // NOLINT(performance-no-int-to-ptr)
    struct attn_job job = {
        .p = p,
        .kv = kv,
        .policy = policy,
        .tile = tile,
        .plan = plan,
        .scratch = (char *)plan + plan_bytes(),
        .scratch_bytes = attn_scratch_bytes(kv->head_dim),
    };
    attn_plan_start(plan);
    while (attn_plan_next(plan, p, kv->n_kv_heads))
        pool_run(d->pool, attn_block_run, &job, plan->n_tasks);
    return 0;
}

static int run(const struct attn_problem *p, const struct kv_view *kv,
               const struct attn_policy *policy, struct dev *d)
{
    return attn_cpu_run_with(attn_tile_best(), p, kv, policy, d);
}

const struct attn_ops attn_cpu = {
    .name = "cpu",
    .supports = supports,
    .workspace_bytes = workspace_bytes,
    .run = run,
};
