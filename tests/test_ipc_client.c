/* The client library against a real server in another thread, and against peers that lie. */
#include "tests/test.h"

#include "tests/ipc_peer.h"

#include "core/log.h"
#include "ipc/client.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* --- allocations that fail: the linker sends the library's calls here --- */

static _Thread_local int fail_after = -1; /* allocations still granted in this thread; -1: all */

static bool granted(void)
{
    if (fail_after < 0)
        return true;
    return fail_after-- > 0 || (fail_after = 0, false);
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);

void *__wrap_malloc(size_t n)
{
    return granted() ? __real_malloc(n) : NULL;
}

void *__wrap_calloc(size_t n, size_t size)
{
    return granted() ? __real_calloc(n, size) : NULL;
}

void *__wrap_realloc(void *p, size_t n)
{
    return granted() ? __real_realloc(p, n) : NULL;
}

/* --- a server in a thread --- */

struct host {
    struct world w;
    uv_async_t stop;
    pthread_t thread;
};

static void on_stop(uv_async_t *h)
{
    struct host *host = h->data;
    ipc_server_close(host->w.server, 100, NULL, NULL);
    uv_close((uv_handle_t *)h, NULL);
}

static void *run_loop(void *arg)
{
    struct host *h = arg;
    (void)uv_run(&h->w.loop, UV_RUN_DEFAULT);
    return NULL;
}

static void host_start(struct host *h, const struct ipc_server_config *cfg)
{
    world_start(&h->w, cfg);
    h->w.answer = true;
    assert_ok(uv_async_init(&h->w.loop, &h->stop, on_stop));
    h->stop.data = h;
    assert_int_equal(pthread_create(&h->thread, NULL, run_loop, h), 0);
}

static void host_end_server(struct host *h)
{
    (void)uv_async_send(&h->stop);
    assert_int_equal(pthread_join(h->thread, NULL), 0);
    h->w.closed = 1;
}

static void host_stop(struct host *h)
{
    host_end_server(h);
    world_stop(&h->w);
}

static const struct ipc_server_config defaults;
static const int32_t prompt[64] = {42};

static struct sluice_client *join(const struct host *h)
{
    struct sluice_client *c;
    char why[256];
    if (sluice_connect(&c, h->w.unix_address, NULL, why, sizeof why) < 0)
        fail_msg("%s", why);
    assert_string_equal(why, "");
    return c;
}

static struct sluice_request request(const char *id)
{
    struct sluice_request r;
    sluice_request_init(&r);
    r.id = id;
    r.tokens = prompt;
    r.n_tokens = 64;
    return r;
}

static void expect_answer(struct sluice_client *c, const char *id)
{
    static const enum sluice_event_type order[] = {SLUICE_ACCEPTED, SLUICE_TOKENS, SLUICE_DONE};
    struct sluice_event e;
    for (int i = 0; i < 3; i++) {
        assert_int_equal(sluice_next(c, &e, 5000), 1);
        assert_int_equal(e.type, order[i]);
        assert_string_equal(e.id, id);
        if (e.type == SLUICE_TOKENS) {
            assert_int_equal(e.u.tokens.n, 1);
            assert_int_equal(e.u.tokens.ids[0], 42);
        }
        assert_int_equal(sluice_event_is_last(&e), i == 2);
    }
    assert_int_equal(e.u.done.reason, SLUICE_LENGTH);
    assert_int_equal(e.u.done.prompt_tokens, 64);
}

static void test_requests(void **state)
{
    struct host h;
    char id[16];
    (void)state;
    host_start(&h, &defaults);
    struct sluice_client *c = join(&h);
    const struct sluice_info *info = sluice_get_info(c);
    assert_string_equal(info->model, "tiny");
    assert_int_equal(info->vocab, 100);
    assert_true(info->has_dense && !info->has_abs);
    assert_true(info->n_decode_levels == 2 && info->decode_levels[1] == 32);
    for (int i = 0; i < 100; i++) {
        (void)snprintf(id, sizeof id, "r%d", i);
        struct sluice_request r = request(id);
        assert_ok(sluice_submit(c, &r));
    }
    for (int i = 0; i < 100; i++) {
        (void)snprintf(id, sizeof id, "r%d", i);
        expect_answer(c, id);
    }
    struct sluice_event e;
    assert_int_equal(sluice_next(c, &e, 0), 0);
    assert_int_equal(sluice_next(c, &e, 10), 0);
    assert_ok(sluice_cancel(c, "gone"));
    sluice_close(c);
    host_stop(&h);
    assert_int_equal(h.w.n_submit, 100);
    assert_int_equal(h.w.n_cancel, 1);
}

