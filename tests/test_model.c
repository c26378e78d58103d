/* A model's steps: bad batches are refused and harm nothing, numbers that are not numbers stay with
 * their sequence, the plan as a message, the calibrator's view. */
#include "attention/attention.h"
#include "core/mem.h"
#include "model/safetensors.h"
#include "model/step_plan.h"
#include "tests/model_case.h"
#include "tests/test.h"

#include <limits.h>
#include <unistd.h>

enum { N_PAGES = 16, MAX_TOKENS = 256, MAX_POSITION = 512 };

#define GQA_DIR    TEST_DATA "/llama/gqa_head_dim"
#define BIASES_DIR TEST_DATA "/llama/biases"

static void open_case(struct model_case *c, const char *dir)
{
    model_case_open(c, dir, 2, MAX_TOKENS, MAX_POSITION, N_PAGES, DTYPE_F32);
}

/* A legal sequence and what is changed in it. */
struct wrong {
    const char *what;
    void (*change)(struct batch_seq *s);
};

static int32_t bad_tokens[8] = {1, 2, 3, 64, 4, -1, 5, 6};
static int32_t bad_pages[2] = {3, N_PAGES};

static void token_high(struct batch_seq *s)
{
    s->tokens = bad_tokens;
    s->start = 0;
    s->n_tokens = 4;
}

static void token_negative(struct batch_seq *s)
{
    s->tokens = bad_tokens;
    s->start = 4;
    s->n_tokens = 2;
}

static void start_negative(struct batch_seq *s)
{
    s->start = -1;
}

static void no_tokens(struct batch_seq *s)
{
    s->n_tokens = 0;
}

static void too_long(struct batch_seq *s)
{
    s->start = MAX_POSITION;
}

static void too_many(struct batch_seq *s)
{
    s->n_tokens = MAX_TOKENS + 1;
}

static void few_pages(struct batch_seq *s)
{
    s->n_pages = 1;
}

static void page_range(struct batch_seq *s)
{
    s->pages = bad_pages;
    s->n_pages = 2;
    s->n_tokens = 100;
}

static void gate_unknown(struct batch_seq *s)
{
    s->policy.gate = 3;
}

static void no_thresholds(struct batch_seq *s)
{
    s->policy.gate = BATCH_ABS;
}

static void lambda_large(struct batch_seq *s)
{
    s->policy.gate = BATCH_REL;
    s->policy.ln_lambda = 30.5f;
}

static void lambda_nan(struct batch_seq *s)
{
    s->policy.gate = BATCH_REL;
    s->policy.ln_lambda = NAN;
}

static void steer_negative(struct batch_seq *s)
{
    s->policy.gate = BATCH_REL;
    s->policy.steer = -1;
}

static void steer_nan(struct batch_seq *s)
{
    s->policy.gate = BATCH_REL;
    s->policy.steer = NAN;
}

static void pages_unknown(struct batch_seq *s)
{
    s->policy.gate = BATCH_ABS;
    s->policy.steer = 1;
}

static void steer_unknown(struct batch_seq *s)
{
    s->policy.gate = BATCH_REL;
    s->policy.steer = 1;
}

static void unaligned_start(struct batch_seq *s)
{
    s->policy.gate = BATCH_REL;
    s->start = 64;
    s->n_tokens = 64;
}

static void unaligned_end(struct batch_seq *s)
{
    s->policy.gate = BATCH_REL;
    s->n_tokens = 100;
}

static void rows_unknown(struct batch_seq *s)
{
    s->policy.gate = BATCH_REL;
    s->policy.gate_rows = 32;
}

static void decode_gate_unknown(struct batch_seq *s)
{
    s->policy.decode_gate = BATCH_REL;
}

static void no_decode_thresholds(struct batch_seq *s)
{
    s->policy.decode_gate = BATCH_ABS;
}

static void no_sampling(struct batch_seq *s)
{
    s->sampling = NULL;
}

