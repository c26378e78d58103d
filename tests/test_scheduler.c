/* scheduler/: what a trace cannot show well: refused configurations and requests, how requests end,
 * bounds under endless load, many tenants, many waiting requests. */
#include "tests/test.h"

#include "core/mem.h"
#include "scheduler/scheduler.h"

#include <math.h>
#include <stdlib.h>

enum { EOS = 5, MAX_RUNNING = 16 };

struct fixture {
    struct kv_cache *kv;
    struct sched *sched;
    struct batch_token tokens[MAX_RUNNING];
    struct batch_counts counts[MAX_RUNNING];
    int32_t prompt[4096];
    int32_t next_token; /* what every request samples */
    int n_progress, n_tokens, n_finished;
    uint64_t last_id;
    enum req_finish last_finish;
    int last_err;
    int64_t now_us, step_us; /* step_us: what the step took */
};

static void on_progress(void *ctx, const struct request *r)
{
    (void)r;
    ((struct fixture *)ctx)->n_progress++;
}

static void on_token(void *ctx, const struct request *r, const struct batch_token *t)
{
    struct fixture *f = ctx;
    assert_int_equal(r->tokens[r->n_tokens - 1], t->token);
    f->n_tokens++;
}

static void on_finish(void *ctx, const struct request *r)
{
    struct fixture *f = ctx;
    f->n_finished++;
    f->last_id = r->id;
    f->last_finish = r->finish;
    f->last_err = r->err;
    if (r->user)
        *(struct request **)r->user = NULL;
}

static struct sched_config usual(void)
{
    return (struct sched_config){.max_running = MAX_RUNNING,
                                 .token_budget = 512,
                                 .max_partial_prefills = 4,
                                 .max_long_partial = 2,
                                 .long_prefill_tokens = 512,
                                 .max_queued = 100,
                                 .max_queued_tokens = 1 << 20,
                                 .max_model_len = 2048,
                                 .n_eos = 1,
                                 .eos_ids = {EOS}};
}

static void open_fixture(struct fixture *f, const struct sched_config *cfg, int32_t n_pages)
{
    const struct sched_events ev = {on_progress, on_token, on_finish, f};
    const struct kv_cache_config kv = {.n_pages = n_pages,
                                       .max_seqs = cfg->max_running,
                                       .max_pages_per_seq = kv_pages_for(cfg->max_model_len),
                                       .prefix_cache = true};
    memset(f, 0, sizeof *f);
    f->next_token = 7;
    for (int i = 0; i < 4096; i++)
        f->prompt[i] = i;
    assert_ok(kv_cache_create(&f->kv, &kv, NULL));
    assert_ok(sched_create(&f->sched, cfg, f->kv, &ev, NULL));
}

static void close_fixture(struct fixture *f)
{
    struct kv_cache_stats st;
    sched_destroy(f->sched);
    kv_cache_get_stats(f->kv, &st);
    assert_int_equal(st.used_pages, 0);
    assert_int_equal(st.open_seqs, 0);
    kv_cache_destroy(f->kv);
}

static struct req_params ask(const struct fixture *f, int32_t n_prompt, int32_t max_tokens)
{
    return (struct req_params){.prompt = f->prompt, .n_prompt = n_prompt, .max_tokens = max_tokens};
}

static struct request *submit(struct fixture *f, const struct req_params *p)
{
    struct request *r = NULL;
    struct err_msg why = {""};
    if (sched_submit(f->sched, p, f->now_us, &r, &why) < 0)
        fail_msg("%s", why.text);
    return r;
}

static void update(struct fixture *f, const struct batch *b)
{
    const struct batch_result result = {
        .tokens = f->tokens, .counts = f->counts, .total_us = f->step_us};
    for (int32_t i = 0; i < b->n_seqs; i++) {
        f->tokens[i].token = b->seqs[i].sample ? f->next_token : -1;
        f->counts[i] = (struct batch_counts){
            .reachable = 4, .visited = 3, .kept = 2, .sampled = 6, .lost = 1.5};
    }
    sched_update(f->sched, 0, &result, f->now_us);
    struct err_msg why = {""};
    if (sched_check(f->sched, &why) < 0)
        fail_msg("%s", why.text);
}

