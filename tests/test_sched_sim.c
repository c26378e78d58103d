/* The scheduler and the page bookkeeping under random load, with an executor that computes a hash
 * where a model computes K/V. Position by position the executor writes into the pages
 *     chain[i] = mix(chain[i - 1] read from the pages, token i, prompt or generated)
 * and the next token is a function of the chain, so a page that was lost, shared wrongly, written
 * by two sequences or computed under the wrong policy shows at once as a wrong value; and a
 * request's tokens are the same under any schedule by construction of the reference.
 *
 * After every step: sched_check (which includes kv_check), the budget, the chunk rules. In the end:
 * every request ended exactly once, none waited longer than the load explains, the pool is as it
 * was. Every world runs twice; both runs must plan the same, bit for bit. */
#include "tests/test.h"

#include "core/hash.h"
#include "core/mem.h"
#include "scheduler/scheduler.h"

#ifdef __SANITIZE_ADDRESS__
enum { EVENTS = 40000 };
#else
enum { EVENTS = 100000 };
#endif
enum {
    WORLD_EVENTS = 2500,
    MAX_LIVE = 128,
    MAX_TOTAL = 2048,
    N_USERS = 6,
    N_PREFIXES = 3,
    UNLIMITED = 600,
    EOS = 0,
    VOCAB = 64
};

struct job {
    struct request *req; /* NULL once finished */
    uint64_t id;
    int32_t n_prompt, max_tokens, n_out, priority;
    int user;
    bool decode_gated;
    bool gated, used, disturbed; /* disturbed: cancelled, expired or failed by the outside */
    int64_t born_step;
    uint64_t chain[MAX_TOTAL]; /* the reference */
    int32_t n_chain;
};

struct world {
    struct rng rng;
    struct kv_cache_config kv_cfg;
    struct sched_config cfg;
    struct kv_cache *kv;
    struct sched *sched;
    struct batch_result result;
    struct job *jobs; /* [MAX_LIVE] */
    uint64_t *cells;  /* [n_pages, 64] what the executor wrote */
    uint64_t *writer; /* [n_pages] (step, sequence) of the last write */
    int32_t *prefix[N_PREFIXES];
    int32_t said[MAX_TOTAL]; /* a finished conversation: prompt and answer */
    int32_t n_said;
    int said_user;
    bool said_gated;
    int64_t now_us, steps;
    uint64_t n_events, n_submitted, n_finished, n_refused;
    uint64_t plan_hash;
    int n_priorities, n_tenants, load, pause, n_live;
    bool calm;       /* no failures from outside */
    int64_t longest; /* life of a request in steps */
};

struct totals {
    uint64_t events, steps, finished[REQ_FINISH_SHUTDOWN + 1], preempted, cached, refused;
    int64_t longest;
};

static uint64_t mix(uint64_t chain, int32_t token, bool generated)
{
    return hash_pair(chain, (uint64_t)(uint32_t)token << 1 | generated);
}

static int32_t token_after(uint64_t chain)
{
    return (int32_t)(chain >> 7) & (VOCAB - 1);
}

static uint64_t chain_start(const struct job *j)
{
    return hash_pair(j->gated, (uint64_t)(j->user % 2));
}

/* --- events of the scheduler --- */

static void extend_reference(const struct world *w, struct job *j, const struct request *r)
{
    for (; j->n_chain < r->n_tokens; j->n_chain++) {
        uint64_t before = j->n_chain ? j->chain[j->n_chain - 1] : chain_start(j);
        bool generated = j->n_chain >= j->n_prompt && (j->decode_gated || !w->cfg.share_generated);
        j->chain[j->n_chain] = mix(before, r->tokens[j->n_chain], generated);
    }
}

static void on_progress(void *ctx, const struct request *r)
{
    struct job *j = r->user;
    (void)ctx;
    assert_ptr_equal(j->req, r);
    assert_int_equal(r->state, REQ_RUNNING);
}

static void on_token(void *ctx, const struct request *r, const struct batch_token *t)
{
    struct world *w = ctx;
    struct job *j = r->user;
    assert_ptr_equal(j->req, r);
    assert_int_equal(r->tokens[r->n_tokens - 1], t->token);
    assert_int_equal(token_after(j->chain[r->n_tokens - 2]), t->token);
    assert_int_equal(req_generated(r), ++j->n_out);
    assert_true(j->n_out <= j->max_tokens);
    extend_reference(w, j, r);
}

