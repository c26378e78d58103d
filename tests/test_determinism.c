/* The promise: a request's tokens and log-probabilities are the same bits alone, in any batch, at
 * any chunk size, preempted and resumed, from a cold or a warm prefix cache, under the same policy
 * on the CPU. Random schedules over the real scheduler, cache and model; the reference is each
 * request alone in one chunk. */
#include "tests/test.h"

#include "core/mem.h"
#include "kvcache/kv_cache.h"
#include "model/model.h"
#include "scheduler/scheduler.h"

#ifdef __SANITIZE_ADDRESS__
enum { ROUNDS = 1 }; /* memory is what is looked at there, and all of it is slow */
#else
enum { ROUNDS = 2 };
#endif
enum { N_REQS = 8, MAX_PROMPT = 700, MAX_OUT = 80, MAX_TOTAL = 2048, N_BLOCKS = 4 };

struct want {
    int32_t prompt[MAX_TOTAL];
    int32_t n_prompt, max_tokens;
    struct batch_policy policy;
    struct batch_sampling sampling;
    int32_t out[MAX_OUT];
    float logprob[MAX_OUT];
    int n_out;
};

struct got {
    const struct want *want;
    int n_out;
    bool finished, cancelled;
    enum req_finish finish;
    struct request *req;
};

struct world {
    struct dev *dev;
    struct model *model;
    float *thresholds; /* [1, n_layers, n_heads, N_BLOCKS] */
    float *decode;     /* likewise, of generated rows */
    float *densities;  /* [2, n_layers, n_heads] that REL is steered to */
    float *pages;      /* [1, n_layers, n_heads] that ABS is steered to */
    struct attn_policy policy;
    struct batch_result result;
    struct want wants[N_REQS];
};

static void on_progress(void *ctx, const struct request *r)
{
    (void)ctx;
    (void)r;
}

static void record_token(void *ctx, const struct request *r, const struct batch_token *t)
{
    struct want *w = r->user;
    (void)ctx;
    w->out[w->n_out] = t->token;
    w->logprob[w->n_out++] = t->logprob;
}

static void check_token(void *ctx, const struct request *r, const struct batch_token *t)
{
    struct got *g = r->user;
    (void)ctx;
    assert_true(g->n_out < g->want->n_out);
    assert_int_equal(t->token, g->want->out[g->n_out]);
    assert_memory_equal(&t->logprob, &g->want->logprob[g->n_out], sizeof t->logprob);
    g->n_out++;
}

static void record_finish(void *ctx, const struct request *r)
{
    (void)ctx;
    assert_int_equal(r->finish, REQ_FINISH_LENGTH);
}

static void check_finish(void *ctx, const struct request *r)
{
    struct got *g = r->user;
    (void)ctx;
    assert_false(g->finished);
    g->finished = true;
    g->finish = r->finish;
    g->req = NULL;
}

/* Thresholds in the range of this model's page maxima, so that short prompts are gated too; the
 * last row is reused. */
static void make_thresholds(struct world *w)
{
    const struct model_info *info = model_info(w->model);
    int32_t n = info->n_layers * info->n_heads;
    struct rng r = {4};
    w->thresholds = mem_zalloc((size_t)n * N_BLOCKS, sizeof *w->thresholds);
    w->decode = mem_zalloc((size_t)n * N_BLOCKS, sizeof *w->decode);
    for (int32_t i = 0; i < n * N_BLOCKS; i++)
        w->thresholds[i] = (float)(25 * rng_unit(&r));
    w->policy.abs = (struct attn_thresholds){.t = w->thresholds,
                                             .n_levels = 1,
                                             .n_layers = info->n_layers,
                                             .n_heads = info->n_heads,
                                             .n_blocks = N_BLOCKS,
                                             .level_stride = (int64_t)n * N_BLOCKS,
                                             .layer_stride = (int64_t)info->n_heads * N_BLOCKS,
                                             .head_stride = N_BLOCKS};
    for (int32_t i = 0; i < n * N_BLOCKS; i++)
        w->decode[i] = (float)(15 * rng_unit(&r));
    w->policy.decode = w->policy.abs;
    w->policy.decode.t = w->decode;
    w->densities = mem_zalloc((size_t)n * 2, sizeof *w->densities);
    for (int32_t i = 0; i < n * 2; i++)
        w->densities[i] = (float)(0.6 * rng_unit(&r));
    w->policy.rel_64 = (struct attn_thresholds){.t = w->densities,
                                                .n_levels = 2,
                                                .n_layers = info->n_layers,
                                                .n_heads = info->n_heads,
                                                .n_blocks = 1,
                                                .level_stride = n,
                                                .layer_stride = info->n_heads,
                                                .head_stride = 1};
    w->pages = mem_zalloc((size_t)n, sizeof *w->pages);
    for (int32_t i = 0; i < n; i++)
        w->pages[i] = (float)rng_range(&r, 1, 5);
    w->policy.abs_pages = w->policy.rel_64;
    w->policy.abs_pages.t = w->pages;
    w->policy.abs_pages.n_levels = 1;
}

