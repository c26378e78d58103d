#include "calibration/samples.h"

#include "core/hash.h"
#include "core/mem.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_SAMPLES = 1 << 20 };

struct line_reader {
    const char *name;
    int32_t vocab_size, max_len;
    struct err_msg *why;
};

/* Ids of an array behind those that s has already. */
static int read_tokens(const struct line_reader *r, struct sample *s, const json_t *ids, size_t n,
                       const char *field)
{
    int32_t *to;
    s->tokens = mem_realloc(s->tokens, ((size_t)s->n_tokens + n) * sizeof *s->tokens);
    to = s->tokens + s->n_tokens;
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(ids, i);
        if (!json_is_integer(id)) {
            return err_set(r->why, ERR_FORMAT, "%s:%d: %s[%zu] is not an integer", r->name, s->line,
                           field, i);
        }
        if (json_integer_value(id) < 0 || json_integer_value(id) >= r->vocab_size) {
            return err_set(r->why, ERR_FORMAT,
                           "%s:%d: %s[%zu] = %" JSON_INTEGER_FORMAT " is outside 0 to %d", r->name,
                           s->line, field, i, json_integer_value(id), r->vocab_size - 1);
        }
        to[i] = (int32_t)json_integer_value(id);
    }
    return 0;
}

static int read_prompt(const struct line_reader *r, struct sample *s, const json_t *ids,
                       const char *field)
{
    const size_t all = json_array_size(ids);
    if (all < 1 || all > INT32_MAX)
        return err_set(r->why, ERR_FORMAT, "%s:%d: %s has %zu tokens", r->name, s->line, field,
                       all);
    const bool cut = r->max_len > 0 && all > (size_t)r->max_len;
    const size_t n = cut ? (size_t)r->max_len : all;
    TRY(read_tokens(r, s, ids, n, field));
    s->n_tokens = (int32_t)n;
    return cut ? 1 : 0;
}

static int read_answer(const struct line_reader *r, struct sample *s, const json_t *ids)
{
    const size_t all = json_array_size(ids); /* 0 for what is no array */
    const size_t n = all < SAMPLES_MAX_ANSWER ? all : SAMPLES_MAX_ANSWER;
    if (n == 0)
        return 0;
    TRY(read_tokens(r, s, ids, n, "expected"));
    s->n_answer = (int32_t)n;
    return 0;
}

static int read_object(const struct line_reader *r, struct sample *s, const json_t *obj)
{
    const char *field = json_object_get(obj, "prompt") ? "prompt" : "tokens";
    const json_t *ids = json_object_get(obj, field), *task = json_object_get(obj, "task");
    if (!json_is_array(ids)) {
        return err_set(r->why, ERR_FORMAT, "%s:%d: no array `prompt` or `tokens`", r->name,
                       s->line);
    }
    if (task && !json_is_string(task))
        return err_set(r->why, ERR_FORMAT, "%s:%d: task is not a string", r->name, s->line);
    if (task)
        (void)snprintf(s->task, sizeof s->task, "%s", json_string_value(task));
    const int cut = read_prompt(r, s, ids, field);
    return cut ? cut : read_answer(r, s, json_object_get(obj, "expected"));
}

static int read_line(const struct line_reader *r, struct sample *s, const char *text, size_t len)
{
    json_error_t e;
    json_t *obj = json_loadb(text, len, JSON_REJECT_DUPLICATES, &e);
    if (!obj) {
        return err_set(r->why, ERR_FORMAT, "%s:%d: column %d: %s", r->name, s->line, e.column,
                       e.text);
    }
    int err = read_object(r, s, obj);
    json_decref(obj);
    return err < 0 ? err : 0;
}

/* Lines until the end; *text is getline's buffer. */
static int read_lines(struct samples *out, const struct line_reader *r, FILE *in, char **text)
{
    size_t room = 0;
    ssize_t len;
    errno = 0;
    for (int32_t line = 1; (len = getline(text, &room, in)) >= 0; line++) {
        if ((*text)[strspn(*text, " \t\r\n")] == '\0')
            continue;
        if (out->n == MAX_SAMPLES)
            return err_set(r->why, ERR_FORMAT, "%s: more than %d samples", r->name, MAX_SAMPLES);
        if ((out->n & (out->n - 1)) == 0) { /* room doubles at powers of two */
            out->items =
                mem_realloc(out->items, (out->n ? 2 * (size_t)out->n : 1) * sizeof *out->items);
        }
        struct sample *s = &out->items[out->n++];
        *s = (struct sample){.line = line};
        TRY(read_line(r, s, *text, (size_t)len));
    }
    if (ferror(in)) {
        return err_set(r->why, errno ? -errno : -EIO, "%s: %s", r->name,
                       err_str(errno ? -errno : -EIO));
    }
    if (out->n == 0)
        return err_set(r->why, ERR_FORMAT, "%s: no samples", r->name);
    return 0;
}

