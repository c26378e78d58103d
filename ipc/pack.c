/* Struct -> frame. Fields at their default are left out. */
#include "ipc/frame.h"
#include "ipc/message.h"
#include "ipc/schema.h"

#include <msgpack.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static int buf_reserve(struct ipc_buf *b, size_t more)
{
    if (more <= b->cap - b->len)
        return 0;
    size_t cap = b->cap ? b->cap : 512;
    while (cap - b->len < more) {
        if (cap > SIZE_MAX / 2)
            return -ENOMEM;
        cap *= 2;
    }
    uint8_t *p = realloc(b->data, cap);
    if (!p)
        return -ENOMEM;
    b->data = p;
    b->cap = cap;
    return 0;
}

/* msgpack-c's output hook; a negative result travels back through the pack function. */
static int append(void *arg, const char *bytes, size_t len)
{
    struct ipc_buf *b = arg;
    if (buf_reserve(b, len) < 0)
        return -1;
    memcpy(b->data + b->len, bytes, len);
    b->len += len;
    return 0;
}

#define PUT(e)                                                                                     \
    do {                                                                                           \
        if ((e) < 0)                                                                               \
            return -ENOMEM;                                                                        \
    } while (0)

static int put_text(msgpack_packer *pk, const char *text, size_t len)
{
    PUT(msgpack_pack_str(pk, len));
    PUT(msgpack_pack_str_body(pk, text, len));
    return 0;
}

/* Token ids as little-endian u32, whatever this machine's order. */
static int put_tokens(msgpack_packer *pk, const int32_t *ids, int32_t n)
{
    struct ipc_buf *b = pk->data;
    PUT(msgpack_pack_bin(pk, 4 * (size_t)n));
    TRY(buf_reserve(b, 4 * (size_t)n));
    for (int32_t i = 0; i < n; i++) {
        uint32_t v = (uint32_t)ids[i];
        uint8_t *p = b->data + b->len;
        p[0] = (uint8_t)v;
        p[1] = (uint8_t)(v >> 8);
        p[2] = (uint8_t)(v >> 16);
        p[3] = (uint8_t)(v >> 24);
        b->len += 4;
    }
    return 0;
}

static int put_logprobs(msgpack_packer *pk, const struct ipc_logprob *l, int32_t n)
{
    PUT(msgpack_pack_array(pk, (size_t)n));
    for (int32_t i = 0; i < n; i++, l++) {
        PUT(msgpack_pack_array(pk, 3));
        PUT(msgpack_pack_int32(pk, l->token));
        PUT(msgpack_pack_float(pk, l->logprob));
        PUT(msgpack_pack_array(pk, (size_t)l->n_top));
        for (int32_t j = 0; j < l->n_top; j++) {
            PUT(msgpack_pack_array(pk, 2));
            PUT(msgpack_pack_int32(pk, l->top_ids[j]));
            PUT(msgpack_pack_float(pk, l->top_logprobs[j]));
        }
    }
    return 0;
}

static int put_stats(msgpack_packer *pk, const struct ipc_stat *s, int32_t n)
{
    PUT(msgpack_pack_map(pk, (size_t)n));
    for (int32_t i = 0; i < n; i++, s++) {
        TRY(put_text(pk, s->name, strlen(s->name)));
        if (s->is_int)
            PUT(msgpack_pack_int64(pk, s->i));
        else
            PUT(msgpack_pack_double(pk, s->d));
    }
    return 0;
}

static int32_t get_i32(const char *at)
{
    int32_t v;
    memcpy(&v, at, sizeof v);
    return v;
}

/* A number's value for the range check; all ranges lie within a double's exact integers. */
static double number_of(const struct ipc_field *f, const char *at)
{
    int64_t i64;
    double f64;
    switch (f->kind) {
    case IPC_KIND_I32: return get_i32(at);
    case IPC_KIND_I64: memcpy(&i64, at, sizeof i64); return (double)i64;
    default: memcpy(&f64, at, sizeof f64); return f64;
    }
}