/* Replies find their questions while answers to requests stream in, and those are kept in order. */
static void test_questions(void **state)
{
    struct host h;
    const struct sluice_stat *stats;
    struct sluice_health health;
    (void)state;
    host_start(&h, &defaults);
    struct sluice_client *c = join(&h);
    for (int i = 0; i < 20; i++) {
        char id[16];
        (void)snprintf(id, sizeof id, "r%d", i);
        struct sluice_request r = request(id);
        assert_ok(sluice_submit(c, &r));
        if (i == 7)
            assert_int_equal(sluice_get_stats(c, &stats, 5000), 2);
    }
    assert_int_equal(sluice_get_stats(c, &stats, 5000), 2);
    assert_string_equal(stats[0].name, "requests");
    assert_true(stats[0].is_int && stats[0].i == 7 && stats[1].d == 0.5);
    assert_ok(sluice_get_health(c, &health, 5000));
    assert_true(health.live && !health.draining);
    assert_string_equal(health.state, "serving");
    assert_ok(sluice_ping(c, 5000));
    assert_ok(sluice_drain(c, 100, 5000));
    assert_ok(sluice_reset_prefix_cache(c, 5000));
    assert_int_equal(sluice_shutdown(c, 5000), SLUICE_EREFUSED);
    assert_non_null(strstr(sluice_error(c), "UNSUPPORTED"));
    for (int i = 0; i < 20; i++) {
        char id[16];
        (void)snprintf(id, sizeof id, "r%d", i);
        expect_answer(c, id);
    }
    assert_int_equal(sluice_drain(c, -1, 5000), SLUICE_EINVALID);
    assert_ok(sluice_ping(c, 5000));
    sluice_close(c);
    host_stop(&h);
}

static void refused(struct sluice_client *c, const struct sluice_request *r, const char *field)
{
    assert_int_equal(sluice_submit(c, r), SLUICE_EINVALID);
    if (strncmp(sluice_error(c), field, strlen(field)))
        fail_msg("'%s' does not start with '%s'", sluice_error(c), field);
}

static void test_bad_arguments(void **state)
{
    struct host h;
    char longest[200];
    int32_t bad[2] = {1, 100};
    (void)state;
    host_start(&h, &defaults);
    struct sluice_client *c = join(&h);
    memset(longest, 'x', sizeof longest);
    longest[129] = '\0';
#define WITH(field, assignment)                                                                    \
    do {                                                                                           \
        struct sluice_request r = request("1");                                                    \
        r.assignment;                                                                              \
        refused(c, &r, field);                                                                     \
    } while (0)
    WITH("id", id = NULL);
    WITH("id", id = "");
    WITH("id", id = longest);
    WITH("tokens", n_tokens = 0);
    WITH("tokens", n_tokens = -1);
    WITH("tokens", tokens = NULL);
    WITH("max_tokens", max_tokens = 0);
    WITH("min_tokens", min_tokens = 17);
    WITH("temperature", temperature = -1);
    WITH("temperature", temperature = NAN);
    WITH("top_p", top_p = 0);
    WITH("min_p", min_p = 1.5);
    WITH("top_k", top_k = -2);
    WITH("logprobs", logprobs = 21);
    WITH("tenant", tenant = longest);
    WITH("cache_salt", n_salt = 65);
    WITH("stop_token_ids", n_stop = 17);
    WITH("deadline_ms", deadline_ms = -1);
    WITH("sparse.k", sparse = SLUICE_ABS);
    WITH("sparse.ln_lambda", sparse = SLUICE_REL);
    struct sluice_request r = request("1");
    r.tokens = bad;
    r.n_tokens = 2;
    refused(c, &r, "tokens[1]: 100");
    r = request("1");
    r.n_stop = 1;
    r.stop_token_ids[0] = -5;
    refused(c, &r, "stop_token_ids[0]");
    r = request("ok");
    assert_ok(sluice_submit(c, &r));
    expect_answer(c, "ok");
    sluice_close(c);
    host_stop(&h);
    assert_int_equal(h.w.n_submit, 1);
}

