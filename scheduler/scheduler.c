/* The policy's frame: configuration, the running set, deadlines, cancel, statistics. The running
 * set is an array in the order in which requests are kept, best first: a decode that needs a page
 * visits it from the front, preemption takes from the back, so whoever stands first is never
 * preempted and something always finishes. What a step does is in sched_plan.c and sched_update.c.
 */
#include "scheduler/scheduler.h"

#include "core/mem.h"
#include "scheduler/sched_internal.h"

#include <errno.h>
#include <inttypes.h>

bool sched_keep_before(const struct sched_req *a, const struct sched_req *b)
{
    bool aged_a = a->pub.n_preempted >= SCHED_AGED, aged_b = b->pub.n_preempted >= SCHED_AGED;
    if (a->pub.priority != b->pub.priority)
        return a->pub.priority < b->pub.priority;
    return aged_a != aged_b ? aged_a : a->pub.id < b->pub.id;
}

void sched_insert_running(struct sched *s, struct sched_req *r)
{
    int32_t i = s->n_running++;
    ASSERT(i < s->cfg.max_running);
    for (; i > 0 && sched_keep_before(r, s->running[i - 1]); i--)
        s->running[i] = s->running[i - 1];
    s->running[i] = r;
}

void sched_remove_running(struct sched *s, const struct sched_req *r)
{
    int32_t i = s->n_running - 1;
    struct sched_req *moved = NULL;
    for (; i >= 0; i--) { /* from the end: victims stand there */
        struct sched_req *here = s->running[i];
        s->running[i] = moved;
        moved = here;
        if (here == r)
            break;
    }
    ASSERT(i >= 0);
    s->n_running--;
}

static bool expires_before(const struct heap_node *a, const struct heap_node *b)
{
    const struct sched_req *x = LIST_ENTRY(a, struct sched_req, expiry);
    const struct sched_req *y = LIST_ENTRY(b, struct sched_req, expiry);
    return x->expire_us != y->expire_us ? x->expire_us < y->expire_us : x->pub.id < y->pub.id;
}

void sched_set_expiry(struct sched *s, struct sched_req *r)
{
    const struct request *p = &r->pub;
    int64_t at = INT64_MAX;
    if (p->state != REQ_FINISHED)
        at = p->deadline_us;
    if (p->state == REQ_WAITING && !r->resumed && p->queue_deadline_us < at)
        at = p->queue_deadline_us;
    if (at == r->expire_us)
        return;
    if (heap_linked(&r->expiry))
        heap_remove(&s->expiry, &r->expiry);
    r->expire_us = at;
    if (at != INT64_MAX)
        heap_insert(&s->expiry, &r->expiry);
}

static int check_config(const struct sched_config *c, struct err_msg *why)
{
    if (c->max_running < 1)
        return err_set(why, ERR_CONFIG, "max_running: %d is under 1", c->max_running);
    if (c->token_budget < SCHED_CHUNK || c->token_budget - SCHED_CHUNK < c->max_running)
        return err_set(why, ERR_CONFIG,
                       "token_budget: %d is under max_running + %d = %lld; decodes could keep "
                       "prefills waiting for ever",
                       c->token_budget, SCHED_CHUNK, (long long)c->max_running + SCHED_CHUNK);
    if (c->step_us < 0)
        return err_set(why, ERR_CONFIG, "step_us: %" PRId64 " is negative", c->step_us);
    if (c->max_partial_prefills < 1 || c->max_long_partial < 1)
        return err_set(why, ERR_CONFIG, "%s: under 1",
                       c->max_long_partial < 1 ? "max_long_partial" : "max_partial_prefills");
    if (c->long_prefill_tokens < 0 || c->watermark_pages < 0 || c->max_tenant_requests < 0)
        return err_set(why, ERR_CONFIG,
                       "long_prefill_tokens %d, watermark_pages %d and max_tenant_requests %d must "
                       "not be negative",
                       c->long_prefill_tokens, c->watermark_pages, c->max_tenant_requests);
    if (c->max_queued < 1 || c->max_queued_tokens < 1)
        return err_set(why, ERR_CONFIG, "%s: under 1",
                       c->max_queued < 1 ? "max_queued" : "max_queued_tokens");
    if (c->max_model_len < 2)
        return err_set(why, ERR_CONFIG, "max_model_len: %d is under 2", c->max_model_len);
    if (c->n_eos < 0 || c->n_eos > BATCH_MAX_STOP)
        return err_set(why, ERR_CONFIG, "n_eos: %d is outside 0 to %d", c->n_eos, BATCH_MAX_STOP);
    return 0;
}

