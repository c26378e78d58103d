/* One table of options yields defaults, --flags, the config file, --help and the README's
 * reference. A flag is --name VALUE or --name=VALUE (booleans also take no value; --no-name turns
 * one off). A config file has one `name = value` a line; # starts a comment. Later sources win:
 * defaults, file (--config FILE), command line. */
#ifndef CORE_CONF_H
#define CORE_CONF_H

#include "core/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum conf_type {
    CONF_BOOL,  /* bool */
    CONF_INT,   /* int64_t */
    CONF_BYTES, /* int64_t; 512, 64k, 16M, 2G (binary units) */
    CONF_FLOAT, /* double */
    CONF_TEXT,  /* char *, owned by the object, NULL when unset */
    CONF_ENUM,  /* int: index into choices */
    CONF_MS     /* int64_t milliseconds; 250, 250ms, 10s, 5m */
};

struct conf_opt {
    const char *name;
    enum conf_type type;
    size_t offset;          /* of the field in the object */
    const char *def;        /* default as text, NULL for unset text */
    double min, max;        /* for numbers; both 0 means no bound */
    const char *choices[8]; /* CONF_ENUM: NULL-terminated */
    const char *arg;        /* placeholder in --help: FILE, N, MS; NULL for booleans */
    const char *help;       /* one sentence */
};

/* What a program is, for --help. */
struct conf_program {
    const char *usage;   /* "sluiced --model DIR [options]" */
    const char *summary; /* one or two sentences */
    const struct conf_opt *opts;
    size_t n_opts;
};

/* Sets every field to its default. Call once on zeroed memory, before the others. */
void conf_defaults(const struct conf_program *prog, void *obj);
/* One value by name; errors name the option, the value and what is allowed. */
MUST_CHECK int conf_set(const struct conf_program *prog, void *obj, const char *name,
                        const char *value, struct err_msg *why);
MUST_CHECK int conf_file(const struct conf_program *prog, void *obj, const char *path,
                         struct err_msg *why);
/* Parses argv[1..]; --config FILE is read first. Positional words go to rest (up to max_rest,
 * counted in n_rest; rest may be NULL when none are allowed). */
MUST_CHECK int conf_args(const struct conf_program *prog, void *obj, int argc, char **argv,
                         const char **rest, int max_rest, int *n_rest, struct err_msg *why);
bool conf_wants_help(int argc, char **argv); /* -h or --help anywhere */
void conf_help(const struct conf_program *prog, FILE *to);
void conf_markdown(const struct conf_program *prog, FILE *to); /* the README's table */
void conf_free(const struct conf_program *prog, void *obj);    /* releases text fields */

#endif
