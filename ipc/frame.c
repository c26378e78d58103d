#include "ipc/frame.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { BASE_BYTES = 64 << 10 };

void ipc_frame_reader_init(struct ipc_frame_reader *r, size_t max_payload)
{
    *r = (struct ipc_frame_reader){.limit = max_payload};
}

void ipc_frame_reader_deinit(struct ipc_frame_reader *r)
{
    free(r->buf);
    *r = (struct ipc_frame_reader){0};
}

void ipc_frame_reader_set_limit(struct ipc_frame_reader *r, size_t max_payload)
{
    r->limit = max_payload;
}

static size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t announced(const uint8_t *p)
{
    return (size_t)p[0] << 24 | (size_t)p[1] << 16 | (size_t)p[2] << 8 | p[3];
}

static void release_held(struct ipc_frame_reader *r)
{
    r->begin += r->held;
    r->held = 0;
    if (r->begin == r->end)
        r->begin = r->end = 0;
}

/* Bytes the buffer should have now. A frame already announced (and so judged by the last call of
 * ipc_frame_reader_next) lets it double towards the frame's size; otherwise the base is enough. */
static size_t wanted(const struct ipc_frame_reader *r)
{
    size_t have = r->end - r->begin;
    size_t base = min_size(BASE_BYTES, r->limit + IPC_FRAME_HEADER);
    if (have < IPC_FRAME_HEADER)
        return base;
    size_t frame = announced(r->buf + r->begin) + IPC_FRAME_HEADER;
    if (frame <= base || frame > r->limit + IPC_FRAME_HEADER)
        return base;
    return have < base ? base : min_size(frame, 2 * have);
}

int ipc_frame_reader_space(struct ipc_frame_reader *r, uint8_t **room, size_t *len)
{
    release_held(r);
    size_t want = wanted(r), have = r->end - r->begin;
    if (want <= have) /* only for a caller that leaves complete frames in the buffer */
        want = have + 1;
    if (r->begin > 0 && r->cap - r->begin < want) { /* at most once a frame */
        memmove(r->buf, r->buf + r->begin, have);
        r->begin = 0;
        r->end = have;
    }
    bool shrink = have == 0 && r->cap > BASE_BYTES; /* a large frame has gone */
    if (r->cap < want || shrink) {
        uint8_t *p = realloc(r->buf, want);
        if (!p)
            return -ENOMEM;
        r->buf = p;
        r->cap = want;
    }
    *room = r->buf + r->end;
    *len = r->cap - r->end;
    return 0;
}

void ipc_frame_reader_commit(struct ipc_frame_reader *r, size_t n)
{
    ASSERT(n <= r->cap - r->end);
    r->end += n;
}

int ipc_frame_reader_next(struct ipc_frame_reader *r, const uint8_t **payload, size_t *len,
                          struct err_msg *why)
{
    release_held(r);
    size_t have = r->end - r->begin;
    if (have < IPC_FRAME_HEADER)
        return 0;
    size_t n = announced(r->buf + r->begin);
    if (n == 0)
        return err_set(why, ERR_PROTOCOL, "frame of length 0");
    if (n > r->limit)
        return err_set(why, ERR_PROTOCOL, "frame of %zu bytes, the limit is %zu", n, r->limit);
    if (have - IPC_FRAME_HEADER < n)
        return 0;
    *payload = r->buf + r->begin + IPC_FRAME_HEADER;
    *len = n;
    r->held = IPC_FRAME_HEADER + n;
    return 1;
}
