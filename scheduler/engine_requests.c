/* Requests between the two worlds: SUBMIT in, scheduler events out.
 * Ids belong to a connection, so the table is keyed by (connection, id). */
#define LOG_MODULE "engine"
#include "scheduler/engine_internal.h"

#include "core/dtype.h"
#include "core/hash.h"
#include "core/log.h"
#include "core/mem.h"

#include <math.h>
#include <string.h>

static uint64_t key_hash(uint64_t conn, const char *id)
{
    return hash_bytes(id, strlen(id), conn);
}

static struct engine_req **find_slot(struct engine *e, uint64_t conn, const char *id)
{
    uint64_t h = key_hash(conn, id);
    struct engine_req **p = &e->buckets[h & (e->n_buckets - 1)];
    while (*p && !((*p)->hash == h && (*p)->owner->conn == conn && strcmp((*p)->id, id) == 0))
        p = &(*p)->next_in_bucket;
    return p;
}

static void free_req(struct engine *e, struct engine_req *r)
{
    struct engine_req **p = find_slot(e, r->owner->conn, r->id);
    ASSERT(*p == r);
    *p = r->next_in_bucket;
    list_unlink(&r->of_conn);
    mem_free(r->logprobs);
    mem_free(r);
}

/* Policy. */

static int32_t level_of(const struct engine_policy *p, int32_t k)
{
    for (int32_t i = 0; i < p->n_levels; i++) {
        if (p->k[i] == k)
            return i;
    }
    return -1;
}

/* Holds a policy to a density, ABS without one to its level's pages, where that can be. */
static void steer(const struct engine_policy *p, double density, int32_t n_tokens,
                  struct batch_policy *out)
{
    out->steer = (float)p->steer;
    if (p->steer > 0 && !p->steered(p->thresholds, density, n_tokens, out))
        out->steer = 0;
}

static int choose_abs(const struct engine_policy *p, const struct ipc_sparse *s, int32_t n_tokens,
                      struct batch_policy *out, struct err_msg *why)
{
    int32_t level = s->density > 0 && p->n_levels > 0
                        ? p->level_for(p->thresholds, s->density, n_tokens)
                        : level_of(p, s->k);
    if (p->n_levels == 0)
        return err_set(why, ERR_INVALID,
                       "sparse.mode: the daemon has no threshold file (--thresholds)");
    if (level < 0) {
        char list[160] = "";
        for (int32_t i = 0; i < p->n_levels && strlen(list) + 16 < sizeof list; i++)
            (void)snprintf(list + strlen(list), sizeof list - strlen(list), "%s%d", i ? ", " : "",
                           p->k[i]);
        return err_set(why, ERR_INVALID, "sparse.k: %d is not a level of the threshold file (%s)",
                       s->k, list);
    }
    if (s->gate_rows && s->gate_rows != p->gate_rows)
        return err_set(why, ERR_INVALID,
                       "sparse.gate_rows: the thresholds were calibrated for %d, not %d",
                       p->gate_rows, s->gate_rows);
    *out = (struct batch_policy){
        .gate = BATCH_ABS, .gate_rows = (uint8_t)p->gate_rows, .level = (int16_t)level};
    steer(p, s->density, n_tokens, out);
    return 0;
}

static int choose_rel(const struct engine_policy *p, const struct ipc_sparse *s, int32_t n_tokens,
                      struct batch_policy *out, struct err_msg *why)
{
    const int32_t rows = s->gate_rows ? s->gate_rows : KV_BLOCK_TOKENS;
    const void *rel = rows == 64 ? p->rel_64 : p->rel_128;
    *out = (struct batch_policy){
        .gate = BATCH_REL, .gate_rows = (uint8_t)rows, .ln_lambda = (float)s->ln_lambda};
    if (!(s->density > 0))
        return 0;
    if (!rel)
        return err_set(why, ERR_INVALID,
                       "sparse.density: the REL gate of %d rows is not calibrated "
                       "(sluice-calibrate --rel)",
                       rows);
    out->ln_lambda = (float)p->ln_lambda(rel, s->density, n_tokens);
    steer(p, s->density, n_tokens, out);
    return 0;
}