static bool bytes_are_zero(const char *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (p[i])
            return false;
    return true;
}

static bool sparse_is_default(const struct ipc_sparse *s)
{
    return s->mode == IPC_SPARSE_AUTO && s->k == 0 && s->gate_rows == 0 &&
           !(fabs(s->ln_lambda) > 0) && !(s->density > 0) && !(s->decode_density > 0) &&
           !s->lost_mass;
}

static bool is_default(const struct ipc_field *f, const char *body)
{
    const char *at = body + f->offset;
    if (f->required)
        return false;
    switch (f->kind) {
    case IPC_KIND_I32:
    case IPC_KIND_I64:
    case IPC_KIND_F64:
        return !(number_of(f, at) < f->def) && !(number_of(f, at) > f->def) &&
               !isnan(number_of(f, at));
    case IPC_KIND_BOOL: return (*at != 0) == (f->def > 0);
    case IPC_KIND_STR: return *at == '\0';
    case IPC_KIND_U64: return bytes_are_zero(at, sizeof(uint64_t));
    case IPC_KIND_SEED: return body[f->count_offset] == 0;
    case IPC_KIND_SPARSE: return sparse_is_default((const void *)at);
    case IPC_KIND_LOGPROBS: return bytes_are_zero(at, sizeof(void *));
    default: return get_i32(body + f->count_offset) == 0;
    }
}

static int check(const struct ipc_field *f, const char *body, struct err_msg *why)
{
    const char *at = body + f->offset;
    if (f->kind == IPC_KIND_I32 || f->kind == IPC_KIND_I64 || f->kind == IPC_KIND_F64) {
        double v = number_of(f, at);
        if (!(v >= f->min && v <= f->max))
            return err_set(why, ERR_INVALID, "%s: %g is not in %g..%g", f->name, v, f->min, f->max);
    } else if (f->kind == IPC_KIND_STR) {
        if (strnlen(at, f->room + 1u) > f->room)
            return err_set(why, ERR_INVALID, "%s: longer than %d bytes", f->name, f->room);
    } else if (f->kind >= IPC_KIND_STR_LIST && f->kind != IPC_KIND_SPARSE) {
        int32_t n = get_i32(body + f->count_offset);
        if (n < 0 || (f->room > 0 && n > f->room))
            return err_set(why, ERR_INVALID, "%s: %d elements, at most %d", f->name, n, f->room);
    }
    return 0;
}

static int put_fields(msgpack_packer *pk, const struct ipc_schema *s, const char *body,
                      struct err_msg *why);

static int put_str_list(msgpack_packer *pk, const char *at, int32_t n)
{
    PUT(msgpack_pack_array(pk, (size_t)n));
    for (int32_t i = 0; i < n; i++, at += IPC_CAP_BYTES + 1)
        TRY(put_text(pk, at, strnlen(at, IPC_CAP_BYTES)));
    return 0;
}

static int put_list(msgpack_packer *pk, const struct ipc_field *f, const char *at, int32_t n)
{
    const void *p;
    memcpy(&p, at, sizeof p); /* meaningful for the pointer forms only */
    switch (f->kind) {
    case IPC_KIND_STR_LIST: return put_str_list(pk, at, n);
    case IPC_KIND_SALT:
        PUT(msgpack_pack_bin(pk, (size_t)n));
        PUT(msgpack_pack_bin_body(pk, at, (size_t)n));
        return 0;
    case IPC_KIND_I32_LIST:
        PUT(msgpack_pack_array(pk, (size_t)n));
        for (int32_t i = 0; i < n; i++)
            PUT(msgpack_pack_int32(pk, get_i32(at + (size_t)i * sizeof(int32_t))));
        return 0;
    case IPC_KIND_IDS:
        PUT(msgpack_pack_array(pk, (size_t)n));
        for (int32_t i = 0; i < n; i++) {
            const char *id = ((const char *const *)p)[i];
            TRY(put_text(pk, id, strlen(id)));
        }
        return 0;
    case IPC_KIND_TOKENS: return put_tokens(pk, p, n);
    case IPC_KIND_LOGPROBS: return put_logprobs(pk, p, n);
    default: return put_stats(pk, p, n);
    }
}

