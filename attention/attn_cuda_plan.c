/* The plan of a step: which kernel takes which rows, tile lists, work plans, page tables. */
#include "attention/attn_cuda_internal.h"
#include "attention/attn_lost.h"

#include <math.h>
#include <string.h>

static int32_t max_parts(const struct attn_cuda *a)
{
    return 2 * a->cfg.max_seqs + 1; /* prompt and generated rows of each, one divided by the cut */
}

int32_t attn_cuda_max_parts(const struct attn_cuda *a, int launch)
{
    const int32_t cuts = a->cfg.max_rows / DEC_MAX_TOKENS;
    return launch == LAUNCH_DECODE ? a->cfg.max_seqs + cuts : max_parts(a);
}

size_t attn_cuda_counts_bytes(const struct attn_cuda *a)
{
    const int32_t parts = attn_cuda_max_parts(a, LAUNCH_DECODE) + max_parts(a);
    return (size_t)parts * sizeof(struct sm90_counts);
}

/* Query blocks of a step: full ones, and two cut ones a part. */
static size_t max_tiles(const struct attn_cuda *a)
{
    size_t blocks = (size_t)(a->cfg.max_rows / KV_BLOCK_TOKENS) + 2 * (size_t)max_parts(a);
    return blocks * (size_t)a->cfg.n_heads;
}

static size_t max_pieces(const struct attn_cuda *a, int32_t parts)
{
    return dec_plan_max_pieces(&a->dec_shape, parts, DEC_MAX_TOKENS);
}

/* Each sequence's prompt is one part, and one of them two. */
static int32_t max_samples(const struct attn_cuda *a)
{
    return attn_sample_most(a->cfg.max_rows, a->cfg.max_seqs + 1);
}

static size_t sample_pieces_bytes(const struct attn_cuda *a, int32_t n)
{
    return dec_plan_max_pieces(&a->dec_shape, n, 1) * sizeof(struct dec_piece);
}

static size_t samples_bytes(const struct attn_cuda *a)
{
    const int32_t n = max_samples(a);
    return upload_round((size_t)n * sizeof(struct dec_seq)) +
           upload_round((size_t)n * sizeof(struct attn_lost_row)) +
           upload_round(sample_pieces_bytes(a, n)) +
           upload_round((size_t)(a->dec_shape.n_shares + 1) * sizeof(int32_t));
}

size_t attn_cuda_upload_bytes(const struct attn_cuda *a)
{
    const size_t seqs = (size_t)a->cfg.max_seqs, layers = (size_t)a->cfg.kv->n_layers;
    const int32_t made = attn_cuda_max_parts(a, LAUNCH_DECODE);
    const size_t plan = upload_round(max_pieces(a, made) * sizeof(struct dec_piece)) +
                        upload_round((size_t)(a->dec_shape.n_shares + 1) * sizeof(int32_t));
    return (size_t)a->n_plans * plan + upload_round((size_t)made * sizeof(struct dec_seq)) +
           2 * upload_round(max_tiles(a) * sizeof(struct sm90_tile)) + /* and of the last layer */
           upload_round(layers * (size_t)max_parts(a) * sizeof(struct sm90_seq)) +
           samples_bytes(a) +
           (size_t)LAUNCH_DECODE * 3 * UPLOAD_ALIGN + /* the groups' tiles and sequences apart */
           upload_round(seqs * (size_t)kv_pages_for(a->cfg.max_position) * sizeof(int32_t));
}

static void add_part(struct attn_group *g, struct attn_part part)
{
    if (part.n_rows > 0)
        g->parts[g->n_parts++] = part;
}

/* The kernels that a gate wants: those of ABS know its thresholds' signs, which steering changes.
 */
static int kernel_gate(const struct attn_choice *c)
{
    return c->gate == ATTN_GATE_ABS && c->steer > 0 ? SM90_GATE_REL : (int)c->gate;
}

/* Where the prompt rows of a sequence in one half go: to the launch of their gate, or to one that
 * has none yet. Without a gate that is always the half's first. */