static int32_t pool_ceiling(const struct kv_cache *kv, int32_t max_model_len)
{
    struct kv_cache_stats st;
    kv_cache_get_stats(kv, &st);
    int32_t pool = kv_max_servable_tokens(st.n_pages, kv_pages_for(max_model_len));
    return pool < max_model_len ? pool : max_model_len;
}

int sched_create(struct sched **out, const struct sched_config *cfg, struct kv_cache *kv,
                 const struct sched_events *events, struct err_msg *why)
{
    TRY(check_config(cfg, why));
    ASSERT(events->progress && events->token && events->finish);
    struct sched *s = mem_zalloc(1, sizeof *s);
    size_t n = (size_t)cfg->max_running;
    s->cfg = *cfg;
    s->kv = kv;
    s->ev = *events;
    s->servable = pool_ceiling(kv, cfg->max_model_len);
    s->next_id = 1;
    s->expiry.before = expires_before;
    queue_init(&s->queue);
    list_init(&s->all);
    s->running = mem_zalloc(n, sizeof *s->running);
    s->seqs = mem_zalloc(n, sizeof *s->seqs);
    s->planned = mem_zalloc(n, sizeof *s->planned);
    s->partial = mem_zalloc(n, sizeof *s->partial);
    s->batch.seqs = s->seqs;
    *out = s;
    return 0;
}

void sched_destroy(struct sched *s)
{
    if (!s)
        return;
    ASSERT(!s->plan_out);
    sched_cancel_all(s, REQ_FINISH_SHUTDOWN, 0);
    ASSERT(list_empty(&s->all));
    queue_deinit(&s->queue);
    mem_free(s->running);
    mem_free(s->seqs);
    mem_free(s->planned);
    mem_free(s->partial);
    mem_free(s);
}

int32_t sched_max_servable(const struct sched *s)
{
    return s->servable;
}

void sched_cancel(struct sched *s, struct request *r, enum req_finish reason, int err)
{
    if (r->state != REQ_FINISHED)
        sched_finish(s, sched_req_of(r), reason, err);
}

void sched_drain(struct sched *s)
{
    s->draining = true;
}

void sched_cancel_all(struct sched *s, enum req_finish reason, int err)
{
    LIST_FOREACH_SAFE(l, next, &s->all)
    sched_cancel(s, &LIST_ENTRY(l, struct sched_req, all)->pub, reason, err);
}

bool sched_has_work(const struct sched *s)
{
    return s->plan_out || s->n_running > 0 || queue_len(&s->queue) > 0;
}

int64_t sched_next_deadline(const struct sched *s)
{
    const struct heap_node *n = s->expiry.root;
    return n ? LIST_ENTRY(n, struct sched_req, expiry)->expire_us : INT64_MAX;
}

void sched_expire(struct sched *s, int64_t now_us)
{
    while (sched_next_deadline(s) <= now_us)
        sched_finish(s, LIST_ENTRY(s->expiry.root, struct sched_req, expiry), REQ_FINISH_DEADLINE,
                     ERR_DEADLINE);
}

void sched_get_stats(const struct sched *s, struct sched_stats *out)
{
    *out = s->stats;
    out->n_waiting = queue_len(&s->queue);
    out->n_running = s->n_running;
    out->n_in_flight = s->plan_out ? s->batch.n_seqs : 0;
    out->waiting_tokens = s->queue.fresh_tokens;
}
