/* Who enters: submit validates and queues, admission takes from the queue what the step can start.
 *
 * Full-prompt gate: a request is admitted only when every page that its known tokens will need is
 * free, and it takes them at once, so a prefill never fails halfway and no page is promised twice.
 * A cached page costs nothing when somebody uses it already; one that nobody uses leaves the free
 * list like a fresh one. Beside others the watermark stays free for the growth of decodes; a
 * preempted request also leaves one page for each running one, or it would soon be preempted again.
 * Whoever stands at the head and does not fit holds up everybody behind (else large prompts would
 * starve), except that a long prompt waiting for a long place does not hold up short ones.
 * The head that does not fit although nothing runs can never fit: it is failed (stalled-head rule,
 * after LMDeploy's TurboMind). */
#include "scheduler/sched_internal.h"

#include "core/mem.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum admission { ADMITTED, REQUEUED, BLOCKED };

static int check_params(const struct sched *s, const struct req_params *p, struct err_msg *why)
{
    const struct batch_sampling *a = &p->sampling;
    if (!p->prompt || p->n_prompt < 1)
        return err_set(why, ERR_INVALID, "prompt: %d tokens, at least 1 is needed", p->n_prompt);
    if (p->n_prompt >= s->servable)
        return err_set(why, ERR_TOO_LONG,
                       "prompt: %d tokens, but at most %d can be served (%d with one output token)",
                       p->n_prompt, s->servable - 1, s->servable);
    if (p->max_tokens < 1)
        return err_set(why, ERR_INVALID, "max_tokens: %d, at least 1 is needed", p->max_tokens);
    if (a->n_stop < 0 || a->n_stop > BATCH_MAX_STOP)
        return err_set(why, ERR_INVALID, "stop_ids: %d, at most %d are allowed", a->n_stop,
                       BATCH_MAX_STOP);
    if (memchr(p->tenant, 0, sizeof p->tenant) == NULL)
        return err_set(why, ERR_INVALID, "tenant: longer than %d bytes", REQ_TENANT_BYTES - 1);
    if (p->n_salt > sizeof p->salt)
        return err_set(why, ERR_INVALID, "salt: %zu bytes, at most %d are allowed", p->n_salt,
                       REQ_SALT_BYTES);
    if (p->deadline_us < 0 || p->queue_timeout_us < 0)
        return err_set(why, ERR_INVALID, "%s: negative",
                       p->deadline_us < 0 ? "deadline" : "queue_timeout");
    return 0;
}

static int check_room(const struct sched *s, const struct req_params *p, struct err_msg *why)
{
    const struct sched_config *c = &s->cfg;
    const struct sched_tenant *t = queue_find_tenant(&s->queue, p->tenant);
    if (s->draining)
        return err_set(why, ERR_DRAINING, "%s", err_str(ERR_DRAINING));
    if (c->max_tenant_requests > 0 && t && t->n_live >= c->max_tenant_requests)
        return err_set(why, ERR_TENANT_LIMIT, "tenant has %d requests, at most %d are allowed",
                       t->n_live, c->max_tenant_requests);
    if (s->queue.n_fresh >= c->max_queued)
        return err_set(why, ERR_QUEUE_FULL, "%d requests are waiting, at most %d are allowed",
                       s->queue.n_fresh, c->max_queued);
    if (s->queue.n_fresh > 0 && s->queue.fresh_tokens + p->n_prompt > c->max_queued_tokens)
        return err_set(
            why, ERR_QUEUE_FULL, "%lld prompt tokens are waiting, %d more would exceed %lld",
            (long long)s->queue.fresh_tokens, p->n_prompt, (long long)c->max_queued_tokens);
    return 0;
}

static int64_t after(int64_t now_us, int64_t span_us)
{
    return span_us == 0 || span_us > INT64_MAX - now_us ? INT64_MAX : now_us + span_us;
}

/* Copies p. The token array has its final size from the start, because a step in flight reads it;
 * plain malloc, so that the part for tokens not yet generated costs no memory until it is written.
 */
static struct sched_req *new_request(const struct sched *s, const struct req_params *p,
                                     int64_t now_us)
{
    int64_t total = (int64_t)p->n_prompt + p->max_tokens;
    if (total > s->servable)
        total = s->servable;
    int32_t *tokens = malloc((size_t)total * sizeof *tokens);
    if (!tokens)
        return NULL;
    memcpy(tokens, p->prompt, (size_t)p->n_prompt * sizeof *tokens);
    struct sched_req *r = mem_zalloc(1, sizeof *r);
    r->expire_us = INT64_MAX;
    r->at_limit = REQ_FINISH_LENGTH;
    if (total < (int64_t)p->n_prompt + p->max_tokens && s->servable < s->cfg.max_model_len)
        r->at_limit = REQ_FINISH_CAPACITY; /* the pool ends it, not its own or the model's limit */
    r->pub = (struct request){
        .state = REQ_WAITING,
        .tokens = tokens,
        .n_prompt = p->n_prompt,
        .n_tokens = p->n_prompt,
        .max_total = (int32_t)total,
        .slot = -1,
        .sampling = p->sampling,
        .policy = p->policy,
        .seed = kv_seed(s->cfg.model_fingerprint, p->policy_fingerprint, p->salt, p->n_salt),
        .priority = p->priority,
        .user = p->user,
        .submit_us = now_us,
        .deadline_us = after(now_us, p->deadline_us),
        .queue_deadline_us = after(now_us, p->queue_timeout_us),
    };
    memcpy(r->pub.tenant, p->tenant, sizeof r->pub.tenant);
    return r;
}

