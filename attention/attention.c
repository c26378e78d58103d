/* What every attention backend shares: the checks of a problem, and the threshold look-up. */
#include "attention/attention.h"

#include <math.h>

static int check_shape(const struct attn_problem *p, const struct kv_view *kv, struct err_msg *why)
{
    if (p->layer < 0 || p->layer >= kv->n_layers)
        return err_set(why, ERR_INVALID, "layer %d: the cache has %d", p->layer, kv->n_layers);
    if (kv->n_kv_heads < 1 || p->n_heads < 1 || p->n_heads % kv->n_kv_heads)
        return err_set(why, ERR_INVALID, "n_heads %d is not a multiple of n_kv_heads %d",
                       p->n_heads, kv->n_kv_heads);
    if (kv->head_dim < 1)
        return err_set(why, ERR_INVALID, "head_dim %d", kv->head_dim);
    if (!isfinite(p->scale))
        return err_set(why, ERR_INVALID, "scale is not finite");
    if (!p->q || !p->out || p->q == p->out)
        return err_set(why, ERR_INVALID, "q and out must be set and differ");
    int64_t row = (int64_t)p->n_heads * kv->head_dim;
    if (p->q_stride < row || p->out_stride < row)
        return err_set(why, ERR_INVALID, "q_stride %lld or out_stride %lld is under a row (%lld)",
                       (long long)p->q_stride, (long long)p->out_stride, (long long)row);
    if (p->n_seqs < 0 || (p->n_seqs > 0 && !p->seqs))
        return err_set(why, ERR_INVALID, "n_seqs %d", p->n_seqs);
    if (!p->workspace)
        return err_set(why, ERR_INVALID, "workspace is not set");
    return 0;
}

static int check_thresholds(const struct attn_thresholds *t, const char *what,
                            const struct attn_problem *p, const struct kv_view *kv,
                            struct err_msg *why)
{
    if (t->t && (t->n_levels < 1 || t->n_blocks < 1 || t->n_layers != kv->n_layers ||
                 t->n_heads != p->n_heads))
        return err_set(why, ERR_INVALID, "%s [%d, %d, %d, %d] do not fit %d layers, %d heads", what,
                       t->n_levels, t->n_layers, t->n_heads, t->n_blocks, kv->n_layers, p->n_heads);
    return 0;
}

static int check_policy(const struct attn_policy *policy, const struct attn_problem *p,
                        const struct kv_view *kv, struct err_msg *why)
{
    if (policy->order != ATTN_ORDER_DIAG_SINK_R2L && policy->order != ATTN_ORDER_L2R)
        return err_set(why, ERR_INVALID, "order %d is unknown", (int)policy->order);
    for (int32_t h = 0; policy->heads && h < p->n_heads; h++) {
        const struct attn_head_policy *head = &policy->heads[(int64_t)p->layer * p->n_heads + h];
        if (head->visit > ATTN_VISIT_SINK_LOCAL)
            return err_set(why, ERR_INVALID, "head %d: visit %d is unknown", h, head->visit);
        if (head->visit == ATTN_VISIT_SINK_LOCAL && (head->sink_pages < 0 || head->local_pages < 0))
            return err_set(why, ERR_INVALID, "head %d: sink_pages %d or local_pages %d is negative",
                           h, head->sink_pages, head->local_pages);
    }
    TRY(check_thresholds(&policy->abs, "thresholds", p, kv, why));
    TRY(check_thresholds(&policy->abs_pages, "pages of heads", p, kv, why));
    TRY(check_thresholds(&policy->rel_128, "densities of 128 rows", p, kv, why));
    TRY(check_thresholds(&policy->rel_64, "densities of 64 rows", p, kv, why));
    return check_thresholds(&policy->decode, "decode thresholds", p, kv, why);
}

