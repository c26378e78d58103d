/* The gate of generated rows on the CPU: against the double-precision oracle, and the exact
 * statements of policy.h and attention.h about it. That no schedule changes its bits is in
 * test_attention_rows.c. */
#include "attention_case.h"

#include "core/mem.h"

static const double ATOL = 2e-6;

static const struct attn_choice decode_gated = {.decode_gate = ATTN_GATE_ABS};

/* Prompts that end anywhere and many generated rows; dense, gated and both in one batch. */
static void random_shapes_match_the_oracle(void **state)
{
    static const int32_t dims[] = {7, 16, 32, 64};
    struct rng r = test_rng("decode shapes", 20261126);
    uint64_t skipped = 0, kept = 0;
    (void)state;
    for (int i = 0; i < 16; i++) {
        struct case_config c = {.n_kv_heads = rng_range(&r, 1, 2),
                                .head_dim = dims[rng_range(&r, 0, 3)],
                                .dtype = rng_range(&r, 0, 1) ? DTYPE_F32 : DTYPE_BF16,
                                .n_seqs = rng_range(&r, 1, 3),
                                .sharpness = rng_range(&r, 0, 1) ? 1 : 4,
                                .n_threads = rng_range(&r, 1, 3)};
        struct attn_case t;
        c.n_heads = c.n_kv_heads * rng_range(&r, 1, 5);
        for (int32_t s = 0; s < c.n_seqs; s++) {
            c.len[s] = rng_range(&r, 200, 600);
            c.prompt_end[s] = rng_range(&r, 0, c.len[s]);
        }
        case_open(&t, &c, &r);
        case_thresholds(&t, 2, 3, c.sharpness / 2, 4 * c.sharpness);
        case_decode_thresholds(&t, 3, rng_range(&r, 1, 5), c.sharpness / 4, 3 * c.sharpness);
        t.policy.order = rng_range(&r, 0, 1) ? ATTN_ORDER_L2R : ATTN_ORDER_DIAG_SINK_R2L;
        if (rng_range(&r, 0, 2) == 0)
            case_visits(&t);
        for (int32_t s = 0; s < c.n_seqs; s++)
            t.seqs[s].choice = (struct attn_choice){
                .gate = (uint8_t)rng_range(&r, 0, ATTN_GATE_ABS),
                .gate_rows = 128,
                .decode_gate = (int16_t)(s > 0 ? ATTN_GATE_NONE : ATTN_GATE_ABS),
                .decode_level = (int16_t)rng_range(&r, 0, 2)};
        case_check_oracle(&t, ATOL);
        skipped += t.seqs[0].counts.visited - t.seqs[0].counts.kept;
        kept += t.seqs[0].counts.kept;
        case_close(&t);
    }
    printf("# pages kept %llu, skipped %llu\n", (unsigned long long)kept,
           (unsigned long long)skipped);
    assert_true(skipped > 100 && kept > 100);
}

enum { N_BLOCKS = 3 };

static void fill(struct attn_case *t, float value)
{
    case_decode_thresholds(t, 1, N_BLOCKS, 0, 0);
    for (int32_t i = 0; i < CASE_LAYERS * t->c.n_heads * N_BLOCKS; i++)
        t->decode[i] = value;
}

static void check_open(struct attn_case *t)
{
    struct case_bits dense;
    t->seqs[0].choice = (struct attn_choice){0};
    case_run_whole(t);
    case_save(t, &dense);
    t->seqs[0].choice = decode_gated;
    case_run_whole(t);
    case_assert_bits(t, &dense);
    assert_memory_equal(&t->seqs[0].counts, &dense.counts[0], sizeof dense.counts[0]);
    assert_int_equal(t->seqs[0].counts.kept, t->seqs[0].counts.reachable);
    case_drop(&dense);
}

static void an_open_gate_equals_dense_bit_for_bit(void **state)
{
    struct rng r = test_rng("decode open", 41);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, 400, 130, 64, 2);
    fill(&t, -INFINITY);
    case_each_table(&t, check_open);
    case_close(&t);
}

/* Of a generated row the page of its own token is left, and of the prompt everything; what no row
 * keeps is not read: the values of page 0 are NaN. */
static void check_closed(struct attn_case *t)
{
    struct case_seq *s = &t->seqs[0];
    const size_t row = (size_t)t->c.n_heads * (size_t)t->c.head_dim;
    s->choice = decode_gated;
    case_run_whole(t);
    for (int32_t pos = s->prompt_end; pos < s->len; pos++) {
        for (size_t i = 0; i < row; i++)
            assert_false(isnan(s->out[(size_t)pos * row + i]));
        if (pos % KV_PAGE_TOKENS == 0) { /* its own key alone: softmax is 1 */
            for (size_t i = 0; i < row; i++) {
                const size_t h = i / 64, kv = h / 2;
                assert_float_equal(s->out[(size_t)pos * row + i],
                                   s->v[((size_t)pos * 2 + kv) * 64 + i % 64], 0);
            }
        }
    }
}

