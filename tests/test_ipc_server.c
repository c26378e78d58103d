/* The server over real sockets: handshake, limits, isolation of connections, listening. */
#include "tests/test.h"

#include "tests/ipc_peer.h"

#include "core/log.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static const struct ipc_server_config defaults;

static bool all_closed(void *arg)
{
    const struct world *w = arg;
    return w->n_close == w->n_open;
}

static void hello_ok_is_right(const struct ipc_hello_ok *m, int32_t max_connections)
{
    assert_int_equal(m->proto_major, IPC_PROTO_MAJOR);
    assert_string_equal(m->model, "tiny");
    assert_int_equal(m->vocab, 100);
    assert_int_equal(m->max_connections, max_connections);
    assert_int_equal(m->max_frame, IPC_FRAME_MAX);
}

static void one_request(struct world *w, struct peer *p, const char *id)
{
    peer_submit(w, p, id, 64);
    peer_expect(w, p, IPC_ACCEPTED);
    assert_string_equal(p->msg.u.accepted.id, id);
    peer_expect(w, p, IPC_TOKENS);
    assert_string_equal(p->msg.u.tokens.id, id);
    assert_int_equal(p->msg.u.tokens.n_tokens, 1);
    peer_expect(w, p, IPC_DONE);
    assert_string_equal(p->msg.u.done.id, id);
    assert_int_equal(p->msg.u.done.prompt_tokens, 64);
}

static void test_unix_and_tcp(void **state)
{
    struct world w;
    struct peer a, b;
    struct stat st;
    char address[64];
    (void)state;
    world_start(&w, &defaults);
    w.answer = true;
    assert_ok(stat(w.unix_address + 5, &st));
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_ok(ipc_server_listen(w.server, "tcp:0", NULL));
    assert_true(ipc_server_port(w.server, 1) > 0);
    (void)snprintf(address, sizeof address, "tcp:127.0.0.1:%d", ipc_server_port(w.server, 1));
    peer_open(&a, &w, NULL);
    peer_open(&b, &w, address);
    peer_hello(&w, &a, NULL);
    hello_ok_is_right(&a.msg.u.hello_ok, 256);
    peer_hello(&w, &b, NULL);
    assert_int_equal(w.n_open, 2);
    assert_string_equal(w.hello.client, "peer");
    /* Both use the same id. */
    peer_submit(&w, &a, "same", 64);
    one_request(&w, &b, "same");
    peer_expect(&w, &a, IPC_ACCEPTED);
    peer_close(&a);
    one_request(&w, &b, "next");
    peer_close(&b);
    assert_true(world_run(&w, all_closed, &w));
    assert_int_equal(w.last_reason, UV_EOF);
    world_stop(&w);
    assert_true(access(w.unix_address + 5, F_OK) < 0);
}

static void test_control_verbs(void **state)
{
    struct world w;
    struct peer p;
    (void)state;
    world_start(&w, &defaults);
    peer_open(&p, &w, NULL);
    peer_hello(&w, &p, NULL);
    peer_send_msg(&w, &p, IPC_STATS, &(struct ipc_control){5});
    peer_expect(&w, &p, IPC_STATS_OK);
    assert_int_equal(p.msg.u.stats_ok.tag, 5);
    assert_int_equal(p.msg.u.stats_ok.n_stats, 2);
    assert_string_equal(p.msg.u.stats_ok.stats[0].name, "requests");
    assert_int_equal(p.msg.u.stats_ok.stats[0].i, 7);
    peer_send_msg(&w, &p, IPC_HEALTH, &(struct ipc_control){6});
    peer_expect(&w, &p, IPC_HEALTH_OK);
    assert_true(p.msg.u.health_ok.live);
    peer_send_msg(&w, &p, IPC_DRAIN, &(struct ipc_drain){7, 100});
    peer_expect(&w, &p, IPC_OK);
    assert_int_equal(p.msg.u.control.tag, 7);
    peer_send_msg(&w, &p, IPC_SHUTDOWN, &(struct ipc_control){8});
    peer_expect(&w, &p, IPC_ERROR);
    assert_int_equal(p.msg.u.error.tag, 8);
    peer_send_msg(&w, &p, IPC_RESET_PREFIX_CACHE, &(struct ipc_control){9});
    peer_expect(&w, &p, IPC_OK);
    peer_send_msg(&w, &p, IPC_PING, &(struct ipc_control){10});
    peer_expect(&w, &p, IPC_PONG);
    assert_int_equal(p.msg.u.control.tag, 10);
    const char *ids[] = {"a", "b"};
    peer_send_msg(&w, &p, IPC_CANCEL, &(struct ipc_cancel){2, ids});
    peer_send_msg(&w, &p, IPC_PING, &(struct ipc_control){11});
    peer_expect(&w, &p, IPC_PONG);
    assert_int_equal(w.n_cancel, 2);
    peer_close(&p);
    world_stop(&w);
}