static int choose_policy(const struct engine_policy *p, const struct ipc_submit *m,
                         struct batch_policy *out, struct err_msg *why)
{
    struct ipc_sparse s = m->sparse;
    *out = (struct batch_policy){.gate = BATCH_DENSE, .gate_rows = KV_BLOCK_TOKENS};
    if (s.mode == IPC_SPARSE_AUTO) {
        if ((p->auto_k <= 0 && p->auto_rows <= 0) || m->n_tokens < p->auto_min)
            return 0;
        s = p->auto_rows > 0 ? (struct ipc_sparse){.mode = IPC_SPARSE_REL,
                                                   .gate_rows = p->auto_rows,
                                                   .density = p->auto_density,
                                                   .ln_lambda = p->auto_ln_lambda}
                             : (struct ipc_sparse){.mode = IPC_SPARSE_ABS, .k = p->auto_k};
    }
    if (s.mode == IPC_SPARSE_ABS)
        return choose_abs(p, &s, m->n_tokens, out, why);
    if (s.mode == IPC_SPARSE_REL)
        return choose_rel(p, &s, m->n_tokens, out, why);
    return 0;
}

/* The smallest level of generated tokens that is predicted to reach the density at the prompt's
 * end; where none does they are dense, since nobody asked for less. */
static int choose_decode(const struct engine_policy *p, const struct ipc_submit *m,
                         struct batch_policy *out, struct err_msg *why)
{
    const double asked = m->sparse.decode_density;
    const double density = asked > 0 ? asked : p->decode_density;
    if (!(density > 0) || !(density < 1))
        return 0;
    if (p->n_decode_levels == 0)
        return err_set(why, ERR_INVALID, "sparse.decode_density: %s", p->no_decode);
    for (int32_t i = 0; i < p->n_decode_levels; i++) {
        if (p->decode_predicted(p->thresholds, i, m->n_tokens) >= density) {
            out->decode_gate = BATCH_ABS;
            out->decode_level = (int16_t)i;
            break;
        }
    }
    return 0;
}

/* K/V of layers above the first depend on the policy: it is part of the prefix cache's key. That of
 * generated tokens is not: prompts do not depend on it, and those tokens' pages are not shared. */
static uint64_t policy_fingerprint(const struct engine_policy *p, const struct batch_policy *b)
{
    const uint64_t fields[] = {b->gate,
                               b->gate_rows,
                               (uint64_t)b->level,
                               dtype_f32_bits(b->ln_lambda),
                               dtype_f32_bits(b->steer),
                               dtype_f32_bits(b->blend)};
    if (b->gate == BATCH_DENSE)
        return p->fingerprint;
    return hash_bytes(fields, sizeof fields, p->fingerprint);
}

/* Submit. */

static void fill_sampling(struct batch_sampling *s, const struct ipc_submit *m, uint64_t seed)
{
    *s = (struct batch_sampling){
        .temperature = (float)m->temperature,
        .top_p = (float)m->top_p,
        .min_p = (float)m->min_p,
        .top_k = m->top_k,
        .repetition_penalty = (float)m->repetition_penalty,
        .presence_penalty = (float)m->presence_penalty,
        .frequency_penalty = (float)m->frequency_penalty,
        .seed = seed,
        .n_logprobs = m->logprobs,
        .min_tokens = m->min_tokens,
        .ignore_eos = m->ignore_eos,
        .n_stop = m->n_stop,
    };
    memcpy(s->stop_ids, m->stop_token_ids, sizeof s->stop_ids);
}

static int64_t to_us(int64_t ms)
{
    return ms > INT64_MAX / 4000 ? INT64_MAX / 4 : ms * 1000;
}

static int submit(struct engine *e, struct engine_req *r, const struct ipc_submit *m,
                  struct err_msg *why)
{
    struct req_params p = {
        .prompt = m->tokens,
        .n_prompt = m->n_tokens,
        .max_tokens = m->max_tokens,
        .priority = m->priority,
        .n_salt = (size_t)m->n_salt,
        .deadline_us = to_us(m->deadline_ms),
        .queue_timeout_us = to_us(m->queue_timeout_ms),
        .user = r,
    };
    if (e->state == ENGINE_DEAD)
        return ERR_ENGINE_DEAD;
    TRY(choose_policy(&e->cfg.policy, m, &p.policy, why));
    TRY(choose_decode(&e->cfg.policy, m, &p.policy, why));
    p.policy.lost_mass = m->sparse.lost_mass;
    p.policy_fingerprint = policy_fingerprint(&e->cfg.policy, &p.policy);
    fill_sampling(&p.sampling, m, m->has_seed ? m->seed : hash_pair(e->seeds, e->seeds + 1));
    e->seeds++;
    memcpy(p.tenant, m->tenant, sizeof p.tenant);
    memcpy(p.salt, m->cache_salt, sizeof p.salt);
    return sched_submit(e->sched, &p, e->now_us, &r->req, why);
}

