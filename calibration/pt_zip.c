#include "calibration/pt_zip.h"

#include <inttypes.h>
#include <stdbool.h>
#include <string.h>

enum {
    END_SIG = 0x06054b50,
    END_BYTES = 22,
    LOCATOR_SIG = 0x07064b50,
    LOCATOR_BYTES = 20,
    END64_SIG = 0x06064b50,
    END64_BYTES = 56,
    CENTRAL_SIG = 0x02014b50,
    CENTRAL_BYTES = 46,
    LOCAL_SIG = 0x04034b50,
    LOCAL_BYTES = 30,
    FLAGS_KNOWN = 0x0808, /* sizes follow the data; names are UTF-8 */
    FLAG_ENCRYPTED = 1,
    EXTRA_ZIP64 = 1
};

struct archive {
    const unsigned char *data;
    size_t len;
    const char *name;
    struct err_msg *why;
    uint64_t n, dir, dir_bytes; /* the central directory */
    const char *folder;         /* of the first member, with its slash */
    size_t folder_len;
    uint64_t end; /* of the last member's data */
};

/* What the central directory says of a member. */
struct entry {
    const unsigned char *name;
    size_t name_len;
    uint32_t flags, method, crc;
    uint64_t stored, size, at;
    char shown[64]; /* the name, for messages */
};

static uint64_t le(const unsigned char *p, int bytes)
{
    uint64_t v = 0;
    for (int i = 0; i < bytes; i++)
        v |= (uint64_t)p[i] << (8 * i);
    return v;
}

