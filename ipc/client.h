/* Client library of the Sluice inference daemon: token ids in, token ids out.
 *
 * Needs nothing but this header, libsluice_client and msgpack-c; no event loop. A client is one
 * connection; many requests may run on it at once, told apart by the ids you choose. One thread at
 * a time may use a client.
 *
 *     struct sluice_client *c;
 *     struct sluice_request r;
 *     struct sluice_event e;
 *     if (sluice_connect(&c, "unix:/run/sluice.sock", NULL, why, sizeof why) < 0) ...
 *     sluice_request_init(&r);
 *     r.id = "1"; r.tokens = prompt; r.n_tokens = n; r.max_tokens = 64;
 *     if (sluice_submit(c, &r) < 0) ... sluice_error(c) ...
 *     while (sluice_next(c, &e, -1) > 0 && !sluice_event_is_last(&e)) ...
 *     sluice_close(c);
 *
 * Every accepted sluice_submit is followed by exactly one SLUICE_DONE or SLUICE_FAILED event with
 * its id, unless the connection is lost: then sluice_next returns a negative value and everything
 * open is over.
 *
 * Functions return 0 (or a positive value as described) or a negative error: -errno values and the
 * SLUICE_E* below. They never abort, print or raise signals. */
#ifndef SLUICE_CLIENT_H
#define SLUICE_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SLUICE_EPROTOCOL (-5020) /* the peer broke the protocol */
#define SLUICE_EINVALID  (-5009) /* an argument was refused before sending */
#define SLUICE_EREFUSED  (-5023) /* the daemon refused the connection or the verb */

enum { SLUICE_MAX_STOP = 16, SLUICE_MAX_LOGPROBS = 20, SLUICE_MAX_LEVELS = 64 };

/* Attention of the prompt: the daemon's default, every page, calibrated thresholds of level k, or
 * pages under lambda of the running maximum. */
enum sluice_sparse { SLUICE_AUTO = 0, SLUICE_DENSE = 1, SLUICE_ABS = 2, SLUICE_REL = 3 };

enum sluice_reason {
    SLUICE_STOP = 0,
    SLUICE_LENGTH = 1,
    SLUICE_CANCELLED = 2,
    SLUICE_DEADLINE = 3,
    SLUICE_CAPACITY = 4,
    SLUICE_ERROR = 5,
    SLUICE_SHUTDOWN = 6
};

/* Error codes of SLUICE_FAILED and SLUICE_REFUSED events. */
enum sluice_code {
    SLUICE_CODE_PROTOCOL = 1,
    SLUICE_CODE_INVALID_ARGUMENT = 2,
    SLUICE_CODE_PROMPT_TOO_LONG = 3,
    SLUICE_CODE_DUPLICATE_ID = 4,
    SLUICE_CODE_UNSUPPORTED = 5,
    SLUICE_CODE_QUEUE_FULL = 6,
    SLUICE_CODE_DRAINING = 7,
    SLUICE_CODE_TENANT_LIMIT = 8,
    SLUICE_CODE_DEADLINE = 9,
    SLUICE_CODE_KV_EXHAUSTED = 10,
    SLUICE_CODE_SLOW_CONSUMER = 11,
    SLUICE_CODE_NUMERIC = 12,
    SLUICE_CODE_INTERNAL = 13,
    SLUICE_CODE_ENGINE_DEAD = 14,
    SLUICE_CODE_VERSION = 15,
    SLUICE_CODE_AUTH = 16,
    SLUICE_CODE_CANCELLED = 17,
    SLUICE_CODE_TOO_MANY_CONNECTIONS = 18
};

struct sluice_client;

/* NULL stands for all zero. */
struct sluice_options {
    const char *name;  /* shown in the daemon's log; NULL: "sluice_client" */
    const char *token; /* shared secret, needed for TCP where the daemon has one */
    int connect_ms;    /* for connecting and the handshake; 0: 5000 */
};

