/* The graph on a GPU beside the CPU's in f32: logits of random models and of the needle model, with
 * chunks, batches, captured steps, gates; what a GPU refuses. The bound on logits is what 16-bit
 * activations cost: rounding of 2^-9 (bf16) or 2^-12 (f16), some ten times a layer. */
#include "core/dev_cuda.h"
#include "model/sampler.h"
#include "tests/model_case.h"
#include "tests/test.h"
#include "tests/tiny_model.h"

#include <jansson.h>

enum { MAX_LEN = 1024, PAGES_PER_SEQ = MAX_LEN / KV_PAGE_TOKENS, N_SEQS = 5, MAX_VOCAB = 1024 };

static struct tiny_model tiny[] = {
    {512, 256, 512, 3, 4, 2, 64, .tied = true, .dtype = DTYPE_BF16, .seed = 1},
    {768, 256, 384, 2, 4, 1, 128, .biases = true, .llama3 = true, .dtype = DTYPE_BF16, .seed = 2},
    {512, 512, 1024, 2, 8, 4, 64, .llama3 = true, .dtype = DTYPE_F16, .seed = 3},
    {512, 256, 512, 1, 4, 2, 64, .dtype = DTYPE_BF16, .seed = 4},
};
enum { N_TINY = sizeof tiny / sizeof *tiny };

static void open_on(struct model_case *c, const struct dev_ops *ops, const char *dir)
{
    struct err_msg why = {{0}};
    *c = (struct model_case){0};
    assert_ok(dev_open(&c->dev, ops, 0, 2, &why));
    const struct model_config cfg = {.dir = dir,
                                     .dev = c->dev,
                                     .dtype = MODEL_DTYPE_AUTO,
                                     .kv_dtype = MODEL_DTYPE_AUTO,
                                     .max_seqs = CASE_MAX_SEQS,
                                     .max_tokens = 2 * MAX_LEN,
                                     .max_position = MAX_LEN};
    int err = model_open(&c->model, &cfg, &why);
    if (err == 0)
        err = model_take_pages(c->model, N_SEQS * PAGES_PER_SEQ, &why);
    if (err < 0)
        fail_msg("%s: %s", dir, err_why(&why, err));
    c->result = (struct batch_result){.tokens = c->tokens, .counts = c->counts};
}

/* A CPU and a GPU model of one folder, and sequences that both know. */
struct pair {
    struct model_case cpu, gpu;
    struct rng rng;
    int32_t vocab;
    int32_t tokens[N_SEQS][MAX_LEN];
    int32_t prompt[N_SEQS]; /* lengths */
    int32_t pages[N_SEQS][PAGES_PER_SEQ];
    double worst;
};

static void open_pair(struct pair *p, const char *dir, uint64_t seed)
{
    int32_t all[N_SEQS * PAGES_PER_SEQ];
    memset(p, 0, sizeof *p);
    p->rng = (struct rng){seed};
    open_on(&p->cpu, &dev_cpu, dir);
    open_on(&p->gpu, &dev_cuda, dir);
    p->vocab = model_info(p->gpu.model)->vocab_size;
    assert_true(p->vocab <= MAX_VOCAB);
    for (int32_t i = 0; i < N_SEQS * PAGES_PER_SEQ; i++)
        all[i] = i;
    for (int32_t i = N_SEQS * PAGES_PER_SEQ - 1; i > 0; i--) {
        int32_t j = rng_range(&p->rng, 0, i), t = all[i];
        all[i] = all[j];
        all[j] = t;
    }
    memcpy(p->pages, all, sizeof all);
    for (int32_t i = 0; i < N_SEQS; i++) {
        p->prompt[i] = i == 0 ? 1 : rng_range(&p->rng, 130 * i, 180 * i);
        for (int32_t k = 0; k < MAX_LEN; k++)
            p->tokens[i][k] = rng_range(&p->rng, 3, p->vocab - 1);
    }
}

