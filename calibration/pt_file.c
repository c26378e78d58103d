#include "calibration/pt_file.h"

#include "calibration/pt_zip.h"
#include "core/dtype.h"
#include "core/mem.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are stored as they are");

struct pt_file {
    char *name;
    struct pt_zip zip;
    struct pt_pickle *pickle;
};

static size_t dtype_size(enum pt_dtype t)
{
    static const size_t bytes[] = {8, 4, 2, 2, 8, 4};
    return bytes[t];
}

const char *pt_dtype_name(enum pt_dtype t)
{
    static const char *const names[] = {"f64", "f32", "f16", "bf16", "i64", "i32"};
    return names[t];
}

int pt_file_parse(struct pt_file **out, const void *data, size_t len, const char *name,
                  struct err_msg *why)
{
    struct pt_file *f = mem_zalloc(1, sizeof *f);
    int err;
    f->name = mem_strdup(name);
    TRY_GOTO(err, pt_zip_parse(&f->zip, data, len, name, why), fail);
    const struct pt_member *pickle = pt_zip_find(&f->zip, "data.pkl");
    const struct pt_member *order = pt_zip_find(&f->zip, "byteorder");
    if (!pickle) {
        err = err_set(why, ERR_FORMAT, "%s: there is no data.pkl in it", name);
        goto fail;
    }
    if (order && (order->len != 6 || memcmp(order->data, "little", 6) != 0)) {
        err = err_set(why, ERR_UNSUPPORTED, "%s: byteorder is not little", name);
        goto fail;
    }
    TRY_GOTO(err, pt_pickle_parse(&f->pickle, pickle->data, pickle->len, name, why), fail);
    *out = f;
    return 0;
fail:
    pt_file_close(f);
    return err;
}

void pt_file_close(struct pt_file *f)
{
    if (!f)
        return;
    pt_pickle_free(f->pickle);
    mem_free(f->name);
    mem_free(f);
}

/* ---- fields --------------------------------------------------------------------------------- */

bool pt_file_has(const struct pt_file *f, const char *field)
{
    return pt_pickle_find(f->pickle, field) != -1;
}

static int find(const struct pt_file *f, const char *field, int32_t *value, struct err_msg *why)
{
    *value = pt_pickle_find(f->pickle, field);
    if (*value < 0) {
        return err_set(why, ERR_FORMAT, "%s: %s is %s", f->name, field,
                       *value == -1 ? "missing" : "there twice");
    }
    return 0;
}

static int wrong_kind(const struct pt_file *f, const char *field, int32_t value, const char *want,
                      struct err_msg *why)
{
    return err_set(why, ERR_FORMAT, "%s: %s is %s, must be %s", f->name, field,
                   pt_kind_name(pt_pickle_kind(f->pickle, value)), want);
}

int pt_file_int(const struct pt_file *f, const char *field, int64_t *out, struct err_msg *why)
{
    int32_t value;
    TRY(find(f, field, &value, why));
    if (pt_pickle_kind(f->pickle, value) != PT_INT)
        return wrong_kind(f, field, value, "a number", why);
    *out = pt_pickle_int(f->pickle, value);
    return 0;
}

/* "[a, b]" */
static const char *dims_text(char *text, size_t size, const int64_t *dims, int n)
{
    size_t at = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < n && at < size; i++)
        at += (size_t)snprintf(text + at, size - at, "%s%" PRId64, i ? ", " : "", dims[i]);
    if (at < size)
        (void)snprintf(text + at, size - at, "]");
    return text;
}

/* The number of elements, or -1 where it is absurd; the strides must be the row-major ones, but
 * for dimensions of one element, whose stride means nothing. */
static int check_strides(const struct pt_file *f, const char *field, const struct pt_strided *s,
                         int64_t *n, struct err_msg *why)
{
    char shape[192];
    bool contiguous = true;
    dims_text(shape, sizeof shape, s->shape, s->n_dims);
    *n = 1;
    for (int i = s->n_dims - 1; i >= 0; i--) {
        contiguous = contiguous && (s->shape[i] == 1 || s->stride[i] == *n);
        if (__builtin_mul_overflow(*n, s->shape[i], n) || *n < 1)
            return err_set(why, ERR_FORMAT, "%s: %s has shape %s", f->name, field, shape);
    }
    if (!contiguous) {
        char stride[192];
        return err_set(why, ERR_UNSUPPORTED,
                       "%s: %s has shape %s and strides %s: not contiguous; save a copy", f->name,
                       field, shape, dims_text(stride, sizeof stride, s->stride, s->n_dims));
    }
    return 0;
}

