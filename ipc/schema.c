#include "ipc/schema.h"

#include "ipc/frame.h"

#define I32_MAX 2147483647.0
#define I32_MIN (-2147483648.0)
#define MS_MAX  31536000000.0      /* a year */
#define N_MAX   9007199254740992.0 /* 2^53: doubles bound the ranges */

/* One line a field: struct, member, key, then what the form needs. */
#define AT(s, f) .name = #f, .offset = offsetof(struct ipc_##s, f)
#define BOOL(s, f, k, d)                                                                           \
    {                                                                                              \
        AT(s, f), .key = (k), .kind = IPC_KIND_BOOL, .def = (d)                                    \
    }
#define NUM(s, f, k, form, lo, hi, d)                                                              \
    {                                                                                              \
        AT(s, f), .key = (k), .kind = IPC_KIND_##form, .min = (lo), .max = (hi), .def = (d)        \
    }
#define NEED(s, f, k, form, lo, hi)                                                                \
    {                                                                                              \
        AT(s, f), .key = (k), .kind = IPC_KIND_##form, .min = (lo), .max = (hi), .required = true  \
    }
#define U64(s, f, k)                                                                               \
    {                                                                                              \
        AT(s, f), .key = (k), .kind = IPC_KIND_U64                                                 \
    }
