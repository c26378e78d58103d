#include "attention/attn_cuda.h"

#include "attention/attn_cuda_internal.h"
#include "core/dev_cuda.h"
#include "core/mem.h"

#include <cuda_runtime_api.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

/* Bytes of the second-level cache that a section of the prefill kernel's tiles may fill with K and
 * V: it also holds q, out and what other sections leave. */
enum { L2_SECTION_BYTES = 32 << 20 };

_Static_assert(sizeof(struct sm90_counts) == sizeof(struct attn_counts), "the same counters");
_Static_assert((int)SM90_GATE_NONE == (int)ATTN_GATE_NONE &&
                   (int)SM90_GATE_ABS == (int)ATTN_GATE_ABS &&
                   (int)SM90_GATE_REL == (int)ATTN_GATE_REL,
               "gates of the policy and of the kernel");
_Static_assert((int)SM90_ORDER_DIAG_SINK_R2L == (int)ATTN_ORDER_DIAG_SINK_R2L &&
                   (int)SM90_ORDER_L2R == (int)ATTN_ORDER_L2R,
               "orders of the policy and of the kernel");

static int check_shape(const struct attn_cuda_config *c, struct err_msg *why)
{
    const struct kv_view *kv = c->kv;
    if (kv->dtype == DTYPE_F32)
        return err_set(why, ERR_UNSUPPORTED, "attention on a GPU: the cache is bf16 or f16");
    if (kv->head_dim != 64 && kv->head_dim != 128)
        return err_set(why, ERR_UNSUPPORTED, "attention on a GPU: head_dim %d is not 64 or 128",
                       kv->head_dim);
    if (c->n_heads % kv->n_kv_heads)
        return err_set(why, ERR_UNSUPPORTED, "attention: %d heads over %d KV heads", c->n_heads,
                       kv->n_kv_heads);
    return 0;
}

static int take(struct attn_cuda *a, void **out, size_t bytes, const char *what,
                struct err_msg *why)
{
    struct err_msg inner = {{0}};
    int err = dev_alloc(a->cfg.dev, out, bytes, &inner);
    return err < 0 ? err_set(why, err, "%s: %.300s", what, err_why(&inner, err)) : 0;
}

/* One piece of zeroed memory: work queue, arrivals, parts of cut tasks, counters, LSEs. */
static int take_scratch(struct attn_cuda *a, struct err_msg *why)
{
    const size_t queue = upload_round(2 * sizeof *a->queue);
    const size_t arrived = upload_round((size_t)a->dec_shape.n_shares * sizeof *a->arrived);
    const size_t parts = upload_round(dec_workspace_bytes(&a->dec_shape));
    const size_t counts =
        upload_round((size_t)a->cfg.kv->n_layers * (size_t)a->cfg.n_heads * sizeof *a->head_counts);
    const size_t lse = (size_t)a->cfg.max_rows * (size_t)a->cfg.n_heads * sizeof(float);
    a->scratch_bytes = queue + arrived + parts + counts + 2 * lse;
    TRY(take(a, &a->scratch, a->scratch_bytes, "attention workspace", why));
    char *p = a->scratch;
    a->queue = (void *)p;
    a->arrived = (void *)(p + queue);
    a->workspace = (void *)(p + queue + arrived);
    a->head_counts = (void *)(p + queue + arrived + parts);
    a->samples.dense = (void *)(p + queue + arrived + parts + counts);
    a->samples.kept = (void *)(p + queue + arrived + parts + counts + lse);
    return 0;
}

static int make_maps(struct attn_cuda *a, struct err_msg *why)
{
    const struct attn_cuda_config *c = &a->cfg;
    a->maps = mem_try_aligned((size_t)c->kv->n_layers, sizeof *a->maps);
    if (!a->maps)
        return err_set(why, -ENOMEM, "no memory for tensor maps");
    for (int32_t l = 0; l < c->kv->n_layers; l++) {
        if (sm90_maps_make(&a->maps[l], &a->shape, c->q, c->q_rows, c->q_stride, c->kv->k[l],
                           c->kv->v[l], c->kv->n_pages) < 0)
            return err_set(why, ERR_CUDA, "the driver refused a tensor map (layer %d)", l);
    }
    return 0;
}

