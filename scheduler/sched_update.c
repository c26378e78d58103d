/* What a finished step changes, and how a request ends.
 *
 * Pages are published only here, after the step that wrote them has succeeded; a failed step and a
 * request with NaN logits publish nothing. A request that ended while the step ran (cancelled, past
 * its deadline) has had its finish event already; its pages are released here. */
#include "scheduler/sched_internal.h"

#include "core/mem.h"

#include <stdlib.h>

/* Returns r's pages and memory. */
static void release(struct sched *s, struct sched_req *r)
{
    if (r->pub.slot >= 0)
        kv_seq_close(s->kv, r->pub.slot);
    list_unlink(&r->all);
    free(r->pub.tokens);
    mem_free(r);
}

void sched_finish(struct sched *s, struct sched_req *r, enum req_finish reason, int err)
{
    struct request *p = &r->pub;
    ASSERT(p->state != REQ_FINISHED && reason != REQ_FINISH_NONE);
    if (p->state == REQ_WAITING)
        queue_remove(&s->queue, r);
    else
        sched_remove_running(s, r);
    p->state = REQ_FINISHED;
    p->finish = reason;
    p->err = err;
    sched_set_expiry(s, r);
    queue_leave_tenant(&s->queue, r->tenant);
    r->tenant = NULL;
    s->stats.finished[reason]++;
    s->ev.finish(s->ev.ctx, p);
    if (p->in_flight == 0)
        release(s, r);
}

static bool is_stop(const struct sched *s, const struct request *r, int32_t token)
{
    const struct batch_sampling *a = &r->sampling;
    if (req_generated(r) < a->min_tokens)
        return false;
    for (int32_t i = 0; i < a->n_stop; i++)
        if (a->stop_ids[i] == token)
            return true;
    if (a->ignore_eos)
        return false;
    for (int32_t i = 0; i < s->cfg.n_eos; i++)
        if (s->cfg.eos_ids[i] == token)
            return true;
    return false;
}

/* Appends the sampled token; the stop token belongs to the output. */
static void append_token(struct sched *s, struct sched_req *r, const struct batch_token *t,
                         int64_t now_us)
{
    struct request *p = &r->pub;
    if (t->numeric) {
        sched_finish(s, r, REQ_FINISH_ERROR, ERR_NUMERIC);
        return;
    }
    if (t->token < 0) {
        sched_finish(s, r, REQ_FINISH_ERROR, ERR_INTERNAL);
        return;
    }
    p->tokens[p->n_tokens++] = t->token;
    if (p->first_token_us == 0)
        p->first_token_us = now_us;
    p->last_token_us = now_us;
    queue_charge(r->tenant, 1);
    s->stats.generated_tokens++;
    s->ev.token(s->ev.ctx, p, t);
    if (is_stop(s, p, t->token))
        sched_finish(s, r, REQ_FINISH_STOP, 0);
    else if (p->n_tokens == p->max_total)
        sched_finish(s, r, r->at_limit, 0);
}

/* Density speaks of the prompt: generated rows, one group a row, would drown it, and count apart.
 * No chunk has rows of both. */
static void count_pages(struct batch_counts *prompt, struct batch_counts *generated,
                        const struct batch_seq *q, const struct batch_counts *c)
{
    struct batch_counts *to = q->start >= q->prompt_len ? generated : prompt;
    to->reachable += c->reachable;
    to->visited += c->visited;
    to->kept += c->kept;
    to->sampled += c->sampled;
    to->lost += c->lost;
}

static void publish(struct sched *s, const struct request *r)
{
    int32_t most = sched_shareable(s, r);
    kv_seq_publish(s->kv, r->slot, r->seed, r->tokens, r->n_computed < most ? r->n_computed : most);
}

/* One generated token, and no chunk of tokens computed again. */
static bool is_decode(const struct batch_seq *q)
{
    return q->start >= q->prompt_len && q->n_tokens == 1;
}

/* One sequence of a step that succeeded. */
static void apply(struct sched *s, struct sched_req *r, const struct batch_seq *q,
                  const struct batch_token *t, int64_t now_us)
{
    struct request *p = &r->pub;
    bool numeric = q->sample && t->numeric;
    p->n_computed += q->n_tokens;
    if (!numeric)
        publish(s, p);
    if (p->state == REQ_FINISHED) {
        release(s, r);
    } else {
        if (!is_decode(q))
            s->ev.progress(s->ev.ctx, p);
        if (q->sample)
            append_token(s, r, t, now_us);
    }
    if (numeric) /* its earlier chunks are in the index and may be bad too: nobody must find them */
        kv_prefix_reset(s->kv);
}

/* What the step took, for those to come. */
static void learn(struct sched *s, int64_t us)
{
    struct sched_work sum = {0};
    bool decodes = false;
    for (int32_t i = 0; i < s->batch.n_seqs; i++) {
        const struct batch_seq *q = &s->seqs[i];
        if (is_decode(q)) {
            decodes = true;
            continue;
        }
        const struct sched_work w = sched_work_of(q->start, q->n_tokens);
        sum.tokens += w.tokens;
        sum.pairs += w.pairs;
    }
    sched_cost_learn(&s->cost, sum, decodes, (double)us);
}

void sched_update(struct sched *s, int status, const struct batch_result *result, int64_t now_us)
{
    ASSERT(s->plan_out && (status < 0 || result));
    s->plan_out = false;
    if (status >= 0 && s->cfg.step_us > 0)
        learn(s, result->total_us);
    for (int32_t i = 0; i < s->batch.n_seqs; i++) {
        struct sched_req *r = s->planned[i];
        r->pub.in_flight = 0;
        if (status >= 0) {
            count_pages(&r->pub.counts, &r->pub.decode_counts, &s->seqs[i], &result->counts[i]);
            count_pages(&s->stats.counts, &s->stats.decode_counts, &s->seqs[i], &result->counts[i]);
            apply(s, r, &s->seqs[i], &result->tokens[i], now_us);
        } else if (r->pub.state == REQ_FINISHED) {
            release(s, r);
        } else {
            sched_finish(s, r, REQ_FINISH_ERROR, status);
        }
    }
}