#define RAW(s) (s), sizeof(s) - 1

static void test_bad_first_frames(void **state)
{
    static const struct {
        const char *bytes;
        size_t len;
        enum ipc_code code;
    } cases[] = {
        {RAW("\x00\x00\x00\x03\x92\x09\x80"), IPC_CODE_PROTOCOL},         /* PING */
        {RAW("\x00\x00\x00\x03\x92\x63\x80"), IPC_CODE_PROTOCOL},         /* unknown type */
        {RAW("\x00\x00\x00\x05\x92\x01\x81\x00\x02"), IPC_CODE_VERSION},  /* major 2 */
        {RAW("\x00\x00\x00\x03\x92\x01\x80"), IPC_CODE_INVALID_ARGUMENT}, /* no version */
        {RAW("\x00\x00\x10\x01"), IPC_CODE_PROTOCOL},                     /* 4097 bytes */
        {RAW("\x00\x00\x00\x00"), IPC_CODE_PROTOCOL},
        {RAW("\x00\x00\x00\x02\xc1\xc1"), IPC_CODE_PROTOCOL},
        {RAW("GET / HTTP/1.1\r\nHost: x\r\n\r\n"), IPC_CODE_PROTOCOL},
    };
    struct world w;
    (void)state;
    world_start(&w, &defaults);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct peer p;
        peer_open(&p, &w, NULL);
        peer_send(&w, &p, cases[i].bytes, cases[i].len);
        peer_expect_end(&w, &p, cases[i].code);
        assert_true(p.msg.type == 0 && p.eof);
        peer_close(&p);
    }
    assert_int_equal(w.n_open, 0);
    assert_int_equal(w.n_close, 0);
    world_stop(&w);
}

static void test_handshake_timeout(void **state)
{
    struct world w;
    struct peer slow, good;
    (void)state;
    world_start(&w, &(struct ipc_server_config){.handshake_ms = 50});
    w.answer = true;
    peer_open(&slow, &w, NULL);
    peer_open(&good, &w, NULL);
    peer_send(&w, &slow, "\x00\x00", 2);
    peer_hello(&w, &good, NULL);
    peer_expect_end(&w, &slow, IPC_CODE_PROTOCOL);
    one_request(&w, &good, "1");
    peer_close(&slow);
    peer_close(&good);
    world_stop(&w);
}

static void test_torn_handshake(void **state)
{
    static const char bytes[] = "\x00\x00\x00\x05\x92\x01\x81\x00\x01"
                                "\x00\x00\x00\x05\x92\x09\x81\x00\x07";
    struct world w;
    (void)state;
    world_start(&w, &defaults);
    for (size_t cut = 1; cut < sizeof bytes - 1; cut++) {
        struct peer p;
        peer_open(&p, &w, NULL);
        peer_send(&w, &p, bytes, cut);
        world_turn(&w, 3);
        peer_send(&w, &p, bytes + cut, sizeof bytes - 1 - cut);
        peer_expect(&w, &p, IPC_HELLO_OK);
        peer_expect(&w, &p, IPC_PONG);
        peer_close(&p);
    }
    world_stop(&w);
}

