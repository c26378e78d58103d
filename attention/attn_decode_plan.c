/* See attn_decode_plan.h. */
#include "attention/attn_decode_plan.h"

/* LEAST: room of a fresh share, so that a task too short to be cut fits. */
enum { PAGE = 64, BLOCK_PAGES = 2, LEAST = 2 * DEC_MIN_PAGES + DEC_PIECE_COST };

/* What the query heads of one KV head visit together. */
struct reach {
    int32_t sink, local; /* local < 0: all pages */
};

/* The cut in progress. A share takes what its step says and what the one before left or took too
 * much of. */
struct cutter {
    struct dec_plan *plan;
    int32_t share, n_pieces, room;
    int32_t n_large, n_shares; /* shares before the small ones; all that may be used */
    int32_t large_step, small_step;
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
    const int32_t first = p->tile * DEC_ROWS;
    const int32_t oldest = s->pos + first / group;
    const int32_t newest = s->pos + (min32(first + DEC_ROWS, s->n_rows * group) - 1) / group;
    int32_t diag = oldest / (PAGE * BLOCK_PAGES) * BLOCK_PAGES;
    int32_t near = r->local < 0 || r->local > diag ? 0 : diag - r->local;
    p->last = newest / PAGE;
    p->n_run = p->last + 1 - near;
    p->sink = min32(r->sink, near);
    return p->n_run + p->sink;
}

/* Sizes of the shares for a total cost. Nearly every share ends in a cut, which costs a piece more.
 */
static void cutter_start(struct cutter *c, int64_t total, int64_t n_tasks, int32_t n_shares)
{
    const int32_t blocks = dec_blocks(n_shares);
    const int32_t least =
        total <= n_tasks * DEC_SHORT_TASK ? DEC_SPARE_LEAST_SHORT : DEC_SPARE_LEAST;
    const int64_t spare = total < (int64_t)blocks * least ? 0 : total * DEC_SPARE_PERCENT / 100;
    c->n_large = blocks;
    c->n_shares = spare ? n_shares : blocks;
    c->large_step = (int32_t)((total - spare + blocks - 1) / blocks) + DEC_PIECE_COST;
    const int64_t n_small = (int64_t)blocks * DEC_SPARE;
    c->small_step = (int32_t)((spare + n_small - 1) / n_small) + DEC_PIECE_COST;
    c->room = c->large_step < LEAST ? LEAST : c->large_step;
    c->plan->first[0] = 0;
}

static void next_share(struct cutter *c)
{
    c->plan->first[++c->share] = c->n_pieces;
    c->room += c->share < c->n_large ? c->large_step : c->small_step;
    c->room = c->room < LEAST ? LEAST : c->room;
}

/* How many of the pages left of a task the present share takes; 0: it is full. No part is shorter
 * than DEC_MIN_PAGES; of the ways to avoid one, the nearest to the share's room. */
static int32_t take(const struct cutter *c, int32_t left)
{
    const int32_t n = c->room - DEC_PIECE_COST;
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
            next_share(c);
            len = take(c, n - at); /* a fresh share has room for two least parts */
        }
        task.begin = at;
        task.end = at += len;
        task.slot = 2 * c->share + (c->n_pieces != c->plan->first[c->share]);
        c->plan->pieces[c->n_pieces++] = task;
        c->room -= len + DEC_PIECE_COST;
        if (at < n)
            next_share(c);
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
        if (!c && !heads) /* all KV heads alike */
            return cost * shape->n_kv_heads;
    }
    return cost;
}

int32_t dec_plan_make(struct dec_plan *plan, const struct dec_shape *shape,
                      const struct dec_seq *seqs, int32_t n_seqs,
                      const struct attn_head_policy *heads)
{
    struct cutter c = {.plan = plan};
    int64_t total = 0, n_tasks = 0;
    for (int32_t i = 0; i < n_seqs; i++) {
        total += each_task(NULL, shape, &seqs[i], i, heads);
        n_tasks += (int64_t)shape->n_kv_heads * n_tiles(seqs[i].n_rows * dec_group(shape));
    }
    cutter_start(&c, total, n_tasks, shape->n_shares);
    for (int32_t i = 0; i < n_seqs; i++)
        each_task(&c, shape, &seqs[i], i, heads);
    if (c.n_pieces)
        plan->pieces[0].shares = c.share + 1;
    while (c.share < shape->n_shares)
        plan->first[++c.share] = c.n_pieces;
    return c.n_pieces;
}