static void close_pair(struct pair *p)
{
    model_case_close(&p->cpu);
    model_case_close(&p->gpu);
}

static struct batch_seq rows_of(const struct pair *p, int32_t i, int32_t start, int32_t n)
{
    return case_seq(p->tokens[i], start, n, p->prompt[i], p->pages[i], PAGES_PER_SEQ);
}

static double difference(const float *got, const float *want, int32_t n)
{
    double diff = 0.0, most = 0.0;
    for (int32_t i = 0; i < n; i++) {
        if (!isfinite(got[i]))
            return INFINITY;
        diff = fmax(diff, fabs((double)got[i] - (double)want[i]));
        most = fmax(most, fabs((double)want[i]));
    }
    return diff / most;
}

/* One step on both; all its logits agree to `bound`, and so do tokens where the margin allows. */
static void both(struct pair *p, const struct batch_seq *seqs, int32_t n, double bound)
{
    assert_ok(case_step(&p->cpu, seqs, n));
    assert_ok(case_step(&p->gpu, seqs, n));
    for (int32_t i = 0; i < n; i++) {
        const float *want = model_last_logits(p->cpu.model, i);
        const float *got = model_last_logits(p->gpu.model, i);
        assert_true(!got == !want && !got == !seqs[i].sample);
        if (!got)
            continue;
        const double d = difference(got, want, p->vocab);
        if (!(d <= bound))
            fail_msg("sequence %d of %d, %d + %d tokens: relative difference %.3g", i, n,
                     seqs[i].start, seqs[i].n_tokens, d);
        p->worst = fmax(p->worst, d);
        int32_t best = 0;
        for (int32_t k = 1; k < p->vocab; k++)
            best = got[k] > got[best] ? k : best;
        assert_int_equal(p->gpu.tokens[i].token, best); /* the device's own choice */
    }
}

static double bound_of(const struct tiny_model *t)
{
    return t->dtype == DTYPE_F16 ? 0.01 : 0.05;
}

/* Prompts whole, then a few steps of all sequences together, which are captured ones. */
static void run_prompts(struct pair *p, double bound)
{
    struct batch_seq seqs[N_SEQS];
    for (int32_t i = 0; i < N_SEQS; i++)
        seqs[i] = rows_of(p, i, 0, p->prompt[i]);
    both(p, seqs, N_SEQS, bound);
    for (int32_t step = 0; step < 4; step++) {
        const int32_t n = N_SEQS - step; /* other buckets, too */
        for (int32_t i = 0; i < n; i++)
            seqs[i] = rows_of(p, i, p->prompt[i] + step, 1);
        both(p, seqs, n, bound);
    }
}

/* The same prompts in chunks that are mixed with generated tokens of other sequences. */
static void run_mixed(struct pair *p, double bound)
{
    struct batch_seq seqs[N_SEQS];
    int32_t at[N_SEQS] = {0};
    for (int32_t step = 0; step < 12; step++) {
        for (int32_t i = 0; i < N_SEQS; i++) {
            const int32_t left = p->prompt[i] - at[i];
            const int32_t chunk = rng_range(&p->rng, 1, 200);
            seqs[i] = rows_of(p, i, at[i],
                              left <= 0      ? rng_range(&p->rng, 1, 12)
                              : left < chunk ? left
                                             : chunk);
            seqs[i].sample = left <= chunk;
            at[i] += seqs[i].n_tokens;
        }
        both(p, seqs, N_SEQS, bound);
    }
}

static void test_logits(void **state)
{
    (void)state;
    for (int i = 0; i < N_TINY; i++) {
        struct pair p;
        tiny_model_write(&tiny[i]);
        open_pair(&p, tiny[i].dir, 100 + (uint64_t)i);
        run_prompts(&p, bound_of(&tiny[i]));
        run_mixed(&p, bound_of(&tiny[i]));
        printf("# model %d (%s): relative difference %.2e\n", i, dtype_name(tiny[i].dtype),
               p.worst);
        close_pair(&p);
        tiny_model_remove(&tiny[i]);
    }
}

