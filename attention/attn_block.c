/* The page loop of the CPU kernel. For each page of the walk: pack K once, then for each query head
 * of the task QK, the gate, and for what it keeps softmax and PV.
 *
 * Rows here are (head, token) pairs, head-major: row = head * n_rows + token. A panel is a run of
 * rows that goes through QK together: one head's block, or, where blocks are small (decode) and no
 * probe needs a head's scores apart, several heads that share the page. The gate of generated rows
 * decides row by row, so it leaves them their panel.
 *
 * Invariants
 * - A row meets its pages in the walk's order and a page's keys in order, whatever is around it.
 * - Only its visible keys enter a row: scores beyond become -inf (so probability 0 exactly) and PV
 *   stops at the last visible key, so that neither a NaN nor stale memory behind it can leak. A
 * page with no visible key leaves the row's bits as they are.
 * - V is packed when the first row group keeps the page: a page all groups skip is never read. */
#include "attention/attn_block.h"

#include "attention/attn_lost.h"
#include "attention/attn_steer.h"
#include "attention/attn_walk.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum {
    PANEL_ROWS = KV_BLOCK_TOKENS,
    PV_ROWS = 24 /* rows that go from softmax to PV while their probabilities are in L1 */
};

/* Pointers into one worker's scratch. */
struct scratch {
    float *q, *o;                   /* [ATTN_TASK_ROWS, head_dim], [.., dv] */
    float *m, *l, *alpha;           /* [ATTN_TASK_ROWS] */
    float *q_max;                   /* [ATTN_TASK_ROWS] largest |q| per head */
    float *kt, *v;                  /* one page */
    float *s;                       /* [PANEL_ROWS, 64] */
    float *row_max;                 /* [PANEL_ROWS] */
    float *weight;                  /* [PANEL_ROWS] of the page, in units of the row's l */
    int32_t *limit;                 /* [PANEL_ROWS] visible keys of the page */
    float *lse;                     /* [ATTN_TASK_ROWS] of a measured row, per head */
    struct attn_steering *steering; /* [2 * ATTN_TASK_ROWS] per head and row group */
    struct attn_counts *counts;     /* [ATTN_TASK_ROWS] per head */
};

struct block {
    const struct attn_job *job;
    const struct attn_task *task;
    const struct attn_seq *seq;
    const struct attn_head_policy *heads; /* the task's heads, or NULL */
    struct scratch x;
    int32_t kv_head, head_dim, dv;
    int32_t diag, last_page;
    enum attn_gate gate;
    int32_t group_rows; /* rows per decision; 1 for generated rows */
    bool alone;         /* panels of one head only */
    const void *k_page, *v_page;
    const float *v; /* the packed page, or NULL while nobody has kept it */
    float k_max;
    int32_t page;
    int32_t measured;       /* the row whose lost mass is measured */
    uint64_t sampled, lost; /* see attn_counts */
};

static void *take(char **at, size_t bytes)
{
    void *p = *at;
    *at += (bytes + 63) / 64 * 64;
    return p;
}

static void carve(struct scratch *x, char **at, int32_t head_dim)
{
    const size_t rows = ATTN_TASK_ROWS, f = sizeof(float);
    const size_t d = (size_t)head_dim, dv = (size_t)attn_tile_dv(head_dim);
    x->q = take(at, rows * d * f);
    x->o = take(at, rows * dv * f);
    x->m = take(at, rows * f);
    x->l = take(at, rows * f);
    x->alpha = take(at, rows * f);
    x->q_max = take(at, rows * f);
    x->kt = take(at, d * KV_PAGE_TOKENS * f);
    x->v = take(at, dv * KV_PAGE_TOKENS * f);
    x->s = take(at, (size_t)PANEL_ROWS * KV_PAGE_TOKENS * f);
    x->row_max = take(at, PANEL_ROWS * f);
    x->weight = take(at, PANEL_ROWS * f);
    x->limit = take(at, PANEL_ROWS * sizeof(int32_t));
    x->lse = take(at, rows * f);
    x->steering = take(at, 2 * rows * sizeof(struct attn_steering));
    x->counts = take(at, rows * sizeof(struct attn_counts));
}

size_t attn_scratch_bytes(int32_t head_dim)
{
    struct scratch x;
    char *at = NULL;
    carve(&x, &at, head_dim);
    return (size_t)at;
}