/* When a full queue may have room again: the backlog over the measured rate. */
static int64_t retry_after_ms(const struct engine *e, int err)
{
    struct sched_stats st;
    if (err != ERR_QUEUE_FULL || e->prefill_rate <= 0)
        return 0;
    sched_get_stats(e->sched, &st);
    return (int64_t)((double)st.waiting_tokens / e->prefill_rate * 1000.0) + 1;
}

void engine_on_submit(void *ctx, uint64_t conn, const struct ipc_submit *m)
{
    struct engine *e = ctx;
    struct err_msg why = {""};
    struct engine_conn *owner = ipc_conn_user(e->server, conn);
    struct engine_req **slot = find_slot(e, conn, m->id);

    if (*slot) {
        metrics_error(&e->metrics, ERR_DUPLICATE);
        (void)err_set(&why, ERR_DUPLICATE, "id: '%s' is in use on this connection", m->id);
        ipc_send_failure(e->server, conn, m->id, ERR_DUPLICATE, &why, 0);
        return;
    }
    struct engine_req *r = mem_zalloc(1, sizeof *r);
    r->owner = owner;
    r->hash = key_hash(conn, m->id);
    r->stream = m->stream;
    memcpy(r->id, m->id, sizeof r->id);
    e->now_us = engine_now(e);
    int err = submit(e, r, m, &why);
    if (err < 0) {
        mem_free(r);
        metrics_error(&e->metrics, err);
        ipc_send_failure(e->server, conn, m->id, err, &why, retry_after_ms(e, err));
        return;
    }
    *slot = r;
    list_push_back(&owner->reqs, &r->of_conn);
    ipc_send_accepted(e->server, conn, m->id);
    engine_kick(e);
}

void engine_on_cancel(void *ctx, uint64_t conn, const struct ipc_cancel *m)
{
    struct engine *e = ctx;
    e->now_us = engine_now(e);
    for (int32_t i = 0; i < m->n_ids; i++) {
        struct engine_req *r = *find_slot(e, conn, m->ids[i]);
        if (r) /* one that has ended already is no error */
            sched_cancel(e->sched, r->req, REQ_FINISH_CANCELLED, 0);
    }
    engine_kick(e);
}

void engine_on_open(void *ctx, uint64_t conn, const struct ipc_hello *m)
{
    struct engine *e = ctx;
    struct engine_conn *c = mem_zalloc(1, sizeof *c);
    log_debug("connection %llu opened by '%s'", (unsigned long long)conn, m->client);
    c->conn = conn;
    list_init(&c->reqs);
    list_init(&c->link);
    ipc_conn_set_user(e->server, conn, c);
}

/* Only noted here: the end of the turn cancels, when no call into the scheduler is under way. */
void engine_on_close(void *ctx, uint64_t conn, void *user, int reason)
{
    struct engine *e = ctx;
    struct engine_conn *c = user;
    log_debug("connection %llu closed: %s", (unsigned long long)conn, err_str(reason));
    if (!c)
        return;
    list_push_back(&e->dead, &c->link);
    engine_kick(e);
}

bool engine_reap_dead(struct engine *e)
{
    bool any = false;
    e->now_us = engine_now(e);
    while (!list_empty(&e->dead)) {
        struct engine_conn *c = LIST_ENTRY(e->dead.next, struct engine_conn, link);
        list_unlink(&c->link);
        while (!list_empty(&c->reqs)) { /* finish frees each */
            struct engine_req *r = LIST_ENTRY(c->reqs.next, struct engine_req, of_conn);
            sched_cancel(e->sched, r->req, REQ_FINISH_CANCELLED, 0);
        }
        mem_free(c);
        any = true;
    }
    return any;
}

/* Events of the scheduler. */

static void on_progress(void *ctx, const struct request *req)
{
    struct engine *e = ctx;
    struct engine_req *r = req->user;
    struct ipc_progress m = {.computed =
                                 req->n_computed < req->n_prompt ? req->n_computed : req->n_prompt,
                             .prompt_len = req->n_prompt,
                             .cached = req->n_cached};
    memcpy(m.id, r->id, sizeof m.id);
    ipc_send_progress(e->server, r->owner->conn, &m);
}

