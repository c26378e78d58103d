/* The messages of protocol v1 as plain structs, and their msgpack form `[type, {key: value}]`.
 * ipc/PROTOCOL.md is the specification; the numbers here and there are compared by a test.
 *
 * Reading never trusts a length: the whole payload is walked without allocating (sizes against the
 * bytes that are there, nesting, number of values) before msgpack-c sees it. What a read message
 * points to lives in the decoder until its next use.
 * Unknown keys are ignored; absent keys have their defaults (ipc_msg_init); fields are checked
 * here, with errors that name them. Neither side ever aborts on bad input or lack of memory. */
#ifndef IPC_MESSAGE_H
#define IPC_MESSAGE_H

#include "core/err.h"

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { IPC_PROTO_MAJOR = 1, IPC_PROTO_MINOR = 0 };

enum {
    IPC_MAX_DEPTH = 8,
    IPC_MAX_VALUES = 1 << 20, /* msgpack values in one message; a bin of token ids is one */
    IPC_ID_BYTES = 128,
    IPC_TENANT_BYTES = 63,
    IPC_SALT_BYTES = 64,
    IPC_NAME_BYTES = 127,  /* client, model, device and other names */
    IPC_TOKEN_BYTES = 255, /* shared secret */
    IPC_TEXT_BYTES = 383,  /* error text */
    IPC_MAX_STOP = 16,
    IPC_MAX_LOGPROBS = 20,
    IPC_MAX_LEVELS = 64,
    IPC_MAX_CAPS = 8,
    IPC_MAX_MODES = 8,
    IPC_CAP_BYTES = 31
};

enum ipc_type {
    /* client to engine */
    IPC_HELLO = 1,
    IPC_SUBMIT = 2,
    IPC_CANCEL = 3,
    IPC_STATS = 4,
    IPC_HEALTH = 5,
    IPC_DRAIN = 6,
    IPC_SHUTDOWN = 7,
    IPC_RESET_PREFIX_CACHE = 8,
    IPC_PING = 9,
    /* engine to client */
    IPC_HELLO_OK = 65,
    IPC_ACCEPTED = 66,
    IPC_PROGRESS = 67,
    IPC_TOKENS = 68,
    IPC_DONE = 69,
    IPC_ERROR = 70,
    IPC_STATS_OK = 71,
    IPC_HEALTH_OK = 72,
    IPC_GOAWAY = 73,
    IPC_OK = 74,
    IPC_PONG = 75
};

enum ipc_reason {
    IPC_REASON_STOP = 0,
    IPC_REASON_LENGTH = 1,
    IPC_REASON_CANCELLED = 2,
    IPC_REASON_DEADLINE = 3,
    IPC_REASON_CAPACITY = 4,
    IPC_REASON_ERROR = 5,
    IPC_REASON_SHUTDOWN = 6
};

enum ipc_sparse_mode {
    IPC_SPARSE_AUTO = 0, /* the engine's default: what its operator chose */
    IPC_SPARSE_DENSE = 1,
    IPC_SPARSE_ABS = 2, /* calibrated thresholds of level k */
    IPC_SPARSE_REL = 3  /* BLASST with ln_lambda */
};

/* name, number, the project's error code, may the client try again later */
#define IPC_CODE_MAP(XX)                                                                           \
    XX(PROTOCOL, 1, ERR_PROTOCOL, false)                                                           \
    XX(INVALID_ARGUMENT, 2, ERR_INVALID, false)                                                    \
    XX(PROMPT_TOO_LONG, 3, ERR_TOO_LONG, false)                                                    \
    XX(DUPLICATE_ID, 4, ERR_DUPLICATE, false)                                                      \
    XX(UNSUPPORTED, 5, ERR_UNSUPPORTED, false)                                                     \
    XX(QUEUE_FULL, 6, ERR_QUEUE_FULL, true)                                                        \
    XX(DRAINING, 7, ERR_DRAINING, true)                                                            \
    XX(TENANT_LIMIT, 8, ERR_TENANT_LIMIT, true)                                                    \
    XX(DEADLINE, 9, ERR_DEADLINE, true)                                                            \
    XX(KV_EXHAUSTED, 10, ERR_NO_BLOCKS, true)                                                      \
    XX(SLOW_CONSUMER, 11, ERR_SLOW_CONSUMER, false)                                                \
    XX(NUMERIC, 12, ERR_NUMERIC, false)                                                            \
    XX(INTERNAL, 13, ERR_INTERNAL, false)                                                          \
    XX(ENGINE_DEAD, 14, ERR_ENGINE_DEAD, true)                                                     \
    XX(VERSION, 15, ERR_VERSION, false)                                                            \
    XX(AUTH, 16, ERR_AUTH, false)                                                                  \
    XX(CANCELLED, 17, ERR_CANCELLED, false)                                                        \
    XX(TOO_MANY_CONNECTIONS, 18, -EMFILE, true)