/* What the daemon said in the handshake. */
struct sluice_info {
    int proto_major, proto_minor;
    const char *version, *instance_id, *model, *kv_dtype, *device;
    int32_t vocab; /* token ids are in [0, vocab) */
    int32_t max_model_len, max_servable_tokens;
    int32_t block_size, num_blocks, tp, gate_rows;
    bool has_dense, has_abs, has_rel;
    int32_t n_levels;
    const int32_t *k_levels;      /* what SLUICE_ABS accepts as k */
    int32_t n_decode_levels;      /* 0: decode_density is refused */
    const int32_t *decode_levels; /* pages that a generated token keeps beside its own */
    int64_t max_frame;
    int32_t max_connections, max_queued_requests;
    int64_t max_queued_tokens;
};

enum { SLUICE_REL_LN_MAX = 30 }; /* largest ln_lambda */

/* Set the defaults with sluice_request_init, then change what you need. */
struct sluice_request {
    const char *id; /* 1..128 bytes of UTF-8, unique among the open requests of this client */
    const int32_t *tokens; /* the prompt */
    int32_t n_tokens;
    int32_t max_tokens;                                             /* 16 */
    int32_t min_tokens;                                             /* 0 */
    double temperature;                                             /* 1; 0 is greedy */
    int32_t top_k;                                                  /* 0: off */
    double top_p;                                                   /* 1: off */
    double min_p;                                                   /* 0: off */
    double repetition_penalty, presence_penalty, frequency_penalty; /* 1, 0, 0 */
    bool has_seed; /* false: the daemon draws one */
    uint64_t seed;
    int32_t n_stop;
    int32_t stop_token_ids[SLUICE_MAX_STOP];
    bool ignore_eos;
    int32_t logprobs;          /* 0: none; n: of the chosen token and of the n most likely */
    int32_t priority;          /* lower first */
    const char *tenant;        /* NULL: none; at most 63 bytes */
    const uint8_t *cache_salt; /* requests share cached prefixes only under the same salt */
    int32_t n_salt;            /* at most 64 */
    int64_t deadline_ms;       /* from submission to the last token; 0: none */
    int64_t queue_timeout_ms;  /* from submission to the first step; 0: none */
    bool stream;               /* true; false: all tokens in one event before SLUICE_DONE */
    enum sluice_sparse sparse; /* SLUICE_AUTO */
    int32_t k;                 /* SLUICE_ABS */
    double ln_lambda;          /* SLUICE_REL, -1000..SLUICE_REL_LN_MAX, not 0 */
    int32_t gate_rows;         /* 64, 128; 0: the daemon's */
    double density;            /* SLUICE_ABS and SLUICE_REL: in place of k and ln_lambda, above 0 */
    double decode_density;     /* share of pages a generated token keeps; 1: all; 0: the daemon's */
    bool lost_mass;            /* measure the softmax mass that the prompt loses by sparse pages */
};

struct sluice_logprob {
    int32_t token;
    float logprob;
    int32_t n_top;
    int32_t top_ids[SLUICE_MAX_LOGPROBS];
    float top_logprobs[SLUICE_MAX_LOGPROBS];
};

enum sluice_event_type {
    SLUICE_ACCEPTED,  /* the request is queued */
    SLUICE_PROGRESS,  /* part of the prompt is computed */
    SLUICE_TOKENS,    /* generated tokens */
    SLUICE_DONE,      /* the request has ended */
    SLUICE_FAILED,    /* the request has ended with an error, or was refused */
    SLUICE_REFUSED,   /* an error that is not about one request; the connection may close next */
    SLUICE_GOING_AWAY /* the daemon takes no new requests */
};

