#include "cmd/cli_parse.h"

#include "core/mem.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char separators[] = ", \t\r\n[]";

static void push(struct cli_tokens *t, int32_t *cap, int32_t id)
{
    if (t->n == *cap) {
        *cap = *cap ? *cap * 2 : 1024;
        t->ids = mem_realloc(t->ids, (size_t)*cap * sizeof *t->ids);
    }
    t->ids[t->n++] = id;
}

static int plain_ids(struct cli_tokens *out, const char *text, struct err_msg *why)
{
    int32_t cap = 0;
    for (const char *at = text + strspn(text, separators); *at; at += strspn(at, separators)) {
        char *end;
        errno = 0;
        long v = strtol(at, &end, 10);
        if (end == at || (*end && !strchr(separators, *end)))
            return err_set(why, ERR_INVALID, "'%.16s' (number %d) is not a token id", at,
                           out->n + 1);
        if (errno || v < INT32_MIN || v > INT32_MAX)
            return err_set(why, ERR_INVALID, "token id %d does not fit 32 bits", out->n + 1);
        push(out, &cap, (int32_t)v);
        at = end;
    }
    return 0;
}

static int json_ids(struct cli_tokens *out, const char *line, struct err_msg *why)
{
    json_error_t at;
    int32_t cap = 0;
    int err = 0;
    json_t *o = json_loads(line, 0, &at);
    if (!o)
        return err_set(why, ERR_FORMAT, "%.150s", at.text);
    const json_t *ids = json_object_get(o, "prompt");
    if (!ids)
        ids = json_object_get(o, "tokens");
    if (!json_is_array(ids))
        err = err_set(why, ERR_FORMAT, "neither \"prompt\" nor \"tokens\" is an array");
    for (size_t i = 0; err == 0 && i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        json_int_t v = json_integer_value(id);
        if (!json_is_integer(id) || v < INT32_MIN || v > INT32_MAX)
            err = err_set(why, ERR_FORMAT, "token %zu is not a 32-bit whole number", i + 1);
        else
            push(out, &cap, (int32_t)v);
    }
    json_decref(o);
    return err;
}

static char *read_all(FILE *f)
{
    size_t n = 0, cap = 1 << 16;
    char *text = mem_alloc(cap);
    for (size_t got; (got = fread(text + n, 1, cap - n - 1, f)) > 0;) {
        n += got;
        if (n + 1 == cap)
            text = mem_realloc(text, cap *= 2);
    }
    text[n] = '\0';
    return text;
}

static int file_ids(struct cli_tokens *out, char *text, int64_t line, struct err_msg *why)
{
    if (text[strspn(text, " \t\r\n")] != '{')
        return plain_ids(out, text, why);
    char *at = text;
    for (int64_t i = 1; i < line; i++) {
        at = strchr(at, '\n');
        if (!at || !at[1])
            return err_set(why, ERR_INVALID, "there is no line %lld", (long long)line);
        at++;
    }
    at[strcspn(at, "\n")] = '\0';
    return json_ids(out, at, why);
}

int cli_parse_tokens(struct cli_tokens *out, const char *text, int64_t line, struct err_msg *why)
{
    *out = (struct cli_tokens){NULL, 0};
    struct err_msg inner = {""};
    int err;
    if (text[0] != '@') {
        err = plain_ids(out, text, &inner);
    } else {
        bool in = strcmp(text, "@-") == 0;
        FILE *f = in ? stdin : fopen(text + 1, "re");
        if (!f)
            return err_set(why, -errno, "cannot open %s: %s", text + 1, err_str(-errno));
        char *content = read_all(f);
        err = file_ids(out, content, line, &inner);
        mem_free(content);
        if (!in)
            (void)fclose(f);
    }
    if (err < 0) {
        mem_free(out->ids);
        *out = (struct cli_tokens){NULL, 0};
        return err_set(why, err, "%s%.300s", text[0] == '@' ? "in the file: " : "", inner.text);
    }
    return 0;
}

int cli_parse_ids(int32_t *out, int max, const char *text, struct err_msg *why)
{
    struct cli_tokens t = {NULL, 0};
    int n = 0;
    if (!text)
        return 0;
    int err = plain_ids(&t, text, why);
    if (err == 0 && t.n > max)
        err = err_set(why, ERR_INVALID, "%d ids, at most %d are allowed", t.n, max);
    for (; err == 0 && n < t.n; n++)
        out[n] = t.ids[n];
    mem_free(t.ids);
    return err < 0 ? err : n;
}

