#include "core/conf.h"

#include "core/mem.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static void *field(const struct conf_opt *o, void *obj)
{
    return (char *)obj + o->offset;
}

static const struct conf_opt *find(const struct conf_program *prog, const char *name, size_t len)
{
    for (size_t i = 0; i < prog->n_opts; i++) {
        if (strlen(prog->opts[i].name) == len && strncmp(prog->opts[i].name, name, len) == 0)
            return &prog->opts[i];
    }
    return NULL;
}

static int parse_bool(const char *text, bool *out)
{
    static const char *const yes[] = {"true", "yes", "on", "1"};
    static const char *const no[] = {"false", "no", "off", "0"};
    for (int i = 0; i < 4; i++) {
        if (strcmp(text, yes[i]) == 0) {
            *out = true;
            return 0;
        }
        if (strcmp(text, no[i]) == 0) {
            *out = false;
            return 0;
        }
    }
    return ERR_CONFIG;
}

struct unit {
    const char *suffix;
    int64_t factor;
};

/* A whole number with an optional unit from a NULL-terminated list. */
static int parse_int(const char *text, const struct unit *units, int64_t *out)
{
    char *end;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (errno || end == text)
        return ERR_CONFIG;
    int64_t factor = *end ? 0 : 1;
    for (const struct unit *u = units; *end && u && u->suffix; u++) {
        if (strcasecmp(end, u->suffix) == 0)
            factor = u->factor;
    }
    if (factor == 0 || __builtin_mul_overflow((int64_t)v, factor, out))
        return ERR_CONFIG;
    return 0;
}

static int bad_value(const struct conf_opt *o, const char *value, const char *want,
                     struct err_msg *why)
{
    return err_set(why, ERR_CONFIG, "--%s: '%s' is not %s", o->name, value, want);
}

static int check_range(const struct conf_opt *o, double v, const char *value, struct err_msg *why)
{
    if ((o->min < o->max) && !(v >= o->min && v <= o->max))
        return err_set(why, ERR_CONFIG, "--%s: %s is outside %.15g to %.15g", o->name, value,
                       o->min, o->max);
    return 0;
}

static int set_number(const struct conf_opt *o, void *obj, const char *value, struct err_msg *why)
{
    static const struct unit bytes[] = {
        {"k", 1LL << 10}, {"m", 1LL << 20}, {"g", 1LL << 30}, {"t", 1LL << 40}, {NULL, 0}};
    static const struct unit times[] = {{"ms", 1}, {"s", 1000}, {"m", 60000}, {NULL, 0}};
    int64_t v;

    if (o->type == CONF_FLOAT) {
        char *end;
        errno = 0;
        double d = strtod(value, &end);
        if (end == value || *end || d != d)
            return bad_value(o, value, "a number", why);
        TRY(check_range(o, d, value, why));
        *(double *)field(o, obj) = d;
        return 0;
    }
    const struct unit *units = o->type == CONF_BYTES ? bytes : o->type == CONF_MS ? times : NULL;
    if (parse_int(value, units, &v) < 0)
        return bad_value(o, value,
                         o->type == CONF_BYTES ? "a size like 512M or 4G"
                         : o->type == CONF_MS  ? "a time like 250ms, 10s or 5m"
                                               : "a whole number",
                         why);
    TRY(check_range(o, (double)v, value, why));
    *(int64_t *)field(o, obj) = v;
    return 0;
}

static int set_enum(const struct conf_opt *o, void *obj, const char *value, struct err_msg *why)
{
    char all[128] = "";
    for (int i = 0; o->choices[i]; i++) {
        if (strcmp(o->choices[i], value) == 0) {
            *(int *)field(o, obj) = i;
            return 0;
        }
        size_t n = strlen(all);
        (void)snprintf(all + n, sizeof all - n, "%s%s", i ? ", " : "", o->choices[i]);
    }
    return err_set(why, ERR_CONFIG, "--%s: '%s' is not one of %s", o->name, value, all);
}

