/* One request inside the engine: its tokens, its limits and how far it has come. Owned by the
 * scheduler; the loop thread is the only one that touches it. Its tokens array never moves and only
 * grows, so a step in flight may read it. */
#ifndef SCHEDULER_REQUEST_H
#define SCHEDULER_REQUEST_H

#include "model/batch.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { REQ_TENANT_BYTES = 64, REQ_SALT_BYTES = 64 };

enum req_state {
    REQ_WAITING, /* in the queue; holds no pages (fresh or preempted) */
    REQ_RUNNING, /* holds a slot and pages */
    REQ_FINISHED /* terminal event sent; freed once no step in flight names it */
};

enum req_finish {
    REQ_FINISH_NONE,
    REQ_FINISH_STOP,   /* EOS or a stop token */
    REQ_FINISH_LENGTH, /* max_tokens, or the model's longest position */
    REQ_FINISH_CANCELLED,
    REQ_FINISH_DEADLINE, /* deadline or queue timeout */
    REQ_FINISH_CAPACITY, /* the pool's ceiling for one sequence */
    REQ_FINISH_ERROR,    /* err says which */
    REQ_FINISH_SHUTDOWN
};

/* What a caller asks for; copied by sched_submit. */
struct req_params {
    const int32_t *prompt;
    int32_t n_prompt;
    int32_t max_tokens;
    struct batch_sampling sampling;
    struct batch_policy policy;
    uint64_t policy_fingerprint;   /* of what decides K/V of prompts: their gate, visit sets and
                                      threshold file; 0 is dense over all pages */
    int32_t priority;              /* lower first */
    char tenant[REQ_TENANT_BYTES]; /* "" is a tenant too */
    uint8_t salt[REQ_SALT_BYTES];
    size_t n_salt;
    int64_t deadline_us;      /* from submission to the last token; 0: none */
    int64_t queue_timeout_us; /* from submission to the first scheduling; 0: none */
    void *user;               /* the engine's */
};

struct request {
    uint64_t id; /* increasing, never reused */
    enum req_state state;
    enum req_finish finish;
    int err; /* with REQ_FINISH_ERROR */

    int32_t *tokens;                       /* prompt, then generated */
    int32_t n_prompt, n_tokens, max_total; /* max_total = room in tokens */
    int32_t n_computed;                    /* tokens whose K/V is in the cache; chases n_tokens */
    int32_t n_cached;  /* of the prompt, taken from the prefix cache instead of computed */
    int32_t slot;      /* -1: none */
    int32_t in_flight; /* tokens of it in the step that is running; 0: none */
    int32_t n_preempted;

    struct batch_sampling sampling;
    struct batch_policy policy;
    struct batch_counts counts;        /* of prompt steps */
    struct batch_counts decode_counts; /* of steps over generated tokens */
    uint64_t seed;                     /* of its prefix hash chain */
    int32_t priority;
    char tenant[REQ_TENANT_BYTES];
    void *user;

    int64_t submit_us, scheduled_us, first_token_us, last_token_us; /* 0: not yet */
    int64_t deadline_us, queue_deadline_us;                         /* absolute; INT64_MAX: none */
};

static inline int32_t req_generated(const struct request *r)
{
    return r->n_tokens - r->n_prompt;
}

const char *
req_finish_name(enum req_finish f); /* "stop", "length", "cancelled", "deadline", "capacity", ... */

#endif