/* More than the socket's buffers: sluice_submit returns at once, the rest goes out later. */
static void test_large_prompt(void **state)
{
    enum { N = 2000000 };
    struct host h;
    struct sluice_event e;
    (void)state;
    host_start(&h, &defaults);
    struct sluice_client *c = join(&h);
    int32_t *big = calloc(N, sizeof *big);
    struct sluice_request r = request("big");
    r.tokens = big;
    r.n_tokens = N;
    assert_ok(sluice_submit(c, &r));
    assert_ok(sluice_flush(c, 5000));
    assert_int_equal(sluice_poll_events(c), POLLIN);
    do
        assert_int_equal(sluice_next(c, &e, 5000), 1);
    while (!sluice_event_is_last(&e));
    assert_int_equal(e.u.done.prompt_tokens, N);
    free(big);
    big = calloc((size_t)3 * N, sizeof *big); /* above max_frame: refused here, harmlessly */
    r.tokens = big;
    r.n_tokens = 3 * N;
    assert_int_equal(sluice_submit(c, &r), SLUICE_EINVALID);
    assert_ok(sluice_ping(c, 5000));
    free(big);
    sluice_close(c);
    host_stop(&h);
}

static void test_lost_connection(void **state)
{
    struct host h;
    struct sluice_event e;
    struct sluice_request r = request("1");
    (void)state;
    host_start(&h, &defaults);
    struct sluice_client *c = join(&h);
    host_end_server(&h);
    assert_true(sluice_next(c, &e, 5000) < 0);
    assert_true(sluice_error(c)[0] != '\0');
    for (int i = 0; i < 3; i++) {
        assert_true(sluice_submit(c, &r) < 0);
        assert_true(sluice_next(c, &e, 5000) < 0);
        assert_true(sluice_ping(c, 5000) < 0);
        assert_true(sluice_flush(c, 5000) < 0);
    }
    sluice_close(c);
    world_stop(&h.w);
}

static void expect_no_connection(const char *address, const struct sluice_options *o, int err)
{
    struct sluice_client *c;
    char why[256] = "";
    int rc = sluice_connect(&c, address, o, why, sizeof why);
    if (rc != err || c || why[0] == '\0')
        fail_msg("%s: %d (%s)", address, rc, why);
    assert_int_equal(sluice_connect(&c, address, o, NULL, 0), err);
}

static void test_connect_errors(void **state)
{
    struct host h;
    char address[64];
    (void)state;
    expect_no_connection("nonsense", NULL, SLUICE_EINVALID);
    expect_no_connection("unix:/nowhere/at/all", NULL, -ENOENT);
    expect_no_connection("tcp:127.0.0.1:1", NULL, -ECONNREFUSED);
    expect_no_connection("tcp:127.0.0.1:99999", NULL, SLUICE_EINVALID);
    world_start(&h.w, &(struct ipc_server_config){.token = "secret"});
    assert_ok(ipc_server_listen(h.w.server, "tcp:0", NULL));
    (void)snprintf(address, sizeof address, "tcp:127.0.0.1:%d", ipc_server_port(h.w.server, 1));
    assert_ok(uv_async_init(&h.w.loop, &h.stop, on_stop));
    h.stop.data = &h;
    assert_int_equal(pthread_create(&h.thread, NULL, run_loop, &h), 0);
    expect_no_connection(address, NULL, SLUICE_EREFUSED);
    expect_no_connection(address, &(struct sluice_options){.token = "wrong"}, SLUICE_EREFUSED);
    struct sluice_client *c;
    assert_ok(sluice_connect(&c, address, &(struct sluice_options){.token = "secret"}, NULL, 0));
    assert_ok(sluice_ping(c, 5000));
    sluice_close(c);
    sluice_close(NULL);
    host_stop(&h);
}

