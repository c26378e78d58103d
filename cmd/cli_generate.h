/* What came back for one request, gathered from its events, and its printed forms. */
#ifndef CMD_CLI_GENERATE_H
#define CMD_CLI_GENERATE_H

#include "core/err.h"
#include "ipc/client.h"

#include <stdio.h>

struct generate_result {
    int32_t *tokens;
    struct sluice_logprob *logprobs; /* as many as tokens, or NULL */
    int32_t n_tokens;
    bool failed;
    int code; /* of a failure: enum sluice_code */
    char message[384];
    bool retryable;
    int64_t retry_after_ms;
    enum sluice_reason reason;
    int32_t stop_token;
    int32_t prompt_tokens, cached_tokens, preemptions;
    int64_t queue_us, prefill_us, ttft_us, decode_us; /* as the daemon measured */
    uint64_t reachable, visited, kept;                /* page decisions */
    uint64_t decode_reachable, decode_kept;           /* of generated tokens */
    uint64_t lost_mass_samples; /* layers x heads x rows whose lost mass is known */
    double lost_mass;
    int64_t start_us, end_us; /* the client's own clock, set by the caller */
};

/* Takes over what an event says; the event may be gone afterwards. */
void generate_result_add(struct generate_result *r, const struct sluice_event *e);
/* A failure that the client itself found. */
void generate_result_fail(struct generate_result *r, enum sluice_code code, const char *message);
/* One object: tokens, logprobs, finish_reason, usage, timing_ms, density, decode_density, and
 * lost_mass where that was asked for; or error. */
MUST_CHECK int generate_result_json(const struct generate_result *r, FILE *to);
void generate_result_text(const struct generate_result *r, FILE *to);
void generate_result_deinit(struct generate_result *r);

#endif
