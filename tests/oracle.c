/* The naive attention. See oracle.h. */
#include "oracle.h"

#include <math.h>
#include <stdlib.h>

/* One decision unit: rows of one sequence that share their gates, for one query head. */
struct unit {
    const struct attn_problem *p;
    const struct kv_view *kv;
    const struct attn_policy *policy;
    const struct attn_seq *s;
    int head;
    int pos, end; /* absolute positions [pos, end) */
    bool prompt;
    double gate;    /* ln(lambda) of REL or the threshold of ABS, as it stands */
    double due;     /* pages before the diagonal that it is steered to, less those it kept */
    int n_open, n;  /* such pages in all, and those decided */
    bool *kept;     /* [pages] */
    double *k, *v;  /* [tokens, head_dim] */
    double *scores; /* [end - pos, end] */
    float *scores_f32;
};

/* All tokens of the unit's KV head in one pool, as [tokens, head_dim] doubles. */
static double *gather(const struct unit *u, void *const *pools)
{
    const size_t d = (size_t)u->kv->head_dim, n = (size_t)(u->s->pos + u->s->n_rows);
    const int kv_head = u->head / (u->p->n_heads / u->kv->n_kv_heads);
    double *all = malloc(n * d * sizeof *all);
    ASSERT(all);
    for (size_t t = 0; t < n; t++) {
        size_t at = kv_tile_offset(u->kv, u->s->pages[t / KV_PAGE_TOKENS], kv_head) +
                    t % KV_PAGE_TOKENS * d;
        if (u->kv->dtype == DTYPE_F32) {
            const float *pool = pools[u->p->layer];
            for (size_t i = 0; i < d; i++)
                all[t * d + i] = (double)pool[at + i];
        } else {
            const uint16_t *pool = pools[u->p->layer];
            for (size_t i = 0; i < d; i++)
                all[t * d + i] = (double)dtype_bf16_f32(pool[at + i]);
        }
    }
    return all;
}

static const float *query(const struct unit *u, int pos)
{
    return (const float *)u->p->q + (u->s->row + pos - u->s->pos) * u->p->q_stride +
           (ptrdiff_t)u->head * u->kv->head_dim;
}

/* Scores of every row of the unit against every token before its end, in both precisions. */
static void fill_scores(struct unit *u)
{
    int d = u->kv->head_dim, rows = u->end - u->pos;
    u->scores = malloc(sizeof *u->scores * (size_t)rows * (size_t)u->end);
    u->scores_f32 = malloc(sizeof *u->scores_f32 * (size_t)rows * (size_t)u->end);
    ASSERT(u->scores && u->scores_f32);
    for (int t = 0; t < u->end; t++) {
        const double *k = u->k + (size_t)t * (size_t)d;
        for (int r = 0; r < rows; r++) {
            const float *q = query(u, u->pos + r);
            double sum = 0;
            float sum_f32 = 0;
            for (int i = 0; i < d; i++) {
                sum += (double)q[i] * k[i];
                sum_f32 += q[i] * (float)k[i];
            }
            u->scores[(size_t)r * (size_t)u->end + (size_t)t] = sum * (double)u->p->scale;
            u->scores_f32[(size_t)r * (size_t)u->end + (size_t)t] = sum_f32 * u->p->scale;
        }
    }
}

static void drop_scores(struct unit *u)
{
    free(u->scores);
    free(u->scores_f32);
}

static double score(const struct unit *u, int pos, int token)
{
    return u->scores[(size_t)(pos - u->pos) * (size_t)u->end + (size_t)token];
}

static float score_f32(const struct unit *u, int pos, int token)
{
    return u->scores_f32[(size_t)(pos - u->pos) * (size_t)u->end + (size_t)token];
}

/* Maximum that a NaN wins. */
static double max_nan(double a, double b)
{
    return isnan(a) || a > b ? a : b;
}

/* Largest visible score of a row in a page; -inf where it sees none. */
static double page_max(const struct unit *u, int pos, int page)
{
    double top = -INFINITY;
    for (int t = page * KV_PAGE_TOKENS; t < (page + 1) * KV_PAGE_TOKENS && t <= pos; t++)
        top = max_nan(score(u, pos, t), top);
    return top;
}