static const struct batch *step(struct fixture *f)
{
    const struct batch *b = sched_plan(f->sched, f->now_us);
    if (b)
        update(f, b);
    return b;
}

/* --- refusals --- */

static void bad_configs(void **state)
{
    static const struct {
        const char *field;
        size_t at;
        int32_t value;
    } cases[] = {
        {"max_running", offsetof(struct sched_config, max_running), 0},
        {"token_budget", offsetof(struct sched_config, token_budget), 127},
        {"token_budget", offsetof(struct sched_config, token_budget), 128 + MAX_RUNNING - 1},
        {"max_partial_prefills", offsetof(struct sched_config, max_partial_prefills), 0},
        {"max_long_partial", offsetof(struct sched_config, max_long_partial), 0},
        {"long_prefill_tokens", offsetof(struct sched_config, long_prefill_tokens), -1},
        {"watermark_pages", offsetof(struct sched_config, watermark_pages), -1},
        {"max_queued", offsetof(struct sched_config, max_queued), 0},
        {"max_tenant_requests", offsetof(struct sched_config, max_tenant_requests), -1},
        {"max_model_len", offsetof(struct sched_config, max_model_len), 1},
        {"n_eos", offsetof(struct sched_config, n_eos), BATCH_MAX_STOP + 1},
    };
    const struct sched_events ev = {on_progress, on_token, on_finish, NULL};
    const struct kv_cache_config kv_cfg = {.n_pages = 4, .max_seqs = 1, .max_pages_per_seq = 4};
    struct kv_cache *kv;
    (void)state;
    assert_ok(kv_cache_create(&kv, &kv_cfg, NULL));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct sched_config cfg = usual();
        struct sched *s = NULL;
        struct err_msg why = {""};
        memcpy((char *)&cfg + cases[i].at, &cases[i].value, sizeof cases[i].value);
        assert_int_equal(sched_create(&s, &cfg, kv, &ev, &why), ERR_CONFIG);
        assert_non_null(strstr(why.text, cases[i].field));
        assert_null(s);
    }
    kv_cache_destroy(kv);
    sched_destroy(NULL);
}

static void refuse(struct fixture *f, struct req_params p, int want, const char *text)
{
    struct request *r = NULL;
    struct err_msg why = {""};
    assert_int_equal(sched_submit(f->sched, &p, 0, &r, &why), want);
    assert_non_null(strstr(why.text, text));
    assert_null(r);
    assert_false(sched_has_work(f->sched));
    assert_int_equal(f->n_finished, 0);
}

static void bad_requests(void **state)
{
    struct fixture *f = mem_zalloc(1, sizeof *f);
    struct sched_config cfg = usual();
    (void)state;
    open_fixture(f, &cfg, 64);
    assert_int_equal(sched_max_servable(f->sched), 2048);
    struct req_params p = ask(f, 10, 1);
    refuse(f, ask(f, 0, 1), ERR_INVALID, "prompt");
    refuse(f, ask(f, -1, 1), ERR_INVALID, "prompt");
    refuse(f, ask(f, 10, 0), ERR_INVALID, "max_tokens");
    refuse(f, ask(f, 2048, 1), ERR_TOO_LONG, "2047");
    refuse(f, ask(f, 2049, 1), ERR_TOO_LONG, "2049");
    p.prompt = NULL;
    refuse(f, p, ERR_INVALID, "prompt");
    p = ask(f, 10, 1);
    p.sampling.n_stop = BATCH_MAX_STOP + 1;
    refuse(f, p, ERR_INVALID, "stop");
    p.sampling.n_stop = -1;
    refuse(f, p, ERR_INVALID, "stop");
    p = ask(f, 10, 1);
    memset(p.tenant, 'x', sizeof p.tenant);
    refuse(f, p, ERR_INVALID, "tenant");
    p = ask(f, 10, 1);
    p.n_salt = REQ_SALT_BYTES + 1;
    refuse(f, p, ERR_INVALID, "salt");
    p = ask(f, 10, 1);
    p.deadline_us = -1;
    refuse(f, p, ERR_INVALID, "deadline");
    p = ask(f, 10, 1);
    p.queue_timeout_us = INT64_MIN;
    refuse(f, p, ERR_INVALID, "queue_timeout");
    p = ask(f, 2047, INT32_MAX); /* the longest one is served, with one token */
    (void)submit(f, &p);
    while (step(f)) {
    }
    assert_int_equal(f->n_tokens, 1);
    assert_int_equal(f->last_finish, REQ_FINISH_LENGTH);
    close_fixture(f);
    mem_free(f);
}

