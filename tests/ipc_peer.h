/* What the tests of ipc/ share: a raw client that can misbehave, driven from the thread that runs
 * the server's loop, so that every test is one thread and no test sleeps. */
#ifndef TESTS_IPC_PEER_H
#define TESTS_IPC_PEER_H

#include "ipc/frame.h"
#include "ipc/server.h"

enum { PEER_LOG = 20000 };

/* One end of a connection, speaking bytes. */
struct peer {
    int fd;
    struct ipc_frame_reader in;
    struct ipc_decoder *decoder;
    struct ipc_msg msg; /* the message read last */
    bool eof;
};

/* A loop, a server and what its handlers saw. */
struct world {
    uv_loop_t loop;
    struct ipc_server *server;
    char dir[64], unix_address[128];
    int n_open, n_close, n_submit, n_cancel, n_writable, closed;
    int last_reason;
    uint64_t conn; /* of the last open or submit */
    void *closed_user;
    struct ipc_hello hello;
    struct ipc_submit submit; /* without its tokens */
    bool answer;              /* SUBMIT gets ACCEPTED, TOKENS, DONE at once */
    bool close_in_submit;
};

/* handlers and info are filled in; limits come from cfg. Listens on a Unix socket. */
void world_start(struct world *w, const struct ipc_server_config *cfg);
void world_stop(struct world *w);
/* Runs the loop while done(arg) is false, for at most 5 s of real time. */
bool world_run(struct world *w, bool (*done)(void *arg), void *arg);
/* Runs the loop n times without waiting. */
void world_turn(struct world *w, int n);

void peer_open(struct peer *p, struct world *w, const char *address);
void peer_close(struct peer *p);
void peer_send(struct world *w, struct peer *p, const void *bytes, size_t len);
void peer_send_msg(struct world *w, struct peer *p, enum ipc_type type, const void *body);
/* Runs the loop until the peer has its next message (true) or the stream's end (false). */
bool peer_read(struct world *w, struct peer *p);
/* The same, and the message must be of this type. */
void peer_expect(struct world *w, struct peer *p, enum ipc_type type);
/* ERROR with this code, then the stream's end. */
void peer_expect_end(struct world *w, struct peer *p, enum ipc_code code);
void peer_hello(struct world *w, struct peer *p, const char *token);
/* A SUBMIT of n tokens under this id. */
void peer_submit(struct world *w, struct peer *p, const char *id, int32_t n);

#endif
