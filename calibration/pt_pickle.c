#include "calibration/pt_pickle.h"

#include "core/mem.h"

#include <inttypes.h>
#include <stdbool.h>
#include <string.h>

enum { MARK = -1, NONE = -1 };

enum global { GLOBAL_TENSOR, GLOBAL_DICT, GLOBAL_STORAGE /* + enum pt_dtype */ };

static const struct {
    const char *module, *name;
} globals[] = {{"torch._utils", "_rebuild_tensor_v2"},
               {"collections", "OrderedDict"},
               [GLOBAL_STORAGE + PT_F64] = {"torch", "DoubleStorage"},
               [GLOBAL_STORAGE + PT_F32] = {"torch", "FloatStorage"},
               [GLOBAL_STORAGE + PT_F16] = {"torch", "HalfStorage"},
               [GLOBAL_STORAGE + PT_BF16] = {"torch", "BFloat16Storage"},
               [GLOBAL_STORAGE + PT_I64] = {"torch", "LongStorage"},
               [GLOBAL_STORAGE + PT_I32] = {"torch", "IntStorage"}};
enum { N_GLOBALS = sizeof globals / sizeof *globals };

struct value {
    enum pt_kind kind;
    int32_t first, last; /* cells of a container; a dict's are key, value, key, value */
    int32_t type;        /* of a global its index; of a storage its enum pt_dtype */
    int64_t i;           /* number, truth; of a storage its elements; of a tensor its arguments */
    const char *text;    /* the text; of a storage its key */
    size_t len;
};

/* An item of a container. */
struct cell {
    int32_t value, next;
};

/* Every instruction makes at most one value, one memo and one place on the stack, and a container
 * takes its items off the stack: no array needs more room than the pickle has bytes. */
struct pt_pickle {
    const unsigned char *data;
    size_t len, at, op; /* op: of the instruction being read */
    const char *name;
    struct err_msg *why;
    struct value *values;
    struct cell *cells;
    int32_t *stack, *memo;
    int32_t n_values, n_cells, depth, result;
    bool stopped;
};

/* ---- errors --------------------------------------------------------------------------------- */

static const char *op_name(unsigned char code);

static int bad(const struct pt_pickle *p, const char *what)
{
    return err_set(p->why, ERR_FORMAT, "%s: %s at offset %zu: %s", p->name, op_name(p->data[p->op]),
                   p->op, what);
}

/* ---- bytes, stack, values ------------------------------------------------------------------- */

static int take(struct pt_pickle *p, size_t n, const unsigned char **out)
{
    if (n > p->len - p->at)
        return bad(p, "the pickle ends within");
    *out = p->data + p->at;
    p->at += n;
    return 0;
}

static int take_uint(struct pt_pickle *p, int bytes, uint64_t *out)
{
    const unsigned char *b = NULL;
    TRY(take(p, (size_t)bytes, &b));
    *out = 0;
    for (int i = 0; i < bytes; i++)
        *out |= (uint64_t)b[i] << (8 * i);
    return 0;
}

static void push(struct pt_pickle *p, int32_t value)
{
    p->stack[p->depth++] = value;
}

static struct value *push_new(struct pt_pickle *p, enum pt_kind kind)
{
    struct value *v = &p->values[p->n_values];
    *v = (struct value){.kind = kind, .first = NONE, .last = NONE};
    push(p, p->n_values++);
    return v;
}

/* Whether the topmost n places are values. */
static bool has(const struct pt_pickle *p, int32_t n)
{
    for (int32_t i = 1; i <= n; i++) {
        if (i > p->depth || p->stack[p->depth - i] == MARK)
            return false;
    }
    return true;
}

/* The topmost value, taken off. */
static int pop(struct pt_pickle *p, int32_t *out)
{
    if (!has(p, 1))
        return bad(p, "there is nothing on the stack");
    *out = p->stack[--p->depth];
    return 0;
}

static void add_item(struct pt_pickle *p, struct value *v, int32_t item)
{
    const int32_t cell = p->n_cells++;
    p->cells[cell] = (struct cell){.value = item, .next = NONE};
    if (v->first == NONE)
        v->first = cell;
    else
        p->cells[v->last].next = cell;
    v->last = cell;
}

/* The place above the topmost mark; 0: there is no mark. */
static int32_t above_mark(const struct pt_pickle *p)
{
    int32_t at = p->depth;
    while (at > 0 && p->stack[at - 1] != MARK)
        at--;
    return at;
}

