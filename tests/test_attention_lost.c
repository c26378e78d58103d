/* The lost softmax mass of sampled prompt rows: the oracle's, the same in any chunking, exactly 0
 * where nothing is skipped, and no bit of anything else changed by measuring it. */
#include "attention_case.h"

#include "attention/attn_lost.h"

#include <string.h>

enum { LEN = 1700, PROMPT = 1640, HEADS = 2, BLOCKS = 13 };

static const struct attn_choice choices[] = {
    {.gate = ATTN_GATE_ABS, .gate_rows = 64, .lost_mass = 1},
    {.gate = ATTN_GATE_REL, .gate_rows = 128, .ln_lambda = -0.5f, .lost_mass = 1},
    {.gate = ATTN_GATE_NONE, .gate_rows = 128, .lost_mass = 1},
    {.gate = ATTN_GATE_ABS, .gate_rows = 128}, /* does not ask */
};

/* Thresholds of which some pages of most rows fall short. */
static void open_gated(struct attn_case *t, struct rng *r, enum dtype dtype, int32_t n_seqs)
{
    struct case_config c = {.n_heads = HEADS,
                            .n_kv_heads = 1,
                            .head_dim = 16,
                            .dtype = dtype,
                            .n_seqs = n_seqs,
                            .sharpness = 1.5,
                            .n_threads = 3};
    for (int32_t i = 0; i < n_seqs; i++) {
        c.len[i] = i == 3 ? 300 : LEN;
        c.prompt_end[i] = i == 3 ? 200 : PROMPT;
    }
    case_open(t, &c, r);
    case_thresholds(t, 1, BLOCKS, 3.0, 6.0);
    for (int32_t i = 0; i < n_seqs; i++)
        t->seqs[i].choice = choices[i];
}

static double lost_of(const struct case_seq *s)
{
    return (double)s->counts.lost / (double)s->counts.sampled / ATTN_LOST_ONE;
}

static void matches_the_oracle(void **state)
{
    struct rng r = test_rng("lost mass", 51);
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct attn_case t;
        open_gated(&t, &r, i ? DTYPE_BF16 : DTYPE_F32, 4);
        if (i == 1)
            case_visits(&t);
        case_check_oracle(&t, 2e-6);
        for (int k = 0; k < 2; k++) {
            printf("# %s: lost %.4f\n", k ? "REL" : "ABS", lost_of(&t.seqs[k]));
            assert_true(lost_of(&t.seqs[k]) > 0.01 && lost_of(&t.seqs[k]) < 0.9);
        }
        assert_true((t.seqs[2].counts.lost > 0) == (i == 1)); /* visits alone */
        assert_int_equal(t.seqs[3].counts.sampled, 0);
        case_close(&t);
    }
}

/* All sequences in chunks of so many rows, each in batches of its own. */
static void run_chunks(struct attn_case *t, int32_t rows)
{
    case_reset(t);
    for (int32_t i = 0; i < t->c.n_seqs; i++) {
        for (int32_t pos = 0, n; pos < t->seqs[i].len; pos += n) {
            const int32_t end =
                pos < t->seqs[i].prompt_end ? t->seqs[i].prompt_end : t->seqs[i].len;
            n = end - pos < rows ? end - pos : rows;
            assert_ok(case_run(t, &(struct case_chunk){i, pos, n}, 1));
        }
    }
}

static void chunks_and_bits(void **state)
{
    static const int32_t rows[] = {128, 384, 640, 1024};
    struct rng r = test_rng("lost mass in chunks", 52);
    struct attn_case t;
    struct case_bits want, plain;
    (void)state;
    open_gated(&t, &r, DTYPE_BF16, 4);
    case_run_whole(&t);
    case_save(&t, &want);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        run_chunks(&t, rows[i]);
        case_assert_bits(&t, &want);
        for (int32_t k = 0; k < 4; k++)
            assert_memory_equal(&t.seqs[k].counts, &want.counts[k], sizeof want.counts[k]);
    }
    for (int32_t i = 0; i < 4; i++)
        t.seqs[i].choice.lost_mass = 0;
    case_run_whole(&t);
    case_assert_bits(&t, &want);
    case_save(&t, &plain);
    for (int32_t i = 0; i < 4; i++) {
        assert_int_equal(plain.counts[i].kept, want.counts[i].kept);
        assert_int_equal(plain.counts[i].sampled + plain.counts[i].lost, 0);
    }
    case_drop(&plain);
    case_drop(&want);
    case_close(&t);
}

static void check_open(struct attn_case *t)
{
    case_run_whole(t);
    for (int32_t i = 0; i < t->c.n_seqs; i++) {
        assert_int_equal(t->seqs[i].counts.sampled, 3 * t->c.n_heads);
        assert_int_equal(t->seqs[i].counts.lost, 0);
    }
}

static void open_gates_lose_nothing(void **state)
{
    struct rng r = test_rng("open gates", 53);
    struct attn_case t;
    (void)state;
    open_gated(&t, &r, DTYPE_F32, 3);
    for (int32_t i = 0; i < CASE_LAYERS * HEADS * BLOCKS; i++)
        t.thresholds[i] = -INFINITY;
    t.seqs[1].choice.ln_lambda = -INFINITY;
    case_each_table(&t, check_open);
    t.policy.order = ATTN_ORDER_L2R;
    case_each_table(&t, check_open);
    case_close(&t);
}

static void check_closed(struct attn_case *t)
{
    case_run_whole(t);
    assert_true(lost_of(&t->seqs[0]) > 0.5 && lost_of(&t->seqs[0]) < 1.0);
}

static void closed_gates_lose_all_but_the_block(void **state)
{
    struct rng r = test_rng("closed gates", 54);
    struct attn_case t;
    (void)state;
    open_gated(&t, &r, DTYPE_F32, 1);
    for (int32_t i = 0; i < CASE_LAYERS * HEADS * BLOCKS; i++)
        t.thresholds[i] = INFINITY;
    case_each_table(&t, check_closed);
    case_check_oracle(&t, 2e-6);
    case_close(&t);
}

/* Positions alone: one a stretch, evenly over the places of a block, and the last. */
static void sampled_positions(void **state)
{
    bool place[KV_BLOCK_TOKENS] = {0};
    (void)state;
    for (int32_t pos = 0, n = 0; n < KV_BLOCK_TOKENS; n++) {
        pos = attn_sample_next(pos, INT32_MAX);
        assert_int_equal(pos / ATTN_SAMPLE_TOKENS, n);
        place[pos % KV_BLOCK_TOKENS] = true;
        pos++;
    }
    for (int32_t i = 0; i < KV_BLOCK_TOKENS; i++)
        assert_true(place[i]);
    assert_int_equal(attn_sample_next(0, 100), 99);
    assert_int_equal(attn_sample_next(449, 1000), 999);
    for (int32_t n = 1; n < 5000; n += 37) {
        assert_true(attn_sample_count(0, n, n) >= 1);
        assert_true(attn_sample_count(n % 777, n, n % 777 + n) <= attn_sample_most(n, 1));
        assert_int_equal(attn_sample_count(0, n / 2, n) + attn_sample_count(n / 2, n - n / 2, n),
                         attn_sample_count(0, n, n));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_oracle),
        cmocka_unit_test(chunks_and_bits),
        cmocka_unit_test(open_gates_lose_nothing),
        cmocka_unit_test(closed_gates_lose_all_but_the_block),
        cmocka_unit_test(sampled_positions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
