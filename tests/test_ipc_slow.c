/* Readers that fall behind: tokens are held and merged, nothing is lost or repeated; too far
 * behind, the connection ends with SLOW_CONSUMER and nobody else notices. */
#include "tests/test.h"

#include "tests/ipc_peer.h"

#include "core/log.h"

enum { SNDBUF = 4096, N_REQUESTS = 3 };

static const struct ipc_server_config small = {
    .soft_limit = 8 << 10, .hard_limit = 64 << 10, .send_buffer = SNDBUF};

/* One token of request r; its value is its index. */
static void send_token(struct world *w, int r, int64_t seq, bool logprob)
{
    int32_t token = (int32_t)seq;
    struct ipc_logprob lp = {.token = token, .logprob = -1, .n_top = 1, .top_ids = {7}};
    struct ipc_tokens m = {.seq = seq, .n_tokens = 1, .tokens = &token};
    m.logprobs = logprob ? &lp : NULL;
    (void)snprintf(m.id, sizeof m.id, "r%d", r);
    ipc_send_tokens(w->server, w->conn, &m);
}

static void send_done(struct world *w, int r)
{
    struct ipc_done m = {.reason = IPC_REASON_LENGTH, .stop_token = -1};
    (void)snprintf(m.id, sizeof m.id, "r%d", r);
    ipc_send_done(w->server, w->conn, &m);
}

/* Checks one TOKENS message against what its request has had so far. */
static void check_tokens(const struct ipc_tokens *m, int64_t next[N_REQUESTS], bool logprobs)
{
    int r = m->id[1] - '0';
    assert_int_equal(m->seq, next[r]);
    for (int32_t i = 0; i < m->n_tokens; i++, next[r]++) {
        assert_int_equal(m->tokens[i], next[r]);
        assert_true((m->logprobs != NULL) == logprobs);
        if (logprobs)
            assert_int_equal(m->logprobs[i].token, next[r]);
    }
}

static void merged_stream(bool logprobs)
{
    enum { N = 2000 };
    struct world w;
    struct peer p;
    int64_t next[N_REQUESTS] = {0};
    int n_messages = 0, n_done = 0;
    world_start(&w, &(struct ipc_server_config){
                        .soft_limit = 8 << 10, .hard_limit = 4 << 20, .send_buffer = SNDBUF});
    peer_open(&p, &w, NULL);
    peer_hello(&w, &p, NULL);
    for (int i = 0; i < N; i++) {
        for (int r = 0; r < N_REQUESTS; r++)
            send_token(&w, r, i, logprobs);
        if (i % 7 == 0)
            world_turn(&w, 1);
    }
    assert_false(ipc_conn_writable(w.server, w.conn));
    for (int r = 0; r < N_REQUESTS; r++)
        send_done(&w, r);
    while (n_done < N_REQUESTS) {
        assert_true(peer_read(&w, &p));
        n_messages++;
        if (p.msg.type == IPC_TOKENS) {
            check_tokens(&p.msg.u.tokens, next, logprobs);
        } else {
            assert_int_equal(p.msg.type, IPC_DONE);
            assert_int_equal(next[p.msg.u.done.id[1] - '0'], N); /* nothing comes after DONE */
            n_done++;
        }
    }
    assert_true(n_messages < N_REQUESTS * N / 2); /* merged */
    world_turn(&w, 5);
    assert_true(ipc_conn_writable(w.server, w.conn));
    assert_true(w.n_writable > 0);
    assert_int_equal(w.n_close, 0);
    peer_close(&p);
    world_stop(&w);
}

static void test_merging(void **state)
{
    (void)state;
    merged_stream(false);
    merged_stream(true);
}

/* Held tokens leave when the reader catches up, without a further message to push them. */
static void test_held_tokens_leave(void **state)
{
    struct world w;
    struct peer p;
    int64_t next[N_REQUESTS] = {0};
    (void)state;
    world_start(&w, &small);
    peer_open(&p, &w, NULL);
    peer_hello(&w, &p, NULL);
    int64_t sent = 0;
    while (ipc_conn_writable(w.server, w.conn)) {
        send_token(&w, 0, sent++, false);
        world_turn(&w, 1);
    }
    for (int i = 0; i < 100; i++)
        send_token(&w, 0, sent++, false);
    while (next[0] < sent) {
        peer_expect(&w, &p, IPC_TOKENS);
        check_tokens(&p.msg.u.tokens, next, false);
    }
    peer_close(&p);
    world_stop(&w);
}

/* Reads to the end: whole messages, the last one ERROR SLOW_CONSUMER. Returns their number. */
static int expect_slow_end(struct world *w, struct peer *p)
{
    enum ipc_type last = 0;
    int n = 0;
    while (peer_read(w, p)) {
        n++;
        assert_true(last != IPC_ERROR);
        last = p->msg.type;
        if (last == IPC_ERROR)
            assert_int_equal(p->msg.u.error.code, IPC_CODE_SLOW_CONSUMER);
    }
    assert_int_equal(last, IPC_ERROR);
    return n;
}

