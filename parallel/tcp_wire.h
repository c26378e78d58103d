/* The bytes of comm_tcp, and sockets with deadlines.
 *
 * All numbers are little-endian, as on every machine this runs on (checked at compile time).
 *   joining     follower: hello, fixed size          leader: welcome, fixed size
 *   afterwards  frames on the data connection: head, then head.len bytes
 *   heartbeat   single bytes: BEAT now and then, BYE before an orderly end
 * Sockets are non-blocking; every function here takes an absolute deadline, or -1 for none. */
#ifndef PARALLEL_TCP_WIRE_H
#define PARALLEL_TCP_WIRE_H

#include "core/err.h"

#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#    error "the wire format is little-endian"
#endif

enum {
    WIRE_MAGIC = 0x31434c53, /* "SLC1": changes with the format */
    WIRE_BUILD = 32,
    WIRE_TOKEN = 128,
    WIRE_WHY = 200,
};

enum wire_channel { WIRE_DATA = 1, WIRE_BEATS };
enum wire_kind { WIRE_GO = 1, WIRE_SHARE, WIRE_RESULT, WIRE_MESSAGE };
enum { WIRE_BEAT = 'b', WIRE_BYE = 'e' };

struct wire_hello {
    uint32_t magic;
    uint32_t channel;
    uint32_t rank, n_ranks;
    uint64_t max_floats, max_msg;
    char build[WIRE_BUILD]; /* version of the program, zero-padded */
    char token[WIRE_TOKEN]; /* zero-padded */
};

struct wire_welcome {
    uint32_t magic;
    int32_t code; /* 0: joined; otherwise an enum err, and why */
    char why[WIRE_WHY];
};

struct wire_head {
    uint32_t kind;
    uint32_t rank; /* of the sender */
    uint64_t tag;  /* what the sender believes the collective is */
    uint64_t len;
};

/* One of several transfers that run at once. */
struct wire_io {
    int fd;
    union { /* next byte */
        char *in;
        const char *out;
    };
    size_t left;
};

/* Runs all transfers to their end. 0, -ETIMEDOUT, or ERR_PEER when one connection ends or fails
 * (*failed, which may be NULL, is its index). */
MUST_CHECK int wire_read_all(struct wire_io *io, int n, int64_t deadline_us, int *failed);
MUST_CHECK int wire_write_all(struct wire_io *io, int n, int64_t deadline_us, int *failed);
MUST_CHECK int wire_read(int fd, void *buf, size_t len, int64_t deadline_us);
MUST_CHECK int wire_write(int fd, const void *buf, size_t len, int64_t deadline_us);

/* "HOST:PORT" or "[HOST]:PORT". */
MUST_CHECK int wire_listen(int *fd, const char *address, struct err_msg *why);
/* One try; -EAGAIN when nobody listens there (yet). */
MUST_CHECK int wire_connect(int *fd, const char *address, int64_t deadline_us, struct err_msg *why);
/* Non-blocking, not inherited, without delay. */
MUST_CHECK int wire_prepare(int fd);

#endif
