/* Payload -> struct. The precheck has judged structure and sizes, so msgpack-c's own allocation is
 * bounded by IPC_MAX_VALUES; vectors are taken from the same zone. */
#include "ipc/message.h"
#include "ipc/precheck.h"
#include "ipc/schema.h"

#include <msgpack.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ZONE_BYTES = 16 << 10 };

struct ipc_decoder {
    msgpack_zone zone;
};

int ipc_decoder_create(struct ipc_decoder **out)
{
    struct ipc_decoder *d = malloc(sizeof *d);
    if (!d)
        return -ENOMEM;
    if (!msgpack_zone_init(&d->zone, ZONE_BYTES)) {
        free(d);
        return -ENOMEM;
    }
    *out = d;
    return 0;
}

void ipc_decoder_destroy(struct ipc_decoder *d)
{
    if (!d)
        return;
    msgpack_zone_destroy(&d->zone);
    free(d);
}

/* Where a field is read to: `zone` for vectors, `field` and `why` for errors. */
struct reader {
    msgpack_zone *zone;
    const struct ipc_field *field;
    struct err_msg *why;
};

static int wrong(const struct reader *r, const char *wanted)
{
    return err_set(r->why, ERR_INVALID, "%s: must be %s", r->field->name, wanted);
}

static bool is_int(const msgpack_object *o)
{
    return o->type == MSGPACK_OBJECT_POSITIVE_INTEGER || o->type == MSGPACK_OBJECT_NEGATIVE_INTEGER;
}

static double int_value(const msgpack_object *o)
{
    return o->type == MSGPACK_OBJECT_POSITIVE_INTEGER ? (double)o->via.u64 : (double)o->via.i64;
}

static bool is_float(const msgpack_object *o)
{
    return o->type == MSGPACK_OBJECT_FLOAT32 || o->type == MSGPACK_OBJECT_FLOAT64;
}

static int read_i32(const struct reader *r, const msgpack_object *o, double lo, double hi,
                    int32_t *out)
{
    if (!is_int(o))
        return wrong(r, "an integer");
    double v = int_value(o);
    if (!(v >= lo && v <= hi))
        return err_set(r->why, ERR_INVALID, "%s: %.0f is not in %.0f..%.0f", r->field->name, v, lo,
                       hi);
    *out = (int32_t)v;
    return 0;
}

static int read_number(const struct reader *r, const msgpack_object *o, char *at)
{
    const struct ipc_field *f = r->field;
    bool real = f->kind == IPC_KIND_F64;
    if (!is_int(o) && !(real && is_float(o)))
        return wrong(r, real ? "a number" : "an integer");
    double v = is_int(o) ? int_value(o) : o->via.f64;
    if (!(v >= f->min && v <= f->max))
        return err_set(r->why, ERR_INVALID, "%s: %.10g is not in %.10g..%.10g", f->name, v, f->min,
                       f->max);
    if (f->kind == IPC_KIND_I32)
        memcpy(at, &(int32_t){(int32_t)v}, sizeof(int32_t));
    else if (f->kind == IPC_KIND_I64)
        memcpy(at, &(int64_t){(int64_t)v}, sizeof(int64_t));
    else
        memcpy(at, &v, sizeof v);
    return 0;
}

static int read_text(const struct reader *r, const msgpack_object *o, char *at, size_t room)
{
    if (o->type != MSGPACK_OBJECT_STR)
        return wrong(r, "a string");
    if (o->via.str.size > room)
        return err_set(r->why, ERR_INVALID, "%s: %u bytes, at most %zu", r->field->name,
                       o->via.str.size, room);
    if (o->via.str.size > 0) { /* msgpack-c may give an empty string no address */
        if (memchr(o->via.str.ptr, 0, o->via.str.size))
            return wrong(r, "free of NUL bytes");
        memcpy(at, o->via.str.ptr, o->via.str.size);
    }
    at[o->via.str.size] = '\0';
    return 0;
}

static int take(const struct reader *r, size_t n, size_t size, void *out)
{
    void *p = msgpack_zone_malloc(r->zone, n ? n * size : 1);
    if (!p)
        return -ENOMEM;
    memcpy(out, &p, sizeof p);
    return 0;
}

static int read_token_bin(const struct reader *r, const msgpack_object *o, int32_t *ids)
{
    const uint8_t *p = (const uint8_t *)o->via.bin.ptr;
    for (uint32_t i = 0; i < o->via.bin.size / 4; i++, p += 4) {
        uint32_t v = p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        if (v > INT32_MAX)
            return err_set(r->why, ERR_INVALID, "%s[%u]: %u is no token id", r->field->name, i, v);
        ids[i] = (int32_t)v;
    }
    return 0;
}