static bool parse_real(const char *text, double *out)
{
    char *end;
    *out = strtod(text, &end);
    return end != text && *end == '\0' && !isnan(*out);
}

/* The part from "+" on, which may be missing: sets decode_density. */
static int parse_decode(struct sluice_request *r, const char *text, struct err_msg *why)
{
    double v;
    r->decode_density = 0;
    if (!text)
        return 0;
    if (strncmp(text, "+decode~", 8) != 0 || !parse_real(text + 8, &v) || !(v > 0) || v > 1)
        return err_set(why, ERR_INVALID, "'%.60s' is not +decode~D (density, above 0, at most 1)",
                       text);
    r->decode_density = v;
    return 0;
}

static int parse_mode(struct sluice_request *r, const char *text, struct err_msg *why)
{
    double v;
    r->k = 0;
    r->ln_lambda = r->density = 0;
    if (strcmp(text, "auto") == 0) {
        r->sparse = SLUICE_AUTO;
    } else if (strcmp(text, "dense") == 0) {
        r->sparse = SLUICE_DENSE;
    } else if ((strncmp(text, "k=", 2) == 0 || strncmp(text, "abs:", 4) == 0) &&
               parse_real(text + (*text == 'k' ? 2 : 4), &v) && v == floor(v) && v > 0 &&
               v <= INT32_MAX) {
        r->sparse = SLUICE_ABS;
        r->k = (int32_t)v;
    } else if ((strncmp(text, "abs~", 4) == 0 || strncmp(text, "rel~", 4) == 0) &&
               parse_real(text + 4, &v) && v > 0 && v <= 1) {
        r->sparse = *text == 'a' ? SLUICE_ABS : SLUICE_REL;
        r->density = v;
    } else if (strncmp(text, "rel=", 4) == 0 && parse_real(text + 4, &v) && v > 0 &&
               log(v) <= SLUICE_REL_LN_MAX && fabs(log(v)) > 0) {
        r->sparse = SLUICE_REL;
        r->ln_lambda = log(v);
    } else if (strncmp(text, "rel:", 4) == 0 && parse_real(text + 4, &v) && fabs(v) > 0 &&
               v >= -1000 && v <= SLUICE_REL_LN_MAX) {
        r->sparse = SLUICE_REL;
        r->ln_lambda = v;
    } else {
        return err_set(why, ERR_INVALID,
                       "'%s' is not dense, auto, k=K or abs:K (whole, above 0), rel=LAMBDA (above "
                       "0, not 1) or rel:LN (its logarithm, at most 30), or abs~D or rel~D "
                       "(density, at most 1)",
                       text);
    }
    return 0;
}

/* Cuts what is from the "+" on off word, and reads it. */
static int cut_decode(struct sluice_request *r, char *word, struct err_msg *why)
{
    char *plus = strstr(word, "+decode");
    TRY(parse_decode(r, plus, why));
    if (plus)
        *plus = '\0';
    return 0;
}

int cli_parse_sparse(struct sluice_request *r, const char *text, struct err_msg *why)
{
    char word[64];
    (void)snprintf(word, sizeof word, "%s", text);
    TRY(cut_decode(r, word, why));
    return parse_mode(r, word, why);
}

int cli_parse_policy(struct sluice_request *r, const char **address, const char *text,
                     struct err_msg *why)
{
    char word[64];
    const char *at = strchr(text, '@');
    *address = at ? at + 1 : NULL;
    if (at && !at[1])
        return err_set(why, ERR_INVALID, "'%.100s' names no daemon after @", text);
    (void)snprintf(word, sizeof word, "%.*s", at ? (int)(at - text) : (int)strlen(text), text);
    TRY(cut_decode(r, word, why));
    char *rows = strchr(word, '/');
    r->gate_rows = 0;
    if (rows) {
        if (strcmp(rows, "/64") != 0 && strcmp(rows, "/128") != 0)
            return err_set(why, ERR_INVALID, "'%s' is not a policy before /64 or /128", word);
        r->gate_rows = rows[1] == '6' ? 64 : 128;
        *rows = '\0';
    }
    return parse_mode(r, word, why);
}

