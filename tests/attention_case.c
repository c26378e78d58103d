/* See attention_case.h. */
#include "attention_case.h"

#include "attention/attn_cpu.h"
#include "core/mem.h"

static size_t q_row(const struct attn_case *t)
{
    return (size_t)t->c.n_heads * (size_t)t->c.head_dim;
}

static size_t kv_row(const struct attn_case *t)
{
    return (size_t)t->c.n_kv_heads * (size_t)t->c.head_dim;
}

static float *normals(struct rng *r, size_t n, double scale)
{
    float *x = mem_alloc((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(rng_normal(r) * scale);
    return x;
}

static void round_to(float *x, size_t n, enum dtype t)
{
    for (size_t i = 0; t == DTYPE_BF16 && i < n; i++)
        x[i] = dtype_bf16_f32(dtype_f32_bf16(x[i]));
}

static void open_seq(struct attn_case *t, struct case_seq *s, int32_t len, int32_t prompt_end)
{
    const size_t n = (size_t)len;
    s->len = len;
    s->prompt_end = prompt_end;
    s->n_pages = kv_pages_for(len);
    s->pages = mem_alloc((size_t)s->n_pages * sizeof *s->pages);
    s->q = normals(&t->rng, n * q_row(t), t->c.sharpness);
    s->k = normals(&t->rng, n * kv_row(t), 1);
    s->v = normals(&t->rng, n * kv_row(t), 1);
    for (int32_t page = 0; page < s->n_pages; page++) { /* some pages matter less */
        float scale = rng_range(&t->rng, 0, 2) ? 1.0f : 0.2f;
        size_t at = (size_t)page * KV_PAGE_TOKENS * kv_row(t),
               end = at + KV_PAGE_TOKENS * kv_row(t);
        for (; at < end && at < n * kv_row(t); at++)
            s->k[at] *= scale;
    }
    round_to(s->k, n * kv_row(t), t->c.dtype);
    round_to(s->v, n * kv_row(t), t->c.dtype);
    s->out = mem_alloc(n * q_row(t) * sizeof *s->out);
    s->lse = mem_alloc(n * (size_t)t->c.n_heads * sizeof *s->lse);
}

void case_open(struct attn_case *t, const struct case_config *c, struct rng *rng)
{
    memset(t, 0, sizeof *t);
    t->c = *c;
    t->rng.s = rng_u64(rng);
    t->scale = (float)(1 / sqrt((double)c->head_dim));
    t->layer = rng_range(&t->rng, 0, CASE_LAYERS - 1);
    t->kv = (struct kv_view){.dtype = c->dtype,
                             .n_layers = CASE_LAYERS,
                             .n_pages = 3,
                             .n_kv_heads = c->n_kv_heads,
                             .head_dim = c->head_dim,
                             .k = t->pools[0],
                             .v = t->pools[1]};
    for (int32_t i = 0; i < c->n_seqs; i++) {
        open_seq(t, &t->seqs[i], c->len[i], c->prompt_end[i]);
        t->kv.n_pages += t->seqs[i].n_pages;
    }
    for (int i = 0; i < 2; i++)
        t->pools[i][t->layer] =
            mem_alloc((size_t)t->kv.n_pages * KV_PAGE_TOKENS * kv_row(t) * dtype_bytes(c->dtype));
    assert_ok(dev_open(&t->dev, &dev_cpu, 0, c->n_threads ? c->n_threads : 2, NULL));
    t->workspace = mem_alloc(attn_cpu.workspace_bytes(c->n_heads, &t->kv, t->dev));
    t->head_counts = mem_zalloc((size_t)c->n_heads, sizeof *t->head_counts);
    t->tile = attn_tile_best();
    case_reset(t);
}

void case_open_one(struct attn_case *t, struct rng *rng, int32_t len, int32_t prompt_end,
                   int32_t head_dim, int32_t group)
{
    struct case_config c = {.n_heads = 2 * group,
                            .n_kv_heads = 2,
                            .head_dim = head_dim,
                            .dtype = DTYPE_F32,
                            .n_seqs = 1,
                            .len = {len},
                            .prompt_end = {prompt_end},
                            .sharpness = 1,
                            .n_threads = 2};
    case_open(t, &c, rng);
}

void case_close(struct attn_case *t)
{
    for (int32_t i = 0; i < t->c.n_seqs; i++) {
        struct case_seq *s = &t->seqs[i];
        mem_free(s->pages);
        mem_free(s->q);
        mem_free(s->k);
        mem_free(s->v);
        mem_free(s->out);
        mem_free(s->lse);
    }
    for (int i = 0; i < 2; i++)
        mem_free(t->pools[i][t->layer]);
    mem_free(t->workspace);
    mem_free(t->head_counts);
    mem_free(t->heads);
    mem_free(t->thresholds);
    mem_free(t->decode);
    mem_free(t->pages);
    mem_free(t->densities[0]);
    mem_free(t->densities[1]);
    dev_close(t->dev);
}

static void deal_pages(struct attn_case *t)
{
    int32_t n = t->kv.n_pages;
    int32_t *deck = mem_alloc((size_t)n * sizeof *deck);
    for (int32_t i = 0; i < n; i++)
        deck[i] = i;
    for (int32_t i = n - 1; i > 0; i--) {
        int32_t j = rng_range(&t->rng, 0, i), x = deck[i];
        deck[i] = deck[j];
        deck[j] = x;
    }
    for (int32_t i = 0, at = 0; i < t->c.n_seqs; i++) {
        for (int32_t j = 0; j < t->seqs[i].n_pages; j++)
            t->seqs[i].pages[j] = deck[at++];
    }
    mem_free(deck);
}

void case_reset(struct attn_case *t)
{
    size_t bytes = (size_t)t->kv.n_pages * KV_PAGE_TOKENS * kv_row(t) * dtype_bytes(t->c.dtype);
    memset(t->pools[0][t->layer], 0xff, bytes); /* NaN in either type */
    memset(t->pools[1][t->layer], 0xff, bytes);
    deal_pages(t);
    for (int32_t i = 0; i < t->c.n_seqs; i++) {
        struct case_seq *s = &t->seqs[i];
        s->written = 0;
        s->counts = (struct attn_counts){0};
        memset(s->out, 0xff, (size_t)s->len * q_row(t) * sizeof *s->out);
        memset(s->lse, 0xff, (size_t)s->len * (size_t)t->c.n_heads * sizeof *s->lse);
    }
    memset(t->head_counts, 0, (size_t)t->c.n_heads * sizeof *t->head_counts);
}

/* Into *at, in place of what was there. */
static struct attn_thresholds random_thresholds(struct attn_case *t, float **at, int32_t n_levels,
                                                int32_t n_blocks, double lo, double hi)
{
    size_t n = (size_t)n_levels * CASE_LAYERS * (size_t)t->c.n_heads * (size_t)n_blocks;
    mem_free(*at);
    float *to = *at = mem_alloc(n * sizeof *to);
    for (size_t i = 0; i < n; i++) {
        double u = rng_unit(&t->rng);
        to[i] = (float)(lo + (hi - lo) * rng_unit(&t->rng));
        if (u < 0.05)
            to[i] = u < 0.025 ? -INFINITY : INFINITY;
    }
    return (struct attn_thresholds){
        .t = to,
        .n_levels = n_levels,
        .n_layers = CASE_LAYERS,
        .n_heads = t->c.n_heads,
        .n_blocks = n_blocks,
        .level_stride = (int64_t)CASE_LAYERS * t->c.n_heads * n_blocks,
        .layer_stride = (int64_t)t->c.n_heads * n_blocks,
        .head_stride = n_blocks,
    };
}

void case_thresholds(struct attn_case *t, int32_t n_levels, int32_t n_blocks, double lo, double hi)
{
    t->policy.abs = random_thresholds(t, &t->thresholds, n_levels, n_blocks, lo, hi);
}

void case_decode_thresholds(struct attn_case *t, int32_t n_levels, int32_t n_blocks, double lo,
                            double hi)
{
    t->policy.decode = random_thresholds(t, &t->decode, n_levels, n_blocks, lo, hi);
}

void case_densities(struct attn_case *t, int32_t n_levels)
{
    struct attn_thresholds *to[] = {&t->policy.rel_128, &t->policy.rel_64};
    for (int i = 0; i < 2; i++) {
        *to[i] = random_thresholds(t, &t->densities[i], n_levels, 1, 0.02, 0.9);
        for (int64_t j = 0; j < n_levels * to[i]->level_stride; j++)
            t->densities[i][j] = fminf(fmaxf(t->densities[i][j], 0), 1);
    }
    t->policy.abs_pages = random_thresholds(t, &t->pages, n_levels, 1, 0.5, 6);
    for (int64_t j = 0; j < n_levels * t->policy.abs_pages.level_stride; j++)
        t->pages[j] = fminf(fmaxf(t->pages[j], 0), 100);
}

void case_visits(struct attn_case *t)
{
    size_t n = (size_t)CASE_LAYERS * (size_t)t->c.n_heads;
    mem_free(t->heads);
    t->heads = mem_zalloc(n, sizeof *t->heads);
    for (size_t i = 0; i < n; i++) {
        if (rng_range(&t->rng, 0, 2) == 0)
            continue;
        t->heads[i] = (struct attn_head_policy){ATTN_VISIT_SINK_LOCAL, rng_range(&t->rng, 0, 3),
                                                rng_range(&t->rng, 0, 4)};
    }
    t->policy.heads = t->heads;
}

static void put(void *pool, enum dtype t, size_t at, const float *src, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (t == DTYPE_F32)
            ((float *)pool)[at + i] = src[i];
        else
            ((uint16_t *)pool)[at + i] = dtype_f32_bf16(src[i]);
    }
}

static void write_tokens(struct attn_case *t, struct case_seq *s, int32_t end)
{
    const size_t d = (size_t)t->c.head_dim;
    for (; s->written < end; s->written++) {
        for (int32_t h = 0; h < t->c.n_kv_heads; h++) {
            size_t at = kv_tile_offset(&t->kv, s->pages[s->written / KV_PAGE_TOKENS], h) +
                        (size_t)(s->written % KV_PAGE_TOKENS) * d;
            size_t from = (size_t)s->written * kv_row(t) + (size_t)h * d;
            put(t->pools[0][t->layer], t->c.dtype, at, s->k + from, d);
            put(t->pools[1][t->layer], t->c.dtype, at, s->v + from, d);
        }
    }
}

/* What the rows of a batch are laid out in: other rows between the sequences, wide strides. */
struct arena {
    float *q, *out, *lse;
    int64_t q_stride, out_stride;
    int32_t n_rows;
};

static void lay_out(struct attn_case *t, const struct case_chunk *chunks, int32_t n,
                    struct attn_seq *seqs, struct arena *a)
{
    const size_t row = q_row(t);
    a->n_rows = 0;
    for (int32_t i = 0; i < n; i++) {
        struct case_seq *s = &t->seqs[chunks[i].seq];
        a->n_rows += rng_range(&t->rng, 0, 2);
        seqs[i] = (struct attn_seq){.row = a->n_rows,
                                    .n_rows = chunks[i].n,
                                    .pos = chunks[i].pos,
                                    .prompt_end = s->prompt_end,
                                    .pages = s->pages,
                                    .choice = s->choice};
        a->n_rows += chunks[i].n;
        write_tokens(t, s, chunks[i].pos + chunks[i].n);
    }
    a->q_stride = (int64_t)row + rng_range(&t->rng, 0, 5);
    a->out_stride = (int64_t)row + rng_range(&t->rng, 0, 5);
    a->q = mem_alloc((size_t)a->n_rows * (size_t)a->q_stride * sizeof(float));
    a->out = mem_alloc((size_t)a->n_rows * (size_t)a->out_stride * sizeof(float));
    a->lse = mem_alloc((size_t)a->n_rows * (size_t)t->c.n_heads * sizeof(float));
    memset(a->q, 0xff, (size_t)a->n_rows * (size_t)a->q_stride * sizeof(float));
    for (int32_t i = 0; i < n; i++) {
        for (int32_t r = 0; r < chunks[i].n; r++)
            memcpy(a->q + (seqs[i].row + r) * a->q_stride,
                   t->seqs[chunks[i].seq].q + (size_t)(chunks[i].pos + r) * row,
                   row * sizeof(float));
    }
}

static void gather(struct attn_case *t, const struct case_chunk *chunks, int32_t n,
                   const struct attn_seq *seqs, const struct arena *a)
{
    const size_t row = q_row(t), heads = (size_t)t->c.n_heads;
    for (int32_t i = 0; i < n; i++) {
        struct case_seq *s = &t->seqs[chunks[i].seq];
        for (int32_t r = 0; r < chunks[i].n; r++) {
            size_t pos = (size_t)(chunks[i].pos + r);
            memcpy(s->out + pos * row, a->out + (seqs[i].row + r) * a->out_stride,
                   row * sizeof(float));
            memcpy(s->lse + pos * heads, a->lse + (size_t)(seqs[i].row + r) * heads,
                   heads * sizeof(float));
        }
    }
}

static struct attn_problem problem(const struct attn_case *t, const struct attn_seq *seqs,
                                   int32_t n, const struct arena *a)
{
    return (struct attn_problem){.layer = t->layer,
                                 .n_heads = t->c.n_heads,
                                 .scale = t->scale,
                                 .q = a->q,
                                 .out = a->out,
                                 .lse = a->lse,
                                 .q_stride = a->q_stride,
                                 .out_stride = a->out_stride,
                                 .seqs = seqs,
                                 .n_seqs = n,
                                 .workspace = t->workspace};
}

int case_run(struct attn_case *t, const struct case_chunk *chunks, int32_t n)
{
    struct attn_seq seqs[CASE_SEQS];
    struct attn_counts counts[CASE_SEQS] = {0};
    struct arena a;
    assert_true(n <= CASE_SEQS);
    lay_out(t, chunks, n, seqs, &a);
    struct attn_problem p = problem(t, seqs, n, &a);
    p.seq_counts = counts;
    p.head_counts = t->head_counts;
    p.tile_max = t->tile_max;
    p.rel_counts = t->rel_counts;
    int err = attn_cpu_run_with(t->tile, &p, &t->kv, &t->policy, t->dev);
    if (err == 0)
        gather(t, chunks, n, seqs, &a);
    for (int32_t i = 0; i < n; i++) {
        struct attn_counts *c = &t->seqs[chunks[i].seq].counts;
        c->reachable += counts[i].reachable;
        c->visited += counts[i].visited;
        c->kept += counts[i].kept;
        c->sampled += counts[i].sampled;
        c->lost += counts[i].lost;
    }
    mem_free(a.q);
    mem_free(a.out);
    mem_free(a.lse);
    return err;
}

static void whole(const struct attn_case *t, struct case_chunk *chunks)
{
    for (int32_t i = 0; i < t->c.n_seqs; i++)
        chunks[i] = (struct case_chunk){i, 0, t->seqs[i].len};
}

void case_run_whole(struct attn_case *t)
{
    struct case_chunk chunks[CASE_SEQS];
    case_reset(t);
    whole(t, chunks);
    assert_ok(case_run(t, chunks, t->c.n_seqs));
}

/* Largest |a - b| over rows that are finite in want; elsewhere both must be NaN. */
static double distance(const float *got, const double *want, size_t n)
{
    double top = 0;
    for (size_t i = 0; i < n; i++) {
        if (isnan(want[i]) != (isnan(got[i]) != 0))
            fail_msg("element %zu: %g, oracle %g", i, (double)got[i], want[i]);
        double d = fabs((double)got[i] - want[i]);
        top = d > top ? d : top;
    }
    return top;
}

/* Within twice what the naive f32 sums are off by, and atol. */
static void check_close(const struct attn_case *t, const char *what, const float *got,
                        const float *naive, const double *want, size_t n, double atol)
{
    double ours = distance(got, want, n), theirs = distance(naive, want, n);
    if (!(ours <= 2 * theirs + atol))
        fail_msg("%s: %s off by %g, naive f32 by %g, atol %g", t->tile->name, what, ours, theirs,
                 atol);
}

/* The LSE is one f32 of the scores' size, folded into base 2 and back: 4 units in its last place.
 */
static double lse_atol(const double *want, size_t n)
{
    double top = 1;
    for (size_t i = 0; i < n; i++)
        top = fmax(top, fabs(want[i]));
    return 4 * 0x1p-23 * top;
}

static void check_rows(const struct attn_case *t, const struct attn_seq *seqs,
                       const struct oracle *o, double atol)
{
    const size_t row = q_row(t), heads = (size_t)t->c.n_heads;
    for (int32_t i = 0; i < t->c.n_seqs; i++) {
        const struct case_seq *s = &t->seqs[i];
        const size_t n = (size_t)s->len, at = (size_t)seqs[i].row;
        check_close(t, "out", s->out, o->out_f32 + at * row, o->out + at * row, n * row, atol);
        const double *lse = o->lse + at * heads;
        check_close(t, "LSE", s->lse, o->lse_f32 + at * heads, lse, n * heads,
                    lse_atol(lse, n * heads));
    }
}

static void check_counts(const struct attn_counts *got, const struct attn_counts *want)
{
    assert_int_equal(got->reachable, want->reachable);
    assert_int_equal(got->visited, want->visited);
    assert_int_equal(got->kept, want->kept);
}

/* The sampled rows as PROTOCOL.md names them. */
static bool is_sampled(int32_t pos, int32_t prompt_end)
{
    const int32_t stretch = pos / 1024;
    return pos < prompt_end &&
           (pos == prompt_end - 1 || pos % 1024 == 448 + 79 * (stretch % 128) % 128);
}

static void check_lost(const struct attn_case *t, const struct case_seq *s, const double *lost)
{
    const int32_t heads = t->c.n_heads;
    uint64_t sampled = 0;
    double sum = 0;
    for (int32_t pos = 0; pos < s->len && s->choice.lost_mass; pos++) {
        if (!is_sampled(pos, s->prompt_end))
            continue;
        sampled += (uint64_t)heads;
        for (int32_t h = 0; h < heads; h++)
            sum += lost[pos * heads + h];
    }
    assert_int_equal(s->counts.sampled, sampled);
    assert_close((double)s->counts.lost * 0x1p-24, sum, 1e-5 * (double)sampled, 0);
}

static void oracle_open(struct oracle *o, const struct attn_case *t, int32_t n_rows)
{
    size_t n = (size_t)n_rows * q_row(t), n_lse = (size_t)n_rows * (size_t)t->c.n_heads;
    *o = (struct oracle){
        .out = mem_zalloc(n, sizeof(double)),
        .lse = mem_zalloc(n_lse, sizeof(double)),
        .out_f32 = mem_zalloc(n, sizeof(float)),
        .lse_f32 = mem_zalloc(n_lse, sizeof(float)),
        .lost = mem_zalloc(n_lse, sizeof(double)),
        .seq_counts = mem_zalloc((size_t)t->c.n_seqs, sizeof(struct attn_counts)),
        .head_counts = mem_zalloc((size_t)t->c.n_heads, sizeof(struct attn_counts)),
    };
}

static void oracle_close(struct oracle *o)
{
    mem_free(o->out);
    mem_free(o->lse);
    mem_free(o->out_f32);
    mem_free(o->lse_f32);
    mem_free(o->lost);
    mem_free(o->seq_counts);
    mem_free(o->head_counts);
}

static void check_against(const struct attn_case *t, const struct attn_seq *seqs,
                          const struct oracle *o, double atol)
{
    if (!(o->margin > 1e-5)) /* a tie: one rounding may decide either way */
        return;
    check_rows(t, seqs, o, atol);
    for (int32_t i = 0; i < t->c.n_seqs; i++)
        check_counts(&t->seqs[i].counts, &o->seq_counts[i]);
    for (int32_t i = 0; i < t->c.n_seqs; i++)
        check_lost(t, &t->seqs[i], o->lost + (ptrdiff_t)seqs[i].row * t->c.n_heads);
    for (int32_t h = 0; h < t->c.n_heads; h++)
        check_counts(&t->head_counts[h], &o->head_counts[h]);
}

void case_check_oracle(struct attn_case *t, double atol)
{
    const struct attn_tile_ops *tables[ATTN_TILE_TABLES + 1];
    struct attn_seq seqs[CASE_SEQS];
    struct case_chunk chunks[CASE_SEQS];
    struct arena a;
    struct oracle o;

    case_reset(t);
    whole(t, chunks);
    lay_out(t, chunks, t->c.n_seqs, seqs, &a);
    struct attn_problem p = problem(t, seqs, t->c.n_seqs, &a);
    oracle_open(&o, t, a.n_rows);
    oracle_attention(&o, &p, &t->kv, &t->policy);
    attn_tile_list(tables);
    for (int i = 0; tables[i]; i++) {
        t->tile = tables[i];
        case_run_whole(t);
        check_against(t, seqs, &o, atol);
    }
    oracle_close(&o);
    mem_free(a.q);
    mem_free(a.out);
    mem_free(a.lse);
}

static float *copy(const float *x, size_t n)
{
    float *y = mem_alloc(n * sizeof *y);
    memcpy(y, x, n * sizeof *y);
    return y;
}

void case_save(const struct attn_case *t, struct case_bits *bits)
{
    memset(bits, 0, sizeof *bits);
    for (int32_t i = 0; i < t->c.n_seqs; i++) {
        const struct case_seq *s = &t->seqs[i];
        bits->out[i] = copy(s->out, (size_t)s->len * q_row(t));
        bits->lse[i] = copy(s->lse, (size_t)s->len * (size_t)t->c.n_heads);
        bits->counts[i] = s->counts;
    }
}

static void same(const char *what, int32_t seq, const float *a, const float *b, size_t n,
                 size_t row)
{
    for (size_t i = 0; i < n; i++) {
        if (memcmp(&a[i], &b[i], sizeof *a) != 0)
            fail_msg("sequence %d, position %zu, %s %zu: %.9g and %.9g differ", seq, i / row, what,
                     i % row, (double)a[i], (double)b[i]);
    }
}

void case_assert_bits(const struct attn_case *t, const struct case_bits *bits)
{
    for (int32_t i = 0; i < t->c.n_seqs; i++) {
        const struct case_seq *s = &t->seqs[i];
        const size_t heads = (size_t)t->c.n_heads;
        same("column", i, s->out, bits->out[i], (size_t)s->len * q_row(t), q_row(t));
        same("lse of head", i, s->lse, bits->lse[i], (size_t)s->len * heads, heads);
    }
}

void case_drop(struct case_bits *bits)
{
    for (int32_t i = 0; i < CASE_SEQS; i++) {
        mem_free(bits->out[i]);
        mem_free(bits->lse[i]);
    }
}

void case_each_table(struct attn_case *t, void (*check)(struct attn_case *))
{
    const struct attn_tile_ops *tables[ATTN_TILE_TABLES + 1];
    attn_tile_list(tables);
    for (int i = 0; tables[i]; i++) {
        t->tile = tables[i];
        check(t);
    }
}

void case_expect_invalid(const struct attn_case *t, const struct attn_problem *p, const char *field)
{
    struct err_msg why = {{0}};
    assert_int_equal(attn_validate(p, &t->kv, &t->policy, &why), ERR_INVALID);
    if (!strstr(why.text, field))
        fail_msg("'%s' does not name %s", why.text, field);
}