enum ipc_code {
#define XX(name, number, err, retry) IPC_CODE_##name = (number),
    IPC_CODE_MAP(XX)
#undef XX
};

struct ipc_hello {
    int32_t proto_major, proto_minor;
    char client[IPC_NAME_BYTES + 1];
    int32_t n_caps;
    char caps[IPC_MAX_CAPS][IPC_CAP_BYTES + 1];
    int64_t max_frame;               /* largest payload the sender accepts */
    char token[IPC_TOKEN_BYTES + 1]; /* shared secret; "" where none is needed */
};

/* What a client must know; filled once by the engine, sent on every handshake. Limits of 0 mean
 * none or not known. */
struct ipc_hello_ok {
    int32_t proto_major, proto_minor; /* set by the server */
    char version[IPC_NAME_BYTES + 1];
    char instance_id[IPC_NAME_BYTES + 1];
    char model[IPC_NAME_BYTES + 1];
    int32_t vocab; /* token ids are in [0, vocab) */
    int32_t max_model_len;
    int32_t max_servable_tokens; /* longest prompt + 1 */
    int32_t block_size, num_blocks;
    char kv_dtype[IPC_NAME_BYTES + 1];
    char device[IPC_NAME_BYTES + 1];
    int32_t tp;
    int32_t n_modes;
    int32_t modes[IPC_MAX_MODES]; /* enum ipc_sparse_mode that can be chosen */
    int32_t n_levels;
    int32_t k_levels[IPC_MAX_LEVELS]; /* k values that ABS accepts */
    int32_t gate_rows;                /* of the threshold file; 0: none loaded */
    int64_t max_frame;                /* set by the server */
    int32_t max_connections;          /* set by the server */
    int32_t max_queued_requests;
    int64_t max_queued_tokens;
    int32_t n_caps;
    char caps[IPC_MAX_CAPS][IPC_CAP_BYTES + 1];
    int32_t n_decode_levels;               /* 0: generated tokens cannot have a gate */
    int32_t decode_levels[IPC_MAX_LEVELS]; /* pages that a generated token keeps beside its own */
};

struct ipc_sparse {
    int32_t mode;      /* enum ipc_sparse_mode */
    int32_t k;         /* ABS: required, > 0, or density */
    double ln_lambda;  /* REL: required, at most 30, not 0, or density */
    int32_t gate_rows; /* 64, 128 or 0: as calibrated (ABS), 128 (REL) */
    double density;    /* ABS, REL: share of the prompt's pages to keep, by calibration; 0: not */
    double decode_density; /* any mode: share of its pages that a generated token keeps, by
                              calibration; 1: all; 0: the engine's default */
    bool lost_mass;        /* any mode: measure the softmax mass that prompt rows lose */
};

struct ipc_submit {
    char id[IPC_ID_BYTES + 1];
    const int32_t *tokens; /* prompt; checked to be non-negative, against vocab by the server */
    int32_t n_tokens;
    int32_t max_tokens, min_tokens;
    double temperature, top_p, min_p; /* 0 temperature: greedy */
    int32_t top_k;                    /* 0 and -1: off (read as 0) */
    double repetition_penalty, presence_penalty, frequency_penalty;
    bool has_seed;
    uint64_t seed; /* without one the engine draws one */
    int32_t n_stop;
    int32_t stop_token_ids[IPC_MAX_STOP];
    bool ignore_eos;
    int32_t logprobs; /* 0: none; n: of the chosen token and of the n most likely */
    int32_t priority; /* lower first */
    char tenant[IPC_TENANT_BYTES + 1];
    int32_t n_salt;
    uint8_t cache_salt[IPC_SALT_BYTES];
    int64_t deadline_ms, queue_timeout_ms; /* 0: none */
    bool stream;                           /* false: one TOKENS message right before DONE */
    struct ipc_sparse sparse;
};

struct ipc_cancel {
    int32_t n_ids;
    const char *const *ids;
};

/* STATS, HEALTH, SHUTDOWN, RESET_PREFIX_CACHE, PING; and OK, PONG. The reply repeats the tag. */
struct ipc_control {
    uint64_t tag;
};

struct ipc_drain {
    uint64_t tag;
    int64_t timeout_ms; /* running requests are cancelled after this; 0: never */
};

struct ipc_accepted {
    char id[IPC_ID_BYTES + 1];
};

struct ipc_progress {
    char id[IPC_ID_BYTES + 1];
    int32_t computed, prompt_len, cached;
};

struct ipc_logprob {
    int32_t token;
    float logprob;
    int32_t n_top;
    int32_t top_ids[IPC_MAX_LOGPROBS];
    float top_logprobs[IPC_MAX_LOGPROBS];
};

struct ipc_tokens {
    char id[IPC_ID_BYTES + 1];
    int64_t seq; /* generated tokens of this request sent before: gapless */
    int32_t n_tokens;
    const int32_t *tokens;
    const struct ipc_logprob *logprobs; /* [n_tokens], or NULL */
};

