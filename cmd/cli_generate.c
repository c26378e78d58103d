/* sluice generate: one request, its tokens as they come, or one JSON object at the end. */
#include "cmd/cli_generate.h"

#include "cmd/cli.h"
#include "cmd/cli_parse.h"
#include "core/clock.h"
#include "core/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct generate_options {
    struct cli_target target;
    char *tokens, *stop_ids, *sparse, *tenant, *cache_salt;
    int64_t line, max_tokens, min_tokens, top_k, seed, logprobs, gate_rows, priority;
    int64_t deadline_ms, queue_timeout_ms;
    double temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    bool ignore_eos, lost_mass, json;
};

#define O struct generate_options

static const struct conf_opt options[] = {
    CLI_TARGET_OPTS(O),
    CLI_TEXT(O, tokens, "tokens", NULL, "IDS|@FILE",
             "the prompt: 1,2,3, or a file of ids, or JSON lines with a \"prompt\" (required)"),
    CLI_INT(O, line, "line", "1", 1, 1e9, "which line of a JSON lines file"),
    CLI_INT32(O, max_tokens, "max-tokens", "16", "most tokens to generate"),
    CLI_INT32(O, min_tokens, "min-tokens", "0", "stop tokens are barred before so many"),
    CLI_REAL(O, temperature, "temperature", "1", "0 is greedy"),
    CLI_INT32(O, top_k, "top-k", "0", "draw from the k most likely; 0 is off"),
    CLI_REAL(O, top_p, "top-p", "1", "draw from the most likely that sum to this; 1 is off"),
    CLI_REAL(O, min_p, "min-p", "0",
             "bar tokens under this share of the most likely one's probability; 0 is off"),
    CLI_REAL(O, repetition_penalty, "repetition-penalty", "1",
             "divides the logits of tokens seen in prompt or output; 1 is off"),
    CLI_REAL(O, presence_penalty, "presence-penalty", "0",
             "subtracted from the logits of tokens in the output"),
    CLI_REAL(O, frequency_penalty, "frequency-penalty", "0",
             "the same, once for every time the token occurs"),
    CLI_INT(O, seed, "seed", "-1", -1, 9e18, "of the draws; -1 lets the daemon choose"),
    CLI_TEXT(O, stop_ids, "stop-ids", NULL, "IDS", "token ids that end the output, 1,2,3"),
    CLI_BOOL(O, ignore_eos, "ignore-eos", "false", "the model's end token does not end the output"),
    CLI_INT32(O, logprobs, "logprobs", "0",
              "log probabilities of the chosen token and of the N most likely"),
    CLI_TEXT(O, sparse, "sparse", "auto", "MODE",
             "attention of the prompt: dense, k=K (calibrated thresholds), rel=LAMBDA, abs~D or "
             "rel~D (a density), or auto; +decode~D after one: of generated tokens"),
    CLI_INT(O, gate_rows, "gate-rows", "0", 0, 128,
            "rows that decide together under rel: 64, 128, or 0 for the daemon's choice"),
    CLI_BOOL(O, lost_mass, "lost-mass", "false",
             "measure on a sample of the prompt's rows the softmax mass of the pages not used"),
    CLI_INT32(O, priority, "priority", "0", "lower is served first"),
    CLI_TEXT(O, tenant, "tenant", NULL, "NAME", "whom the request counts for"),
    CLI_TEXT(O, cache_salt, "cache-salt", NULL, "TEXT",
             "cached prefixes are shared only under the same salt"),
    CLI_MS(O, deadline_ms, "deadline", "0", "from submission to the last token; 0 is none"),
    CLI_MS(O, queue_timeout_ms, "queue-timeout", "0", "from submission to the first step"),
    CLI_BOOL(O, json, "json", "false", "print one JSON object"),
};

static const struct conf_program program = {
    "sluice generate --connect unix:PATH --tokens 1,2,3 [options]",
    "Generates from one prompt and prints the token ids.", options,
    sizeof options / sizeof options[0]};

/* Fills a request from the options; what it points to is theirs. */
static int make_request(struct sluice_request *r, const struct generate_options *o,
                        const struct cli_tokens *prompt, struct err_msg *why)
{
    sluice_request_init(r);
    r->id = "1";
    r->tokens = prompt->ids;
    r->n_tokens = prompt->n;
    r->max_tokens = (int32_t)o->max_tokens;
    r->min_tokens = (int32_t)o->min_tokens;
    r->temperature = o->temperature;
    r->top_k = (int32_t)o->top_k;
    r->top_p = o->top_p;
    r->min_p = o->min_p;
    r->repetition_penalty = o->repetition_penalty;
    r->presence_penalty = o->presence_penalty;
    r->frequency_penalty = o->frequency_penalty;
    r->has_seed = o->seed >= 0;
    r->seed = o->seed >= 0 ? (uint64_t)o->seed : 0;
    r->ignore_eos = o->ignore_eos;
    r->logprobs = (int32_t)o->logprobs;
    r->gate_rows = (int32_t)o->gate_rows;
    r->lost_mass = o->lost_mass;
    r->priority = (int32_t)o->priority;
    r->tenant = o->tenant;
    r->cache_salt = (const uint8_t *)o->cache_salt;
    r->n_salt = o->cache_salt ? (int32_t)strlen(o->cache_salt) : 0;
    r->deadline_ms = o->deadline_ms;
    r->queue_timeout_ms = o->queue_timeout_ms;
    r->stream = !o->json;
    int n = cli_parse_ids(r->stop_token_ids, SLUICE_MAX_STOP, o->stop_ids, why);
    if (n < 0)
        return n;
    r->n_stop = n;
    return cli_parse_sparse(r, o->sparse, why);
}

