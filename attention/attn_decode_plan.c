/* See attn_decode_plan.h. */
#include "attention/attn_decode_plan.h"

enum { PAGE = 64, BLOCK_PAGES = 2 };

/* What the query heads of one KV head visit together. */
struct reach {
    int32_t sink, local; /* local < 0: all pages */
};

/* The cut in progress. rest is the cost of what no share has taken yet. */
struct cutter {
    struct dec_plan *plan;
    int32_t n_shares, share, n_pieces;
    int64_t rest, room;
};

static int32_t min32(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

static int32_t n_tiles(int32_t rows)
{
    return (rows + DEC_ROWS - 1) / DEC_ROWS;
}

size_t dec_plan_max_pieces(const struct dec_shape *shape, int32_t n_seqs, int32_t n_rows)
{
    int32_t tiles = n_tiles(n_rows * dec_group(shape));
    return (size_t)n_seqs * (size_t)shape->n_kv_heads * (size_t)tiles + (size_t)shape->n_shares;
}

size_t dec_workspace_bytes(const struct dec_shape *shape)
{
    return (size_t)shape->n_shares * 2 * DEC_ROWS * (size_t)(shape->head_dim + 2) * sizeof(float);
}

static struct reach reach_of(const struct attn_head_policy *heads, int32_t n)
{
    struct reach r = {0, heads ? 0 : -1};
    for (int32_t h = 0; heads && h < n; h++) {
        if (heads[h].visit == ATTN_VISIT_ALL)
            return (struct reach){0, -1};
        r.sink = heads[h].sink_pages > r.sink ? heads[h].sink_pages : r.sink;
        r.local = heads[h].local_pages > r.local ? heads[h].local_pages : r.local;
    }
    return r;
}

/* The pages of a task: fills last, n_run, sink and returns how many there are. */
static int32_t walk_of(struct dec_piece *p, const struct dec_seq *s, int32_t group,
                       const struct reach *r)
{
    int32_t oldest = s->pos, newest = s->pos;
    if (s->n_rows > 1) {
        int32_t first = p->tile * DEC_ROWS;
        oldest += first / group;
        newest += (min32(first + DEC_ROWS, s->n_rows * group) - 1) / group;
    }
    int32_t diag = oldest / (PAGE * BLOCK_PAGES) * BLOCK_PAGES;
    int32_t near = r->local < 0 || r->local > diag ? 0 : diag - r->local;
    p->last = newest / PAGE;
    p->n_run = p->last + 1 - near;
    p->sink = min32(r->sink, near);
    return p->n_run + p->sink;
}

/* Every remaining share gets an equal part of what is left, so small misfits do not add up. */
static void next_share(struct cutter *c, int first)
{
    if (!first)
        c->plan->first[++c->share] = c->n_pieces;
    int64_t n = c->n_shares - c->share;
    c->room = (c->rest + n - 1) / n;
    if (c->room < 2 * DEC_MIN_PAGES + DEC_PIECE_COST)
        c->room = 2 * DEC_MIN_PAGES + DEC_PIECE_COST;
}

/* How many of the pages left of a task the present share takes; 0: it is full. No part is shorter
 * than DEC_MIN_PAGES; of the ways to avoid one, the nearest to the share's room. */
static int32_t take(const struct cutter *c, int32_t left)
{
    const int32_t n = (int32_t)(c->room < INT32_MAX / 2 ? c->room : INT32_MAX / 2) - DEC_PIECE_COST;
    if (left <= n || c->share == c->n_shares - 1)
        return left;
    int32_t len = n < DEC_MIN_PAGES ? DEC_MIN_PAGES : n;
    if (left - len < DEC_MIN_PAGES) {
        const int32_t less = left - DEC_MIN_PAGES;
        len = less < DEC_MIN_PAGES || left - n <= n - less ? left : less;
    }
    return len - n > n + DEC_PIECE_COST ? 0 : len;
}

/* Cuts one task of n pages into pieces. */
static void cut(struct cutter *c, struct dec_piece task, int32_t n)
{
    const int32_t first_piece = c->n_pieces;
    for (int32_t at = 0; at < n;) {
        int32_t len = take(c, n - at);
        if (len == 0) {
            next_share(c, 0);
            len = take(c, n - at); /* a fresh share has room for two least parts */
        }
        task.begin = at;
        task.end = at += len;
        task.slot = 2 * c->share + (c->n_pieces != c->plan->first[c->share]);
        c->plan->pieces[c->n_pieces++] = task;
        c->rest -= len + (at == n ? DEC_PIECE_COST : 0);
        c->room -= len + DEC_PIECE_COST;
        if (at < n)
            next_share(c, 0);
    }
    struct dec_piece *p = c->plan->pieces + first_piece, *end = c->plan->pieces + c->n_pieces;
    const int32_t slot = p->slot, parts = c->n_pieces - first_piece;
    for (; p < end; p++) {
        p->first_slot = slot;
        p->n_parts = parts;
    }
}

/* Calls cut for all tasks of one sequence, or only adds up their cost. */
static int64_t each_task(struct cutter *c, const struct dec_shape *shape, const struct dec_seq *s,
                         int32_t seq, const struct attn_head_policy *heads)
{
    const int32_t group = dec_group(shape), tiles = n_tiles(s->n_rows * group);
    int64_t cost = 0;
    for (int32_t kv = 0; kv < shape->n_kv_heads; kv++) {
        const struct reach r = reach_of(heads ? heads + (ptrdiff_t)kv * group : NULL, group);
        for (int32_t tile = 0; tile < tiles; tile++) {
            struct dec_piece p = {.pages = s->pages,
                                  .row = s->row,
                                  .pos = s->pos,
                                  .n_rows = s->n_rows,
                                  .seq = seq,
                                  .kv_head = (uint16_t)kv,
                                  .tile = (uint16_t)tile};
            int32_t n = walk_of(&p, s, group, &r);
            cost += n + DEC_PIECE_COST;
            if (c)
                cut(c, p, n);
        }
    }
    return cost;
}

int32_t dec_plan_make(struct dec_plan *plan, const struct dec_shape *shape,
                      const struct dec_seq *seqs, int32_t n_seqs,
                      const struct attn_head_policy *heads)
{
    struct cutter c = {.plan = plan, .n_shares = shape->n_shares};
    for (int32_t i = 0; i < n_seqs; i++)
        c.rest += each_task(NULL, shape, &seqs[i], i, heads);
    plan->first[0] = 0;
    next_share(&c, 1);
    for (int32_t i = 0; i < n_seqs; i++)
        each_task(&c, shape, &seqs[i], i, heads);
    while (c.share < c.n_shares)
        plan->first[++c.share] = c.n_pieces;
    return c.n_pieces;
}