/* The mass lost by rows and heads, whose scores have the precision of 16 bits on the GPU. */
static void same_lost(const struct batch_counts *gpu, const struct batch_counts *cpu)
{
    assert_int_equal(gpu->sampled, cpu->sampled);
    assert_close(gpu->lost, cpu->lost, 0.01 * (double)cpu->sampled, 0);
    assert_true((gpu->lost > 0) == (cpu->lost > 0));
}

/* T = -inf gives the dense logits, T = +inf the diagonal's as the CPU has them; REL likewise with
 * lambda 0 and 1. Counters and lost mass of the two devices agree where decisions cannot be close.
 */
static void gated_step(struct pair *p, struct batch_policy policy, bool lost, double bound)
{
    struct batch_seq seqs[N_SEQS];
    for (int32_t i = 0; i < N_SEQS; i++) {
        seqs[i] = rows_of(p, i, 0, p->prompt[i]);
        seqs[i].policy =
            i == 1 ? (struct batch_policy){.gate = BATCH_DENSE, .gate_rows = 128} : policy;
        seqs[i].policy.lost_mass = lost && i > 0;
    }
    both(p, seqs, N_SEQS, bound);
    for (int32_t i = 0; i < N_SEQS; i++) {
        assert_int_equal(p->gpu.counts[i].reachable, p->cpu.counts[i].reachable);
        assert_int_equal(p->gpu.counts[i].visited, p->cpu.counts[i].visited);
        assert_int_equal(p->gpu.counts[i].kept, p->cpu.counts[i].kept);
        same_lost(&p->gpu.counts[i], &p->cpu.counts[i]);
    }
}

/* REL of the first level of these densities, 0 or 1 by layer and head, so steered that no score is
 * near a decision: the first page is skipped; of a density of 1 all others are kept, of 0 none. */
static const struct batch_policy steered = {
    .gate = BATCH_REL, .gate_rows = 128, .ln_lambda = 30, .steer = 100};

/* Under levels 0 and 1, open and closed. */
static void gated_steps(struct pair *p, bool lost, double bound)
{
    const struct batch_policy policies[] = {
        {.gate = BATCH_ABS, .gate_rows = 128, .level = 0},
        {.gate = BATCH_ABS, .gate_rows = 128, .level = 1},
        {.gate = BATCH_ABS, .gate_rows = 64, .level = 1},
        {.gate = BATCH_REL, .gate_rows = 128, .ln_lambda = -INFINITY},
    };
    for (size_t i = 0; i < sizeof policies / sizeof *policies; i++)
        gated_step(p, policies[i], lost, bound);
    gated_step(p, steered, lost, bound);
}