static void check_reason(const struct world *w, const struct job *j, const struct request *r)
{
    switch (r->finish) {
    case REQ_FINISH_STOP: assert_int_equal(r->tokens[r->n_tokens - 1], EOS); break;
    case REQ_FINISH_LENGTH:
        assert_true(j->n_out == j->max_tokens || r->n_tokens == w->cfg.max_model_len);
        break;
    case REQ_FINISH_CAPACITY: assert_int_equal(r->n_tokens, sched_max_servable(w->sched)); break;
    case REQ_FINISH_DEADLINE:
        assert_true(r->deadline_us <= w->now_us ||
                    (r->queue_deadline_us <= w->now_us && r->scheduled_us == 0));
        break;
    case REQ_FINISH_ERROR: assert_true(j->disturbed && r->err < 0); break;
    default: assert_true(j->disturbed);
    }
}

static void on_finish(void *ctx, const struct request *r)
{
    struct world *w = ctx;
    struct job *j = r->user;
    assert_ptr_equal(j->req, r); /* not before, and not twice */
    check_reason(w, j, r);
    int64_t life = w->steps - j->born_step;
    if (life > w->longest && j->priority == 0)
        w->longest = life;
    if (j->n_out > 0 && r->n_tokens < MAX_TOTAL / 2) {
        memcpy(w->said, r->tokens, (size_t)r->n_tokens * sizeof *w->said);
        w->n_said = r->n_tokens;
        w->said_user = j->user;
        w->said_gated = j->gated;
    }
    w->plan_hash = hash_pair(w->plan_hash, r->id * 16 + (uint64_t)r->finish);
    j->req = NULL;
    w->n_live--;
    w->n_finished++;
    w->n_events += r->finish == REQ_FINISH_DEADLINE;
}

/* --- a world --- */

static int32_t pick(struct rng *r, const int32_t *from, int n)
{
    return from[rng_range(r, 0, n - 1)];
}

static void choose_config(struct world *w)
{
    static const int32_t pools[] = {3, 8, 16, 24, 32, 48, 64, 128};
    struct rng *r = &w->rng;
    w->n_priorities = rng_range(r, 0, 2) ? 1 : 3;
    w->n_tenants = rng_range(r, 1, 4);
    w->load = rng_range(r, 1, 3);
    w->pause = rng_range(r, 0, 3) ? 4 : 100;
    w->calm = rng_range(r, 0, 3) == 0;
    w->cfg = (struct sched_config){
        .max_running = rng_range(r, 1, 10),
        .max_partial_prefills = rng_range(r, 1, 4),
        .max_long_partial = rng_range(r, 1, 2),
        .long_prefill_tokens = rng_range(r, 0, 3) * 128,
        .watermark_pages = rng_range(r, 0, 1) * rng_range(r, 0, 3),
        .max_queued = rng_range(r, 4, 24),
        .max_queued_tokens = rng_range(r, 500, 20000),
        .max_tenant_requests = rng_range(r, 0, 1) ? rng_range(r, 2, 20) : 0,
        .max_model_len = rng_range(r, 0, 1) ? MAX_TOTAL : rng_range(r, 130, 900),
        .model_fingerprint = 7,
        .share_generated = rng_range(r, 0, 1),
        .n_eos = 1,
        .eos_ids = {EOS},
        .step_us = rng_range(r, 0, 1) * rng_range(r, 1, 100000),
    };
    w->cfg.token_budget = w->cfg.max_running + 128 + rng_range(r, 0, 500);
    w->kv_cfg = (struct kv_cache_config){.n_pages = pick(r, pools, 8),
                                         .max_seqs = w->cfg.max_running,
                                         .max_pages_per_seq = kv_pages_for(w->cfg.max_model_len),
                                         .prefix_cache = rng_range(r, 0, 4) > 0};
}

