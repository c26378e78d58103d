#include "eval/vocab.h"

#include <errno.h>
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

enum { MAX_VOCAB = 1 << 20 };

static const char *const mark_names[N_MARKS] = {
#define XX(name) #name,
    RULER_MARKS(XX)
#undef XX
};

static const char *const task_names[RULER_N_TASKS] = {
#define XX(name, key) key,
    RULER_TASKS(XX)
#undef XX
};

/* Ranges, their keys, and the least that the tasks need of each: ten words are common to cwe. */
static const struct {
    const char *name;
    size_t offset;
    int32_t least;
} ranges[] = {
    {"relation", offsetof(struct ruler_vocab, relation), 2},
    {"filler_F", offsetof(struct ruler_vocab, filler), 2},
    {"key_W", offsetof(struct ruler_vocab, key), 16},
    {"value_D", offsetof(struct ruler_vocab, value), 2},
};
enum { N_RANGES = sizeof ranges / sizeof ranges[0] };

const char *ruler_task_name(enum ruler_task task)
{
    return task_names[task];
}

int ruler_task_find(const char *name)
{
    for (int t = 0; t < RULER_N_TASKS; t++) {
        if (strcmp(name, task_names[t]) == 0)
            return t;
    }
    return -1;
}

static struct ruler_range *range_of(struct ruler_vocab *v, int i)
{
    return (struct ruler_range *)((char *)v + ranges[i].offset);
}

/* A token id below v->size. */
static bool read_id(int32_t *out, const struct ruler_vocab *v, const json_t *id)
{
    if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= v->size)
        return false;
    *out = (int32_t)json_integer_value(id);
    return true;
}

static int read_marks(struct ruler_vocab *v, const json_t *special, struct err_msg *why)
{
    if (!json_is_object(special))
        return err_set(why, ERR_FORMAT, "special is not an object");
    for (int m = 0; m < N_MARKS; m++) {
        if (!read_id(&v->marks[m], v, json_object_get(special, mark_names[m])))
            return err_set(why, ERR_FORMAT, "special.%s is not a token id below vocab_size, %d",
                           mark_names[m], v->size);
        for (int k = 0; k < m; k++) {
            if (v->marks[k] == v->marks[m])
                return err_set(why, ERR_FORMAT, "special.%s is the same token as special.%s, %d",
                               mark_names[m], mark_names[k], v->marks[m]);
        }
    }
    return 0;
}

static bool overlap(const struct ruler_range *a, const struct ruler_range *b)
{
    return a->first < b->first + b->n && b->first < a->first + a->n;
}

static int read_range(struct ruler_vocab *v, int i, const json_t *o, struct err_msg *why)
{
    const char *name = ranges[i].name;
    const json_t *pair = json_object_get(o, name);
    struct ruler_range *r = range_of(v, i);
    int32_t last;
    if (json_array_size(pair) != 2 || !read_id(&r->first, v, json_array_get(pair, 0)) ||
        !read_id(&last, v, json_array_get(pair, 1)) || last < r->first)
        return err_set(why, ERR_FORMAT,
                       "ranges.%s is not [first, last], two token ids below vocab_size, %d", name,
                       v->size);
    r->n = last - r->first + 1;
    if (r->n < ranges[i].least)
        return err_set(why, ERR_FORMAT, "ranges.%s has %d tokens, at least %d are needed", name,
                       r->n, ranges[i].least);
    for (int k = 0; k < i; k++) {
        if (overlap(r, range_of(v, k)))
            return err_set(why, ERR_FORMAT, "ranges.%s overlaps ranges.%s", name, ranges[k].name);
    }
    for (int m = 0; m < N_MARKS; m++) {
        if (overlap(r, &(struct ruler_range){v->marks[m], 1}))
            return err_set(why, ERR_FORMAT, "ranges.%s holds special.%s, %d", name, mark_names[m],
                           v->marks[m]);
    }
    return 0;
}

static int read_all(struct ruler_vocab *v, const json_t *o, struct err_msg *why)
{
    const json_t *size = json_object_get(o, "vocab_size"), *tasks = json_object_get(o, "tasks");
    if (!json_is_integer(size) || json_integer_value(size) < 1 ||
        json_integer_value(size) > MAX_VOCAB)
        return err_set(why, ERR_FORMAT, "vocab_size is not a whole number from 1 to %d", MAX_VOCAB);
    v->size = (int32_t)json_integer_value(size);
    TRY(read_marks(v, json_object_get(o, "special"), why));
    const json_t *r = json_object_get(o, "ranges");
    if (!json_is_object(r))
        return err_set(why, ERR_FORMAT, "ranges is not an object");
    for (int i = 0; i < N_RANGES; i++)
        TRY(read_range(v, i, r, why));
    if (!json_is_object(tasks))
        return err_set(why, ERR_FORMAT, "tasks is not an object");
    for (int t = 0; t < RULER_N_TASKS; t++)
        v->tasks |= json_object_get(tasks, task_names[t]) ? 1u << t : 0;
    return 0;
}

static int read_json(struct ruler_vocab *out, json_t *o, const json_error_t *at,
                     struct err_msg *why)
{
    *out = (struct ruler_vocab){0};
    if (!o)
        return err_set(why, ERR_FORMAT, "line %d: %.150s", at->line, at->text);
    int err = read_all(out, o, why);
    json_decref(o);
    return err;
}

int ruler_vocab_parse(struct ruler_vocab *out, const char *text, struct err_msg *why)
{
    json_error_t at;
    return read_json(out, json_loads(text, JSON_REJECT_DUPLICATES, &at), &at, why);
}

int ruler_vocab_load(struct ruler_vocab *out, const char *path, struct err_msg *why)
{
    struct err_msg inner = {""};
    json_error_t at;
    FILE *f = fopen(path, "re");
    if (!f)
        return err_set(why, -errno, "cannot open %s: %s", path, err_str(-errno));
    int err = read_json(out, json_loadf(f, JSON_REJECT_DUPLICATES, &at), &at, &inner);
    (void)fclose(f);
    return err < 0 ? err_set(why, err, "%s: %.250s", path, inner.text) : 0;
}
