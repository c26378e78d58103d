/* The same tokens give the same bits: a reference run takes each sequence alone, the prompt in one
 * chunk and then token by token; random runs cut the same sequences into random chunks (aligned
 * where gated), mix them into batches in random order, compute generated tokens anew in chunks, use
 * other pages and other thread counts. Wherever a run asks for logits, they are the reference's. */
#include "core/mem.h"
#include "tests/model_case.h"
#include "tests/test.h"

#include <math.h>

enum { N_SEQS = 5, MAX_LEN = 512, N_GENERATED = 6, PAGES_PER_SEQ = MAX_LEN / KV_PAGE_TOKENS };

struct sequence {
    int32_t tokens[MAX_LEN];
    int32_t prompt_len, len; /* len: with the generated tokens */
    struct batch_policy policy;
    int32_t pages[PAGES_PER_SEQ];
    float *logits; /* [N_GENERATED + 1, vocab] after prompt_len - 1 and the positions behind it */
};

struct world {
    struct rng rng;
    const char *dir;
    enum dtype kv_dtype;
    int32_t vocab;
    struct sequence seqs[N_SEQS];
    float *thresholds; /* [1, n_layers, n_heads, n_blocks]; of prompt rows and of generated ones */
    struct attn_policy policy;
};

static void shuffle_pages(struct world *w)
{
    int32_t all[N_SEQS * PAGES_PER_SEQ];
    const int32_t n = N_SEQS * PAGES_PER_SEQ;
    for (int32_t i = 0; i < n; i++)
        all[i] = i;
    for (int32_t i = n - 1; i > 0; i--) {
        int32_t j = rng_range(&w->rng, 0, i), t = all[i];
        all[i] = all[j];
        all[j] = t;
    }
    for (int32_t i = 0; i < n; i++)
        w->seqs[i / PAGES_PER_SEQ].pages[i % PAGES_PER_SEQ] = all[i];
}

static void open_case(struct world *w, struct model_case *c, int n_threads)
{
    model_case_open(c, w->dir, n_threads, N_SEQS * MAX_LEN, MAX_LEN, N_SEQS * PAGES_PER_SEQ,
                    w->kv_dtype);
    assert_ok(model_set_policy(c->model, &w->policy, NULL));
}

static struct batch_seq make_seq(const struct sequence *s, int32_t start, int32_t n)
{
    struct batch_seq b = case_seq(s->tokens, start, n, s->prompt_len, s->pages, PAGES_PER_SEQ);
    b.policy = s->policy;
    return b;
}

/* Compares, or in the reference run stores, the logits of a sequence after `end` tokens. */
static void see_logits(struct world *w, struct sequence *s, const float *logits, int32_t end,
                       bool store)
{
    const int32_t at = end - s->prompt_len;
    const size_t bytes = (size_t)w->vocab * sizeof(float);
    if (at < 0)
        return;
    float *mine = s->logits + (size_t)at * (size_t)w->vocab;
    if (store)
        memcpy(mine, logits, bytes);
    else if (memcmp(mine, logits, bytes) != 0)
        fail_msg("sequence of %d+%d tokens, gate %d: logits after %d differ", s->prompt_len,
                 s->len - s->prompt_len, s->policy.gate, end);
}

static void run_alone(struct world *w, struct model_case *c, struct sequence *s)
{
    for (int32_t at = 0; at < s->len;) {
        int32_t n = at == 0 ? s->prompt_len : 1;
        struct batch_seq b = make_seq(s, at, n);
        assert_ok(case_step(c, &b, 1));
        at += n;
        see_logits(w, s, model_last_logits(c->model, 0), at, true);
    }
}

static void run_reference(struct world *w)
{
    struct model_case c;
    open_case(w, &c, 1);
    for (int32_t i = 0; i < N_SEQS; i++)
        run_alone(w, &c, &w->seqs[i]);
    model_case_close(&c);
}

/* A random legal chunk from `at`: gated ones keep to blocks and split at the prompt's end. */
static int32_t random_chunk(struct world *w, const struct sequence *s, int32_t at)
{
    int32_t left = s->len - at,
            n = rng_range(&w->rng, 0, 2) ? rng_range(&w->rng, 1, left) : rng_range(&w->rng, 1, 9);
    n = n < left ? n : left;
    if (s->policy.gate == BATCH_DENSE || at >= s->prompt_len)
        return n;
    n = (n + KV_BLOCK_TOKENS - 1) / KV_BLOCK_TOKENS * KV_BLOCK_TOKENS;
    return n < s->prompt_len - at ? n : s->prompt_len - at;
}

