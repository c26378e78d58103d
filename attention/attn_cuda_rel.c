/* Counting what the REL gate would do, beside a layer of a dense step. */
#include "attention/attn_cuda_internal.h"
#include "attention/attn_rel_cuda.h"
#include "core/dev_cuda.h"

_Static_assert(sizeof(unsigned long long) == sizeof(uint64_t), "the kernel's bins");
_Static_assert((int)ATTN_CUDA_REL_EDGES == (int)ATTN_REL_MAX_EDGES, "a bin a lane");

void attn_cuda_set_rel_counts(struct attn_cuda *a, const struct attn_rel_counts *counts)
{
    a->rel = counts ? *counts : (struct attn_rel_counts){0};
}

/* What all parts of a layer have in common. */
static struct attn_rel_args args_of(const struct attn_cuda *a, int layer)
{
    const struct attn_cuda_config *c = &a->cfg;
    const size_t bins = 2 * (size_t)c->n_heads * ((size_t)a->rel.n_edges + 1);
    return (struct attn_rel_args){
        .q = c->q,
        .k = c->kv->k[layer],
        .q_stride = c->q_stride,
        .visit = a->visit ? a->visit + (ptrdiff_t)layer * c->n_heads : NULL,
        .n_heads = c->n_heads,
        .n_kv_heads = c->kv->n_kv_heads,
        .order = (int32_t)a->policy.order,
        .scale = c->scale,
        .edges = a->rel.edges,
        .n_edges = a->rel.n_edges,
        .bins = (void *)(a->rel.bins + (size_t)layer * bins),
    };
}

int attn_cuda_count_rel(const struct attn_cuda *a, const struct attn_group *g, int layer)
{
    struct attn_rel_args args = args_of(a, layer);
    if (g->gate != SM90_GATE_NONE)
        return ERR_UNSUPPORTED;
    for (int32_t i = 0; i < g->n_parts; i++) {
        const struct attn_part *p = &g->parts[i];
        if (!p->prompt)
            continue;
        args.row = p->row;
        args.n_rows = p->n_rows;
        args.pos = p->pos;
        args.pages = p->pages;
        CUDA_TRY(attn_rel_launch(&args, a->cfg.kv->head_dim, a->shape.dtype,
                                 dev_cuda_stream(a->cfg.dev)));
    }
    return 0;
}
