/* sluice stats, health, drain, shutdown, reset-prefix-cache: one question or order to the daemon
 * each. */
#include "cmd/cli.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

struct admin_options {
    struct cli_target target;
    bool json, wait;
    int64_t drain_ms;
};

#define O struct admin_options

static const struct conf_opt plain[] = {
    CLI_TARGET_OPTS(O),
    CLI_BOOL(O, json, "json", "false", "print one JSON object"),
};

static const struct conf_opt drain_opts[] = {
    CLI_TARGET_OPTS(O),
    CLI_MS(O, drain_ms, "limit", "0", "what still runs after this is cancelled; 0 is no limit"),
    CLI_BOOL(O, wait, "wait", "false", "return when the daemon has ended"),
    CLI_BOOL(O, json, "json", "false", "print one JSON object"),
};

static int timeout_of(const struct admin_options *o)
{
    return o->target.timeout_ms < INT32_MAX ? (int)o->target.timeout_ms : INT32_MAX;
}

/* Prints and releases an object. */
static int print_json(json_t *o)
{
    int err = json_dumpf(o, stdout, JSON_COMPACT);
    json_decref(o);
    return err == 0 && putchar('\n') != EOF && fflush(stdout) == 0
               ? CLI_OK
               : cli_fail(CLI_FAILED, "cannot write to standard output");
}

/* The exit code of a failed question. */
static int refused(const struct sluice_client *c, int err)
{
    return cli_fail(err == SLUICE_EREFUSED ? CLI_FAILED : CLI_UNREACHABLE, "%s", sluice_error(c));
}

static int stats(struct sluice_client *c, const struct admin_options *o)
{
    const struct sluice_stat *s;
    int n = sluice_get_stats(c, &s, timeout_of(o));
    if (n < 0)
        return refused(c, n);
    if (o->json) {
        json_t *out = json_object();
        for (int i = 0; i < n; i++)
            (void)json_object_set_new(out, s[i].name,
                                      s[i].is_int ? json_integer(s[i].i) : json_real(s[i].d));
        return print_json(out);
    }
    for (int i = 0; i < n; i++) {
        if (s[i].is_int)
            (void)printf("%-28s %" PRId64 "\n", s[i].name, s[i].i);
        else
            (void)printf("%-28s %.6g\n", s[i].name, s[i].d);
    }
    return CLI_OK;
}

/* 0 while the daemon takes requests, 1 when it is there but does not: usable as a probe. */
static int health(struct sluice_client *c, const struct admin_options *o)
{
    struct sluice_health h;
    int err = sluice_get_health(c, &h, timeout_of(o));
    if (err < 0)
        return refused(c, err);
    int code = h.live && h.ready ? CLI_OK : CLI_FAILED;
    if (o->json) {
        json_t *out =
            json_pack("{s:b, s:b, s:b, s:s, s:I, s:i, s:i}", "live", (int)h.live, "ready",
                      (int)h.ready, "draining", (int)h.draining, "state", h.state, "step_age_ms",
                      (json_int_t)h.step_age_ms, "inflight", h.inflight, "waiting", h.waiting);
        int printed = print_json(out);
        return printed == CLI_OK ? code : printed;
    }
    (void)printf("%s: %slive, %sready%s; %d running, %d waiting, last step %" PRId64 " ms ago\n",
                 h.state, h.live ? "" : "not ", h.ready ? "" : "not ",
                 h.draining ? ", draining" : "", h.inflight, h.waiting, h.step_age_ms);
    return code;
}

static int done(const struct admin_options *o, const char *text)
{
    if (o->json)
        return print_json(json_pack("{s:b}", "ok", 1));
    (void)puts(text);
    return CLI_OK;
}

static int drain(struct sluice_client *c, const struct admin_options *o)
{
    int err = sluice_drain(c, o->drain_ms, timeout_of(o));
    if (err < 0)
        return refused(c, err);
    struct sluice_event e;
    while (o->wait && sluice_next(c, &e, -1) >= 0)
        ; /* the daemon ends the connection when it ends */
    return done(o, o->wait ? "drained" : "draining");
}

static int shutdown_now(struct sluice_client *c, const struct admin_options *o)
{
    int err = sluice_shutdown(c, timeout_of(o));
    return err < 0 ? refused(c, err) : done(o, "shutting down");
}

static int reset_prefix_cache(struct sluice_client *c, const struct admin_options *o)
{
    int err = sluice_reset_prefix_cache(c, timeout_of(o));
    return err < 0 ? refused(c, err) : done(o, "prefix cache emptied");
}

static int with_client(const struct admin_options *o,
                       int (*ask)(struct sluice_client *, const struct admin_options *))
{
    struct sluice_client *c = NULL;
    int code = cli_connect(&c, &o->target);
    if (code == CLI_OK)
        code = ask(c, o);
    sluice_close(c);
    return code;
}

#define COMMAND(id, name, table, ask, usage, summary)                                              \
    static const struct conf_program id##_program = {usage, summary, table,                        \
                                                     sizeof(table) / sizeof((table)[0])};          \
    static int id##_run(void *o)                                                                   \
    {                                                                                              \
        return with_client(o, ask);                                                                \
    }                                                                                              \
    const struct cli_command id = {name, &id##_program, id##_run, sizeof(struct admin_options)}

COMMAND(cli_stats, "stats", plain, stats, "sluice stats [options]",
        "Prints the daemon's counters.");
COMMAND(cli_health, "health", plain, health, "sluice health [options]",
        "Prints whether the daemon takes requests; exits 1 if it does not.");
COMMAND(cli_drain, "drain", drain_opts, drain, "sluice drain [options]",
        "Lets the daemon finish what it has, take nothing new, and end.");
COMMAND(cli_shutdown, "shutdown", plain, shutdown_now, "sluice shutdown [options]",
        "Ends the daemon at once; open requests are told so.");
COMMAND(cli_reset_prefix_cache, "reset-prefix-cache", plain, reset_prefix_cache,
        "sluice reset-prefix-cache [options]", "Forgets all cached prefixes.");