static void world_open(struct world *w, uint64_t seed)
{
    const struct sched_events ev = {on_progress, on_token, on_finish, w};
    struct err_msg why = {""};
    memset(w, 0, sizeof *w);
    w->rng.s = seed;
    choose_config(w);
    size_t n = (size_t)w->kv_cfg.n_pages, m = (size_t)w->cfg.max_running;
    w->jobs = mem_zalloc(MAX_LIVE, sizeof *w->jobs);
    w->cells = mem_zalloc(n * KV_PAGE_TOKENS, sizeof *w->cells);
    w->writer = mem_zalloc(n, sizeof *w->writer);
    w->result.tokens = mem_zalloc(m, sizeof *w->result.tokens);
    w->result.counts = mem_zalloc(m, sizeof *w->result.counts);
    for (int i = 0; i < N_PREFIXES; i++) {
        w->prefix[i] = mem_zalloc(MAX_TOTAL, sizeof *w->prefix[i]);
        for (int k = 0; k < MAX_TOTAL; k++)
            w->prefix[i][k] = rng_range(&w->rng, 1, VOCAB - 1);
    }
    if (kv_cache_create(&w->kv, &w->kv_cfg, &why) < 0 ||
        sched_create(&w->sched, &w->cfg, w->kv, &ev, &why) < 0)
        fail_msg("%s", why.text);
}

static void world_close(struct world *w)
{
    sched_destroy(w->sched);
    assert_int_equal(kv_free_pages(w->kv), w->kv_cfg.n_pages);
    kv_prefix_reset(w->kv);
    assert_ok(kv_check(w->kv, NULL));
    kv_cache_destroy(w->kv);
    mem_free(w->jobs);
    mem_free(w->cells);
    mem_free(w->writer);
    mem_free(w->result.tokens);
    mem_free(w->result.counts);
    for (int i = 0; i < N_PREFIXES; i++)
        mem_free(w->prefix[i]);
}

/* --- what the outside does --- */

static struct job *free_job(struct world *w)
{
    for (int i = 0; i < MAX_LIVE; i++)
        if (!w->jobs[i].req && !w->jobs[i].used)
            return &w->jobs[i];
    return NULL;
}

static int32_t prompt_length(struct world *w)
{
    int32_t max = sched_max_servable(w->sched);
    switch (rng_range(&w->rng, 0, 9)) {
    case 0: return rng_range(&w->rng, 0, 2);
    case 1: return max - 2 + rng_range(&w->rng, 0, 3); /* max - 1 is the longest served */
    case 2: return 64 * rng_range(&w->rng, 1, 8) + rng_range(&w->rng, -1, 1);
    case 3: return rng_range(&w->rng, 1, max);
    case 6: return rng_range(&w->rng, 260, 900);
    case 4: return rng_range(&w->rng, 1, 40);
    case 5: return w->n_said + 20 < max ? w->n_said + rng_range(&w->rng, 1, 20) : 1;
    default: return rng_range(&w->rng, 1, 400);
    }
}

/* Without a limit of its own only where the pool or the model sets a near one, see patience(). */
static int32_t output_length(struct world *w)
{
    if (rng_range(&w->rng, 0, 19))
        return rng_range(&w->rng, 1, 70);
    return sched_max_servable(w->sched) <= UNLIMITED ? INT32_MAX : rng_range(&w->rng, 1, 200);
}

/* The next turn of a conversation, or a prompt that shares much, little or nothing with others. */
static void fill_prompt(struct world *w, struct job *j, int32_t *prompt)
{
    struct rng *r = &w->rng;
    const int32_t *from = w->prefix[rng_range(r, 0, N_PREFIXES - 1)];
    int32_t n = j->n_prompt, shared = rng_range(r, 0, 4) ? rng_range(r, n / 2, n) : 0;
    if (w->n_said > 0 && (n > w->n_said || rng_range(r, 0, 2) == 0)) {
        from = w->said;
        shared = n < w->n_said ? n : w->n_said;
        j->user = w->said_user;
        j->gated = w->said_gated;
    }
    for (int32_t i = 0; i < n; i++)
        prompt[i] = i < shared ? from[i] : rng_range(r, 1, VOCAB - 1);
}

