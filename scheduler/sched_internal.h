/* The scheduler's own structures, shared by its files and by nobody else.
 *
 *   scheduler.c     create, destroy, cancel, expire, statistics
 *   sched_admit.c   submit and admission: who enters the batch
 *   sched_plan.c    one step: decodes, preemption, prefill shares
 *   sched_cost.c    what prompts cost a step
 *   sched_follow.c  prompts in prefill that begin alike compute the beginning once
 *   sched_update.c  the result of a step, and how a request ends
 *   sched_queue.c   the waiting order: priority, resumed, fairness between tenants
 *   sched_check.c   every invariant
 *
 * Life of a request: submit -> queue -> admit (a slot, all pages of its known tokens) -> running ->
 * finish; preempt leads from running back to the queue. `all` links every request that is not yet
 * freed, in order of arrival. */
#ifndef SCHEDULER_SCHED_INTERNAL_H
#define SCHEDULER_SCHED_INTERNAL_H

#include "core/list.h"
#include "scheduler/sched_cost.h"
#include "scheduler/sched_heap.h"
#include "scheduler/scheduler.h"

enum {
    SCHED_CHUNK = KV_BLOCK_TOKENS, /* chunks end on multiples of it */
    SCHED_AGED = 3,                /* preempted so often, a request is preempted after its class */
    SCHED_PASSED_OVER = 4,         /* steps without a chunk after which a prefill goes first */
    SCHED_FOLLOW = 256,            /* tokens another prefill must spare one that waits for it */
    SCHED_RECHECK = 16,            /* steps after which a blocked head is looked at anew */
    SCHED_TENANT_BUCKETS = 1024,
    SCHED_IDLE_TENANTS = 4096 /* remembered counts of tenants without requests */
};

/* Two queues side by side, so that long prompts waiting for one of the few long places do not hold
 * up short ones. */
enum sched_lane { SCHED_SHORT, SCHED_LONG, SCHED_LANES };

struct sched_req {
    struct request pub; /* what callers see; first, so that the pointers are equal */
    struct sched_tenant *tenant;
    struct list all;
    struct heap_node wait; /* in its tenant's lane, or in the queue's resumed heap */
    struct heap_node expiry;
    int64_t expire_us; /* INT64_MAX: not in the expiry heap */
    enum sched_lane lane;
    bool resumed;             /* waiting after a preemption */
    bool long_prefill;        /* took one of the long places when it was admitted */
    enum req_finish at_limit; /* what reaching max_total means */
    int32_t covered;          /* tokens its page table has room for */
    int32_t passed_over;      /* steps in a row in which its prefill got nothing */
    uint64_t leader;          /* id of the prefill it waits for, 0: none */
    int32_t common;           /* tokens both begin with, whole blocks */
};

struct sched_tenant_lane {
    struct heap_node node; /* in wait_queue.tenants while something waits */
    struct heap waiting;   /* sched_req.wait by (priority, arrival) */
    struct sched_tenant *tenant;
    int64_t key; /* `served` when the node was inserted; it only grows, so the key is a lower bound
                    and the order is repaired when the node reaches the top */
};

struct sched_tenant {
    struct list bucket;
    struct list member; /* of wait_queue.live, or of .idle while n_live is 0 */
    char name[REQ_TENANT_BYTES];
    int64_t served;    /* the virtual count: tokens computed and generated for it */
    int32_t n_live;    /* requests not finished */
    int32_t n_waiting; /* of those, never admitted */
    struct sched_tenant_lane lanes[SCHED_LANES];
    struct heap_node backlog; /* in wait_queue.backlog while n_waiting > 0 */
    int64_t backlog_key;      /* a lower bound like sched_tenant_lane.key */
};

struct wait_queue {
    struct list buckets[SCHED_TENANT_BUCKETS]; /* tenants by name */
    struct list live, idle;                    /* tenants; longest idle first */
    int32_t n_idle;
    struct heap tenants[SCHED_LANES]; /* by (best priority, virtual count, arrival) */
    struct heap resumed[SCHED_LANES]; /* by (priority, arrival) */
    struct heap backlog;              /* tenants by virtual count */
    int64_t last_left;                /* virtual count of the tenant that left the queue last */
    int32_t n_fresh, n_resumed;
    int64_t fresh_tokens; /* sum of n_prompt */
};