struct sluice_event {
    enum sluice_event_type type;
    const char *id; /* "" where there is none */
    union {
        struct {
            int32_t computed, prompt_len, cached;
        } progress;
        struct {
            int64_t first; /* index of the first one among the generated tokens: gapless */
            int32_t n;
            const int32_t *ids;
            const struct sluice_logprob *logprobs; /* [n], or NULL */
        } tokens;
        struct {
            enum sluice_reason reason;
            int32_t stop_token; /* -1: none */
            int32_t prompt_tokens, cached_tokens, completion_tokens, preemptions;
            int64_t queue_us, prefill_us, ttft_us, decode_us;
            uint64_t reachable, visited, kept;      /* of the prompt: density = kept / reachable */
            uint64_t decode_reachable, decode_kept; /* the same of generated tokens */
            uint64_t lost_mass_samples; /* layers x heads x prompt rows measured; 0: lost_mass was
                                           not set */
            double lost_mass;           /* mean over them of the softmax mass of pages not used */
        } done;
        struct {
            int code; /* enum sluice_code */
            const char *message;
            bool retryable;
            int64_t retry_after_ms; /* 0: not known */
        } error;                    /* SLUICE_FAILED and SLUICE_REFUSED */
        struct {
            const char *reason;
            int64_t deadline_ms;
        } goaway;
    } u;
};

struct sluice_stat {
    const char *name;
    bool is_int;
    int64_t i;
    double d; /* also set when is_int */
};

struct sluice_health {
    bool live, ready, draining;
    char state[32];
    int64_t step_age_ms; /* age of the last finished step while there is work */
    int32_t inflight, waiting;
};

/* Connects and shakes hands, blocking. address: "unix:PATH", "tcp:HOST:PORT", "tcp:[v6]:PORT".
 * On failure *out is NULL and why (may be NULL) holds a sentence. */
int sluice_connect(struct sluice_client **out, const char *address,
                   const struct sluice_options *options, char *why, size_t why_len);
void sluice_close(struct sluice_client *c); /* accepts NULL; the daemon cancels what is open */

/* Valid as long as the client. */
const struct sluice_info *sluice_get_info(const struct sluice_client *c);
/* Text of the last failure on this client; never NULL. */
const char *sluice_error(const struct sluice_client *c);
const char *sluice_strerror(int err);
const char *sluice_code_name(int code);     /* "QUEUE_FULL" */
const char *sluice_reason_name(int reason); /* "stop" */

void sluice_request_init(struct sluice_request *r);
/* Queues a request and sends as much as the socket takes; the rest goes out in sluice_next or
 * sluice_flush. What r points to is copied. SLUICE_EINVALID: nothing was queued. */
int sluice_submit(struct sluice_client *c, const struct sluice_request *r);
/* Asks to end a request; its SLUICE_DONE follows. Unknown ids are ignored by the daemon. */
int sluice_cancel(struct sluice_client *c, const char *id);

/* The next event: 1, or 0 after timeout_ms without one (0: do not wait, -1: wait for ever).
 * What the event points to is valid until the next call with this client. */
int sluice_next(struct sluice_client *c, struct sluice_event *event, int timeout_ms);
/* SLUICE_DONE or SLUICE_FAILED. */
bool sluice_event_is_last(const struct sluice_event *event);

/* For callers with a poll loop: wait for these events on this descriptor, then call sluice_next
 * with timeout 0 until it returns 0. */
int sluice_fd(const struct sluice_client *c);
short sluice_poll_events(const struct sluice_client *c); /* POLLIN, or POLLIN | POLLOUT */
/* Sends what is queued: 0 when all is gone, -ETIMEDOUT. */
int sluice_flush(struct sluice_client *c, int timeout_ms);

/* Questions and orders to the daemon: each waits for its answer, at most timeout_ms (-1: for ever;
 * -ETIMEDOUT). Events of running requests that arrive meanwhile are kept for sluice_next. */
/* *stats is valid until the next call with this client; returns their number. */
int sluice_get_stats(struct sluice_client *c, const struct sluice_stat **stats, int timeout_ms);
int sluice_get_health(struct sluice_client *c, struct sluice_health *health, int timeout_ms);
/* Stop taking requests; what runs is cancelled after drain_ms (0: never). Returns when the order
 * was taken, not when the daemon has ended. */
int sluice_drain(struct sluice_client *c, int64_t drain_ms, int timeout_ms);
int sluice_shutdown(struct sluice_client *c, int timeout_ms);
int sluice_reset_prefix_cache(struct sluice_client *c, int timeout_ms);
int sluice_ping(struct sluice_client *c, int timeout_ms);

#ifdef __cplusplus
}
#endif

#endif
