#include "calibration/export.h"

#include "calibration/import.h"
#include "calibration/pt_zip.h"
#include "calibration/thresholds_file.h"
#include "kvcache/kv_view.h"

#include <inttypes.h>
#include <string.h>

enum {
    MAX_BYTES = 4096,  /* of everything in the file but the tensor */
    ALIGN = 64,        /* of a member's data, as torch.save has it, for those who map the file */
    EXTRA_PAD = 0x4246 /* the extra field "FB" with which torch.save pads */
};

/* Bytes with room for all there is: sizes are bounded by IMPORT_MAX_LEVELS. */
struct text {
    unsigned char data[MAX_BYTES];
    size_t len;
};

static void put(struct text *p, const void *data, size_t len)
{
    ASSERT(len <= sizeof p->data - p->len);
    memcpy(p->data + p->len, data, len);
    p->len += len;
}

/* Little-endian; zeros beyond eight bytes. */
static void put_le(struct text *p, uint64_t v, int bytes)
{
    for (; bytes > 0; bytes--, v >>= 8) {
        const unsigned char byte = (unsigned char)v;
        put(p, &byte, 1);
    }
}

#define OPS(p, text) put(p, text, sizeof(text) - 1)

/* ---- the pickle, protocol 2 ---- */

static void put_string(struct text *p, const char *s)
{
    OPS(p, "X"); /* BINUNICODE */
    put_le(p, strlen(s), 4);
    put(p, s, strlen(s));
}

static void put_int(struct text *p, int32_t v)
{
    OPS(p, "J"); /* BININT */
    put_le(p, (uint32_t)v, 4);
}

static void put_field(struct text *p, const char *name, int32_t v)
{
    put_string(p, name);
    put_int(p, v);
}

/* A tensor of f32 over all of the storage data/0. */
static void put_tensor(struct text *p, const int32_t shape[4], int32_t n)
{
    int32_t stride = n;
    OPS(p, "ctorch._utils\n_rebuild_tensor_v2\n((");
    put_string(p, "storage");
    OPS(p, "ctorch\nFloatStorage\n");
    put_string(p, "0");
    put_string(p, "cpu");
    put_int(p, n);
    OPS(p, "tQ"); /* TUPLE, BINPERSID */
    put_int(p, 0);
    OPS(p, "(");
    for (int i = 0; i < 4; i++)
        put_int(p, shape[i]);
    OPS(p, "t(");
    for (int i = 0; i < 4; i++) {
        stride /= shape[i];
        put_int(p, stride);
    }
    /* requires_grad False, no hooks; REDUCE both */
    OPS(p, "t\x89"
           "ccollections\nOrderedDict\n)RtR");
}

static void put_pickle(struct text *p, const int32_t shape[4], int32_t n, const int32_t *k)
{
    OPS(p, "\x80\x02}("); /* PROTO, an open dict */
    put_string(p, "thresholds");
    put_tensor(p, shape, n);
    put_string(p, "k_values");
    OPS(p, "](");
    for (int32_t i = 0; i < shape[0]; i++)
        put_int(p, k[i]);
    OPS(p, "e");
    put_field(p, "max_num_blocks", shape[3]);
    put_field(p, "num_layers", shape[1]);
    put_field(p, "num_heads", shape[2]);
    put_field(p, "q_block_size", KV_BLOCK_TOKENS);
    put_field(p, "k_block_size", KV_PAGE_TOKENS);
    put_string(p, "aggregation_method");
    put_string(p, "mean");
    put_string(p, "shape_description");
    put_string(p, "[num_k_values, num_layers, num_heads, max_num_q_blocks]");
    OPS(p, "u.");
}

/* ---- the archive ---- */

struct member {
    const char *name;
    const void *data;
    size_t len;
    uint32_t crc, at, head; /* of the local header, which is so long */
};

static void put_sizes(struct text *p, const struct member *m)
{
    put_le(p, 0, 2); /* stored */
    put_le(p, 0, 4); /* time */
    put_le(p, m->crc, 4);
    put_le(p, m->len, 4);
    put_le(p, m->len, 4);
    put_le(p, strlen(m->name), 2);
}

