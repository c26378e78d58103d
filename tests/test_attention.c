/* The CPU attention against the double-precision oracle, over every table of tile functions this
 * processor can run, and the exact statements of attention.h about gates, NaN and bad input. */
#include "attention_case.h"

#include "attention/attn_cpu.h"
#include "core/mem.h"

static const double ATOL = 2e-6;

static struct attn_choice random_choice(struct rng *r, int32_t n_levels, bool gated)
{
    struct attn_choice c = {.gate = (uint8_t)rng_range(r, gated, ATTN_GATE_REL),
                            .gate_rows = rng_range(r, 0, 1) ? 128 : 64,
                            .level = (int16_t)rng_range(r, 0, n_levels - 1),
                            .ln_lambda = (float)(1 - 3 * rng_unit(r))};
    if (c.gate != ATTN_GATE_NONE && rng_range(r, 0, 1)) {
        c.level = (int16_t)rng_range(r, 0, n_levels - 2);
        c.steer = (float)(3 * rng_unit(r));
        c.blend = (float)rng_unit(r);
    }
    return c;
}

/* gated: long prompts of few heads, so that there is something off the diagonal to decide about. */
static struct case_config random_config(struct rng *r, bool gated)
{
    static const int32_t dims[] = {1, 7, 16, 32, 40, 64, 64, 80, 96, 100, 128, 128, 192, 256};
    struct case_config c = {.n_kv_heads = rng_range(r, 1, 3),
                            .head_dim = dims[rng_range(r, 0, gated ? 5 : 13)],
                            .dtype = rng_range(r, 0, 1) ? DTYPE_F32 : DTYPE_BF16,
                            .n_seqs = rng_range(r, 1, 4),
                            .sharpness = rng_range(r, 0, 1) ? 1 : 4,
                            .n_threads = rng_range(r, 1, 4)};
    int32_t budget = 20000 / c.head_dim;
    c.n_heads = c.n_kv_heads * rng_range(r, 1, gated ? 2 : 5);
    for (int32_t i = 0; i < c.n_seqs; i++) {
        c.len[i] = rng_range(r, gated ? 250 : 1, budget < 600 ? budget + 1 : 600);
        c.prompt_end[i] = gated || rng_range(r, 0, 1) ? c.len[i] : rng_range(r, 0, c.len[i] + 50);
    }
    return c;
}

static void random_shapes_match_the_oracle(void **state)
{
    struct rng r = test_rng("random shapes", 20260101);
    uint64_t kept = 0, skipped = 0;
    (void)state;
    for (int i = 0; i < 24; i++) {
        const bool gated = i % 2 == 0;
        struct case_config c = random_config(&r, gated);
        struct attn_case t;
        case_open(&t, &c, &r);
        case_thresholds(&t, 3, rng_range(&r, 1, 5), c.sharpness / 2, 4 * c.sharpness);
        case_densities(&t, 3);
        t.policy.order = rng_range(&r, 0, 1) ? ATTN_ORDER_L2R : ATTN_ORDER_DIAG_SINK_R2L;
        if (rng_range(&r, 0, 1))
            case_visits(&t);
        for (int32_t s = 0; s < c.n_seqs; s++) {
            t.seqs[s].choice = random_choice(&r, 3, gated);
            /* a gated chunk may not end inside the prompt, off a block */
            if (t.seqs[s].choice.gate != ATTN_GATE_NONE && t.seqs[s].prompt_end > t.seqs[s].len)
                t.seqs[s].prompt_end = t.seqs[s].len;
        }
        case_check_oracle(&t, ATOL);
        for (int32_t s = 0; s < c.n_seqs; s++) {
            kept += t.seqs[s].counts.kept;
            skipped += t.seqs[s].counts.visited - t.seqs[s].counts.kept;
        }
        case_close(&t);
    }
    printf("# off-diagonal and diagonal pages kept %llu, skipped %llu\n", (unsigned long long)kept,
           (unsigned long long)skipped);
    assert_true(kept > 100 && skipped > 100); /* the gates had something to decide */
}