/* Scaled queries and the empty state. */
static void load_rows(struct block *b)
{
    const struct attn_problem *p = b->job->p;
    const struct attn_task *t = b->task;
    const size_t d = (size_t)b->head_dim;
    float *to = b->x.q;
    for (int32_t h = 0; h < t->n_heads; h++) {
        uint32_t top = 0; /* bits of |q|: NaN sorts above infinity, so it is never lost */
        for (int32_t r = 0; r < t->n_rows; r++, to += d) {
            const float *q = (const float *)p->q + (int64_t)(t->row + r) * p->q_stride +
                             (size_t)(t->head + h) * d;
            for (size_t i = 0; i < d; i++) {
                to[i] = q[i] * p->scale;
                uint32_t u = dtype_f32_bits(to[i]) & 0x7fffffffu;
                top = u > top ? u : top;
            }
        }
        b->x.q_max[h] = dtype_bits_f32(top);
    }
    const int32_t rows = t->n_heads * t->n_rows;
    for (int32_t r = 0; r < rows; r++) {
        b->x.m[r] = -INFINITY;
        b->x.l[r] = 0.0f;
    }
    memset(b->x.o, 0, (size_t)rows * (size_t)b->dv * sizeof(float));
    memset(b->x.counts, 0, (size_t)t->n_heads * sizeof(struct attn_counts));
}

/* ---- counters: a group counts a page it can reach ---- */

static int32_t n_groups(const struct block *b)
{
    return (b->task->n_rows + b->group_rows - 1) / b->group_rows;
}

/* Rows [first, end) of group g. */
static int32_t group_end(const struct block *b, int32_t g)
{
    int32_t end = (g + 1) * b->group_rows;
    return end < b->task->n_rows ? end : b->task->n_rows;
}

static bool group_reaches(const struct block *b, int32_t g, int32_t page)
{
    return (b->task->pos + group_end(b, g) - 1) / KV_PAGE_TOKENS >= page;
}

static uint64_t groups_reaching(const struct block *b, int32_t page)
{
    uint64_t n = 0;
    if (page < b->diag)
        return (uint64_t)n_groups(b);
    for (int32_t g = 0; g < n_groups(b); g++)
        n += group_reaches(b, g, page);
    return n;
}

/* ---- one page, one panel: heads [h, h1), rows [0, rows) of the panel ---- */

static int32_t clamp(int32_t x, int32_t lo, int32_t hi)
{
    if (x < lo)
        return lo;
    return x < hi ? x : hi;
}

/* The first n keys of a page are visible. */
static void mask_row(float *s, float *row_max, int32_t n)
{
    float top = -INFINITY;
    if (n == KV_PAGE_TOKENS)
        return;
    for (int32_t j = 0; j < n; j++)
        top = s[j] > top ? s[j] : top;
    for (int32_t j = n; j < KV_PAGE_TOKENS; j++)
        s[j] = -INFINITY;
    *row_max = top;
}

/* Fills limit and turns the scores of keys a row may not see into -inf. Returns the first row that
 * sees any. Off the diagonal every key is visible. */
static void mask_panel(struct block *b, int32_t rows)
{
    const int32_t base = b->task->pos + 1 - b->page * KV_PAGE_TOKENS;
    for (int32_t r = 0; r < rows; r++) {
        const int32_t n = clamp(base + r % b->task->n_rows, 0, KV_PAGE_TOKENS);
        b->x.limit[r] = n;
        mask_row(b->x.s + (size_t)r * KV_PAGE_TOKENS, b->x.row_max + r, n);
    }
}

/* Row maxima that keep NaN, for pages whose scores could be NaN. */
static void sticky_row_max(struct block *b, int32_t rows)
{
    for (int32_t r = 0; r < rows; r++) {
        const float *s = b->x.s + (size_t)r * KV_PAGE_TOKENS;
        float top = -INFINITY;
        for (int32_t j = 0; j < KV_PAGE_TOKENS && !isnan(top); j++)
            top = s[j] <= top ? top : s[j];
        b->x.row_max[r] = top;
    }
}

/* Maximum over rows [first, end); NaN if any is. */
static float rows_max(const float *row_max, int32_t first, int32_t end)
{
    float top = -INFINITY;
    for (int32_t r = first; r < end && !isnan(top); r++)
        top = row_max[r] <= top ? top : row_max[r];
    return top;
}