/* What is refused without closing, and what closes: always this connection alone. */
static void test_bad_messages(void **state)
{
    static const struct {
        const char *bytes;
        size_t len;
        enum ipc_code code;
        const char *id, *text;
    } soft[] = {
        {RAW("\x00\x00\x00\x03\x92\x63\x80"), IPC_CODE_UNSUPPORTED, "", "unknown message type 99"},
        {RAW("\x00\x00\x00\x06\x92\x42\x81\x00\xa1x"), IPC_CODE_UNSUPPORTED, "", "ACCEPTED"},
        {RAW("\x00\x00\x00\x06\x92\x02\x81\x00\xa1x"), IPC_CODE_INVALID_ARGUMENT, "x", "tokens:"},
        {RAW("\x00\x00\x00\x09\x92\x02\x82\x00\xa1x\x01\x91\x64"), IPC_CODE_INVALID_ARGUMENT, "x",
         "tokens[0]: 100"},
        {RAW("\x00\x00\x00\x0b\x92\x02\x83\x00\xa1x\x01\x91\x05\x02\xff"),
         IPC_CODE_INVALID_ARGUMENT, "x", "max_tokens:"},
        {RAW("\x00\x00\x00\x05\x92\x03\x81\x00\x01"), IPC_CODE_INVALID_ARGUMENT, "", "ids:"},
    };
    static const struct {
        const char *bytes;
        size_t len;
    } hard[] = {
        {RAW("\x00\x00\x00\x05\x92\x01\x81\x00\x01")}, /* a second HELLO */
        {RAW("\x7f\xff\xff\xff")},
        {RAW("\x00\x00\x00\x01\xc0")},
        {RAW("\x00\x00\x00\x06\x92\x02\x81\x00\xa1\xff")},
    };
    struct world w;
    struct peer good, p;
    (void)state;
    world_start(&w, &defaults);
    w.answer = true;
    peer_open(&good, &w, NULL);
    peer_hello(&w, &good, NULL);
    peer_open(&p, &w, NULL);
    peer_hello(&w, &p, NULL);
    for (size_t i = 0; i < sizeof soft / sizeof soft[0]; i++) {
        peer_send(&w, &p, soft[i].bytes, soft[i].len);
        peer_expect(&w, &p, IPC_ERROR);
        assert_int_equal(p.msg.u.error.code, soft[i].code);
        assert_string_equal(p.msg.u.error.id, soft[i].id);
        assert_non_null(strstr(p.msg.u.error.message, soft[i].text));
    }
    assert_int_equal(w.n_submit, 0);
    one_request(&w, &p, "after");
    peer_close(&p);
    for (size_t i = 0; i < sizeof hard / sizeof hard[0]; i++) {
        peer_open(&p, &w, NULL);
        peer_hello(&w, &p, NULL);
        peer_send(&w, &p, hard[i].bytes, hard[i].len);
        peer_expect_end(&w, &p, IPC_CODE_PROTOCOL);
        assert_int_equal(w.last_reason, ERR_PROTOCOL);
        peer_close(&p);
        one_request(&w, &good, "good");
    }
    peer_close(&good);
    world_stop(&w);
}

static void test_random_bytes(void **state)
{
    struct rng rng = test_rng("server bytes", 5);
    struct world w;
    struct peer good;
    uint8_t junk[600];
    (void)state;
    world_start(&w, &defaults);
    w.answer = true;
    peer_open(&good, &w, NULL);
    peer_hello(&w, &good, NULL);
    for (int i = 0; i < 300; i++) {
        struct peer p;
        int32_t n = rng_range(&rng, 1, sizeof junk);
        for (int32_t j = 0; j < n; j++)
            junk[j] = (uint8_t)rng_u64(&rng);
        junk[0] = junk[1] = 0;
        peer_open(&p, &w, NULL);
        if (rng_range(&rng, 0, 1))
            peer_hello(&w, &p, NULL);
        peer_send(&w, &p, junk, (size_t)n);
        world_turn(&w, rng_range(&rng, 0, 3));
        peer_close(&p);
        if (i % 20 == 0)
            one_request(&w, &good, "good");
    }
    peer_close(&good);
    world_stop(&w);
}