static void every_gqa_ratio_and_head_dim(void **state)
{
    static const int32_t groups[] = {1, 2, 3, 4, 5, 7, 8, 16};
    static const int32_t dims[] = {64, 80, 96, 128};
    struct rng r = test_rng("gqa", 7);
    (void)state;
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        struct attn_case t;
        case_open_one(&t, &r, 150, 150, dims[i % 4], groups[i]);
        t.seqs[0].prompt_end = i % 2 ? 150 : 140;
        case_check_oracle(&t, ATOL);
        case_close(&t);
    }
}

static void ragged_lengths(void **state)
{
    static const int32_t lens[] = {1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257};
    struct rng r = test_rng("ragged", 8);
    (void)state;
    for (size_t i = 0; i < sizeof lens / sizeof *lens; i++) {
        struct attn_case t;
        case_open_one(&t, &r, lens[i], lens[i], 64, 2);
        t.seqs[0].choice =
            (struct attn_choice){.gate = ATTN_GATE_REL, .gate_rows = 64, .ln_lambda = -1};
        case_check_oracle(&t, ATOL);
        case_close(&t);
    }
}

static void extreme_scores(void **state)
{
    struct rng r = test_rng("extreme", 9);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, 300, 300, 64, 2);
    for (size_t i = 0; i < 300u * 4 * 64; i++)
        t.seqs[0].q[i] *= 5000.0f; /* scores of about 1e4 */
    /* one rounding of a score of 1e4 is 5e-4: which of two equal errors is larger is chance */
    case_check_oracle(&t, 5e-4);
    case_close(&t);
}

static void check_equal_scores(struct attn_case *t)
{
    case_run_whole(t);
    for (int32_t pos = 0; pos < t->seqs[0].len; pos++)
        assert_close((double)t->seqs[0].lse[pos * t->c.n_heads], log1p(pos), 1e-6, 1e-6);
}

static void equal_scores(void **state)
{
    struct rng r = test_rng("equal", 10);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, 300, 300, 64, 2);
    memset(t.seqs[0].q, 0, 300u * 4 * 64 * sizeof(float));
    case_check_oracle(&t, ATOL);
    case_each_table(&t, check_equal_scores);
    case_close(&t);
}

/* ---- exact statements ---- */

static void fill_thresholds(struct attn_case *t, float value)
{
    case_thresholds(t, 1, 2, 0, 0);
    for (int32_t i = 0; i < CASE_LAYERS * t->c.n_heads * 2; i++)
        t->thresholds[i] = value;
}

static struct attn_choice abs_choice(uint8_t gate_rows)
{
    return (struct attn_choice){.gate = ATTN_GATE_ABS, .gate_rows = gate_rows};
}

static void check_open_gates(struct attn_case *t)
{
    struct case_bits dense;
    t->seqs[0].choice = (struct attn_choice){0};
    case_run_whole(t);
    case_save(t, &dense);
    fill_thresholds(t, -INFINITY);
    for (int i = 0; i < 2; i++) {
        uint8_t rows = i ? 64 : 128;
        t->seqs[0].choice = abs_choice(rows);
        case_run_whole(t);
        case_assert_bits(t, &dense);
        assert_int_equal(t->seqs[0].counts.kept, t->seqs[0].counts.reachable);
        t->seqs[0].choice =
            (struct attn_choice){.gate = ATTN_GATE_REL, .gate_rows = rows, .ln_lambda = -INFINITY};
        case_run_whole(t);
        case_assert_bits(t, &dense);
    }
    case_drop(&dense);
}

static void open_gates_equal_dense_bit_for_bit(void **state)
{
    struct rng r = test_rng("open gates", 11);
    (void)state;
    for (int i = 0; i < 3; i++) {
        struct attn_case t;
        case_open_one(&t, &r, 230 + 60 * i, 230 + 60 * i, i == 1 ? 80 : 64, 1 + i);
        case_each_table(&t, check_open_gates);
        case_close(&t);
    }
}