/* The container of `kind` under the items. */
static int container(struct pt_pickle *p, int32_t below, enum pt_kind kind, struct value **out)
{
    if (below < 1 || p->stack[below - 1] == MARK || p->values[p->stack[below - 1]].kind != kind)
        return bad(p, kind == PT_DICT ? "there is no dict" : "there is no list");
    *out = &p->values[p->stack[below - 1]];
    return 0;
}

/* Adds the stack's items [from, depth) and drops all from `keep` on. */
static int add_items(struct pt_pickle *p, struct value *v, int32_t from, int32_t keep)
{
    if (v->kind == PT_DICT && (p->depth - from) % 2)
        return bad(p, "a key has no value");
    for (int32_t i = from; i < p->depth; i++) {
        if (v->kind == PT_DICT && (i - from) % 2 == 0 && p->values[p->stack[i]].kind != PT_TEXT)
            return bad(p, "a key is no text");
        add_item(p, v, p->stack[i]);
    }
    p->depth = keep;
    return 0;
}

/* ---- tensors -------------------------------------------------------------------------------- */

static bool is(const struct pt_pickle *p, int32_t value, enum pt_kind kind)
{
    return p->values[value].kind == kind;
}

static bool is_text(const struct pt_pickle *p, int32_t value, const char *text)
{
    const struct value *v = &p->values[value];
    return v->kind == PT_TEXT && v->len == strlen(text) && memcmp(v->text, text, v->len) == 0;
}

/* A tuple of 0 to PT_MAX_DIMS numbers that are not negative. */
static bool read_dims(const struct pt_pickle *p, int32_t value, int64_t *dims, int *n)
{
    int32_t items[PT_MAX_DIMS];
    if (!is(p, value, PT_TUPLE))
        return false;
    *n = pt_pickle_items(p, value, items, PT_MAX_DIMS);
    for (int i = 0; i < *n; i++) {
        if (i == PT_MAX_DIMS || !is(p, items[i], PT_INT) || p->values[items[i]].i < 0)
            return false;
        dims[i] = p->values[items[i]].i;
    }
    return true;
}

/* (storage, offset, shape, strides, requires_grad, hooks). */
static bool read_tensor(const struct pt_pickle *p, int32_t args, struct pt_strided *t)
{
    int32_t a[6];
    int n_strides = 0;
    if (pt_pickle_items(p, args, a, 6) != 6 || !is(p, a[0], PT_STORAGE) || !is(p, a[1], PT_INT) ||
        p->values[a[1]].i < 0 || !is(p, a[4], PT_BOOL) || !is(p, a[5], PT_DICT))
        return false;
    const struct value *s = &p->values[a[0]];
    *t = (struct pt_strided){
        .dtype = (enum pt_dtype)s->type, .n_storage = s->i, .offset = p->values[a[1]].i};
    memcpy(t->key, s->text, s->len);
    return read_dims(p, a[2], t->shape, &t->n_dims) && read_dims(p, a[3], t->stride, &n_strides) &&
           t->n_dims == n_strides;
}

/* ('storage', type, key, location, elements) */
static int op_binpersid(struct pt_pickle *p)
{
    int32_t id = NONE, a[5];
    TRY(pop(p, &id));
    if (!is(p, id, PT_TUPLE) || pt_pickle_items(p, id, a, 5) != 5 || !is_text(p, a[0], "storage") ||
        !is(p, a[1], PT_GLOBAL) || p->values[a[1]].type < GLOBAL_STORAGE || !is(p, a[2], PT_TEXT) ||
        !is(p, a[3], PT_TEXT) || !is(p, a[4], PT_INT) || p->values[a[4]].i < 0)
        return bad(p, "not the storage of a tensor");
    const struct value *key = &p->values[a[2]];
    if (key->len < 1 || key->len >= PT_KEY_BYTES)
        return bad(p, "the storage's key is no number");
    for (size_t i = 0; i < key->len; i++) {
        if (key->text[i] < '0' || key->text[i] > '9')
            return bad(p, "the storage's key is no number");
    }
    struct value *v = push_new(p, PT_STORAGE);
    v->type = p->values[a[1]].type - GLOBAL_STORAGE;
    v->i = p->values[a[4]].i;
    v->text = key->text;
    v->len = key->len;
    return 0;
}