/* How output appears while it is made: ids on stdout, on a terminal one by one; prefill progress
 * on stderr when that is a terminal. */
struct live {
    bool out_tty, err_tty, progress_shown;
};

static void show_event(struct live *l, const struct sluice_event *e)
{
    if (e->type == SLUICE_PROGRESS && l->err_tty) {
        (void)fprintf(stderr, "\rprompt %d/%d", e->u.progress.computed, e->u.progress.prompt_len);
        l->progress_shown = true;
    }
    if (e->type != SLUICE_TOKENS)
        return;
    if (l->progress_shown)
        (void)fputs("\r\033[K", stderr);
    l->progress_shown = false;
    for (int32_t i = 0; i < e->u.tokens.n; i++)
        (void)printf("%s%d", e->u.tokens.first + i > 0 ? " " : "", e->u.tokens.ids[i]);
    if (l->out_tty)
        (void)fflush(stdout);
}

/* Waits for the end of the request. Returns an exit code. */
static int collect(struct sluice_client *c, struct generate_result *result, bool json)
{
    struct live live = {isatty(STDOUT_FILENO) == 1, isatty(STDERR_FILENO) == 1 && !json, false};
    struct sluice_event e;
    for (;;) {
        int n = sluice_next(c, &e, -1);
        if (n < 0)
            return cli_fail(CLI_UNREACHABLE, "the connection was lost: %s", sluice_error(c));
        if (n == 0 || e.type == SLUICE_GOING_AWAY)
            continue;
        if (!json)
            show_event(&live, &e);
        generate_result_add(result, &e);
        if (sluice_event_is_last(&e) || e.type == SLUICE_REFUSED)
            return CLI_OK;
    }
}

static int report(const struct generate_result *r, bool json)
{
    if (json) {
        if (generate_result_json(r, stdout) < 0)
            return cli_fail(CLI_FAILED, "cannot write to standard output");
    } else if (!r->failed) {
        (void)putchar('\n');
        generate_result_text(r, stderr);
    }
    if (r->failed) {
        if (!json && r->n_tokens)
            (void)putchar('\n');
        return cli_fail(CLI_FAILED, "%s: %s", sluice_code_name(r->code), r->message);
    }
    return r->reason == SLUICE_STOP || r->reason == SLUICE_LENGTH || r->reason == SLUICE_CAPACITY
               ? CLI_OK
               : CLI_FAILED;
}

static int generate(const struct generate_options *o, const struct cli_tokens *prompt)
{
    struct err_msg why = {""};
    struct sluice_request r;
    struct sluice_client *c = NULL;
    if (make_request(&r, o, prompt, &why) < 0)
        return cli_fail(CLI_USAGE, "generate: %s", why.text);
    int code = cli_connect(&c, &o->target);
    if (code != CLI_OK)
        return code;
    struct clock clock = clock_real();
    struct generate_result result = {.start_us = clock_now_us(&clock)};
    int err = sluice_submit(c, &r);
    if (err == SLUICE_EINVALID)
        generate_result_fail(&result, SLUICE_CODE_INVALID_ARGUMENT, sluice_error(c));
    else if (err < 0)
        code = cli_fail(CLI_UNREACHABLE, "%s", sluice_error(c));
    else
        code = collect(c, &result, o->json);
    result.end_us = clock_now_us(&clock);
    if (code == CLI_OK)
        code = report(&result, o->json);
    generate_result_deinit(&result);
    sluice_close(c);
    return code;
}

static int run(void *options_arg)
{
    const struct generate_options *o = options_arg;
    struct cli_tokens prompt;
    struct err_msg why = {""};
    if (!o->tokens)
        return cli_fail(CLI_USAGE, "generate: --tokens is required (see sluice generate --help)");
    if (cli_parse_tokens(&prompt, o->tokens, o->line, &why) < 0)
        return cli_fail(CLI_USAGE, "generate: --tokens: %s", why.text);
    int code = generate(o, &prompt);
    mem_free(prompt.ids);
    return code;
}

const struct cli_command cli_generate = {"generate", &program, run,
                                         sizeof(struct generate_options)};