static void world_open(struct world *w)
{
    struct err_msg why = {""};
    memset(w, 0, sizeof *w);
    assert_ok(dev_open(&w->dev, &dev_cpu, 0, 2, &why));
    const struct model_config cfg = {
        .dir = TEST_ROOT "/models/needle",
        .dev = w->dev,
        .kv_dtype = DTYPE_F32,
        .max_seqs = N_REQS,
        .max_tokens = 4096,
        .max_position = 4096,
    };
    if (model_open(&w->model, &cfg, &why) < 0)
        fail_msg("%s", why.text);
    assert_ok(model_take_pages(w->model, 512, &why));
    make_thresholds(w);
    assert_ok(model_set_policy(w->model, &w->policy, NULL));
    w->result.tokens = mem_zalloc(N_REQS, sizeof *w->result.tokens);
    w->result.counts = mem_zalloc(N_REQS, sizeof *w->result.counts);
}

static void world_close(struct world *w)
{
    mem_free(w->result.tokens);
    mem_free(w->result.counts);
    model_close(w->model);
    mem_free(w->thresholds);
    mem_free(w->decode);
    mem_free(w->densities);
    mem_free(w->pages);
    dev_close(w->dev);
}

/* Prompts share prefixes of random length with one another, so that warm caches matter. */
static void make_wants(struct world *w, struct rng *r, uint8_t gate, float steer)
{
    for (int i = 0; i < N_REQS; i++) {
        struct want *q = &w->wants[i];
        memset(q, 0, sizeof *q);
        q->n_prompt = rng_range(r, 1, MAX_PROMPT);
        int shared = 0;
        if (i > 0 && rng_unit(r) < 0.6) {
            const struct want *other = &w->wants[rng_range(r, 0, i - 1)];
            shared = other->n_prompt < q->n_prompt ? other->n_prompt : q->n_prompt;
            memcpy(q->prompt, other->prompt, (size_t)shared * sizeof *q->prompt);
        }
        for (int t = shared; t < q->n_prompt; t++)
            q->prompt[t] = rng_range(r, 3, 511);
        q->max_tokens = rng_range(r, 1, MAX_OUT);
        q->policy = (struct batch_policy){.gate = gate,
                                          .gate_rows = gate == BATCH_REL ? 64 : 128,
                                          .level = 0,
                                          .ln_lambda = -0.001f,
                                          .steer = steer,
                                          .blend = gate == BATCH_REL ? 0.25f : 1,
                                          .decode_gate = i % 2 ? BATCH_ABS : BATCH_DENSE};
        q->sampling = (struct batch_sampling){.temperature = rng_unit(r) < 0.5 ? 0.0f : 0.9f,
                                              .top_p = 1,
                                              .repetition_penalty = 1,
                                              .seed = rng_u64(r),
                                              .n_logprobs = 1,
                                              .ignore_eos = true};
    }
}

struct setup {
    struct kv_cache_config kv;
    struct sched_config sched;
};

static struct setup plain_setup(void)
{
    return (struct setup){
        .kv = {.n_pages = 512, .max_seqs = N_REQS, .max_pages_per_seq = MAX_TOTAL / KV_PAGE_TOKENS},
        .sched = {.max_running = N_REQS,
                  .token_budget = 4096,
                  .max_partial_prefills = 4,
                  .max_long_partial = 2,
                  .long_prefill_tokens = 512,
                  .max_queued = 1000,
                  .max_queued_tokens = 1 << 24,
                  .max_model_len = MAX_TOTAL,
                  .model_fingerprint = 1,
                  .share_generated = false},
    };
}