static int op_reduce(struct pt_pickle *p)
{
    int32_t args = NONE, fn = NONE;
    struct pt_strided t;
    TRY(pop(p, &args));
    TRY(pop(p, &fn));
    if (!is(p, fn, PT_GLOBAL) || !is(p, args, PT_TUPLE))
        return bad(p, "not a call of a tensor or an OrderedDict");
    if (p->values[fn].type == GLOBAL_DICT && p->values[args].first == NONE) {
        (void)push_new(p, PT_DICT);
        return 0;
    }
    if (p->values[fn].type != GLOBAL_TENSOR || !read_tensor(p, args, &t))
        return bad(p, "not a call of a plain tensor or an empty OrderedDict");
    struct value *v = push_new(p, PT_TENSOR);
    v->i = args;
    return 0;
}

/* ---- the other instructions ----------------------------------------------------------------- */

static int op_proto(struct pt_pickle *p)
{
    uint64_t version = 0;
    TRY(take_uint(p, 1, &version));
    return version == 2 ? 0 : bad(p, "the protocol is not 2");
}

static int op_mark(struct pt_pickle *p)
{
    push(p, MARK);
    return 0;
}

static int op_empty_dict(struct pt_pickle *p)
{
    (void)push_new(p, PT_DICT);
    return 0;
}

static int op_empty_list(struct pt_pickle *p)
{
    (void)push_new(p, PT_LIST);
    return 0;
}

static int op_empty_tuple(struct pt_pickle *p)
{
    (void)push_new(p, PT_TUPLE);
    return 0;
}

/* The stack's items [from, depth) as a tuple, and `drop` places below them. */
static int make_tuple(struct pt_pickle *p, int32_t from, int32_t drop)
{
    const int32_t made = p->n_values++;
    struct value *v = &p->values[made];
    *v = (struct value){.kind = PT_TUPLE, .first = NONE, .last = NONE};
    TRY(add_items(p, v, from, from - drop));
    push(p, made);
    return 0;
}

static int op_tuple(struct pt_pickle *p)
{
    const int32_t from = above_mark(p);
    return from < 1 ? bad(p, "there is no mark") : make_tuple(p, from, 1);
}

/* TUPLE1 to TUPLE3 */
static int op_tuple_n(struct pt_pickle *p)
{
    const int32_t n = p->data[p->op] - 0x84;
    return has(p, n) ? make_tuple(p, p->depth - n, 0) : bad(p, "there is nothing on the stack");
}

static int op_append(struct pt_pickle *p)
{
    struct value *v = NULL;
    if (!has(p, 1))
        return bad(p, "there is nothing on the stack");
    TRY(container(p, p->depth - 1, PT_LIST, &v));
    return add_items(p, v, p->depth - 1, p->depth - 1);
}

static int op_appends(struct pt_pickle *p)
{
    struct value *v = NULL;
    const int32_t from = above_mark(p);
    TRY(container(p, from - 1, PT_LIST, &v));
    return add_items(p, v, from, from - 1);
}

static int op_setitem(struct pt_pickle *p)
{
    struct value *v = NULL;
    if (!has(p, 2))
        return bad(p, "there is nothing on the stack");
    TRY(container(p, p->depth - 2, PT_DICT, &v));
    return add_items(p, v, p->depth - 2, p->depth - 2);
}

static int op_setitems(struct pt_pickle *p)
{
    struct value *v = NULL;
    const int32_t from = above_mark(p);
    TRY(container(p, from - 1, PT_DICT, &v));
    return add_items(p, v, from, from - 1);
}

static int op_text(struct pt_pickle *p)
{
    uint64_t len = 0;
    const unsigned char *text = NULL;
    TRY(take_uint(p, 4, &len));
    TRY(take(p, (size_t)len, &text));
    struct value *v = push_new(p, PT_TEXT);
    v->text = (const char *)text;
    v->len = (size_t)len;
    return 0;
}

static int op_uint(struct pt_pickle *p)
{
    uint64_t v = 0;
    TRY(take_uint(p, p->data[p->op] == 'K' ? 1 : 2, &v));
    push_new(p, PT_INT)->i = (int64_t)v;
    return 0;
}

static int op_int(struct pt_pickle *p)
{
    uint64_t v = 0;
    TRY(take_uint(p, 4, &v));
    push_new(p, PT_INT)->i = (int32_t)(uint32_t)v;
    return 0;
}

