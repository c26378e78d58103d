/* Each feature of the sampler by its rule, the draws by chi-square against exact probabilities. */
#include "core/mem.h"
#include "model/sampler.h"
#include "tests/test.h"

enum { VOCAB = 40, N_DRAWS = 20000 };

/* A sequence of `n_prompt` prompt and `n_out` output tokens whose next token is drawn. */
struct fixture {
    struct sampler *s;
    float logits[VOCAB];
    int32_t tokens[64];
    struct batch_sampling p;
    struct batch_seq seq;
    struct batch_token out;
};

static const int32_t eos[] = {3, 5};

static void fixture_open(struct fixture *f)
{
    *f = (struct fixture){.p = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
    assert_ok(sampler_create(&f->s, VOCAB, 2, eos, 2));
    f->seq = (struct batch_seq){
        .tokens = f->tokens, .n_tokens = 1, .prompt_len = 1, .sample = true, .sampling = &f->p};
}

static void fixture_close(struct fixture *f)
{
    sampler_destroy(f->s);
}

/* Known tokens: the prompt [0, n_prompt), then the output. */
static void set_known(struct fixture *f, int32_t n_prompt, int32_t n_known)
{
    f->seq.prompt_len = n_prompt;
    f->seq.start = n_known - 1;
    f->seq.n_tokens = 1;
}

static const struct batch_token *draw(struct fixture *f)
{
    sampler_draw(f->s, 1, &f->out, f->logits, &f->seq);
    return &f->out;
}

static void random_logits(struct fixture *f, struct rng *rng, double spread)
{
    for (int32_t i = 0; i < VOCAB; i++)
        f->logits[i] = (float)(spread * rng_normal(rng));
}

static void test_greedy(void **state)
{
    struct fixture f;
    (void)state;
    fixture_open(&f);
    f.logits[17] = f.logits[30] = 2.0f;
    assert_int_equal(draw(&f)->token, 17); /* the lower id of two equals */
    assert_false(f.out.numeric);
    assert_int_equal(f.out.n_top, 0);
    f.logits[39] = 2.5f;
    assert_int_equal(draw(&f)->token, 39);
    f.p.seed = 99; /* greedy ignores what only draws use */
    f.p.top_k = 1;
    f.p.top_p = 0.1f;
    assert_int_equal(draw(&f)->token, 39);
    fixture_close(&f);
}

/* 99.99% quantile of chi-square with n degrees of freedom (Wilson and Hilferty). */
static double chi_square_limit(int n)
{
    double a = 2.0 / (9.0 * n), b = 1.0 - a + 3.719 * sqrt(a);
    return n * b * b * b;
}

/* Draws with the fixture's settings at many positions against the exact probabilities. */
static void check_distribution(struct fixture *f, const double *p, const char *name)
{
    int32_t seen[VOCAB] = {0};
    double chi = 0.0, rest = 0.0, rest_seen = 0.0;
    int cells = 0;

    for (int32_t i = 0; i < N_DRAWS; i++) {
        f->seq.start = i;
        seen[draw(f)->token]++;
    }
    for (int32_t i = 0; i < VOCAB; i++) {
        double want = p[i] * N_DRAWS;
        if (p[i] == 0.0)
            assert_int_equal(seen[i], 0);
        if (want < 10.0) { /* rare ones share a cell */
            rest += want;
            rest_seen += seen[i];
            continue;
        }
        chi += (seen[i] - want) * (seen[i] - want) / want;
        cells++;
    }
    if (rest >= 1.0) {
        chi += (rest_seen - rest) * (rest_seen - rest) / rest;
        cells++;
    }
    if (cells < 2)
        return;
    printf("# %s: chi-square %.1f, %d cells, limit %.1f\n", name, chi, cells,
           chi_square_limit(cells - 1));
    assert_true(chi < chi_square_limit(cells - 1));
}

/* The rule by brute force: softmax at the temperature, then min-p, top-k, top-p by full ranking. */
static void exact(double *p, const struct fixture *f)
{
    int32_t order[VOCAB];
    double total = 0.0, most = 0.0, share = 0.0;
    int32_t n = 0, kept = 0;
    for (int32_t i = 0; i < VOCAB; i++) {
        p[i] = exp((double)f->logits[i] / (double)f->p.temperature);
        total += p[i];
        order[i] = i;
    }
    for (int32_t i = 0; i < VOCAB; i++) { /* insertion sort, descending, stable */
        p[i] /= total;
        most = fmax(most, p[i]);
        for (int32_t k = i; k > 0 && p[order[k]] > p[order[k - 1]]; k--) {
            int32_t t = order[k];
            order[k] = order[k - 1];
            order[k - 1] = t;
        }
    }
    total = 0.0;
    while (n < VOCAB && (f->p.top_k == 0 || n < f->p.top_k) &&
           p[order[n]] >= (double)f->p.min_p * most)
        total += p[order[n++]];
    for (; kept < n && (kept == 0 || share < (double)f->p.top_p * total); kept++)
        share += p[order[kept]];
    for (int32_t i = 0; i < VOCAB; i++)
        p[order[i]] = i < kept ? p[order[i]] / share : 0.0;
}

static void test_distributions(void **state)
{
    static const struct {
        const char *name;
        float temperature, top_p, min_p;
        int32_t top_k;
    } cases[] = {
        {"plain", 1.0f, 1.0f, 0.0f, 0},       {"cold", 0.5f, 1.0f, 0.0f, 0},
        {"hot", 3.0f, 1.0f, 0.0f, 0},         {"top-k", 1.0f, 1.0f, 0.0f, 7},
        {"top-k all", 1.0f, 1.0f, 0.0f, 400}, {"top-p", 1.0f, 0.8f, 0.0f, 0},
        {"top-p tiny", 1.0f, 1e-6f, 0.0f, 0}, {"min-p", 1.0f, 1.0f, 0.05f, 0},
        {"min-p one", 1.0f, 1.0f, 1.0f, 0},   {"top-k and top-p", 0.7f, 0.9f, 0.0f, 12},
        {"all", 1.3f, 0.85f, 0.02f, 20},
    };
    struct rng rng = test_rng("sampler distributions", 41);
    struct fixture f;
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        double p[VOCAB];
        fixture_open(&f);
        random_logits(&f, &rng, 1.5);
        f.p.seed = rng_u64(&rng);
        f.p.temperature = cases[i].temperature;
        f.p.top_p = cases[i].top_p;
        f.p.min_p = cases[i].min_p;
        f.p.top_k = cases[i].top_k;
        exact(p, &f);
        check_distribution(&f, p, cases[i].name);
        fixture_close(&f);
    }
}