/* --- how requests end --- */

/* Tokens generated until the end, sampling `token` always. */
static int run_with(const struct batch_sampling *a, int32_t token, enum req_finish want)
{
    struct fixture *f = mem_zalloc(1, sizeof *f);
    struct sched_config cfg = usual();
    open_fixture(f, &cfg, 64);
    struct req_params p = ask(f, 10, 20);
    p.sampling = *a;
    f->next_token = token;
    (void)submit(f, &p);
    while (step(f)) {
    }
    assert_int_equal(f->n_finished, 1);
    assert_int_equal(f->last_finish, want);
    int n = f->n_tokens;
    close_fixture(f);
    mem_free(f);
    return n;
}

static void stop_rules(void **state)
{
    (void)state;
    assert_int_equal(run_with(&(struct batch_sampling){.n_stop = 0}, 7, REQ_FINISH_LENGTH), 20);
    assert_int_equal(run_with(&(struct batch_sampling){.n_stop = 0}, EOS, REQ_FINISH_STOP), 1);
    assert_int_equal(run_with(&(struct batch_sampling){.ignore_eos = true}, EOS, REQ_FINISH_LENGTH),
                     20);
    assert_int_equal(
        run_with(&(struct batch_sampling){.n_stop = 2, .stop_ids = {3, 9}}, 9, REQ_FINISH_STOP), 1);
    assert_int_equal(
        run_with(&(struct batch_sampling){.n_stop = 1, .stop_ids = {EOS}, .ignore_eos = true}, EOS,
                 REQ_FINISH_STOP),
        1);
    assert_int_equal(run_with(&(struct batch_sampling){.min_tokens = 6}, EOS, REQ_FINISH_STOP), 6);
}

static void cancel_at_any_moment(void **state)
{
    struct fixture *f = mem_zalloc(1, sizeof *f);
    struct sched_config cfg = usual();
    struct request *r;
    (void)state;
    open_fixture(f, &cfg, 64);
    struct req_params p = ask(f, 300, 5);
    p.user = &r;
    r = submit(f, &p);
    sched_cancel(f->sched, r, REQ_FINISH_CANCELLED, 0);
    assert_null(r);
    assert_false(sched_has_work(f->sched));
    assert_null(step(f));

    struct request *in_flight = r = submit(f, &p);
    const struct batch *b = sched_plan(f->sched, 0);
    sched_cancel(f->sched, r, REQ_FINISH_ERROR, ERR_SLOW_CONSUMER);
    assert_int_equal(f->last_err, ERR_SLOW_CONSUMER);
    sched_cancel(f->sched, in_flight, REQ_FINISH_CANCELLED, 0); /* once is enough */
    assert_int_equal(f->n_finished, 2);
    assert_true(sched_has_work(f->sched)); /* the step is still out */
    update(f, b);
    assert_int_equal(f->n_tokens, 0);
    assert_false(sched_has_work(f->sched));
    assert_int_equal(kv_free_pages(f->kv), 64);

    r = submit(f, &p); /* waiting, running, and in flight, all at once */
    p.user = NULL;
    (void)submit(f, &p);
    assert_non_null(sched_plan(f->sched, 0));
    (void)submit(f, &p);
    sched_cancel_all(f->sched, REQ_FINISH_SHUTDOWN, 0);
    assert_int_equal(f->n_finished, 5);
    sched_update(f->sched, ERR_ENGINE_DEAD, NULL, 0);
    assert_int_equal(f->n_finished, 5);
    close_fixture(f);
    mem_free(f);
}