/* The two example programs are run as a user would. */
static void run_example(const struct host *h, const char *before, const char *after,
                        const char *expected)
{
    char command[512], out[1024] = "";
    (void)snprintf(command, sizeof command, "%s %s %s", before, h->w.unix_address, after);
    FILE *f = popen(command, "r"); // NOLINT(cert-env33-c)
    assert_non_null(f);
    size_t n = fread(out, 1, sizeof out - 1, f);
    assert_int_equal(pclose(f), 0);
    out[n] = '\0';
    if (!strstr(out, expected))
        fail_msg("'%s' printed '%s'", command, out);
}

static void test_examples(void **state)
{
    struct host h;
    (void)state;
    host_start(&h, &defaults);
    run_example(&h, TEST_BIN "/sluice_example_generate", "4 42 1 2",
                "42 \nlength: 3 prompt tokens");
    if (system("/usr/bin/python3 -c 'import msgpack' 2>/dev/null") == 0)
        run_example(&h, "/usr/bin/python3 " TEST_ROOT "/ipc/examples/sluice_client.py --connect",
                    "--tokens 42,1,2",
                    "{\"tokens\": [42], \"logprobs\": [], \"finish_reason\": \"length\"");
    host_stop(&h);
}

/* --- peers that lie --- */

/* Listens, and gives every connection these bytes and nothing else; len 0: silence. */
struct liar {
    int fd;
    const char *bytes;
    size_t len;
    pthread_t thread;
    char dir[64], address[96];
};

static void *lie(void *arg)
{
    struct liar *l = arg;
    char sink[4096];
    int fd = accept(l->fd, NULL, NULL);
    if (fd < 0)
        return NULL;
    if (send(fd, l->bytes, l->len, MSG_NOSIGNAL) == (ssize_t)l->len && l->len > 0)
        (void)shutdown(fd, SHUT_WR);
    while (recv(fd, sink, sizeof sink, 0) > 0)
        continue;
    (void)close(fd);
    return NULL;
}

static void liar_start(struct liar *l, const char *bytes, size_t len)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    *l = (struct liar){.bytes = bytes, .len = len, .dir = "/tmp/sluice_ipc_XXXXXX"};
    assert_non_null(mkdtemp(l->dir));
    (void)snprintf(sa.sun_path, sizeof sa.sun_path, "%s/s", l->dir);
    (void)snprintf(l->address, sizeof l->address, "unix:%s/s", l->dir);
    l->fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_ok(bind(l->fd, (const struct sockaddr *)&sa, sizeof sa));
    assert_ok(listen(l->fd, 1));
    assert_int_equal(pthread_create(&l->thread, NULL, lie, l), 0);
}

static void liar_stop(struct liar *l)
{
    assert_int_equal(pthread_join(l->thread, NULL), 0);
    (void)close(l->fd);
    (void)unlink(l->address + 5);
    (void)rmdir(l->dir);
}

#define RAW(s)         (s), sizeof(s) - 1
#define HELLO_OK_BYTES "\x00\x00\x00\x05\x92\x41\x81\x00\x01"

static void test_liars_in_handshake(void **state)
{
    static const struct {
        const char *bytes;
        size_t len;
        int err;
    } cases[] = {
        {RAW("HTTP/1.1 400 Bad Request\r\n\r\n"), SLUICE_EPROTOCOL},
        {RAW("\x00\x00\x00\x00"), SLUICE_EPROTOCOL},
        {RAW("\x00\x00\x00\x01\xc1"), SLUICE_EPROTOCOL},
        {RAW("\x00\x00\x00\x03\x92\x41\x80"), SLUICE_EINVALID},
        {RAW("\x00\x00\x00\x03\x92\x4b\x80"), SLUICE_EPROTOCOL}, /* PONG */
        {RAW("\x00\x00"), -ECONNRESET},
        {"", 0, -ETIMEDOUT},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct liar l;
        struct sluice_client *c;
        char why[256] = "";
        liar_start(&l, cases[i].bytes, cases[i].len);
        int rc = sluice_connect(&c, l.address, &(struct sluice_options){.connect_ms = 100}, why,
                                sizeof why);
        if (rc != cases[i].err || c || why[0] == '\0')
            fail_msg("case %zu: %d (%s)", i, rc, why);
        liar_stop(&l);
    }
}