int pt_file_tensor(const struct pt_file *f, const char *field, struct pt_tensor *out,
                   struct err_msg *why)
{
    int32_t value;
    int64_t n;
    char member[sizeof "data/" + PT_KEY_BYTES];
    TRY(find(f, field, &value, why));
    if (pt_pickle_kind(f->pickle, value) != PT_TENSOR)
        return wrong_kind(f, field, value, "a tensor", why);
    const struct pt_strided s = pt_pickle_tensor(f->pickle, value);
    const size_t size = dtype_size(s.dtype);
    TRY(check_strides(f, field, &s, &n, why));
    (void)snprintf(member, sizeof member, "data/%s", s.key);
    const struct pt_member *m = pt_zip_find(&f->zip, member);
    if (!m)
        return err_set(why, ERR_FORMAT, "%s: %s: there is no %s in it", f->name, field, member);
    if (m->len % size != 0 || (uint64_t)s.n_storage != m->len / size) {
        return err_set(why, ERR_FORMAT,
                       "%s: %s: %s has %zu bytes, must have %" PRId64 " numbers of %zu", f->name,
                       field, member, m->len, s.n_storage, size);
    }
    if (s.offset > s.n_storage || n > s.n_storage - s.offset) {
        return err_set(why, ERR_FORMAT,
                       "%s: %s: %" PRId64 " numbers from %" PRId64
                       " on are not in a storage of %" PRId64,
                       f->name, field, n, s.offset, s.n_storage);
    }
    *out = (struct pt_tensor){
        .dtype = s.dtype, .n_dims = s.n_dims, .n = n, .data = m->data + (size_t)s.offset * size};
    memcpy(out->shape, s.shape, sizeof out->shape);
    return 0;
}

float pt_tensor_f32(const struct pt_tensor *t, int64_t i)
{
    const unsigned char *p = t->data + (size_t)i * dtype_size(t->dtype);
    double d;
    uint16_t h;
    float f;
    switch (t->dtype) {
    case PT_F64: memcpy(&d, p, sizeof d); return (float)d;
    case PT_F16: memcpy(&h, p, sizeof h); return dtype_f16_f32(h);
    case PT_BF16: memcpy(&h, p, sizeof h); return dtype_bf16_f32(h);
    default:
        ASSERT(t->dtype == PT_F32);
        memcpy(&f, p, sizeof f);
        return f;
    }
}

/* ---- lists ---------------------------------------------------------------------------------- */

static int64_t tensor_int(const struct pt_tensor *t, int64_t i)
{
    int64_t wide;
    int32_t narrow;
    if (t->dtype == PT_I64) {
        memcpy(&wide, t->data + i * 8, sizeof wide);
        return wide;
    }
    memcpy(&narrow, t->data + i * 4, sizeof narrow);
    return narrow;
}

static int count_ints(const struct pt_file *f, const char *field, int64_t n, int32_t max,
                      struct err_msg *why)
{
    if (n >= 1 && n <= max)
        return 0;
    return err_set(why, ERR_FORMAT, "%s: %s has %" PRId64 " numbers, must have 1 to %d", f->name,
                   field, n, max);
}

static int ints_of_tensor(const struct pt_file *f, const char *field, int64_t *out, int32_t max,
                          int32_t *n, struct err_msg *why)
{
    struct pt_tensor t;
    TRY(pt_file_tensor(f, field, &t, why));
    if (t.n_dims != 1 || (t.dtype != PT_I64 && t.dtype != PT_I32)) {
        return err_set(why, ERR_FORMAT,
                       "%s: %s is a tensor of %d dimensions in %s, must be 1 in i64 or i32",
                       f->name, field, t.n_dims, pt_dtype_name(t.dtype));
    }
    TRY(count_ints(f, field, t.n, max, why));
    *n = (int32_t)t.n;
    for (int32_t i = 0; i < *n; i++)
        out[i] = tensor_int(&t, i);
    return 0;
}

int pt_file_ints(const struct pt_file *f, const char *field, int64_t *out, int32_t max, int32_t *n,
                 struct err_msg *why)
{
    int32_t value;
    TRY(find(f, field, &value, why));
    const enum pt_kind kind = pt_pickle_kind(f->pickle, value);
    if (kind == PT_TENSOR)
        return ints_of_tensor(f, field, out, max, n, why);
    if (kind != PT_LIST && kind != PT_TUPLE)
        return wrong_kind(f, field, value, "a list of numbers", why);
    int32_t *items = mem_zalloc((size_t)max, sizeof *items);
    *n = pt_pickle_items(f->pickle, value, items, max);
    int err = count_ints(f, field, *n, max, why);
    for (int32_t i = 0; i < *n && err == 0; i++) {
        if (pt_pickle_kind(f->pickle, items[i]) == PT_INT)
            out[i] = pt_pickle_int(f->pickle, items[i]);
        else
            err = err_set(why, ERR_FORMAT, "%s: %s[%d] is no number", f->name, field, i);
    }
    mem_free(items);
    return err;
}