struct sched {
    struct sched_config cfg;
    struct kv_cache *kv;
    struct sched_events ev;
    int32_t servable;
    bool draining;
    uint64_t next_id;

    struct wait_queue queue;
    struct heap expiry; /* sched_req.expiry */
    struct list all;

    struct sched_req **running; /* [max_running] best to keep first; preemption takes the last */
    int32_t n_running;

    /* The step being built or out. */
    bool plan_out;
    struct batch batch;
    struct batch_seq *seqs;     /* [max_running] */
    struct sched_req **planned; /* [max_running] */
    struct sched_req **partial; /* [max_running] prompts in prefill */
    int32_t n_partial, n_long;
    int32_t budget; /* tokens left */
    struct sched_cost cost;

    struct {
        uint64_t id;        /* head of the queue that did not fit; 0: none */
        int32_t free_pages; /* then */
        int32_t steps;      /* since */
    } blocked;
    struct sched_stats stats;
};

static inline struct sched_req *sched_req_of(struct request *r)
{
    return (struct sched_req *)(void *)r;
}

/* All but one of its tokens are computed, and the prompt is. */
static inline bool sched_decodes(const struct request *r)
{
    return r->n_computed >= r->n_prompt && r->n_tokens - r->n_computed == 1;
}

/* Tokens of r whose pages may come from or go to the prefix index. K/V of generated tokens under a
 * gate of their own are nobody else's: a request of the same prompt policy may have another such
 * gate, and its chain is the same. */
static inline int32_t sched_shareable(const struct sched *s, const struct request *r)
{
    const bool all = s->cfg.share_generated && r->policy.decode_gate == BATCH_DENSE;
    return all ? r->n_tokens : r->n_prompt;
}

/* The order in which running requests are kept: priority, then those preempted often, then arrival.
 */
bool sched_keep_before(const struct sched_req *a, const struct sched_req *b);

/* sched_queue.c */
void queue_init(struct wait_queue *q);
void queue_deinit(struct wait_queue *q);
/* NULL when the tenant has never been seen or is forgotten. */
struct sched_tenant *queue_find_tenant(const struct wait_queue *q, const char *name);
/* One more request of the tenant; creates it. */
struct sched_tenant *queue_join_tenant(struct wait_queue *q, const char *name);
void queue_leave_tenant(struct wait_queue *q, struct sched_tenant *t);
static inline void queue_charge(struct sched_tenant *t, int64_t tokens)
{
    t->served += tokens;
}
void queue_push(struct wait_queue *q, struct sched_req *r);
void queue_remove(struct wait_queue *q, struct sched_req *r);
/* Changes the lane of a waiting request. */
void queue_move(struct wait_queue *q, struct sched_req *r, enum sched_lane lane);
/* The next to admit, from the short lane only or from both; NULL: none. */
struct sched_req *queue_best(struct wait_queue *q, bool with_long);
static inline int32_t queue_len(const struct wait_queue *q)
{
    return q->n_fresh + q->n_resumed;
}
bool queue_before(const struct sched_req *a, const struct sched_req *b);

/* sched_admit.c */
/* Chooses the lane by what the prefix cache holds of r now. */
void sched_classify(const struct sched *s, struct sched_req *r);
void sched_admit(struct sched *s, int64_t now_us);

/* sched_follow.c */
/* r has just been admitted: does a prefill already compute what r begins with? */
void sched_choose_leader(const struct sched *s, struct sched_req *r);
/* Takes those who wait for a leader out of s->partial; those whose leader has come far enough go on
 * from there. */
void sched_follow(struct sched *s);

/* scheduler.c */
void sched_insert_running(struct sched *s, struct sched_req *r);
void sched_remove_running(struct sched *s, const struct sched_req *r);
/* Moves r to its place in the expiry heap: the queue timeout counts until the first admission. */
void sched_set_expiry(struct sched *s, struct sched_req *r);

/* sched_update.c */
void sched_finish(struct sched *s, struct sched_req *r, enum req_finish reason, int err);

#endif