static void test_bad_batches(void **state)
{
    static const struct wrong cases[] = {
        {"token id", token_high},
        {"token id", token_negative},
        {"start", start_negative},
        {"n_tokens", no_tokens},
        {"max_position", too_long},
        {"tokens", too_many},
        {"pages", few_pages},
        {"page id", page_range},
        {"gate", gate_unknown},
        {"thresholds", no_thresholds},
        {"ln_lambda", lambda_large},
        {"ln_lambda", lambda_nan},
        {"steer", steer_negative},
        {"steer", steer_nan},
        {"no steps to steer", steer_unknown},
        {"no thresholds", pages_unknown},
        {"inside a block", unaligned_start},
        {"inside a block", unaligned_end},
        {"gate_rows", rows_unknown},
        {"decode_gate", decode_gate_unknown},
        {"decode thresholds", no_decode_thresholds},
        {"sampling", no_sampling},
    };
    static const int32_t pages[8] = {7, 6, 5, 4, 3, 2, 1, 0};
    const struct plan_limits limits = {.max_seqs = 4,
                                       .max_tokens = MAX_TOKENS,
                                       .max_position = MAX_POSITION,
                                       .vocab_size = 64,
                                       .n_pages = N_PAGES};
    int32_t tokens[MAX_POSITION] = {0};
    struct step_plan plan;
    (void)state;

    step_plan_init(&plan, &limits);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct batch_seq s = case_seq(tokens, 0, 128, 300, pages, 8);
        const struct batch b = {.n_seqs = 1, .seqs = &s, .n_tokens = 128};
        struct err_msg why = {{0}};
        assert_ok(step_plan_from_batch(&plan, &b, &why));
        cases[i].change(&s);
        struct batch changed = b;
        changed.n_tokens = s.n_tokens;
        if (step_plan_from_batch(&plan, &changed, &why) != ERR_INVALID ||
            !strstr(why.text, cases[i].what))
            fail_msg("%s: '%s'", cases[i].what, why.text);
    }
    step_plan_deinit(&plan);
}

/* A refused step leaves the next one untouched. */
static void test_refused_step(void **state)
{
    static const int32_t pages[1] = {0};
    int32_t tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    struct model_case c;
    float before[64];
    (void)state;

    open_case(&c, GQA_DIR);
    struct batch_seq s = case_seq(tokens, 0, 8, 8, pages, 1), wrong = s;
    assert_ok(case_step(&c, &s, 1));
    memcpy(before, model_last_logits(c.model, 0), sizeof before);
    wrong.start = -1;
    assert_int_equal(case_step(&c, &wrong, 1), ERR_INVALID);
    assert_int_equal(case_step(&c, &s, 0), ERR_INVALID);
    const struct batch lying = {.n_seqs = 1, .seqs = &s, .n_tokens = 9};
    assert_int_equal(model_step(c.model, &lying, &c.result), ERR_INVALID);
    assert_ok(case_step(&c, &s, 1));
    assert_memory_equal(before, model_last_logits(c.model, 0), sizeof before);
    s.sample = false;
    assert_ok(case_step(&c, &s, 1));
    assert_null(model_last_logits(c.model, 0));
    assert_int_equal(c.tokens[0].token, -1);
    assert_true(c.result.total_us >= c.result.gemm_us + c.result.attention_us);
    model_case_close(&c);
}

static void copy_file(const char *from, const char *to, const char *name, unsigned char **bytes,
                      size_t *len)
{
    char path[PATH_MAX];
    (void)snprintf(path, sizeof path, "%s/%s", from, name);
    FILE *f = fopen(path, "rbe");
    assert_non_null(f);
    assert_int_equal(fseek(f, 0, SEEK_END), 0);
    *len = (size_t)ftell(f);
    rewind(f);
    *bytes = mem_alloc(*len);
    assert_int_equal(fread(*bytes, 1, *len, f), *len);
    assert_int_equal(fclose(f), 0);
    (void)snprintf(path, sizeof path, "%s/%s", to, name);
    f = fopen(path, "wbe");
    assert_non_null(f);
    assert_int_equal(fwrite(*bytes, 1, *len, f), *len);
    assert_int_equal(fclose(f), 0);
}

/* A copy of the biases model in which the embedding of token 7 is not a number. */
static void make_poisoned(char *dir)
{
    unsigned char *bytes;
    char path[PATH_MAX];
    size_t len;
    struct safetensors *st;
    const float nan = NAN;

    assert_non_null(mkdtemp(dir));
    copy_file(BIASES_DIR, dir, "config.json", &bytes, &len);
    mem_free(bytes);
    copy_file(BIASES_DIR, dir, "model.safetensors", &bytes, &len);
    assert_ok(safetensors_parse(&st, bytes, len, "copy", NULL));
    const struct st_tensor *t = safetensors_find(st, "model.embed_tokens.weight");
    const size_t at = (size_t)((const unsigned char *)t->data - bytes);
    memcpy(bytes + at + 7 * (size_t)t->shape[1] * sizeof nan, &nan, sizeof nan);
    safetensors_close(st);
    (void)snprintf(path, sizeof path, "%s/model.safetensors", dir);
    FILE *f = fopen(path, "wbe");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, len, f), len);
    assert_int_equal(fclose(f), 0);
    mem_free(bytes);
}