struct ipc_done {
    char id[IPC_ID_BYTES + 1];
    int32_t reason;     /* enum ipc_reason */
    int32_t stop_token; /* -1: none */
    int32_t prompt_tokens, cached_tokens, completion_tokens, preemptions;
    int64_t queue_us, prefill_us, ttft_us, decode_us;
    uint64_t reachable, visited, kept;      /* of prompt rows; density = kept / reachable */
    uint64_t decode_reachable, decode_kept; /* of generated rows */
    uint64_t lost_mass_samples; /* layers x heads x prompt rows whose lost mass was measured; 0: not
                                   asked */
    double lost_mass;           /* mean over them */
};

struct ipc_error {
    char id[IPC_ID_BYTES + 1]; /* "": not about a request */
    uint64_t tag;              /* of the control message that failed; 0: none */
    int32_t code;              /* enum ipc_code */
    char message[IPC_TEXT_BYTES + 1];
    bool retryable;
    int64_t retry_after_ms; /* 0: not known */
};

/* One named number; integers keep 64 bits. */
struct ipc_stat {
    const char *name;
    bool is_int;
    int64_t i;
    double d;
};

struct ipc_stats_ok {
    uint64_t tag;
    int32_t n_stats;
    const struct ipc_stat *stats; /* in the order sent */
};

struct ipc_health_ok {
    uint64_t tag;
    bool live, ready, draining;
    char state[IPC_CAP_BYTES + 1]; /* "starting", "serving", "draining", "dead" */
    int64_t step_age_ms;           /* age of the last finished step while work exists, else 0 */
    int32_t inflight, waiting;
};

struct ipc_goaway {
    char reason[IPC_TEXT_BYTES + 1];
    int64_t deadline_ms; /* from now until the connection is closed; 0: now */
};

struct ipc_msg {
    enum ipc_type type;
    union {
        struct ipc_hello hello;
        struct ipc_submit submit;
        struct ipc_cancel cancel;
        struct ipc_control control;
        struct ipc_drain drain;
        struct ipc_hello_ok hello_ok;
        struct ipc_accepted accepted;
        struct ipc_progress progress;
        struct ipc_tokens tokens;
        struct ipc_done done;
        struct ipc_error error;
        struct ipc_stats_ok stats_ok;
        struct ipc_health_ok health_ok;
        struct ipc_goaway goaway;
    } u;
};

/* Growing byte buffer with packed frames; zeroed is empty. */
struct ipc_buf {
    uint8_t *data;
    size_t len, cap;
};
void ipc_buf_free(struct ipc_buf *b);

struct ipc_decoder;
MUST_CHECK int ipc_decoder_create(struct ipc_decoder **out);
void ipc_decoder_destroy(struct ipc_decoder *d); /* accepts NULL */

/* Zeroes the body and sets every default of that type. */
void ipc_msg_init(struct ipc_msg *m, enum ipc_type type);
/* The same for a body of its own. */
void ipc_body_init(enum ipc_type type, void *body);

/* Appends one whole frame, header included. -ENOMEM, ERR_INVALID (why names the field), or
 * ERR_TOO_LONG above IPC_FRAME_CEILING; then buf is as it was. */
MUST_CHECK int ipc_msg_pack(struct ipc_buf *buf, const struct ipc_msg *m, struct err_msg *why);
/* The same for a body of its own: struct ipc_done with IPC_DONE, and so on. */
MUST_CHECK int ipc_body_pack(struct ipc_buf *buf, enum ipc_type type, const void *body,
                             struct err_msg *why);
/* Reads one payload.
 *   0               m is complete and valid
 *   ERR_INVALID     well-formed, but a field is missing, of the wrong type or out of range; m->type
 *                   is set, and m->u.submit.id for a SUBMIT with a usable id ("" otherwise)
 *   ERR_UNSUPPORTED unknown type
 *   ERR_PROTOCOL    malformed: the connection must be closed
 *   -ENOMEM */
MUST_CHECK int ipc_msg_unpack(struct ipc_decoder *d, struct ipc_msg *m, const uint8_t *payload,
                              size_t len, struct err_msg *why);

/* The checks of a SUBMIT beyond its single fields; ERR_INVALID names the field. vocab 0: unknown.
 */
MUST_CHECK int ipc_submit_check(const struct ipc_submit *m, int32_t vocab, struct err_msg *why);

const char *ipc_type_name(int type);        /* "SUBMIT"; "?" when unknown */
const char *ipc_reason_name(int reason);    /* "stop" */
const char *ipc_sparse_mode_name(int mode); /* "abs" */
const char *ipc_code_name(int code);        /* "QUEUE_FULL" */
/* The wire code of a project error; INTERNAL for one that has none. */
enum ipc_code ipc_code_of(int err);
/* The project error of a wire code; ERR_INTERNAL for an unknown one. */
int ipc_code_err(int code);
bool ipc_code_retryable(int code);

#endif