int samples_read(struct samples *out, FILE *in, const char *name, int32_t vocab_size,
                 int32_t max_len, struct err_msg *why)
{
    struct line_reader r = {name, vocab_size, max_len, why};
    char *text = NULL;
    *out = (struct samples){0};
    int err = read_lines(out, &r, in, &text);
    free(text);
    if (err < 0)
        samples_free(out);
    return err;
}

int samples_load(struct samples *out, const char *path, int32_t vocab_size, int32_t max_len,
                 struct err_msg *why)
{
    FILE *in = fopen(path, "re");
    if (!in)
        return err_set(why, -errno, "%s: %s", path, err_str(-errno));
    int err = samples_read(out, in, path, vocab_size, max_len, why);
    (void)fclose(in);
    return err;
}

void samples_free(struct samples *s)
{
    for (int32_t i = 0; i < s->n; i++)
        mem_free(s->items[i].tokens);
    mem_free(s->items);
    *s = (struct samples){0};
}

int samples_check(const struct samples *s, const char *name, int32_t vocab_size,
                  struct err_msg *why)
{
    for (int32_t i = 0; i < s->n; i++) {
        const struct sample *x = &s->items[i];
        for (int32_t j = 0; j < x->n_tokens + x->n_answer; j++) {
            if (x->tokens[j] < 0 || x->tokens[j] >= vocab_size) {
                return err_set(why, ERR_FORMAT, "%s:%d: token %d = %d is outside 0 to %d", name,
                               x->line, j, x->tokens[j], vocab_size - 1);
            }
        }
    }
    return 0;
}

/* Keeps `want` of the n entries of list, evenly spread, the first among them. */
static int32_t spread(int32_t *list, int32_t n, int32_t want)
{
    if (want >= n)
        return n;
    for (int32_t i = 0; i < want; i++)
        list[i] = list[(int64_t)i * n / want];
    return want;
}

void samples_split(struct samples_split *out, const struct samples *s, const char *task_prefix,
                   int32_t limit, int32_t n_held_out)
{
    int32_t n = s->n, tail = n_held_out < n ? n - n_held_out : 0;
    *out = (struct samples_split){.calibrate = mem_zalloc((size_t)n, sizeof(int32_t)),
                                  .held_out = mem_zalloc((size_t)n, sizeof(int32_t))};
    for (int32_t i = 0; i < n; i++) {
        bool mine = task_prefix ? strncmp(s->items[i].task, task_prefix, strlen(task_prefix)) == 0
                                : i < tail;
        if (mine)
            out->calibrate[out->n_calibrate++] = i;
        else
            out->held_out[out->n_held_out++] = i;
    }
    if (limit > 0)
        out->n_calibrate = spread(out->calibrate, out->n_calibrate, limit);
    out->n_held_out = spread(out->held_out, out->n_held_out, n_held_out);
}

void samples_split_free(struct samples_split *s)
{
    mem_free(s->calibrate);
    mem_free(s->held_out);
    *s = (struct samples_split){0};
}

uint64_t samples_hash(const struct samples *s, const int32_t *chosen, int32_t n)
{
    uint64_t h = 0;
    for (int32_t i = 0; i < n; i++) {
        const struct sample *x = &s->items[chosen[i]];
        h = hash_bytes(x->tokens, (size_t)x->n_tokens * sizeof *x->tokens, h);
    }
    return h;
}

uint64_t samples_hash_answers(const struct samples *s, const int32_t *chosen, int32_t n)
{
    uint64_t h = 0;
    for (int32_t i = 0; i < n; i++) {
        const struct sample *x = &s->items[chosen[i]];
        h = hash_pair(h, (uint64_t)x->n_answer);
        h = hash_bytes(x->tokens + x->n_tokens, (size_t)x->n_answer * sizeof *x->tokens, h);
    }
    return h;
}

int32_t samples_longest_answered(const struct samples *s, const int32_t *chosen, int32_t n)
{
    int32_t longest = 0;
    for (int32_t i = 0; i < n; i++) {
        const struct sample *x = &s->items[chosen[i]];
        if (x->n_tokens + x->n_answer > longest)
            longest = x->n_tokens + x->n_answer;
    }
    return longest;
}

int32_t samples_longest(const struct samples *s, const int32_t *chosen, int32_t n)
{
    int32_t longest = 0;
    for (int32_t i = 0; i < n; i++) {
        if (s->items[chosen[i]].n_tokens > longest)
            longest = s->items[chosen[i]].n_tokens;
    }
    return longest;
}

int64_t samples_tokens(const struct samples *s, const int32_t *chosen, int32_t n)
{
    int64_t sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum += s->items[chosen[i]].n_tokens;
    return sum;
}
