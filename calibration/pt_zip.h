/* The members of a zip archive as torch.save writes one: every member stored, the central directory
 * at the end, with or without zip64 records. Reads bytes in memory and opens nothing: a member's
 * name is only ever compared. Refused, with the archive and the member named: compressed or
 * encrypted members, several disks, a comment, members that overlap or reach into the directory,
 * names that differ from their local header's, lie outside the archive's one folder, occur twice or
 * climb ("..", "/", "\"), and content whose CRC-32 is another. Inside calibration/ only.
 * Source: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3. */
#ifndef CALIBRATION_PT_ZIP_H
#define CALIBRATION_PT_ZIP_H

#include "core/err.h"

#include <stddef.h>
#include <stdint.h>

enum { PT_ZIP_MAX_MEMBERS = 256 };

struct pt_member {
    const char *name; /* without the archive's folder; not terminated */
    size_t name_len;
    const unsigned char *data; /* into the archive */
    size_t len;
};

struct pt_zip {
    struct pt_member members[PT_ZIP_MAX_MEMBERS];
    int32_t n;
};

/* Borrows data, which must outlive `out`; `name` stands for the file in messages. */
MUST_CHECK int pt_zip_parse(struct pt_zip *out, const void *data, size_t len, const char *name,
                            struct err_msg *why);
/* NULL when there is none. */
const struct pt_member *pt_zip_find(const struct pt_zip *z, const char *name);
uint32_t pt_zip_crc32(const void *data, size_t len);

#endif
