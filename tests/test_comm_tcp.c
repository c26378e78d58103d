/* parallel/comm_tcp: the cases of every communicator over TCP, who may join, and silent peers. */
#include "tests/comm_case.h"

#include "core/clock.h"
#include "parallel/comm_tcp.h"
#include "parallel/tcp_wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static struct comm_tcp_config tcp_config(const struct job *j, int rank)
{
    return (struct comm_tcp_config){.leader = j->name,
                                    .listen_fd = rank == 0 ? j->listen_fd : 0,
                                    .token = "a shared secret",
                                    .rank = rank,
                                    .n_ranks = j->n_ranks,
                                    .max_floats = PIECE,
                                    .max_msg = MAX_MSG,
                                    .timeout_ms = j->timeout_ms,
                                    .join_ms = TIMEOUT_MS};
}

/* A listening socket at a free port of the loopback. */
static int tcp_prepare(struct job *j)
{
    struct sockaddr_in a;
    socklen_t len = sizeof a;
    TRY(comm_tcp_listen(&j->listen_fd, "127.0.0.1:0", NULL));
    if (getsockname(j->listen_fd, (struct sockaddr *)&a, &len) < 0)
        return -errno;
    (void)snprintf(j->name, sizeof j->name, "127.0.0.1:%d", ntohs(a.sin_port));
    return 0;
}

static int tcp_create(struct comm **out, const struct job *j, int rank, struct err_msg *why)
{
    const struct comm_tcp_config cfg = tcp_config(j, rank);
    if (rank > 0)
        (void)close(j->listen_fd);
    return comm_tcp_create(out, &cfg, why);
}

static void tcp_clean(struct job *j)
{
    (void)close(j->listen_fd); /* where the test itself was rank 0, it is closed already */
}

static const struct comm_kind tcp_kind = {tcp_prepare, tcp_create, tcp_clean};

/* A stopped process is found without a collective, by its heart: the idle ones learn it too. */
static int idle_until_failure(struct job *j, struct comm *c)
{
    char buf[8];
    size_t len;
    job_say(j);
    if (c->rank > 0) {
        CHECK(comm_wait(c, buf, sizeof buf, &len) == ERR_PEER);
        return 0;
    }
    const struct timespec nap = {0, 5000000};
    while (comm_poll(c) == 0)
        (void)nanosleep(&nap, NULL);
    CHECK(comm_poll(c) == ERR_PEER);
    CHECK(comm_barrier(c) == ERR_PEER);
    return 0;
}

static int quick_create(struct comm **out, const struct job *j, int rank, struct err_msg *why)
{
    struct comm_tcp_config cfg = tcp_config(j, rank);
    cfg.beat_ms = 1000;
    if (rank > 0)
        (void)close(j->listen_fd);
    return comm_tcp_create(out, &cfg, why);
}

static void silent_peers_are_found_while_idle(void **state)
{
    (void)state;
    static const struct comm_kind quick = {tcp_prepare, quick_create, tcp_clean};
    for (int victim = 0; victim < 2; victim++) {
        struct job j;
        job_init(&j, &quick, 3, TIMEOUT_MS, idle_until_failure);
        job_start(&j);
        job_await(&j, 3);
        int64_t start = clock_monotonic_us(NULL);
        assert_int_equal(kill(j.pids[victim], SIGSTOP), 0);
        for (int r = 0; r < 3; r++) {
            if (r != victim)
                assert_ended_well(&j, r);
        }
        assert_true(clock_monotonic_us(NULL) - start < 10000000);
        assert_int_equal(kill(j.pids[victim], SIGCONT), 0);
        assert_ended_well(&j, victim);
        job_end(&j);
    }
}

/* The callback comes once, from whichever thread notices. */
static void count_failure(void *arg)
{
    atomic_fetch_add((atomic_int *)arg, 1);
}

static int report_failure(struct comm **out, const struct job *j, int rank, struct err_msg *why)
{
    static atomic_int n_failures;
    struct comm_tcp_config cfg = tcp_config(j, rank);
    cfg.on_fail = count_failure;
    cfg.fail_arg = &n_failures;
    if (rank > 0)
        (void)close(j->listen_fd);
    TRY(comm_tcp_create(out, &cfg, why));
    if (rank == 1)
        (void)raise(SIGKILL);
    const struct timespec nap = {0, 5000000};
    while (atomic_load(&n_failures) == 0)
        (void)nanosleep(&nap, NULL);
    comm_abort(*out);
    return atomic_load(&n_failures) == 1 ? 0 : err_set(why, ERR_INTERNAL, "called twice");
}

static int nothing(struct job *j, struct comm *c)
{
    (void)j;
    (void)c;
    return 0;
}