static void test_gates(void **state)
{
    enum { BLOCKS = 3 };
    static float t[2][2][8][BLOCKS]; /* levels, layers, heads */
    float densities[2][2][8];
    struct attn_head_policy heads[2 * 8];
    struct pair p;
    struct tiny_model *m = &tiny[2];
    (void)state;
    for (size_t i = 0; i < sizeof t[0] / sizeof(float); i++) {
        (&t[0][0][0][0])[i] = -INFINITY;
        (&t[1][0][0][0])[i] = INFINITY;
    }
    for (int i = 0; i < 16; i++)
        heads[i] = (struct attn_head_policy){
            (uint8_t)(i % 3 ? ATTN_VISIT_ALL : ATTN_VISIT_SINK_LOCAL), 1, 1 + i / 8};
    const struct attn_policy policy = {.abs = {.t = &t[0][0][0][0],
                                               .n_levels = 2,
                                               .n_layers = 2,
                                               .n_heads = 8,
                                               .n_blocks = BLOCKS,
                                               .level_stride = 2 * 8 * BLOCKS,
                                               .layer_stride = 8 * BLOCKS,
                                               .head_stride = BLOCKS}};
    for (int i = 0; i < 16; i++)
        densities[0][i / 8][i % 8] = densities[1][i / 8][i % 8] = (float)((i / 8 + i) % 2);
    tiny_model_write(m);
    open_pair(&p, m->dir, 7);
    for (int visit = 0; visit < 2; visit++) {
        struct attn_policy with = policy;
        with.rel_128 = (struct attn_thresholds){&densities[0][0][0], 2, 2, 8, 1, 16, 8, 1};
        with.heads = visit ? heads : NULL;
        assert_ok(model_set_policy(p.cpu.model, &with, NULL));
        assert_ok(model_set_policy(p.gpu.model, &with, NULL));
        for (int lost = 0; lost < 2; lost++)
            gated_steps(&p, lost, bound_of(m));
        run_prompts(&p, bound_of(m)); /* captured anew under this policy */
    }
    const struct attn_counts *gpu = model_head_counts(p.gpu.model);
    const struct attn_counts *cpu = model_head_counts(p.cpu.model);
    for (int i = 0; i < 16; i++) {
        assert_int_equal(gpu[i].reachable, cpu[i].reachable);
        assert_int_equal(gpu[i].kept, cpu[i].kept);
    }
    close_pair(&p);
    tiny_model_remove(m);
}

enum { DECODE_LEVELS = 4, DECODE_BLOCKS = 4 };

/* Thresholds of generated tokens for tiny[2]: -inf, +inf, by head (of two that share a KV head one
 * is dense), and by layer and block. None is near a score. */
static struct attn_policy decode_policy(float t[DECODE_LEVELS][2][8][DECODE_BLOCKS])
{
    for (int l = 0; l < 2; l++) {
        for (int h = 0; h < 8; h++) {
            for (int b = 0; b < DECODE_BLOCKS; b++) {
                t[0][l][h][b] = -INFINITY;
                t[1][l][h][b] = INFINITY;
                t[2][l][h][b] = h % 2 ? INFINITY : -INFINITY;
                t[3][l][h][b] = (l + b) % 2 ? INFINITY : -INFINITY;
            }
        }
    }
    return (struct attn_policy){.decode = {.t = &t[0][0][0][0],
                                           .n_levels = DECODE_LEVELS,
                                           .n_layers = 2,
                                           .n_heads = 8,
                                           .n_blocks = DECODE_BLOCKS,
                                           .level_stride = 2 * 8 * DECODE_BLOCKS,
                                           .layer_stride = 8 * DECODE_BLOCKS,
                                           .head_stride = DECODE_BLOCKS}};
}

/* level -1: no gate. */
static struct batch_seq generated(const struct pair *p, int32_t i, int32_t step, int32_t n,
                                  int level)
{
    struct batch_seq s = rows_of(p, i, p->prompt[i] + step, n);
    s.policy = (struct batch_policy){.gate = BATCH_DENSE,
                                     .gate_rows = 128,
                                     .decode_gate = level < 0 ? BATCH_DENSE : BATCH_ABS,
                                     .decode_level = (int16_t)(level < 0 ? 0 : level)};
    return s;
}

static void same_counts(const struct pair *p, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        assert_int_equal(p->gpu.counts[i].reachable, p->cpu.counts[i].reachable);
        assert_int_equal(p->gpu.counts[i].visited, p->cpu.counts[i].visited);
        assert_int_equal(p->gpu.counts[i].kept, p->cpu.counts[i].kept);
    }
}

static void open_decode(struct pair *p, float t[DECODE_LEVELS][2][8][DECODE_BLOCKS])
{
    struct batch_seq seqs[N_SEQS];
    const struct attn_policy policy = decode_policy(t);
    tiny_model_write(&tiny[2]);
    open_pair(p, tiny[2].dir, 17);
    assert_ok(model_set_policy(p->cpu.model, &policy, NULL));
    assert_ok(model_set_policy(p->gpu.model, &policy, NULL));
    for (int32_t i = 0; i < N_SEQS; i++)
        seqs[i] = rows_of(p, i, 0, p->prompt[i]);
    both(p, seqs, N_SEQS, bound_of(&tiny[2]));
}