static void init(struct attn_cuda *a, const struct attn_cuda_config *cfg)
{
    const struct kv_view *kv = cfg->kv;
    a->cfg = *cfg;
    a->n_sms = dev_cuda_sms(cfg->dev);
    a->l2_bytes = L2_SECTION_BYTES;
    a->shape =
        (struct sm90_shape){cfg->n_heads, kv->n_kv_heads, kv->head_dim, dev_cuda_dtype(kv->dtype)};
    a->dec_shape = (struct dec_shape){cfg->n_heads, kv->n_kv_heads, kv->head_dim,
                                      dev_cuda_dtype(kv->dtype), dec_shares(a->n_sms)};
    a->plan_of = mem_zalloc((size_t)kv->n_layers, sizeof *a->plan_of);
    a->plans = mem_zalloc((size_t)kv->n_layers, sizeof *a->plans);
    a->n_plans = 1;
    for (int i = 0; i < N_LAUNCHES; i++)
        a->groups[i].parts =
            mem_zalloc((size_t)attn_cuda_max_parts(a, i), sizeof *a->groups[i].parts);
    a->last_seqs = mem_zalloc((size_t)attn_cuda_max_parts(a, LAUNCH_PREFILL), sizeof *a->last_seqs);
}

int attn_cuda_create(struct attn_cuda **out, const struct attn_cuda_config *cfg,
                     struct err_msg *why)
{
    TRY(check_shape(cfg, why));
    struct attn_cuda *a = mem_zalloc(1, sizeof *a);
    init(a, cfg);
    int err = take_scratch(a, why);
    if (err == 0)
        err = make_maps(a, why);
    if (err < 0) {
        attn_cuda_destroy(a);
        return err;
    }
    *out = a;
    return 0;
}

static void drop_policy(struct attn_cuda *a)
{
    dev_release(a->cfg.dev, a->abs.t, a->abs.bytes);
    dev_release(a->cfg.dev, a->decode.t, a->decode.bytes);
    dev_release(a->cfg.dev, a->abs_pages.t, a->abs_pages.bytes);
    dev_release(a->cfg.dev, a->rel_128.t, a->rel_128.bytes);
    dev_release(a->cfg.dev, a->rel_64.t, a->rel_64.bytes);
    dev_release(a->cfg.dev, a->visit, a->visit_bytes);
    a->abs.t = a->decode.t = a->abs_pages.t = a->rel_128.t = a->rel_64.t = NULL;
    a->visit = NULL;
}

void attn_cuda_destroy(struct attn_cuda *a)
{
    if (!a)
        return;
    drop_policy(a);
    dev_release(a->cfg.dev, a->scratch, a->scratch_bytes);
    for (int i = 0; i < N_LAUNCHES; i++)
        mem_free(a->groups[i].parts);
    mem_free(a->last_seqs);
    mem_free(a->maps);
    mem_free(a->plans);
    mem_free(a->plan_of);
    mem_free(a);
}

static int upload_thresholds(struct attn_cuda *a, struct attn_table *to,
                             const struct attn_thresholds *t, const char *name, struct err_msg *why)
{
    const size_t row = (size_t)t->n_blocks * sizeof *to->t;
    void *memory = NULL;
    char what[96];
    size_t at = 0;
    if (!t->t)
        return 0;
    to->bytes = (size_t)t->n_levels * (size_t)t->n_layers * (size_t)t->n_heads * row;
    (void)snprintf(what, sizeof what, "%s [%d, %d, %d, %d]", name, t->n_levels, t->n_layers,
                   t->n_heads, t->n_blocks);
    TRY(take(a, &memory, to->bytes, what, why));
    to->t = memory;
    /* heads at a time: all where they follow each other */
    const int32_t step = t->head_stride == t->n_blocks ? t->n_heads : 1;
    for (int32_t k = 0; k < t->n_levels; k++) {
        for (int32_t l = 0; l < t->n_layers; l++) {
            for (int32_t h = 0; h < t->n_heads; h += step, at += (size_t)step * row)
                TRY(dev_upload(a->cfg.dev, (char *)memory + at,
                               t->t + k * t->level_stride + l * t->layer_stride +
                                   h * t->head_stride,
                               (size_t)step * row));
        }
    }
    return 0;
}

static int upload_visits(struct attn_cuda *a, struct err_msg *why)
{
    const struct attn_head_policy *heads = a->policy.heads;
    const size_t n = (size_t)a->cfg.kv->n_layers * (size_t)a->cfg.n_heads;
    void *memory = NULL;
    if (!heads)
        return 0;
    a->visit_bytes = n * sizeof *a->visit;
    TRY(take(a, &memory, a->visit_bytes, "visits of the heads", why));
    a->visit = memory;
    struct sm90_visit *visit = mem_zalloc(n, sizeof *visit);
    for (size_t i = 0; i < n; i++) {
        visit[i] = heads[i].visit == ATTN_VISIT_ALL
                       ? (struct sm90_visit){1, -1} /* page 0 behind the diagonal */
                       : (struct sm90_visit){heads[i].sink_pages, heads[i].local_pages};
    }
    int err = dev_upload(a->cfg.dev, a->visit, visit, a->visit_bytes);
    mem_free(visit);
    return err;
}

