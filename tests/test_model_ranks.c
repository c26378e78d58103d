/* Ranks agree with one process: the same tokens and counters, the same logits but for rounding,
 * whatever the vocabulary and however many rows of a step are sampled. A rank is a thread. */
#include "core/mem.h"
#include "parallel/comm.h"
#include "tests/model_case.h"
#include "tests/rank_script.h"
#include "tests/test.h"
#include "tests/tiny_model.h"

#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

enum { MAX_RANKS = 4, MAX_VOCAB = 512, MAX_POSITION = 512, MAX_THRESHOLDS = 192 };

/* What rank 0 saw of one step. */
struct seen {
    int32_t n_seqs;
    bool sampled[SCRIPT_SEQS];
    int32_t tokens[SCRIPT_SEQS];
    struct batch_counts counts[SCRIPT_SEQS];
    float logits[SCRIPT_SEQS][MAX_VOCAB];
};

/* One rank's whole life in a thread; rank 0 runs the steps and hands out what it saw. */
struct rank_life {
    const char *dir, *shm;
    int rank, n_ranks, result;
    bool long_prompt; /* instead of the script */
    uint64_t fingerprint;
    int32_t vocab;
    int64_t comm_us, total_us;
    float policy[MAX_THRESHOLDS]; /* what the model borrows of it */
    struct seen steps[SCRIPT_STEPS];
};

static void see(struct seen *seen, const struct model_case *c, const struct rank_script *s)
{
    seen->n_seqs = s->n_seqs;
    for (int32_t i = 0; i < s->n_seqs; i++) {
        const float *logits = model_last_logits(c->model, i);
        seen->sampled[i] = logits != NULL;
        seen->tokens[i] = c->tokens[i].token;
        seen->counts[i] = c->counts[i];
        if (logits)
            memcpy(seen->logits[i], logits, (size_t)s->vocab * sizeof *logits);
    }
}

/* Random thresholds for generated rows, and densities that REL is steered to, of all heads: each
 * rank takes its own. */
static int set_policy(struct model *m, float *t, struct err_msg *why)
{
    const struct model_info *info = model_info(m);
    const int32_t n = info->n_layers * info->n_heads;
    struct rng r = {9};
    float *densities = t + n; /* [2, n_layers, n_heads] */
    if (3 * n > MAX_THRESHOLDS)
        return ERR_INVALID;
    for (int32_t i = 0; i < n; i++)
        t[i] = (float)(rng_normal(&r) * 2);
    for (int32_t i = 0; i < 2 * n; i++)
        densities[i] = 0.4f + 0.5f * (float)rng_unit(&r);
    struct attn_policy policy = {.decode = {.t = t,
                                            .n_levels = 1,
                                            .n_layers = info->n_layers,
                                            .n_heads = info->n_heads,
                                            .n_blocks = 1,
                                            .level_stride = n,
                                            .layer_stride = info->n_heads,
                                            .head_stride = 1}};
    policy.rel_64 = policy.decode;
    policy.rel_64.t = densities;
    policy.rel_64.n_levels = 2;
    return model_set_policy(m, &policy, why);
}

static int run_steps(struct model_case *c, struct rank_life *life)
{
    struct rank_script s;
    life->vocab = model_info(c->model)->vocab_size;
    if (life->vocab > MAX_VOCAB)
        return ERR_INVALID;
    rank_script_init(&s, life->vocab);
    for (int32_t step = 0; step < SCRIPT_STEPS; step++) {
        rank_script_step(&s, step);
        for (int32_t i = 0; i < s.n_seqs; i++)
            s.seqs[i].policy.decode_gate = s.seqs[i].id % 2 ? BATCH_ABS : BATCH_DENSE;
        TRY(case_step(c, s.seqs, s.n_seqs));
        see(&life->steps[step], c, &s);
        rank_script_grow(&s, c->tokens);
        life->comm_us += c->result.comm_us;
        life->total_us += c->result.total_us;
    }
    return 0;
}

