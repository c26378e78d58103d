/* The plan of a step: which kernel takes which rows, tile lists, work plans, page tables. */
#include "attention/attn_cuda_internal.h"

#include <math.h>
#include <string.h>

static int32_t max_parts(const struct attn_cuda *a)
{
    return 2 * a->cfg.max_seqs; /* prompt rows and generated rows of each */
}

size_t attn_cuda_counts_bytes(const struct attn_cuda *a)
{
    return (size_t)N_LAUNCHES * (size_t)max_parts(a) * sizeof(struct sm90_counts);
}

/* Query blocks of a step: full ones, and two cut ones a part. */
static size_t max_tiles(const struct attn_cuda *a)
{
    size_t blocks = (size_t)(a->cfg.max_rows / KV_BLOCK_TOKENS) + 2 * (size_t)max_parts(a);
    return blocks * (size_t)a->cfg.n_heads;
}

static size_t max_pieces(const struct attn_cuda *a)
{
    return dec_plan_max_pieces(&a->dec_shape, a->cfg.max_seqs, DEC_MAX_TOKENS);
}

size_t attn_cuda_upload_bytes(const struct attn_cuda *a)
{
    const size_t seqs = (size_t)a->cfg.max_seqs, layers = (size_t)a->cfg.kv->n_layers;
    const size_t plan = upload_round(max_pieces(a) * sizeof(struct dec_piece)) +
                        upload_round((size_t)(a->dec_shape.n_shares + 1) * sizeof(int32_t));
    return (size_t)a->n_plans * plan + upload_round(seqs * sizeof(struct dec_seq)) +
           upload_round(max_tiles(a) * sizeof(struct sm90_tile)) +
           upload_round(layers * (size_t)max_parts(a) * sizeof(struct sm90_seq)) +
           (size_t)LAUNCH_DECODE * 2 * UPLOAD_ALIGN + /* the groups' tiles and sequences apart */
           upload_round(seqs * (size_t)kv_pages_for(a->cfg.max_position) * sizeof(int32_t));
}

static void add_part(struct attn_group *g, struct attn_part part)
{
    if (part.n_rows > 0)
        g->parts[g->n_parts++] = part;
}

/* Where the prompt rows of a sequence go: to the launch of their gate, or to one that has none yet.
 * Without a gate that is always the first. */
static struct attn_group *group_of(struct attn_cuda *a, const struct attn_choice *c)
{
    struct attn_group *g = &a->groups[LAUNCH_PREFILL];
    if (c->gate == ATTN_GATE_NONE)
        return g;
    while (g->gate != SM90_GATE_NONE && (g->gate != (int)c->gate || g->gate_rows != c->gate_rows))
        g++;
    ASSERT(g < &a->groups[LAUNCH_DECODE]);
    g->gate = (int)c->gate;
    g->gate_rows = c->gate_rows;
    return g;
}

static void split(struct attn_cuda *a, const struct attn_seq *s, int32_t index, const void *pages)
{
    const int32_t end = s->pos + s->n_rows;
    const int32_t cut = s->prompt_end < s->pos ? s->pos : s->prompt_end < end ? s->prompt_end : end;
    const int32_t n = cut - s->pos, rest = end - cut;
    const struct attn_part prompt = {index, s->row, n, s->pos, true, pages};
    const struct attn_part made = {index, s->row + n, rest, cut, false, pages};

    add_part(n > 0 ? group_of(a, &s->choice) : &a->groups[LAUNCH_PREFILL], prompt);
    add_part(&a->groups[rest > DEC_MAX_TOKENS ? LAUNCH_PREFILL : LAUNCH_DECODE], made);
}

/* Page tables of all sequences, one after the other; then the parts that read them. */
static void pack_pages(struct attn_cuda *a, const struct attn_seq *seqs, int32_t n_seqs,
                       struct upload *u)
{
    size_t total = 0, at = 0;
    for (int32_t i = 0; i < n_seqs; i++)
        total += (size_t)kv_pages_for((int64_t)seqs[i].pos + seqs[i].n_rows);
    struct upload_piece table = upload_take(u, total * sizeof(int32_t));
    for (int32_t i = 0; i < n_seqs; i++) {
        size_t n = (size_t)kv_pages_for((int64_t)seqs[i].pos + seqs[i].n_rows);
        memcpy((int32_t *)table.host + at, seqs[i].pages, n * sizeof(int32_t));
        split(a, &seqs[i], i, (int32_t *)table.dev + at);
        at += n;
    }
}

/* Thresholds of a level in a layer, or NULL. */
static const float *thresholds(const struct attn_cuda *a, int32_t level, int32_t layer)
{
    const struct attn_thresholds *t = &a->policy.abs;
    return a->t + ((int64_t)level * t->n_layers + layer) * t->n_heads * t->n_blocks;
}

static struct sm90_seq make_seq(const struct attn_cuda *a, const struct attn_part *p,
                                const struct attn_choice *c, int32_t layer)
{
    const bool gated = p->prompt && c->gate != ATTN_GATE_NONE;
    return (struct sm90_seq){
        .row = p->row,
        .n_rows = p->n_rows,
        .pos = p->pos,
        .gate_rows = gated          ? c->gate_rows
                     : a->probe.max ? a->probe.gate_rows
                                    : KV_BLOCK_TOKENS,
        .pages = p->pages,
        .t = gated && c->gate == ATTN_GATE_ABS ? thresholds(a, c->level, layer) : NULL,
        .ln_lambda = gated && c->gate == ATTN_GATE_REL ? c->ln_lambda : -INFINITY,
    };
}