static bool same_visits(const struct attn_head_policy *x, const struct attn_head_policy *y,
                        int32_t n)
{
    for (int32_t h = 0; h < n; h++) {
        if (x[h].visit != y[h].visit || x[h].sink_pages != y[h].sink_pages ||
            x[h].local_pages != y[h].local_pages)
            return false;
    }
    return true;
}

/* Layers whose heads visit alike share a decode plan. */
static void group_layers(struct attn_cuda *a)
{
    const struct attn_head_policy *heads = a->policy.heads;
    const int32_t n = a->cfg.n_heads;
    a->n_plans = 0;
    for (int32_t l = 0; l < a->cfg.kv->n_layers; l++) {
        int32_t i = 0;
        while (i < a->n_plans && heads &&
               !same_visits(heads + (ptrdiff_t)l * n, heads + (ptrdiff_t)a->plans[i].layer * n, n))
            i++;
        if (i == a->n_plans)
            a->plans[a->n_plans++].layer = l;
        a->plan_of[l] = i;
    }
}

int attn_cuda_set_policy(struct attn_cuda *a, const struct attn_policy *policy, struct err_msg *why)
{
    drop_policy(a);
    a->policy = *policy;
    group_layers(a);
    TRY(upload_thresholds(a, &a->abs, &policy->abs, "thresholds", why));
    TRY(upload_thresholds(a, &a->decode, &policy->decode, "decode thresholds", why));
    TRY(upload_thresholds(a, &a->abs_pages, &policy->abs_pages, "pages of heads", why));
    TRY(upload_thresholds(a, &a->rel_128, &policy->rel_128, "densities of 128 rows", why));
    TRY(upload_thresholds(a, &a->rel_64, &policy->rel_64, "densities of 64 rows", why));
    return upload_visits(a, why);
}

static const struct sm90_visit *visit_of(const struct attn_cuda *a, int layer)
{
    return a->visit ? a->visit + (ptrdiff_t)layer * a->cfg.n_heads : NULL;
}

void attn_cuda_set_probe(struct attn_cuda *a, const struct attn_cuda_probe *probe)
{
    a->probe = *probe;
}

/* The kernel for a group: page maxima come from one that has the ABS gate. */
static int gate_of(const struct attn_cuda *a, const struct attn_group *g, int *gate)
{
    *gate = g->gate;
    if (!a->probe.max)
        return 0;
    if (g->gate == SM90_GATE_REL)
        return ERR_UNSUPPORTED;
    *gate = SM90_GATE_ABS_MAX;
    const size_t n =
        (size_t)a->cfg.n_heads * (size_t)a->probe.max_groups * (size_t)a->probe.max_pages;
    CUDA_TRY(
        cudaMemsetAsync(a->probe.max, 0x80, n * sizeof *a->probe.max, dev_cuda_stream(a->cfg.dev)));
    return 0;
}

/* Whether a layer computes less than the others. */
static bool is_narrow(const struct attn_cuda *a, int layer)
{
    return a->narrow && layer == a->cfg.kv->n_layers - 1;
}

static int prefill(const struct attn_cuda *a, const struct attn_group *g, int layer)
{
    const struct attn_cuda_config *c = &a->cfg;
    const bool last = is_narrow(a, layer);
    int gate = 0;
    TRY(gate_of(a, g, &gate));
    const struct sm90_args args = {
        .tiles = last ? g->last_tiles : g->tiles,
        .n_tiles = last ? g->n_last_tiles : g->n_tiles,
        .queue = a->queue,
        .seqs = g->seqs + (ptrdiff_t)layer * g->seq_stride,
        .visit = visit_of(a, layer),
        .out = c->out,
        .lse = a->samples.n > 0 ? a->samples.kept : NULL,
        .out_stride = c->out_stride,
        .n_heads = c->n_heads,
        .n_kv_heads = c->kv->n_kv_heads,
        .n_pages = c->kv->n_pages,
        .order = (int32_t)a->policy.order,
        .gate_rows = g->gate_rows,
        .t_blocks = a->policy.abs.n_blocks,
        .t_head_stride = a->policy.abs.n_blocks,
        .keep_level_stride = (int64_t)c->kv->n_layers * c->n_heads,
        .scale = c->scale,
        .seq_counts = g->counts,
        .head_counts = a->head_counts + (ptrdiff_t)layer * c->n_heads,
        .page_max = a->probe.max,
        .max_groups = a->probe.max_groups,
        .max_pages = a->probe.max_pages,
    };
    CUDA_TRY(sm90_prefill_launch(&a->maps[layer], &args, c->kv->head_dim, a->shape.dtype, gate,
                                 a->n_sms, dev_cuda_stream(c->dev)));
    return 0;
}

