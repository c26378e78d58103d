/* One step: decodes, admission, prefill shares.
 *
 * Decodes come first and always fit, for the budget is at least max_running + 128. What they leave
 * is shared by the prompts in prefill. A resumed request computes its prompt again as prompt and
 * its generated tokens again as generated tokens: a chunk never crosses the prompt's end, because
 * the two follow different page policies. */
#include "scheduler/sched_internal.h"

#include "core/mem.h"

#include <math.h>

static void add_seq(struct sched *s, struct sched_req *r, int32_t n_tokens)
{
    struct request *p = &r->pub;
    int32_t i = s->batch.n_seqs++, n_pages;
    const int32_t *pages = kv_seq_pages(s->kv, p->slot, &n_pages);
    ASSERT(i < s->cfg.max_running && n_tokens > 0 && n_tokens <= s->budget);
    s->planned[i] = r;
    s->seqs[i] = (struct batch_seq){
        .id = p->id,
        .tokens = p->tokens,
        .start = p->n_computed,
        .n_tokens = n_tokens,
        .prompt_len = p->n_prompt,
        .pages = pages,
        .n_pages = kv_pages_for(p->n_computed + n_tokens),
        .policy = p->policy,
        .sample = p->n_computed + n_tokens == p->n_tokens,
        .sampling = &p->sampling,
    };
    p->in_flight = n_tokens;
    s->batch.n_tokens += n_tokens;
    s->budget -= n_tokens;
}

/* Drops r's pages; what it has published stays findable, so computing it again is cheap. */
static void preempt(struct sched *s, struct sched_req *r)
{
    struct request *p = &r->pub;
    sched_remove_running(s, r);
    kv_seq_close(s->kv, p->slot);
    p->slot = -1;
    p->n_computed = 0;
    p->state = REQ_WAITING;
    p->n_preempted++;
    r->resumed = true;
    r->long_prefill = false;
    r->leader = 0;
    sched_classify(s, r);
    queue_push(&s->queue, r);
    s->stats.n_preempted++;
}

/* Gives r the page its next token needs, from the least worth keeping if none is free. On
 * ERR_NO_BLOCKS that was r itself. */
static int grow(struct sched *s, struct sched_req *r, bool *preempted)
{
    int err;
    if (r->pub.n_tokens <= r->covered)
        return 0;
    while ((err = kv_seq_reserve(s->kv, r->pub.slot, r->pub.n_tokens)) == ERR_NO_BLOCKS) {
        struct sched_req *victim = s->running[s->n_running - 1];
        preempt(s, victim);
        *preempted = true;
        if (victim == r)
            return err;
    }
    if (err == 0)
        r->covered = kv_pages_for(r->pub.n_tokens) * KV_PAGE_TOKENS;
    return err;
}

/* Plans every decode and collects the prompts in prefill. Requests are visited best first and
 * victims are taken from the end, so nobody already planned is preempted. */
static bool plan_decodes(struct sched *s)
{
    bool preempted = false;
    for (int32_t i = 0; i < s->n_running;) {
        struct sched_req *r = s->running[i];
        if (!sched_decodes(&r->pub)) {
            s->partial[s->n_partial++] = r;
            s->n_long += r->long_prefill;
            i++;
            continue;
        }
        int err = grow(s, r, &preempted);
        if (err == 0) {
            add_seq(s, r, 1);
            i++;
        } else if (err != ERR_NO_BLOCKS) {
            sched_finish(s, r, REQ_FINISH_CAPACITY, 0);
        }
    }
    return preempted;
}

/* The end of the chunk that r computes with a share of at least 128 tokens. */
static int32_t chunk_end(const struct request *r, int32_t share)
{
    int32_t limit = r->n_computed < r->n_prompt ? r->n_prompt : r->n_tokens;
    if (limit - r->n_computed <= share)
        return limit;
    return (r->n_computed + share) / SCHED_CHUNK * SCHED_CHUNK;
}

/* Fewest tokens left first, so a short prompt never waits for a long one; but whoever has been
 * passed over several times in a row comes before, the longest so first. */
static bool share_before(const struct sched_req *a, const struct sched_req *b)
{
    bool late_a = a->passed_over >= SCHED_PASSED_OVER, late_b = b->passed_over >= SCHED_PASSED_OVER;
    int32_t left_a = a->pub.n_tokens - a->pub.n_computed;
    int32_t left_b = b->pub.n_tokens - b->pub.n_computed;
    if (late_a != late_b)
        return late_a;
    if (late_a && a->passed_over != b->passed_over)
        return a->passed_over > b->passed_over;
    if (!late_a && left_a != left_b)
        return left_a < left_b;
    return a->pub.id < b->pub.id;
}