/* Equal logits: top-k keeps the lower ids. */
static void test_ties(void **state)
{
    struct fixture f;
    double p[VOCAB] = {0};
    (void)state;
    fixture_open(&f);
    f.p.temperature = 1.0f;
    f.p.top_k = 4;
    f.p.seed = 5;
    f.logits[20] = 1.0f;
    const double e = exp(1.0);
    p[20] = e / (e + 3.0);
    p[0] = p[1] = p[2] = 1.0 / (e + 3.0);
    check_distribution(&f, p, "ties");
    fixture_close(&f);
}

/* A draw depends on seed and position only; neighbouring seeds and positions are uncorrelated. */
static void test_random_numbers(void **state)
{
    double sum = 0.0, lag_seed = 0.0, lag_pos = 0.0;
    const int n = 100000;
    (void)state;
    for (int i = 0; i < n; i++) {
        double u = sampler_uniform(7, i);
        assert_true(u >= 0.0 && u < 1.0);
        assert_true(u == sampler_uniform(7, i));
        sum += u;
        lag_pos += (u - 0.5) * (sampler_uniform(7, i + 1) - 0.5);
        lag_seed += (u - 0.5) * (sampler_uniform(8, i) - 0.5);
    }
    /* five standard deviations: 1/sqrt(12 n) and 1/(12 sqrt(n)) */
    assert_close(sum / n, 0.5, 5.0 / sqrt(12.0 * n), 0);
    assert_close(lag_pos / n, 0.0, 5.0 / (12.0 * sqrt(n)), 0);
    assert_close(lag_seed / n, 0.0, 5.0 / (12.0 * sqrt(n)), 0);
}

static void test_independence(void **state)
{
    struct rng rng = test_rng("sampler independence", 42);
    struct fixture f;
    (void)state;
    fixture_open(&f);
    f.p.temperature = 1.0f;
    f.p.seed = 123;
    f.p.repetition_penalty = 1.3f;
    f.p.frequency_penalty = 0.4f;
    f.p.top_p = 0.9f;
    random_logits(&f, &rng, 1.0);
    for (int i = 0; i < 20; i++)
        f.tokens[i] = rng_range(&rng, 0, VOCAB - 1);
    float before[VOCAB];
    memcpy(before, f.logits, sizeof before);
    set_known(&f, 10, 20);
    int32_t token = draw(&f)->token;
    for (int i = 0; i < 50; i++) { /* whatever is drawn between, by whichever worker */
        set_known(&f, rng_range(&rng, 1, 10), rng_range(&rng, 11, 19));
        sampler_draw(f.s, i % 2, &f.out, f.logits, &f.seq);
    }
    f.seq = (struct batch_seq){.tokens = f.tokens,
                               .start = 5, /* the same tokens as a chunk */
                               .n_tokens = 15,
                               .prompt_len = 10,
                               .sampling = &f.p};
    sampler_draw(f.s, 0, &f.out, f.logits, &f.seq);
    assert_int_equal(f.out.token, token);
    assert_memory_equal(before, f.logits, sizeof before);
    fixture_close(&f);
}

