/* A model's steps: bad batches are refused and harm nothing, numbers that are not numbers stay with
 * their sequence, ranks agree with one process, the calibrator's view. */
#include "attention/attention.h"
#include "core/mem.h"
#include "model/safetensors.h"
#include "model/step_plan.h"
#include "parallel/comm.h"
#include "tests/model_case.h"
#include "tests/test.h"

#include <limits.h>
#include <pthread.h>
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

static void lambda_positive(struct batch_seq *s)
{
    s->policy.gate = BATCH_REL;
    s->policy.ln_lambda = 0.5f;
}

static void lambda_nan(struct batch_seq *s)
{
    s->policy.gate = BATCH_REL;
    s->policy.ln_lambda = NAN;
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
        {"ln_lambda", lambda_positive},
        {"ln_lambda", lambda_nan},
        {"inside a block", unaligned_start},
        {"inside a block", unaligned_end},
        {"gate_rows", rows_unknown},
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

/* One rank's whole life in a thread; rank 0 runs the steps and hands out what it saw. */
struct rank_life {
    const char *dir, *shm;
    int rank, n_ranks, result;
    uint64_t fingerprint;
    int32_t tokens[6];
    float logits[64];
    struct batch_counts counts;
    int64_t comm_us, total_us; /* over all steps */
};

static int run_steps(struct model_case *c, struct rank_life *life)
{
    static const int32_t pages[4] = {2, 0, 3, 1};
    int32_t tokens[256];
    for (int i = 0; i < 200; i++)
        tokens[i] = i * 7 % 60;
    for (int i = 0; i < 6; i++) {
        struct batch_seq s = case_seq(tokens, i ? 199 + i : 0, i ? 1 : 200, 200, pages, 4);
        int err = case_step(c, &s, 1);
        if (err < 0)
            return err;
        tokens[200 + i] = life->tokens[i] = c->tokens[0].token;
        life->comm_us += c->result.comm_us;
        life->total_us += c->result.total_us;
    }
    memcpy(life->logits, model_last_logits(c->model, 0), sizeof life->logits);
    life->counts = c->counts[0];
    return 0;
}

static void *live(void *arg)
{
    struct rank_life *life = arg;
    struct model_case c = {0};
    struct comm *comm = NULL;
    struct err_msg why = {{0}};
    const struct comm_shm_config shm = {
        .name = life->shm,
        .rank = life->rank,
        .n_ranks = life->n_ranks,
        .max_floats = 4096,
        .max_msg = model_plan_bytes(CASE_MAX_SEQS, MAX_TOKENS, MAX_POSITION),
        .timeout_ms = 30000};

    life->result = life->n_ranks > 1 ? comm_shm_create(&comm, &shm, &why) : 0;
    if (life->result == 0)
        life->result = dev_open(&c.dev, &dev_cpu, 0, 1, &why);
    const struct model_config cfg = {.dir = life->dir,
                                     .dev = c.dev,
                                     .comm = comm,
                                     .kv_dtype = DTYPE_F32,
                                     .max_seqs = CASE_MAX_SEQS,
                                     .max_tokens = MAX_TOKENS,
                                     .max_position = MAX_POSITION};
    if (life->result == 0)
        life->result = model_open(&c.model, &cfg, &why);
    if (life->result == 0)
        life->result = model_take_pages(c.model, N_PAGES, &why);
    if (life->result == 0) {
        life->fingerprint = model_info(c.model)->fingerprint;
        c.result = (struct batch_result){.tokens = c.tokens, .counts = c.counts};
        life->result = life->rank ? model_follow(c.model) : run_steps(&c, life);
        model_stop_followers(c.model);
    }
    if (life->result < 0)
        printf("# rank %d: %s\n", life->rank, err_why(&why, life->result));
    model_close(c.model);
    dev_close(c.dev);
    comm_close(comm);
    return NULL;
}

static void live_together(struct rank_life *lives, const char *dir, int n_ranks)
{
    static int count;
    char shm[64];
    pthread_t threads[8];
    (void)snprintf(shm, sizeof shm, "/sluice-test-%d-%d", (int)getpid(), count++);
    for (int i = 0; i < n_ranks; i++) {
        lives[i] = (struct rank_life){.dir = dir, .shm = shm, .rank = i, .n_ranks = n_ranks};
        assert_int_equal(pthread_create(&threads[i], NULL, live, &lives[i]), 0);
    }
    for (int i = 0; i < n_ranks; i++)
        (void)pthread_join(threads[i], NULL);
    for (int i = 0; i < n_ranks; i++)
        assert_int_equal(lives[i].result, 0);
}

static void check_lives(const struct rank_life *one, const struct rank_life *many, int n_ranks)
{
    assert_memory_equal(one->tokens, many[0].tokens, sizeof one->tokens);
    assert_memory_equal(&one->counts, &many[0].counts, sizeof one->counts);
    for (int i = 0; i < 64; i++)
        assert_close((double)many[0].logits[i], (double)one->logits[i], 1e-4, 1e-4);
    assert_int_equal(one->comm_us, 0);
    assert_true(many[0].comm_us > 0 && many[0].comm_us < many[0].total_us);
    for (int i = 0; i < n_ranks; i++)
        assert_true(many[i].fingerprint == one->fingerprint);
}

/* Two ranks, and four over two KV heads, each of which two ranks then hold. */
static void test_ranks(void **state)
{
    static const struct {
        const char *dir;
        int max_ranks;
    } cases[] = {{GQA_DIR, 4}, {BIASES_DIR, 4}, {TEST_ROOT "/models/needle", 2}};
    (void)state;
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        struct rank_life one, many[4];
        live_together(&one, cases[k].dir, 1);
        for (int n_ranks = 2; n_ranks <= cases[k].max_ranks; n_ranks *= 2) {
            live_together(many, cases[k].dir, n_ranks);
            check_lives(&one, many, n_ranks);
        }
    }
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
    const struct batch_seq seqs[2] = {case_seq(tokens, 0, 130, 200, pages, 4),
                                      case_seq(tokens, 99, 1, 90, pages, 2)};
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
    for (int i = 0; i < 8; i++) {
        t[0][i] = -INFINITY;
        t[1][i] = INFINITY;
    }
    const struct attn_policy policy = {.abs = {.t = t[0],
                                               .n_levels = 2,
                                               .n_layers = 2,
                                               .n_heads = 4,
                                               .n_blocks = 1,
                                               .level_stride = 8,
                                               .layer_stride = 4,
                                               .head_stride = 1}};
    open_case(&c, GQA_DIR);
    assert_ok(model_set_policy(c.model, &policy, NULL));
    struct batch_seq s = case_seq(tokens, 0, 256, 256, pages, 4);
    s.policy.gate = BATCH_ABS;
    assert_ok(case_step(&c, &s, 1));
    /* blocks 0 and 1 reach 2 and 4 pages, in 2 layers of 4 heads */
    assert_int_equal(c.counts[0].reachable, 6 * 8);
    assert_int_equal(c.counts[0].kept, 6 * 8);
    s.policy.level = 1;
    assert_ok(case_step(&c, &s, 1));
    assert_int_equal(c.counts[0].reachable, 6 * 8);
    assert_int_equal(c.counts[0].kept, 4 * 8);
    for (int i = 0; i < 8; i++)
        kept += model_head_counts(c.model)[i].kept;
    assert_int_equal(kept, 10 * 8);
    s.policy.level = 2;
    assert_int_equal(case_step(&c, &s, 1), ERR_INVALID);
    model_case_close(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_batches),  cmocka_unit_test(test_refused_step),
        cmocka_unit_test(test_numeric),      cmocka_unit_test(test_ranks),
        cmocka_unit_test(test_plan_message), cmocka_unit_test(test_tiles),
        cmocka_unit_test(test_policy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