static int read_tokens(const struct reader *r, const msgpack_object *o, char *at, int32_t *count)
{
    int32_t *ids;
    if (o->type == MSGPACK_OBJECT_BIN) {
        if (o->via.bin.size % 4 != 0)
            return wrong(r, "a whole number of 4-byte ids");
        TRY(take(r, o->via.bin.size / 4, sizeof *ids, &ids));
        TRY(read_token_bin(r, o, ids));
        *count = (int32_t)(o->via.bin.size / 4);
    } else if (o->type == MSGPACK_OBJECT_ARRAY) {
        TRY(take(r, o->via.array.size, sizeof *ids, &ids));
        for (uint32_t i = 0; i < o->via.array.size; i++)
            TRY(read_i32(r, &o->via.array.ptr[i], 0, INT32_MAX, &ids[i]));
        *count = (int32_t)o->via.array.size;
    } else {
        return wrong(r, "binary or an array of integers");
    }
    memcpy(at, &ids, sizeof ids);
    return 0;
}

static int read_i32_list(const struct reader *r, const msgpack_object *o, char *at, int32_t *count)
{
    const struct ipc_field *f = r->field;
    if (o->type != MSGPACK_OBJECT_ARRAY)
        return wrong(r, "an array of integers");
    if (o->via.array.size > f->room)
        return err_set(r->why, ERR_INVALID, "%s: %u elements, at most %d", f->name,
                       o->via.array.size, f->room);
    for (uint32_t i = 0; i < o->via.array.size; i++) {
        int32_t v = 0;
        TRY(read_i32(r, &o->via.array.ptr[i], f->min, f->max, &v));
        memcpy(at + i * sizeof v, &v, sizeof v);
    }
    *count = (int32_t)o->via.array.size;
    return 0;
}

static int read_str_list(const struct reader *r, const msgpack_object *o, char *at, int32_t *count)
{
    if (o->type != MSGPACK_OBJECT_ARRAY)
        return wrong(r, "an array of strings");
    if (o->via.array.size > r->field->room)
        return err_set(r->why, ERR_INVALID, "%s: %u elements, at most %d", r->field->name,
                       o->via.array.size, r->field->room);
    for (uint32_t i = 0; i < o->via.array.size; i++)
        TRY(read_text(r, &o->via.array.ptr[i], at + (size_t)i * (IPC_CAP_BYTES + 1),
                      IPC_CAP_BYTES));
    *count = (int32_t)o->via.array.size;
    return 0;
}

static int read_salt(const struct reader *r, const msgpack_object *o, char *at, int32_t *count)
{
    if (o->type != MSGPACK_OBJECT_BIN)
        return wrong(r, "binary");
    if (o->via.bin.size > r->field->room)
        return err_set(r->why, ERR_INVALID, "%s: %u bytes, at most %d", r->field->name,
                       o->via.bin.size, r->field->room);
    if (o->via.bin.size > 0)
        memcpy(at, o->via.bin.ptr, o->via.bin.size);
    *count = (int32_t)o->via.bin.size;
    return 0;
}

static int read_ids(const struct reader *r, const msgpack_object *o, char *at, int32_t *count)
{
    const char **ids;
    if (o->type != MSGPACK_OBJECT_ARRAY)
        return wrong(r, "an array of strings");
    uint32_t n = o->via.array.size;
    TRY(take(r, n, sizeof *ids, &ids));
    for (uint32_t i = 0; i < n; i++) {
        const msgpack_object *e = &o->via.array.ptr[i];
        size_t room = e->type == MSGPACK_OBJECT_STR && e->via.str.size <= IPC_ID_BYTES
                          ? e->via.str.size
                          : IPC_ID_BYTES;
        char *text;
        TRY(take(r, room + 1, 1, &text));
        TRY(read_text(r, e, text, IPC_ID_BYTES));
        ids[i] = text;
    }
    memcpy(at, &ids, sizeof ids);
    *count = (int32_t)n;
    return 0;
}

/* [token, logprob]: the front of a chosen entry and the whole of a top entry. */
static int read_pair(const struct reader *r, const msgpack_object *o, uint32_t n, int32_t *token,
                     float *logprob)
{
    if (o->type != MSGPACK_OBJECT_ARRAY || o->via.array.size != n)
        return wrong(r, "made of [token, logprob, [[token, logprob], ...]]");
    TRY(read_i32(r, &o->via.array.ptr[0], 0, INT32_MAX, token));
    const msgpack_object *lp = &o->via.array.ptr[1];
    if (!is_float(lp) && !is_int(lp))
        return wrong(r, "made of numbers");
    *logprob = (float)(is_int(lp) ? int_value(lp) : lp->via.f64);
    return 0;
}