static void test_hard_limit(void **state)
{
    struct world w;
    struct peer slow, good;
    (void)state;
    world_start(&w, &small);
    w.answer = true;
    peer_open(&good, &w, NULL);
    peer_hello(&w, &good, NULL);
    peer_open(&slow, &w, NULL);
    peer_hello(&w, &slow, NULL);
    w.answer = false;
    int n_sent = 0;
    for (int i = 0; i < 200000 && w.n_close == 0; i++, n_sent++) {
        send_token(&w, 0, i, false);
        send_done(&w, 1);
        world_turn(&w, i % 50 == 0);
    }
    assert_int_equal(w.n_close, 1);
    assert_int_equal(w.last_reason, ERR_SLOW_CONSUMER);
    assert_false(ipc_conn_alive(w.server, w.conn));
    assert_true(expect_slow_end(&w, &slow) < n_sent); /* what was not on its way is dropped */
    w.answer = true;
    peer_submit(&w, &good, "1", 5);
    peer_expect(&w, &good, IPC_ACCEPTED);
    struct ipc_server_stats stats;
    ipc_server_get_stats(w.server, &stats);
    assert_int_equal(stats.slow_consumers, 1);
    peer_close(&slow);
    peer_close(&good);
    world_stop(&w);
}

static bool has_closed(void *arg)
{
    return ((struct world *)arg)->n_close > 0;
}

static void test_lag(void **state)
{
    struct world w;
    struct peer p;
    (void)state;
    world_start(&w, &(struct ipc_server_config){
                        .soft_limit = 8 << 10, .max_lag_ms = 50, .send_buffer = SNDBUF});
    peer_open(&p, &w, NULL);
    peer_hello(&w, &p, NULL);
    for (int i = 0; i < 5000; i++)
        send_token(&w, i % N_REQUESTS, i, false);
    assert_true(world_run(&w, has_closed, &w));
    assert_int_equal(w.last_reason, ERR_SLOW_CONSUMER);
    (void)expect_slow_end(&w, &p);
    peer_close(&p);
    world_stop(&w);
}

/* A peer that never reads again cannot keep its connection: the last words have a time limit. */
static void test_never_reads(void **state)
{
    struct world w;
    struct peer p;
    (void)state;
    world_start(&w, &small);
    peer_open(&p, &w, NULL);
    peer_hello(&w, &p, NULL);
    for (int i = 0; i < 200000 && w.n_close == 0; i++) {
        ipc_send_accepted(w.server, w.conn, "r0");
        world_turn(&w, i % 50 == 0);
    }
    assert_int_equal(w.last_reason, ERR_SLOW_CONSUMER);
    world_stop(&w); /* does not wait for it */
    peer_close(&p);
}

/* One message may be larger than the hard limit when the reader is not behind, and is cut to the
 * frames that the client accepts. */
static void test_large_result(void **state)
{
    enum { N = 100000 };
    static int32_t ids[N];
    static struct ipc_logprob lp[N];
    struct world w;
    struct peer p;
    struct ipc_hello h;
    int64_t next[N_REQUESTS] = {0};
    (void)state;
    for (int32_t i = 0; i < N; i++) {
        ids[i] = i;
        lp[i] = (struct ipc_logprob){.token = i, .n_top = 2};
    }
    world_start(&w, &small);
    peer_open(&p, &w, NULL);
    ipc_body_init(IPC_HELLO, &h);
    h.proto_major = IPC_PROTO_MAJOR;
    h.max_frame = IPC_FRAME_MIN;
    peer_send_msg(&w, &p, IPC_HELLO, &h);
    peer_expect(&w, &p, IPC_HELLO_OK);
    ipc_frame_reader_set_limit(&p.in, IPC_FRAME_MIN);
    for (int pass = 0; pass < 2; pass++) {
        struct ipc_tokens m = {.id = "r0", .n_tokens = N, .tokens = ids};
        m.logprobs = pass ? lp : NULL;
        next[0] = 0;
        ipc_send_tokens(w.server, w.conn, &m);
        send_done(&w, 0);
        while (next[0] < N) {
            peer_expect(&w, &p, IPC_TOKENS);
            check_tokens(&p.msg.u.tokens, next, pass);
        }
        peer_expect(&w, &p, IPC_DONE);
    }
    peer_close(&p);
    world_stop(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_merging),     cmocka_unit_test(test_held_tokens_leave),
        cmocka_unit_test(test_hard_limit),  cmocka_unit_test(test_lag),
        cmocka_unit_test(test_never_reads), cmocka_unit_test(test_large_result),
    };
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