static void write_tile_max(struct block *b, int32_t h)
{
    const struct attn_tile_max *out = b->job->p->tile_max;
    const int32_t first_group = (b->task->pos - b->seq->pos) / out->gate_rows;
    for (int32_t r = 0, g = first_group; r < b->task->n_rows; r += out->gate_rows, g++) {
        int32_t end = r + out->gate_rows;
        if (end > b->task->n_rows)
            end = b->task->n_rows;
        if ((b->task->pos + end - 1) / KV_PAGE_TOKENS < b->page)
            continue;
        size_t at = ((size_t)(b->task->head + h) * (size_t)out->n_groups + (size_t)g) *
                        (size_t)out->n_pages +
                    (size_t)b->page;
        out->max[at] = rows_max(b->x.row_max, r, end);
    }
}

/* Decisions that REL would take here on one head's row groups of `rows` rows: rel_skips at every
 * edge. */
static void count_gaps(const struct block *b, int32_t h, int32_t rows, uint64_t *bins)
{
    const struct attn_rel_counts *out = b->job->p->rel_counts;
    const float *m = b->x.m + (size_t)h * (size_t)b->task->n_rows;
    for (int32_t first = 0; first < b->task->n_rows; first += rows) {
        const int32_t end = first + rows < b->task->n_rows ? first + rows : b->task->n_rows;
        int32_t bin = 0;
        for (int32_t r = first; r < end; r++) {
            while (bin < out->n_edges && !(b->x.row_max[r] < m[r] + out->edges[bin]))
                bin++;
        }
        (void)__atomic_fetch_add(&bins[bin], 1, __ATOMIC_RELAXED);
    }
}

static void write_rel_counts(const struct block *b, int32_t h)
{
    const struct attn_rel_counts *out = b->job->p->rel_counts;
    const size_t heads = (size_t)b->job->p->n_heads, n = (size_t)out->n_edges + 1;
    const size_t head = (size_t)b->task->head + (size_t)h;
    count_gaps(b, h, KV_BLOCK_TOKENS, out->bins + head * n);
    count_gaps(b, h, KV_BLOCK_TOKENS / 2, out->bins + (heads + head) * n);
}

/* Of the block, which all rows of a task share. */
static float threshold(const struct block *b, const struct attn_thresholds *t, int level, int32_t h)
{
    return attn_threshold(t, level, b->job->p->layer, b->task->head + h,
                          b->task->pos / KV_BLOCK_TOKENS);
}

/* The gate's predicates. Both are written so that NaN keeps the page. */
static bool abs_skips(const struct block *b, float t, int32_t first, int32_t end)
{
    return rows_max(b->x.row_max, first, end) < t;
}

static bool rel_skips(const struct block *b, int32_t h, float ln_lambda, int32_t first, int32_t end)
{
    const float *m = b->x.m + (size_t)h * (size_t)b->task->n_rows;
    for (int32_t r = first; r < end; r++) {
        if (!(b->x.row_max[r] < m[r] + ln_lambda))
            return false;
    }
    return true;
}

/* The decision of group g of a head on a page before the diagonal; moves the group's gate. */
static bool skips(struct block *b, int32_t h, int32_t g, int32_t first, int32_t end)
{
    struct attn_steering *s = &b->x.steering[2 * h + g];
    const bool absolute = b->gate == ATTN_GATE_ABS;
    const bool skip =
        absolute ? abs_skips(b, s->gate, first, end) : rel_skips(b, h, s->gate, first, end);
    if (b->seq->choice.steer > 0.0f)
        attn_steer_next(s, b->seq->choice.steer, absolute, !skip);
    return skip;
}

/* Pages of the walk before the diagonal that a head visits. */
static int32_t n_visited(const struct block *b, int32_t h)
{
    const struct attn_head_policy *p = b->heads ? &b->heads[h] : NULL;
    if (!p || p->visit == ATTN_VISIT_ALL || (int64_t)p->sink_pages + p->local_pages >= b->diag)
        return b->diag;
    return p->sink_pages + p->local_pages;
}

/* The pages of a head at the sequence's level, that ABS is steered by. */
static float level_pages(const struct block *b, int32_t head)
{
    return attn_threshold(&b->job->policy->abs_pages, b->seq->choice.level, b->job->p->layer, head,
                          0);
}