/* One prompt in two chunks under a gate that skips some, its lost mass measured. */
static int run_long(struct model_case *c, struct rank_life *life)
{
    static const int32_t pages[] = {3, 0, 7, 5, 1, 6, 2, 4};
    int32_t tokens[MAX_POSITION];
    struct rng r = {11};
    for (int32_t i = 0; i < MAX_POSITION; i++)
        tokens[i] = rng_range(&r, 0, model_info(c->model)->vocab_size - 1);
    for (int32_t step = 0; step < 2; step++) {
        struct batch_seq s = case_seq(tokens, 256 * step, 256, MAX_POSITION, pages, 8);
        s.policy = (struct batch_policy){.gate = BATCH_REL,
                                         .gate_rows = 64,
                                         .ln_lambda = 4.0f,
                                         .steer = 2.0f,
                                         .blend = 0.5f,
                                         .lost_mass = true};
        TRY(case_step(c, &s, 1));
        life->steps[step].counts[0] = c->counts[0];
    }
    return 0;
}

static int open_rank(struct rank_life *life, struct model_case *c, struct comm **comm,
                     struct err_msg *why)
{
    const struct comm_shm_config shm = {
        .name = life->shm,
        .rank = life->rank,
        .n_ranks = life->n_ranks,
        .max_floats = 4096,
        .max_msg = model_plan_bytes(CASE_MAX_SEQS, SCRIPT_MAX_TOKENS, MAX_POSITION),
        .timeout_ms = 30000};

    if (life->n_ranks > 1)
        TRY(comm_shm_create(comm, &shm, why));
    TRY(dev_open(&c->dev, &dev_cpu, 0, 1, why));
    const struct model_config cfg = {.dir = life->dir,
                                     .dev = c->dev,
                                     .comm = *comm,
                                     .kv_dtype = DTYPE_F32,
                                     .max_seqs = CASE_MAX_SEQS,
                                     .max_tokens = SCRIPT_MAX_TOKENS,
                                     .max_position = MAX_POSITION};
    TRY(model_open(&c->model, &cfg, why));
    TRY(set_policy(c->model, life->policy, why));
    return model_take_pages(c->model, SCRIPT_PAGES, why);
}

static void *live(void *arg)
{
    struct rank_life *life = arg;
    struct model_case c = {0};
    struct comm *comm = NULL;
    struct err_msg why = {{0}};

    life->result = open_rank(life, &c, &comm, &why);
    if (life->result == 0) {
        life->fingerprint = model_info(c.model)->fingerprint;
        c.result = (struct batch_result){.tokens = c.tokens, .counts = c.counts};
        life->result = life->rank          ? model_follow(c.model)
                       : life->long_prompt ? run_long(&c, life)
                                           : run_steps(&c, life);
        model_stop_followers(c.model);
    }
    if (life->result < 0)
        printf("# rank %d: %s\n", life->rank, err_why(&why, life->result));
    model_close(c.model);
    dev_close(c.dev);
    comm_close(comm);
    return NULL;
}

static void live_together(struct rank_life *lives, const char *dir, int n_ranks, bool long_prompt)
{
    static int count;
    char shm[64];
    pthread_t threads[MAX_RANKS];
    (void)snprintf(shm, sizeof shm, "/sluice-test-%d-%d", (int)getpid(), count++);
    for (int i = 0; i < n_ranks; i++) {
        memset(&lives[i], 0, sizeof lives[i]);
        lives[i].dir = dir;
        lives[i].shm = shm;
        lives[i].rank = i;
        lives[i].n_ranks = n_ranks;
        lives[i].long_prompt = long_prompt;
        assert_int_equal(pthread_create(&threads[i], NULL, live, &lives[i]), 0);
    }
    for (int i = 0; i < n_ranks; i++)
        (void)pthread_join(threads[i], NULL);
    for (int i = 0; i < n_ranks; i++)
        assert_int_equal(lives[i].result, 0);
}

