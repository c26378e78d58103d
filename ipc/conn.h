/* One connection of the server: internal to ipc/server.c and ipc/conn*.c.
 *
 *   HANDSHAKE --HELLO--> OPEN --conn_end--> CLOSING --last bytes out, peer's end or timer--> CLOSED
 *
 * Output: messages gather in `out`; a flush hands what the socket takes at once to the kernel and
 * the rest to libuv as `flight`, of which there is one at a time. A connection that must end while
 * its owner's caller is on the stack is only doomed; the flush phase of the loop ends it. Memory
 * dies in the close callbacks. */
#ifndef IPC_CONN_H
#define IPC_CONN_H

#include "core/list.h"
#include "ipc/frame.h"
#include "ipc/server.h"

enum { CONN_LINGER_MS = 1000 }; /* for the last words */

enum conn_state { CONN_HANDSHAKE, CONN_OPEN, CONN_CLOSING, CONN_CLOSED };

struct conn {
    struct ipc_server *s;
    struct list link;  /* in s->conns from creation to the close callback */
    struct list dirty; /* in s->dirty while there is something to flush or it is doomed */
    uint64_t id;       /* 0 after the slot was given back */
    enum conn_state state;
    bool is_tcp;
    union {
        uv_handle_t handle;
        uv_stream_t stream;
        uv_tcp_t tcp;
        uv_pipe_t pipe;
    } h;
    uv_timer_t timer; /* handshake, then lag, then linger */
    int n_handles;
    void *user;

    struct ipc_frame_reader in;
    struct ipc_buf out, flight;
    uint64_t out_since_ms; /* when the first byte of out was queued */
    uv_write_t write;
    uv_shutdown_t shutdown;
    bool writing, shutting;
    int doom; /* < 0: ends with this reason in the next flush phase */

    size_t peer_max_frame;
    struct list held; /* struct held, in order of arrival */
    size_t held_bytes;
    bool was_full; /* has been above the soft limit since `writable` was last called */
};

struct conn_slot {
    struct conn *conn;
    uint32_t generation;
};

struct ipc_server {
    uv_loop_t *loop;
    struct ipc_server_config cfg;
    char token[IPC_TOKEN_BYTES + 1];
    struct ipc_decoder *decoder;
    struct list listeners, conns, dirty;
    struct conn_slot *slots; /* [cfg.max_connections] */
    int32_t n_slots_used, n_closing;
    uv_check_t check; /* both flush: after polling, and before it for what timers queued */
    uv_prepare_t prepare;
    int n_handles;
    bool closing, going_away;
    int32_t linger_ms;
    struct ipc_goaway goaway;
    uint64_t goaway_until_ms;
    void (*on_closed)(void *arg);
    void *on_closed_arg;
    struct ipc_server_stats stats;
    char discard[4096]; /* what closing connections still send */
};

/* Takes the pending connection of a listener. */
void conn_accept(struct ipc_server *s, uv_stream_t *listener, bool is_tcp);
/* Stops the connection and calls the close handler; its last bytes get linger_ms; < 0: none are
 * sent. */
void conn_end(struct conn *c, int reason, int32_t linger_ms);
/* Says ERROR first. */
void conn_fail(struct conn *c, int err, const struct err_msg *why);
/* A closing connection gets no more time than this. */
void conn_hurry(struct conn *c, int32_t linger_ms);
/* A closing connection: ends our side once everything has been written. */
void conn_finish(struct conn *c);

/* conn_in.c: one payload of an open or shaking connection. */
/* Bytes the peer has not taken yet. */
size_t conn_unsent(const struct conn *c);
void conn_handle(struct conn *c, const uint8_t *payload, size_t len);

/* conn_out.c */
/* NULL unless open and not doomed. */
struct conn *conn_find(const struct ipc_server *s, uint64_t id);
void conn_queue(struct conn *c, enum ipc_type type, const void *body);
void conn_queue_error(struct conn *c, const char *id, uint64_t tag, int err,
                      const struct err_msg *why);
/* Hands out to the kernel or to libuv; dooms the connection on failure. */
void conn_write(struct conn *c);
void conn_doom(struct conn *c, int reason);
void conn_drop_held(struct conn *c);
/* The flush phase of the loop. */
void server_flush(struct ipc_server *s);

/* server.c: one of the handles that s counts has closed. */
void server_handle_closed(struct ipc_server *s);

#endif