static int read_logprob(const struct reader *r, const msgpack_object *o, struct ipc_logprob *l)
{
    TRY(read_pair(r, o, 3, &l->token, &l->logprob));
    const msgpack_object *top = &o->via.array.ptr[2];
    if (top->type != MSGPACK_OBJECT_ARRAY || top->via.array.size > IPC_MAX_LOGPROBS)
        return wrong(r, "made of entries with at most 20 alternatives");
    l->n_top = (int32_t)top->via.array.size;
    for (int32_t i = 0; i < l->n_top; i++)
        TRY(read_pair(r, &top->via.array.ptr[i], 2, &l->top_ids[i], &l->top_logprobs[i]));
    return 0;
}

/* Read after the tokens: there must be one entry for each. */
static int read_logprobs(const struct reader *r, const msgpack_object *o, char *at, int32_t count)
{
    struct ipc_logprob *l;
    if (o->type != MSGPACK_OBJECT_ARRAY || o->via.array.size != (uint32_t)count)
        return wrong(r, "an array as long as tokens");
    TRY(take(r, o->via.array.size, sizeof *l, &l));
    for (int32_t i = 0; i < count; i++)
        TRY(read_logprob(r, &o->via.array.ptr[i], &l[i]));
    memcpy(at, &l, sizeof l);
    return 0;
}

static int read_stat(const struct reader *r, const msgpack_object_kv *kv, struct ipc_stat *s)
{
    char *name;
    if (kv->key.type != MSGPACK_OBJECT_STR)
        return wrong(r, "a map from names to numbers");
    TRY(take(r, kv->key.via.str.size + 1u, 1, &name));
    TRY(read_text(r, &kv->key, name, kv->key.via.str.size));
    *s = (struct ipc_stat){.name = name, .is_int = is_int(&kv->val)};
    if (s->is_int) {
        if (kv->val.type == MSGPACK_OBJECT_POSITIVE_INTEGER && kv->val.via.u64 > INT64_MAX)
            return wrong(r, "within 64 bits");
        s->i = kv->val.via.i64;
        s->d = (double)s->i;
    } else if (is_float(&kv->val)) {
        s->d = kv->val.via.f64;
    } else {
        return wrong(r, "a map from names to numbers");
    }
    return 0;
}

static int read_stats(const struct reader *r, const msgpack_object *o, char *at, int32_t *count)
{
    struct ipc_stat *s;
    if (o->type != MSGPACK_OBJECT_MAP)
        return wrong(r, "a map from names to numbers");
    TRY(take(r, o->via.map.size, sizeof *s, &s));
    for (uint32_t i = 0; i < o->via.map.size; i++)
        TRY(read_stat(r, &o->via.map.ptr[i], &s[i]));
    memcpy(at, &s, sizeof s);
    *count = (int32_t)o->via.map.size;
    return 0;
}

static int read_list(const struct reader *r, const msgpack_object *o, char *body)
{
    char *at = body + r->field->offset;
    int32_t n, err;
    memcpy(&n, body + r->field->count_offset, sizeof n);
    switch (r->field->kind) {
    case IPC_KIND_TOKENS: err = read_tokens(r, o, at, &n); break;
    case IPC_KIND_I32_LIST: err = read_i32_list(r, o, at, &n); break;
    case IPC_KIND_STR_LIST: err = read_str_list(r, o, at, &n); break;
    case IPC_KIND_SALT: err = read_salt(r, o, at, &n); break;
    case IPC_KIND_IDS: err = read_ids(r, o, at, &n); break;
    case IPC_KIND_LOGPROBS: err = read_logprobs(r, o, at, n); break;
    default: err = read_stats(r, o, at, &n); break;
    }
    TRY(err);
    memcpy(body + r->field->count_offset, &n, sizeof n);
    return 0;
}

static int read_fields(const struct reader *outer, const struct ipc_schema *s,
                       const msgpack_object *map, char *body);

