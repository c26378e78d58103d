/* What a step sends to a device: packed piece by piece into pinned memory and copied in one go to
 * the same offsets of a twin in device memory. A structure that is packed may point at another by
 * its device address. */
#ifndef CORE_UPLOAD_H
#define CORE_UPLOAD_H

#include "core/err.h"

#include <stddef.h>

enum { UPLOAD_ALIGN = 64 };

struct upload {
    char *host, *dev; /* [bytes] */
    size_t used, bytes;
};

struct upload_piece {
    void *host, *dev;
};

static inline size_t upload_round(size_t bytes)
{
    return (bytes + UPLOAD_ALIGN - 1) / UPLOAD_ALIGN * UPLOAD_ALIGN;
}

/* The caller has sized it: running out is a programmer's error. */
static inline struct upload_piece upload_take(struct upload *u, size_t bytes)
{
    ASSERT(u->host && bytes <= u->bytes - u->used);
    const struct upload_piece p = {u->host + u->used, u->dev + u->used};
    u->used += upload_round(bytes);
    return p;
}

#endif
