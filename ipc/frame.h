/* Frames: `u32 big-endian length` + that many payload bytes, cut out of a byte stream that may be
 * torn anywhere. The reader owns one buffer. It grows only for a frame whose announced length has
 * passed the limit, and then only as fast as bytes arrive (at most twice what was received, never
 * more than the frame), so a peer that announces much and sends nothing costs nothing. Payloads are
 * handed out in place. Allocation failure is an error, never an abort: the client library shares
 * this file. */
#ifndef IPC_FRAME_H
#define IPC_FRAME_H

#include "core/err.h"

#include <stddef.h>
#include <stdint.h>

enum {
    IPC_FRAME_HEADER = 4,
    IPC_HELLO_MAX = 4096,     /* longest first frame */
    IPC_FRAME_MIN = 64 << 10, /* smallest max_frame that either side may ask for */
    IPC_FRAME_MAX = 16 << 20, /* default max_frame */
    IPC_FRAME_CEILING = 1 << 30
};

/* Caller's storage; all fields private. */
struct ipc_frame_reader {
    uint8_t *buf;
    size_t cap, begin, end; /* unread bytes are [begin, end) */
    size_t limit;
    size_t held; /* bytes of the frame handed out last, released by the next call */
};

void ipc_frame_reader_init(struct ipc_frame_reader *r, size_t max_payload);
void ipc_frame_reader_deinit(struct ipc_frame_reader *r); /* accepts a zeroed reader */
/* Holds for frames whose header has not been judged yet. */
void ipc_frame_reader_set_limit(struct ipc_frame_reader *r, size_t max_payload);

/* Room to read into: at least one byte. Invalidates the payload handed out last. */
MUST_CHECK int ipc_frame_reader_space(struct ipc_frame_reader *r, uint8_t **room, size_t *len);
/* n bytes were read into the room. */
void ipc_frame_reader_commit(struct ipc_frame_reader *r, size_t n);
/* 1: *payload holds the next frame, valid until the next call on the reader; 0: more bytes are
 * needed; ERR_PROTOCOL: length 0 or above the limit. After an error the stream cannot be resumed.
 */
MUST_CHECK int ipc_frame_reader_next(struct ipc_frame_reader *r, const uint8_t **payload,
                                     size_t *len, struct err_msg *why);

#endif