/* How many of those group g of a steered sequence is due. */
static float due(const struct block *b, int32_t h, int32_t g)
{
    const struct attn_choice *c = &b->seq->choice;
    const struct attn_policy *p = b->job->policy;
    const struct attn_thresholds *t = c->gate_rows == KV_BLOCK_TOKENS ? &p->rel_128 : &p->rel_64;
    const int32_t head = b->task->head + h, layer = b->job->p->layer;
    const int32_t last = (b->task->pos + group_end(b, g) - 1) / KV_PAGE_TOKENS;
    if (b->gate == ATTN_GATE_ABS)
        return attn_steer_due(c->blend * level_pages(b, head), n_visited(b, h));
    const float density = (1.0f - c->blend) * attn_threshold(t, c->level, layer, head, 0) +
                          c->blend * attn_threshold(t, c->level + 1, layer, head, 0);
    return attn_steer_due_of(density, b->diag, last + 1 - b->diag, n_visited(b, h));
}

/* Where a head's gate begins. */
static float first_gate(const struct block *b, int32_t h)
{
    const struct attn_choice *c = &b->seq->choice;
    const struct attn_thresholds *t = &b->job->policy->abs;
    const int32_t head = b->task->head + h, block = b->task->pos / KV_BLOCK_TOKENS;
    if (b->gate != ATTN_GATE_ABS)
        return c->ln_lambda;
    if (!(c->steer > 0.0f))
        return threshold(b, t, c->level, h);
    return attn_threshold(t, c->level, b->job->p->layer, head,
                          attn_steer_row(block, level_pages(b, head), t->n_blocks));
}

/* Of prompt rows. */
static void start_gates(struct block *b)
{
    for (int32_t h = 0; h < b->task->n_heads; h++) {
        const struct attn_steering start = {first_gate(b, h), 0, 0, n_visited(b, h)};
        for (int32_t g = 0; g < n_groups(b); g++) {
            struct attn_steering *s = &b->x.steering[2 * h + g];
            *s = start;
            if (!(b->seq->choice.steer > 0.0f))
                continue;
            s->rest = due(b, h, g);
            if (s->rest >= (float)s->n_visited)
                s->gate = -INFINITY;
        }
    }
}

/* Softmax and PV for panel rows [first, end); row0 is the panel's first row in the task. */
static void accumulate(struct block *b, int32_t row0, int32_t first, int32_t end)
{
    const struct attn_tile_ops *tile = b->job->tile;
    const bool diagonal = b->page >= b->diag;
    if (!b->v) {
        if (b->job->kv->dtype == DTYPE_F32 && b->dv == b->head_dim) {
            b->v = b->v_page;
        } else {
            tile->pack_v(b->x.v, b->v_page, b->job->kv->dtype, b->head_dim);
            b->v = b->x.v;
        }
    }
    for (int32_t r = first, n; r < end; r += n) {
        float *s = b->x.s + (size_t)r * KV_PAGE_TOKENS;
        const int32_t row = row0 + r;
        const int32_t keys = diagonal ? b->x.limit[r] : KV_PAGE_TOKENS;
        for (n = 1; n < PV_ROWS && r + n < end && (!diagonal || b->x.limit[r + n] == keys); n++) {
        }
        if (keys == 0)
            continue;
        tile->softmax(s, b->x.m + row, b->x.l + row, b->x.alpha + row, b->x.row_max + r, n);
        tile->pv(b->x.o + (size_t)row * (size_t)b->dv, s, b->v, b->x.alpha + row, n, keys, b->dv);
    }
}

/* The gate of one head's panel: each group is skipped or accumulated. */
static void gate_panel(struct block *b, int32_t h, int32_t skip)
{
    const int32_t row0 = h * b->task->n_rows;
    for (int32_t g = 0; g < n_groups(b); g++) {
        int32_t first = g * b->group_rows, end = group_end(b, g);
        if (!group_reaches(b, g, b->page))
            continue;
        if (b->page < b->diag && skips(b, h, g, first, end))
            continue;
        b->x.counts[h].kept++;
        accumulate(b, row0, first < skip ? skip : first, end);
    }
}

/* The gate of generated rows, heads [h, h1): each row alone. What rows in a row keep goes through
 * PV together. */