static void destroy_ends_all(void **state)
{
    struct fixture *f = mem_zalloc(1, sizeof *f);
    struct sched_config cfg = usual();
    (void)state;
    open_fixture(f, &cfg, 64);
    struct req_params p = ask(f, 300, 50);
    for (int i = 0; i < 30; i++)
        (void)submit(f, &p);
    for (int i = 0; i < 5; i++)
        (void)step(f);
    close_fixture(f);
    assert_int_equal(f->n_finished, 30);
    assert_int_equal(f->last_finish, REQ_FINISH_SHUTDOWN);
    mem_free(f);
}

static void times_and_counts(void **state)
{
    struct fixture *f = mem_zalloc(1, sizeof *f);
    struct sched_config cfg = usual();
    struct sched_stats st;
    (void)state;
    open_fixture(f, &cfg, 64);
    struct req_params p = ask(f, 600, 3);
    f->now_us = 100;
    struct request *r = submit(f, &p);
    assert_int_equal(r->submit_us, 100);
    f->now_us = 200;
    (void)step(f); /* 512 of 600 */
    assert_int_equal(r->scheduled_us, 200);
    assert_int_equal(r->first_token_us, 0);
    f->now_us = 300;
    (void)step(f);
    assert_int_equal(r->first_token_us, 300);
    assert_int_equal(f->n_progress, 2);
    f->now_us = 400;
    (void)step(f);
    assert_int_equal(r->first_token_us, 300);
    assert_int_equal(r->last_token_us, 400);
    assert_int_equal(r->counts.reachable, 8); /* two prompt steps; the decode step does not count */
    assert_int_equal(f->n_progress, 2);
    assert_int_equal(r->n_computed, 601);
    (void)step(f);
    sched_get_stats(f->sched, &st);
    assert_int_equal(st.n_submitted, 1);
    assert_int_equal(st.n_steps, 4);
    assert_int_equal(st.prompt_tokens, 600);
    assert_int_equal(st.generated_tokens, 3);
    assert_int_equal(st.counts.kept, 4);
    assert_int_equal(st.counts.sampled, 12);
    assert_true(st.counts.lost == 3);
    assert_int_equal(st.finished[REQ_FINISH_LENGTH], 1);
    assert_int_equal(st.n_running + st.n_waiting + st.n_in_flight, 0);
    close_fixture(f);
    mem_free(f);
}

/* Generated tokens are found by the next turn of a conversation only if they are shared. */
static int32_t cached_of_second_turn(bool share)
{
    struct fixture *f = mem_zalloc(1, sizeof *f);
    struct sched_config cfg = usual();
    cfg.share_generated = share;
    open_fixture(f, &cfg, 64);
    struct req_params p = ask(f, 100, 200);
    (void)submit(f, &p);
    while (step(f)) {
    }
    for (int i = 100; i < 300; i++)
        f->prompt[i] = f->next_token;
    p = ask(f, 320, 1);
    struct request *r = submit(f, &p);
    (void)sched_plan(f->sched, 0);
    int32_t cached = r->n_cached;
    sched_update(f->sched, ERR_CUDA, NULL, 0);
    close_fixture(f);
    mem_free(f);
    return cached;
}

static void shares_generated_tokens(void **state)
{
    (void)state;
    assert_int_equal(cached_of_second_turn(true), 256);
    assert_int_equal(cached_of_second_turn(false), 0);
}

/* --- bounds under load --- */

/* The promise to short requests: with a 16K prompt in prefill, a 100-token request that arrives
 * gets its first token in the very next step, whatever the moment. */