static void test_auth(void **state)
{
    struct world w;
    struct peer p;
    char address[64];
    struct ipc_hello h;
    struct err_msg why;
    (void)state;
    world_start(&w, &(struct ipc_server_config){.token = "secret"});
    assert_ok(ipc_server_listen(w.server, "tcp:0", NULL));
    (void)snprintf(address, sizeof address, "tcp:127.0.0.1:%d", ipc_server_port(w.server, 1));
    const char *const wrong[] = {"", "secre", "secrets", "Secret"};
    for (int i = 0; i < 4; i++) {
        ipc_body_init(IPC_HELLO, &h);
        h.proto_major = IPC_PROTO_MAJOR;
        (void)snprintf(h.token, sizeof h.token, "%s", wrong[i]);
        peer_open(&p, &w, address);
        peer_send_msg(&w, &p, IPC_HELLO, &h);
        peer_expect_end(&w, &p, IPC_CODE_AUTH);
        peer_close(&p);
    }
    assert_int_equal(w.n_open, 0);
    peer_open(&p, &w, address);
    peer_hello(&w, &p, "secret");
    peer_close(&p);
    peer_open(&p, &w, NULL); /* the Unix socket has its file mode */
    peer_hello(&w, &p, NULL);
    peer_close(&p);
    assert_ok(ipc_server_listen(w.server, "tcp:0.0.0.0:0", &why));
    world_stop(&w);
}

static void test_connection_limit(void **state)
{
    struct world w;
    struct peer p[2], more;
    (void)state;
    world_start(&w, &(struct ipc_server_config){.max_connections = 2});
    w.answer = true;
    for (int i = 0; i < 2; i++) {
        peer_open(&p[i], &w, NULL);
        peer_hello(&w, &p[i], NULL);
    }
    for (int i = 0; i < 5; i++) {
        peer_open(&more, &w, NULL);
        peer_expect_end(&w, &more, IPC_CODE_TOO_MANY_CONNECTIONS);
        peer_close(&more);
    }
    one_request(&w, &p[0], "1");
    peer_close(&p[0]);
    world_turn(&w, 5);
    peer_open(&more, &w, NULL);
    peer_hello(&w, &more, NULL);
    one_request(&w, &more, "1");
    peer_close(&more);
    peer_close(&p[1]);
    struct ipc_server_stats stats;
    ipc_server_get_stats(w.server, &stats);
    assert_int_equal(stats.refused, 5);
    world_stop(&w);
}

/* The peer dies with requests open: close comes once with the user's pointer, the number is dead,
 * and its slot's next owner is another connection. */
static void test_dead_peer(void **state)
{
    struct world w;
    struct peer p, q;
    struct ipc_done d = {.id = "1"};
    int user;
    (void)state;
    world_start(&w, &defaults);
    peer_open(&p, &w, NULL);
    peer_hello(&w, &p, NULL);
    uint64_t conn = w.conn;
    ipc_conn_set_user(w.server, conn, &user);
    assert_ptr_equal(ipc_conn_user(w.server, conn), &user);
    peer_submit(&w, &p, "1", 10);
    world_turn(&w, 3);
    assert_int_equal(w.n_submit, 1);
    peer_close(&p);
    for (int i = 0; i < 100; i++) { /* until the server notices, and after */
        ipc_send_done(w.server, conn, &d);
        world_turn(&w, 1);
    }
    assert_int_equal(w.n_close, 1);
    assert_ptr_equal(w.closed_user, &user);
    assert_false(ipc_conn_alive(w.server, conn));
    assert_null(ipc_conn_user(w.server, conn));
    peer_open(&q, &w, NULL);
    peer_hello(&w, &q, NULL);
    assert_true(w.conn != conn);
    ipc_send_done(w.server, conn, &d);
    ipc_conn_close(w.server, conn);
    peer_send_msg(&w, &q, IPC_PING, &(struct ipc_control){1});
    peer_expect(&w, &q, IPC_PONG);
    peer_close(&q);
    world_stop(&w);
}