/* T = +inf looks at the diagonal pages alone: what a sliding window of zero pages sees. */
static void check_closed_gate(struct attn_case *t)
{
    struct case_bits diagonal;
    uint64_t blocks = 0;
    t->seqs[0].choice = (struct attn_choice){0};
    for (int32_t h = 0; h < t->c.n_heads * CASE_LAYERS; h++)
        t->heads[h] = (struct attn_head_policy){ATTN_VISIT_SINK_LOCAL, 0, 0};
    t->policy.heads = t->heads;
    case_run_whole(t);
    case_save(t, &diagonal);
    t->policy.heads = NULL;
    fill_thresholds(t, INFINITY);
    t->seqs[0].choice = abs_choice(128);
    case_run_whole(t);
    case_assert_bits(t, &diagonal);
    for (int32_t pos = 0; pos < t->seqs[0].len; pos += KV_BLOCK_TOKENS)
        blocks += t->seqs[0].len - pos > KV_PAGE_TOKENS ? 2 : 1;
    assert_int_equal(t->seqs[0].counts.kept, blocks * (uint64_t)t->c.n_heads);
    case_drop(&diagonal);
}

static void a_closed_gate_leaves_the_diagonal(void **state)
{
    struct rng r = test_rng("closed gate", 12);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, 430, 430, 64, 2);
    case_visits(&t);
    case_each_table(&t, check_closed_gate);
    case_check_oracle(&t, ATOL); /* the gate is still closed */
    case_close(&t);
}

static void check_tile_max(struct attn_case *t)
{
    struct case_bits dense;
    const int32_t pages = t->seqs[0].n_pages, heads = t->c.n_heads;
    const int32_t rows = t->tile_max->gate_rows;
    const int32_t groups = t->tile_max->n_groups;
    float *max = t->tile_max->max;
    struct attn_tile_max *out = t->tile_max;

    t->tile_max = NULL;
    case_run_whole(t);
    case_save(t, &dense);
    t->tile_max = out;
    for (int32_t i = 0; i < heads * groups * pages; i++)
        max[i] = 12345;
    case_run_whole(t);
    case_assert_bits(t, &dense);
    for (int32_t i = 0; i < heads * groups * pages; i++) {
        int32_t g = i / pages % groups, page = i % pages, h = i / pages / groups;
        int32_t first = g * rows, end = first + rows < 300 ? first + rows : 300;
        double want = -INFINITY;
        if (page * KV_PAGE_TOKENS >= end)
            want = 12345; /* left alone */
        for (int32_t pos = first; pos < end; pos++) {
            for (int32_t k = page * 64; k < page * 64 + 64 && k <= pos; k++) {
                double s = 0;
                for (int32_t j = 0; j < 64; j++)
                    s += (double)t->seqs[0].q[(pos * heads + h) * 64 + j] *
                         (double)t->seqs[0].k[(k * 2 + h / (heads / 2)) * 64 + j];
                want = fmax(want, s * (double)t->scale);
            }
        }
        assert_close((double)max[i], want, 1e-5, 1e-5);
    }
    case_drop(&dense);
}

static void tile_max_holds_page_maxima(void **state)
{
    struct rng r = test_rng("tile max", 13);
    (void)state;
    static const int32_t rows[] = {128, 64, 1};
    for (int i = 0; i < 3; i++) {
        struct attn_case t;
        case_open_one(&t, &r, 300, 300, 64, 2);
        struct attn_tile_max out = {.gate_rows = rows[i], .n_pages = 5};
        out.n_groups = (300 + out.gate_rows - 1) / out.gate_rows;
        out.max = mem_alloc((size_t)(4 * out.n_groups * 5) * sizeof(float));
        t.tile_max = &out;
        case_each_table(&t, check_tile_max);
        mem_free(out.max);
        case_close(&t);
    }
}

