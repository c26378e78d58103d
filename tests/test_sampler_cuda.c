/* Sampling on the device against model/sampler.c, sequence by sequence, on the same logits: random
 * rules, ties, crowded and flat logits, penalties, barred tokens, numbers that are none. */
#include "model/sampler.h"
#include "model/sampler_cuda.h"
#include "tests/cuda_case.h"

#include <cuda_runtime_api.h>

enum { MAX_SEQS = 160, MAX_KNOWN = 300, N_EOS = 2 };

static const int32_t eos[N_EOS] = {3, 5};

/* One launch: the logits and rules of some sequences, on the host and on the device. */
struct fixture {
    int32_t vocab, n_seqs;
    int type; /* of the logits */
    size_t ld;
    float *logits; /* [n_seqs, vocab], as the device's format holds them */
    struct batch_sampling sampling[MAX_SEQS];
    struct batch_seq seqs[MAX_SEQS];
    int32_t tokens[MAX_SEQS][MAX_KNOWN];
    struct batch_token out[MAX_SEQS];
};

/* How the logits of a launch lie. */
enum shape { BELL, FLAT, EQUAL, CROWDED, TWO_LEVELS, N_SHAPES };

static double draw_logit(enum shape shape, struct rng *rng)
{
    switch (shape) {
    case BELL: return 2.5 * rng_normal(rng);
    case FLAT: return 0.05 * rng_normal(rng);
    case EQUAL: return 1.25;
    case CROWDED:
        return rng_range(rng, 0, 5000) == 0 ? 20.0 * rng_normal(rng) : 1e-4 * rng_unit(rng);
    default: return rng_range(rng, 0, 2) ? -3.0 : 2.0;
    }
}

static struct fixture *fixture_make(int32_t vocab, int32_t n_seqs, int type, enum shape shape,
                                    struct rng *rng)
{
    struct fixture *f = host_alloc(sizeof *f);
    f->vocab = vocab;
    f->n_seqs = n_seqs;
    f->type = type;
    f->ld = (size_t)vocab + (size_t)(rng_range(rng, 0, 1) ? 0 : 5);
    f->logits = host_alloc((size_t)n_seqs * (size_t)vocab * sizeof *f->logits);
    for (size_t i = 0; i < (size_t)n_seqs * (size_t)vocab; i++) {
        float x = (float)draw_logit(shape, rng);
        f->logits[i] = type == SAMPLER_F32 ? x : from16(to16(x, type), type);
    }
    for (int32_t i = 0; i < n_seqs; i++) {
        const int32_t n_known = rng_range(rng, 1, MAX_KNOWN);
        f->sampling[i] = (struct batch_sampling){
            .top_p = 1.0f, .repetition_penalty = 1.0f, .seed = rng_u64(rng)};
        f->seqs[i] = (struct batch_seq){.tokens = f->tokens[i],
                                        .start = n_known - 1,
                                        .n_tokens = 1,
                                        .prompt_len = rng_range(rng, 1, n_known),
                                        .sample = true,
                                        .sampling = &f->sampling[i]};
        for (int32_t k = 0; k < MAX_KNOWN; k++) /* few ids, so that they repeat; some wild */
            f->tokens[i][k] = rng_range(rng, -1, vocab < 40 ? vocab : 40);
    }
    return f;
}

static void fixture_free(struct fixture *f)
{
    free(f->logits);
    free(f);
}

/* Rules at random; every feature off as often as on. */
static void random_rules(struct batch_sampling *p, struct rng *rng)
{
    static const float temperatures[] = {0.0f, 0.3f, 1.0f, 1.0f, 2.5f, 1e-30f};
    static const float top_p[] = {1.0f, 1.0f, 0.9f, 0.5f, 1e-6f, 0.999f};
    static const float min_p[] = {0.0f, 0.0f, 0.0f, 0.02f, 0.3f, 1.0f};
    static const int32_t top_k[] = {0, 0, 1, 7, 50, 3000};
    p->temperature = temperatures[rng_range(rng, 0, 5)];
    p->top_p = top_p[rng_range(rng, 0, 5)];
    p->min_p = min_p[rng_range(rng, 0, 5)];
    p->top_k = top_k[rng_range(rng, 0, 5)];
    if (rng_range(rng, 0, 1)) {
        p->repetition_penalty = (float)(0.5 + 1.5 * rng_unit(rng));
        p->presence_penalty = rng_range(rng, 0, 1) ? (float)rng_normal(rng) : 0.0f;
        p->frequency_penalty = rng_range(rng, 0, 1) ? (float)rng_normal(rng) : 0.0f;
    }
    p->n_logprobs = rng_range(rng, 0, 2) ? 0 : rng_range(rng, 1, BATCH_MAX_LOGPROBS + 3);
    p->min_tokens = rng_range(rng, 0, 1) ? 0 : rng_range(rng, 1, MAX_KNOWN);
    p->ignore_eos = rng_range(rng, 0, 2) == 0;
    p->n_stop = rng_range(rng, 0, BATCH_MAX_STOP);
    for (int32_t i = 0; i < p->n_stop; i++)
        p->stop_ids[i] = rng_range(rng, -1, 60);
}