/* The recursion ends after one level: no field of the sparse map is a map. */
// NOLINTBEGIN(misc-no-recursion)
static int put_value(msgpack_packer *pk, const struct ipc_field *f, const char *body,
                     struct err_msg *why)
{
    const char *at = body + f->offset;
    uint64_t u64;
    switch (f->kind) {
    case IPC_KIND_BOOL: PUT(*at ? msgpack_pack_true(pk) : msgpack_pack_false(pk)); return 0;
    case IPC_KIND_I32:
    case IPC_KIND_I64: PUT(msgpack_pack_int64(pk, (int64_t)number_of(f, at))); return 0;
    case IPC_KIND_U64:
    case IPC_KIND_SEED:
        memcpy(&u64, at, sizeof u64);
        PUT(msgpack_pack_uint64(pk, u64));
        return 0;
    case IPC_KIND_F64: PUT(msgpack_pack_double(pk, number_of(f, at))); return 0;
    case IPC_KIND_STR: return put_text(pk, at, strlen(at));
    case IPC_KIND_SPARSE: return put_fields(pk, ipc_schema_sparse(), at, why);
    default: return put_list(pk, f, at, get_i32(body + f->count_offset));
    }
}

static int put_fields(msgpack_packer *pk, const struct ipc_schema *s, const char *body,
                      struct err_msg *why)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n_fields; i++) {
        TRY(check(&s->fields[i], body, why));
        n += !is_default(&s->fields[i], body);
    }
    PUT(msgpack_pack_map(pk, n));
    for (size_t i = 0; i < s->n_fields; i++) {
        const struct ipc_field *f = &s->fields[i];
        if (is_default(f, body))
            continue;
        PUT(msgpack_pack_uint8(pk, f->key));
        TRY(put_value(pk, f, body, why));
    }
    return 0;
}
// NOLINTEND(misc-no-recursion)

static int put_message(struct ipc_buf *buf, const struct ipc_schema *s, const void *body,
                       struct err_msg *why)
{
    msgpack_packer pk;
    msgpack_packer_init(&pk, buf, append);
    TRY(buf_reserve(buf, IPC_FRAME_HEADER));
    buf->len += IPC_FRAME_HEADER;
    PUT(msgpack_pack_array(&pk, 2));
    PUT(msgpack_pack_uint8(&pk, (uint8_t)s->type));
    return put_fields(&pk, s, body, why);
}

int ipc_body_pack(struct ipc_buf *buf, enum ipc_type type, const void *body, struct err_msg *why)
{
    const struct ipc_schema *s = ipc_schema_of(type);
    size_t begin = buf->len;
    ASSERT(s != NULL);
    int err = put_message(buf, s, body, why);
    size_t len = buf->len - begin - IPC_FRAME_HEADER;
    if (err == 0 && len > IPC_FRAME_CEILING)
        err = err_set(why, ERR_TOO_LONG, "%s of %zu bytes", s->name, len);
    if (err < 0) {
        buf->len = begin;
        return err;
    }
    uint8_t *p = buf->data + begin;
    p[0] = (uint8_t)(len >> 24);
    p[1] = (uint8_t)(len >> 16);
    p[2] = (uint8_t)(len >> 8);
    p[3] = (uint8_t)len;
    return 0;
}

int ipc_msg_pack(struct ipc_buf *buf, const struct ipc_msg *m, struct err_msg *why)
{
    return ipc_body_pack(buf, m->type, &m->u, why);
}