static void sort_partial(struct sched *s)
{
    for (int32_t i = 1; i < s->n_partial; i++) {
        struct sched_req *r = s->partial[i];
        int32_t j = i;
        for (; j > 0 && share_before(r, s->partial[j - 1]); j--)
            s->partial[j] = s->partial[j - 1];
        s->partial[j] = r;
    }
}

/* What a prompt may get of the step: an equal part of what is left, in whole chunks, but
 *   - all it needs, if it is short and that is there: a rest of one chunk would cost another step;
 *   - if it is long, at most `most`. Its chunks are what makes a step take long, and whoever came
 *     while one ran, or left a rest, waits for this one. */
static int32_t share_of(const struct sched *s, const struct sched_req *r, int32_t n_behind,
                        int32_t most)
{
    const int32_t left = r->pub.n_tokens - r->pub.n_computed;
    int32_t share = s->budget / (n_behind + 1);
    if (!r->long_prefill && left <= s->budget)
        share = left;
    else if (r->long_prefill && share > most)
        share = most;
    if (share < left)
        share -= share % SCHED_CHUNK;
    return share > SCHED_CHUNK ? share : SCHED_CHUNK;
}

/* A long prompt's part of the step is what it would be if all took theirs; alone or among long ones
 * it is not limited. */
static int32_t most_of_long(const struct sched *s)
{
    for (int32_t i = 0; i < s->n_partial; i++) {
        if (!s->partial[i]->long_prefill)
            return s->budget / s->n_partial;
    }
    return s->budget;
}

/* The time that prompts may take of the step: whose tokens are generated in it shall not wait too
 * long for the next. */
static double time_left(const struct sched *s)
{
    const bool waits = s->cfg.step_us > 0 && s->batch.n_seqs > 0;
    return waits ? (double)s->cfg.step_us - s->cost.decode_us : (double)INFINITY;
}

/* The tokens of a share that are computed: as many as are done in time, in whole chunks; of the
 * first prompt an eighth of the budget in any case, since much smaller chunks would leave the
 * device idle. */
static int32_t in_time(const struct sched *s, const struct request *r, int32_t share, double us,
                       bool is_first)
{
    const int32_t eighth = s->cfg.token_budget / 8 / SCHED_CHUNK * SCHED_CHUNK;
    const int32_t least = eighth > SCHED_CHUNK ? eighth : SCHED_CHUNK;
    const int32_t wanted = chunk_end(r, share) - r->n_computed;
    int32_t room = sched_cost_room(&s->cost, r->n_computed, wanted, us);
    if (room < wanted)
        room -= room % SCHED_CHUNK;
    if (room < least && is_first)
        room = least;
    if (room >= wanted)
        return wanted;
    return room > 0 ? chunk_end(r, room) - r->n_computed : 0;
}

/* In the order of share_before; what one does not use goes to those behind. */
static void plan_prefills(struct sched *s)
{
    const int32_t most = most_of_long(s), n_decodes = s->batch.n_seqs;
    double us = time_left(s);
    sort_partial(s);
    for (int32_t i = 0; i < s->n_partial; i++) {
        struct sched_req *r = s->partial[i];
        int32_t n = 0;
        if (s->budget >= SCHED_CHUNK)
            n = in_time(s, &r->pub, share_of(s, r, s->n_partial - i - 1, most), us,
                        s->batch.n_seqs == n_decodes);
        if (n == 0) {
            r->passed_over++;
            continue;
        }
        add_seq(s, r, n);
        us -= sched_cost_us(&s->cost, sched_work_of(r->pub.n_computed, n));
        r->passed_over = 0;
    }
}

const struct batch *sched_plan(struct sched *s, int64_t now_us)
{
    ASSERT(!s->plan_out);
    sched_expire(s, now_us);
    s->batch.n_seqs = s->batch.n_tokens = 0;
    s->n_partial = s->n_long = 0;
    s->budget = s->cfg.token_budget;
    bool preempted = plan_decodes(s);
    /* Nobody new after a preemption: the pages just freed are for those who run. */
    if (!preempted || s->n_running == 0)
        sched_admit(s, now_us);
    sched_follow(s);
    plan_prefills(s);
    if (s->batch.n_seqs == 0)
        return NULL;
    s->batch.step_id = ++s->stats.n_steps;
    s->plan_out = true;
    return &s->batch;
}