/* Device memory of a launch. */
struct launch {
    struct sampler_cuda s;
    size_t workspace_bytes;
};

static void launch_open(struct launch *l, const struct fixture *f)
{
    const size_t n = (size_t)f->n_seqs, elem = f->type == SAMPLER_F32 ? 4 : 2;
    unsigned char *logits = host_alloc(n * f->ld * elem);
    struct sampler_cuda_seq *seqs = host_alloc(n * sizeof *seqs);
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < (size_t)f->vocab; k++) {
            const float x = f->logits[i * (size_t)f->vocab + k];
            const uint16_t h = to16(x, f->type);
            memcpy(logits + (i * f->ld + k) * elem, elem == 4 ? (const void *)&x : &h, elem);
        }
        memset(&seqs[i], 0xff, sizeof seqs[i]);
        sampler_cuda_set(&seqs[i], &f->seqs[i], (int32_t)i, (int64_t)i * MAX_KNOWN, eos, N_EOS);
    }
    l->workspace_bytes = sampler_cuda_workspace_bytes(f->vocab, f->n_seqs);
    l->s = (struct sampler_cuda){.logits = device_copy(logits, n * f->ld * elem),
                                 .ld = (int64_t)f->ld,
                                 .logits_type = f->type,
                                 .vocab = f->vocab,
                                 .n_seqs = f->n_seqs,
                                 .seqs = device_copy(seqs, n * sizeof *seqs),
                                 .tokens = device_copy(f->tokens, n * sizeof f->tokens[0]),
                                 .workspace = device_copy(NULL, l->workspace_bytes),
                                 .out = device_copy(NULL, n * sizeof(struct batch_token))};
    free(logits), free(seqs);
}

static void launch_close(struct launch *l, struct fixture *f)
{
    device_take(f->out, l->s.out, (size_t)f->n_seqs * sizeof *f->out);
    dev_release(dev, (void *)l->s.logits, 1), dev_release(dev, (void *)l->s.seqs, 1);
    dev_release(dev, (void *)l->s.tokens, 1), dev_release(dev, l->s.workspace, 1);
}

static void assert_near(float got, float want)
{
    if (got != want) /* both may be -inf */
        assert_close((double)got, (double)want, 1e-6, 1e-6);
}

static void compare(const struct fixture *f, int32_t i, const struct batch_token *want)
{
    const struct batch_token *got = &f->out[i];
    const struct batch_sampling *p = &f->sampling[i];
    if (got->token != want->token || got->numeric != want->numeric || got->n_top != want->n_top)
        fail_msg(
            "vocab %d seq %d: token %d numeric %d n_top %d, want %d %d %d (T %g top_p %g min_p "
            "%g top_k %d)",
            f->vocab, i, got->token, got->numeric, got->n_top, want->token, want->numeric,
            want->n_top, (double)p->temperature, (double)p->top_p, (double)p->min_p, p->top_k);
    assert_near(got->logprob, want->logprob);
    for (int32_t k = 0; k < want->n_top; k++) {
        assert_int_equal(got->top_ids[k], want->top_ids[k]);
        assert_near(got->top_logprobs[k], want->top_logprobs[k]);
    }
}

