/* The listening side of protocol v1, on a libuv loop that the caller runs. It speaks the protocol
 * (handshake, limits, framing, field checks, PING) and leaves every meaning to the handlers: it
 * knows no requests, so ids are scoped by whoever handles SUBMIT. Everything happens on the loop's
 * thread; nothing blocks.
 *
 * A connection is a number that is never used twice: functions given the number of one that is gone
 * do nothing, so it may be kept anywhere. `close` is called once for every `open`: from the loop,
 * or from inside ipc_conn_close and ipc_server_close, but never from inside a send function. Sends
 * are collected and go out in one write per loop iteration.
 *
 * Slow readers: above soft_limit unsent bytes PROGRESS is dropped, and TOKENS are held and merged
 * per request (DONE and ERROR push them out first); above hard_limit bytes, or when a byte has
 * waited longer than max_lag_ms, the connection ends with ERROR SLOW_CONSUMER and close(...,
 * ERR_SLOW_CONSUMER). What one ipc_send_tokens call adds may exceed the hard limit when nothing was
 * above it before, and DONE is always taken.
 *
 * Shared secret: where `token` is set, every TCP client must send it in HELLO, on whatever address;
 * a non-loopback TCP listener is refused without one. Unix sockets rely on mode 0600.
 *
 * Creating a server makes the process ignore SIGPIPE if its disposition was the default. */
#ifndef IPC_SERVER_H
#define IPC_SERVER_H

#include "core/err.h"
#include "ipc/message.h"

#include <uv.h>

struct ipc_server;

struct ipc_handlers {
    void *ctx;
    /* After a successful handshake. */
    void (*open)(void *ctx, uint64_t conn, const struct ipc_hello *m);
    /* Messages are borrowed for the call and already valid (token ids against info.vocab too). */
    void (*submit)(void *ctx, uint64_t conn, const struct ipc_submit *m);
    void (*cancel)(void *ctx, uint64_t conn, const struct ipc_cancel *m);
    void (*stats)(void *ctx, uint64_t conn, uint64_t tag);
    void (*health)(void *ctx, uint64_t conn, uint64_t tag);
    void (*drain)(void *ctx, uint64_t conn, const struct ipc_drain *m);
    void (*shutdown)(void *ctx, uint64_t conn, uint64_t tag);
    void (*reset_prefix_cache)(void *ctx, uint64_t conn, uint64_t tag);
    /* May be NULL: unsent bytes fell under the soft limit after they had been above it. */
    void (*writable)(void *ctx, uint64_t conn);
    /* user is what ipc_conn_set_user left there. reason: UV_EOF (peer closed), another UV_E* (it
     * broke), ERR_PROTOCOL, ERR_SLOW_CONSUMER, or UV_ECANCELED (ipc_conn_close, ipc_server_close).
     * Sends to conn are already no-ops. */
    void (*close)(void *ctx, uint64_t conn, void *user, int reason);
};

/* Zero in a limit means its default. */
struct ipc_server_config {
    struct ipc_handlers handlers; /* all but `writable` required */
    struct ipc_hello_ok info;     /* copied; the fields marked there are set by the server */
    const char *token;            /* shared secret for TCP, at most IPC_TOKEN_BYTES; NULL: none */
    int32_t max_connections;      /* 256 */
    int64_t max_frame;            /* IPC_FRAME_MAX */
    int64_t soft_limit;           /* 256 KiB */
    int64_t hard_limit;           /* 4 MiB */
    int32_t max_lag_ms;           /* 10000 */
    int32_t handshake_ms;         /* 5000 */
    int32_t send_buffer;          /* SO_SNDBUF of accepted sockets; 0: the system's. For tests. */
};

struct ipc_server_stats {
    int32_t n_connections;
    uint64_t accepted, refused, protocol_errors, slow_consumers;
    uint64_t frames_in, frames_out, bytes_in, bytes_out;
    uint64_t unsent_bytes; /* now, over all connections */
};

MUST_CHECK int ipc_server_create(struct ipc_server **out, uv_loop_t *loop,
                                 const struct ipc_server_config *cfg, struct err_msg *why);
/* address: "unix:PATH", "tcp:HOST:PORT", "tcp:PORT" (127.0.0.1), "tcp:[v6]:PORT"; port 0 lets the
 * system choose. May be called several times. A stale socket file is replaced; one that somebody
 * listens on is UV_EADDRINUSE. why names the address. Resolving a host name blocks: call before the
 * loop runs. */
MUST_CHECK int ipc_server_listen(struct ipc_server *s, const char *address, struct err_msg *why);
/* The TCP port of the i-th listener; 0 for a Unix socket or when there is no such listener. */
int ipc_server_port(const struct ipc_server *s, int32_t i);
/* Says GOAWAY to every connection; those made from now on hear it after HELLO_OK too. */
void ipc_server_goaway(struct ipc_server *s, const char *reason, int64_t deadline_ms);
/* Stops listening, removes socket files, sends what can be sent within linger_ms (0: nothing is
 * waited for), closes every connection (the close handler is called from inside), then calls cb
 * from the loop when s is freed. cb may be NULL. Call once. */
void ipc_server_close(struct ipc_server *s, int32_t linger_ms, void (*cb)(void *arg), void *arg);
void ipc_server_get_stats(const struct ipc_server *s, struct ipc_server_stats *out);
/* Replaces info for handshakes from now on. */
void ipc_server_set_info(struct ipc_server *s, const struct ipc_hello_ok *info);

void ipc_conn_set_user(struct ipc_server *s, uint64_t conn, void *user);
void *ipc_conn_user(const struct ipc_server *s, uint64_t conn); /* NULL when gone */
bool ipc_conn_alive(const struct ipc_server *s, uint64_t conn);
bool ipc_conn_writable(const struct ipc_server *s, uint64_t conn); /* under the soft limit */
/* Sends what is queued, then closes; the close handler is called from inside. */
void ipc_conn_close(struct ipc_server *s, uint64_t conn);

/* Each queues one message; the struct and what it points to are copied. */
void ipc_send_accepted(struct ipc_server *s, uint64_t conn, const char *id);
void ipc_send_progress(struct ipc_server *s, uint64_t conn, const struct ipc_progress *m);
void ipc_send_tokens(struct ipc_server *s, uint64_t conn, const struct ipc_tokens *m);
void ipc_send_done(struct ipc_server *s, uint64_t conn, const struct ipc_done *m);
/* General form; id and code are the caller's to fill. */
void ipc_send_error(struct ipc_server *s, uint64_t conn, const struct ipc_error *m);
/* The usual one: code, text and retryable from a project error. id and why may be NULL. */
void ipc_send_failure(struct ipc_server *s, uint64_t conn, const char *id, int err,
                      const struct err_msg *why, int64_t retry_after_ms);
/* The same for a control message. */
void ipc_send_control_failure(struct ipc_server *s, uint64_t conn, uint64_t tag, int err,
                              const struct err_msg *why);
void ipc_send_stats_ok(struct ipc_server *s, uint64_t conn, const struct ipc_stats_ok *m);
void ipc_send_health_ok(struct ipc_server *s, uint64_t conn, const struct ipc_health_ok *m);
void ipc_send_ok(struct ipc_server *s, uint64_t conn, uint64_t tag);
void ipc_send_goaway(struct ipc_server *s, uint64_t conn, const struct ipc_goaway *m);

#endif