static void test_close_from_handler(void **state)
{
    struct world w;
    struct peer p;
    (void)state;
    world_start(&w, &defaults);
    w.close_in_submit = w.answer = true;
    peer_open(&p, &w, NULL);
    peer_hello(&w, &p, NULL);
    for (int i = 0; i < 3; i++) /* one write or several: only the first is handled */
        peer_submit(&w, &p, "1", 10);
    assert_false(peer_read(&w, &p));
    assert_int_equal(w.n_submit, 1);
    assert_int_equal(w.last_reason, UV_ECANCELED);
    peer_close(&p);
    world_stop(&w);
}

static void test_goaway_and_close(void **state)
{
    struct world w;
    struct peer p, late;
    (void)state;
    world_start(&w, &defaults);
    peer_open(&p, &w, NULL);
    peer_hello(&w, &p, NULL);
    ipc_server_goaway(w.server, "maintenance", 1000);
    peer_expect(&w, &p, IPC_GOAWAY);
    assert_string_equal(p.msg.u.goaway.reason, "maintenance");
    peer_open(&late, &w, NULL);
    peer_hello(&w, &late, NULL);
    peer_expect(&w, &late, IPC_GOAWAY);
    assert_true(late.msg.u.goaway.deadline_ms <= 1000);
    ipc_send_done(w.server, w.conn, &(struct ipc_done){.id = "last"});
    ipc_server_close(w.server, 1000, NULL, NULL);
    w.closed = 1;
    assert_int_equal(w.n_close, 2);
    peer_expect(&w, &late, IPC_DONE);
    assert_false(peer_read(&w, &late));
    assert_false(peer_read(&w, &p));
    peer_close(&p);
    peer_close(&late);
    (void)uv_run(&w.loop, UV_RUN_DEFAULT);
    world_stop(&w);
}

/* --- many connections at random --- */

enum { N_PEERS = 64, N_STEPS = 6000 };

struct crowd {
    struct world w;
    struct rng rng;
    struct peer peers[N_PEERS];
    bool open[N_PEERS];
    uint64_t conns[256]; /* numbers seen, most of them dead */
    int n_conns;
};

static uint64_t any_conn(struct crowd *c)
{
    return c->n_conns ? c->conns[rng_range(&c->rng, 0, c->n_conns - 1)] : 77;
}

static void step_peer(struct crowd *c, int i)
{
    struct peer *p = &c->peers[i];
    uint8_t junk[64];
    if (!c->open[i]) {
        peer_open(p, &c->w, NULL);
        c->open[i] = true;
        if (rng_range(&c->rng, 0, 9)) {
            struct ipc_hello h = {.proto_major = 1, .max_frame = IPC_FRAME_MAX};
            peer_send_msg(&c->w, p, IPC_HELLO, &h);
        }
        return;
    }
    switch (rng_range(&c->rng, 0, 7)) {
    case 0:
        peer_close(p);
        c->open[i] = false;
        break;
    case 1:
        for (size_t k = 0; k < sizeof junk; k++)
            junk[k] = (uint8_t)(rng_u64(&c->rng) & (k < 2 ? 0 : 255));
        peer_send(&c->w, p, junk, (size_t)rng_range(&c->rng, 1, sizeof junk));
        break;
    case 2: peer_send_msg(&c->w, p, IPC_PING, &(struct ipc_control){7}); break;
    default: peer_submit(&c->w, p, "x", rng_range(&c->rng, 1, 4000)); break;
    }
}