static struct attn_group *group_of(struct attn_cuda *a, int first, const struct attn_choice *c)
{
    struct attn_group *g = &a->groups[first];
    if (c->gate == ATTN_GATE_NONE)
        return g;
    const int gate = kernel_gate(c);
    while (g->gate != SM90_GATE_NONE && (g->gate != gate || g->gate_rows != c->gate_rows))
        g++;
    ASSERT(g < &a->groups[first + LAUNCH_SECOND - LAUNCH_PREFILL]);
    g->gate = gate;
    g->gate_rows = c->gate_rows;
    return g;
}

/* Prompt rows, before the cut and behind it; c: their gate. */
static void add_prefill(struct attn_cuda *a, struct attn_part p, const struct attn_choice *c)
{
    const int32_t before = a->cut > 0 ? a->cut - p.row : p.n_rows;
    struct attn_part first = p;
    first.n_rows = before < 0 ? 0 : before < p.n_rows ? before : p.n_rows;
    p.row += first.n_rows;
    p.pos += first.n_rows;
    p.n_rows -= first.n_rows;
    ASSERT(first.n_rows == 0 || p.n_rows == 0 || p.pos % KV_BLOCK_TOKENS == 0);
    if (first.n_rows > 0)
        add_part(group_of(a, LAUNCH_PREFILL, c), first);
    if (p.n_rows > 0)
        add_part(group_of(a, LAUNCH_SECOND, c), p);
}

/* Generated rows for the decode kernel. */
static void add_decode(struct attn_cuda *a, struct attn_part p)
{
    const int half = p.row >= a->cut, end = p.row + p.n_rows > a->cut;
    if (p.n_rows == 0)
        return;
    const bool first = a->groups[LAUNCH_DECODE].n_parts == 0;
    a->decode_half = half == end && (first || a->decode_half == half) ? half : -1;
    add_part(&a->groups[LAUNCH_DECODE], p);
}

/* Where a sequence's generated rows begin in the step. */
static int32_t made_from(const struct attn_seq *s)
{
    const int32_t end = s->pos + s->n_rows;
    return s->prompt_end < s->pos ? s->pos : s->prompt_end < end ? s->prompt_end : end;
}

/* Parts of a sequence's generated rows for the decode kernel: under their gate, which the prefill
 * kernel does not know, as many as it takes. */
static int32_t decode_parts(const struct attn_seq *s)
{
    const int32_t n = s->pos + s->n_rows - made_from(s);
    const int32_t parts = (n + DEC_MAX_TOKENS - 1) / DEC_MAX_TOKENS;
    return parts > 1 && s->choice.decode_gate == ATTN_GATE_NONE ? 0 : parts;
}