/* A number of up to 8 bytes, two's complement. */
static int op_long(struct pt_pickle *p)
{
    uint64_t n = 0, v = 0;
    TRY(take_uint(p, 1, &n));
    if (n > 8)
        return bad(p, "a number of more than 64 bits");
    TRY(take_uint(p, (int)n, &v));
    if (n > 0 && n < 8 && v >> (8 * n - 1))
        v |= UINT64_MAX << (8 * n);
    push_new(p, PT_INT)->i = (int64_t)v;
    return 0;
}

static int op_bool(struct pt_pickle *p)
{
    push_new(p, PT_BOOL)->i = p->data[p->op] == 0x88;
    return 0;
}

static int op_put(struct pt_pickle *p)
{
    uint64_t i = 0;
    TRY(take_uint(p, p->data[p->op] == 'q' ? 1 : 4, &i));
    if (i >= p->len)
        return bad(p, "an absurd memo");
    if (!has(p, 1))
        return bad(p, "there is nothing on the stack");
    p->memo[i] = p->stack[p->depth - 1];
    return 0;
}

static int op_get(struct pt_pickle *p)
{
    uint64_t i = 0;
    TRY(take_uint(p, p->data[p->op] == 'h' ? 1 : 4, &i));
    if (i >= p->len || p->memo[i] == NONE)
        return bad(p, "nothing was put there");
    push(p, p->memo[i]);
    return 0;
}

/* A line without its end. */
static int take_line(struct pt_pickle *p, const char **line, size_t *n)
{
    const unsigned char *text = p->data + p->at, *end = memchr(text, '\n', p->len - p->at);
    if (!end)
        return bad(p, "the pickle ends within");
    *line = (const char *)text;
    *n = (size_t)(end - text);
    p->at += *n + 1;
    return 0;
}

/* Fit for a terminal. */
static void show(char *out, size_t size, const char *text, size_t len)
{
    size_t n = len < size - 1 ? len : size - 1;
    for (size_t i = 0; i < n; i++)
        out[i] = (char)(text[i] > ' ' && text[i] < 127 ? text[i] : '?');
    out[n] = '\0';
}

static int op_global(struct pt_pickle *p)
{
    const char *module = NULL, *name = NULL;
    size_t module_len = 0, name_len = 0;
    char a[48], b[48];
    TRY(take_line(p, &module, &module_len));
    TRY(take_line(p, &name, &name_len));
    for (int i = 0; i < N_GLOBALS; i++) {
        if (strlen(globals[i].module) == module_len && strlen(globals[i].name) == name_len &&
            memcmp(globals[i].module, module, module_len) == 0 &&
            memcmp(globals[i].name, name, name_len) == 0) {
            push_new(p, PT_GLOBAL)->type = i;
            return 0;
        }
    }
    show(a, sizeof a, module, module_len);
    show(b, sizeof b, name, name_len);
    return err_set(p->why, ERR_UNSUPPORTED,
                   "%s: GLOBAL at offset %zu: %s.%s is nothing that a threshold file needs",
                   p->name, p->op, a, b);
}

static int op_stop(struct pt_pickle *p)
{
    TRY(pop(p, &p->result));
    if (p->depth != 0 || p->at != p->len)
        return bad(p, "something is left over");
    if (!is(p, p->result, PT_DICT))
        return bad(p, "the value is no dict");
    p->stopped = true;
    return 0;
}

static const struct {
    unsigned char code;
    const char *name;
    int (*run)(struct pt_pickle *p);
} ops[] = {
    {0x80, "PROTO", op_proto},
    {'(', "MARK", op_mark},
    {'}', "EMPTY_DICT", op_empty_dict},
    {']', "EMPTY_LIST", op_empty_list},
    {')', "EMPTY_TUPLE", op_empty_tuple},
    {'t', "TUPLE", op_tuple},
    {0x85, "TUPLE1", op_tuple_n},
    {0x86, "TUPLE2", op_tuple_n},
    {0x87, "TUPLE3", op_tuple_n},
    {'a', "APPEND", op_append},
    {'e', "APPENDS", op_appends},
    {'s', "SETITEM", op_setitem},
    {'u', "SETITEMS", op_setitems},
    {'X', "BINUNICODE", op_text},
    {'K', "BININT1", op_uint},
    {'M', "BININT2", op_uint},
    {'J', "BININT", op_int},
    {0x8a, "LONG1", op_long},
    {0x88, "NEWTRUE", op_bool},
    {0x89, "NEWFALSE", op_bool},
    {'q', "BINPUT", op_put},
    {'r', "LONG_BINPUT", op_put},
    {'h', "BINGET", op_get},
    {'j', "LONG_BINGET", op_get},
    {'c', "GLOBAL", op_global},
    {'Q', "BINPERSID", op_binpersid},
    {'R', "REDUCE", op_reduce},
    {'.', "STOP", op_stop},
};
enum { N_OPS = sizeof ops / sizeof *ops };