static void test_liars_later(void **state)
{
    static const struct {
        const char *bytes;
        size_t len;
        int n_events, err;
    } cases[] = {
        {RAW(HELLO_OK_BYTES "\xff\xff\xff\xff"), 0, SLUICE_EPROTOCOL},
        {RAW(HELLO_OK_BYTES "\x00\x00\x00\x01\xc0"), 0, SLUICE_EPROTOCOL},
        {RAW(HELLO_OK_BYTES "\x00\x00\x00\x06\x92\x45\x81\x00\xa1x"), 0, SLUICE_EINVALID},
        {RAW(HELLO_OK_BYTES "\x00\x00\x00\x03\x92\x63\x80"   /* unknown: passed over */
                            "\x00\x00\x00\x03\x92\x4b\x80"), /* PONG nobody asked for */
         0, -ECONNRESET},
        {RAW(HELLO_OK_BYTES "\x00\x00\x00\x06\x92\x42\x81\x00\xa1x"    /* ACCEPTED */
                            "\x00\x00\x00\x06\x92\x46\x81\x02\xcc\xc8" /* ERROR 200, then cut */
                            "\x00\x00\x00\x08\x92"),
         2, -ECONNRESET},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct liar l;
        struct sluice_client *c;
        struct sluice_event e;
        liar_start(&l, cases[i].bytes, cases[i].len);
        assert_ok(sluice_connect(&c, l.address, NULL, NULL, 0));
        for (int k = 0; k < cases[i].n_events; k++)
            assert_int_equal(sluice_next(c, &e, 5000), 1);
        int rc = sluice_next(c, &e, 5000);
        if (rc != cases[i].err || sluice_error(c)[0] == '\0')
            fail_msg("case %zu: %d (%s)", i, rc, sluice_error(c));
        sluice_close(c);
        liar_stop(&l);
    }
}

/* The n-th allocation fails, for every n: errors or success, never a crash or a leak. */
static int whole_life(const struct host *h)
{
    struct sluice_client *c;
    struct sluice_event e;
    const struct sluice_stat *stats;
    char why[256];
    TRY(sluice_connect(&c, h->w.unix_address, NULL, why, sizeof why));
    struct sluice_request r = request("1");
    int rc = sluice_submit(c, &r);
    if (rc == 0)
        rc = sluice_get_stats(c, &stats, 5000);
    do
        rc = rc < 0 ? rc : sluice_next(c, &e, 5000);
    while (rc > 0 && !sluice_event_is_last(&e));
    if (rc < 0)
        assert_true(sluice_error(c)[0] != '\0');
    sluice_close(c);
    return rc < 0 ? rc : 0;
}

static void test_out_of_memory(void **state)
{
    struct host h;
    int n_failed = 0, rc = -1;
    (void)state;
    host_start(&h, &defaults);
    for (int n = 0; n < 100 && rc < 0; n++) {
        fail_after = n;
        rc = whole_life(&h);
        fail_after = -1;
        n_failed += rc < 0;
        if (rc < 0)
            assert_int_equal(rc, -ENOMEM);
    }
    assert_int_equal(rc, 0);
    assert_true(n_failed > 5);
    host_stop(&h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_requests),           cmocka_unit_test(test_questions),
        cmocka_unit_test(test_bad_arguments),      cmocka_unit_test(test_large_prompt),
        cmocka_unit_test(test_lost_connection),    cmocka_unit_test(test_connect_errors),
        cmocka_unit_test(test_liars_in_handshake), cmocka_unit_test(test_liars_later),
        cmocka_unit_test(test_out_of_memory),      cmocka_unit_test(test_examples),
    };
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