/* Softmax mass of a page in double: the mean over the group's rows. */
static double page_mass(const struct attn_case *t, int32_t h, int32_t first, int32_t end,
                        int32_t page)
{
    const int32_t heads = t->c.n_heads;
    double mass = 0;
    for (int32_t pos = first; pos < end; pos++) {
        double in = 0, all = 0;
        for (int32_t k = 0; k <= pos; k++) {
            double s = 0;
            for (int32_t j = 0; j < 64; j++)
                s += (double)t->seqs[0].q[(pos * heads + h) * 64 + j] *
                     (double)t->seqs[0].k[(k * 2 + h / (heads / 2)) * 64 + j];
            s = exp(s * (double)t->scale);
            all += s;
            in += k / KV_PAGE_TOKENS == page ? s : 0;
        }
        mass += in / all / (end - first);
    }
    return mass;
}

static void check_page_mass(struct attn_case *t)
{
    enum { TOKENS = 300 };
    struct case_bits dense;
    struct attn_tile_max *out = t->tile_max;
    const int32_t n = t->c.n_heads * out->n_groups * out->n_pages;
    float *mass = out->mass;
    double largest = 0;
    t->tile_max = NULL;
    case_run_whole(t);
    case_save(t, &dense);
    t->tile_max = out;
    for (int32_t i = 0; i < n; i++)
        mass[i] = 12345;
    case_run_whole(t);
    case_assert_bits(t, &dense); /* the second walk leaves outputs, LSE and counts alone */
    for (int32_t i = 0; i < n; i++) {
        const int32_t g = i / out->n_pages % out->n_groups, page = i % out->n_pages;
        const int32_t first = g * out->gate_rows;
        const int32_t end = first + out->gate_rows < TOKENS ? first + out->gate_rows : TOKENS;
        if (page >= first / KV_BLOCK_TOKENS * 2) {
            assert_true(mass[i] == 12345); /* the diagonal's are left alone */
            continue;
        }
        const double want = page_mass(t, i / out->n_pages / out->n_groups, first, end, page);
        assert_close((double)mass[i], want, 1e-7, 1e-5);
        largest = fmax(largest, want);
    }
    assert_true(largest > 0.2);
    case_drop(&dense);
}

static void mass_is_the_pages_share(void **state)
{
    struct rng r = test_rng("page mass", 16);
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct attn_case t;
        case_open_one(&t, &r, 300, 300, 64, 2);
        struct attn_tile_max out = {.gate_rows = i ? 64 : 128, .n_pages = 5};
        out.n_groups = (300 + out.gate_rows - 1) / out.gate_rows;
        out.max = mem_alloc((size_t)(4 * out.n_groups * 5) * sizeof(float));
        out.mass = mem_alloc((size_t)(4 * out.n_groups * 5) * sizeof(float));
        t.tile_max = &out;
        case_each_table(&t, check_page_mass);
        mem_free(out.max);
        mem_free(out.mass);
        case_close(&t);
    }
}

/* What the gate compares is the number tile_max reports: a threshold equal to it keeps the page,
 * the next float above skips it. */
static void the_gate_compares_what_tile_max_reports(void **state)
{
    struct rng r = test_rng("tile max gate", 14);
    struct attn_case t;
    float max[4 * 2 * 4];
    struct attn_tile_max out = {.max = max, .n_groups = 2, .n_pages = 4, .gate_rows = 128};
    (void)state;
    case_open_one(&t, &r, 256, 256, 64, 2);
    t.tile_max = &out;
    case_run_whole(&t);
    t.tile_max = NULL;
    for (int above = 0; above < 2; above++) {
        fill_thresholds(&t, 0);
        for (int32_t h = 0; h < 4; h++) {
            const float *m = max + (h * 2 + 1) * 4; /* block 1: pages 0 and 1 are gated */
            float top = m[0] > m[1] ? m[0] : m[1];
            t.thresholds[(t.layer * 4 + h) * 2 + 1] = above ? nextafterf(top, INFINITY) : top;
        }
        t.seqs[0].choice = abs_choice(128);
        case_run_whole(&t);
        assert_int_equal(t.seqs[0].counts.kept, 4 * (2 + 2 + (above ? 0 : 1)));
    }
    case_close(&t);
}

