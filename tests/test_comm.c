/* parallel/: collectives between real processes over shared memory, and what happens when one of
 * them dies, stops, diverges or gives up. Every rank is a forked child; a child reports through its
 * exit status, so an assertion there is `return` with a line number (see CHECK). */
#include "tests/test.h"

#include "core/clock.h"
#include "parallel/comm.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    MAX_RANKS = 4,
    PIECE = 1000, /* max_floats: not a power of two, so that big sizes end in a ragged piece */
    BIG = 10 * PIECE + 7,
    MAX_MSG = 4096,
    TIMEOUT_MS = 20000,
    SHORT_MS = 300,
    STATUS_OK = 7 /* no child ends with it by accident */
};

/* In a child: prints and ends the rank's function. */
#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            (void)fprintf(stderr, "%s:%d: rank failed: %s\n", __FILE__, __LINE__, #cond);          \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

struct job {
    struct comm_shm_config cfg;
    char name[64];
    uint64_t seed;
    int pipe[2]; /* ranks tell the test that they are about to block */
    int (*run)(struct job *j, struct comm *c);
    pid_t pids[MAX_RANKS];
};

static void job_init(struct job *j, int n_ranks, int64_t timeout_ms,
                     int (*run)(struct job *j, struct comm *c))
{
    *j = (struct job){.run = run};
    assert_ok(comm_shm_name(j->name, sizeof j->name));
    assert_int_equal(pipe(j->pipe), 0);
    j->cfg = (struct comm_shm_config){.name = j->name,
                                      .n_ranks = n_ranks,
                                      .max_floats = PIECE,
                                      .max_msg = MAX_MSG,
                                      .timeout_ms = timeout_ms,
                                      .join_ms = TIMEOUT_MS};
}

_Noreturn static void child(struct job *j, int rank)
{
    struct err_msg why = {""};
    struct comm *c = NULL;

    (void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* a failed test leaves nobody behind */
    j->cfg.rank = rank;
    int err = comm_shm_create(&c, &j->cfg, &why);
    if (err < 0) {
        (void)fprintf(stderr, "rank %d: %s\n", rank, err_why(&why, err));
        _exit(2);
    }
    int status = j->run(j, c);
    comm_close(c);
    _exit(status ? status : STATUS_OK);
}

static void job_start(struct job *j)
{
    for (int r = 0; r < j->cfg.n_ranks; r++) {
        (void)fflush(NULL);
        j->pids[r] = fork();
        assert_true(j->pids[r] >= 0);
        if (j->pids[r] == 0)
            child(j, r);
    }
}

/* Blocks until n ranks have written a byte. */
static void job_await(struct job *j, int n)
{
    char byte;
    for (int i = 0; i < n; i++)
        assert_int_equal(read(j->pipe[0], &byte, 1), 1);
}

static void say(const struct job *j)
{
    if (write(j->pipe[1], "x", 1) != 1)
        _exit(3);
}

static void assert_ended_well(struct job *j, int rank)
{
    int status;
    assert_int_equal(waitpid(j->pids[rank], &status, 0), j->pids[rank]);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != STATUS_OK)
        fail_msg("rank %d of %d: wait status %#x", rank, j->cfg.n_ranks, status);
}