static void submit(struct sched *s, const struct want *q, void *user, struct request **out)
{
    struct err_msg why = {""};
    const struct req_params p = {.prompt = q->prompt,
                                 .n_prompt = q->n_prompt,
                                 .max_tokens = q->max_tokens,
                                 .sampling = q->sampling,
                                 .policy = q->policy,
                                 .policy_fingerprint = q->policy.gate,
                                 .user = user};
    if (sched_submit(s, &p, 0, out, &why) < 0)
        fail_msg("%s", why.text);
}

static bool step(struct world *w, struct sched *s, int64_t now)
{
    struct err_msg why = {""};
    const struct batch *b = sched_plan(s, now);
    if (!b)
        return false;
    assert_ok(model_step(w->model, b, &w->result));
    sched_update(s, 0, &w->result, now);
    if (sched_check(s, &why) < 0)
        fail_msg("%s", why.text);
    return true;
}

/* Every request alone, in one chunk, on a cold cache. */
static void reference(struct world *w)
{
    struct err_msg why = {""};
    const struct sched_events ev = {on_progress, record_token, record_finish, NULL};
    for (int i = 0; i < N_REQS; i++) {
        struct setup set = plain_setup();
        struct kv_cache *kv = NULL;
        struct sched *s = NULL;
        struct request *r = NULL;
        assert_ok(kv_cache_create(&kv, &set.kv, &why));
        assert_ok(sched_create(&s, &set.sched, kv, &ev, &why));
        submit(s, &w->wants[i], &w->wants[i], &r);
        while (step(w, s, 1)) {
        }
        assert_int_equal(w->wants[i].n_out, w->wants[i].max_tokens);
        sched_destroy(s);
        kv_cache_destroy(kv);
    }
}

/* One random schedule: small pools preempt, small budgets chunk, random arrivals batch, cancels
 * churn the cache. */
static void schedule(struct world *w, struct rng *r, bool share_generated, struct sched_stats *st)
{
    struct err_msg why = {""};
    struct setup set = plain_setup();
    struct kv_cache *kv = NULL;
    struct sched *s = NULL;
    struct got got[3 * N_REQS];
    const struct sched_events ev = {on_progress, check_token, check_finish, NULL};

    set.kv.n_pages = rng_range(r, (MAX_PROMPT + MAX_OUT) / KV_PAGE_TOKENS + 2, 30);
    set.kv.prefix_cache = rng_unit(r) < 0.7;
    set.sched.share_generated = share_generated;
    set.sched.token_budget = 128 * rng_range(r, 2, 9);
    set.sched.max_running = rng_range(r, 2, N_REQS);
    set.sched.max_partial_prefills = rng_range(r, 1, 4);
    set.sched.watermark_pages = rng_range(r, 0, 2);
    assert_ok(kv_cache_create(&kv, &set.kv, &why));
    assert_ok(sched_create(&s, &set.sched, kv, &ev, &why));
    int n = 0, total = rng_range(r, N_REQS, 3 * N_REQS);
    for (int64_t now = 1; n < total || sched_has_work(s); now++) {
        while (n < total && rng_unit(r) < 0.4) {
            got[n] = (struct got){.want = &w->wants[rng_range(r, 0, N_REQS - 1)]};
            submit(s, got[n].want, &got[n], &got[n].req);
            n++;
        }
        if (n > 0 && rng_unit(r) < 0.04) {
            struct got *victim = &got[rng_range(r, 0, n - 1)];
            victim->cancelled = true;
            if (victim->req)
                sched_cancel(s, victim->req, REQ_FINISH_CANCELLED, 0);
        }
        (void)step(w, s, now);
    }
    for (int i = 0; i < n; i++) {
        assert_true(got[i].finished);
        if (got[i].finish != REQ_FINISH_CANCELLED)
            assert_int_equal(got[i].n_out, got[i].want->n_out);
    }
    sched_get_stats(s, st);
    sched_destroy(s);
    kv_cache_destroy(kv);
}