/* What an engine does to connections, whatever their state. */
static void step_engine(struct crowd *c)
{
    int32_t ids[500] = {0};
    struct ipc_tokens t = {.id = "x", .n_tokens = rng_range(&c->rng, 1, 500), .tokens = ids};
    struct ipc_done d = {.id = "x"};
    uint64_t conn = any_conn(c);
    switch (rng_range(&c->rng, 0, 9)) {
    case 0: ipc_conn_close(c->w.server, conn); break;
    case 1: ipc_send_done(c->w.server, conn, &d); break;
    case 2: ipc_send_failure(c->w.server, conn, "x", ERR_NUMERIC, NULL, 5); break;
    default:
        for (int k = rng_range(&c->rng, 1, 60); k > 0; k--)
            ipc_send_tokens(c->w.server, conn, &t);
        break;
    }
}

/* Peers that come, go, babble and do not read, beside an engine that talks to living and dead
 * connections: every open has its close, nothing leaks, nothing is used after its end. */
static void test_crowd(void **state)
{
    static struct crowd c;
    struct ipc_server_stats stats;
    (void)state;
    c.rng = test_rng("crowd", 6);
    world_start(&c.w, &(struct ipc_server_config){.max_connections = N_PEERS / 2,
                                                  .soft_limit = 8 << 10,
                                                  .hard_limit = 64 << 10,
                                                  .send_buffer = 4096});
    c.w.answer = true;
    for (int step = 0; step < N_STEPS; step++) {
        int n = c.w.n_open;
        step_peer(&c, rng_range(&c.rng, 0, N_PEERS - 1));
        step_engine(&c);
        world_turn(&c.w, rng_range(&c.rng, 0, 2));
        if (c.w.n_open > n) {
            c.conns[c.w.n_open % 256] = c.w.conn;
            c.n_conns = c.w.n_open < 256 ? c.w.n_open : 256;
        }
    }
    ipc_server_get_stats(c.w.server, &stats);
    assert_true(stats.n_connections <= N_PEERS / 2);
    assert_true(stats.slow_consumers > 0 && stats.refused > 0 && stats.protocol_errors > 0);
    assert_true(c.w.n_open > 200 && c.w.n_submit > 200);
    for (int i = 0; i < N_PEERS; i++)
        if (c.open[i])
            peer_close(&c.peers[i]);
    world_stop(&c.w);
}

/* --- listening --- */

static void expect_refusal(struct world *w, const char *address, int err)
{
    struct err_msg why = {""};
    int rc = ipc_server_listen(w->server, address, &why);
    if (rc != err || !strstr(why.text, address))
        fail_msg("%s: %d (%s)", address, rc, why.text);
}

static int stale_socket(const char *path)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    (void)snprintf(sa.sun_path, sizeof sa.sun_path, "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_ok(bind(fd, (const struct sockaddr *)&sa, sizeof sa));
    return fd;
}

/* A listener too busy to take the probe is a listener all the same. */
static void test_busy_listener(void **state)
{
    struct world w;
    char text[128], path[96];
    int fds[8], n = 0, rc = 0;
    (void)state;
    world_start(&w, &defaults);
    (void)snprintf(path, sizeof path, "%s/busy", w.dir);
    (void)snprintf(text, sizeof text, "unix:%s", path);
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    (void)snprintf(sa.sun_path, sizeof sa.sun_path, "%s", path);
    int listener = stale_socket(path);
    assert_ok(listen(listener, 0));
    while (rc == 0 && n < 8) {
        fds[n] = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
        rc = connect(fds[n++], (const struct sockaddr *)&sa, sizeof sa);
    }
    assert_int_equal(rc, -1); /* the backlog is full */
    expect_refusal(&w, text, UV_EADDRINUSE);
    assert_int_equal(access(path, F_OK), 0);
    while (n > 0)
        (void)close(fds[--n]);
    (void)close(listener);
    (void)unlink(path);
    world_stop(&w);
}