static void split(struct attn_cuda *a, const struct attn_seq *s, int32_t index, const void *pages)
{
    const int32_t cut = made_from(s), n = cut - s->pos, parts = decode_parts(s);
    const struct attn_choice dense = {.gate = ATTN_GATE_NONE};
    const int32_t sample_end = s->choice.lost_mass ? s->prompt_end : 0;
    const struct attn_part prompt = {index, s->row, n, s->pos, true, sample_end, pages};
    struct attn_part made = {index, s->row + n, s->n_rows - n, cut, false, 0, pages};

    add_prefill(a, prompt, &s->choice);
    a->cut_runs |= parts > 1;
    for (int32_t i = 1; i < parts; i++) {
        struct attn_part full = made;
        full.n_rows = DEC_MAX_TOKENS;
        add_decode(a, full);
        made.row += DEC_MAX_TOKENS;
        made.pos += DEC_MAX_TOKENS;
        made.n_rows -= DEC_MAX_TOKENS;
    }
    if (parts > 0)
        add_decode(a, made);
    else
        add_prefill(a, made, &dense);
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

/* Thresholds of a level from a layer on. */
static const float *thresholds(const struct attn_table *table, const struct attn_thresholds *t,
                               int32_t level, int32_t layer)
{
    return table->t + ((int64_t)level * t->n_layers + layer) * t->n_heads * t->n_blocks;
}

/* The values that a sequence is steered by. */
static const float *keep_of(const struct attn_cuda *a, const struct attn_choice *c, int32_t layer)
{
    if (c->gate == ATTN_GATE_ABS)
        return thresholds(&a->abs_pages, &a->policy.abs_pages, c->level, layer);
    if (c->gate_rows == 64)
        return thresholds(&a->rel_64, &a->policy.rel_64, c->level, layer);
    return thresholds(&a->rel_128, &a->policy.rel_128, c->level, layer);
}

static struct sm90_seq make_seq(const struct attn_cuda *a, const struct attn_part *p,
                                const struct attn_choice *c, int32_t layer)
{
    const bool gated = p->prompt && c->gate != ATTN_GATE_NONE;
    const bool steered = gated && c->steer > 0;
    const bool absolute = gated && c->gate == ATTN_GATE_ABS;
    const float ln_lambda = absolute ? 0 : c->ln_lambda;
    return (struct sm90_seq){
        .row = p->row,
        .n_rows = p->n_rows,
        .pos = p->pos,
        .gate_rows = gated          ? c->gate_rows
                     : a->probe.max ? a->probe.gate_rows
                                    : KV_BLOCK_TOKENS,
        .pages = p->pages,
        .t = absolute ? thresholds(&a->abs, &a->policy.abs, c->level, layer) : NULL,
        .keep = steered ? keep_of(a, c, layer) : NULL,
        .ln_lambda = kernel_gate(c) == SM90_GATE_REL && gated ? ln_lambda : -INFINITY,
        .steer = steered ? c->steer : 0,
        .blend = c->blend,
        .is_absolute = absolute,
    };
}

/* The part of a sequence's rows that the last layer computes. */
static struct sm90_seq cut_seq(struct sm90_seq s, const struct attn_rows *rows)
{
    const int32_t end = s.row + s.n_rows, last = rows->row + rows->n_rows;
    const int32_t first = rows->row > s.row ? rows->row : s.row;
    s.n_rows = (last < end ? last : end) - first;
    if (s.n_rows < 0)
        s.n_rows = 0;
    s.pos += first - s.row;
    s.row = first;
    return s;
}

/* The last layer's tiles of a launch, of the sequences s [n_parts]. */
static void pack_last(struct attn_cuda *a, struct attn_group *g, const struct sm90_seq *s,
                      struct upload *u)
{
    for (int32_t i = 0; i < g->n_parts; i++)
        a->last_seqs[i] = cut_seq(s[i], &a->last[g->parts[i].seq]);
    const int64_t most = sm90_tile_count(a->last_seqs, g->n_parts, a->cfg.n_heads);
    struct upload_piece made = upload_take(u, (size_t)most * sizeof(struct sm90_tile));
    g->n_last_tiles =
        (int32_t)sm90_tiles_make(made.host, a->last_seqs, g->n_parts, &a->shape, a->l2_bytes);
    g->last_tiles = made.dev;
}

/* Thresholds differ from layer to layer, as do the densities of heads: then sequences are needed
 * once a layer. */
static bool differs_by_layer(const struct attn_group *g, const struct attn_seq *seqs)
{
    bool steered = false;
    for (int32_t i = 0; i < g->n_parts && !steered; i++)
        steered = seqs[g->parts[i].seq].choice.steer > 0;
    return steered || g->gate == SM90_GATE_ABS;
}

static void pack_prefill(struct attn_cuda *a, struct attn_group *g, const struct attn_seq *seqs,
                         struct upload *u)
{
    const int32_t copies = differs_by_layer(g, seqs) ? a->cfg.kv->n_layers : 1;
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
    if (a->last)
        pack_last(a, g, s, u);
}

/* Whether the part has rows that are measured and may lose something. */
static bool may_lose(const struct attn_cuda *a, const struct attn_part *p,
                     const struct attn_seq *seqs)
{
    return p->sample_end > 0 && (a->policy.heads || seqs[p->seq].choice.gate != ATTN_GATE_NONE);
}

/* Appends a part's sampled rows; its counters are the counts-th. */
static void add_samples(struct attn_samples *to, const struct attn_part *p, int32_t counts,
                        struct dec_seq *seqs, struct attn_lost_row *rows)
{
    for (int32_t pos = p->pos; pos < p->pos + p->n_rows; pos++) {
        pos = attn_sample_next(pos, p->sample_end);
        if (pos >= p->pos + p->n_rows)
            return;
        const int32_t row = p->row + pos - p->pos;
        seqs[to->n] = (struct dec_seq){
            .row = row, .n_rows = 1, .pos = pos, .ln_lambda = -INFINITY, .pages = p->pages};
        rows[to->n++] = (struct attn_lost_row){row, counts};
    }
}

static int32_t count_samples(const struct attn_cuda *a, const struct attn_seq *seqs)
{
    int32_t n = 0;
    for (int i = LAUNCH_PREFILL; i < LAUNCH_DECODE; i++) {
        const struct attn_group *g = &a->groups[i];
        for (int32_t k = 0; k < g->n_parts; k++) {
            const struct attn_part *p = &g->parts[k];
            n += may_lose(a, p, seqs) ? attn_sample_count(p->pos, p->n_rows, p->sample_end) : 0;
        }
    }
    return n;
}

static void pack_samples(struct attn_cuda *a, const struct attn_seq *seqs, struct upload *u)
{
    struct attn_samples *s = &a->samples;
    const int32_t n = count_samples(a, seqs);
    s->n = 0;
    if (n == 0)
        return;
    struct upload_piece made = upload_take(u, (size_t)n * sizeof(struct dec_seq));
    struct upload_piece rows = upload_take(u, (size_t)n * sizeof(struct attn_lost_row));
    struct upload_piece pieces = upload_take(u, sample_pieces_bytes(a, n));
    struct upload_piece first =
        upload_take(u, (size_t)(a->dec_shape.n_shares + 1) * sizeof(int32_t));
    struct dec_plan plan = {pieces.host, first.host};
    for (int i = LAUNCH_PREFILL; i < LAUNCH_DECODE; i++) {
        const struct attn_group *g = &a->groups[i];
        for (int32_t k = 0; k < g->n_parts; k++) {
            if (may_lose(a, &g->parts[k], seqs))
                add_samples(s, &g->parts[k], g->first_count + k, made.host, rows.host);
        }
    }
    (void)dec_plan_make(&plan, &a->dec_shape, made.host, n, NULL);
    s->seqs = made.dev;
    s->rows = rows.dev;
    s->pieces = pieces.dev;
    s->first = first.dev;
}

/* One row with a gate decides the kernel for all; in that, the others have no thresholds. */
static void pack_decode_seqs(struct attn_cuda *a, const struct attn_seq *seqs, struct dec_seq *s)
{
    struct attn_group *g = &a->groups[LAUNCH_DECODE];
    for (int32_t i = 0; i < g->n_parts; i++) {
        const struct attn_part *p = &g->parts[i];
        const struct attn_choice *c = &seqs[p->seq].choice;
        s[i] = (struct dec_seq){.row = p->row,
                                .n_rows = p->n_rows,
                                .pos = p->pos,
                                .ln_lambda = -INFINITY,
                                .pages = p->pages};
        if (c->decode_gate == ATTN_GATE_NONE)
            continue;
        s[i].t = thresholds(&a->decode, &a->policy.decode, c->decode_level, 0);
        g->gate = SM90_GATE_ABS;
    }
}

static void pack_decode(struct attn_cuda *a, struct upload *u, const struct dec_seq *s,
                        int32_t room)
{
    const struct attn_group *g = &a->groups[LAUNCH_DECODE];
    for (int32_t i = 0; i < a->n_plans; i++) {
        struct attn_dec_plan *plan = &a->plans[i];
        struct upload_piece pieces = upload_take(u, max_pieces(a, room) * sizeof(struct dec_piece));
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

/* Parts that a step's decode plan has room for. All steps that can be captured have the same: what
 * a captured launch reads must not move. */
static int32_t decode_room(const struct attn_cuda *a, const struct attn_seq *seqs, int32_t n_seqs)
{
    int32_t n = 0;
    for (int32_t i = 0; i < n_seqs; i++)
        n += decode_parts(&seqs[i]);
    return n < a->cfg.max_seqs ? a->cfg.max_seqs : n;
}

/* Counters of the decode kernel's parts, which a captured launch finds where they were; then those
 * of the others. */
static void place_counts(struct attn_cuda *a, struct sm90_counts *counts)
{
    int32_t at = attn_cuda_max_parts(a, LAUNCH_DECODE);
    a->counts = counts;
    for (int i = 0; i < N_LAUNCHES; i++) {
        struct attn_group *g = &a->groups[i];
        g->first_count = i == LAUNCH_DECODE ? 0 : at;
        g->counts = counts + g->first_count;
        at += i == LAUNCH_DECODE ? 0 : g->n_parts;
    }
}

/* Nothing is planned yet. */
static void start(struct attn_cuda *a, const struct attn_cuda_step *step)
{
    for (int i = 0; i < N_LAUNCHES; i++) {
        struct attn_group *g = &a->groups[i];
        g->n_parts = g->n_tiles = g->n_last_tiles = 0;
        g->gate = SM90_GATE_NONE;
        g->gate_rows = a->probe.max ? a->probe.gate_rows : KV_BLOCK_TOKENS;
    }
    a->cut_runs = false;
    a->cut = step->cut;
    a->decode_half = -1;
    a->last = step->last;
    a->narrow = step->last != NULL;
}

void attn_cuda_plan(struct attn_cuda *a, const struct attn_cuda_step *step, struct upload *u,
                    void *counts)
{
    const struct attn_seq *seqs = step->seqs;
    const int32_t n_seqs = step->n_seqs;
    const bool decode = any_generated(seqs, n_seqs);
    const int32_t room = decode_room(a, seqs, n_seqs);
    struct upload_piece dec_seqs = {NULL, NULL};

    start(a, step);
    struct upload fixed = *u;
    if (decode) { /* before everything whose size varies */
        dec_seqs = upload_take(u, (size_t)room * sizeof(struct dec_seq));
        a->dec_seqs = dec_seqs.dev;
        fixed = *u;
        for (int32_t i = 0; i < a->n_plans; i++) {
            (void)upload_take(u, max_pieces(a, room) * sizeof(struct dec_piece));
            (void)upload_take(u, (size_t)(a->dec_shape.n_shares + 1) * sizeof(int32_t));
        }
    }
    pack_pages(a, seqs, n_seqs, u);
    place_counts(a, counts);
    if (decode) {
        pack_decode_seqs(a, seqs, dec_seqs.host);
        pack_decode(a, &fixed, dec_seqs.host, room);
    }
    for (int i = LAUNCH_PREFILL; i < LAUNCH_DECODE; i++)
        pack_prefill(a, &a->groups[i], seqs, u);
    pack_samples(a, seqs, u);
}

bool attn_cuda_has_halves(const struct attn_cuda *a)
{
    return a->cut > 0 && (a->groups[LAUNCH_DECODE].n_parts == 0 || a->decode_half >= 0);
}

bool attn_cuda_is_decode(const struct attn_cuda *a)
{
    for (int i = LAUNCH_PREFILL; i < LAUNCH_DECODE; i++) {
        if (a->groups[i].n_parts > 0)
            return false;
    }
    return true;
}

void attn_cuda_use_decode_gate(struct attn_cuda *a)
{
    a->groups[LAUNCH_DECODE].gate = SM90_GATE_ABS;
}

void attn_cuda_counts(const struct attn_cuda *a, const void *counts, struct attn_counts *out,
                      int32_t n_seqs)
{
    const uint64_t units = (uint64_t)a->cfg.kv->n_layers * (uint64_t)a->cfg.n_heads;
    memset(out, 0, (size_t)n_seqs * sizeof *out);
    for (int i = 0; i < N_LAUNCHES; i++) {
        const struct attn_group *g = &a->groups[i];
        const struct sm90_counts *c = (const struct sm90_counts *)counts + g->first_count;
        for (int32_t k = 0; k < g->n_parts; k++) {
            const struct attn_part *p = &g->parts[k];
            struct attn_counts *to = &out[p->seq];
            to->reachable += c[k].reachable;
            to->visited += c[k].visited;
            to->kept += c[k].kept;
            to->lost += c[k].lost;
            if (p->sample_end > 0)
                to->sampled +=
                    units * (uint64_t)attn_sample_count(p->pos, p->n_rows, p->sample_end);
        }
    }
}