static int set_opt(const struct conf_opt *o, void *obj, const char *value, struct err_msg *why)
{
    switch (o->type) {
    case CONF_BOOL:
        if (parse_bool(value, field(o, obj)) < 0)
            return bad_value(o, value, "true or false", why);
        return 0;
    case CONF_TEXT: {
        char **p = field(o, obj);
        mem_free(*p);
        *p = mem_strdup(value);
        return 0;
    }
    case CONF_ENUM: return set_enum(o, obj, value, why);
    case CONF_INT:
    case CONF_BYTES:
    case CONF_FLOAT:
    case CONF_MS: break;
    }
    return set_number(o, obj, value, why);
}

void conf_defaults(const struct conf_program *prog, void *obj)
{
    for (size_t i = 0; i < prog->n_opts; i++) {
        const struct conf_opt *o = &prog->opts[i];
        if (o->def) {
            struct err_msg why = {""};
            int err = set_opt(o, obj, o->def, &why);
            ASSERT(err == 0);
        }
    }
}

int conf_set(const struct conf_program *prog, void *obj, const char *name, const char *value,
             struct err_msg *why)
{
    const struct conf_opt *o = find(prog, name, strlen(name));
    if (!o)
        return err_set(why, ERR_CONFIG, "unknown option '%s'", name);
    return set_opt(o, obj, value, why);
}

static char *trim(char *s)
{
    while (isspace((unsigned char)*s))
        s++;
    size_t n = strlen(s);
    while (n > 0 && isspace((unsigned char)s[n - 1]))
        s[--n] = '\0';
    return s;
}

static int file_line(const struct conf_program *prog, void *obj, char *line, struct err_msg *why)
{
    char *hash = strchr(line, '#');
    if (hash)
        *hash = '\0';
    char *name = trim(line);
    if (!*name)
        return 0;
    char *eq = strchr(name, '=');
    if (!eq)
        return err_set(why, ERR_CONFIG, "no '=' after '%s'", name);
    *eq = '\0';
    return conf_set(prog, obj, trim(name), trim(eq + 1), why);
}

int conf_file(const struct conf_program *prog, void *obj, const char *path, struct err_msg *why)
{
    FILE *f = fopen(path, "re");
    if (!f)
        return err_set(why, -errno, "--config: cannot open %s: %s", path, err_str(-errno));
    char *line = NULL;
    size_t cap = 0;
    int err = 0;
    for (int number = 1; err == 0 && getline(&line, &cap, f) >= 0; number++) {
        struct err_msg inner = {""};
        err = file_line(prog, obj, line, &inner);
        if (err < 0)
            (void)err_set(why, err, "%s:%d: %.200s", path, number, inner.text);
    }
    free(line);
    (void)fclose(f);
    return err;
}

/* One --name at argv[*i]; moves *i over a separate value. */
static int flag(const struct conf_program *prog, void *obj, int argc, char **argv, int *i,
                struct err_msg *why)
{
    const char *name = argv[*i] + 2;
    const char *eq = strchr(name, '=');
    size_t len = eq ? (size_t)(eq - name) : strlen(name);
    const struct conf_opt *o = find(prog, name, len);

    if (len == 6 && strncmp(name, "config", 6) == 0 && !o) { /* read in the first pass */
        if (!eq)
            (*i)++;
        return 0;
    }
    if (!o && !eq && strncmp(name, "no-", 3) == 0) {
        o = find(prog, name + 3, len - 3);
        if (o && o->type == CONF_BOOL)
            return set_opt(o, obj, "false", why);
        o = NULL;
    }
    if (!o)
        return err_set(why, ERR_CONFIG, "unknown option '%s' (see --help)", argv[*i]);
    if (eq)
        return set_opt(o, obj, eq + 1, why);
    if (o->type == CONF_BOOL)
        return set_opt(o, obj, "true", why);
    if (*i + 1 >= argc)
        return err_set(why, ERR_CONFIG, "--%s needs a value", o->name);
    (*i)++;
    return set_opt(o, obj, argv[*i], why);
}