/* Thresholds differ from layer to layer, so ABS needs its sequences once a layer. */
static void pack_prefill(struct attn_cuda *a, struct attn_group *g, const struct attn_seq *seqs,
                         struct upload *u)
{
    const int32_t copies = g->gate == SM90_GATE_ABS ? a->cfg.kv->n_layers : 1;
    if (g->n_parts == 0)
        return;
    struct upload_piece made =
        upload_take(u, (size_t)copies * (size_t)g->n_parts * sizeof(struct sm90_seq));
    struct sm90_seq *s = made.host;
    for (int32_t l = 0; l < copies; l++) {
        for (int32_t i = 0; i < g->n_parts; i++)
            s[l * g->n_parts + i] = make_seq(a, &g->parts[i], &seqs[g->parts[i].seq].choice, l);
    }
    g->seqs = made.dev;
    g->seq_stride = copies > 1 ? g->n_parts : 0;
    const int64_t most = sm90_tile_count(s, g->n_parts, a->cfg.n_heads);
    made = upload_take(u, (size_t)most * sizeof(struct sm90_tile));
    g->n_tiles = (int32_t)sm90_tiles_make(made.host, s, g->n_parts, &a->shape, a->l2_bytes);
    g->tiles = made.dev;
}

/* Sizes are the most there can be: what a captured launch reads must not move. */
static void pack_decode(struct attn_cuda *a, struct upload *u, struct upload_piece seqs)
{
    const struct attn_group *g = &a->groups[LAUNCH_DECODE];
    struct dec_seq *s = seqs.host;
    for (int32_t i = 0; i < g->n_parts; i++) {
        const struct attn_part *p = &g->parts[i];
        s[i] = (struct dec_seq){.row = p->row,
                                .n_rows = p->n_rows,
                                .pos = p->pos,
                                .ln_lambda = -INFINITY,
                                .pages = p->pages};
    }
    for (int32_t i = 0; i < a->n_plans; i++) {
        struct attn_dec_plan *plan = &a->plans[i];
        struct upload_piece pieces = upload_take(u, max_pieces(a) * sizeof(struct dec_piece));
        struct upload_piece first =
            upload_take(u, (size_t)(a->dec_shape.n_shares + 1) * sizeof(int32_t));
        struct dec_plan made = {pieces.host, first.host};
        const struct attn_head_policy *heads = a->policy.heads;
        plan->pieces = pieces.dev;
        plan->first = first.dev;
        (void)dec_plan_make(&made, &a->dec_shape, s, g->n_parts,
                            heads ? heads + (ptrdiff_t)plan->layer * a->cfg.n_heads : NULL);
    }
}

static bool any_generated(const struct attn_seq *seqs, int32_t n_seqs)
{
    for (int32_t i = 0; i < n_seqs; i++) {
        if (seqs[i].pos + seqs[i].n_rows > seqs[i].prompt_end)
            return true;
    }
    return n_seqs == 0; /* the empty step that warms up the kernels */
}

void attn_cuda_plan(struct attn_cuda *a, const struct attn_seq *seqs, int32_t n_seqs,
                    struct upload *u, void *counts)
{
    const bool decode = any_generated(seqs, n_seqs);
    struct upload_piece dec_seqs = {NULL, NULL};

    for (int i = 0; i < N_LAUNCHES; i++) {
        struct attn_group *g = &a->groups[i];
        g->n_parts = g->n_tiles = 0;
        g->gate = SM90_GATE_NONE;
        g->gate_rows = a->probe.max ? a->probe.gate_rows : KV_BLOCK_TOKENS;
        g->counts = (struct sm90_counts *)counts + (ptrdiff_t)i * max_parts(a);
    }
    struct upload fixed = *u;
    if (decode) { /* before everything whose size varies */
        dec_seqs = upload_take(u, (size_t)a->cfg.max_seqs * sizeof(struct dec_seq));
        a->dec_seqs = dec_seqs.dev;
        fixed = *u;
        for (int32_t i = 0; i < a->n_plans; i++) {
            (void)upload_take(u, max_pieces(a) * sizeof(struct dec_piece));
            (void)upload_take(u, (size_t)(a->dec_shape.n_shares + 1) * sizeof(int32_t));
        }
    }
    pack_pages(a, seqs, n_seqs, u);
    if (decode)
        pack_decode(a, &fixed, dec_seqs);
    for (int i = LAUNCH_PREFILL; i < LAUNCH_DECODE; i++)
        pack_prefill(a, &a->groups[i], seqs, u);
}

bool attn_cuda_is_decode(const struct attn_cuda *a)
{
    for (int i = LAUNCH_PREFILL; i < LAUNCH_DECODE; i++) {
        if (a->groups[i].n_parts > 0)
            return false;
    }
    return true;
}

void attn_cuda_counts(const struct attn_cuda *a, const void *counts, struct attn_counts *out,
                      int32_t n_seqs)
{
    memset(out, 0, (size_t)n_seqs * sizeof *out);
    for (int i = 0; i < N_LAUNCHES; i++) {
        const struct attn_group *g = &a->groups[i];
        const struct sm90_counts *c =
            (const struct sm90_counts *)counts + (ptrdiff_t)i * max_parts(a);
        for (int32_t k = 0; k < g->n_parts; k++) {
            struct attn_counts *to = &out[g->parts[k].seq];
            to->reachable += c[k].reachable;
            to->visited += c[k].visited;
            to->kept += c[k].kept;
        }
    }
}
