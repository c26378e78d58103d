/* The scheduling policy: a pure function from state to plan. It knows no device, no rank, no libuv
 * and no clock: time is an argument. It owns the requests and drives the page bookkeeping
 * (kvcache/kv_cache.h).
 *
 * A step: plan = sched_plan(...); the model runs it; sched_update(...) applies the result. At most
 * one plan is out at a time. Between the two, submit and cancel are allowed: memory of a request
 * named by the plan is released at update.
 *
 * No phases: a request's n_computed chases its n_tokens; one that has caught up but for one token
 * decodes. Per step:
 *   1. running requests take their decode token first; then partial prefills share what is left of
 * the token budget: at most max_partial_prefills at once, of which at most max_long_partial longer
 * than long_prefill_tokens, each given an equal share rounded down to 128 (the shortest remainder
 * first, so a short prompt is never behind a long one), a short one all that it needs where that is
 * there, a long one beside short ones at most an equal part of the whole. Chunks end on multiples
 * of 128 of the absolute position except at the prompt's end. Where tokens are generated beside
 * them, the time that prompts should take of the step (sched_cost.h) is limited as well. Recomputed
 * generated tokens form chunks of their own that start at the prompt's end. A prompt whose
 * beginning another prefill computes right now waits for it and takes its pages.
 *   2. waiting requests are admitted by (priority, preempted first, tenant's virtual token count,
 * arrival) while the whole prompt fits beside the running ones and the watermark stays free.
 *   3. when a running request cannot grow, the worst running request (highest priority value, then
 * not yet preempted three times, then latest arrival) is preempted: pages dropped, recomputed
 * later, ahead of its class.
 *   4. if nothing runs and the head still cannot be admitted, it is failed with ERR_NO_BLOCKS
 * (stalled-head rule).
 *
 * Fairness: every tenant has a virtual count of served tokens; a tenant that was idle starts at the
 * smallest active one. Numbers and names follow vLLM v1 where there is a counterpart. */
#ifndef SCHEDULER_SCHEDULER_H
#define SCHEDULER_SCHEDULER_H

#include "core/err.h"
#include "kvcache/kv_cache.h"
#include "scheduler/request.h"

struct sched;

/* Called from inside sched_* functions, on the caller's thread. They must not call back into the
 * scheduler, except that the request stays valid until `finish` returns. Every submitted request
 * gets exactly one finish. */
struct sched_events {
    void (*progress)(void *ctx, const struct request *r); /* a prefill chunk was computed */
    void (*token)(void *ctx, const struct request *r, const struct batch_token *t);
    void (*finish)(void *ctx, const struct request *r);
    void *ctx;
};

struct sched_config {
    int32_t max_running;  /* sequences at once; at most the cache's max_seqs */
    int32_t token_budget; /* tokens a step, >= max_running + 128: decodes always fit and
                             never take a prefill's last chunk */
    int64_t step_us; /* a step that generates tokens takes in as much of prompts as should keep it
                        under this, but an eighth of the budget in any case; 0: no limit */
    int32_t max_partial_prefills; /* prompts in prefill at once */
    int32_t max_long_partial;     /* of which long */
    int32_t
        long_prefill_tokens;   /* a prompt with more tokens left at admission is long; 0: none is */
    int32_t watermark_pages;   /* kept free when admitting beside others */
    int32_t max_queued;        /* waiting requests */
    int64_t max_queued_tokens; /* sum of their prompt tokens; a prompt alone is not refused */
    int32_t max_tenant_requests; /* waiting and running of one tenant; 0: no limit */
    int32_t max_model_len;       /* longest prompt + generated */
    uint64_t model_fingerprint;
    bool share_generated; /* publish pages holding generated tokens */
    int32_t n_eos;
    int32_t eos_ids[BATCH_MAX_STOP];
};

struct sched_stats {
    int32_t n_waiting, n_running, n_in_flight;
    int64_t waiting_tokens; /* prompt tokens queued */
    uint64_t n_submitted, n_preempted, n_steps;
    uint64_t finished[REQ_FINISH_SHUTDOWN + 1];
    uint64_t prompt_tokens, cached_tokens, generated_tokens;
    struct batch_counts counts, decode_counts; /* of prompts; of generated tokens */
};

/* kv must outlive the scheduler. */
MUST_CHECK int sched_create(struct sched **out, const struct sched_config *cfg, struct kv_cache *kv,
                            const struct sched_events *events, struct err_msg *why);
void sched_destroy(
    struct sched *s); /* no plan may be out; unfinished requests are finished as SHUTDOWN first */

/* Longest prompt + 1 that can be served: min(max_model_len, pool). Submit, the handshake and
 * decoding share it. */
int32_t sched_max_servable(const struct sched *s);
/* Queues a copy. Refuses at once: ERR_TOO_LONG (with both numbers in why), ERR_QUEUE_FULL,
 * ERR_TENANT_LIMIT, ERR_DRAINING, ERR_INVALID. On failure no event is called. */
MUST_CHECK int sched_submit(struct sched *s, const struct req_params *p, int64_t now_us,
                            struct request **out, struct err_msg *why);
/* Finishes r now (finish event called inside); its pages go when no plan names it. Idempotent. */
void sched_cancel(struct sched *s, struct request *r, enum req_finish reason, int err);
/* Refuse new requests from now on. */
void sched_drain(struct sched *s);
/* Finishes every request. */
void sched_cancel_all(struct sched *s, enum req_finish reason, int err);

bool sched_has_work(const struct sched *s);
/* Earliest deadline or queue timeout, INT64_MAX if none; sched_expire finishes those that have
 * passed. */
int64_t sched_next_deadline(const struct sched *s);
void sched_expire(struct sched *s, int64_t now_us);

/* Builds the next step, or returns NULL when there is nothing to run. The batch stays valid until
 * sched_update. */
const struct batch *sched_plan(struct sched *s, int64_t now_us);
/* status < 0: the step failed; every request of it is finished as ERROR with that code. result may
 * then be NULL. */
void sched_update(struct sched *s, int status, const struct batch_result *result, int64_t now_us);

void sched_get_stats(const struct sched *s, struct sched_stats *out);
/* Walks every invariant, the cache's too. */
MUST_CHECK int sched_check(const struct sched *s, struct err_msg *why);

#endif