/* The gate of generated rows has no granularity and nothing to align. */
static int check_decode(const struct attn_choice *c, const struct attn_policy *policy, int32_t i,
                        struct err_msg *why)
{
    const struct attn_thresholds *t = &policy->decode;
    if (c->decode_gate != ATTN_GATE_NONE && c->decode_gate != ATTN_GATE_ABS)
        return err_set(why, ERR_INVALID, "sequence %d: decode_gate %d is not NONE or ABS", i,
                       c->decode_gate);
    if (c->decode_gate == ATTN_GATE_ABS &&
        (!t->t || c->decode_level < 0 || c->decode_level >= t->n_levels))
        return err_set(why, ERR_INVALID, "sequence %d: decode_level %d of %d threshold levels", i,
                       c->decode_level, t->t ? t->n_levels : 0);
    return 0;
}

static int check_rel(const struct attn_choice *c, const struct attn_policy *policy, int32_t i,
                     struct err_msg *why)
{
    const struct attn_thresholds *t = c->gate_rows == 64 ? &policy->rel_64 : &policy->rel_128;
    if (!(c->ln_lambda <= (float)ATTN_REL_LN_MAX))
        return err_set(why, ERR_INVALID, "sequence %d: ln_lambda %g is not <= %d", i,
                       (double)c->ln_lambda, ATTN_REL_LN_MAX);
    if (c->steer > 0.0f && (!t->t || c->level < 0 || c->level >= t->n_levels - 1))
        return err_set(why, ERR_INVALID, "sequence %d: level %d of %d steps to steer between", i,
                       c->level, t->t ? t->n_levels : 0);
    if (c->steer > 0.0f && !(c->blend >= 0.0f && c->blend <= 1.0f))
        return err_set(why, ERR_INVALID, "sequence %d: blend %g is not from 0 to 1", i,
                       (double)c->blend);
    return 0;
}

static int check_abs(const struct attn_choice *c, const struct attn_policy *policy, int32_t i,
                     struct err_msg *why)
{
    const struct attn_thresholds *t = &policy->abs_pages;
    if (!policy->abs.t || c->level < 0 || c->level >= policy->abs.n_levels)
        return err_set(why, ERR_INVALID, "sequence %d: level %d of %d threshold levels", i,
                       c->level, policy->abs.t ? policy->abs.n_levels : 0);
    if (c->steer > 0.0f && (!t->t || c->level >= t->n_levels))
        return err_set(why, ERR_INVALID, "sequence %d: level %d of %d whose pages are known", i,
                       c->level, t->t ? t->n_levels : 0);
    if (c->steer > 0.0f && !(c->blend >= 0.0f && isfinite(c->blend)))
        return err_set(why, ERR_INVALID, "sequence %d: blend %g is not 0 or more", i,
                       (double)c->blend);
    return 0;
}

static int check_choice(const struct attn_seq *s, const struct attn_policy *policy, int32_t i,
                        struct err_msg *why)
{
    const struct attn_choice *c = &s->choice;
    if (c->gate > ATTN_GATE_REL)
        return err_set(why, ERR_INVALID, "sequence %d: gate %d is unknown", i, c->gate);
    if (c->gate == ATTN_GATE_NONE)
        return 0;
    if (c->gate_rows != 128 && c->gate_rows != 64)
        return err_set(why, ERR_INVALID, "sequence %d: gate_rows %d is not 128 or 64", i,
                       c->gate_rows);
    if (!(c->steer >= 0.0f && c->steer <= (float)ATTN_STEER_MAX))
        return err_set(why, ERR_INVALID, "sequence %d: steer %g is not from 0 to %d", i,
                       (double)c->steer, ATTN_STEER_MAX);
    TRY(c->gate == ATTN_GATE_ABS ? check_abs(c, policy, i, why) : check_rel(c, policy, i, why));
    if (s->pos >= s->prompt_end)
        return 0;
    int32_t end = s->pos + s->n_rows;
    if (s->pos % KV_BLOCK_TOKENS || (end < s->prompt_end && end % KV_BLOCK_TOKENS))
        return err_set(why, ERR_INVALID,
                       "sequence %d: gated chunk [%d, %d) is not aligned to %d (prompt ends at %d)",
                       i, s->pos, end, KV_BLOCK_TOKENS, s->prompt_end);
    return 0;
}