/* Half a byte at a time: 64 bytes of table, and fast enough for files of megabytes. */
uint32_t pt_zip_crc32(const void *data, size_t len)
{
    static const uint32_t table[16] = {0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac,
                                       0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
                                       0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c,
                                       0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    const unsigned char *p = data;
    uint32_t c = 0xffffffff;
    for (size_t i = 0; i < len; i++) {
        c = table[(c ^ p[i]) & 15] ^ (c >> 4);
        c = table[(c ^ (uint32_t)(p[i] >> 4)) & 15] ^ (c >> 4);
    }
    return ~c;
}

static int bad(const struct archive *a, const char *what)
{
    return err_set(a->why, ERR_FORMAT, "%s: %s", a->name, what);
}

static int bad_member(const struct archive *a, const struct entry *e, int err, const char *what)
{
    return err_set(a->why, err, "%s: member %s: %s", a->name, e->shown, what);
}

/* ---- where the central directory is --------------------------------------------------------- */

static int read_end64(struct archive *a, size_t locator)
{
    const unsigned char *p = a->data + locator;
    if (locator < END64_BYTES || le(p + 8, 8) != locator - END64_BYTES)
        return bad(a, "the zip64 end record is not before its locator");
    if (le(p + 4, 4) != 0 || le(p + 16, 4) != 1)
        return bad(a, "the archive spans several disks");
    p = a->data + locator - END64_BYTES;
    if (le(p, 4) != END64_SIG || le(p + 4, 8) != END64_BYTES - 12)
        return bad(a, "damaged zip64 end record");
    if (le(p + 16, 8) != 0 || le(p + 24, 8) != le(p + 32, 8))
        return bad(a, "the archive spans several disks");
    a->n = le(p + 32, 8);
    a->dir_bytes = le(p + 40, 8);
    a->dir = le(p + 48, 8);
    return 0;
}

/* The end record is the file's last 22 bytes; a locator of the zip64 one may precede it. */
static int read_end(struct archive *a)
{
    if (a->len < END_BYTES || le(a->data + a->len - END_BYTES, 4) != END_SIG) {
        return bad(a, "no zip archive: it is cut short, has something after its end, or was "
                      "written by a torch before 1.6");
    }
    size_t end = a->len - END_BYTES, locator = end >= LOCATOR_BYTES ? end - LOCATOR_BYTES : 0;
    const unsigned char *p = a->data + end;
    if (le(p + 4, 4) != 0 || le(p + 8, 2) != le(p + 10, 2))
        return bad(a, "the archive spans several disks");
    if (le(p + 20, 2) != 0)
        return bad(a, "the archive has a comment");
    a->n = le(p + 10, 2);
    a->dir_bytes = le(p + 12, 4);
    a->dir = le(p + 16, 4);
    if (locator > 0 && le(a->data + locator, 4) == LOCATOR_SIG) {
        TRY(read_end64(a, locator));
        end = locator - END64_BYTES;
    }
    if (a->dir > end || a->dir_bytes != end - a->dir)
        return bad(a, "the central directory does not end at the end record");
    if (a->n < 1 || a->n > PT_ZIP_MAX_MEMBERS) {
        return err_set(a->why, ERR_FORMAT, "%s: %" PRIu64 " members, must be 1 to %d", a->name,
                       a->n, PT_ZIP_MAX_MEMBERS);
    }
    return 0;
}

/* ---- members -------------------------------------------------------------------------------- */

/* The zip64 extra field holds, in this order, those of size, stored size and offset that did not
 * fit. */
static int read_extra(const struct archive *a, struct entry *e, const unsigned char *p, size_t len)
{
    uint64_t *const wide[] = {&e->size, &e->stored, &e->at};
    while (len >= 4) {
        const size_t n = (size_t)le(p + 2, 2);
        size_t used = 0;
        if (n > len - 4)
            break;
        for (int i = 0; i < 3 && le(p, 2) == EXTRA_ZIP64; i++) {
            if (*wide[i] != UINT32_MAX)
                continue;
            if (n - used < 8)
                return bad_member(a, e, ERR_FORMAT, "damaged zip64 field");
            *wide[i] = le(p + 4 + used, 8);
            used += 8;
        }
        p += 4 + n;
        len -= 4 + n;
    }
    return len ? bad_member(a, e, ERR_FORMAT, "damaged extra field") : 0;
}

static void show_name(struct entry *e)
{
    size_t n = e->name_len < sizeof e->shown - 1 ? e->name_len : sizeof e->shown - 1;
    for (size_t i = 0; i < n; i++)
        e->shown[i] = (char)(e->name[i] > ' ' && e->name[i] < 127 ? e->name[i] : '?');
    e->shown[n] = '\0';
}

/* Reads the entry at *at of the directory and moves past it. */
static int read_entry(const struct archive *a, struct entry *e, uint64_t *at)
{
    const uint64_t left = a->dir + a->dir_bytes - *at;
    const unsigned char *p = a->data + *at;
    if (left < CENTRAL_BYTES || le(p, 4) != CENTRAL_SIG)
        return bad(a, "damaged central directory");
    const uint64_t extra = le(p + 30, 2), comment = le(p + 32, 2);
    *e = (struct entry){.name = p + CENTRAL_BYTES,
                        .name_len = (size_t)le(p + 28, 2),
                        .flags = (uint32_t)le(p + 8, 2),
                        .method = (uint32_t)le(p + 10, 2),
                        .crc = (uint32_t)le(p + 16, 4),
                        .stored = le(p + 20, 4),
                        .size = le(p + 24, 4),
                        .at = le(p + 42, 4)};
    if (CENTRAL_BYTES + e->name_len + extra + comment > left)
        return bad(a, "damaged central directory");
    show_name(e);
    TRY(read_extra(a, e, e->name + e->name_len, (size_t)extra));
    *at += CENTRAL_BYTES + e->name_len + extra + comment;
    if (e->flags & FLAG_ENCRYPTED)
        return bad_member(a, e, ERR_UNSUPPORTED, "encrypted");
    if (e->method != 0 || e->stored != e->size)
        return bad_member(a, e, ERR_UNSUPPORTED, "compressed; torch.save stores");
    if (e->flags & ~(uint32_t)FLAGS_KNOWN || le(p + 34, 2) != 0)
        return bad_member(a, e, ERR_UNSUPPORTED, "unknown flags");
    return 0;
}

/* Folder and path without anything that a file system would read as a way out. */
static int check_name(struct archive *a, const struct entry *e)
{
    const char *name = (const char *)e->name;
    const char *slash = memchr(name, '/', e->name_len);
    if (!slash || slash == name || memchr(name, '\\', e->name_len) ||
        memchr(name, '\0', e->name_len) || memmem(name, e->name_len, "..", 2))
        return bad_member(a, e, ERR_FORMAT, "not a name that torch.save gives");
    if (!a->folder) {
        a->folder = name;
        a->folder_len = (size_t)(slash - name) + 1;
    }
    if (e->name_len <= a->folder_len || memcmp(name, a->folder, a->folder_len) != 0)
        return bad_member(a, e, ERR_FORMAT, "not in the folder of the others");
    return 0;
}

/* The member's bytes: behind its local header, which must be of the same file. */
static int find_data(struct archive *a, const struct entry *e, struct pt_member *m)
{
    if (e->at < a->end || e->at > a->dir || a->dir - e->at < LOCAL_BYTES)
        return bad_member(a, e, ERR_FORMAT, "overlaps another or the directory");
    const unsigned char *p = a->data + e->at;
    const uint64_t head = LOCAL_BYTES + le(p + 26, 2) + le(p + 28, 2);
    if (le(p, 4) != LOCAL_SIG || head > a->dir - e->at || le(p + 26, 2) != e->name_len ||
        memcmp(p + LOCAL_BYTES, e->name, e->name_len) != 0 || le(p + 6, 2) != e->flags ||
        le(p + 8, 2) != e->method)
        return bad_member(a, e, ERR_FORMAT, "its header disagrees with the directory");
    if (e->size > a->dir - e->at - head)
        return bad_member(a, e, ERR_FORMAT, "reaches into the directory");
    a->end = e->at + head + e->size;
    *m = (struct pt_member){.name = (const char *)e->name + a->folder_len,
                            .name_len = e->name_len - a->folder_len,
                            .data = p + head,
                            .len = (size_t)e->size};
    const uint32_t crc = pt_zip_crc32(m->data, m->len);
    if (crc != e->crc) {
        return err_set(a->why, ERR_FORMAT, "%s: member %s: CRC-32 is %08" PRIx32 ", not %08" PRIx32,
                       a->name, e->shown, crc, e->crc);
    }
    return 0;
}

static bool same_name(const struct pt_member *a, const struct pt_member *b)
{
    return a->name_len == b->name_len && memcmp(a->name, b->name, a->name_len) == 0;
}

int pt_zip_parse(struct pt_zip *out, const void *data, size_t len, const char *name,
                 struct err_msg *why)
{
    struct archive a = {.data = data, .len = len, .name = name, .why = why};
    out->n = 0;
    TRY(read_end(&a));
    uint64_t at = a.dir;
    for (uint64_t i = 0; i < a.n; i++) {
        struct entry e;
        struct pt_member *m = &out->members[i];
        TRY(read_entry(&a, &e, &at));
        TRY(check_name(&a, &e));
        TRY(find_data(&a, &e, m));
        for (uint64_t j = 0; j < i; j++) {
            if (same_name(&out->members[j], m))
                return bad_member(&a, &e, ERR_FORMAT, "is there twice");
        }
    }
    if (at != a.dir + a.dir_bytes)
        return bad(&a, "damaged central directory");
    out->n = (int32_t)a.n;
    return 0;
}

const struct pt_member *pt_zip_find(const struct pt_zip *z, const char *name)
{
    const struct pt_member want = {.name = name, .name_len = strlen(name)};
    for (int32_t i = 0; i < z->n; i++) {
        if (same_name(&z->members[i], &want))
            return &z->members[i];
    }
    return NULL;
}