static int config_first(const struct conf_program *prog, void *obj, int argc, char **argv,
                        struct err_msg *why)
{
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "--config=", 9) == 0)
            TRY(conf_file(prog, obj, argv[i] + 9, why));
        if (strcmp(argv[i], "--config") == 0) {
            if (i + 1 >= argc)
                return err_set(why, ERR_CONFIG, "--config needs a file");
            TRY(conf_file(prog, obj, argv[++i], why));
        }
    }
    return 0;
}

// argc and argv are one argument, rest and its sizes another.
// NOLINTNEXTLINE(readability-function-size)
int conf_args(const struct conf_program *prog, void *obj, int argc, char **argv, const char **rest,
              int max_rest, int *n_rest, struct err_msg *why)
{
    int n = 0;
    if (!find(prog, "config", 6))
        TRY(config_first(prog, obj, argc, argv, why));
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "--", 2) == 0 && argv[i][2]) {
            TRY(flag(prog, obj, argc, argv, &i, why));
            continue;
        }
        if (!rest || n >= max_rest)
            return err_set(why, ERR_CONFIG, "unexpected word '%s' (see --help)", argv[i]);
        rest[n++] = argv[i];
    }
    if (n_rest)
        *n_rest = n;
    return 0;
}

bool conf_wants_help(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "-h") == 0 || strcmp(argv[i], "--help") == 0)
            return true;
    }
    return false;
}

static void choices_text(const struct conf_opt *o, char *out, size_t cap)
{
    size_t n = 0;
    out[0] = '\0';
    for (int i = 0; o->choices[i] && n < cap; i++)
        n += (size_t)snprintf(out + n, cap - n, "%s%s", i ? "|" : "", o->choices[i]);
}

/* "--name ARG" as a person types it. */
static void flag_text(const struct conf_opt *o, char *out, size_t cap)
{
    char choices[96];
    choices_text(o, choices, sizeof choices);
    const char *arg = o->type == CONF_ENUM ? choices : o->arg;
    if (o->type == CONF_BOOL)
        (void)snprintf(out, cap, "--%s", o->name);
    else
        (void)snprintf(out, cap, "--%s %s", o->name, arg ? arg : "VALUE");
}

void conf_help(const struct conf_program *prog, FILE *to)
{
    (void)fprintf(to, "usage: %s\n\n%s\n\noptions:\n", prog->usage, prog->summary);
    for (size_t i = 0; i < prog->n_opts; i++) {
        const struct conf_opt *o = &prog->opts[i];
        char left[160];
        flag_text(o, left, sizeof left);
        (void)fprintf(to, "  %-30s%s%s", left,
                      strlen(left) > 29 ? "\n                                " : " ", o->help);
        if (o->def && o->type != CONF_BOOL)
            (void)fprintf(to, " [%s]", o->def);
        else if (o->def && strcmp(o->def, "true") == 0)
            (void)fprintf(to, " [on; --no-%s turns it off]", o->name);
        (void)fputc('\n', to);
    }
    if (!find(prog, "config", 6))
        (void)fprintf(to, "  %-30s %s\n", "--config FILE",
                      "read options from FILE, one `name = value` a line");
    (void)fprintf(to, "  %-30s %s\n", "-h, --help", "print this");
}

void conf_markdown(const struct conf_program *prog, FILE *to)
{
    (void)fprintf(to, "| option | default | meaning |\n|---|---|---|\n");
    for (size_t i = 0; i < prog->n_opts; i++) {
        const struct conf_opt *o = &prog->opts[i];
        char left[160];
        flag_text(o, left, sizeof left);
        (void)fputs("| `", to);
        for (const char *c = left; *c; c++)
            (void)fputs(*c == '|' ? "\\|" : (const char[]){*c, '\0'}, to);
        (void)fprintf(to, "` | %s | %s |\n", o->def ? o->def : "", o->help);
    }
}

void conf_free(const struct conf_program *prog, void *obj)
{
    for (size_t i = 0; i < prog->n_opts; i++) {
        if (prog->opts[i].type == CONF_TEXT) {
            char **p = field(&prog->opts[i], obj);
            mem_free(*p);
            *p = NULL;
        }
    }
}