static void submit(struct world *w, int32_t n)
{
    int32_t prompt[MAX_TOTAL + 8];
    struct rng *r = &w->rng;
    struct job *j = free_job(w);
    struct err_msg why = {""};
    if (!j || n > MAX_TOTAL)
        return;
    *j = (struct job){.n_prompt = n,
                      .max_tokens = output_length(w),
                      .user = rng_range(r, 0, N_USERS - 1),
                      .priority = rng_range(r, 0, w->n_priorities - 1),
                      .gated = rng_range(r, 0, 5) == 0,
                      .decode_gated = rng_range(r, 0, 3) == 0,
                      .born_step = w->steps};
    fill_prompt(w, j, prompt);
    struct req_params p = {.prompt = prompt,
                           .n_prompt = n,
                           .max_tokens = j->max_tokens,
                           .policy = {.gate = j->gated ? BATCH_ABS : BATCH_DENSE,
                                      .decode_gate = j->decode_gated ? BATCH_ABS : BATCH_DENSE},
                           .policy_fingerprint = j->gated,
                           .priority = j->priority,
                           .salt = {(uint8_t)(j->user % 2)},
                           .n_salt = 1,
                           .sampling = {.ignore_eos = rng_range(r, 0, 1)},
                           .user = j};
    p.tenant[0] = (char)('a' + j->user % w->n_tenants);
    if (!w->calm && rng_range(r, 0, 5) == 0)
        p.deadline_us = rng_range(r, 1, 600000);
    if (!w->calm && rng_range(r, 0, 5) == 0)
        p.queue_timeout_us = rng_range(r, 1, 200000);
    int err = sched_submit(w->sched, &p, w->now_us, &j->req, &why);
    if (err < 0) {
        assert_null(j->req);
        assert_true(why.text[0]);
        assert_true(n >= 1 || err == ERR_INVALID);
        assert_int_equal(n >= sched_max_servable(w->sched), err == ERR_TOO_LONG);
        w->n_refused++;
        return;
    }
    assert_in_range(n, 1, sched_max_servable(w->sched) - 1);
    j->id = j->req->id;
    w->n_live++;
    w->n_events++;
    w->n_submitted++;
    extend_reference(w, j, j->req);
}

/* Several questions about a new document at once. */
static void burst(struct world *w)
{
    w->n_said = rng_range(&w->rng, 300, 900);
    w->said_user = rng_range(&w->rng, 0, N_USERS - 1);
    w->said_gated = rng_range(&w->rng, 0, 1);
    for (int i = 0; i < w->n_said; i++)
        w->said[i] = rng_range(&w->rng, 1, VOCAB - 1);
    for (int i = rng_range(&w->rng, 2, 4); i > 0; i--)
        submit(w, w->n_said + rng_range(&w->rng, 1, 100));
}

static void cancel_job(struct world *w, struct job *j)
{
    j->disturbed = true;
    sched_cancel(w->sched, j->req, REQ_FINISH_CANCELLED, 0);
    assert_null(j->req);
    w->n_events++;
}

static void cancel_one(struct world *w)
{
    int at = rng_range(&w->rng, 0, MAX_LIVE - 1);
    for (int i = 0; i < MAX_LIVE; i++) {
        struct job *j = &w->jobs[(at + i) % MAX_LIVE];
        if (j->req) {
            cancel_job(w, j);
            return;
        }
    }
}

static void disconnect(struct world *w)
{
    int user = rng_range(&w->rng, 0, N_USERS - 1);
    w->n_events++;
    for (int i = 0; i < MAX_LIVE; i++)
        if (w->jobs[i].req && w->jobs[i].user == user)
            cancel_job(w, &w->jobs[i]);
}

static void outside(struct world *w)
{
    if (rng_range(&w->rng, 0, w->pause) == 0)
        for (int i = rng_range(&w->rng, 0, w->load); i > 0; i--)
            submit(w, prompt_length(w));
    if (rng_range(&w->rng, 0, 59) == 0)
        burst(w);
    w->now_us += rng_range(&w->rng, 0, 2000);
    if (w->calm)
        return;
    if (rng_range(&w->rng, 0, 29) == 0)
        cancel_one(w);
    if (rng_range(&w->rng, 0, 299) == 0)
        disconnect(w);
    if (rng_range(&w->rng, 0, 3) == 0)
        sched_expire(w->sched, w->now_us);
}

/* --- the executor --- */

