#include "cmd/cli_generate.h"

#include "core/mem.h"

#include <jansson.h>
#include <string.h>

static void add_tokens(struct generate_result *r, const struct sluice_event *e)
{
    int32_t n = e->u.tokens.n;
    size_t total = (size_t)r->n_tokens + (size_t)n;
    r->tokens = mem_realloc(r->tokens, total * sizeof *r->tokens);
    memcpy(r->tokens + r->n_tokens, e->u.tokens.ids, (size_t)n * sizeof *r->tokens);
    if (e->u.tokens.logprobs) {
        r->logprobs = mem_realloc(r->logprobs, total * sizeof *r->logprobs);
        memcpy(r->logprobs + r->n_tokens, e->u.tokens.logprobs, (size_t)n * sizeof *r->logprobs);
    }
    r->n_tokens += n;
}

static void add_done(struct generate_result *r, const struct sluice_event *e)
{
    r->reason = e->u.done.reason;
    r->stop_token = e->u.done.stop_token;
    r->prompt_tokens = e->u.done.prompt_tokens;
    r->cached_tokens = e->u.done.cached_tokens;
    r->preemptions = e->u.done.preemptions;
    r->queue_us = e->u.done.queue_us;
    r->prefill_us = e->u.done.prefill_us;
    r->ttft_us = e->u.done.ttft_us;
    r->decode_us = e->u.done.decode_us;
    r->reachable = e->u.done.reachable;
    r->visited = e->u.done.visited;
    r->kept = e->u.done.kept;
    r->decode_reachable = e->u.done.decode_reachable;
    r->decode_kept = e->u.done.decode_kept;
    r->lost_mass_samples = e->u.done.lost_mass_samples;
    r->lost_mass = e->u.done.lost_mass;
}

void generate_result_fail(struct generate_result *r, enum sluice_code code, const char *message)
{
    r->failed = true;
    r->code = (int)code;
    (void)snprintf(r->message, sizeof r->message, "%s", message);
}

static void add_failure(struct generate_result *r, const struct sluice_event *e)
{
    generate_result_fail(r, (enum sluice_code)e->u.error.code, e->u.error.message);
    r->retryable = e->u.error.retryable;
    r->retry_after_ms = e->u.error.retry_after_ms;
}

void generate_result_add(struct generate_result *r, const struct sluice_event *e)
{
    switch (e->type) {
    case SLUICE_TOKENS: add_tokens(r, e); break;
    case SLUICE_DONE: add_done(r, e); break;
    case SLUICE_FAILED:
    case SLUICE_REFUSED: add_failure(r, e); break;
    case SLUICE_ACCEPTED:
    case SLUICE_PROGRESS:
    case SLUICE_GOING_AWAY: break;
    }
}

static double ratio(uint64_t part, uint64_t whole)
{
    return whole ? (double)part / (double)whole : 1.0;
}

static json_t *json_logprobs(const struct generate_result *r)
{
    json_t *out = json_array();
    for (int32_t i = 0; r->logprobs && i < r->n_tokens; i++) {
        const struct sluice_logprob *l = &r->logprobs[i];
        json_t *top = json_array();
        for (int32_t j = 0; j < l->n_top; j++)
            (void)json_array_append_new(
                top, json_pack("[i, f]", l->top_ids[j], (double)l->top_logprobs[j]));
        (void)json_array_append_new(out, json_pack("{s:i, s:f, s:o}", "token", l->token, "logprob",
                                                   (double)l->logprob, "top", top));
    }
    return out;
}

static json_t *json_error(const struct generate_result *r)
{
    return json_pack("{s:{s:s, s:s, s:b, s:I}}", "error", "code", sluice_code_name(r->code),
                     "message", r->message, "retryable", (int)r->retryable, "retry_after_ms",
                     (json_int_t)r->retry_after_ms);
}

static json_t *json_done(const struct generate_result *r)
{
    json_t *tokens = json_array();
    for (int32_t i = 0; i < r->n_tokens; i++)
        (void)json_array_append_new(tokens, json_integer(r->tokens[i]));
    json_t *stop = r->stop_token >= 0 ? json_integer(r->stop_token) : json_null();
    json_t *usage = json_pack("{s:i, s:i, s:i, s:i}", "prompt_tokens", r->prompt_tokens,
                              "cached_tokens", r->cached_tokens, "completion_tokens", r->n_tokens,
                              "preemptions", r->preemptions);
    json_t *timing =
        json_pack("{s:f, s:f, s:f, s:f, s:f}", "queue", (double)r->queue_us / 1e3, "prefill",
                  (double)r->prefill_us / 1e3, "ttft", (double)r->ttft_us / 1e3, "decode",
                  (double)r->decode_us / 1e3, "client", (double)(r->end_us - r->start_us) / 1e3);
    json_t *pages = json_pack("{s:I, s:I, s:I}", "reachable", (json_int_t)r->reachable, "visited",
                              (json_int_t)r->visited, "kept", (json_int_t)r->kept);
    json_t *out = json_pack("{s:o, s:o, s:s, s:o, s:o, s:o, s:f, s:o, s:f}", "tokens", tokens,
                            "logprobs", json_logprobs(r), "finish_reason",
                            sluice_reason_name((int)r->reason), "stop_token", stop, "usage", usage,
                            "timing_ms", timing, "density", ratio(r->kept, r->reachable), "pages",
                            pages, "decode_density", ratio(r->decode_kept, r->decode_reachable));
    if (out && r->lost_mass_samples)
        (void)json_object_set_new(out, "lost_mass", json_real(r->lost_mass));
    return out;
}

int generate_result_json(const struct generate_result *r, FILE *to)
{
    json_t *out = r->failed ? json_error(r) : json_done(r);
    int err = out ? json_dumpf(out, to, JSON_COMPACT | JSON_REAL_PRECISION(9)) : -1;
    json_decref(out);
    return err == 0 && fputc('\n', to) != EOF && fflush(to) == 0 ? 0 : ERR_INTERNAL;
}

void generate_result_text(const struct generate_result *r, FILE *to)
{
    if (r->logprobs) {
        for (int32_t i = 0; i < r->n_tokens; i++)
            (void)fprintf(to, "  %6d  %9.5f\n", r->tokens[i], (double)r->logprobs[i].logprob);
    }
    (void)fprintf(to,
                  "%s after %d tokens; prompt %d tokens, %d from the cache; first token %.1f ms, "
                  "then %.1f ms; density %.3f",
                  sluice_reason_name((int)r->reason), r->n_tokens, r->prompt_tokens,
                  r->cached_tokens, (double)r->ttft_us / 1e3, (double)r->decode_us / 1e3,
                  ratio(r->kept, r->reachable));
    if (r->decode_kept < r->decode_reachable)
        (void)fprintf(to, ", of generated tokens %.3f", ratio(r->decode_kept, r->decode_reachable));
    if (r->lost_mass_samples)
        (void)fprintf(to, "; lost mass %.4f", r->lost_mass);
    (void)fputc('\n', to);
}

void generate_result_deinit(struct generate_result *r)
{
    mem_free(r->tokens);
    mem_free(r->logprobs);
    r->tokens = NULL;
    r->logprobs = NULL;
}