static int check_seq(const struct attn_seq *s, const struct kv_view *kv, int32_t i,
                     struct err_msg *why)
{
    if (s->row < 0 || s->n_rows < 1)
        return err_set(why, ERR_INVALID, "sequence %d: row %d, n_rows %d", i, s->row, s->n_rows);
    if (s->pos < 0 || s->prompt_end < 0 || s->pos > INT32_MAX - KV_BLOCK_TOKENS - s->n_rows)
        return err_set(why, ERR_INVALID, "sequence %d: pos %d, prompt_end %d", i, s->pos,
                       s->prompt_end);
    if (!s->pages)
        return err_set(why, ERR_INVALID, "sequence %d: no page table", i);
    int32_t n_pages = kv_pages_for((int64_t)s->pos + s->n_rows);
    for (int32_t j = 0; j < n_pages; j++) {
        if (s->pages[j] < 0 || s->pages[j] >= kv->n_pages)
            return err_set(why, ERR_INVALID, "sequence %d: pages[%d] = %d of %d", i, j, s->pages[j],
                           kv->n_pages);
    }
    return 0;
}

static int check_tile_max(const struct attn_problem *p, struct err_msg *why)
{
    const struct attn_tile_max *t = p->tile_max;
    if (!t)
        return 0;
    if (p->n_seqs != 1)
        return err_set(why, ERR_INVALID, "tile_max: %d sequences, wants one", p->n_seqs);
    if (!t->max || (t->gate_rows != 128 && t->gate_rows != 64 && t->gate_rows != 1))
        return err_set(why, ERR_INVALID, "tile_max: gate_rows %d", t->gate_rows);
    const struct attn_seq *s = &p->seqs[0];
    if (t->mass && (s->choice.gate != ATTN_GATE_NONE || t->gate_rows == 1))
        return err_set(why, ERR_INVALID, "tile_max: mass of a gated sequence or of single rows");
    int32_t end = s->pos + s->n_rows;
    end = end < s->prompt_end ? end : s->prompt_end;
    if (end <= s->pos)
        return 0;
    if (s->pos % KV_BLOCK_TOKENS && t->gate_rows != 1)
        return err_set(why, ERR_INVALID, "tile_max: the chunk starts at %d, not on a block",
                       s->pos);
    if (t->n_groups < (end - s->pos + t->gate_rows - 1) / t->gate_rows ||
        t->n_pages < kv_pages_for(end))
        return err_set(why, ERR_INVALID, "tile_max: [%d groups, %d pages] is too small",
                       t->n_groups, t->n_pages);
    return 0;
}

static int check_rel_counts(const struct attn_problem *p, struct err_msg *why)
{
    const struct attn_rel_counts *c = p->rel_counts;
    if (!c)
        return 0;
    if (!c->bins || c->n_edges < 1)
        return err_set(why, ERR_INVALID, "rel_counts: %d edges", c->n_edges);
    for (int32_t i = 0; i < c->n_edges; i++) {
        if (!(c->edges[i] <= 0.0f) || (i > 0 && !(c->edges[i] > c->edges[i - 1])))
            return err_set(why, ERR_INVALID, "rel_counts: edges[%d] = %g", i, (double)c->edges[i]);
    }
    return 0;
}

int attn_validate(const struct attn_problem *p, const struct kv_view *kv,
                  const struct attn_policy *policy, struct err_msg *why)
{
    TRY(check_shape(p, kv, why));
    TRY(check_policy(policy, p, kv, why));
    for (int32_t i = 0; i < p->n_seqs; i++) {
        TRY(check_seq(&p->seqs[i], kv, i, why));
        TRY(check_choice(&p->seqs[i], policy, i, why));
        TRY(check_decode(&p->seqs[i].choice, policy, i, why));
    }
    TRY(check_rel_counts(p, why));
    return check_tile_max(p, why);
}

float attn_threshold(const struct attn_thresholds *t, int level, int layer, int head, int64_t block)
{
    int64_t i = block < t->n_blocks ? block : t->n_blocks - 1;
    return t->t[level * t->level_stride + layer * t->layer_stride + head * t->head_stride + i];
}