/* A step of n sequences; the others follow in one without a gate. */
struct decode_step {
    int32_t n, rows;
    int levels[N_SEQS];
};

static const struct decode_step decode_steps[] = {
    {5, 1, {1, 1, 1, 1, 1}},     {4, 1, {-1, -1, -1, -1}}, {3, 1, {2, 2, 2}},
    {5, 1, {-1, 1, -1, 2, 3}},   {5, 1, {3, 3, 3, 3, 3}},  {4, 1, {0, 0, 0, 0}},
    {5, 1, {-1, -1, -1, -1, 1}}, {5, 1, {3, 2, 1, 0, -1}}, {4, 5, {2, -1, 1, 3}}, /* not captured */
    {5, 8, {-1, 3, 2, 1, 2}},    {5, 9, {3, 2, 3, 1, 2}}, /* more than the decode kernel takes of a
                                                             sequence at once */
    {5, 100, {2, 3, 2, 3, 1}},
};

/* Generated tokens under their gate as on the CPU: captured steps with a gate and without in turn,
 * batches of both, and steps of several tokens. */
static void test_decode_gates(void **state)
{
    static float t[DECODE_LEVELS][2][8][DECODE_BLOCKS];
    struct batch_seq seqs[N_SEQS];
    struct pair p;
    uint64_t kept = 0, reachable = 0;
    int32_t at = 0;
    (void)state;
    open_decode(&p, t);
    for (size_t k = 0; k < sizeof decode_steps / sizeof *decode_steps; k++) {
        const struct decode_step *step = &decode_steps[k];
        for (int32_t i = 0; i < N_SEQS; i++)
            seqs[i] = generated(&p, i, at, step->rows, i < step->n ? step->levels[i] : -1);
        both(&p, seqs, step->n, bound_of(&tiny[2]));
        same_counts(&p, step->n);
        for (int32_t i = 0; i < step->n; i++) {
            kept += p.gpu.counts[i].kept;
            reachable += p.gpu.counts[i].reachable;
        }
        if (step->n < N_SEQS)
            both(&p, seqs + step->n, N_SEQS - step->n, bound_of(&tiny[2]));
        at += step->rows;
    }
    assert_true(kept < reachable);
    for (int i = 0; i < 16; i++)
        assert_int_equal(model_head_counts(p.gpu.model)[i].kept,
                         model_head_counts(p.cpu.model)[i].kept);
    printf("# gated decode: relative difference %.2e\n", p.worst);
    close_pair(&p);
    tiny_model_remove(&tiny[2]);
}

/* One step of all sequences on the GPU; its logits into out. */
static void step_bits(struct pair *p, const int *levels, float (*out)[MAX_VOCAB])
{
    struct batch_seq seqs[N_SEQS];
    for (int32_t i = 0; i < N_SEQS; i++)
        seqs[i] = generated(p, i, 0, 1, levels[i]);
    assert_ok(case_step(&p->gpu, seqs, N_SEQS));
    for (int32_t i = 0; i < N_SEQS; i++)
        memcpy(out[i], model_last_logits(p->gpu.model, i), (size_t)p->vocab * sizeof(float));
}

/* Bits: T = -inf is no gate, sequences without one do not notice those with one, and captured steps
 * of both kinds leave nothing behind. */