/* The recursion ends after one level: no field of the sparse map is a map. */
// NOLINTBEGIN(misc-no-recursion)
static int read_field(const struct reader *r, const msgpack_object *o, char *body)
{
    char *at = body + r->field->offset;
    switch (r->field->kind) {
    case IPC_KIND_BOOL:
        if (o->type != MSGPACK_OBJECT_BOOLEAN)
            return wrong(r, "true or false");
        memcpy(at, &o->via.boolean, sizeof(bool));
        return 0;
    case IPC_KIND_I32:
    case IPC_KIND_I64:
    case IPC_KIND_F64: return read_number(r, o, at);
    case IPC_KIND_SEED:
    case IPC_KIND_U64:
        if (o->type != MSGPACK_OBJECT_POSITIVE_INTEGER)
            return wrong(r, "a non-negative integer");
        memcpy(at, &o->via.u64, sizeof(uint64_t));
        if (r->field->kind == IPC_KIND_SEED)
            body[r->field->count_offset] = true;
        return 0;
    case IPC_KIND_STR: return read_text(r, o, at, r->field->room);
    case IPC_KIND_SPARSE:
        if (o->type != MSGPACK_OBJECT_MAP)
            return wrong(r, "a map");
        return read_fields(r, ipc_schema_sparse(), o, at);
    default: return read_list(r, o, body);
    }
}

/* Fields are read in the schema's order, whatever the order of the keys: ids first, so that an
 * error about a later field can name the request. */
static int read_fields(const struct reader *outer, const struct ipc_schema *s,
                       const msgpack_object *map, char *body)
{
    const msgpack_object *found[IPC_MAX_KEY + 1] = {NULL};
    for (uint32_t i = 0; i < map->via.map.size; i++) {
        const msgpack_object_kv *kv = &map->via.map.ptr[i];
        if (kv->key.type != MSGPACK_OBJECT_POSITIVE_INTEGER)
            return err_set(outer->why, ERR_PROTOCOL, "%s: keys must be non-negative integers",
                           s->name);
        if (kv->key.via.u64 > IPC_MAX_KEY)
            continue;
        if (found[kv->key.via.u64])
            return err_set(outer->why, ERR_PROTOCOL, "%s: key %u comes twice", s->name,
                           (unsigned)kv->key.via.u64);
        found[kv->key.via.u64] = &kv->val;
    }
    for (size_t i = 0; i < s->n_fields; i++) {
        struct reader r = {outer->zone, &s->fields[i], outer->why};
        const msgpack_object *o = found[s->fields[i].key];
        if (o && o->type != MSGPACK_OBJECT_NIL)
            TRY(read_field(&r, o, body));
        else if (s->fields[i].required)
            return err_set(outer->why, ERR_INVALID, "%s: missing", s->fields[i].name);
    }
    return 0;
}
// NOLINTEND(misc-no-recursion)

static int read_message(struct ipc_decoder *d, struct ipc_msg *m, const msgpack_object *o,
                        struct err_msg *why)
{
    if (o->type != MSGPACK_OBJECT_ARRAY || o->via.array.size != 2)
        return err_set(why, ERR_PROTOCOL, "a message must be [type, body]");
    const msgpack_object *type = &o->via.array.ptr[0], *body = &o->via.array.ptr[1];
    if (type->type != MSGPACK_OBJECT_POSITIVE_INTEGER || body->type != MSGPACK_OBJECT_MAP)
        return err_set(why, ERR_PROTOCOL, "a message must be [integer, map]");
    const struct ipc_schema *s =
        type->via.u64 <= UINT8_MAX ? ipc_schema_of((int)type->via.u64) : NULL;
    if (!s)
        return err_set(why, ERR_UNSUPPORTED, "unknown message type %llu",
                       (unsigned long long)type->via.u64);
    ipc_msg_init(m, (enum ipc_type)s->type);
    struct reader r = {&d->zone, NULL, why};
    TRY(read_fields(&r, s, body, (char *)&m->u));
    if (m->type != IPC_SUBMIT)
        return 0;
    if (m->u.submit.top_k < 0)
        m->u.submit.top_k = 0;
    return ipc_submit_check(&m->u.submit, 0, why);
}

int ipc_msg_unpack(struct ipc_decoder *d, struct ipc_msg *m, const uint8_t *payload, size_t len,
                   struct err_msg *why)
{
    msgpack_object o;
    size_t off = 0;
    m->type = 0;
    m->u.submit.id[0] = '\0';
    TRY(ipc_precheck(payload, len, why));
    msgpack_zone_clear(&d->zone);
    msgpack_unpack_return rc = msgpack_unpack((const char *)payload, len, &off, &d->zone, &o);
    if (rc == MSGPACK_UNPACK_NOMEM_ERROR)
        return -ENOMEM;
    if (rc != MSGPACK_UNPACK_SUCCESS)
        return err_set(why, ERR_PROTOCOL, "malformed msgpack");
    return read_message(d, m, &o, why);
}