static void test_penalties(void **state)
{
    struct fixture f;
    (void)state;
    fixture_open(&f);
    /* prompt 1 1 2, output 2 4 4 */
    memcpy(f.tokens, (int32_t[]){1, 1, 2, 2, 4, 4}, 6 * sizeof *f.tokens);
    set_known(&f, 3, 6);
    f.logits[1] = 3.0f;
    f.logits[2] = -1.0f;
    f.logits[4] = 2.0f;
    f.logits[6] = 1.0f;
    f.p.n_logprobs = BATCH_MAX_LOGPROBS;
    f.p.repetition_penalty = 2.0f;
    f.p.frequency_penalty = 0.25f;
    f.p.presence_penalty = 0.125f;
    assert_int_equal(draw(&f)->token, 1); /* 3 / 2, prompt only */
    double want[VOCAB] = {0}, total = 0.0;
    want[1] = 1.5;
    want[2] = -2.0 - 0.25 - 0.125;
    want[4] = 1.0 - 2 * 0.25 - 0.125;
    want[6] = 1.0;
    for (int i = 0; i < VOCAB; i++)
        total += exp(want[i]);
    for (int32_t i = 0; i < f.out.n_top; i++)
        assert_close((double)f.out.top_logprobs[i], want[f.out.top_ids[i]] - log(total), 1e-6, 0);
    assert_int_equal(f.out.top_ids[0], 1);
    assert_int_equal(f.out.top_ids[1], 6);
    assert_int_equal(f.out.top_ids[2], 4);
    assert_int_equal(f.out.top_ids[3], 0); /* ties by id */
    f.p.repetition_penalty = 4.0f;
    assert_int_equal(draw(&f)->token, 6);
    fixture_close(&f);
}

static void test_min_tokens(void **state)
{
    struct fixture f;
    (void)state;
    fixture_open(&f);
    f.logits[3] = 9.0f; /* EOS */
    f.logits[8] = 8.0f; /* stop */
    f.logits[9] = 7.0f;
    f.p.n_stop = 1;
    f.p.stop_ids[0] = 8;
    f.p.min_tokens = 2;
    f.p.n_logprobs = BATCH_MAX_LOGPROBS;
    set_known(&f, 4, 4);
    assert_int_equal(draw(&f)->token, 9);
    for (int32_t i = 0; i < f.out.n_top; i++)
        assert_true(f.out.top_ids[i] != 3 && f.out.top_ids[i] != 8 &&
                    isfinite(f.out.top_logprobs[i]));
    set_known(&f, 4, 5);
    assert_int_equal(draw(&f)->token, 9);
    set_known(&f, 4, 6); /* two generated */
    assert_int_equal(draw(&f)->token, 3);
    set_known(&f, 4, 4);
    f.p.ignore_eos = true;
    assert_int_equal(draw(&f)->token, 3); /* not barred, only the stop id is */
    f.p.ignore_eos = false;
    f.p.temperature = 2.0f;
    for (int i = 0; i < 200; i++) {
        f.p.seed = (uint64_t)i;
        int32_t t = draw(&f)->token;
        assert_true(t != 3 && t != 8 && t != 5);
    }
    fixture_close(&f);
}

static void test_logprobs(void **state)
{
    struct rng rng = test_rng("sampler logprobs", 43);
    struct fixture f;
    double total = 0.0;
    (void)state;
    fixture_open(&f);
    random_logits(&f, &rng, 2.0);
    f.p.temperature = 0.3f; /* log probabilities are those before temperature and truncation */
    f.p.top_k = 3;
    f.p.n_logprobs = 5;
    for (int i = 0; i < VOCAB; i++)
        total += exp((double)f.logits[i]);
    const struct batch_token *t = draw(&f);
    assert_close((double)t->logprob, (double)f.logits[t->token] - log(total), 1e-6, 0);
    assert_int_equal(t->n_top, 5);
    for (int i = 0; i < 5; i++) {
        int better = 0;
        for (int k = 0; k < VOCAB; k++)
            better += f.logits[k] > f.logits[t->top_ids[i]];
        assert_int_equal(better, i);
        assert_close((double)t->top_logprobs[i], (double)f.logits[t->top_ids[i]] - log(total), 1e-6,
                     0);
    }
    f.p.n_logprobs = 1;
    assert_int_equal(draw(&f)->n_top, 1);
    assert_true(f.out.logprob < 0.0f);
    fixture_close(&f);
}

static void test_numeric(void **state)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    struct fixture f;
    (void)state;
    fixture_open(&f);
    for (int i = 0; i < 3; i++) {
        f.logits[VOCAB - 1] = bad[i];
        assert_int_equal(draw(&f)->token, -1);
        assert_true(f.out.numeric);
    }
    f.logits[VOCAB - 1] = 3e38f; /* a penalty may overflow */
    f.tokens[0] = VOCAB - 1;
    f.p.repetition_penalty = 0.1f;
    assert_true(draw(&f)->numeric);
    f.p.repetition_penalty = 1.0f;
    assert_int_equal(draw(&f)->token, VOCAB - 1);
    f.p.temperature = 1e-30f; /* nearly greedy, no overflow */
    assert_int_equal(draw(&f)->token, VOCAB - 1);
    fixture_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_greedy),       cmocka_unit_test(test_distributions),
        cmocka_unit_test(test_ties),         cmocka_unit_test(test_random_numbers),
        cmocka_unit_test(test_independence), cmocka_unit_test(test_penalties),
        cmocka_unit_test(test_min_tokens),   cmocka_unit_test(test_logprobs),
        cmocka_unit_test(test_numeric),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
