/* Row independence: the same bits for a row however its sequence is cut into chunks, whatever else
 * is in the batch, on any number of threads, as a prompt row or a generated one; and gates that no
 * chunking changes. */
#include "attention_case.h"

#include "core/mem.h"

static void open_batch(struct attn_case *t, struct rng *r, int32_t n_seqs, int32_t max_len)
{
    static const int32_t dims[] = {64, 128, 80, 32};
    struct case_config c = {.n_kv_heads = rng_range(r, 1, 2),
                            .head_dim = dims[rng_range(r, 0, 3)],
                            .dtype = rng_range(r, 0, 1) ? DTYPE_F32 : DTYPE_BF16,
                            .n_seqs = n_seqs,
                            .sharpness = 2,
                            .n_threads = rng_range(r, 1, 4)};
    c.n_heads = c.n_kv_heads * rng_range(r, 1, 6);
    for (int32_t i = 0; i < n_seqs; i++) {
        c.len[i] = rng_range(r, 1, max_len);
        c.prompt_end[i] = rng_range(r, 0, c.len[i]);
    }
    case_open(t, &c, r);
    t->policy.order = rng_range(r, 0, 1) ? ATTN_ORDER_L2R : ATTN_ORDER_DIAG_SINK_R2L;
    if (rng_range(r, 0, 2) == 0)
        case_visits(t);
}

/* A gated prompt's chunks end on blocks or at its end; other rows are cut anywhere. */
static int32_t random_rows(struct rng *r, const struct case_seq *s, int32_t pos)
{
    int32_t left = s->len - pos, n = rng_range(r, 1, left < 300 ? left : 300);
    if (rng_range(r, 0, 3) == 0)
        n = 1;
    if (s->choice.gate == ATTN_GATE_NONE || pos >= s->prompt_end || pos + n >= s->prompt_end)
        return n;
    n = (n + KV_BLOCK_TOKENS - 1) / KV_BLOCK_TOKENS * KV_BLOCK_TOKENS;
    return pos + n > s->prompt_end ? s->prompt_end - pos : n;
}

/* Runs all sequences to their ends in random batches. */
static void run_random_schedule(struct attn_case *t, struct rng *r)
{
    int32_t pos[CASE_SEQS] = {0};
    case_reset(t);
    for (bool more = true; more;) {
        struct case_chunk chunks[CASE_SEQS];
        int32_t n = 0;
        more = false;
        for (int32_t i = 0; i < t->c.n_seqs; i++) {
            const struct case_seq *s = &t->seqs[i];
            if (pos[i] == s->len)
                continue;
            more = true;
            if (rng_range(r, 0, 2) == 0)
                continue;
            chunks[n] = (struct case_chunk){i, pos[i], random_rows(r, s, pos[i])};
            pos[i] += chunks[n].n;
            n++;
        }
        assert_ok(case_run(t, chunks, n));
    }
}

/* Every token as a generated row, one call a token and sequence. */
static void run_as_decode(struct attn_case *t)
{
    case_reset(t);
    for (int32_t i = 0; i < t->c.n_seqs; i++) {
        t->seqs[i].prompt_end = 0;
        for (int32_t pos = 0; pos < t->seqs[i].len; pos++)
            assert_ok(case_run(t, &(struct case_chunk){i, pos, 1}, 1));
        t->seqs[i].prompt_end = t->c.prompt_end[i];
    }
}

static void check_dense(struct attn_case *t, struct rng *r)
{
    struct case_bits want;
    case_run_whole(t);
    case_save(t, &want);
    for (int i = 0; i < 3; i++) {
        run_random_schedule(t, r);
        case_assert_bits(t, &want);
    }
    run_as_decode(t);
    case_assert_bits(t, &want);
    case_drop(&want);
}

static void dense_rows_are_independent(void **state)
{
    struct rng r = test_rng("dense rows", 31);
    (void)state;
    for (int i = 0; i < 5; i++) {
        const struct attn_tile_ops *tables[ATTN_TILE_TABLES + 1];
        struct attn_case t;
        open_batch(&t, &r, rng_range(&r, 1, 4), 300);
        attn_tile_list(tables);
        for (int k = 0; tables[k]; k++) {
            t.tile = tables[k];
            check_dense(&t, &r);
        }
        case_close(&t);
    }
}

static void same_counts(const struct attn_case *t, const struct case_bits *want)
{
    for (int32_t i = 0; i < t->c.n_seqs; i++)
        assert_memory_equal(&t->seqs[i].counts, &want->counts[i], sizeof(struct attn_counts));
}