static void add_logprob(struct engine_req *r, const struct batch_token *t)
{
    if (r->n_logprobs == r->cap_logprobs) {
        r->cap_logprobs = r->cap_logprobs ? 2 * r->cap_logprobs : 4;
        r->logprobs = mem_realloc(r->logprobs, (size_t)r->cap_logprobs * sizeof *r->logprobs);
    }
    struct ipc_logprob *lp = &r->logprobs[r->n_logprobs++];
    memset(lp, 0, sizeof *lp);
    lp->token = t->token;
    lp->logprob = t->logprob;
    lp->n_top = t->n_top;
    memcpy(lp->top_ids, t->top_ids, sizeof lp->top_ids);
    memcpy(lp->top_logprobs, t->top_logprobs, sizeof lp->top_logprobs);
}

/* Everything generated and not sent yet, as one message. */
static void send_tokens(struct engine *e, struct engine_req *r, const struct request *req)
{
    int32_t n = req_generated(req) - r->n_sent;
    if (n <= 0)
        return;
    struct ipc_tokens m = {.seq = r->n_sent,
                           .n_tokens = n,
                           .tokens = req->tokens + req->n_prompt + r->n_sent,
                           .logprobs = r->n_logprobs == n ? r->logprobs : NULL};
    memcpy(m.id, r->id, sizeof m.id);
    r->n_sent += n;
    r->n_logprobs = 0;
    ipc_send_tokens(e->server, r->owner->conn, &m);
}

static void on_token(void *ctx, const struct request *req, const struct batch_token *t)
{
    struct engine *e = ctx;
    struct engine_req *r = req->user;
    if (req_generated(req) == 1)
        metrics_observe(&e->metrics.ttft, (double)(e->now_us - req->submit_us) * 1e-6);
    else
        metrics_observe(&e->metrics.itl, (double)(e->now_us - r->last_token_us) * 1e-6);
    r->last_token_us = e->now_us;
    if (req->sampling.n_logprobs > 0)
        add_logprob(r, t);
    if (r->stream)
        send_tokens(e, r, req);
}

double engine_lost_mass(const struct batch_counts *c)
{
    return c->sampled ? c->lost / (double)c->sampled : 0;
}

static int64_t interval(int64_t from, int64_t to)
{
    return from && to ? to - from : 0;
}

static void send_done(struct engine *e, struct engine_req *r, const struct request *req)
{
    static const uint8_t reasons[] = {
        [REQ_FINISH_STOP] = IPC_REASON_STOP,           [REQ_FINISH_LENGTH] = IPC_REASON_LENGTH,
        [REQ_FINISH_CANCELLED] = IPC_REASON_CANCELLED, [REQ_FINISH_DEADLINE] = IPC_REASON_DEADLINE,
        [REQ_FINISH_CAPACITY] = IPC_REASON_CAPACITY,   [REQ_FINISH_ERROR] = IPC_REASON_ERROR,
        [REQ_FINISH_SHUTDOWN] = IPC_REASON_SHUTDOWN,
    };
    struct ipc_done m = {
        .reason = reasons[req->finish],
        .stop_token = req->finish == REQ_FINISH_STOP ? req->tokens[req->n_tokens - 1] : -1,
        .prompt_tokens = req->n_prompt,
        .cached_tokens = req->n_cached,
        .completion_tokens = req_generated(req),
        .preemptions = req->n_preempted,
        .queue_us = interval(req->submit_us, req->scheduled_us),
        .prefill_us = interval(req->scheduled_us, req->first_token_us),
        .ttft_us = interval(req->submit_us, req->first_token_us),
        .decode_us = interval(req->first_token_us, req->last_token_us),
        .reachable = req->counts.reachable,
        .visited = req->counts.visited,
        .kept = req->counts.kept,
        .decode_reachable = req->decode_counts.reachable,
        .decode_kept = req->decode_counts.kept,
        .lost_mass_samples = req->counts.sampled,
        .lost_mass = engine_lost_mass(&req->counts),
    };
    memcpy(m.id, r->id, sizeof m.id);
    ipc_send_done(e->server, r->owner->conn, &m);
}

static void on_finish(void *ctx, const struct request *req)
{
    struct engine *e = ctx;
    struct engine_req *r = req->user;
    metrics_finish(&e->metrics, req, e->now_us);
    send_tokens(e, r, req);
    if (req->finish == REQ_FINISH_ERROR) {
        metrics_error(&e->metrics, req->err);
        ipc_send_failure(e->server, r->owner->conn, r->id, req->err, NULL, 0);
    } else {
        send_done(e, r, req);
    }
    free_req(e, r);
}

void engine_fill_events(struct engine *e, struct sched_events *ev)
{
    *ev = (struct sched_events){
        .progress = on_progress, .token = on_token, .finish = on_finish, .ctx = e};
}