int cli_parse_lengths(int32_t *out, int max, const char *text, struct err_msg *why)
{
    char *copy = mem_strdup(text), *save = NULL;
    int n = 0, err = 0;
    for (char *w = strtok_r(copy, ", ", &save); w && err == 0; w = strtok_r(NULL, ", ", &save)) {
        char *end;
        errno = 0;
        long v = strtol(w, &end, 10);
        if (end != w && (*end == 'k' || *end == 'K')) {
            v = v < 1 << 20 ? v * 1024 : 0;
            end++;
        }
        if (end == w || *end || errno || v < 1 || v > INT32_MAX)
            err = err_set(why, ERR_INVALID, "'%.60s' is not a length", w);
        else if (n == max)
            err = err_set(why, ERR_INVALID, "at most %d lengths", max);
        else
            out[n++] = (int32_t)v;
    }
    mem_free(copy);
    return err < 0 ? err : n;
}

int cli_parse_goodput(struct report_slo *out, const char *text, struct err_msg *why)
{
    *out = (struct report_slo){false, HUGE_VAL, HUGE_VAL, HUGE_VAL};
    char *copy = mem_strdup(text ? text : ""), *save = NULL;
    int err = 0;
    for (char *w = strtok_r(copy, ", ", &save); w && err == 0; w = strtok_r(NULL, ", ", &save)) {
        double *field = strncmp(w, "ttft:", 5) == 0   ? &out->ttft_ms
                        : strncmp(w, "tpot:", 5) == 0 ? &out->tpot_ms
                        : strncmp(w, "e2el:", 5) == 0 ? &out->e2el_ms
                                                      : NULL;
        if (!field || !parse_real(w + 5, field) || *field < 0)
            err = err_set(why, ERR_INVALID, "'%s' is not ttft:MS, tpot:MS or e2el:MS", w);
        out->any = true;
    }
    mem_free(copy);
    return err;
}

/* "A:B:C", each from 1 to 2^24. */
static bool parse_class(struct load_class *out, const char *text)
{
    int32_t *fields[] = {&out->input_len, &out->output_len, &out->count};
    for (int i = 0; i < 3; i++) {
        char *end;
        errno = 0;
        long v = strtol(text, &end, 10);
        if (end == text || errno || v < 1 || v > 1 << 24 || *end != (i < 2 ? ':' : '\0'))
            return false;
        *fields[i] = (int32_t)v;
        text = end + 1;
    }
    return true;
}

int cli_parse_mix(struct load_class *out, int max, const char *text, struct err_msg *why)
{
    char *copy = mem_strdup(text), *save = NULL;
    int64_t total = 0;
    int n = 0, err = 0;
    for (char *w = strtok_r(copy, ", ", &save); w && err == 0; w = strtok_r(NULL, ", ", &save)) {
        struct load_class c;
        if (!parse_class(&c, w))
            err = err_set(why, ERR_INVALID, "'%.60s' is not PROMPT:OUTPUT:COUNT, whole numbers", w);
        else if (n == max)
            err = err_set(why, ERR_INVALID, "at most %d kinds of requests", max);
        else if ((total += c.count) > 1 << 24)
            err = err_set(why, ERR_INVALID, "too many requests");
        else
            out[n++] = c;
    }
    if (err == 0 && n == 0)
        err = err_set(why, ERR_INVALID, "no requests");
    mem_free(copy);
    return err < 0 ? err : n;
}

int cli_parse_percentiles(double *out, int max, const char *text, struct err_msg *why)
{
    char *copy = mem_strdup(text), *save = NULL;
    int n = 0, err = 0;
    for (char *w = strtok_r(copy, ", ", &save); w && err == 0; w = strtok_r(NULL, ", ", &save)) {
        double v;
        if (!parse_real(w, &v) || v < 0 || v > 100)
            err = err_set(why, ERR_INVALID, "'%s' is not a percentile (0 to 100)", w);
        else if (n == max)
            err = err_set(why, ERR_INVALID, "at most %d percentiles", max);
        else
            out[n++] = v;
    }
    mem_free(copy);
    return err < 0 ? err : n;
}