static void drop_poisoned(const char *dir)
{
    char path[PATH_MAX];
    (void)snprintf(path, sizeof path, "%s/model.safetensors", dir);
    assert_int_equal(unlink(path), 0);
    (void)snprintf(path, sizeof path, "%s/config.json", dir);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(dir), 0);
}

static void test_numeric(void **state)
{
    static const int32_t pages[2][2] = {{0, 1}, {2, 3}};
    char dir[] = "/tmp/sluice-test-XXXXXX";
    int32_t good[40], bad[70];
    struct model_case c;
    float alone[64];
    (void)state;

    make_poisoned(dir);
    for (int i = 0; i < 40; i++)
        good[i] = 8 + i % 30;
    for (int i = 0; i < 70; i++)
        bad[i] = i == 33 ? 7 : 10 + i % 20;
    open_case(&c, dir);
    struct batch_seq seqs[2] = {case_seq(bad, 0, 70, 70, pages[0], 2),
                                case_seq(good, 0, 40, 40, pages[1], 2)};
    assert_ok(case_step(&c, &seqs[1], 1));
    memcpy(alone, model_last_logits(c.model, 0), sizeof alone);
    assert_ok(case_step(&c, seqs, 2));
    assert_true(c.tokens[0].numeric);
    assert_int_equal(c.tokens[0].token, -1);
    assert_false(c.tokens[1].numeric);
    assert_memory_equal(alone, model_last_logits(c.model, 1), sizeof alone);
    /* the pages that the bad sequence wrote may be given to the good one */
    seqs[1].pages = pages[0];
    assert_ok(case_step(&c, &seqs[1], 1));
    assert_false(c.tokens[0].numeric);
    assert_memory_equal(alone, model_last_logits(c.model, 0), sizeof alone);
    model_case_close(&c);
    drop_poisoned(dir);
}

/* The message of a plan comes back as it was, and no cut or bent one is taken. */
static void test_plan_message(void **state)
{
    static const int32_t pages[4] = {9, 1, 2, 15};
    const struct plan_limits limits = {.max_seqs = 4,
                                       .max_tokens = MAX_TOKENS,
                                       .max_position = MAX_POSITION,
                                       .vocab_size = 64,
                                       .n_pages = N_PAGES};
    struct rng rng = test_rng("plan message", 51);
    int32_t tokens[MAX_POSITION];
    struct step_plan sent, got;
    bool stop;
    (void)state;

    for (int i = 0; i < MAX_POSITION; i++)
        tokens[i] = i % 64;
    struct batch_seq seqs[2] = {case_seq(tokens, 0, 130, 200, pages, 4),
                                case_seq(tokens, 99, 1, 90, pages, 2)};
    seqs[1].policy.lost_mass = true;
    const struct batch b = {.step_id = 77, .n_seqs = 2, .n_tokens = 131, .seqs = seqs};
    step_plan_init(&sent, &limits);
    step_plan_init(&got, &limits);
    assert_ok(step_plan_from_batch(&sent, &b, NULL));
    unsigned char *msg = mem_try_aligned(1, step_plan_max_message(4, MAX_TOKENS, MAX_POSITION));
    const size_t len = step_plan_encode(&sent, msg);
    assert_ok(step_plan_decode(&got, msg, len, &stop));
    assert_false(stop);
    assert_int_equal(got.step_id, 77);
    assert_int_equal(got.n_rows, 131);
    assert_memory_equal(got.ids, sent.ids, 131 * sizeof *got.ids);
    assert_memory_equal(got.positions, sent.positions, 131 * sizeof *got.positions);
    assert_memory_equal(got.seqs[0].pages, pages, 3 * sizeof *pages);
    assert_int_equal(got.seqs[1].pos, 99);
    assert_true(!got.seqs[0].choice.lost_mass && got.seqs[1].choice.lost_mass);
    assert_int_equal(got.n_outputs, 2);
    assert_int_equal(got.outputs[0], 129);
    assert_int_equal(got.outputs[1], 130);
    for (size_t cut = 0; cut < len; cut++)
        assert_int_equal(step_plan_decode(&got, msg, cut, &stop), ERR_PROTOCOL);
    for (int i = 0; i < 20000; i++) {
        size_t at = (size_t)rng_range(&rng, 0, (int32_t)len - 1);
        unsigned char old = msg[at];
        msg[at] = (unsigned char)rng_u64(&rng);
        (void)!step_plan_decode(&got, msg, len, &stop); /* ASan watches */
        msg[at] = old;
    }
    assert_ok(step_plan_decode(&got, msg, step_plan_encode_stop(msg), &stop));
    assert_true(stop);
    mem_free(msg);
    step_plan_deinit(&sent);
    step_plan_deinit(&got);
}

