#include "cmd/cli.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int cli_fail(int code, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    (void)fputs("sluice: ", stderr);
    (void)vfprintf(stderr, fmt, args);
    (void)fputc('\n', stderr);
    va_end(args);
    return code;
}

/* The first line of a file, without its end; at most cap - 1 bytes. */
static bool read_secret(const char *path, char *out, size_t cap)
{
    FILE *f = fopen(path, "re");
    if (!f)
        return false;
    bool ok = fgets(out, (int)cap, f) != NULL;
    (void)fclose(f);
    if (ok)
        out[strcspn(out, "\r\n")] = '\0';
    return ok && out[0];
}

int cli_connect(struct sluice_client **out, const struct cli_target *t)
{
    char why[256] = "", secret[512];
    struct sluice_options o = {.name = "sluice " SLUICE_VERSION};
    if (t->auth_token_file) {
        if (!read_secret(t->auth_token_file, secret, sizeof secret))
            return cli_fail(CLI_USAGE, "--auth-token-file: cannot read a secret from %s",
                            t->auth_token_file);
        o.token = secret;
    }
    o.connect_ms = t->timeout_ms > 0 && t->timeout_ms < INT32_MAX ? (int)t->timeout_ms : INT32_MAX;
    int err = sluice_connect(out, t->connect, &o, why, sizeof why);
    if (err < 0)
        return cli_fail(CLI_UNREACHABLE, "%s: %s", t->connect, why[0] ? why : sluice_strerror(err));
    return CLI_OK;
}