static void short_beside_16k(void **state)
{
    struct fixture *f = mem_zalloc(1, sizeof *f);
    struct sched_config cfg = usual();
    int32_t *prompt = mem_zalloc(16384, sizeof *prompt);
    (void)state;
    cfg.max_model_len = 20000;
    for (int moment = 0; moment < 32; moment += 3) {
        open_fixture(f, &cfg, 1024);
        struct req_params p = ask(f, 16384, 1);
        p.prompt = prompt;
        (void)submit(f, &p);
        for (int i = 0; i < moment; i++)
            (void)step(f);
        p = ask(f, 100, 1);
        struct request *r = submit(f, &p);
        uint64_t id = r->id;
        (void)step(f);
        assert_int_equal(f->n_tokens, 1);
        assert_int_equal(f->last_id, id);
        close_fixture(f);
    }
    mem_free(prompt);
    mem_free(f);
}

/* A server that prefills 128K prompts, two at once, while short ones come at random. Time is that
 * of Llama-3.1-8B on an H100, about: a prompt token takes 22 us, and 3.3 times as much again at the
 * end of a 128K prompt. */
enum { SHORT = 1024, LONG = 131072, N_SHORT = 400, SHORT_OUT = 8, TOKEN_US = 22 };

struct mix {
    struct fixture f;
    int32_t long_prompt[LONG];
    struct request *longs[2], *shorts[N_SHORT]; /* NULL once they are done */
    int64_t came_us[N_SHORT], waited_us[N_SHORT];
    int32_t came_step[N_SHORT], waited_steps[N_SHORT];
    int32_t n_came, n_served, n_steps, since; /* since: steps in a row without long tokens */
    int32_t most_since;
    int64_t long_tokens;
};

static int64_t cost_us(int32_t start, int32_t n)
{
    return (int64_t)(TOKEN_US * n * (1.0 + 3.3 * (start + n / 2) / LONG));
}

static void arrive(struct mix *m, struct rng *rng, int64_t *next_us)
{
    for (; m->n_came < N_SHORT && *next_us <= m->f.now_us; m->n_came++) {
        struct req_params p = ask(&m->f, SHORT, SHORT_OUT);
        p.user = &m->shorts[m->n_came];
        m->f.prompt[0] = m->n_came + 1; /* nothing is cached */
        m->came_us[m->n_came] = *next_us;
        m->came_step[m->n_came] = m->n_steps;
        m->shorts[m->n_came] = submit(&m->f, &p);
        *next_us += (int64_t)(-log((rng_range(rng, 0, 999999) + 0.5) / 1e6) * 250e3);
    }
    for (int i = 0; i < 2; i++) {
        struct req_params p = ask(&m->f, LONG - 128, 1);
        p.prompt = m->long_prompt;
        p.user = &m->longs[i];
        m->long_prompt[0] = -1 - i - 2 * m->n_steps;
        if (!m->longs[i])
            m->longs[i] = submit(&m->f, &p);
    }
}

static void mix_step(struct mix *m)
{
    const struct batch *b = sched_plan(m->f.sched, m->f.now_us);
    int32_t long_tokens = 0;
    for (int32_t i = 0; i < b->n_seqs; i++) {
        m->f.now_us += cost_us(b->seqs[i].start, b->seqs[i].n_tokens);
        if (b->seqs[i].prompt_len > SHORT && b->seqs[i].n_tokens > 1)
            long_tokens += b->seqs[i].n_tokens;
    }
    m->n_steps++;
    m->long_tokens += long_tokens;
    m->since = long_tokens ? 0 : m->since + 1;
    m->most_since = m->since > m->most_since ? m->since : m->most_since;
    update(&m->f, b);
    for (; m->n_served < m->n_came; m->n_served++) { /* they are served as they came, nearly */
        const int32_t i = m->n_served;
        if (m->shorts[i] && req_generated(m->shorts[i]) == 0)
            break;
        m->waited_us[i] = m->f.now_us - m->came_us[i];
        m->waited_steps[i] = m->n_steps - m->came_step[i];
    }
}