enum { OUTPUT_SEQS = 3, OUTPUT_ROWS = 7, OUTPUT_COUNT_AT = 16 /* n_outputs in the message */ };

/* A message of three sequences with 4, 2 and 1 rows, where those of `sample` want a token. */
static size_t encode_outputs(struct step_plan *p, unsigned char *msg, unsigned sample)
{
    static const int32_t tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8}, pages[3] = {3, 1, 2};
    struct batch_seq seqs[OUTPUT_SEQS] = {case_seq(tokens, 0, 4, 8, &pages[0], 1),
                                          case_seq(tokens, 3, 2, 8, &pages[1], 1),
                                          case_seq(tokens, 7, 1, 2, &pages[2], 1)};
    const struct batch b = {.n_seqs = OUTPUT_SEQS, .n_tokens = OUTPUT_ROWS, .seqs = seqs};
    for (int i = 0; i < OUTPUT_SEQS; i++)
        seqs[i].sample = sample >> i & 1;
    assert_ok(step_plan_from_batch(p, &b, NULL));
    return step_plan_encode(p, msg);
}

/* Four rows of three sequences in a message that is whole otherwise. */
static void refuses_more_outputs_than_sequences(struct step_plan *got, const unsigned char *msg,
                                                size_t len)
{
    static const int32_t rows[OUTPUT_SEQS + 1] = {3, 4, 5, 6};
    const int32_t n = OUTPUT_SEQS + 1;
    const size_t pages = OUTPUT_SEQS * sizeof(int32_t), at = len - pages - (sizeof rows - sizeof n);
    unsigned char *more = mem_alloc(len + sizeof n);
    bool stop;

    memcpy(more, msg, at);
    memcpy(more + OUTPUT_COUNT_AT, &n, sizeof n);
    memcpy(more + at, rows, sizeof rows);
    memcpy(more + at + sizeof rows, msg + len - pages, pages);
    assert_int_equal(step_plan_decode(got, more, len + sizeof n, &stop), ERR_PROTOCOL);
    mem_free(more);
}

/* The output rows of a step travel with it; counts and rows that cannot be are refused. */
static void test_plan_outputs(void **state)
{
    static const int32_t last[OUTPUT_SEQS] = {3, 5, 6};
    static const int32_t bad_counts[] = {-1, 2, 4, 5, 1 << 20, INT32_MAX, INT32_MIN};
    static const int32_t bad_rows[][3] = {{3, 5, 7}, {-1, 5, 6},        {3, 3, 6},
                                          {5, 3, 6}, {3, 5, INT32_MAX}, {3, 6, 6},
                                          {6, 6, 6}, {INT32_MIN, 5, 6}, {0, 3, 5}};
    const struct plan_limits limits = {
        .max_seqs = 4, .max_tokens = 8, .max_position = 64, .vocab_size = 64, .n_pages = N_PAGES};
    struct step_plan sent, got;
    bool stop;
    (void)state;

    step_plan_init(&sent, &limits);
    step_plan_init(&got, &limits);
    /* of just the message's size: ASan sees a step beyond it */
    size_t len = step_plan_max_message(OUTPUT_SEQS, OUTPUT_ROWS, 64);
    unsigned char *msg = mem_alloc(len);
    for (unsigned sample = 0; sample < 1u << OUTPUT_SEQS; sample++) {
        int32_t n = 0;
        const size_t used = encode_outputs(&sent, msg, sample);
        assert_true(sample + 1 < 1u << OUTPUT_SEQS ? used < len : used == len);
        assert_ok(step_plan_decode(&got, msg, used, &stop));
        for (int i = 0; i < OUTPUT_SEQS; i++) {
            if (sample >> i & 1)
                assert_int_equal(got.outputs[n++], last[i]);
        }
        assert_int_equal(got.n_outputs, n);
        for (int i = 0; i < OUTPUT_SEQS; i++)
            assert_int_equal(got.seqs[i].pages[0], sent.seqs[i].pages[0]);
    }
    for (size_t i = 0; i < sizeof bad_counts / sizeof *bad_counts; i++) {
        memcpy(msg + OUTPUT_COUNT_AT, &bad_counts[i], sizeof *bad_counts);
        assert_int_equal(step_plan_decode(&got, msg, len, &stop), ERR_PROTOCOL);
    }
    for (size_t i = 0; i < sizeof bad_rows / sizeof *bad_rows; i++) {
        len = encode_outputs(&sent, msg, 7);
        memcpy(msg + len - 3 * sizeof(int32_t) - sizeof bad_rows[i], bad_rows[i],
               sizeof bad_rows[i]);
        assert_int_equal(step_plan_decode(&got, msg, len, &stop), ERR_PROTOCOL);
    }
    (void)encode_outputs(&sent, msg, 7);
    assert_ok(step_plan_decode(&got, msg, len, &stop));
    refuses_more_outputs_than_sequences(&got, msg, len);
    mem_free(msg);
    step_plan_deinit(&sent);
    step_plan_deinit(&got);
}