static void run_random(struct world *w)
{
    struct model_case c;
    int32_t at[N_SEQS] = {0}, order[N_SEQS];
    int32_t open = N_SEQS;
    shuffle_pages(w);
    open_case(w, &c, rng_range(&w->rng, 1, 4));
    while (open > 0) {
        struct batch_seq batch[N_SEQS];
        int32_t n = 0;
        for (int32_t k = 0, i = rng_range(&w->rng, 0, N_SEQS - 1); k < N_SEQS;
             k++, i = (i + 1) % N_SEQS) {
            struct sequence *s = &w->seqs[i];
            if (at[i] == s->len || rng_range(&w->rng, 0, 2) == 0)
                continue;
            if (at[i] > s->prompt_len && rng_range(&w->rng, 0, 5) == 0)
                at[i] = 0; /* preempted: compute it all anew */
            order[n] = i;
            batch[n++] = make_seq(s, at[i], random_chunk(w, s, at[i]));
        }
        if (n == 0)
            continue;
        assert_ok(case_step(&c, batch, n));
        for (int32_t k = 0; k < n; k++) {
            struct sequence *s = &w->seqs[order[k]];
            at[order[k]] += batch[k].n_tokens;
            open -= at[order[k]] == s->len;
            see_logits(w, s, model_last_logits(c.model, k), at[order[k]], false);
        }
    }
    model_case_close(&c);
}

/* Thresholds around the scores that occur, so that pages are really dropped. */
static void make_thresholds(struct world *w, const struct model_info *info)
{
    const int32_t n_blocks = 3;
    const size_t n = (size_t)info->n_layers * (size_t)info->n_heads * (size_t)n_blocks;
    w->thresholds = mem_zalloc(n, sizeof *w->thresholds);
    for (size_t i = 0; i < n; i++)
        w->thresholds[i] = (float)(3.0 + 2.0 * rng_normal(&w->rng));
    w->policy = (struct attn_policy){.order = ATTN_ORDER_DIAG_SINK_R2L,
                                     .abs = {.t = w->thresholds,
                                             .n_levels = 1,
                                             .n_layers = info->n_layers,
                                             .n_heads = info->n_heads,
                                             .n_blocks = n_blocks,
                                             .level_stride = (int64_t)n,
                                             .layer_stride = (int64_t)info->n_heads * n_blocks,
                                             .head_stride = n_blocks}};
    w->policy.decode = w->policy.abs; /* a row's maxima are smaller: it drops more */
}

static void make_world(struct world *w, const char *dir, enum dtype kv_dtype, struct rng rng)
{
    struct model_case c;
    *w = (struct world){.rng = rng, .dir = dir, .kv_dtype = kv_dtype};
    model_case_open(&c, dir, 1, 64, MAX_LEN, 1, kv_dtype);
    w->vocab = model_info(c.model)->vocab_size;
    make_thresholds(w, model_info(c.model));
    model_case_close(&c);
    shuffle_pages(w);
    for (int32_t i = 0; i < N_SEQS; i++) {
        struct sequence *s = &w->seqs[i];
        s->prompt_len = i == 0 ? 1 : rng_range(&w->rng, 2, MAX_LEN - N_GENERATED);
        s->len = s->prompt_len + N_GENERATED;
        for (int32_t k = 0; k < s->len; k++)
            s->tokens[k] = rng_range(&w->rng, 0, w->vocab - 1);
        s->logits = mem_zalloc((size_t)(N_GENERATED + 1) * (size_t)w->vocab, sizeof *s->logits);
        s->policy = (struct batch_policy){.gate = (uint8_t)(i % 3),
                                          .gate_rows = rng_range(&w->rng, 0, 1) ? 128 : 64,
                                          .ln_lambda = -1.5f,
                                          .decode_gate = i % 2 ? BATCH_DENSE : BATCH_ABS};
    }
}

static void drop_world(struct world *w)
{
    for (int32_t i = 0; i < N_SEQS; i++)
        mem_free(w->seqs[i].logits);
    mem_free(w->thresholds);
}

static void check_bits(const char *dir, enum dtype kv_dtype, uint64_t seed, int n_runs)
{
    struct world w;
    make_world(&w, dir, kv_dtype, test_rng(dir + strlen(TEST_ROOT), seed));
    run_reference(&w);
    for (int i = 0; i < n_runs; i++)
        run_random(&w);
    drop_world(&w);
}

static void test_small_models(void **state)
{
    (void)state;
    check_bits(TEST_DATA "/llama/sharded", DTYPE_F32, 11, 6);
    check_bits(TEST_DATA "/llama/biases", DTYPE_BF16, 12, 6);
    check_bits(TEST_DATA "/llama/mqa_f16", DTYPE_F32, 13, 4);
    check_bits(TEST_DATA "/llama/head_dim_256", DTYPE_BF16, 14, 2);
}

static void test_needle(void **state)
{
    (void)state;
    check_bits(TEST_ROOT "/models/needle", DTYPE_F32, 15, 2);
    check_bits(TEST_ROOT "/models/needle", DTYPE_BF16, 16, 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_small_models),
        cmocka_unit_test(test_needle),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