static void failures_are_reported_once(void **state)
{
    (void)state;
    static const struct comm_kind kind = {tcp_prepare, report_failure, tcp_clean};
    struct job j;
    job_init(&j, &kind, 3, TIMEOUT_MS, nothing);
    job_start(&j);
    assert_killed(&j, 1);
    assert_ended_well(&j, 0);
    assert_ended_well(&j, 2);
    job_end(&j);
}

/* ---- joining ---- */

static void bad_configurations_are_named(void **state)
{
    (void)state;
    char long_token[COMM_TCP_TOKEN + 2];
    struct comm *c;
    struct err_msg why;
    memset(long_token, 'x', sizeof long_token - 1);
    long_token[sizeof long_token - 1] = '\0';
    const struct comm_tcp_config good = {.leader = "127.0.0.1:1",
                                         .token = "t",
                                         .rank = 1,
                                         .n_ranks = 2,
                                         .max_floats = 8,
                                         .max_msg = 8,
                                         .timeout_ms = 10};
    struct comm_tcp_config bad[7];
    for (size_t i = 0; i < 7; i++)
        bad[i] = good;
    bad[0].rank = 2;
    bad[1].n_ranks = 65;
    bad[2].token = "";
    bad[3].token = NULL;
    bad[4].token = long_token;
    bad[5].timeout_ms = 0;
    bad[6].max_floats = 0;
    for (size_t i = 0; i < 7; i++) {
        assert_int_equal(comm_tcp_create(&c, &bad[i], &why), ERR_INVALID);
        assert_null(c);
    }
    static const char *const addresses[] = {"",      "host", ":1",
                                            "host:", "[]:1", "nosuchhost.invalid:1"};
    for (size_t i = 0; i < sizeof addresses / sizeof *addresses; i++) {
        bad[0] = good;
        bad[0].leader = addresses[i];
        assert_int_equal(comm_tcp_create(&c, &bad[0], &why), ERR_CONFIG);
    }
}

static void nobody_comes(void **state)
{
    (void)state;
    struct job j;
    struct comm *c;
    struct err_msg why;
    job_init(&j, &tcp_kind, 2, 100, NULL);
    struct comm_tcp_config cfg = tcp_config(&j, 0);
    cfg.join_ms = 0;
    assert_int_equal(comm_tcp_create(&c, &cfg, &why), ERR_PEER);
    assert_string_equal(why.text, "only 1 of 2 ranks joined in time");
    cfg.rank = 1; /* the listening socket is closed now */
    assert_int_equal(comm_tcp_create(&c, &cfg, &why), ERR_PEER);
    assert_non_null(strstr(why.text, "no leader"));
    job_end(&j);
}

static void parent_knows_that_nobody_comes(void **state)
{
    (void)state;
    struct job j;
    struct comm *c;
    struct err_msg why;
    job_init(&j, &tcp_kind, 2, TIMEOUT_MS, NULL);
    struct comm_tcp_config cfg = tcp_config(&j, 0);
    cfg.peers_alive = no_peer_alive;
    assert_int_equal(comm_tcp_create(&c, &cfg, &why), ERR_PEER);
    assert_non_null(strstr(why.text, "ended before it had joined"));
    job_end(&j);
}

static int connect_to(const struct job *j)
{
    int fd = -1;
    assert_ok(wire_connect(&fd, j->name, clock_monotonic_us(NULL) + 5000000, NULL));
    return fd;
}

/* Rank 0 in a child, which must end well although strangers come first. */
static void start_leader(struct job *j)
{
    (void)fflush(NULL);
    j->pids[0] = fork();
    if (j->pids[0] != 0)
        return;
    struct comm *c = NULL;
    struct err_msg why = {""};
    int err = tcp_create(&c, j, 0, &why);
    if (err == 0)
        err = comm_barrier(c);
    comm_close(c);
    if (err < 0)
        (void)fprintf(stderr, "rank 0: %s\n", err_why(&why, err));
    _exit(err == 0 ? STATUS_OK : 1);
}

/* The right follower still gets in. */
static void join_well(struct job *j)
{
    struct comm *c = NULL;
    struct err_msg why = {""};
    struct comm_tcp_config cfg = tcp_config(j, 1);
    int err = comm_tcp_create(&c, &cfg, &why);
    if (err < 0)
        fail_msg("%s", err_why(&why, err));
    assert_ok(comm_barrier(c));
    comm_close(c);
    assert_ended_well(j, 0);
    job_end(j);
}

static void expect_refusal(const struct comm_tcp_config *cfg, int want, const char *text)
{
    struct comm *c = NULL;
    struct err_msg why = {""};
    assert_int_equal(comm_tcp_create(&c, cfg, &why), want);
    assert_non_null(strstr(why.text, text));
}