static void test_decode_bits(void **state)
{
    static float t[DECODE_LEVELS][2][8][DECODE_BLOCKS];
    static float dense[N_SEQS][MAX_VOCAB], got[N_SEQS][MAX_VOCAB], gated[N_SEQS][MAX_VOCAB];
    static const int none[N_SEQS] = {-1, -1, -1, -1, -1}, open[N_SEQS] = {0};
    static const int all[N_SEQS] = {1, 1, 1, 1, 1}, some[N_SEQS] = {-1, 1, 0, -1, 1};
    struct pair p;
    (void)state;
    open_decode(&p, t);
    const size_t bytes = (size_t)p.vocab * sizeof(float);
    step_bits(&p, none, dense);
    step_bits(&p, all, gated);
    for (int round = 0; round < 3; round++) {
        step_bits(&p, open, got);
        for (int32_t i = 0; i < N_SEQS; i++)
            assert_memory_equal(got[i], dense[i], bytes);
        step_bits(&p, some, got);
        for (int32_t i = 0; i < N_SEQS; i++)
            assert_memory_equal(got[i], some[i] > 0 ? gated[i] : dense[i], bytes);
        step_bits(&p, none, got);
        for (int32_t i = 0; i < N_SEQS; i++)
            assert_memory_equal(got[i], dense[i], bytes);
    }
    assert_true(memcmp(gated[4], dense[4], bytes) != 0);
    close_pair(&p);
    tiny_model_remove(&tiny[2]);
}

static const struct batch_sampling samplings[] = {
    {.temperature = 0.8f, .top_p = 0.9f, .repetition_penalty = 1.3f, .seed = 1, .ignore_eos = true},
    {.top_p = 1.0f, .repetition_penalty = 1.0f, .n_logprobs = 3, .ignore_eos = true},
    {.temperature = 1.5f, .top_p = 1.0f, .top_k = 20, .repetition_penalty = 1.0f, .seed = 9},
    {.top_p = 1.0f,
     .repetition_penalty = 1.0f,
     .presence_penalty = 0.7f,
     .frequency_penalty = 0.2f,
     .min_tokens = 4},
};

/* The device draws what the CPU's sampler draws from the same logits. */
static void check_draws(struct pair *p, struct sampler *sampler, const struct batch_seq *seqs,
                        int32_t n)
{
    assert_ok(case_step(&p->gpu, seqs, n));
    for (int32_t i = 0; i < n; i++) {
        struct batch_token want = {.token = -1};
        const struct batch_token *got = &p->gpu.tokens[i];
        if (seqs[i].sample)
            sampler_draw(sampler, 0, &want, model_last_logits(p->gpu.model, i), &seqs[i]);
        assert_int_equal(got->token, want.token);
        assert_int_equal(got->n_top, want.n_top);
        for (int32_t k = 0; k < want.n_top; k++) {
            assert_int_equal(got->top_ids[k], want.top_ids[k]);
            assert_close((double)got->top_logprobs[k], (double)want.top_logprobs[k], 1e-4, 1e-4);
        }
    }
}

static void test_draws(void **state)
{
    static const int32_t eos[] = {2};
    struct batch_seq seqs[N_SEQS];
    struct sampler *sampler;
    struct pair p;
    (void)state;
    tiny_model_write(&tiny[2]);
    open_pair(&p, tiny[2].dir, 11);
    assert_ok(sampler_create(&sampler, p.vocab, 1, eos, 1));
    for (int32_t step = 0; step < 6; step++) {
        for (int32_t i = 0; i < N_SEQS; i++) {
            seqs[i] = step == 0 ? rows_of(&p, i, 0, p.prompt[i])
                                : rows_of(&p, i, p.prompt[i] + step - 1, 1);
            seqs[i].sample = step % 3 != 1 || i != 1;
            if (i > 0)
                seqs[i].sampling = &samplings[i - 1];
        }
        check_draws(&p, sampler, seqs, N_SEQS);
        seqs[0].sample = false; /* a step without any token */
        check_draws(&p, sampler, seqs, 1);
    }
    sampler_destroy(sampler);
    close_pair(&p);
    tiny_model_remove(&tiny[2]);
}

static int32_t read_ids(const json_t *list, int32_t *ids)
{
    int32_t n = (int32_t)json_array_size(list);
    for (int32_t i = 0; i < n; i++)
        ids[i] = (int32_t)json_integer_value(json_array_get(list, (size_t)i));
    return n;
}