static bool visited(const struct unit *u, int page)
{
    int diag = u->pos / KV_BLOCK_TOKENS * 2;
    if (!u->policy->heads)
        return true;
    const struct attn_head_policy *h = &u->policy->heads[u->p->layer * u->p->n_heads + u->head];
    if (h->visit == ATTN_VISIT_ALL || page >= diag)
        return true;
    return page < h->sink_pages || diag - page <= h->local_pages;
}

static void note_margin(struct oracle *o, double value, double threshold)
{
    double scale = 1 + fabs(value);
    double d = fabs(value - threshold) / scale;
    if (isfinite(value) && isfinite(threshold) && d < o->margin)
        o->margin = d;
}

/* T of the unit's head and of the block that holds it, or of a later one. */
static double threshold_of(const struct unit *u, const struct attn_thresholds *t, int level,
                           int least)
{
    int block = u->pos / KV_BLOCK_TOKENS;
    block = block < least ? least : block;
    int row = block < t->n_blocks ? block : t->n_blocks - 1;
    return (double)t->t[level * t->level_stride + u->p->layer * t->layer_stride +
                        u->head * t->head_stride + row];
}

/* First page that the unit keeps whatever its gate says: the first of its query block, or the page
 * of a generated row that has a gate. */
static int first_own_page(const struct unit *u)
{
    if (!u->prompt && u->s->choice.decode_gate != ATTN_GATE_NONE)
        return u->pos / KV_PAGE_TOKENS;
    return u->pos / KV_BLOCK_TOKENS * 2;
}

/* After a decision. */
static bool steer(struct unit *u, bool keep)
{
    const struct attn_choice *c = &u->s->choice;
    const double steer = (double)c->steer;
    if (!(steer > 0))
        return keep;
    u->n++;
    const double gain = c->gate == ATTN_GATE_ABS ? steer * (0.5 + 4.0 / u->n) : steer;
    const double share = u->due / (u->n_open - u->n + 1);
    u->gate += keep ? gain * (1 - share) : -gain * share;
    if (keep)
        u->due = fmax(u->due - 1, 0);
    return keep;
}

/* The gate of one page before those, given every row's maximum of it. */
static bool keeps(struct oracle *o, struct unit *u, const double *row_max, const double *running)
{
    const struct attn_choice *c = &u->s->choice;
    int rows = u->end - u->pos;
    if (!u->prompt && c->decode_gate == ATTN_GATE_ABS) {
        double threshold = threshold_of(u, &u->policy->decode, c->decode_level, 0);
        note_margin(o, row_max[0], threshold);
        return !(row_max[0] < threshold);
    }
    if (c->gate == ATTN_GATE_NONE || !u->prompt)
        return true;
    if (c->gate == ATTN_GATE_ABS) {
        double top = -INFINITY;
        for (int r = 0; r < rows; r++)
            top = max_nan(row_max[r], top);
        note_margin(o, top, u->gate);
        return steer(u, !(top < u->gate));
    }
    double excess = -INFINITY; /* of the row that comes closest to keeping the page, or keeps it */
    for (int r = 0; r < rows; r++)
        excess = max_nan(row_max[r] - running[r], excess);
    note_margin(o, excess, u->gate);
    return steer(u, !(excess < u->gate));
}

static double density_of(const struct unit *u, const struct attn_thresholds *t, int level)
{
    return (double)
        t->t[level * t->level_stride + u->p->layer * t->layer_stride + u->head * t->head_stride];
}

/* Where a gate begins, and what it is steered to: of the pages that REL may spend, the diagonal
 * takes its own first. */
static void begin(struct unit *u)
{
    const struct attn_choice *c = &u->s->choice;
    const struct attn_thresholds *t = c->gate_rows == 64 ? &u->policy->rel_64 : &u->policy->rel_128;
    const int diag = u->pos / KV_BLOCK_TOKENS * 2, reach = (u->end - 1) / KV_PAGE_TOKENS + 1;
    const bool absolute = c->gate == ATTN_GATE_ABS;
    u->gate = absolute ? threshold_of(u, &u->policy->abs, c->level, 0) : (double)c->ln_lambda;
    u->due = 0;
    u->n_open = u->n = 0;
    if (c->gate == ATTN_GATE_NONE || !(c->steer > 0))
        return;
    for (int j = 0; j < diag; j++)
        u->n_open += visited(u, j);
    double spend;
    if (absolute) {
        spend = (double)c->blend * density_of(u, &u->policy->abs_pages, c->level);
    } else {
        const double from = density_of(u, t, c->level), to = density_of(u, t, c->level + 1);
        spend = (from + (double)c->blend * (to - from)) * reach - (reach - diag);
    }
    u->due = fmin(fmax(spend, 0), u->n_open);
    if (absolute)
        u->gate = threshold_of(u, &u->policy->abs, c->level,
                               (int)density_of(u, &u->policy->abs_pages, c->level) / 2 + 1);
    if (u->due >= u->n_open)
        u->gate = -INFINITY;
}