static void check_step(const struct seen *one, const struct seen *many, int32_t vocab)
{
    assert_int_equal(one->n_seqs, many->n_seqs);
    for (int32_t i = 0; i < one->n_seqs; i++) {
        assert_int_equal(one->sampled[i], many->sampled[i]);
        assert_int_equal(one->tokens[i], many->tokens[i]);
        assert_memory_equal(&one->counts[i], &many->counts[i], sizeof one->counts[i]);
        for (int32_t k = 0; one->sampled[i] && k < vocab; k++)
            assert_close((double)many->logits[i][k], (double)one->logits[i][k], 1e-4, 1e-4);
    }
}

static void check_lives(const struct rank_life *one, const struct rank_life *many, int n_ranks)
{
    for (int32_t i = 0; i < SCRIPT_STEPS; i++)
        check_step(&one->steps[i], &many[0].steps[i], one->vocab);
    assert_int_equal(one->comm_us, 0);
    assert_true(many[0].comm_us > 0 && many[0].comm_us < many[0].total_us);
    for (int i = 0; i < n_ranks; i++)
        assert_true(many[i].fingerprint == one->fingerprint);
}

static void compare(const char *dir, const int *n_ranks, int n)
{
    struct rank_life *lives = mem_zalloc(1 + MAX_RANKS, sizeof *lives);
    live_together(lives, dir, 1, false);
    for (int i = 0; i < n; i++) {
        live_together(lives + 1, dir, n_ranks[i], false);
        check_lives(lives, lives + 1, n_ranks[i]);
    }
    mem_free(lives);
}

/* Two ranks, and four over two KV heads, each of which two ranks then hold. */
static void test_models(void **state)
{
    static const int two_four[] = {2, 4};
    (void)state;
    compare(TEST_DATA "/llama/gqa_head_dim", two_four, 2);
    compare(TEST_DATA "/llama/biases", two_four, 2);
    compare(TEST_ROOT "/models/needle", two_four, 1);
}

/* Slices that are full, ragged and empty, of an output projection of its own and of the embedding.
 */
static void test_vocabularies(void **state)
{
    static const int ranks[] = {2, 3, 4};
    static struct tiny_model tiny[] = {
        {101, 48, 24, 2, 12, 12, 8, .dtype = DTYPE_BF16, .seed = 1},
        {97, 48, 24, 2, 12, 12, 8, .tied = true, .dtype = DTYPE_F16, .seed = 2},
        {33, 48, 24, 1, 12, 12, 8, .tied = true, .biases = true, .dtype = DTYPE_BF16, .seed = 3},
        {96, 24, 12, 1, 12, 12, 8, .llama3 = true, .dtype = DTYPE_BF16, .seed = 4},
        {5, 24, 12, 1, 12, 12, 8, .dtype = DTYPE_BF16, .seed = 5},
    };
    (void)state;
    for (size_t i = 0; i < sizeof tiny / sizeof *tiny; i++) {
        tiny_model_write(&tiny[i]);
        compare(tiny[i].dir, ranks, 3);
        tiny_model_remove(&tiny[i]);
    }
}

/* Each rank measures what its own heads lose. */
static void test_lost_mass(void **state)
{
    struct rank_life *lives = mem_zalloc(1 + MAX_RANKS, sizeof *lives);
    (void)state;
    live_together(lives, TEST_DATA "/llama/gqa_head_dim", 1, true);
    for (int n = 2; n <= 4; n += 2) {
        live_together(lives + 1, TEST_DATA "/llama/gqa_head_dim", n, true);
        for (int step = 0; step < 2; step++) {
            const struct batch_counts *one = &lives[0].steps[step].counts[0];
            const struct batch_counts *many = &lives[1].steps[step].counts[0];
            printf("# %d ranks: lost %.6f of %d, one %.6f\n", n, many->lost, (int)many->sampled,
                   one->lost);
            /* position 448 and the last; 2 layers of 4 heads */
            assert_int_equal(one->sampled, step ? 16 : 0);
            assert_int_equal(many->sampled, one->sampled);
            assert_close(many->lost, one->lost, 1e-4, 1e-4);
            assert_true((one->lost > 0.1) == (step == 1));
        }
    }
    mem_free(lives);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_models),
        cmocka_unit_test(test_vocabularies),
        cmocka_unit_test(test_lost_mass),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