/* transformers' own greedy tokens. */
static void test_needle(void **state)
{
    struct pair p;
    json_t *root = json_load_file(TEST_DATA "/llama/needle.json", 0, NULL);
    const json_t *cases = json_object_get(root, "cases");
    (void)state;
    open_pair(&p, TEST_ROOT "/models/needle", 3);
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *k = json_array_get(cases, i);
        int32_t greedy[16];
        const int32_t n = read_ids(json_object_get(k, "prompt"), p.tokens[0]);
        assert_int_equal(read_ids(json_object_get(k, "greedy16"), greedy), 16);
        p.prompt[0] = n;
        for (int32_t step = 0; step < 16; step++) {
            const int32_t start = step == 0 ? 0 : n + step - 1;
            struct batch_seq s = rows_of(&p, 0, start, n + step - start);
            both(&p, &s, 1, 0.05);
            assert_int_equal(p.gpu.tokens[0].token, greedy[step]);
            p.tokens[0][n + step] = greedy[step];
        }
    }
    printf("# needle: relative difference %.2e\n", p.worst);
    close_pair(&p);
    json_decref(root);
}

/* A step must not depend on what the ones before it left behind. */
static void test_repeat(void **state)
{
    static float first[MAX_VOCAB];
    struct pair p;
    (void)state;
    tiny_model_write(&tiny[0]);
    open_pair(&p, tiny[0].dir, 5);
    for (int round = 0; round < 3; round++) {
        struct batch_seq s = rows_of(&p, 3, 0, p.prompt[3]);
        assert_ok(case_step(&p.gpu, &s, 1));
        s = rows_of(&p, 3, p.prompt[3], 1);
        assert_ok(case_step(&p.gpu, &s, 1));
        assert_true(p.gpu.result.total_us >= p.gpu.result.host_us);
        if (round == 0)
            memcpy(first, model_last_logits(p.gpu.model, 0), (size_t)p.vocab * sizeof *first);
        else
            assert_memory_equal(first, model_last_logits(p.gpu.model, 0),
                                (size_t)p.vocab * sizeof *first);
    }
    close_pair(&p);
    tiny_model_remove(&tiny[0]);
}

static void refuses(struct dev *d, const char *dir, int dtype, int kv_dtype, const char *text)
{
    struct err_msg why = {{0}};
    struct model *m = NULL;
    const struct model_config cfg = {.dir = dir,
                                     .dev = d,
                                     .dtype = dtype,
                                     .kv_dtype = kv_dtype,
                                     .max_seqs = 1,
                                     .max_tokens = 128,
                                     .max_position = 128};
    assert_int_equal(model_open(&m, &cfg, &why), ERR_UNSUPPORTED);
    if (!strstr(why.text, text))
        fail_msg("'%s' does not say '%s'", why.text, text);
}

static void test_refusals(void **state)
{
    struct dev *d;
    (void)state;
    assert_ok(dev_open(&d, &dev_cuda, 0, 1, NULL));
    refuses(d, TEST_ROOT "/models/needle", DTYPE_F32, MODEL_DTYPE_AUTO, "not in f32");
    refuses(d, TEST_ROOT "/models/needle", MODEL_DTYPE_AUTO, DTYPE_F32, "a cache in bf16");
    refuses(d, TEST_DATA "/llama/head_dim_256", MODEL_DTYPE_AUTO, MODEL_DTYPE_AUTO, "head_dim 256");
    dev_close(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_logits),       cmocka_unit_test(test_gates),
        cmocka_unit_test(test_decode_gates), cmocka_unit_test(test_decode_bits),
        cmocka_unit_test(test_draws),        cmocka_unit_test(test_needle),
        cmocka_unit_test(test_repeat),       cmocka_unit_test(test_refusals),
    };
    struct dev *d;
    if (dev_cuda_count() == 0 || dev_open(&d, &dev_cuda, 0, 1, NULL) < 0)
        return 77;
    dev_close(d);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