/* Pages in the policy's order into list; returns how many. */
static int page_order(const struct unit *u, int *list)
{
    int diag = u->pos / KV_BLOCK_TOKENS * 2, last = (u->end - 1) / KV_PAGE_TOKENS, n = 0;
    if (u->policy->order == ATTN_ORDER_L2R) {
        for (int j = 0; j <= last; j++)
            list[n++] = j;
        return n;
    }
    for (int j = diag; j <= last; j++)
        list[n++] = j;
    if (diag > 0)
        list[n++] = 0;
    for (int j = diag - 1; j >= 1; j--)
        list[n++] = j;
    return n;
}

static void add(struct attn_counts *c, bool visit, bool keep)
{
    if (!c)
        return;
    c->reachable++;
    c->visited += visit;
    c->kept += keep;
}

static void decide(struct oracle *o, struct unit *u, int seq)
{
    int rows = u->end - u->pos, diag = first_own_page(u);
    int *list = malloc(sizeof *list * (size_t)(u->end / KV_PAGE_TOKENS + 1));
    double *running = malloc(sizeof *running * (size_t)rows);
    double *row_max = malloc(sizeof *row_max * (size_t)rows);
    ASSERT(list && running && row_max);
    int n = page_order(u, list);
    for (int r = 0; r < rows; r++)
        running[r] = -INFINITY;
    begin(u);
    for (int i = 0; i < n; i++) {
        int page = list[i];
        bool visit = visited(u, page);
        bool keep = visit;
        for (int r = 0; visit && r < rows; r++)
            row_max[r] = page_max(u, u->pos + r, page);
        if (visit && page < diag)
            keep = keeps(o, u, row_max, running);
        for (int r = 0; keep && r < rows; r++)
            running[r] = row_max[r] > running[r] ? row_max[r] : running[r];
        u->kept[page] = keep;
        add(o->seq_counts ? &o->seq_counts[seq] : NULL, visit, keep);
        add(o->head_counts ? &o->head_counts[u->head] : NULL, visit, keep);
    }
    free(list);
    free(running);
    free(row_max);
}

/* Of the whole softmax, kept being its kept part; both relative to top. */
static double lost_mass(const struct unit *u, int pos, double top, double kept)
{
    double all = 0;
    for (int t = 0; t <= pos; t++)
        all += exp(score(u, pos, t) - top);
    return 1 - kept / all;
}

/* Two passes over the kept keys of one row. */
static void attend(struct oracle *o, const struct unit *u, int pos)
{
    int d = u->kv->head_dim;
    size_t at = (size_t)(u->s->row + pos - u->s->pos) * (size_t)u->p->n_heads + (size_t)u->head;
    double *out = o->out + at * (size_t)d;
    double *s = malloc(sizeof *s * (size_t)(pos + 1));
    double top = -INFINITY, sum = 0;
    ASSERT(s);
    for (int t = 0; t <= pos; t++) {
        s[t] = u->kept[t / KV_PAGE_TOKENS] ? score(u, pos, t) : -(double)INFINITY;
        top = max_nan(s[t], top);
    }
    for (int i = 0; i < d; i++)
        out[i] = 0;
    for (int t = 0; t <= pos; t++) {
        if (!u->kept[t / KV_PAGE_TOKENS])
            continue;
        double w = exp(s[t] - top);
        sum += w;
        const double *v = u->v + (size_t)t * (size_t)d;
        for (int i = 0; i < d; i++)
            out[i] += w * v[i];
    }
    for (int i = 0; i < d; i++)
        out[i] /= sum;
    o->lse[at] = top + log(sum);
    if (o->lost)
        o->lost[at] = lost_mass(u, pos, top, sum);
    free(s);
}