struct seen_tiles {
    int calls, n_finite, last_layer;
};

static void see_tiles(void *arg, int layer, int32_t pos, int32_t n_tokens, const float *max,
                      int32_t n_groups, int32_t n_pages)
{
    struct seen_tiles *s = arg;
    assert_int_equal(pos, 128);
    assert_int_equal(n_tokens, 100);
    assert_int_equal(n_groups, 1);
    assert_int_equal(n_pages, 4);
    s->calls++;
    s->last_layer = layer;
    for (int32_t i = 0; i < 4 * n_pages; i++) /* four heads */
        s->n_finite += isfinite(max[i]);
}

static void test_tiles(void **state)
{
    static const int32_t pages[4] = {2, 0, 3, 1}, others[4] = {6, 4, 7, 5};
    int32_t tokens[256];
    struct model_case c;
    struct seen_tiles seen = {0};
    (void)state;
    for (int i = 0; i < 256; i++)
        tokens[i] = i % 60;
    open_case(&c, GQA_DIR);
    struct batch_seq s = case_seq(tokens, 0, 128, 228, pages, 4);
    assert_ok(case_step(&c, &s, 1));
    assert_int_equal(model_probe_tiles(c.model, 100, see_tiles, &seen), ERR_INVALID);
    assert_ok(model_probe_tiles(c.model, 128, see_tiles, &seen));
    s = case_seq(tokens, 128, 100, 228, pages, 4);
    assert_ok(case_step(&c, &s, 1));
    assert_int_equal(seen.calls, 2);
    assert_int_equal(seen.last_layer, 1);
    assert_int_equal(seen.n_finite, 2 * 4 * 4);
    struct batch_seq two[2] = {s, s};
    two[1].pages = others; /* no page in two writers */
    assert_int_equal(case_step(&c, two, 2), ERR_INVALID);
    assert_ok(model_probe_tiles(c.model, 128, NULL, NULL));
    assert_ok(case_step(&c, two, 2));
    assert_int_equal(seen.calls, 2);
    model_case_close(&c);
}

/* Two levels of thresholds for 2 layers of 4 heads: -inf, +inf. */
static struct attn_thresholds open_and_closed(float t[2][2 * 4])
{
    for (int i = 0; i < 8; i++) {
        t[0][i] = -INFINITY;
        t[1][i] = INFINITY;
    }
    return (struct attn_thresholds){.t = t[0],
                                    .n_levels = 2,
                                    .n_layers = 2,
                                    .n_heads = 4,
                                    .n_blocks = 1,
                                    .level_stride = 8,
                                    .layer_stride = 4,
                                    .head_stride = 1};
}