static void gate_rows(struct block *b, int32_t h, int32_t h1)
{
    const int32_t n = b->task->n_rows, row0 = h * n;
    int32_t first = 0, end = 0; /* kept, not yet accumulated */
    for (int32_t i = h, r = 0; i < h1; i++) {
        const float t = threshold(b, &b->job->policy->decode, b->seq->choice.decode_level, i);
        for (int32_t token = 0; token < n; token++, r++) {
            const int32_t own = (b->task->pos + token) / KV_PAGE_TOKENS;
            if (b->page > own || (b->page < own && b->x.row_max[r] < t))
                continue;
            b->x.counts[i].kept++;
            if (end < r) {
                if (first < end)
                    accumulate(b, row0, first, end);
                first = r;
            }
            end = r + 1;
        }
    }
    if (first < end)
        accumulate(b, row0, first, end);
}

/* Whether a score of heads [h, h1) might be NaN or infinite. */
static bool unbounded(const struct block *b, int32_t h, int32_t h1)
{
    for (int32_t i = h; i < h1; i++) {
        if (!(b->k_max * b->x.q_max[i] * (float)b->head_dim <= FLT_MAX))
            return true;
    }
    return false;
}

static void run_panel(struct block *b, int32_t h, int32_t h1)
{
    const int32_t n = b->task->n_rows, rows = (h1 - h) * n, row0 = h * n;
    const bool diagonal = b->page >= b->diag;
    const bool watched = b->gate != ATTN_GATE_NONE || b->job->p->tile_max || b->job->p->rel_counts;
    const uint64_t groups = groups_reaching(b, b->page);
    /* the leading rows of a block do not reach its second page */
    int32_t skip = b->page * KV_PAGE_TOKENS - b->task->pos;
    skip = skip < 0 || h1 - h > 1 ? 0 : skip;

    b->job->tile->qk(b->x.s + (size_t)skip * KV_PAGE_TOKENS, b->x.row_max + skip,
                     b->x.q + (size_t)(row0 + skip) * (size_t)b->head_dim, b->x.kt, rows - skip,
                     b->head_dim);
    if (diagonal)
        mask_panel(b, rows);
    if (watched && unbounded(b, h, h1))
        sticky_row_max(b, rows);
    if (b->job->p->tile_max && !b->task->generated)
        write_tile_max(b, h);
    if (b->job->p->rel_counts && !b->task->generated && !diagonal)
        write_rel_counts(b, h);
    for (int32_t i = h; i < h1; i++)
        b->x.counts[i].visited += groups;
    if (b->gate != ATTN_GATE_NONE) {
        if (b->task->generated)
            gate_rows(b, h, h1);
        else
            gate_panel(b, h, skip);
        return;
    }
    for (int32_t i = h; i < h1; i++)
        b->x.counts[i].kept += groups;
    accumulate(b, row0, skip, rows);
}

/* ---- the walk ---- */

static bool visits(const struct block *b, int32_t h)
{
    return !b->heads || attn_visits(&b->heads[h], b->page, b->diag);
}

typedef void (*panel_fn)(struct block *b, int32_t h, int32_t h1);

/* All panels of one page. */
static void run_page(struct block *b, int32_t page, panel_fn run)
{
    const struct kv_view *kv = b->job->kv;
    const int32_t layer = b->job->p->layer;
    const size_t at = kv_tile_offset(kv, b->seq->pages[page], b->kv_head) * dtype_bytes(kv->dtype);
    bool packed = false;
    b->page = page;
    b->v_page = (const char *)kv->v[layer] + at;
    b->v = NULL;
    for (int32_t h = 0, h1; h < b->task->n_heads; h = h1) {
        h1 = h + 1;
        if (!visits(b, h))
            continue;
        while (!b->alone && h1 < b->task->n_heads && visits(b, h1) &&
               (h1 - h + 1) * b->task->n_rows <= PANEL_ROWS)
            h1++;
        if (!packed)
            b->k_max = b->job->tile->pack_k(b->x.kt, (const char *)kv->k[layer] + at, kv->dtype,
                                            b->head_dim);
        packed = true;
        run(b, h, h1);
    }
}

static void run_walk(struct block *b, const struct attn_walk *walk, panel_fn run)
{
    for (int i = 0; i < walk->n_spans; i++) {
        const struct attn_span s = walk->spans[i];
        const int32_t step = s.first <= s.last ? 1 : -1;
        for (int32_t page = s.first; page != s.last + step; page += step)
            run_page(b, page, run);
    }
}

