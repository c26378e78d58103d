/* Every invariant of the scheduler, and the cache's. For tests and debug builds: it walks all
 * requests and allocates. */
#include "scheduler/sched_internal.h"

#include "core/mem.h"

#define REQUIRE(cond, r)                                                                           \
    do {                                                                                           \
        if (!(cond))                                                                               \
            return err_set(why, ERR_INTERNAL, "request %llu: %s", (unsigned long long)(r)->id,     \
                           #cond);                                                                 \
    } while (0)

struct census {
    int32_t n_waiting, n_fresh, n_running, n_slots, n_expiring;
    int64_t fresh_tokens;
};

static int check_running(const struct sched *s, const struct sched_req *r, struct err_msg *why)
{
    const struct request *p = &r->pub;
    int32_t n_pages, at = 0;
    while (at < s->n_running && s->running[at] != r)
        at++;
    REQUIRE(at < s->n_running, p);
    REQUIRE(at == 0 || sched_keep_before(s->running[at - 1], r), p);
    REQUIRE(p->slot >= 0 && !r->resumed && !heap_linked(&r->wait), p);
    (void)kv_seq_pages(s->kv, p->slot, &n_pages);
    REQUIRE(r->covered == n_pages * KV_PAGE_TOKENS, p);
    REQUIRE(p->n_computed + p->in_flight <= r->covered, p);
    REQUIRE(p->n_computed % SCHED_CHUNK == 0 || p->n_computed >= p->n_prompt, p);
    REQUIRE(s->plan_out || p->in_flight == 0, p);
    REQUIRE(r->leader == 0 || (p->n_computed < r->common && r->common < p->n_prompt), p);
    REQUIRE(p->scheduled_us >= p->submit_us, p);
    return 0;
}

static int check_request(const struct sched *s, const struct sched_req *r, struct census *c,
                         struct err_msg *why)
{
    const struct request *p = &r->pub;
    REQUIRE(p->n_prompt <= p->n_tokens && p->n_tokens <= p->max_total, p);
    REQUIRE(p->max_total <= s->servable, p);
    REQUIRE(p->n_computed <= p->n_tokens, p);
    REQUIRE((p->state == REQ_FINISHED) == (p->finish != REQ_FINISH_NONE), p);
    REQUIRE((p->state == REQ_FINISHED) == (r->tenant == NULL), p);
    REQUIRE(heap_linked(&r->expiry) == (r->expire_us != INT64_MAX), p);
    c->n_expiring += heap_linked(&r->expiry);
    c->n_slots += p->slot >= 0;
    switch (p->state) {
    case REQ_WAITING:
        REQUIRE(p->slot < 0 && p->in_flight == 0 && p->n_computed == 0, p);
        REQUIRE(heap_linked(&r->wait), p);
        REQUIRE(r->resumed == (p->n_preempted > 0), p);
        c->n_waiting++;
        c->n_fresh += !r->resumed;
        c->fresh_tokens += r->resumed ? 0 : p->n_prompt;
        return 0;
    case REQ_RUNNING: c->n_running++; return check_running(s, r, why);
    case REQ_FINISHED: /* kept only while a step names it */
        REQUIRE(p->in_flight > 0 && s->plan_out, p);
        REQUIRE(r->expire_us == INT64_MAX, p);
        return 0;
    }
    return err_set(why, ERR_INTERNAL, "request %llu: state %d", (unsigned long long)p->id,
                   (int)p->state);
}

struct tenant_census {
    int32_t n_tenants[SCHED_LANES], n_backlog, n_idle;
    int64_t n_live, n_waiting;
};

static int check_tenant(const struct sched_tenant *t, bool live, struct tenant_census *c,
                        struct err_msg *why)
{
    int32_t n_waiting = 0;
    for (int i = 0; i < SCHED_LANES; i++) {
        const struct sched_tenant_lane *l = &t->lanes[i];
        int32_t n = heap_check(&l->waiting);
        if (n < 0 || heap_linked(&l->node) != (n > 0) || (n > 0 && l->key > t->served))
            return err_set(why, ERR_INTERNAL, "tenant '%s': lane %d is inconsistent", t->name, i);
        n_waiting += n;
        c->n_tenants[i] += n > 0;
    }
    if (n_waiting != t->n_waiting || n_waiting > t->n_live)
        return err_set(why, ERR_INTERNAL, "tenant '%s': %d wait, counts say %d of %d", t->name,
                       n_waiting, t->n_waiting, t->n_live);
    if (heap_linked(&t->backlog) != (n_waiting > 0) ||
        (n_waiting > 0 && t->backlog_key > t->served))
        return err_set(why, ERR_INTERNAL, "tenant '%s': backlog is inconsistent", t->name);
    if ((t->n_live > 0) != live)
        return err_set(why, ERR_INTERNAL, "tenant '%s': %d live, but in the other list", t->name,
                       t->n_live);
    c->n_backlog += n_waiting > 0;
    c->n_idle += t->n_live == 0;
    c->n_live += t->n_live;
    c->n_waiting += n_waiting;
    return 0;
}

static int check_queue(const struct sched *s, const struct census *c, struct err_msg *why)
{
    const struct wait_queue *q = &s->queue;
    struct tenant_census t = {.n_idle = 0};
    int32_t n_resumed = 0;
    LIST_FOREACH (l, &q->live)
        TRY(check_tenant(LIST_ENTRY(l, struct sched_tenant, member), true, &t, why));
    LIST_FOREACH (l, &q->idle)
        TRY(check_tenant(LIST_ENTRY(l, struct sched_tenant, member), false, &t, why));
    for (int i = 0; i < SCHED_LANES; i++) {
        int32_t n = heap_check(&q->resumed[i]);
        if (n < 0 || heap_check(&q->tenants[i]) != t.n_tenants[i])
            return err_set(why, ERR_INTERNAL, "queue: heaps of lane %d are broken", i);
        n_resumed += n;
    }
    if (heap_check(&q->backlog) != t.n_backlog || q->n_idle != t.n_idle)
        return err_set(why, ERR_INTERNAL,
                       "queue: %d tenants backlogged, %d idle, heap or count "
                       "disagree",
                       t.n_backlog, t.n_idle);
    if (q->n_fresh != t.n_waiting || q->n_fresh != c->n_fresh || q->n_resumed != n_resumed ||
        queue_len(q) != c->n_waiting || q->fresh_tokens != c->fresh_tokens)
        return err_set(why, ERR_INTERNAL,
                       "queue: %d fresh, %d resumed, %lld tokens, found %d, %d, "
                       "%lld",
                       q->n_fresh, q->n_resumed, (long long)q->fresh_tokens, c->n_fresh, n_resumed,
                       (long long)c->fresh_tokens);
    if (t.n_live != (int64_t)c->n_waiting + c->n_running)
        return err_set(why, ERR_INTERNAL, "tenants hold %lld requests of %d", (long long)t.n_live,
                       c->n_waiting + c->n_running);
    return 0;
}

static int check_plan(const struct sched *s, struct err_msg *why)
{
    int32_t n_tokens = 0;
    if (!s->plan_out)
        return 0;
    for (int32_t i = 0; i < s->batch.n_seqs; i++) {
        const struct batch_seq *q = &s->seqs[i];
        const struct request *p = &s->planned[i]->pub;
        REQUIRE(p->id == q->id && p->in_flight == q->n_tokens && q->start == p->n_computed, p);
        REQUIRE(p->slot >= 0 && q->n_pages * KV_PAGE_TOKENS >= q->start + q->n_tokens, p);
        n_tokens += q->n_tokens;
    }
    if (n_tokens != s->batch.n_tokens || n_tokens > s->cfg.token_budget)
        return err_set(why, ERR_INTERNAL, "plan: %d tokens, batch says %d, budget %d", n_tokens,
                       s->batch.n_tokens, s->cfg.token_budget);
    return 0;
}

int sched_check(const struct sched *s, struct err_msg *why)
{
    struct census c = {.n_waiting = 0};
    struct kv_cache_stats kv;
    uint64_t last = 0;
    LIST_FOREACH (l, &s->all) {
        const struct sched_req *r = LIST_ENTRY(l, struct sched_req, all);
        REQUIRE(r->pub.id > last, &r->pub);
        last = r->pub.id;
        TRY(check_request(s, r, &c, why));
    }
    if (c.n_running != s->n_running || s->n_running > s->cfg.max_running)
        return err_set(why, ERR_INTERNAL, "%d requests run, count says %d of %d", c.n_running,
                       s->n_running, s->cfg.max_running);
    if (heap_check(&s->expiry) != c.n_expiring)
        return err_set(why, ERR_INTERNAL, "expiry heap is broken or not of size %d", c.n_expiring);
    kv_cache_get_stats(s->kv, &kv);
    if (kv.open_seqs < c.n_slots)
        return err_set(why, ERR_INTERNAL, "%d slots held, the cache has %d open", c.n_slots,
                       kv.open_seqs);
    TRY(check_queue(s, &c, why));
    TRY(check_plan(s, why));
    return kv_check(s->kv, why);
}