static struct job *job_of(struct world *w, uint64_t id)
{
    for (int i = 0; i < MAX_LIVE; i++)
        if (w->jobs[i].req && w->jobs[i].id == id)
            return &w->jobs[i];
    return NULL;
}

static uint64_t *cell(struct world *w, const struct batch_seq *q, int32_t pos)
{
    int32_t page = q->pages[pos / KV_PAGE_TOKENS];
    assert_in_range(page, 0, w->kv_cfg.n_pages - 1);
    return &w->cells[(size_t)page * KV_PAGE_TOKENS + (size_t)(pos % KV_PAGE_TOKENS)];
}

static void check_chunk(const struct batch_seq *q)
{
    int32_t end = q->start + q->n_tokens;
    assert_true(q->n_tokens > 0 && q->n_pages == kv_pages_for(end));
    if (q->start < q->prompt_len) {
        assert_int_equal(q->start % KV_BLOCK_TOKENS, 0);
        assert_true(end == q->prompt_len || (end < q->prompt_len && end % KV_BLOCK_TOKENS == 0));
    } else {
        assert_true(q->sample || end % KV_BLOCK_TOKENS == 0);
    }
    if (q->sample)
        assert_non_null(q->sampling);
}

/* Runs one sequence of the plan made at `step`; false when its job has been cancelled meanwhile. */
static void execute_seq(struct world *w, const struct batch *b, int32_t i)
{
    const struct batch_seq *q = &b->seqs[i];
    const struct job *j = job_of(w, q->id);
    uint64_t mark = b->step_id << 16 | (uint64_t)i;
    check_chunk(q);
    for (int32_t pos = KV_PAGE_TOKENS - 1; j && pos < q->start; pos += KV_PAGE_TOKENS)
        assert_true(*cell(w, q, pos) == j->chain[pos]);
    uint64_t chain = 0;
    if (q->start)
        chain = *cell(w, q, q->start - 1);
    else if (j)
        chain = chain_start(j);
    for (int32_t pos = q->start; pos < q->start + q->n_tokens; pos++) {
        uint64_t *writer = &w->writer[q->pages[pos / KV_PAGE_TOKENS]];
        assert_true(*writer >> 16 != b->step_id || *writer == mark); /* one writer a page */
        *writer = mark;
        bool generated = pos >= q->prompt_len && (q->policy.decode_gate || !w->cfg.share_generated);
        chain = mix(chain, q->tokens[pos], generated);
        *cell(w, q, pos) = chain;
        if (j)
            assert_true(chain == j->chain[pos]);
    }
    w->result.tokens[i] = (struct batch_token){.token = q->sample ? token_after(chain) : -1};
    w->result.counts[i] = (struct batch_counts){.reachable = 3, .visited = 2, .kept = 1};
}

static void spoil(struct world *w, const struct batch *b)
{
    for (int32_t i = 0; i < b->n_seqs; i++) {
        struct job *j = job_of(w, b->seqs[i].id);
        if (!b->seqs[i].sample || rng_range(&w->rng, 0, 999) > 0)
            continue;
        w->result.tokens[i] = (struct batch_token){.token = -1, .numeric = true};
        w->n_events++;
        if (j)
            j->disturbed = true;
    }
}

static int execute(struct world *w, const struct batch *b)
{
    int32_t n = 0;
    for (int32_t i = 0; i < b->n_seqs; i++) {
        execute_seq(w, b, i);
        n += b->seqs[i].n_tokens;
    }
    assert_int_equal(n, b->n_tokens);
    assert_in_range(n, 1, w->cfg.token_budget);
    if (w->calm)
        return 0;
    spoil(w, b);
    if (rng_range(&w->rng, 0, 199) > 0)
        return 0;
    w->n_events++;
    for (int32_t i = 0; i < b->n_seqs; i++) {
        struct job *j = job_of(w, b->seqs[i].id);
        if (j)
            j->disturbed = true;
    }
    return ERR_CUDA;
}

static void hash_plan(struct world *w, const struct batch *b)
{
    for (int32_t i = 0; i < b->n_seqs; i++) {
        const struct batch_seq *q = &b->seqs[i];
        uint64_t h = hash_bytes(q->pages, (size_t)q->n_pages * sizeof *q->pages, q->id);
        h = hash_pair(h, (uint64_t)q->start << 32 | (uint32_t)q->n_tokens);
        w->plan_hash = hash_pair(w->plan_hash, h);
    }
}