static const char *op_name(unsigned char code)
{
    for (int i = 0; i < N_OPS; i++) {
        if (ops[i].code == code)
            return ops[i].name;
    }
    return "instruction";
}

/* ---- the whole ------------------------------------------------------------------------------ */

static int step(struct pt_pickle *p)
{
    p->op = p->at++;
    if ((p->op == 0) != (p->data[p->op] == 0x80))
        return bad(p, "a pickle begins with PROTO and has no other");
    for (int i = 0; i < N_OPS; i++) {
        if (ops[i].code == p->data[p->op])
            return ops[i].run(p);
    }
    return err_set(p->why, ERR_UNSUPPORTED,
                   "%s: instruction 0x%02x at offset %zu is nothing that a threshold file needs",
                   p->name, p->data[p->op], p->op);
}

int pt_pickle_parse(struct pt_pickle **out, const void *data, size_t len, const char *name,
                    struct err_msg *why)
{
    if (len < 1 || len > PT_PICKLE_MAX_BYTES) {
        return err_set(why, ERR_FORMAT, "%s: data.pkl has %zu bytes, must have 1 to %d", name, len,
                       PT_PICKLE_MAX_BYTES);
    }
    struct pt_pickle *p = mem_zalloc(1, sizeof *p);
    *p = (struct pt_pickle){.data = data, .len = len, .name = name, .why = why};
    p->values = mem_zalloc(len, sizeof *p->values);
    p->cells = mem_zalloc(len, sizeof *p->cells);
    p->stack = mem_zalloc(len, sizeof *p->stack);
    p->memo = mem_alloc(len * sizeof *p->memo);
    for (size_t i = 0; i < len; i++)
        p->memo[i] = NONE;
    int err = 0;
    while (err == 0 && !p->stopped && p->at < len)
        err = step(p);
    if (err == 0 && !p->stopped)
        err = err_set(why, ERR_FORMAT, "%s: data.pkl ends without STOP", name);
    p->why = NULL;
    if (err < 0) {
        pt_pickle_free(p);
        return err;
    }
    *out = p;
    return 0;
}

void pt_pickle_free(struct pt_pickle *p)
{
    if (!p)
        return;
    mem_free(p->values);
    mem_free(p->cells);
    mem_free(p->stack);
    mem_free(p->memo);
    mem_free(p);
}

int32_t pt_pickle_find(const struct pt_pickle *p, const char *key)
{
    int32_t found = -1;
    for (int32_t c = p->values[p->result].first; c != NONE;) {
        const int32_t value_cell = p->cells[c].next;
        if (is_text(p, p->cells[c].value, key))
            found = found == -1 ? p->cells[value_cell].value : -2;
        c = p->cells[value_cell].next;
    }
    return found;
}

enum pt_kind pt_pickle_kind(const struct pt_pickle *p, int32_t value)
{
    return p->values[value].kind;
}

const char *pt_kind_name(enum pt_kind kind)
{
    static const char *const names[] = {"a number", "a truth value", "a text",
                                        "a tuple",  "a list",        "a dict",
                                        "a global", "a storage",     "a tensor"};
    return names[kind];
}

int64_t pt_pickle_int(const struct pt_pickle *p, int32_t value)
{
    ASSERT(is(p, value, PT_INT));
    return p->values[value].i;
}

int32_t pt_pickle_items(const struct pt_pickle *p, int32_t value, int32_t *items, int32_t max)
{
    int32_t n = 0;
    ASSERT(is(p, value, PT_TUPLE) || is(p, value, PT_LIST));
    for (int32_t c = p->values[value].first; c != NONE; c = p->cells[c].next) {
        if (n < max)
            items[n] = p->cells[c].value;
        n++;
    }
    return n;
}

struct pt_strided pt_pickle_tensor(const struct pt_pickle *p, int32_t value)
{
    struct pt_strided t = {0};
    ASSERT(is(p, value, PT_TENSOR));
    const bool ok = read_tensor(p, (int32_t)p->values[value].i, &t);
    ASSERT(ok); /* it was when it was made, and tuples do not change */
    return t;
}
