#include "tests/pt_case.h"

#include "calibration/pt_zip.h"

#include <stdlib.h>
#include <string.h>

void pt_bytes_add(struct pt_bytes *b, const void *data, size_t len)
{
    if (b->len + len > b->room) {
        b->room = 2 * (b->len + len);
        b->data = realloc(b->data, b->room);
        if (!b->data)
            abort();
    }
    if (len > 0)
        memcpy(b->data + b->len, data, len);
    b->len += len;
}

void pt_bytes_le(struct pt_bytes *b, uint64_t v, int bytes)
{
    for (int i = 0; i < bytes; i++) {
        const unsigned char byte = (unsigned char)(i < 8 ? v >> (8 * i) : 0);
        pt_bytes_add(b, &byte, 1);
    }
}

void pt_bytes_free(struct pt_bytes *b)
{
    free(b->data);
    *b = (struct pt_bytes){0};
}

/* ---- the archive ---------------------------------------------------------------------------- */

static void local_header(struct pt_bytes *out, const struct pt_case_member *m)
{
    pt_bytes_le(out, 0x04034b50, 4);
    pt_bytes_le(out, 0, 4); /* version, flags */
    pt_bytes_le(out, 0, 2); /* stored */
    pt_bytes_le(out, 0, 4); /* time */
    pt_bytes_le(out, pt_zip_crc32(m->data, m->len), 4);
    pt_bytes_le(out, m->len, 4);
    pt_bytes_le(out, m->len, 4);
    pt_bytes_le(out, strlen(m->name), 2);
    pt_bytes_le(out, 0, 2);
    pt_bytes_add(out, m->name, strlen(m->name));
    pt_bytes_add(out, m->data, m->len);
}

static void central_header(struct pt_bytes *out, const struct pt_case_member *m, size_t at,
                           bool zip64)
{
    pt_bytes_le(out, 0x02014b50, 4);
    pt_bytes_le(out, 0, 6); /* versions, flags */
    pt_bytes_le(out, 0, 2); /* stored */
    pt_bytes_le(out, 0, 4); /* time */
    pt_bytes_le(out, pt_zip_crc32(m->data, m->len), 4);
    pt_bytes_le(out, zip64 ? UINT32_MAX : m->len, 4);
    pt_bytes_le(out, zip64 ? UINT32_MAX : m->len, 4);
    pt_bytes_le(out, strlen(m->name), 2);
    pt_bytes_le(out, zip64 ? 28 : 0, 2); /* extra */
    pt_bytes_le(out, 0, 10);             /* comment, disk, attributes */
    pt_bytes_le(out, zip64 ? UINT32_MAX : at, 4);
    pt_bytes_add(out, m->name, strlen(m->name));
    if (zip64) {
        pt_bytes_le(out, 1, 2);
        pt_bytes_le(out, 24, 2);
        pt_bytes_le(out, m->len, 8);
        pt_bytes_le(out, m->len, 8);
        pt_bytes_le(out, at, 8);
    }
}

static void end64(struct pt_bytes *out, int n, size_t dir, size_t dir_bytes)
{
    const size_t at = out->len;
    pt_bytes_le(out, 0x06064b50, 4);
    pt_bytes_le(out, 44, 8);
    pt_bytes_le(out, 0, 4); /* versions */
    pt_bytes_le(out, 0, 8); /* disks */
    pt_bytes_le(out, (uint64_t)n, 8);
    pt_bytes_le(out, (uint64_t)n, 8);
    pt_bytes_le(out, dir_bytes, 8);
    pt_bytes_le(out, dir, 8);
    pt_bytes_le(out, 0x07064b50, 4);
    pt_bytes_le(out, 0, 4);
    pt_bytes_le(out, at, 8);
    pt_bytes_le(out, 1, 4);
}

void pt_case_zip(struct pt_bytes *out, const struct pt_case_member *m, int n, bool zip64)
{
    size_t *at = calloc((size_t)n + 1, sizeof *at);
    if (!at)
        abort();
    for (int i = 0; i < n; i++) {
        at[i] = out->len;
        local_header(out, &m[i]);
    }
    const size_t dir = out->len;
    for (int i = 0; i < n; i++)
        central_header(out, &m[i], at[i], zip64);
    const size_t dir_bytes = out->len - dir;
    free(at);
    if (zip64)
        end64(out, n, dir, dir_bytes);
    pt_bytes_le(out, 0x06054b50, 4);
    pt_bytes_le(out, 0, 4); /* disks */
    pt_bytes_le(out, (uint64_t)n, 2);
    pt_bytes_le(out, (uint64_t)n, 2);
    pt_bytes_le(out, zip64 ? UINT32_MAX : dir_bytes, 4);
    pt_bytes_le(out, zip64 ? UINT32_MAX : dir, 4);
    pt_bytes_le(out, 0, 2); /* comment */
}

/* ---- the pickle ----------------------------------------------------------------------------- */

#define OPS(p, text) pt_bytes_add(p, text, sizeof(text) - 1)

void pt_case_begin(struct pt_bytes *p)
{
    OPS(p, "\x80\x02}(");
}

void pt_case_end(struct pt_bytes *p)
{
    OPS(p, "u.");
}

void pt_case_text(struct pt_bytes *p, const char *text)
{
    OPS(p, "X");
    pt_bytes_le(p, strlen(text), 4);
    pt_bytes_add(p, text, strlen(text));
}

void pt_case_int(struct pt_bytes *p, int64_t v)
{
    if (v >= INT32_MIN && v <= INT32_MAX) {
        OPS(p, "J");
        pt_bytes_le(p, (uint64_t)v, 4);
    } else {
        OPS(p, "\x8a\x08");
        pt_bytes_le(p, (uint64_t)v, 8);
    }
}

void pt_case_ints(struct pt_bytes *p, const int64_t *v, int n, bool tuple)
{
    if (tuple)
        OPS(p, "(");
    else
        OPS(p, "](");
    for (int i = 0; i < n; i++)
        pt_case_int(p, v[i]);
    if (tuple)
        OPS(p, "t");
    else
        OPS(p, "e");
}

// NOLINTNEXTLINE(readability-function-size): the parameters are the tensor
void pt_case_tensor(struct pt_bytes *p, const char *storage, const char *key, int64_t n_storage,
                    int64_t offset, const int64_t *shape, const int64_t *stride, int n_dims)
{
    OPS(p, "ctorch._utils\n_rebuild_tensor_v2\n((");
    pt_case_text(p, "storage");
    OPS(p, "ctorch\n");
    pt_bytes_add(p, storage, strlen(storage));
    OPS(p, "\n");
    pt_case_text(p, key);
    pt_case_text(p, "cpu");
    pt_case_int(p, n_storage);
    OPS(p, "tQ");
    pt_case_int(p, offset);
    pt_case_ints(p, shape, n_dims, true);
    pt_case_ints(p, stride, n_dims, true);
    OPS(p, "\x89"
           "ccollections\nOrderedDict\n)RtR");
}
