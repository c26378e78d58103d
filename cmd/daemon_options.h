/* sluiced's options: one struct, one table (core/conf.h). */
#ifndef CMD_DAEMON_OPTIONS_H
#define CMD_DAEMON_OPTIONS_H

#include "core/conf.h"

struct daemon_options {
    char *model, *thresholds, *listen, *auth_token_file, *metrics, *window, *window_heads, *shm,
        *device, *leader, *leader_token_file;
    bool random_weights, force_thresholds, prefix_cache, share_generated;
    int dtype, kv_dtype, page_order, log_level;
    int64_t tp, nnodes, node_rank, rank, threads;
    int64_t kv_memory, kv_pages, max_model_len;
    int64_t max_running, token_budget, max_partial_prefills, max_long_partial, long_prefill_tokens;
    double watermark, decode_density, steer;
    int64_t max_queued_requests, max_queued_tokens, max_tenant_requests;
    int64_t max_connections, max_frame, handshake_timeout, slow_bytes, slow_timeout;
    int64_t drain_timeout, step_timeout, comm_timeout, max_step_time;
};

extern const struct conf_program daemon_program;

/* Checks what the table cannot: required options and combinations. */
MUST_CHECK int daemon_options_check(const struct daemon_options *o, struct err_msg *why);

#endif