static void attend_f32(struct oracle *o, const struct unit *u, int pos)
{
    int d = u->kv->head_dim;
    size_t at = (size_t)(u->s->row + pos - u->s->pos) * (size_t)u->p->n_heads + (size_t)u->head;
    float *out = o->out_f32 + at * (size_t)d;
    float *s = malloc(sizeof *s * (size_t)(pos + 1));
    float top = -INFINITY, sum = 0;
    ASSERT(s);
    for (int t = 0; t <= pos; t++) {
        s[t] = u->kept[t / KV_PAGE_TOKENS] ? score_f32(u, pos, t) : -INFINITY;
        top = s[t] > top ? s[t] : top;
    }
    for (int i = 0; i < d; i++)
        out[i] = 0;
    for (int t = 0; t <= pos; t++) {
        if (!u->kept[t / KV_PAGE_TOKENS])
            continue;
        float w = expf(s[t] - top);
        sum += w;
        const double *v = u->v + (size_t)t * (size_t)d;
        for (int i = 0; i < d; i++)
            out[i] += w * (float)v[i];
    }
    for (int i = 0; i < d; i++)
        out[i] /= sum;
    if (o->lse_f32)
        o->lse_f32[at] = top + logf(sum);
    free(s);
}

static void tile_maxima(struct oracle *o, struct unit *u)
{
    const struct attn_tile_max *t = u->p->tile_max;
    for (int page = 0; page <= (u->end - 1) / KV_PAGE_TOKENS; page++) {
        double top = -INFINITY;
        if (!visited(u, page))
            continue;
        for (int pos = u->pos; pos < u->end; pos++)
            top = max_nan(page_max(u, pos, page), top);
        int group = (u->pos - u->s->pos) / t->gate_rows;
        o->tile_max[((size_t)u->head * (size_t)t->n_groups + (size_t)group) * (size_t)t->n_pages +
                    (size_t)page] = top;
    }
}

/* End of the unit that starts at pos: unit_rows consecutive absolute positions on one side of the
 * prompt's end. */
static int unit_end(const struct attn_seq *s, int pos, int unit_rows)
{
    int end = (pos / unit_rows + 1) * unit_rows;
    if (pos < s->prompt_end && end > s->prompt_end)
        end = s->prompt_end;
    return end > s->pos + s->n_rows ? s->pos + s->n_rows : end;
}

static void run_head(struct oracle *o, struct unit *u, int seq)
{
    const struct attn_seq *s = u->s;
    int stop = s->pos + s->n_rows;
    for (u->pos = s->pos; u->pos < stop; u->pos = u->end) {
        u->prompt = u->pos < s->prompt_end;
        int rows = 1;
        if (u->prompt)
            rows = s->choice.gate == ATTN_GATE_NONE ? KV_BLOCK_TOKENS : s->choice.gate_rows;
        u->end = unit_end(s, u->pos, rows);
        fill_scores(u);
        decide(o, u, seq);
        for (int pos = u->pos; pos < u->end; pos++) {
            attend(o, u, pos);
            if (o->out_f32)
                attend_f32(o, u, pos);
        }
        drop_scores(u);
    }
    for (u->pos = s->pos; o->tile_max && u->pos < stop && u->pos < s->prompt_end; u->pos = u->end) {
        u->end = unit_end(s, u->pos, u->p->tile_max->gate_rows);
        fill_scores(u);
        tile_maxima(o, u);
        drop_scores(u);
    }
}

void oracle_attention(struct oracle *o, const struct attn_problem *p, const struct kv_view *kv,
                      const struct attn_policy *policy)
{
    o->margin = INFINITY;
    for (int i = 0; i < p->n_seqs; i++) {
        const struct attn_seq *s = &p->seqs[i];
        bool *kept = calloc((size_t)kv_pages_for((int64_t)s->pos + s->n_rows), sizeof *kept);
        ASSERT(kept);
        for (int h = 0; h < p->n_heads; h++) {
            struct unit u = {.p = p, .kv = kv, .policy = policy, .s = s, .head = h, .kept = kept};
            u.k = gather(&u, kv->k);
            u.v = gather(&u, kv->v);
            run_head(o, &u, i);
            free(u.k);
            free(u.v);
        }
        free(kept);
    }
}