static void random_gates(struct attn_case *t, struct rng *r)
{
    case_thresholds(t, 2, rng_range(r, 1, 4), 2, 9);
    case_decode_thresholds(t, 2, rng_range(r, 1, 4), 1, 7);
    for (int32_t i = 0; i < t->c.n_seqs; i++)
        t->seqs[i].choice =
            (struct attn_choice){.gate = (uint8_t)rng_range(r, ATTN_GATE_ABS, ATTN_GATE_REL),
                                 .gate_rows = rng_range(r, 0, 1) ? 128 : 64,
                                 .level = (int16_t)rng_range(r, 0, 1),
                                 .ln_lambda = (float)(-4 * rng_unit(r)),
                                 .decode_gate = (int16_t)rng_range(r, 0, ATTN_GATE_ABS),
                                 .decode_level = (int16_t)rng_range(r, 0, 1)};
}

static void gated_rows_do_not_depend_on_the_schedule(void **state)
{
    struct rng r = test_rng("gated rows", 32);
    (void)state;
    for (int i = 0; i < 6; i++) {
        struct attn_case t;
        struct case_bits want;
        open_batch(&t, &r, rng_range(&r, 1, 4), 900);
        random_gates(&t, &r);
        case_run_whole(&t);
        case_save(&t, &want);
        for (int k = 0; k < 3; k++) {
            run_random_schedule(&t, &r);
            case_assert_bits(&t, &want);
            same_counts(&t, &want);
        }
        case_drop(&want);
        case_close(&t);
    }
}

/* Chunks of a fixed size, sequence after sequence. */
static void run_chunks(struct attn_case *t, int32_t size)
{
    case_reset(t);
    for (int32_t i = 0; i < t->c.n_seqs; i++) {
        for (int32_t pos = 0; pos < t->seqs[i].len; pos += size) {
            int32_t left = t->seqs[i].len - pos;
            assert_ok(case_run(t, &(struct case_chunk){i, pos, left < size ? left : size}, 1));
        }
    }
}

static void chunk_sizes_give_the_same_gates(void **state)
{
    struct rng r = test_rng("chunk sizes", 33);
    uint64_t skipped = 0;
    (void)state;
    for (int gate = ATTN_GATE_ABS; gate <= ATTN_GATE_REL; gate++) {
        struct case_config c = {.n_heads = 4,
                                .n_kv_heads = 2,
                                .head_dim = 64,
                                .n_seqs = 2,
                                .len = {1500, 1024},
                                .prompt_end = {1500, 1024},
                                .sharpness = 2};
        struct attn_case t;
        struct case_bits want;
        case_open(&t, &c, &r);
        random_gates(&t, &r);
        t.seqs[0].choice.gate = t.seqs[1].choice.gate = (uint8_t)gate;
        t.seqs[0].choice.gate_rows = 64;
        t.seqs[1].choice.gate_rows = 128;
        case_run_whole(&t);
        case_save(&t, &want);
        skipped += t.seqs[1].counts.visited - t.seqs[1].counts.kept;
        for (int32_t size = 128; size <= 512; size *= 2) {
            run_chunks(&t, size);
            case_assert_bits(&t, &want);
            same_counts(&t, &want);
        }
        case_drop(&want);
        case_close(&t);
    }
    assert_true(skipped > 0);
}

/* More tasks than one round of the planner holds. */
static void a_batch_of_many_tasks(void **state)
{
    struct rng r = test_rng("many tasks", 34);
    struct case_config c = {.n_heads = 96,
                            .n_kv_heads = 96,
                            .head_dim = 1,
                            .n_seqs = 8,
                            .len = {1500, 1400, 1300, 1500, 1500, 1500, 1500, 1500},
                            .sharpness = 1};
    struct attn_case t;
    struct case_bits want;
    (void)state;
    memcpy(c.prompt_end, c.len, sizeof c.len);
    case_open(&t, &c, &r);
    case_run_whole(&t);
    case_save(&t, &want);
    run_chunks(&t, 640);
    case_assert_bits(&t, &want);
    case_drop(&want);
    case_close(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dense_rows_are_independent),
        cmocka_unit_test(gated_rows_do_not_depend_on_the_schedule),
        cmocka_unit_test(chunk_sizes_give_the_same_gates),
        cmocka_unit_test(a_batch_of_many_tasks),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