#define STR(s, f, k, need)                                                                         \
    {                                                                                              \
        AT(s, f), .key = (k), .kind = IPC_KIND_STR, .required = (need),                            \
                  .room = sizeof((struct ipc_##s *)0)->f - 1                                       \
    }
#define LIST(s, f, k, form, n, r, hi, need)                                                        \
    {                                                                                              \
        AT(s, f), .key = (k), .kind = IPC_KIND_##form, .required = (need), .room = (r),            \
                  .count_offset = offsetof(struct ipc_##s, n), .max = (hi)                         \
    }
#define SPARSE(f, k, form, lo, hi)                                                                 \
    {                                                                                              \
        .name = "sparse." #f, .offset = offsetof(struct ipc_sparse, f), .key = (k),                \
        .kind = IPC_KIND_##form, .min = (lo), .max = (hi)                                          \
    }
#define SCHEMA(text, number, s)                                                                    \
    {                                                                                              \
        .name = (text), .type = (number), .size = sizeof(struct ipc_##s), .fields = s##_fields,    \
        .n_fields = sizeof s##_fields / sizeof s##_fields[0]                                       \
    }

static const struct ipc_field hello_fields[] = {
    NEED(hello, proto_major, 0, I32, 0, I32_MAX),
    NUM(hello, proto_minor, 1, I32, 0, I32_MAX, 0),
    STR(hello, client, 2, false),
    LIST(hello, caps, 3, STR_LIST, n_caps, IPC_MAX_CAPS, 0, false),
    NUM(hello, max_frame, 4, I64, IPC_FRAME_MIN, IPC_FRAME_CEILING, IPC_FRAME_MAX),
    STR(hello, token, 5, false),
};

static const struct ipc_field hello_ok_fields[] = {
    NEED(hello_ok, proto_major, 0, I32, 0, I32_MAX),
    NUM(hello_ok, proto_minor, 1, I32, 0, I32_MAX, 0),
    STR(hello_ok, version, 2, false),
    STR(hello_ok, instance_id, 3, false),
    STR(hello_ok, model, 4, false),
    NUM(hello_ok, vocab, 5, I32, 0, I32_MAX, 0),
    NUM(hello_ok, max_model_len, 6, I32, 0, I32_MAX, 0),
    NUM(hello_ok, max_servable_tokens, 7, I32, 0, I32_MAX, 0),
    NUM(hello_ok, block_size, 8, I32, 0, I32_MAX, 0),
    NUM(hello_ok, num_blocks, 9, I32, 0, I32_MAX, 0),
    STR(hello_ok, kv_dtype, 10, false),
    STR(hello_ok, device, 11, false),
    NUM(hello_ok, tp, 12, I32, 0, I32_MAX, 1),
    LIST(hello_ok, modes, 13, I32_LIST, n_modes, IPC_MAX_MODES, I32_MAX, false),
    LIST(hello_ok, k_levels, 14, I32_LIST, n_levels, IPC_MAX_LEVELS, I32_MAX, false),
    NUM(hello_ok, gate_rows, 15, I32, 0, I32_MAX, 0),
    NUM(hello_ok, max_frame, 16, I64, IPC_FRAME_MIN, IPC_FRAME_CEILING, IPC_FRAME_MAX),
    NUM(hello_ok, max_connections, 17, I32, 0, I32_MAX, 0),
    NUM(hello_ok, max_queued_requests, 18, I32, 0, I32_MAX, 0),
    NUM(hello_ok, max_queued_tokens, 19, I64, 0, N_MAX, 0),
    LIST(hello_ok, caps, 20, STR_LIST, n_caps, IPC_MAX_CAPS, 0, false),
    LIST(hello_ok, decode_levels, 21, I32_LIST, n_decode_levels, IPC_MAX_LEVELS, I32_MAX, false),
};

static const struct ipc_field sparse_fields[] = {
    SPARSE(mode, 0, I32, 0, IPC_SPARSE_REL), SPARSE(k, 1, I32, 0, I32_MAX),
    SPARSE(ln_lambda, 2, F64, -1000, 30),    SPARSE(gate_rows, 3, I32, 0, 128),
    SPARSE(density, 4, F64, 0, 1),           SPARSE(decode_density, 5, F64, 0, 1),
    SPARSE(lost_mass, 6, BOOL, 0, 0),
};

static const struct ipc_field submit_fields[] = {
    STR(submit, id, 0, true),
    LIST(submit, tokens, 1, TOKENS, n_tokens, 0, I32_MAX, true),
    NUM(submit, max_tokens, 2, I32, 1, I32_MAX, 16),
    NUM(submit, min_tokens, 3, I32, 0, I32_MAX, 0),
    NUM(submit, temperature, 4, F64, 0, 100, 1),
    NUM(submit, top_k, 5, I32, -1, I32_MAX, 0),
    NUM(submit, top_p, 6, F64, 0, 1, 1),
    NUM(submit, min_p, 7, F64, 0, 1, 0),
    NUM(submit, repetition_penalty, 8, F64, 0, 100, 1),
    NUM(submit, presence_penalty, 9, F64, -2, 2, 0),
    NUM(submit, frequency_penalty, 10, F64, -2, 2, 0),
    {AT(submit, seed), .key = 11, .kind = IPC_KIND_SEED,
     .count_offset = offsetof(struct ipc_submit, has_seed)},
    LIST(submit, stop_token_ids, 12, I32_LIST, n_stop, IPC_MAX_STOP, I32_MAX, false),
    BOOL(submit, ignore_eos, 13, false),
    NUM(submit, logprobs, 14, I32, 0, IPC_MAX_LOGPROBS, 0),
    NUM(submit, priority, 15, I32, I32_MIN, I32_MAX, 0),
    STR(submit, tenant, 16, false),
    LIST(submit, cache_salt, 17, SALT, n_salt, IPC_SALT_BYTES, 0, false),
    NUM(submit, deadline_ms, 18, I64, 0, MS_MAX, 0),
    NUM(submit, queue_timeout_ms, 19, I64, 0, MS_MAX, 0),
    BOOL(submit, stream, 20, true),
    {AT(submit, sparse), .key = 21, .kind = IPC_KIND_SPARSE},
};

static const struct ipc_field cancel_fields[] = {
    LIST(cancel, ids, 0, IDS, n_ids, 0, 0, true),
};
static const struct ipc_field control_fields[] = {
    U64(control, tag, 0),
};
static const struct ipc_field drain_fields[] = {
    U64(drain, tag, 0),
    NUM(drain, timeout_ms, 1, I64, 0, MS_MAX, 0),
};
static const struct ipc_field accepted_fields[] = {
    STR(accepted, id, 0, true),
};
static const struct ipc_field progress_fields[] = {
    STR(progress, id, 0, true),
    NUM(progress, computed, 1, I32, 0, I32_MAX, 0),
    NUM(progress, prompt_len, 2, I32, 0, I32_MAX, 0),
    NUM(progress, cached, 3, I32, 0, I32_MAX, 0),
};
static const struct ipc_field tokens_fields[] = {
    STR(tokens, id, 0, true),
    NUM(tokens, seq, 1, I64, 0, N_MAX, 0),
    LIST(tokens, tokens, 2, TOKENS, n_tokens, 0, I32_MAX, true),
    LIST(tokens, logprobs, 3, LOGPROBS, n_tokens, 0, I32_MAX, false),
};
static const struct ipc_field done_fields[] = {
    STR(done, id, 0, true),
    NEED(done, reason, 1, I32, 0, IPC_REASON_SHUTDOWN),
    NUM(done, stop_token, 2, I32, -1, I32_MAX, -1),
    NUM(done, prompt_tokens, 3, I32, 0, I32_MAX, 0),
    NUM(done, cached_tokens, 4, I32, 0, I32_MAX, 0),
    NUM(done, completion_tokens, 5, I32, 0, I32_MAX, 0),
    NUM(done, preemptions, 6, I32, 0, I32_MAX, 0),
    NUM(done, queue_us, 7, I64, 0, N_MAX, 0),
    NUM(done, prefill_us, 8, I64, 0, N_MAX, 0),
    NUM(done, ttft_us, 9, I64, 0, N_MAX, 0),
    NUM(done, decode_us, 10, I64, 0, N_MAX, 0),
    U64(done, reachable, 11),
    U64(done, visited, 12),
    U64(done, kept, 13),
    U64(done, decode_reachable, 14),
    U64(done, decode_kept, 15),
    U64(done, lost_mass_samples, 16),
    NUM(done, lost_mass, 17, F64, 0, 1, 0),
};
static const struct ipc_field error_fields[] = {
    STR(error, id, 0, false),
    U64(error, tag, 1),
    NEED(error, code, 2, I32, 0, I32_MAX),
    STR(error, message, 3, false),
    BOOL(error, retryable, 4, false),
    NUM(error, retry_after_ms, 5, I64, 0, MS_MAX, 0),
};
static const struct ipc_field stats_ok_fields[] = {
    U64(stats_ok, tag, 0),
    LIST(stats_ok, stats, 1, STATS, n_stats, 0, 0, true),
};
static const struct ipc_field health_ok_fields[] = {
    U64(health_ok, tag, 0),
    BOOL(health_ok, live, 1, false),
    BOOL(health_ok, ready, 2, false),
    BOOL(health_ok, draining, 3, false),
    STR(health_ok, state, 4, false),
    NUM(health_ok, step_age_ms, 5, I64, 0, N_MAX, 0),
    NUM(health_ok, inflight, 6, I32, 0, I32_MAX, 0),
    NUM(health_ok, waiting, 7, I32, 0, I32_MAX, 0),
};
static const struct ipc_field goaway_fields[] = {
    STR(goaway, reason, 0, false),
    NUM(goaway, deadline_ms, 1, I64, 0, MS_MAX, 0),
};

static const struct ipc_schema schemas[] = {
    SCHEMA("HELLO", IPC_HELLO, hello),
    SCHEMA("SUBMIT", IPC_SUBMIT, submit),
    SCHEMA("CANCEL", IPC_CANCEL, cancel),
    SCHEMA("STATS", IPC_STATS, control),
    SCHEMA("HEALTH", IPC_HEALTH, control),
    SCHEMA("DRAIN", IPC_DRAIN, drain),
    SCHEMA("SHUTDOWN", IPC_SHUTDOWN, control),
    SCHEMA("RESET_PREFIX_CACHE", IPC_RESET_PREFIX_CACHE, control),
    SCHEMA("PING", IPC_PING, control),
    SCHEMA("HELLO_OK", IPC_HELLO_OK, hello_ok),
    SCHEMA("ACCEPTED", IPC_ACCEPTED, accepted),
    SCHEMA("PROGRESS", IPC_PROGRESS, progress),
    SCHEMA("TOKENS", IPC_TOKENS, tokens),
    SCHEMA("DONE", IPC_DONE, done),
    SCHEMA("ERROR", IPC_ERROR, error),
    SCHEMA("STATS_OK", IPC_STATS_OK, stats_ok),
    SCHEMA("HEALTH_OK", IPC_HEALTH_OK, health_ok),
    SCHEMA("GOAWAY", IPC_GOAWAY, goaway),
    SCHEMA("OK", IPC_OK, control),
    SCHEMA("PONG", IPC_PONG, control),
};
static const struct ipc_schema sparse_schema = SCHEMA("sparse", 0, sparse);

const struct ipc_schema *ipc_schema_of(int type)
{
    for (size_t i = 0; i < sizeof schemas / sizeof schemas[0]; i++)
        if (schemas[i].type == type)
            return &schemas[i];
    return NULL;
}

const struct ipc_schema *ipc_schema_sparse(void)
{
    return &sparse_schema;
}

const char *ipc_type_name(int type)
{
    const struct ipc_schema *s = ipc_schema_of(type);
    return s ? s->name : "?";
}

const char *ipc_reason_name(int reason)
{
    static const char *const names[] = {"stop",     "length", "cancelled", "deadline",
                                        "capacity", "error",  "shutdown"};
    return reason >= 0 && reason <= IPC_REASON_SHUTDOWN ? names[reason] : "?";
}

const char *ipc_sparse_mode_name(int mode)
{
    static const char *const names[] = {"auto", "dense", "abs", "rel"};
    return mode >= 0 && mode <= IPC_SPARSE_REL ? names[mode] : "?";
}

static const struct {
    const char *name;
    int code, err;
    bool retryable;
} codes[] = {
#define XX(name, number, err, retry) {#name, number, err, retry},
    IPC_CODE_MAP(XX)
#undef XX
};

enum { N_CODES = sizeof codes / sizeof codes[0] };

const char *ipc_code_name(int code)
{
    for (size_t i = 0; i < N_CODES; i++)
        if (codes[i].code == code)
            return codes[i].name;
    return "?";
}

enum ipc_code ipc_code_of(int err)
{
    for (size_t i = 0; i < N_CODES; i++)
        if (codes[i].err == err)
            return (enum ipc_code)codes[i].code;
    return IPC_CODE_INTERNAL;
}

int ipc_code_err(int code)
{
    for (size_t i = 0; i < N_CODES; i++)
        if (codes[i].code == code)
            return codes[i].err;
    return ERR_INTERNAL;
}

bool ipc_code_retryable(int code)
{
    for (size_t i = 0; i < N_CODES; i++)
        if (codes[i].code == code)
            return codes[i].retryable;
    return false;
}