static bool is_long(const struct sched *s, int32_t n_left)
{
    return s->cfg.long_prefill_tokens > 0 && n_left > s->cfg.long_prefill_tokens;
}

void sched_classify(const struct sched *s, struct sched_req *r)
{
    const struct request *p = &r->pub;
    r->lane = SCHED_SHORT;
    if (!is_long(s, p->n_tokens))
        return;
    int32_t hit = kv_prefix_peek(s->kv, p->seed, p->tokens, sched_shareable(s, p), NULL);
    if (is_long(s, p->n_tokens - hit))
        r->lane = SCHED_LONG;
}

int sched_submit(struct sched *s, const struct req_params *p, int64_t now_us, struct request **out,
                 struct err_msg *why)
{
    TRY(check_params(s, p, why));
    TRY(check_room(s, p, why));
    struct sched_req *r = new_request(s, p, now_us);
    if (!r)
        return err_set(why, -ENOMEM, "no memory for a request of %d tokens", p->n_prompt);
    r->pub.id = s->next_id++;
    r->tenant = queue_join_tenant(&s->queue, r->pub.tenant);
    list_push_back(&s->all, &r->all);
    sched_classify(s, r);
    queue_push(&s->queue, r);
    sched_set_expiry(s, r);
    s->stats.n_submitted++;
    *out = &r->pub;
    return 0;
}

/* Pages that must stay free beside those r takes. */
static int32_t headroom(const struct sched *s, const struct sched_req *r)
{
    if (s->n_running == 0)
        return 0;
    return s->cfg.watermark_pages + (r->resumed ? s->n_running : 0);
}

static void start(struct sched *s, struct sched_req *r, int32_t hit, int64_t now_us)
{
    struct request *p = &r->pub;
    if (!r->resumed) {
        queue_charge(r->tenant, p->n_prompt - hit);
        p->n_cached = hit;
        p->scheduled_us = now_us;
        s->stats.prompt_tokens += (uint64_t)p->n_prompt;
        s->stats.cached_tokens += (uint64_t)hit;
    }
    queue_remove(&s->queue, r);
    p->state = REQ_RUNNING;
    p->n_computed = hit;
    r->covered = kv_pages_for(p->n_tokens) * KV_PAGE_TOKENS;
    r->resumed = false;
    r->passed_over = 0;
    r->long_prefill = is_long(s, p->n_tokens - hit);
    s->n_long += r->long_prefill;
    sched_set_expiry(s, r);
    sched_insert_running(s, r);
    sched_choose_leader(s, r);
    s->partial[s->n_partial++] = r; /* decodes are planned already; one token left is a chunk too */
}

/* Takes the slot and every page of r's known tokens, of which `hit` are cached. */
static enum admission take_pages(struct sched *s, struct sched_req *r, int32_t hit, int64_t now_us)
{
    struct request *p = &r->pub;
    int32_t slot;
    if (kv_seq_open(s->kv, &slot) < 0)
        return BLOCKED;
    int32_t got = kv_seq_attach(s->kv, slot, p->seed, p->tokens, sched_shareable(s, p));
    ASSERT(got == hit);
    int err = kv_seq_reserve(s->kv, slot, p->n_tokens);
    if (err < 0) {
        kv_seq_close(s->kv, slot);
        if (err == ERR_NO_BLOCKS)
            return BLOCKED;
        sched_finish(s, r, REQ_FINISH_ERROR, err);
        return REQUEUED;
    }
    p->slot = slot;
    start(s, r, hit, now_us);
    return ADMITTED;
}

static enum admission admit(struct sched *s, struct sched_req *r, int64_t now_us)
{
    const struct request *p = &r->pub;
    int32_t free_hits = 0, n_free = kv_free_pages(s->kv);
    if (s->blocked.id == p->id && s->n_running > 0 && n_free <= s->blocked.free_pages &&
        ++s->blocked.steps < SCHED_RECHECK)
        return BLOCKED; /* nothing has become free: spare the walk along its prefix */
    int32_t hit = kv_prefix_peek(s->kv, p->seed, p->tokens, sched_shareable(s, p), &free_hits);
    if (r->lane == SCHED_SHORT && is_long(s, p->n_tokens - hit)) {
        queue_move(&s->queue, r, SCHED_LONG); /* what it hoped to find in the cache has gone */
        return REQUEUED;
    }
    int32_t need = kv_pages_for(p->n_tokens) - hit / KV_PAGE_TOKENS + free_hits;
    if (need + headroom(s, r) > n_free) {
        s->blocked.id = p->id;
        s->blocked.free_pages = n_free;
        s->blocked.steps = 0;
        return BLOCKED;
    }
    return take_pages(s, r, hit, now_us);
}

void sched_admit(struct sched *s, int64_t now_us)
{
    while (s->n_running < s->cfg.max_running && s->n_partial < s->cfg.max_partial_prefills &&
           s->budget >= SCHED_CHUNK) {
        struct sched_req *r = queue_best(&s->queue, s->n_long < s->cfg.max_long_partial);
        if (!r)
            return;
        if (admit(s, r, now_us) != BLOCKED)
            continue;
        if (s->n_running > 0)
            return;
        sched_finish(s, r, REQ_FINISH_ERROR, ERR_NO_BLOCKS);
    }
}