/* ---- the second walk: how much of its rows' softmax a page holds ---- */

/* The rows' maxima are final, so softmax leaves them alone and adds up e^(s - m) from 0. */
static void weigh_panel(struct block *b, int32_t h, int32_t h1)
{
    const struct attn_tile_max *out = b->job->p->tile_max;
    const int32_t n = b->task->n_rows, row0 = h * n;
    const int32_t first_group = (b->task->pos - b->seq->pos) / out->gate_rows;
    (void)h1; /* h + 1: heads are apart */
    if (b->page >= b->diag)
        return;
    b->job->tile->qk(b->x.s, b->x.row_max, b->x.q + (size_t)row0 * (size_t)b->head_dim, b->x.kt, n,
                     b->head_dim);
    memset(b->x.weight, 0, (size_t)n * sizeof *b->x.weight);
    b->job->tile->softmax(b->x.s, b->x.m + row0, b->x.weight, b->x.alpha + row0, b->x.row_max, n);
    for (int32_t r = 0, g = first_group; r < n; g++) {
        const int32_t first = r, end = r + out->gate_rows < n ? r + out->gate_rows : n;
        const size_t group = (size_t)(b->task->head + h) * (size_t)out->n_groups + (size_t)g;
        float sum = 0;
        for (; r < end; r++)
            sum += b->x.weight[r] / b->x.l[row0 + r];
        out->mass[group * (size_t)out->n_pages + (size_t)b->page] = sum / (float)(end - first);
    }
}

static void store_rows(const struct block *b)
{
    const struct attn_problem *p = b->job->p;
    const struct attn_task *t = b->task;
    const size_t d = (size_t)b->head_dim;
    for (int32_t h = 0; h < t->n_heads; h++) {
        for (int32_t r = 0; r < t->n_rows; r++) {
            const size_t row = (size_t)h * (size_t)t->n_rows + (size_t)r;
            const float *o = b->x.o + row * (size_t)b->dv;
            float *to =
                (float *)p->out + (int64_t)(t->row + r) * p->out_stride + (size_t)(t->head + h) * d;
            for (size_t i = 0; i < d; i++)
                to[i] = o[i] / b->x.l[row];
            if (p->lse)
                p->lse[(size_t)(t->row + r) * (size_t)p->n_heads + (size_t)(t->head + h)] =
                    b->x.m[row] + logf(b->x.l[row]);
        }
    }
}

/* ---- the walk of one row over all its pages: what the block did not use of its softmax ---- */

/* As run_panel and accumulate do it without a gate, but for PV: the sums have the same bits. */
static void measure_panel(struct block *b, int32_t h, int32_t h1)
{
    const int32_t pos = b->task->pos + b->measured;
    const int32_t keys = clamp(pos + 1 - b->page * KV_PAGE_TOKENS, 0, KV_PAGE_TOKENS);
    for (int32_t i = h; i < h1; i++) {
        const int32_t row = i * b->task->n_rows + b->measured;
        b->job->tile->qk(b->x.s, b->x.row_max, b->x.q + (size_t)row * (size_t)b->head_dim, b->x.kt,
                         1, b->head_dim);
        mask_row(b->x.s, b->x.row_max, keys);
        b->job->tile->softmax(b->x.s, b->x.m + row, b->x.l + row, b->x.alpha + row, b->x.row_max,
                              1);
    }
}

/* The block's rows are stored: the state of row r serves again. */
static void measure_row(struct block *b, int32_t r)
{
    const int32_t n_heads = b->task->n_heads, n = b->task->n_rows;
    const struct attn_head_policy *heads = b->heads;
    struct attn_walk walk;
    for (int32_t h = 0; h < n_heads; h++) {
        const int32_t row = h * n + r;
        b->x.lse[h] = b->x.m[row] + logf(b->x.l[row]);
        b->x.m[row] = -INFINITY;
        b->x.l[row] = 0.0f;
    }
    b->measured = r;
    b->heads = NULL;
    attn_walk_init(&walk, b->job->policy->order, b->diag, (b->task->pos + r) / KV_PAGE_TOKENS, NULL,
                   n_heads);
    run_walk(b, &walk, measure_panel);
    b->heads = heads;
    for (int32_t h = 0; h < n_heads; h++) {
        const int32_t row = h * n + r;
        b->lost += attn_lost_units(b->x.lse[h], b->x.m[row] + logf(b->x.l[row]));
    }
}