/* Thresholds of +inf leave the diagonal, of -inf everything; counters say so. */
static void test_policy(void **state)
{
    static const int32_t pages[4] = {2, 0, 3, 1};
    float t[2][2 * 4]; /* [level][layer, head] */
    int32_t tokens[256];
    struct model_case c;
    uint64_t kept = 0;
    (void)state;
    for (int i = 0; i < 256; i++)
        tokens[i] = i % 60;
    const struct attn_policy policy = {.abs = open_and_closed(t)};
    open_case(&c, GQA_DIR);
    assert_ok(model_set_policy(c.model, &policy, NULL));
    struct batch_seq s = case_seq(tokens, 0, 256, 256, pages, 4);
    s.policy.gate = BATCH_ABS;
    s.policy.lost_mass = true;
    assert_ok(case_step(&c, &s, 1));
    assert_int_equal(c.counts[0].sampled, 8); /* of so few rows the last alone */
    assert_true(c.counts[0].lost == 0);
    /* blocks 0 and 1 reach 2 and 4 pages, in 2 layers of 4 heads */
    assert_int_equal(c.counts[0].reachable, 6 * 8);
    assert_int_equal(c.counts[0].kept, 6 * 8);
    s.policy.level = 1;
    assert_ok(case_step(&c, &s, 1));
    assert_int_equal(c.counts[0].reachable, 6 * 8);
    assert_int_equal(c.counts[0].kept, 4 * 8);
    assert_int_equal(c.counts[0].sampled, 8);
    assert_true(c.counts[0].lost > 0.8 && c.counts[0].lost < 8);
    s.policy.lost_mass = false;
    assert_ok(case_step(&c, &s, 1));
    assert_true(c.counts[0].sampled == 0 && c.counts[0].lost == 0);
    assert_int_equal(c.counts[0].reachable, (6 + 4) * 4); /* block 1 alone in the last layer */
    assert_int_equal(c.counts[0].kept, (4 + 2) * 4);
    for (int i = 0; i < 8; i++)
        kept += model_head_counts(c.model)[i].kept;
    assert_int_equal(kept, 10 * 8 + 6 * 4);
    s.policy.level = 2;
    assert_int_equal(case_step(&c, &s, 1), ERR_INVALID);
    model_case_close(&c);
}

/* Generated rows under their own thresholds: of +inf they keep the page of their own token. */
static void test_decode_policy(void **state)
{
    static const int32_t pages[4] = {2, 0, 3, 1};
    float t[2][2 * 4]; /* [level][layer, head] */
    int32_t tokens[256];
    struct model_case c;
    (void)state;
    for (int i = 0; i < 256; i++)
        tokens[i] = i % 60;
    const struct attn_policy policy = {.decode = open_and_closed(t)};
    open_case(&c, GQA_DIR);
    assert_ok(model_set_policy(c.model, &policy, NULL));
    struct batch_seq s = case_seq(tokens, 0, 256, 254, pages, 4);
    s.policy.decode_gate = BATCH_ABS;
    assert_ok(case_step(&c, &s, 1));
    /* two prompt blocks reach 2 and 4 pages, two generated rows 4 each; 2 layers of 4 heads */
    assert_int_equal(c.counts[0].reachable, 14 * 8);
    assert_int_equal(c.counts[0].kept, 14 * 8);
    s.policy.decode_level = 1;
    assert_ok(case_step(&c, &s, 1));
    assert_int_equal(c.counts[0].reachable, 14 * 8);
    assert_int_equal(c.counts[0].kept, (6 + 2) * 8);
    s.policy.decode_level = 2;
    assert_int_equal(case_step(&c, &s, 1), ERR_INVALID);
    model_case_close(&c);
}

/* One of four steps of three sequences: an end of a prompt behind others' rows, a prompt's middle,
 * generated rows. */
static void narrow_step(struct model_case *c, const int32_t *tokens, int step, int gate)
{
    static const int32_t pages[3][4] = {{2, 0, 3, 1}, {9, 8, 11, 10}, {4, 5, 6, 7}};
    const int32_t start[] = {0, 128, 254, 255}, n[] = {128, 126, 1, 1};
    struct batch_seq s[3];
    for (int i = 0; i < 3; i++) {
        const int at = (step + i) % 4; /* of its own four steps */
        s[i] = case_seq(tokens + i, start[at], n[at], 254, pages[i], 4);
        s[i].sample = at > 0;
        s[i].policy.gate = (uint8_t)gate;
        s[i].policy.gate_rows = i == 1 ? 64 : 128;
        s[i].policy.ln_lambda = 0.5f;
    }
    assert_ok(case_step(c, s, 3));
}