static int by_size(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* The promise to them: the first token no later than two chunk times of the long prompt's end and
 * their own prefill after they came, 99 times in 100; and the long ones are computed meanwhile. */
static void short_beside_128k(void **state)
{
    struct mix *m = mem_zalloc(1, sizeof *m);
    struct sched_config cfg = usual();
    struct rng rng = test_rng("short_beside_128k", 5);
    int64_t next_us = 0;
    int64_t sum = 0;
    int32_t most_steps = 0;
    (void)state;
    cfg.token_budget = 2048;
    cfg.max_long_partial = 2;
    cfg.long_prefill_tokens = 4096;
    cfg.max_model_len = LONG;
    open_fixture(&m->f, &cfg, 3 * LONG / 64);
    while (m->n_served < N_SHORT) {
        arrive(m, &rng, &next_us);
        mix_step(m);
    }
    qsort(m->waited_us, N_SHORT, sizeof *m->waited_us, by_size);
    for (int i = 0; i < N_SHORT; i++) {
        sum += m->waited_us[i];
        most_steps = m->waited_steps[i] > most_steps ? m->waited_steps[i] : most_steps;
    }
    const int64_t p99 = m->waited_us[N_SHORT * 99 / 100];
    const int64_t chunk = cost_us(LONG - 2048, 2048), own = cost_us(0, SHORT);
    print_message(
        "# TTFT of short prompts: mean %.0f, P99 %.0f ms, a chunk takes %.0f, %d steps at "
        "most; %.0f long tokens a step, in every %d steps at least\n",
        (double)sum / N_SHORT / 1e3, (double)p99 / 1e3, (double)chunk / 1e3, most_steps,
        (double)m->long_tokens / m->n_steps, m->most_since + 1);
    assert_true(p99 <= 2 * chunk + own);
    assert_true(m->most_since <= 4);
    assert_true(m->long_tokens >= (int64_t)m->n_steps * 2048 / 4);
    close_fixture(&m->f);
    mem_free(m);
}

/* One request generates tokens, for 9 ms a step, while two prompts of 128K follow each other: the
 * longest such step behind the first five. Adds what all took to *sum_us. */
static int64_t longest_step_us(int64_t limit_us, int32_t *least, int64_t *sum_us)
{
    struct mix *m = mem_zalloc(1, sizeof *m);
    struct sched_config cfg = usual();
    int64_t longest = 0;
    cfg.token_budget = 8192;
    cfg.max_model_len = LONG;
    cfg.step_us = limit_us;
    open_fixture(&m->f, &cfg, 3 * LONG / 64);
    *least = LONG;
    struct req_params p = ask(&m->f, 100, LONG / 2);
    (void)submit(&m->f, &p);
    for (int i = 0, n = 0; n < 2; i++) {
        if (i > 0 && !m->longs[0]) {
            p = ask(&m->f, LONG - 128, 1);
            p.prompt = m->long_prompt;
            p.user = &m->longs[0];
            m->long_prompt[0] = -1 - i;
            m->longs[0] = submit(&m->f, &p);
        }
        const struct batch *b = sched_plan(m->f.sched, m->f.now_us);
        m->f.step_us = 9000;
        for (int32_t s = 0; s < b->n_seqs; s++) {
            const struct batch_seq *q = &b->seqs[s];
            m->f.step_us += q->n_tokens > 1 ? cost_us(q->start, q->n_tokens) : 0;
            if (q->n_tokens > 1 && !q->sample && q->n_tokens < *least)
                *least = q->n_tokens;
        }
        longest = i > 5 && m->f.step_us > longest ? m->f.step_us : longest;
        *sum_us += m->f.step_us;
        update(&m->f, b);
        n += i > 0 && !m->longs[0];
    }
    sched_cancel_all(m->f.sched, REQ_FINISH_CANCELLED, 0);
    close_fixture(&m->f);
    mem_free(m);
    return longest;
}

static void tokens_beside_128k(void **state)
{
    int64_t all_us = 0, limited_us = 0, least_us = 0;
    int32_t least[3];
    (void)state;
    const int64_t longest = longest_step_us(0, &least[0], &all_us);
    const int64_t limited = longest_step_us(250000, &least[1], &limited_us);
    const int64_t eighth = longest_step_us(20000, &least[2], &least_us);
    print_message(
        "# steps take at most %.0f ms, of 250 ms %.0f, of 20 ms %.0f; all %.1f, %.1f, %.1f s\n",
        (double)longest / 1e3, (double)limited / 1e3, (double)eighth / 1e3, (double)all_us / 1e6,
        (double)limited_us / 1e6, (double)least_us / 1e6);
    assert_true(longest > 700000);
    assert_true(limited < 255000 && limited > 200000);
    assert_in_range(least[1], 2048, 4096);
    assert_int_equal(least[2], 1024); /* an eighth, though it takes longer */
    assert_true(limited_us < all_us + all_us / 20);
}

struct load {
    int32_t budget, n_pages, prompt, out, tenants;
};

/* Steps until a prompt of 2,000 tokens is done while the queue never runs out of other requests. */
static int steps_under_load(const struct load *l)
{
    struct fixture *f = mem_zalloc(1, sizeof *f);
    struct sched_config cfg = usual();
    int steps = 0, n = 0;
    cfg.token_budget = l->budget;
    open_fixture(f, &cfg, l->n_pages);
    struct req_params p = ask(f, 2000, 1);
    struct request *r;
    p.user = &r;
    r = submit(f, &p);
    for (; r && steps < 5000; steps++) {
        struct sched_stats st;
        for (sched_get_stats(f->sched, &st); st.n_waiting < 8; st.n_waiting++) {
            p = ask(f, l->prompt, l->out);
            f->prompt[0] = ++n; /* nothing is cached */
            (void)snprintf(p.tenant, sizeof p.tenant, "t%d", n % (l->tenants + 1));
            (void)submit(f, &p);
        }
        (void)step(f);
    }
    close_fixture(f);
    mem_free(f);
    return steps;
}

static void nobody_starves(void **state)
{
    (void)state;
    /* Room for one chunk a step, 16 are needed: one step in five is the long prompt's. */
    assert_in_range(steps_under_load(&(struct load){144, 512, 128, 1, 0}), 16, 16 * 5);
    assert_in_range(steps_under_load(&(struct load){144, 512, 100, 1, 1000}), 16, 16 * 5);
    /* Others decode, others are long, the pool holds little beside it. */
    assert_in_range(steps_under_load(&(struct load){144, 512, 128, 20, 0}), 16, 16 * 5);
    assert_in_range(steps_under_load(&(struct load){512, 512, 1500, 20, 0}), 4, 16 * 2);
    assert_in_range(steps_under_load(&(struct load){512, 36, 200, 100, 3}), 4, 16 * 5);
    /* Short ones fill every step and are done in it. */
    assert_in_range(steps_under_load(&(struct load){512, 512, 500, 1, 0}), 4, 16 * 5);
}

/* Beside one that generates, steps have time for a chunk: nine prompts take turns. */
static void turns_in_short_time(void **state)
{
    struct fixture *f = mem_zalloc(1, sizeof *f);
    struct sched_config cfg = usual();
    struct request *r[9];
    (void)state;
    cfg.max_partial_prefills = cfg.max_long_partial = 9;
    cfg.step_us = 1;
    open_fixture(f, &cfg, 512);
    f->step_us = 5000;
    struct req_params p = ask(f, 100, 1000);
    (void)submit(f, &p);
    (void)step(f);
    p = ask(f, 1900, 1);
    for (int i = 0; i < 9; i++) {
        f->prompt[0] = -1 - i;
        r[i] = submit(f, &p);
    }
    for (int i = 0; i < 90; i++)
        assert_int_equal(step(f)->n_seqs, 2);
    for (int i = 0; i < 9; i++)
        assert_in_range(r[i]->n_computed, 7 * 128, 13 * 128);
    sched_cancel_all(f->sched, REQ_FINISH_CANCELLED, 0);
    close_fixture(f);
    mem_free(f);
}

/* A long prompt at the head is not overtaken for ever by small ones that fit in what is free. */
static void large_is_not_overtaken(void **state)
{
    struct fixture *f = mem_zalloc(1, sizeof *f);
    struct sched_config cfg = usual();
    (void)state;
    open_fixture(f, &cfg, 32);
    struct req_params p = ask(f, 200, 30);
    for (int i = 0; i < 8; i++) {
        f->prompt[0] = i;
        p.max_tokens = 20 + 4 * i; /* they leave one by one */
        (void)submit(f, &p);
    }
    (void)step(f);
    p = ask(f, 1900, 1);
    uint64_t id = submit(f, &p)->id;
    p = ask(f, 60, 30);
    int steps = 0;
    for (; f->last_id != id && steps < 1000; steps++) {
        struct sched_stats st;
        f->prompt[0] = 100 + steps;
        sched_get_stats(f->sched, &st);
        if (st.n_waiting < 50)
            (void)submit(f, &p);
        (void)step(f);
        if (f->last_finish == REQ_FINISH_LENGTH && f->last_id == id)
            break;
    }
    assert_in_range(steps, 30, 80);
    close_fixture(f);
    mem_free(f);
}

/* --- size --- */

static void many_waiting(void **state)
{
    struct fixture *f = mem_zalloc(1, sizeof *f);
    struct sched_config cfg = usual();
    (void)state;
    cfg.max_queued = 10000;
    cfg.max_queued_tokens = 1 << 30;
    open_fixture(f, &cfg, 64);
    struct rng rng = test_rng("many_waiting", 1);
    for (int i = 0; i < 10000; i++) {
        struct req_params p = ask(f, rng_range(&rng, 1, 900), 1);
        (void)snprintf(p.tenant, sizeof p.tenant, "t%d", rng_range(&rng, 1, 6000));
        p.priority = rng_range(&rng, -2, 2);
        p.deadline_us = rng_range(&rng, 0, 3) ? rng_range(&rng, 1, 1000000) : 0;
        (void)submit(f, &p);
    }
    int64_t last = 0;
    for (int i = 0; i < 100; i++) { /* deadlines come in order */
        int64_t next = sched_next_deadline(f->sched);
        assert_true(next >= last && next < INT64_MAX);
        sched_expire(f->sched, next - 1);
        assert_int_equal(sched_next_deadline(f->sched), next);
        sched_expire(f->sched, next);
        last = next;
    }
    assert_true(f->n_finished >= 100);
    for (int i = 0; i < 20; i++)
        (void)step(f);
    sched_cancel_all(f->sched, REQ_FINISH_CANCELLED, 0);
    assert_int_equal(f->n_finished, 10000);
    assert_int_equal(sched_next_deadline(f->sched), INT64_MAX);
    assert_ok(sched_check(f->sched, NULL));
    close_fixture(f);
    mem_free(f);
}

static void finish_names(void **state)
{
    (void)state;
    assert_string_equal(req_finish_name(REQ_FINISH_STOP), "stop");
    assert_string_equal(req_finish_name(REQ_FINISH_CAPACITY), "capacity");
    assert_string_equal(req_finish_name((enum req_finish)99), "unknown");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_configs),
        cmocka_unit_test(bad_requests),
        cmocka_unit_test(stop_rules),
        cmocka_unit_test(cancel_at_any_moment),
        cmocka_unit_test(destroy_ends_all),
        cmocka_unit_test(times_and_counts),
        cmocka_unit_test(shares_generated_tokens),
        cmocka_unit_test(short_beside_16k),
        cmocka_unit_test(short_beside_128k),
        cmocka_unit_test(tokens_beside_128k),
        cmocka_unit_test(nobody_starves),
        cmocka_unit_test(turns_in_short_time),
        cmocka_unit_test(large_is_not_overtaken),
        cmocka_unit_test(many_waiting),
        cmocka_unit_test(finish_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
