/* Prompts that arrive together and begin alike (several questions about one document). The prefix
 * index cannot help them: nothing is published yet when the second one is admitted. So the second
 * one follows the first: it gets no chunks while the first computes what both begin with, which has
 * the whole share meanwhile, and then takes those pages from the index. Neither has its first token
 * later than if both had computed everything side by side.
 *
 * Only who follows nobody can be chosen as a leader, so there is always one that computes. When the
 * leader is past the common part, done, cancelled, failed or preempted, its followers take what it
 * has published; the first of them goes on, the others may follow it. */
#include "scheduler/sched_internal.h"

#include <string.h>

/* Whole blocks of tokens that both prompts begin with; a's last token is left to be computed. */
static int32_t common_blocks(const struct request *a, const struct request *b)
{
    int32_t n = a->n_prompt - 1 < b->n_prompt ? a->n_prompt - 1 : b->n_prompt, i = 0;
    const size_t block = SCHED_CHUNK * sizeof *a->tokens;
    while (i + SCHED_CHUNK <= n && memcmp(a->tokens + i, b->tokens + i, block) == 0)
        i += SCHED_CHUNK;
    return i;
}

void sched_choose_leader(const struct sched *s, struct sched_req *r)
{
    const struct request *p = &r->pub;
    r->leader = 0;
    r->common = p->n_computed + SCHED_FOLLOW - SCHED_CHUNK;
    for (int32_t i = 0; i < s->n_partial; i++) {
        const struct request *q = &s->partial[i]->pub;
        if (s->partial[i] == r || s->partial[i]->leader || q->seed != p->seed ||
            q->n_computed < p->n_computed)
            continue;
        int32_t common = common_blocks(p, q);
        if (common > r->common && common >= q->n_computed + SCHED_CHUNK) {
            r->leader = q->id;
            r->common = common;
        }
    }
}

static const struct request *find_partial(const struct sched *s, uint64_t id)
{
    for (int32_t i = 0; i < s->n_partial; i++)
        if (s->partial[i]->pub.id == id)
            return &s->partial[i]->pub;
    return NULL;
}

/* The leader still computes common tokens, and what it has computed can be found: with the prefix
 * cache off it cannot. */
static bool must_wait(const struct sched *s, const struct sched_req *r)
{
    const struct request *p = &r->pub, *q = find_partial(s, r->leader);
    if (!q || q->n_computed >= r->common)
        return false;
    int32_t next = p->n_computed + SCHED_CHUNK;
    return q->n_computed < next ||
           kv_prefix_peek(s->kv, p->seed, p->tokens, next + 1, NULL) == next;
}

/* Continues r after what the index holds of its prompt by now. Its pages are given back first; it
 * takes as many again, some of them shared, so they cannot be missing. */
static void catch_up(struct sched *s, struct sched_req *r)
{
    struct request *p = &r->pub;
    int32_t hit = kv_prefix_peek(s->kv, p->seed, p->tokens, p->n_prompt, NULL);
    r->leader = 0;
    if (hit <= p->n_computed)
        return;
    kv_seq_close(s->kv, p->slot);
    int err = kv_seq_open(s->kv, &p->slot);
    ASSERT(err == 0);
    int32_t got = kv_seq_attach(s->kv, p->slot, p->seed, p->tokens, p->n_prompt);
    err = kv_seq_reserve(s->kv, p->slot, p->n_tokens);
    ASSERT(err == 0 && got == hit);
    if (p->n_preempted == 0) {
        p->n_cached += hit - p->n_computed;
        s->stats.cached_tokens += (uint64_t)(hit - p->n_computed);
    }
    p->n_computed = hit;
    sched_choose_leader(s, r);
}

void sched_follow(struct sched *s)
{
    int32_t n = 0;
    for (int32_t i = 0; i < s->n_partial; i++) /* all of them are still there to be found */
        if (s->partial[i]->leader && !must_wait(s, s->partial[i]))
            catch_up(s, s->partial[i]);
    for (int32_t i = 0; i < s->n_partial; i++)
        if (!s->partial[i]->leader)
            s->partial[n++] = s->partial[i];
    s->n_partial = n;
}