static bool row_has_nan(const struct attn_case *t, int32_t pos)
{
    for (int32_t i = 0; i < t->c.n_heads * t->c.head_dim; i++) {
        if (isnan(t->seqs[0].out[pos * t->c.n_heads * t->c.head_dim + i]))
            return true;
    }
    return false;
}

/* A NaN at token 200 of q, k or v: rows before it keep their bits; rows after it are NaN only where
 * they can see it (k and v), and under a gate the page is kept. */
static void check_nan(struct attn_case *t)
{
    enum { AT = 200 };
    struct case_seq *s = &t->seqs[0];
    float *where[3] = {s->q + (size_t)AT * 4 * 64 + 3, s->k + (size_t)AT * 2 * 64 + 3,
                       s->v + (size_t)AT * 2 * 64 + 3};
    struct case_bits clean;
    case_run_whole(t);
    case_save(t, &clean);
    for (int i = 0; i < 3; i++) {
        float was = *where[i];
        *where[i] = NAN;
        case_run_whole(t);
        for (int32_t pos = 0; pos < s->len; pos++) {
            size_t at = (size_t)pos * 4 * 64;
            bool hit = i == 0 ? pos == AT : pos >= AT;
            assert_int_equal(row_has_nan(t, pos), hit);
            if (pos < AT) /* the same block: the diagonal is never gated, so nothing else changes */
                assert_memory_equal(s->out + at, clean.out[0] + at, 4 * 64 * sizeof(float));
        }
        *where[i] = was;
    }
    case_drop(&clean);
}

static void nan_stays_where_it_may_be_seen(void **state)
{
    struct rng r = test_rng("nan", 15);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, 300, 300, 64, 2);
    case_each_table(&t, check_nan);
    t.seqs[0].prompt_end = 130; /* most rows are generated ones */
    case_each_table(&t, check_nan);
    case_close(&t);
}

/* Token 10 has a NaN key and every off-diagonal page is barred: NaN keeps its page for the heads
 * that share the KV head, and only there. */
static void check_nan_keeps(struct attn_case *t)
{
    case_run_whole(t);
    for (int32_t pos = 0; pos < t->seqs[0].len; pos++) {
        for (int32_t h = 0; h < 4; h++)
            assert_int_equal(isnan(t->seqs[0].out[(pos * 4 + h) * 64]) != 0, h < 2 && pos >= 10);
    }
}

static void nan_keeps_a_page(void **state)
{
    struct rng r = test_rng("nan keeps", 16);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, 300, 300, 64, 2);
    t.seqs[0].k[(size_t)10 * 2 * 64 + 5] = NAN;
    fill_thresholds(&t, INFINITY);
    t.seqs[0].choice = abs_choice(128);
    case_each_table(&t, check_nan_keeps);
    t.seqs[0].choice.gate_rows = 64;
    case_each_table(&t, check_nan_keeps);
    t.seqs[0].choice =
        (struct attn_choice){.gate = ATTN_GATE_REL, .gate_rows = 128, .ln_lambda = 0};
    case_each_table(&t, check_nan_keeps);
    case_close(&t);
}

/* ---- bad input ---- */

static void expect_invalid(struct attn_problem p, struct attn_seq s, const struct attn_case *t,
                           const char *field)
{
    if (p.seqs)
        p.seqs = &s;
    case_expect_invalid(t, &p, field);
}

/* One sequence of a case of 2 KV heads, 4 query heads and head_dim 64. */
static struct attn_problem small_problem(const struct attn_case *t, const float *q, float *out,
                                         const struct attn_seq *s)
{
    return (struct attn_problem){.n_heads = 4,
                                 .scale = 1,
                                 .q = q,
                                 .out = out,
                                 .q_stride = 256,
                                 .out_stride = 256,
                                 .seqs = s,
                                 .n_seqs = 1,
                                 .workspace = t->workspace};
}