static void test_listen_errors(void **state)
{
    struct world w;
    char text[256], path[96];
    (void)state;
    world_start(&w, &defaults);
    (void)snprintf(text, sizeof text, "unix:/tmp/%0200d", 0);
    expect_refusal(&w, text, UV_ENAMETOOLONG);
    expect_refusal(&w, "unix:", ERR_INVALID);
    expect_refusal(&w, "nonsense", ERR_INVALID);
    expect_refusal(&w, "tcp:127.0.0.1:99999", ERR_INVALID);
    expect_refusal(&w, "tcp:127.0.0.1:x", ERR_INVALID);
    expect_refusal(&w, "tcp:::1:80", ERR_INVALID);
    expect_refusal(&w, "tcp::80", ERR_INVALID);
    expect_refusal(&w, "tcp:0.0.0.0:0", ERR_CONFIG);
    expect_refusal(&w, "tcp:[::]:0", ERR_CONFIG);
    expect_refusal(&w, w.unix_address, UV_EADDRINUSE);
    (void)snprintf(text, sizeof text, "unix:%s/no/folder", w.dir);
    expect_refusal(&w, text, UV_EACCES);
    assert_ok(ipc_server_listen(w.server, "tcp:127.0.0.1:0", NULL));
    (void)snprintf(text, sizeof text, "tcp:127.0.0.1:%d", ipc_server_port(w.server, 1));
    expect_refusal(&w, text, UV_EADDRINUSE);
    /* A plain file is left alone; a socket that nobody listens on is replaced. */
    (void)snprintf(path, sizeof path, "%s/f", w.dir);
    (void)snprintf(text, sizeof text, "unix:%s", path);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    (void)fclose(f);
    expect_refusal(&w, text, UV_EEXIST);
    assert_ok(unlink(path));
    int fd = stale_socket(path);
    (void)close(fd);
    assert_ok(ipc_server_listen(w.server, text, NULL));
    world_stop(&w);
    assert_true(access(path, F_OK) < 0);
}

static void test_config_errors(void **state)
{
    struct ipc_server *s;
    struct err_msg why;
    uv_loop_t loop;
    struct world w;
    (void)state;
    world_start(&w, &defaults); /* for its handlers' shape only */
    world_stop(&w);
    assert_ok(uv_loop_init(&loop));
    struct ipc_server_config c = {.max_frame = 100};
    memset(&c.handlers, 0x11, sizeof c.handlers); /* never called */
    assert_int_equal(ipc_server_create(&s, &loop, &c, &why), ERR_CONFIG);
    assert_non_null(strstr(why.text, "max_frame"));
    c.max_frame = 0;
    c.max_connections = -1;
    assert_int_equal(ipc_server_create(&s, &loop, &c, &why), ERR_CONFIG);
    c.max_connections = 0;
    c.hard_limit = 10;
    assert_int_equal(ipc_server_create(&s, &loop, &c, &why), ERR_CONFIG);
    c.hard_limit = 0;
    c.token = "";
    assert_int_equal(ipc_server_create(&s, &loop, &c, &why), ERR_CONFIG);
    assert_null(s);
    assert_ok(uv_loop_close(&loop));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_unix_and_tcp),
        cmocka_unit_test(test_control_verbs),
        cmocka_unit_test(test_bad_first_frames),
        cmocka_unit_test(test_handshake_timeout),
        cmocka_unit_test(test_torn_handshake),
        cmocka_unit_test(test_bad_messages),
        cmocka_unit_test(test_random_bytes),
        cmocka_unit_test(test_auth),
        cmocka_unit_test(test_connection_limit),
        cmocka_unit_test(test_dead_peer),
        cmocka_unit_test(test_close_from_handler),
        cmocka_unit_test(test_goaway_and_close),
        cmocka_unit_test(test_crowd),
        cmocka_unit_test(test_listen_errors),
        cmocka_unit_test(test_busy_listener),
        cmocka_unit_test(test_config_errors),
    };
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