static void check(const struct world *w)
{
    struct err_msg why = {""};
    if (sched_check(w->sched, &why) < 0)
        fail_msg("step %lld: %s", (long long)w->steps, why.text);
}

/* One turn: plan, things happen while the step runs, update. False when there was nothing to do. */
static bool turn(struct world *w, bool disturb)
{
    const struct batch *b = sched_plan(w->sched, w->now_us);
    if (!b) {
        assert_false(sched_has_work(w->sched)); /* never idle while somebody waits */
        return false;
    }
    w->steps++;
    hash_plan(w, b);
    int status = execute(w, b); /* before the cancels: it knows the jobs by then */
    if (disturb)
        outside(w);
    check(w);
    w->now_us += 500;
    w->result.total_us = rng_range(&w->rng, 0, 200000);
    sched_update(w->sched, status, status < 0 ? NULL : &w->result, w->now_us);
    check(w);
    return true;
}

/* Steps that the requests which can be ahead of one of the best priority may take: those queued and
 * running when it came, and a few of each other tenant, each as long as the pool allows, computed
 * at least one chunk or token a step, some of it again after a preemption. */
static int64_t patience(const struct world *w)
{
    int64_t ahead = w->cfg.max_queued + 2 * w->cfg.max_running + 4 * w->n_tenants;
    int64_t longest = sched_max_servable(w->sched);
    int64_t steps_each = longest / KV_BLOCK_TOKENS * 4 + (longest < UNLIMITED ? longest : 200);
    return ahead * steps_each;
}

static void run_world(struct world *w, uint64_t seed, struct totals *sum)
{
    struct sched_stats st;
    world_open(w, seed);
    while (w->n_events < WORLD_EVENTS) {
        outside(w);
        (void)turn(w, true);
    }
    while (turn(w, false)) {
    }
    assert_int_equal(w->n_live, 0);
    assert_int_equal(w->n_finished, w->n_submitted);
    sched_get_stats(w->sched, &st);
    assert_int_equal(st.n_submitted, w->n_submitted);
    if (w->longest > patience(w))
        fail_msg("a request lived %lld steps, more than %lld", (long long)w->longest,
                 (long long)patience(w));
    sum->events += w->n_events;
    sum->steps += (uint64_t)w->steps;
    sum->preempted += st.n_preempted;
    sum->cached += st.cached_tokens;
    sum->refused += w->n_refused;
    if (w->longest > sum->longest)
        sum->longest = w->longest;
    for (int i = 0; i <= REQ_FINISH_SHUTDOWN; i++)
        sum->finished[i] += st.finished[i];
    world_close(w);
}

static void random_worlds(void **state)
{
    struct rng rng = test_rng("random_worlds", 20261121);
    struct totals sum = {.events = 0}, again = {.events = 0};
    struct world *w = mem_zalloc(1, sizeof *w);
    (void)state;
    for (int i = 0; sum.events < EVENTS; i++) {
        uint64_t seed = rng_u64(&rng), first;
        printf("# world %d seed %llu\n", i, (unsigned long long)seed);
        run_world(w, seed, &sum);
        first = w->plan_hash;
        run_world(w, seed, &again);
        assert_true(w->plan_hash == first);
    }
    mem_free(w);
    printf("# %llu events, %llu steps, %llu preemptions, %llu cached tokens, %llu refused, longest "
           "life %lld steps\n",
           (unsigned long long)sum.events, (unsigned long long)sum.steps,
           (unsigned long long)sum.preempted, (unsigned long long)sum.cached,
           (unsigned long long)sum.refused, (long long)sum.longest);
    for (int i = REQ_FINISH_STOP; i <= REQ_FINISH_SHUTDOWN; i++)
        printf("#   %s %llu\n", req_finish_name((enum req_finish)i),
               (unsigned long long)sum.finished[i]);
    assert_true(sum.preempted > 100 && sum.cached > 10000);
    for (int i = REQ_FINISH_STOP; i < REQ_FINISH_SHUTDOWN; i++)
        assert_true(sum.finished[i] > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(random_worlds)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