static void strangers_are_refused(void **state)
{
    (void)state;
    struct job j;
    job_init(&j, &tcp_kind, 2, TIMEOUT_MS, NULL);
    start_leader(&j);
    struct comm_tcp_config cfg = tcp_config(&j, 1);
    cfg.token = "a shared secreT";
    expect_refusal(&cfg, ERR_AUTH, "wrong token");
    cfg.token = "a shared secret and more";
    expect_refusal(&cfg, ERR_AUTH, "wrong token");
    cfg = tcp_config(&j, 1);
    cfg.n_ranks = 3;
    expect_refusal(&cfg, ERR_CONFIG, "expects 2 ranks");
    cfg = tcp_config(&j, 1);
    cfg.max_msg++;
    expect_refusal(&cfg, ERR_CONFIG, "max_msg");
    join_well(&j);
}

/* The right hello but for one field, straight from the wire. */
static int32_t code_for(const struct job *j, const struct wire_hello *h)
{
    struct wire_welcome w = {0};
    int fd = connect_to(j);
    const int64_t end = clock_monotonic_us(NULL) + 10000000;
    assert_ok(wire_write(fd, h, sizeof *h, end));
    int err = wire_read(fd, &w, sizeof w, end);
    (void)close(fd);
    return err < 0 ? err : w.code;
}

static void wrong_versions_are_refused(void **state)
{
    (void)state;
    struct job j;
    job_init(&j, &tcp_kind, 2, TIMEOUT_MS, NULL);
    start_leader(&j);
    const struct wire_hello good = {.magic = WIRE_MAGIC,
                                    .channel = WIRE_DATA,
                                    .rank = 1,
                                    .n_ranks = 2,
                                    .max_floats = PIECE,
                                    .max_msg = MAX_MSG,
                                    .build = SLUICE_VERSION,
                                    .token = "a shared secret"};
    struct wire_hello h = good;
    h.build[0]++;
    assert_int_equal(code_for(&j, &h), ERR_VERSION);
    h = good;
    h.rank = 0;
    assert_int_equal(code_for(&j, &h), ERR_PROTOCOL);
    h.rank = 2;
    assert_int_equal(code_for(&j, &h), ERR_PROTOCOL);
    h = good;
    h.channel = 7;
    assert_int_equal(code_for(&j, &h), ERR_PROTOCOL);
    h = good;
    h.magic++;
    assert_int_equal(code_for(&j, &h), ERR_PEER); /* no answer at all */
    assert_int_equal(code_for(&j, &good), 0);     /* joins and leaves: its place is free again */
    join_well(&j);
}

/* Garbage, half a hello, silence, and more of each than the leader keeps in mind. */
static void noise_costs_only_its_own_connection(void **state)
{
    (void)state;
    struct job j;
    struct rng g = test_rng("noise_costs_only_its_own_connection", 21);
    int fds[80];
    job_init(&j, &tcp_kind, 2, TIMEOUT_MS, NULL);
    start_leader(&j);
    for (int i = 0; i < 80; i++) {
        unsigned char noise[600];
        const size_t n = (size_t)rng_range(&g, 0, sizeof noise);
        for (size_t k = 0; k < n; k++)
            noise[k] = (unsigned char)rng_u64(&g);
        fds[i] = connect_to(&j);
        const uint32_t magic = WIRE_MAGIC; /* every other one begins well */
        if (i % 2)
            memcpy(noise, &magic, sizeof magic);
        (void)send(fds[i], noise, n, MSG_NOSIGNAL);
    }
    join_well(&j);
    for (int i = 0; i < 80; i++)
        (void)close(fds[i]);
}

static void the_leader_may_come_last(void **state)
{
    (void)state;
    struct job j;
    const struct timespec late = {0, 300000000}; /* the time under test */
    job_init(&j, &tcp_kind, 2, TIMEOUT_MS, NULL);
    (void)close(j.listen_fd);
    j.listen_fd = 0; /* rank 0 makes its own, later */
    (void)fflush(NULL);
    j.pids[0] = fork();
    if (j.pids[0] == 0) {
        struct comm *c = NULL;
        struct comm_tcp_config cfg = tcp_config(&j, 0);
        (void)nanosleep(&late, NULL);
        int err = comm_tcp_create(&c, &cfg, NULL);
        if (err == 0)
            err = comm_barrier(c);
        comm_close(c);
        _exit(err == 0 ? STATUS_OK : 1);
    }
    join_well(&j);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        COMM_CASES(&tcp_kind),
        cmocka_unit_test(silent_peers_are_found_while_idle),
        cmocka_unit_test(failures_are_reported_once),
        cmocka_unit_test(bad_configurations_are_named),
        cmocka_unit_test(nobody_comes),
        cmocka_unit_test(parent_knows_that_nobody_comes),
        cmocka_unit_test(strangers_are_refused),
        cmocka_unit_test(wrong_versions_are_refused),
        cmocka_unit_test(noise_costs_only_its_own_connection),
        cmocka_unit_test(the_leader_may_come_last),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