/* Local header of a member at offset m->at, padded so that its data is aligned. */
static void put_local(struct text *p, struct member *m)
{
    const size_t bare = 30 + strlen(m->name) + 4;
    const size_t pad = (ALIGN - (m->at + bare) % ALIGN) % ALIGN;
    put_le(p, 0x04034b50, 4);
    put_le(p, 0, 4); /* version, flags */
    put_sizes(p, m);
    put_le(p, 4 + pad, 2);
    put(p, m->name, strlen(m->name));
    put_le(p, EXTRA_PAD, 2);
    put_le(p, pad, 2);
    for (size_t i = 0; i < pad; i++)
        OPS(p, "Z");
    m->head = (uint32_t)(bare + pad);
}

static void put_directory(struct text *p, const struct member *m, int n, uint32_t at)
{
    const size_t begin = p->len;
    for (int i = 0; i < n; i++) {
        put_le(p, 0x02014b50, 4);
        put_le(p, 0, 6); /* versions, flags */
        put_sizes(p, &m[i]);
        put_le(p, 0, 2);  /* extra */
        put_le(p, 0, 10); /* comment, disk, attributes */
        put_le(p, m[i].at, 4);
        put(p, m[i].name, strlen(m[i].name));
    }
    const size_t bytes = p->len - begin;
    put_le(p, 0x06054b50, 4);
    put_le(p, 0, 4); /* disks */
    put_le(p, (uint64_t)n, 2);
    put_le(p, (uint64_t)n, 2);
    put_le(p, bytes, 4);
    put_le(p, at, 4);
    put_le(p, 0, 2); /* comment */
}

/* Headers go to `text`, member by member, the directory last; parts alternates them with data. */
static int lay_out(struct text *text, struct member *m, int n, struct file_part *parts)
{
    uint32_t at = 0;
    for (int i = 0; i < n; i++) {
        const size_t begin = text->len;
        m[i].at = at;
        m[i].crc = pt_zip_crc32(m[i].data, m[i].len);
        put_local(text, &m[i]);
        *parts++ = (struct file_part){text->data + begin, text->len - begin};
        *parts++ = (struct file_part){m[i].data, m[i].len};
        at += m[i].head + (uint32_t)m[i].len;
    }
    const size_t begin = text->len;
    put_directory(text, m, n, at);
    *parts = (struct file_part){text->data + begin, text->len - begin};
    return 2 * n + 1;
}

int thresholds_export(const char *path, const struct attn_thresholds *t, const int32_t *k,
                      int32_t gate_rows, struct err_msg *why)
{
    const int32_t shape[] = {t->n_levels, t->n_layers, t->n_heads, t->n_blocks};
    const int64_t n = (int64_t)t->n_levels * t->level_stride;
    struct text pickle = {.len = 0}, headers = {.len = 0};
    struct file_part parts[9];

    ASSERT(t->n_levels <= IMPORT_MAX_LEVELS && t->head_stride == t->n_blocks &&
           t->level_stride == (int64_t)t->n_layers * t->n_heads * t->n_blocks);
    if (gate_rows != KV_BLOCK_TOKENS) {
        return err_set(why, ERR_UNSUPPORTED,
                       "%s: thresholds for %d rows; the reference implementation has %d", path,
                       gate_rows, KV_BLOCK_TOKENS);
    }
    if (n > INT32_MAX / (int64_t)sizeof(float))
        return err_set(why, ERR_UNSUPPORTED, "%s: %" PRId64 " thresholds are too many", path, n);
    put_pickle(&pickle, shape, (int32_t)n, k);
    struct member members[] = {
        {.name = "archive/data.pkl", .data = pickle.data, .len = pickle.len},
        {.name = "archive/byteorder", .data = "little", .len = 6},
        {.name = "archive/data/0", .data = t->t, .len = (size_t)n * sizeof(float)},
        {.name = "archive/version", .data = "3\n", .len = 2},
    };
    return thresholds_write_file(path, parts, lay_out(&headers, members, 4, parts), why);
}
