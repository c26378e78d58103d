/* What the commands of `sluice` share: exit codes, the option rows, connecting, messages.
 * A command is a function main-like in its arguments; cli.c holds the table of them. */
#ifndef CMD_CLI_H
#define CMD_CLI_H

#include "core/conf.h"
#include "core/err.h"
#include "ipc/client.h"

#include <stddef.h>

enum cli_exit {
    CLI_OK = 0,
    CLI_FAILED = 1, /* the daemon refused, a request failed, or its answer could not be written */
    CLI_USAGE = 2,  /* options or input files are wrong */
    CLI_UNREACHABLE = 3 /* no connection, or it was lost */
};

/* One row of an option table: T is the options struct, f the field in it. */
#define CLI_OPT(T, f, name, type, def, lo, hi, arg, help)                                          \
    {                                                                                              \
        (name), (type), offsetof(T, f), (def), (lo), (hi), {NULL}, (arg), (help)                   \
    }
#define CLI_TEXT(T, f, name, def, arg, help)   CLI_OPT(T, f, name, CONF_TEXT, def, 0, 0, arg, help)
#define CLI_INT(T, f, name, def, lo, hi, help) CLI_OPT(T, f, name, CONF_INT, def, lo, hi, "N", help)
#define CLI_INT32(T, f, name, def, help)                                                           \
    CLI_OPT(T, f, name, CONF_INT, def, INT32_MIN, INT32_MAX, "N", help)
#define CLI_REAL(T, f, name, def, help) CLI_OPT(T, f, name, CONF_FLOAT, def, 0, 0, "X", help)
#define CLI_BOOL(T, f, name, def, help) CLI_OPT(T, f, name, CONF_BOOL, def, 0, 0, NULL, help)
#define CLI_MS(T, f, name, def, help)   CLI_OPT(T, f, name, CONF_MS, def, 0, 1e12, "MS", help)

/* Where the daemon is. */
struct cli_target {
    char *connect, *auth_token_file;
    int64_t timeout_ms;
};

#define CLI_TARGET_OPTS(T)                                                                         \
    CLI_TEXT(T, target.connect, "connect", "unix:/tmp/sluice.sock", "ADDR",                        \
             "the daemon: unix:PATH or tcp:HOST:PORT"),                                            \
        CLI_TEXT(T, target.auth_token_file, "auth-token-file", NULL, "FILE",                       \
                 "shared secret of a daemon on TCP"),                                              \
        CLI_MS(T, target.timeout_ms, "timeout", "5s",                                              \
               "limit for connecting and for a control message's answer")

struct cli_command {
    const char *name;
    const struct conf_program *program;
    int (*run)(void *options);
    size_t options_size;
};

extern const struct cli_command cli_generate, cli_bench, cli_eval, cli_stats, cli_health, cli_drain,
    cli_shutdown, cli_reset_prefix_cache;

/* "sluice: " and the message, to stderr; returns code, so that `return cli_fail(...)` reads well.
 */
int cli_fail(int code, const char *fmt, ...) PRINTF_LIKE(2, 3);
/* Connects, or prints why not; returns an exit code. */
int cli_connect(struct sluice_client **out, const struct cli_target *t);

#endif