static void bad_problems_are_named(void **state)
{
    struct rng r = test_rng("bad", 17);
    struct attn_case t;
    int32_t pages[3] = {0, 1, 99};
    float q, out;
    (void)state;
    case_open_one(&t, &r, 150, 150, 64, 2);
    struct attn_seq s = {.n_rows = 128, .prompt_end = 150, .pages = t.seqs[0].pages};
    struct attn_problem p = small_problem(&t, &q, &out, &s);
    assert_ok(attn_validate(&p, &t.kv, &t.policy, NULL));
#define BAD_P(member, value, field)                                                                \
    do {                                                                                           \
        struct attn_problem bad = p;                                                               \
        bad.member = (value);                                                                      \
        expect_invalid(bad, s, &t, field);                                                         \
    } while (0)
#define BAD_S(member, value, field)                                                                \
    do {                                                                                           \
        struct attn_seq bad = s;                                                                   \
        bad.member = (value);                                                                      \
        expect_invalid(p, bad, &t, field);                                                         \
    } while (0)
    {
        float max = 0, mass = 0;
        struct attn_tile_max probe = {.max = &max, .mass = &mass, .gate_rows = 128};
        struct attn_seq gated = s;
        gated.choice =
            (struct attn_choice){.gate = ATTN_GATE_REL, .gate_rows = 128, .ln_lambda = -1};
        struct attn_problem bad = p;
        bad.tile_max = &probe;
        bad.seqs = &gated;
        expect_invalid(bad, gated, &t, "mass of a gated sequence");
    }
    BAD_P(layer, 2, "layer");
    BAD_P(n_heads, 3, "n_heads");
    BAD_P(scale, NAN, "scale");
    BAD_P(out, (void *)p.q, "out");
    BAD_P(q_stride, 255, "q_stride");
    BAD_P(seqs, NULL, "n_seqs");
    BAD_P(workspace, NULL, "workspace");
    BAD_S(n_rows, 0, "n_rows");
    BAD_S(pos, -1, "pos");
    BAD_S(pages, NULL, "page table");
    s.n_rows = 150;
    BAD_S(pages, pages, "pages[2]");
    BAD_S(choice.gate, 7, "gate");
    s.choice = (struct attn_choice){.gate = ATTN_GATE_ABS, .gate_rows = 128};
    BAD_S(choice.level, 0, "level"); /* no thresholds */
    fill_thresholds(&t, 0);
    BAD_S(choice.level, 1, "level");
    BAD_S(choice.gate_rows, 32, "gate_rows");
    BAD_S(n_rows, 100, "aligned");
    s.n_rows = 86;
    BAD_S(pos, 64, "aligned");
    s.n_rows = 150;
    s.choice = (struct attn_choice){.gate = ATTN_GATE_REL, .gate_rows = 128, .ln_lambda = -1};
    BAD_S(choice.ln_lambda, 30.5f, "ln_lambda");
    BAD_S(choice.ln_lambda, NAN, "ln_lambda");
#undef BAD_P
#undef BAD_S
    case_close(&t);
}

static void bad_steering_is_named(void **state)
{
    static const struct {
        uint8_t gate;
        float steer, blend;
        int16_t level;
        const char *field;
    } cases[] = {{ATTN_GATE_REL, -1, 0, 0, "steer"},
                 {ATTN_GATE_ABS, NAN, 0, 0, "steer"},
                 {ATTN_GATE_REL, 100.5f, 0, 0, "steer"},
                 {ATTN_GATE_REL, 1, 0, 1, "level 1 of 2 steps"},
                 {ATTN_GATE_REL, 1, 0, -1, "level -1 of 2 steps"},
                 {ATTN_GATE_REL, 1, 1.5f, 0, "blend"},
                 {ATTN_GATE_REL, 1, NAN, 0, "blend"},
                 {ATTN_GATE_ABS, 1, -0.5f, 0, "blend"},
                 {ATTN_GATE_ABS, 1, INFINITY, 0, "blend"},
                 {ATTN_GATE_ABS, 1, 0, 2, "level 2 of 2 whose pages"},
                 {ATTN_GATE_REL, 1, 0, 0, "level 0 of 0 steps"}}; /* without densities */
    enum { N = sizeof cases / sizeof *cases };
    struct rng r = test_rng("bad steering", 18);
    struct attn_case t;
    float q, out;
    (void)state;
    case_open_one(&t, &r, 150, 150, 64, 2);
    case_densities(&t, 2);
    case_thresholds(&t, 3, 1, 0, 1);
    for (size_t i = 0; i < N; i++) {
        if (i == N - 1)
            t.policy.rel_64.t = t.policy.rel_128.t = NULL;
        const struct attn_choice choice = {.gate = cases[i].gate,
                                           .gate_rows = i % 2 ? 64 : 128,
                                           .ln_lambda = -1,
                                           .steer = cases[i].steer,
                                           .blend = cases[i].blend,
                                           .level = cases[i].level};
        const struct attn_seq s = {
            .n_rows = 150, .prompt_end = 150, .pages = t.seqs[0].pages, .choice = choice};
        const struct attn_problem p = small_problem(&t, &q, &out, &s);
        expect_invalid(p, s, &t, cases[i].field);
    }
    case_close(&t);
}