static void random_schedules(uint8_t gate, float steer, uint64_t seed)
{
    struct world *w = mem_zalloc(1, sizeof *w);
    struct rng r = test_rng("determinism", seed);
    uint64_t preempted = 0;
    const int rounds = steer > 0 || gate == BATCH_ABS ? 1 : ROUNDS;
    struct batch_counts pages = {0}, rows = {0};
    world_open(w);
    make_wants(w, &r, gate, steer);
    reference(w);
    for (int i = 0; i < rounds; i++) {
        struct sched_stats st;
        schedule(w, &r, gate == BATCH_DENSE, &st);
        preempted += st.n_preempted;
        pages.reachable += st.counts.reachable;
        pages.kept += st.counts.kept;
        rows.reachable += st.decode_counts.reachable;
        rows.kept += st.decode_counts.kept;
    }
    printf("# gate %d: %d schedules, %llu preemptions, density %.3f, of generated rows %.3f\n",
           gate, rounds, (unsigned long long)preempted,
           (double)pages.kept / (double)pages.reachable,
           (double)rows.kept / (double)rows.reachable);
    assert_true(rows.kept < rows.reachable);
    assert_true(preempted > 0 || rounds < 5); /* the first schedule may have none */
    assert_true(gate == BATCH_DENSE ? pages.kept == pages.reachable : pages.kept < pages.reachable);
    world_close(w);
    mem_free(w);
}

static void dense(void **state)
{
    (void)state;
    random_schedules(BATCH_DENSE, 0, 11);
}

static void abs_gate(void **state)
{
    (void)state;
    random_schedules(BATCH_ABS, 0, 12);
}

static void rel_gate(void **state)
{
    (void)state;
    random_schedules(BATCH_REL, 0, 13);
}

static void steered_gate(void **state)
{
    (void)state;
    random_schedules(BATCH_REL, 1.5f, 14);
}

static void steered_abs(void **state)
{
    (void)state;
    random_schedules(BATCH_ABS, 1, 15);
}

/* A second turn (prompt + answer + more) finds the pages of the generated answer and continues with
 * the same bits as from a cold cache. Of an answer whose tokens had a gate of their own it finds
 * none: as a prompt its K/V are others. */
static void check_second_turn(int16_t decode_gate)
{
    struct err_msg why = {""};
    struct world *w = mem_zalloc(1, sizeof *w);
    struct rng r = test_rng("second_turn", 14);
    world_open(w);
    make_wants(w, &r, BATCH_DENSE, 0);
    struct want *first = &w->wants[0], *second = &w->wants[1];
    first->n_prompt = 250;
    first->max_tokens = 24;
    first->policy.decode_gate = second->policy.decode_gate = decode_gate;
    for (int i = 0; i < first->n_prompt; i++)
        first->prompt[i] = rng_range(&r, 3, 511);
    reference(w);
    memcpy(second->prompt, first->prompt, (size_t)first->n_prompt * sizeof *second->prompt);
    memcpy(second->prompt + first->n_prompt, first->out,
           (size_t)first->n_out * sizeof *second->prompt);
    second->n_prompt = first->n_prompt + first->n_out;
    for (int i = 0; i < 100; i++)
        second->prompt[second->n_prompt++] = rng_range(&r, 3, 511);
    second->n_out = 0;
    for (int i = 0; i < N_REQS; i++)
        w->wants[i].n_out = 0;
    reference(w);

    struct setup set = plain_setup();
    set.kv.prefix_cache = true;
    set.sched.share_generated = true;
    struct kv_cache *kv = NULL;
    struct sched *s = NULL;
    const struct sched_events ev = {on_progress, check_token, check_finish, NULL};
    assert_ok(kv_cache_create(&kv, &set.kv, &why));
    assert_ok(sched_create(&s, &set.sched, kv, &ev, &why));
    for (int i = 0; i < 2; i++) {
        struct got g = {.want = &w->wants[i]};
        submit(s, g.want, &g, &g.req);
        while (step(w, s, 1)) {
        }
        assert_true(g.finished);
        assert_int_equal(g.n_out, g.want->n_out);
    }
    struct kv_cache_stats ks;
    kv_cache_get_stats(kv, &ks);
    /* 250 prompt tokens and 6 generated ones: two full query blocks, or the first of them */
    assert_int_equal(ks.hit_tokens, decode_gate ? 128 : 256);
    sched_destroy(s);
    kv_cache_destroy(kv);
    world_close(w);
    mem_free(w);
}

static void second_turn(void **state)
{
    (void)state;
    check_second_turn(BATCH_DENSE);
}

static void second_turn_after_a_gate(void **state)
{
    (void)state;
    check_second_turn(BATCH_ABS);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(dense),
        cmocka_unit_test(abs_gate),
        cmocka_unit_test(rel_gate),
        cmocka_unit_test(steered_gate),
        cmocka_unit_test(steered_abs),
        cmocka_unit_test(second_turn),
        cmocka_unit_test(second_turn_after_a_gate),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