/* Draws on both and compares. greedy: by the kernel for plain sequences. */
static void check(struct fixture *f, bool greedy)
{
    struct launch l;
    struct sampler *cpu = NULL;
    launch_open(&l, f);
    void *stream = dev_cuda_stream(dev);
    assert_int_equal(greedy ? sampler_cuda_greedy(&l.s, stream) : sampler_cuda_draw(&l.s, stream),
                     0);
    launch_close(&l, f);
    assert_ok(sampler_create(&cpu, f->vocab, 1, eos, N_EOS));
    for (int32_t i = 0; i < f->n_seqs; i++) {
        struct batch_token want;
        sampler_draw(cpu, 0, &want, f->logits + (size_t)i * (size_t)f->vocab, &f->seqs[i]);
        compare(f, i, &want);
    }
    sampler_destroy(cpu);
}

static void test_random_rules(void **state)
{
    static const struct {
        int32_t vocab, n_seqs;
    } cases[] = {{1, 40},     {2, 80},      {40, 160},    {1024, 160},
                 {3079, 160}, {32000, 100}, {128256, 40}, {1 << 18, 12}};
    struct rng rng = test_rng("sampler cuda rules", 331);
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int type = SAMPLER_BF16; type <= SAMPLER_F32; type++) {
            if (cases[i].vocab > 100000 && type == SAMPLER_F16)
                continue; /* the reference takes its time */
            struct fixture *f = fixture_make(cases[i].vocab, cases[i].n_seqs, type, BELL, &rng);
            for (int32_t k = 0; k < f->n_seqs; k++)
                random_rules(&f->sampling[k], &rng);
            check(f, false);
            fixture_free(f);
        }
    }
}

/* Logits that all fall into few bins, so that these must be split, and long runs of ties. */
static void test_shapes(void **state)
{
    struct rng rng = test_rng("sampler cuda shapes", 332);
    (void)state;
    for (enum shape shape = FLAT; shape < N_SHAPES; shape++) {
        struct fixture *f = fixture_make(50000, 24, SAMPLER_F32, shape, &rng);
        for (int32_t k = 0; k < f->n_seqs; k++)
            random_rules(&f->sampling[k], &rng);
        check(f, false);
        fixture_free(f);
    }
}

static void test_greedy(void **state)
{
    static const int32_t vocabs[] = {1, 5, 1000, 4096, 128256, 128257};
    struct rng rng = test_rng("sampler cuda greedy", 333);
    (void)state;
    for (size_t i = 0; i < sizeof vocabs / sizeof *vocabs; i++) {
        for (int type = SAMPLER_BF16; type <= SAMPLER_F32; type++) {
            const size_t n = (size_t)vocabs[i];
            struct fixture *f = fixture_make(vocabs[i], 8, type, i % 2 ? EQUAL : BELL, &rng);
            f->logits[n + (size_t)rng_range(&rng, 0, vocabs[i] - 1)] = NAN;
            f->logits[3 * n + (size_t)rng_range(&rng, 0, vocabs[i] - 1)] = INFINITY;
            f->logits[4 * n + n - 1] = -INFINITY;
            for (size_t k = 0; k < n; k++)
                f->logits[6 * n + k] = -60000.0f; /* bf16 rounds it, as it does everywhere */
            f->logits[7 * n + n / 2] = 60000.0f;
            for (size_t k = 0; k < 8 * n && type != SAMPLER_F32; k++)
                f->logits[k] = from16(to16(f->logits[k], type), type);
            for (int32_t k = 0; k < f->n_seqs; k++)
                assert_true(sampler_cuda_is_plain(&f->sampling[k]));
            check(f, true);
            assert_true(f->out[1].numeric && f->out[3].numeric && f->out[4].numeric);
            assert_int_equal(f->out[7].token, n / 2);
            check(f, false); /* the other kernel agrees */
            fixture_free(f);
        }
    }
}