/* A dense run counts, for every lambda at once, what the gate then does; it changes no bit. */
static void rel_counts_are_the_gates_decisions(void **state)
{
    static const float edges[] = {-20, -6, -3, -1.5f, -0.7f, -0.1f, 0};
    enum { EDGES = sizeof edges / sizeof *edges, TOKENS = 700, HEADS = 4 };
    struct rng r = test_rng("rel counts", 15);
    struct attn_case t;
    struct case_bits dense;
    uint64_t bins[2][HEADS][EDGES + 1] = {{{0}}};
    const struct attn_rel_counts out = {edges, EDGES, &bins[0][0][0]};
    struct attn_counts head_counts[HEADS];
    (void)state;
    case_open_one(&t, &r, TOKENS, TOKENS, 64, 2);
    case_run_whole(&t);
    case_save(&t, &dense);
    t.rel_counts = &out;
    case_run_whole(&t);
    case_assert_bits(&t, &dense);
    t.rel_counts = NULL;
    for (int wide = 0; wide < 2; wide++) {
        for (int e = 0; e < EDGES; e++) {
            t.seqs[0].choice = (struct attn_choice){
                .gate = ATTN_GATE_REL, .gate_rows = wide ? 128 : 64, .ln_lambda = edges[e]};
            case_run_whole(&t);
            memcpy(head_counts, t.head_counts, sizeof head_counts);
            for (int h = 0; h < HEADS; h++) {
                uint64_t skipped = 0;
                for (int i = 0; i <= e; i++)
                    skipped += bins[!wide][h][i];
                assert_int_equal(head_counts[h].visited - head_counts[h].kept, skipped);
            }
        }
    }
    uint64_t inner = 0;
    for (int i = 1; i < EDGES; i++)
        inner += bins[0][0][i] + bins[1][0][i];
    assert_true(inner > 0); /* some are decided by which lambda it is */
    case_drop(&dense);
    case_close(&t);
}

/* ABS too, at the gain that a daemon has: thresholds that are far off, and pages that are met; of
 * short blocks, whose rows of the table are not gated, those too. */