static void assert_killed(struct job *j, int rank)
{
    int status;
    assert_int_equal(waitpid(j->pids[rank], &status, 0), j->pids[rank]);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

/* Nothing of this test program may be left in the file system of shared memory. */
static void job_end(struct job *j)
{
    int fd = shm_open(j->name, O_RDWR, 0);
    assert_int_equal(fd, -1);
    assert_int_equal(errno, ENOENT);
    (void)close(j->pipe[0]);
    (void)close(j->pipe[1]);
}

static void run_all(int n_ranks, uint64_t seed, int (*run)(struct job *j, struct comm *c))
{
    struct job j;
    job_init(&j, n_ranks, TIMEOUT_MS, run);
    j.seed = seed;
    job_start(&j);
    for (int r = 0; r < n_ranks; r++)
        assert_ended_well(&j, r);
    job_end(&j);
}

/* What rank r contributes: every rank can compute every share. Magnitudes differ so much that
 * another order of additions would give other bits. */
static void fill_share(float *buf, size_t n, uint64_t seed, int rank)
{
    struct rng g = {seed * 1000 + (uint64_t)rank};
    for (size_t i = 0; i < n; i++)
        buf[i] = (float)(rng_normal(&g) * pow(10.0, rng_range(&g, -6, 6)));
}

static const size_t sizes[] = {0, 1, 2, 31, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, BIG};
enum { N_SIZES = sizeof sizes / sizeof *sizes };

/* ---- sums ---- */

static int reduce_rank(struct job *j, struct comm *c)
{
    static float got[BIG + 1], want[BIG], share[BIG];
    for (size_t s = 0; s < N_SIZES; s++) {
        size_t n = sizes[s];
        memset(want, 0, sizeof want);
        for (int r = 0; r < c->n_ranks; r++) {
            fill_share(share, n, j->seed + s, r);
            for (size_t i = 0; i < n; i++)
                want[i] = r == 0 ? share[i] : want[i] + share[i];
        }
        fill_share(got, n, j->seed + s, c->rank);
        got[n] = 42.0f;
        CHECK(comm_all_reduce(c, got, n) == 0);
        CHECK(memcmp(got, want, n * sizeof *got) == 0);
        CHECK(got[n] == 42.0f);
    }
    return 0;
}

static void sums_have_equal_bits(void **state)
{
    (void)state;
    struct rng g = test_rng("sums_have_equal_bits", 11);
    for (int n = 1; n <= MAX_RANKS; n++)
        run_all(n, rng_u64(&g) >> 16, reduce_rank);
}

/* ---- gather ---- */

static int gather_rank(struct job *j, struct comm *c)
{
    static float out[MAX_RANKS * BIG], in[BIG], want[BIG];
    for (size_t s = 0; s < N_SIZES; s++) {
        size_t n = sizes[s];
        for (int in_place = 0; in_place < 2; in_place++) {
            float *from = in_place ? out + (size_t)c->rank * n : in;
            fill_share(from, n, j->seed + s, c->rank);
            CHECK(comm_all_gather(c, out, from, n) == 0);
            for (int r = 0; r < c->n_ranks; r++) {
                fill_share(want, n, j->seed + s, r);
                CHECK(memcmp(out + (size_t)r * n, want, n * sizeof *want) == 0);
            }
        }
    }
    return 0;
}

static void gather_keeps_rank_order(void **state)
{
    (void)state;
    struct rng g = test_rng("gather_keeps_rank_order", 12);
    for (int n = 1; n <= MAX_RANKS; n++)
        run_all(n, rng_u64(&g) >> 16, gather_rank);
}

/* ---- a long random mixture, the same on all ranks ---- */

static int mixture_rank(struct job *j, struct comm *c)
{
    static float buf[BIG], share[BIG], out[MAX_RANKS * BIG];
    unsigned char msg[MAX_MSG], got[MAX_MSG];
    struct rng g = {j->seed};

    for (int step = 0; step < 300; step++) {
        size_t n = (size_t)rng_range(&g, 1, rng_range(&g, 1, 3) == 3 ? BIG : 64), len = 0;
        switch (rng_range(&g, 0, 3)) {
        case 0:
            fill_share(buf, n, j->seed + (uint64_t)step, 0);
            memcpy(share, buf, n * sizeof *buf);
            CHECK(comm_all_reduce(c, buf, n) == 0);
            for (size_t i = 0; i < n; i++) {
                float sum = share[i];
                for (int r = 1; r < c->n_ranks; r++)
                    sum += share[i];
                CHECK(memcmp(&sum, &buf[i], sizeof sum) == 0);
            }
            break;
        case 1:
            fill_share(buf, n, j->seed + (uint64_t)step, c->rank);
            CHECK(comm_all_gather(c, out, buf, n) == 0);
            CHECK(memcmp(out + (size_t)c->rank * n, buf, n * sizeof *buf) == 0);
            break;
        case 2: CHECK(comm_barrier(c) == 0); break;
        default:
            n %= MAX_MSG + 1;
            memset(msg, step & 255, n);
            if (c->rank == 0) {
                CHECK(comm_post(c, msg, n) == 0);
            } else {
                CHECK(comm_wait(c, got, sizeof got, &len) == 0);
                CHECK(len == n && memcmp(got, msg, n) == 0);
            }
        }
    }
    return 0;
}

static void any_mixture_works(void **state)
{
    (void)state;
    struct rng g = test_rng("any_mixture_works", 13);
    for (int n = 2; n <= MAX_RANKS; n++)
        run_all(n, rng_u64(&g) >> 16, mixture_rank);
}

/* ---- the mailbox ---- */

static int post_rank(struct job *j, struct comm *c)
{
    unsigned char buf[MAX_MSG] = {0};
    size_t len = 99;
    (void)j;
    if (c->rank == 0) {
        CHECK(comm_wait(c, buf, sizeof buf, &len) == ERR_INVALID);
        CHECK(comm_post(c, buf, MAX_MSG + 1) == ERR_INVALID);
        for (unsigned i = 0; i < 1000; i++)
            CHECK(comm_post(c, &i, sizeof i) == 0);
        CHECK(comm_post(c, buf, 0) == 0);
        CHECK(comm_post(c, buf, MAX_MSG) == 0);
        return 0;
    }
    CHECK(comm_post(c, buf, 1) == ERR_INVALID);
    for (unsigned i = 0; i < 1000; i++) {
        unsigned got = 0;
        CHECK(comm_wait(c, &got, sizeof got, &len) == 0);
        CHECK(len == sizeof got && got == i);
    }
    CHECK(comm_wait(c, buf, sizeof buf, &len) == 0 && len == 0);
    CHECK(comm_wait(c, buf, MAX_MSG - 1, &len) == -EMSGSIZE && len == MAX_MSG);
    CHECK(comm_wait(c, buf, sizeof buf, &len) == 0 && len == MAX_MSG);
    return 0;
}

static void messages_arrive_in_order(void **state)
{
    (void)state;
    for (int n = 2; n <= MAX_RANKS; n++)
        run_all(n, 0, post_rank);
}

/* ---- failures ---- */

static int reduce_until_failure(struct job *j, struct comm *c)
{
    static float buf[BIG];
    say(j);
    for (;;) {
        int err = comm_all_reduce(c, buf, BIG);
        if (err == 0)
            continue;
        CHECK(err == ERR_PEER);
        CHECK(comm_all_reduce(c, buf, 1) == ERR_PEER); /* unusable from now on */
        CHECK(comm_all_gather(c, buf, buf, 1) == ERR_PEER);
        CHECK(comm_barrier(c) == ERR_PEER);
        return 0;
    }
}

static void killed_rank_fails_the_others(void **state)
{
    (void)state;
    for (int victim = 0; victim < 3; victim++) {
        struct job j;
        job_init(&j, 3, TIMEOUT_MS, reduce_until_failure);
        job_start(&j);
        job_await(&j, 3);
        int64_t start = clock_monotonic_us(NULL);
        assert_int_equal(kill(j.pids[victim], SIGKILL), 0);
        assert_killed(&j, victim);
        for (int r = 0; r < 3; r++) {
            if (r != victim)
                assert_ended_well(&j, r);
        }
        /* seen as a death, not by running into the timeout */
        assert_true(clock_monotonic_us(NULL) - start < TIMEOUT_MS * 1000 / 4);
        job_end(&j);
    }
}

/* A killed rank that nobody has reaped yet is a zombie: it must count as dead. */
static void zombie_rank_fails_the_others(void **state)
{
    (void)state;
    struct job j;
    job_init(&j, 2, TIMEOUT_MS, reduce_until_failure);
    job_start(&j);
    job_await(&j, 2);
    int64_t start = clock_monotonic_us(NULL);
    assert_int_equal(kill(j.pids[1], SIGKILL), 0);
    assert_ended_well(&j, 0);
    assert_true(clock_monotonic_us(NULL) - start < TIMEOUT_MS * 1000 / 4);
    assert_killed(&j, 1);
    job_end(&j);
}

static void stopped_rank_fails_the_others(void **state)
{
    (void)state;
    for (int victim = 0; victim < 3; victim++) {
        struct job j;
        job_init(&j, 3, SHORT_MS, reduce_until_failure);
        job_start(&j);
        job_await(&j, 3);
        assert_int_equal(kill(j.pids[victim], SIGSTOP), 0);
        for (int r = 0; r < 3; r++) {
            if (r != victim)
                assert_ended_well(&j, r);
        }
        assert_int_equal(kill(j.pids[victim], SIGCONT), 0); /* it wakes up outvoted */
        assert_ended_well(&j, victim);
        job_end(&j);
    }
}

static int diverge_rank(struct job *j, struct comm *c)
{
    float buf[8] = {0};
    (void)j;
    CHECK(comm_barrier(c) == 0); /* everybody has left comm_shm_create */
    CHECK(comm_all_reduce(c, buf, c->rank == 1 ? 7 : 8) == ERR_PEER);
    CHECK(comm_barrier(c) == ERR_PEER);
    return 0;
}

static void diverged_ranks_fail(void **state)
{
    (void)state;
    run_all(3, 0, diverge_rank);
}

static int idle_rank(struct job *j, struct comm *c)
{
    char buf[8];
    size_t len;
    say(j);
    if (c->rank == 0) {
        (void)pause();
        return 1;
    }
    CHECK(comm_wait(c, buf, sizeof buf, &len) == ERR_PEER);
    return 0;
}

static void idle_followers_see_the_leader_die(void **state)
{
    (void)state;
    struct job j;
    job_init(&j, 3, TIMEOUT_MS, idle_rank);
    job_start(&j);
    job_await(&j, 3);
    assert_int_equal(kill(j.pids[0], SIGKILL), 0);
    assert_ended_well(&j, 1);
    assert_ended_well(&j, 2);
    assert_killed(&j, 0);
    job_end(&j);
}

/* Idle followers outwait the collectives' timeout: an idle engine sends nothing. */
static int patient_rank(struct job *j, struct comm *c)
{
    char buf[8];
    size_t len;
    if (c->rank == 0) {
        const struct timespec idle = {0, 3000000L * j->cfg.timeout_ms}; /* the time under test */
        (void)nanosleep(&idle, NULL);
        CHECK(comm_post(c, "go", 2) == 0);
        return 0;
    }
    CHECK(comm_wait(c, buf, sizeof buf, &len) == 0);
    return 0;
}

static void idle_followers_have_no_deadline(void **state)
{
    (void)state;
    struct job j;
    job_init(&j, 2, 100, patient_rank);
    job_start(&j);
    assert_ended_well(&j, 0);
    assert_ended_well(&j, 1);
    job_end(&j);
}

static int abort_rank(struct job *j, struct comm *c)
{
    char buf[8];
    size_t len;
    int64_t start = clock_monotonic_us(NULL);
    if (c->rank == 0) {
        char go[2];
        CHECK(read(j->pipe[0], &go[0], 1) == 1);
        CHECK(read(j->pipe[0], &go[1], 1) == 1);
        comm_abort(c);
        comm_abort(c); /* idempotent */
        CHECK(comm_post(c, buf, 1) == ERR_PEER);
        return 0;
    }
    say(j);
    if (c->rank == 1)
        CHECK(comm_barrier(c) == ERR_PEER);
    else
        CHECK(comm_wait(c, buf, sizeof buf, &len) == ERR_PEER);
    CHECK(clock_monotonic_us(NULL) - start < TIMEOUT_MS * 1000 / 4);
    return 0;
}

static void abort_wakes_everybody(void **state)
{
    (void)state;
    run_all(3, 0, abort_rank);
}

/* ---- gathering ---- */

static void bad_configurations_are_named(void **state)
{
    (void)state;
    static const char *const names[] = {NULL, "", "/", "x", "/a/b", "/a b", "/\xff"};
    struct comm *c;
    struct err_msg why;
    struct comm_shm_config good = {
        .name = "/sluice-test", .n_ranks = 2, .max_floats = 8, .max_msg = 8, .timeout_ms = 10};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        struct comm_shm_config cfg = good;
        cfg.name = names[i];
        assert_int_equal(comm_shm_create(&c, &cfg, &why), ERR_INVALID);
        assert_non_null(strstr(why.text, "name"));
        assert_null(c);
    }
    const struct {
        struct comm_shm_config cfg;
        const char *names;
    } bad[] = {
        {{good.name, 2, 2, 8, 8, 10, 0, NULL, NULL}, "rank 2"},
        {{good.name, -1, 2, 8, 8, 10, 0, NULL, NULL}, "rank -1"},
        {{good.name, 0, 65, 8, 8, 10, 0, NULL, NULL}, "n_ranks 65"},
        {{good.name, 0, 2, 0, 8, 10, 0, NULL, NULL}, "max_floats 0"},
        {{good.name, 0, 2, SIZE_MAX, 8, 10, 0, NULL, NULL}, "max_floats"},
        {{good.name, 0, 2, 8, SIZE_MAX, 10, 0, NULL, NULL}, "max_msg"},
        {{good.name, 0, 2, 8, 8, 0, 0, NULL, NULL}, "timeout_ms"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(comm_shm_create(&c, &bad[i].cfg, &why), ERR_INVALID);
        assert_non_null(strstr(why.text, bad[i].names));
    }
}

static void nobody_comes(void **state)
{
    (void)state;
    struct job j;
    struct comm *c;
    struct err_msg why;
    job_init(&j, 2, 30, NULL);
    j.cfg.join_ms = 0;
    assert_int_equal(comm_shm_create(&c, &j.cfg, &why), ERR_PEER);
    assert_string_equal(why.text, "only 1 of 2 ranks joined in time");
    j.cfg.rank = 1;
    assert_int_equal(comm_shm_create(&c, &j.cfg, &why), ERR_PEER);
    assert_non_null(strstr(why.text, "rank 0 did not create"));
    job_end(&j);
}

static bool no_peer_alive(void *arg)
{
    (void)arg;
    return false;
}

static void parent_knows_that_nobody_comes(void **state)
{
    (void)state;
    struct job j;
    struct comm *c;
    struct err_msg why;
    job_init(&j, 2, TIMEOUT_MS, NULL);
    j.cfg.peers_alive = no_peer_alive;
    assert_int_equal(comm_shm_create(&c, &j.cfg, &why), ERR_PEER);
    assert_non_null(strstr(why.text, "ended before it had joined"));
    job_end(&j);
}

/* One side of a gathering that must fail for both; the test process is the other. */
static int join_status(struct comm_shm_config cfg, int want)
{
    struct comm *c = NULL;
    struct err_msg why = {""};
    int err = comm_shm_create(&c, &cfg, &why);
    if (err != want)
        (void)fprintf(stderr, "rank %d: %d (%s), want %d\n", cfg.rank, err, why.text, want);
    comm_close(c);
    return err == want ? STATUS_OK : 1;
}

static void strangers_are_refused(void **state)
{
    (void)state;
    struct job j;
    struct comm *c = NULL;
    struct err_msg why = {""};
    job_init(&j, 2, TIMEOUT_MS, NULL);
    (void)fflush(NULL);
    j.pids[0] = fork();
    if (j.pids[0] == 0)
        _exit(join_status(j.cfg, 0));
    struct comm_shm_config other = j.cfg;
    other.rank = 1;
    other.max_floats *= 2;
    assert_int_equal(comm_shm_create(&c, &other, &why), ERR_CONFIG);
    other = j.cfg; /* the same bytes in all, divided differently */
    other.rank = 1;
    other.n_ranks = 1;
    assert_int_equal(comm_shm_create(&c, &other, &why), ERR_INVALID);
    other = j.cfg; /* rank 0 again */
    assert_int_equal(comm_shm_create(&c, &other, &why), -EEXIST);
    other.rank = 1; /* and none of them has spoilt it for the right one */
    assert_int_equal(comm_shm_create(&c, &other, &why), 0);
    comm_close(c);
    assert_ended_well(&j, 0);
    job_end(&j);
}

/* Dies while the ranks gather; the follower cleans up the name. */
static void leader_dies_while_gathering(void **state)
{
    (void)state;
    struct job j;
    job_init(&j, 3, TIMEOUT_MS, NULL); /* rank 2 never comes */
    (void)fflush(NULL);
    j.pids[0] = fork();
    if (j.pids[0] == 0)
        _exit(join_status(j.cfg, 0));
    j.pids[1] = fork();
    if (j.pids[1] == 0) {
        j.cfg.rank = 1;
        _exit(join_status(j.cfg, ERR_PEER));
    }
    int fd = -1;
    while (fd < 0)
        fd = shm_open(j.name, O_RDWR, 0);
    (void)close(fd);
    const struct timespec join_time = {0, 100 * 1000000};
    (void)nanosleep(&join_time, NULL); /* likely both have joined; either way the end is the same */
    assert_int_equal(kill(j.pids[0], SIGKILL), 0);
    assert_killed(&j, 0);
    assert_ended_well(&j, 1);
    job_end(&j);
}

/* ---- one rank ---- */

static void self_is_the_identity(void **state)
{
    (void)state;
    struct comm *c;
    float a[3] = {1, 2, 3}, b[3] = {0};
    size_t len;
    assert_ok(comm_self_create(&c));
    assert_int_equal(c->rank, 0);
    assert_int_equal(c->n_ranks, 1);
    assert_ok(comm_all_reduce(c, a, 3));
    assert_ok(comm_all_gather(c, b, a, 3));
    assert_ok(comm_all_gather(c, a, a, 3));
    assert_memory_equal(a, b, sizeof a);
    assert_true(a[2] == 3.0f);
    assert_ok(comm_barrier(c));
    assert_ok(comm_post(c, a, sizeof a));
    assert_int_equal(comm_wait(c, a, sizeof a, &len), ERR_INVALID);
    comm_abort(c);
    assert_int_equal(comm_barrier(c), ERR_PEER);
    assert_int_equal(comm_all_reduce(c, a, 3), ERR_PEER);
    comm_close(c);
    comm_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(self_is_the_identity),
        cmocka_unit_test(sums_have_equal_bits),
        cmocka_unit_test(gather_keeps_rank_order),
        cmocka_unit_test(any_mixture_works),
        cmocka_unit_test(messages_arrive_in_order),
        cmocka_unit_test(killed_rank_fails_the_others),
        cmocka_unit_test(zombie_rank_fails_the_others),
        cmocka_unit_test(stopped_rank_fails_the_others),
        cmocka_unit_test(diverged_ranks_fail),
        cmocka_unit_test(idle_followers_see_the_leader_die),
        cmocka_unit_test(idle_followers_have_no_deadline),
        cmocka_unit_test(abort_wakes_everybody),
        cmocka_unit_test(bad_configurations_are_named),
        cmocka_unit_test(nobody_comes),
        cmocka_unit_test(parent_knows_that_nobody_comes),
        cmocka_unit_test(strangers_are_refused),
        cmocka_unit_test(leader_dies_while_gathering),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