static void test_numeric(void **state)
{
    struct rng rng = test_rng("sampler cuda numeric", 334);
    struct fixture *f = fixture_make(4, 4, SAMPLER_F32, BELL, &rng);
    (void)state;
    for (int32_t i = 0; i < 4; i++) {
        f->sampling[i].temperature = 1.0f;
        f->sampling[i].top_k = 2;
        f->sampling[i].n_logprobs = 4;
    }
    for (int k = 0; k < 4; k++) { /* every token is barred */
        f->sampling[0].stop_ids[f->sampling[0].n_stop++] = k;
        f->sampling[0].min_tokens = 1000;
    }
    f->logits[4 + 2] = 3e38f; /* a penalty overflows */
    f->tokens[1][0] = 2;
    f->sampling[1].repetition_penalty = 0.1f;
    f->logits[8] = -3e38f, f->logits[9] = 3e38f; /* the whole range is finite, its width is not */
    f->sampling[3].min_tokens = 1000;            /* one token is left */
    f->sampling[3].n_stop = 3;
    memcpy(f->sampling[3].stop_ids, (int32_t[]){0, 1, 3}, 3 * sizeof(int32_t));
    check(f, false);
    assert_true(f->out[0].numeric && f->out[1].numeric && !f->out[2].numeric);
    assert_int_equal(f->out[3].token, 2);
    assert_int_equal(f->out[3].n_top, 1);
    fixture_free(f);
}

/* Padding rows draw nothing; a captured graph reads its inputs anew and gives the same bits. */
static void test_graph(void **state)
{
    struct rng rng = test_rng("sampler cuda graph", 335);
    struct fixture *f = fixture_make(32000, 16, SAMPLER_BF16, BELL, &rng);
    const size_t bytes = (size_t)f->n_seqs * sizeof(struct batch_token);
    struct batch_token *direct = host_alloc(bytes), *replayed = host_alloc(bytes);
    cudaStream_t stream = dev_cuda_stream(dev);
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    struct launch l;
    (void)state;
    for (int32_t k = 0; k < f->n_seqs; k++)
        random_rules(&f->sampling[k], &rng);
    launch_open(&l, f);
    struct sampler_cuda_seq pad = {.row = -1};
    assert_ok(dev_upload(dev, (struct sampler_cuda_seq *)l.s.seqs + 5, &pad, sizeof pad));
    assert_int_equal(sampler_cuda_draw(&l.s, stream), 0);
    assert_ok(dev_download(dev, direct, l.s.out, bytes));
    assert_int_equal(direct[5].token, -1);
    assert_false(direct[5].numeric);
    assert_int_equal(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), 0);
    assert_int_equal(sampler_cuda_draw(&l.s, stream), 0);
    assert_int_equal(cudaStreamEndCapture(stream, &graph), 0);
    assert_int_equal(cudaGraphInstantiate(&exec, graph, 0), 0);
    for (int i = 0; i < 20; i++) {
        memset(replayed, 0xff, bytes);
        assert_ok(dev_upload(dev, l.s.out, replayed, bytes));
        assert_int_equal(cudaGraphLaunch(exec, stream), 0);
        assert_ok(dev_download(dev, replayed, l.s.out, bytes));
        assert_memory_equal(replayed, direct, bytes);
    }
    assert_int_equal(sampler_cuda_greedy(&l.s, stream), 0);
    assert_ok(dev_download(dev, replayed, l.s.out, bytes));
    assert_int_equal(replayed[5].token, -1);
    cudaGraphExecDestroy(exec), cudaGraphDestroy(graph);
    launch_close(&l, f);
    free(direct), free(replayed);
    fixture_free(f);
}

static void test_refusals(void **state)
{
    const struct sampler_cuda wide = {.vocab = SAMPLER_MAX_VOCAB + 1, .ld = 1 << 20, .n_seqs = 1};
    const struct sampler_cuda none = {.vocab = 10, .ld = 10, .n_seqs = 0};
    (void)state;
    assert_true(sampler_cuda_draw(&wide, NULL) != 0);
    assert_true(sampler_cuda_greedy(&wide, NULL) != 0);
    assert_int_equal(sampler_cuda_draw(&none, NULL), 0);
    assert_int_equal(sampler_cuda_greedy(&none, NULL), 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest all[] = {
        cmocka_unit_test(test_shapes), cmocka_unit_test(test_numeric),
        cmocka_unit_test(test_graph),  cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_greedy), cmocka_unit_test(test_random_rules),
    };
    const struct CMUnitTest quick[] = {
        /* the reduced set for compute-sanitizer */
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_numeric),
        cmocka_unit_test(test_graph),
        cmocka_unit_test(test_refusals),
    };
    if (!have_device())
        return 77;
    const int failed = argc > 1 && !strcmp(argv[1], "quick")
                           ? cmocka_run_group_tests(quick, NULL, NULL)
                           : cmocka_run_group_tests(all, NULL, NULL);
    dev_close(dev);
    return failed;
}