/* Sampled rows of the block; where every page is used, there is nothing to compute. */
static void measure(struct block *b)
{
    const struct attn_task *t = b->task;
    const int32_t end = t->pos + t->n_rows;
    for (int32_t pos = t->pos; pos < end; pos++) {
        pos = attn_sample_next(pos, b->seq->prompt_end);
        if (pos >= end)
            return;
        b->sampled += (uint64_t)t->n_heads;
        if (b->gate != ATTN_GATE_NONE || b->heads)
            measure_row(b, pos - t->pos);
    }
}

static void add_counts(struct attn_counts *to, const struct attn_counts *c)
{
    (void)__atomic_fetch_add(&to->reachable, c->reachable, __ATOMIC_RELAXED);
    (void)__atomic_fetch_add(&to->visited, c->visited, __ATOMIC_RELAXED);
    (void)__atomic_fetch_add(&to->kept, c->kept, __ATOMIC_RELAXED);
    (void)__atomic_fetch_add(&to->sampled, c->sampled, __ATOMIC_RELAXED);
    (void)__atomic_fetch_add(&to->lost, c->lost, __ATOMIC_RELAXED);
}

static void publish_counts(struct block *b)
{
    const struct attn_problem *p = b->job->p;
    struct attn_counts sum = {.sampled = b->sampled, .lost = b->lost};
    uint64_t reachable = 0;
    for (int32_t g = 0; g < n_groups(b); g++)
        reachable += (uint64_t)((b->task->pos + group_end(b, g) - 1) / KV_PAGE_TOKENS) + 1;
    for (int32_t h = 0; h < b->task->n_heads; h++) {
        struct attn_counts *c = &b->x.counts[h];
        c->reachable = reachable;
        sum.reachable += c->reachable;
        sum.visited += c->visited;
        sum.kept += c->kept;
        if (p->head_counts)
            add_counts(&p->head_counts[b->task->head + h], c);
    }
    if (p->seq_counts)
        add_counts(&p->seq_counts[b->task->seq], &sum);
}

static void open_block(struct block *b, const struct attn_job *job, int32_t task, int worker)
{
    const struct attn_task *t = &job->plan->tasks[job->plan->order[task]];
    char *at = job->scratch + (size_t)worker * job->scratch_bytes;
    *b = (struct block){.job = job, .task = t, .seq = &job->p->seqs[t->seq]};
    b->head_dim = job->kv->head_dim;
    b->dv = attn_tile_dv(b->head_dim);
    b->kv_head = t->head / (job->p->n_heads / job->kv->n_kv_heads);
    b->diag = attn_diag_page(t->pos);
    b->last_page = (t->pos + t->n_rows - 1) / KV_PAGE_TOKENS;
    if (job->policy->heads)
        b->heads =
            job->policy->heads + (size_t)job->p->layer * (size_t)job->p->n_heads + (size_t)t->head;
    b->gate = (enum attn_gate)(t->generated ? b->seq->choice.decode_gate : b->seq->choice.gate);
    b->group_rows = KV_BLOCK_TOKENS;
    if (t->generated)
        b->group_rows = 1;
    else if (b->gate != ATTN_GATE_NONE)
        b->group_rows = b->seq->choice.gate_rows;
    b->alone =
        (b->gate != ATTN_GATE_NONE && !t->generated) || job->p->tile_max || job->p->rel_counts;
    carve(&b->x, &at, b->head_dim);
}

void attn_block_run(void *arg, int task, int worker)
{
    struct block b;
    struct attn_walk walk;
    open_block(&b, arg, task, worker);
    load_rows(&b);
    if (b.gate != ATTN_GATE_NONE && !b.task->generated)
        start_gates(&b);
    attn_walk_init(&walk, b.job->policy->order, b.diag, b.last_page, b.heads, b.task->n_heads);
    run_walk(&b, &walk, run_panel);
    store_rows(&b);
    if (b.job->p->tile_max && b.job->p->tile_max->mass && !b.task->generated)
        run_walk(&b, &walk, weigh_panel);
    if (b.seq->choice.lost_mass && !b.task->generated)
        measure(&b);
    publish_counts(&b);
}