/* What all launches of the decode kernel have in common: no work, no gate. */
static struct dec_args dec_args_of(const struct attn_cuda *a)
{
    const struct attn_cuda_config *c = &a->cfg;
    return (struct dec_args){
        .q = c->q,
        .out = c->out,
        .q_stride = c->q_stride,
        .out_stride = c->out_stride,
        .n_heads = c->n_heads,
        .n_kv_heads = c->kv->n_kv_heads,
        .n_shares = a->dec_shape.n_shares,
        .scale = c->scale,
        .workspace = a->workspace,
        .arrived = a->arrived,
    };
}

static int launch_decode(const struct attn_cuda *a, int layer, int gate,
                         const struct dec_args *args)
{
    CUDA_TRY(decode_sm90_launch(&a->maps[layer], args, a->cfg.kv->head_dim, a->shape.dtype, gate,
                                dev_cuda_stream(a->cfg.dev)));
    return 0;
}

static int decode(const struct attn_cuda *a, int layer)
{
    const struct attn_thresholds *t = &a->policy.decode;
    const struct attn_dec_plan *plan = &a->plans[a->plan_of[layer]];
    struct dec_args args = dec_args_of(a);
    args.pieces = plan->pieces;
    args.first = plan->first;
    args.seqs = a->dec_seqs;
    args.visit = visit_of(a, layer);
    args.t_layer = (int64_t)layer * t->n_heads * t->n_blocks;
    args.t_blocks = t->n_blocks;
    args.seq_counts = a->groups[LAUNCH_DECODE].counts;
    args.head_counts = a->head_counts + (ptrdiff_t)layer * a->cfg.n_heads;
    /* older tokens are of earlier steps */
    args.early = attn_cuda_is_decode(a) && !a->cut_runs;
    return launch_decode(a, layer, a->groups[LAUNCH_DECODE].gate, &args);
}

/* The sampled rows over all pages, before the prompts' rows are written where it writes. */
static int measure_begin(const struct attn_cuda *a, int layer)
{
    const struct attn_samples *s = &a->samples;
    struct dec_args args = dec_args_of(a);
    if (s->n == 0)
        return 0;
    args.pieces = s->pieces;
    args.first = s->first;
    args.seqs = s->seqs;
    args.lse = s->dense;
    return launch_decode(a, layer, SM90_GATE_NONE, &args);
}

static int measure_end(const struct attn_cuda *a)
{
    const struct attn_samples *s = &a->samples;
    const struct attn_lost_args args = {.rows = s->rows,
                                        .n_rows = s->n,
                                        .n_heads = a->cfg.n_heads,
                                        .kept = s->kept,
                                        .dense = s->dense,
                                        .counts = a->counts};
    if (s->n == 0)
        return 0;
    CUDA_TRY(attn_lost_launch(&args, dev_cuda_stream(a->cfg.dev)));
    return 0;
}

static int prefill_all(struct attn_cuda *a, int layer, int first, int end)
{
    for (int i = first; i < end; i++) {
        const struct attn_group *g = &a->groups[i];
        if ((is_narrow(a, layer) ? g->n_last_tiles : g->n_tiles) == 0)
            continue;
        TRY(prefill(a, g, layer));
        if (a->rel.bins)
            TRY(attn_cuda_count_rel(a, g, layer));
    }
    return 0;
}

int attn_cuda_run(struct attn_cuda *a, int layer)
{
    TRY(measure_begin(a, layer));
    TRY(prefill_all(a, layer, LAUNCH_PREFILL, LAUNCH_DECODE));
    TRY(measure_end(a));
    if (a->groups[LAUNCH_DECODE].n_parts > 0 || attn_cuda_is_decode(a))
        TRY(decode(a, layer));
    return 0;
}

int attn_cuda_run_half(struct attn_cuda *a, int layer, int half)
{
    const int first = half == 0 ? LAUNCH_PREFILL : LAUNCH_SECOND;
    ASSERT(attn_cuda_has_halves(a));
    if (half == 1) /* by then, what the first half left has been read */
        TRY(measure_begin(a, layer));
    TRY(prefill_all(a, layer, first, first + LAUNCH_SECOND - LAUNCH_PREFILL));
    if (half == 1)
        TRY(measure_end(a));
    return a->groups[LAUNCH_DECODE].n_parts > 0 && a->decode_half == half ? decode(a, layer) : 0;
}

int attn_cuda_head_counts(struct attn_cuda *a, struct attn_counts *out)
{
    const size_t n = (size_t)a->cfg.kv->n_layers * (size_t)a->cfg.n_heads;
    return dev_download(a->cfg.dev, out, a->head_counts, n * sizeof *out);
}