static void steering_reaches_the_pages(void **state)
{
    enum { TOKENS = 4096, HEADS = 2, BLOCKS = TOKENS / 128 };
    struct rng r = test_rng("steering ABS", 24);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, TOKENS, TOKENS, 32, 1);
    case_densities(&t, 1);
    for (int i = 0; i < 4; i++) {
        const int groups = i % 2 ? 1 : 2;
        double want[HEADS] = {0};
        for (int h = 0; h < HEADS; h++) {
            const float pages = 4 + 8 * (float)h;
            t.pages[t.layer * t.policy.abs_pages.layer_stride + h] = 2 * pages;
            for (int b = 0; b < BLOCKS; b++)
                want[h] += groups * fmin(pages, 2 * b) + (groups == 1 ? 2 : 3);
        }
        t.seqs[0].choice = (struct attn_choice){
            .gate = ATTN_GATE_ABS, .gate_rows = groups == 1 ? 128 : 64, .steer = 1, .blend = 0.5f};
        case_thresholds(&t, 1, BLOCKS, 0, 0);
        for (int b = 0; b < CASE_LAYERS * HEADS * BLOCKS; b++) {
            const int pages = 8 + 16 * (b / BLOCKS % HEADS);
            t.thresholds[b] = 2 * (b % BLOCKS) <= pages ? -INFINITY : i < 2 ? 1 : 4;
        }
        case_run_whole(&t);
        for (int h = 0; h < HEADS; h++) {
            const double blocks = BLOCKS * groups;
            printf("# head %d kept %.2f pages more a group\n", h,
                   ((double)t.head_counts[h].kept - want[h]) / blocks);
            assert_close((double)t.head_counts[h].kept, want[h], 0.5 * blocks, 0);
        }
    }
    case_close(&t);
}

/* Wherever it begins, a steered gate ends near the density of its head: within what it takes to
 * come there from a wrong lambda, and that of an average. By groups of either size, in any chunks.
 */
static void steering_reaches_the_density(void **state)
{
    static const float starts[] = {-4, 3};
    enum { TOKENS = 4096, HEADS = 2, N_STARTS = sizeof starts / sizeof *starts };
    struct rng r = test_rng("steering", 23);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, TOKENS, TOKENS, 32, 1);
    case_densities(&t, 2);
    for (int i = 0; i < 2 * N_STARTS; i++) {
        const bool wide = i % 2;
        const struct attn_thresholds *d = wide ? &t.policy.rel_128 : &t.policy.rel_64;
        float *to = t.densities[!wide] + t.layer * d->layer_stride;
        for (int h = 0; h < HEADS; h++) {
            to[h] = 0.1f + 0.2f * (float)h;
            to[h + d->level_stride] = to[h] - 0.08f;
        }
        t.seqs[0].choice = (struct attn_choice){.gate = ATTN_GATE_REL,
                                                .gate_rows = wide ? 128 : 64,
                                                .ln_lambda = starts[i / 2],
                                                .steer = 2,
                                                .blend = 0.5f};
        struct case_bits whole;
        case_run_whole(&t);
        case_save(&t, &whole);
        for (int h = 0; h < HEADS; h++) {
            const struct attn_counts *c = &t.head_counts[h];
            const double got = (double)c->kept / (double)c->reachable;
            printf("# %d rows from %.1f: head %d kept %.3f\n", wide ? 128 : 64,
                   (double)starts[i / 2], h, got);
            assert_close(got, 0.06 + 0.2 * h, i < 2 ? 0.11 : 0.04, 0);
        }
        case_reset(&t);
        for (int pos = 0; pos < TOKENS; pos += 512)
            assert_int_equal(case_run(&t, &(struct case_chunk){0, pos, 512}, 1), 0);
        case_assert_bits(&t, &whole);
        case_drop(&whole);
    }
    case_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_shapes_match_the_oracle),
        cmocka_unit_test(every_gqa_ratio_and_head_dim),
        cmocka_unit_test(ragged_lengths),
        cmocka_unit_test(extreme_scores),
        cmocka_unit_test(equal_scores),
        cmocka_unit_test(open_gates_equal_dense_bit_for_bit),
        cmocka_unit_test(a_closed_gate_leaves_the_diagonal),
        cmocka_unit_test(tile_max_holds_page_maxima),
        cmocka_unit_test(mass_is_the_pages_share),
        cmocka_unit_test(the_gate_compares_what_tile_max_reports),
        cmocka_unit_test(rel_counts_are_the_gates_decisions),
        cmocka_unit_test(steering_reaches_the_density),
        cmocka_unit_test(steering_reaches_the_pages),
        cmocka_unit_test(nan_stays_where_it_may_be_seen),
        cmocka_unit_test(nan_keeps_a_page),
        cmocka_unit_test(bad_problems_are_named),
        cmocka_unit_test(bad_steering_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