static void a_closed_gate_leaves_the_rows_own_page(void **state)
{
    struct rng r = test_rng("decode closed", 42);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, 400, 64, 64, 2);
    fill(&t, INFINITY);
    for (size_t i = 0; i < (size_t)KV_PAGE_TOKENS * 2 * 64; i++)
        t.seqs[0].v[i] = NAN;
    case_each_table(&t, check_closed);
    /* 64 prompt rows see 1 page together, each of 336 generated rows its own; 4 heads */
    assert_int_equal(t.seqs[0].counts.kept, 4 * (1 + 336));
    case_close(&t);
}

/* The gate compares the maximum of the row itself, with the threshold of its block and head: at the
 * maximum the page stays, a step above it goes. */
static void the_rows_own_maximum_decides(void **state)
{
    enum { PAGES = 5, GROUPS = 5 };
    struct rng r = test_rng("decode edge", 43);
    struct attn_case t;
    float max[4 * GROUPS * PAGES];
    struct attn_tile_max out = {.max = max, .n_groups = GROUPS, .n_pages = PAGES, .gate_rows = 64};
    (void)state;
    case_open_one(&t, &r, 257, 257, 64, 2);
    t.tile_max = &out;
    case_run_whole(&t); /* group 4 is row 256 alone */
    t.tile_max = NULL;
    t.seqs[0].prompt_end = 256;
    for (int32_t page = 0; page < 4; page++) {
        uint64_t kept[2];
        for (int above = 0; above < 2; above++) {
            fill(&t, 0);
            for (int32_t h = 0; h < 4; h++) {
                const float m = max[(h * GROUPS + 4) * PAGES + page];
                t.decode[(t.layer * 4 + h) * N_BLOCKS + 2] = above ? nextafterf(m, INFINITY) : m;
            }
            t.seqs[0].choice = decode_gated;
            case_run_whole(&t);
            kept[above] = t.seqs[0].counts.kept;
        }
        assert_int_equal(kept[0] - kept[1], 4);
    }
    case_close(&t);
}

/* Token 10 has a NaN key: its page is kept, by the heads that share it and only there. */
static void check_nan(struct attn_case *t)
{
    case_run_whole(t);
    for (int32_t pos = 20; pos < t->seqs[0].len; pos++) {
        for (int32_t h = 0; h < 4; h++)
            assert_int_equal(isnan(t->seqs[0].out[(pos * 4 + h) * 64]) != 0, h < 2);
    }
}

static void nan_keeps_a_page(void **state)
{
    struct rng r = test_rng("decode nan", 44);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, 300, 20, 64, 2);
    t.seqs[0].k[(size_t)10 * 2 * 64 + 5] = NAN;
    fill(&t, INFINITY);
    t.seqs[0].choice = decode_gated;
    case_each_table(&t, check_nan);
    case_close(&t);
}

/* A NaN query of one head keeps every page for that head, where heads share a panel. */
static void a_nan_query_keeps_pages_of_its_head(void **state)
{
    struct rng r = test_rng("decode nan q", 45);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, 260, 259, 64, 2);
    t.seqs[0].q[((size_t)259 * 4 + 1) * 64] = NAN;
    fill(&t, INFINITY);
    t.seqs[0].choice = decode_gated;
    case_run_whole(&t);
    assert_int_equal(t.head_counts[1].kept - t.head_counts[0].kept, 4);
    assert_int_equal(t.head_counts[2].kept, t.head_counts[0].kept);
    case_close(&t);
}

static void expect_invalid(struct attn_case *t, struct attn_choice c, const char *field)
{
    struct attn_seq s = {.n_rows = 1, .pages = t->seqs[0].pages, .choice = c};
    float q, out;
    struct attn_problem p = {.n_heads = 4,
                             .scale = 1,
                             .q = &q,
                             .out = &out,
                             .q_stride = 256,
                             .out_stride = 256,
                             .seqs = &s,
                             .n_seqs = 1,
                             .workspace = t->workspace};
    case_expect_invalid(t, &p, field);
}

static void bad_choices_are_named(void **state)
{
    struct rng r = test_rng("decode bad", 46);
    struct attn_case t;
    (void)state;
    case_open_one(&t, &r, 100, 50, 64, 2);
    expect_invalid(&t, decode_gated, "decode_level"); /* no thresholds */
    fill(&t, 0);
    expect_invalid(&t, (struct attn_choice){.decode_gate = ATTN_GATE_REL}, "decode_gate");
    expect_invalid(&t, (struct attn_choice){.decode_gate = -1}, "decode_gate");
    expect_invalid(&t, (struct attn_choice){.decode_gate = ATTN_GATE_ABS, .decode_level = 1},
                   "decode_level");
    expect_invalid(&t, (struct attn_choice){.decode_gate = ATTN_GATE_ABS, .decode_level = -1},
                   "decode_level");
    t.policy.decode.n_heads = 3;
    expect_invalid(&t, decode_gated, "decode thresholds");
    case_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_shapes_match_the_oracle),
        cmocka_unit_test(an_open_gate_equals_dense_bit_for_bit),
        cmocka_unit_test(a_closed_gate_leaves_the_rows_own_page),
        cmocka_unit_test(the_rows_own_maximum_decides),
        cmocka_unit_test(nan_keeps_a_page),
        cmocka_unit_test(a_nan_query_keeps_pages_of_its_head),
        cmocka_unit_test(bad_choices_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