/* A narrow last layer writes all K and V and changes no bit of any logit. */
static void test_narrow(void **state)
{
    float t[2][2 * 4];
    int32_t tokens[258];
    struct model_case c[2];
    (void)state;
    for (int i = 0; i < 258; i++)
        tokens[i] = i * i % 59;
    struct attn_policy policy = {.abs = open_and_closed(t)};
    for (int i = 0; i < 8; i++)
        t[0][i] = 0.05f * (float)i;
    for (int k = 0; k < 2; k++) {
        open_case(&c[k], GQA_DIR);
        assert_ok(model_set_policy(c[k].model, &policy, NULL));
        c[k].all_rows = k > 0;
    }
    for (int step = 0; step < 12; step++) {
        uint64_t pages[2] = {0};
        for (int k = 0; k < 2; k++)
            narrow_step(&c[k], tokens, step % 4, step / 4);
        for (int i = 0; i < 3; i++) {
            const float *got = model_last_logits(c[0].model, i);
            const float *want = model_last_logits(c[1].model, i);
            const size_t bytes = (size_t)model_info(c[0].model)->vocab_size * sizeof *got;
            assert_true((got == NULL) == (want == NULL));
            if (got)
                assert_memory_equal(got, want, bytes);
            for (int k = 0; k < 2; k++)
                pages[k] += c[k].counts[i].reachable;
        }
        /* a prompt at its first half has nothing in the last layer: 2 pages of 4 heads, 3 in units
         * of 64 rows; one at its second half has all of its rows there */
        const bool in_64 = step % 4 == 3 && step > 3;
        assert_int_equal(pages[1] - pages[0], step % 4 == 1 ? 0 : in_64 ? 3 * 4 : 2 * 4);
    }
    model_case_close(&c[0]);
    model_case_close(&c[1]);
}

/* What a narrow last layer counts is a sequence's own affair: nothing of a chunk without a sample,
 * all of one whose lost mass is measured or that replays generated rows, whoever is beside it. */
static void test_narrow_counts(void **state)
{
    static const int32_t pages[2][4] = {{2, 0, 3, 1}, {9, 8, 11, 10}};
    int32_t tokens[256];
    struct model_case c[2];
    (void)state;
    for (int i = 0; i < 256; i++)
        tokens[i] = i * 7 % 59;
    for (int k = 0; k < 2; k++) {
        open_case(&c[k], GQA_DIR);
        c[k].all_rows = k > 0;
        struct batch_seq s[2] = {case_seq(tokens, 0, 128, 254, pages[0], 4),
                                 case_seq(tokens, 0, 128, 254, pages[1], 4)};
        s[0].sample = s[1].sample = false;
        assert_ok(case_step(&c[k], s, 1));
        assert_int_equal(c[k].counts[0].reachable, 2 * 4 * (k + 1));
        assert_int_equal(c[k].tokens[0].token, -1);
        s[1].policy.lost_mass = true; /* and before it a prompt's end */
        s[0] = case_seq(tokens, 128, 126, 254, pages[0], 4);
        assert_ok(case_step(&c[k], s, 2));
        assert_int_equal(c[k].counts[0].reachable, 4 * 8);
        assert_int_equal(c[k].counts[1].reachable, 2 * 8);
        s[0] = case_seq(tokens, 254, 2, 254, pages[0], 4);
        s[1] = case_seq(tokens, 128, 64, 254, pages[1], 4);
        s[1].sample = false;
        assert_ok(case_step(&c[k], s, 2));
        assert_int_equal(c[k].counts[0].reachable, 2 * 4 * 8);
        assert_int_equal(c[k].counts[1].reachable, 3 * 4 * (k + 1));
    }
    assert_memory_equal(model_last_logits(c[0].model, 0), model_last_logits(c[1].model, 0),
                        (size_t)model_info(c[0].model)->vocab_size * sizeof(float));
    model_case_close(&c[0]);
    model_case_close(&c[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_batches),  cmocka_unit_test(test_refused_step),
        cmocka_unit_test(test_numeric),      cmocka_unit_test(test_plan_message),
        cmocka_unit_test(test_plan_outputs), cmocka_unit_test(test_tiles),
        cmocka_unit_test(test_policy),       cmocka_unit_test(test_decode_policy),
        cmocka_unit_test(test_narrow),       cmocka_unit_test(test_narrow_counts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
