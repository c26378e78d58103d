/* parallel/comm_shm: the cases of every communicator over shared memory, and how its ranks gather.
 */
#include "tests/comm_case.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static struct comm_shm_config shm_config(const struct job *j, int rank)
{
    return (struct comm_shm_config){.name = j->name,
                                    .rank = rank,
                                    .n_ranks = j->n_ranks,
                                    .max_floats = PIECE,
                                    .max_msg = MAX_MSG,
                                    .timeout_ms = j->timeout_ms,
                                    .join_ms = TIMEOUT_MS};
}

static int shm_prepare(struct job *j)
{
    return comm_shm_name(j->name, sizeof j->name);
}

static int shm_create(struct comm **out, const struct job *j, int rank, struct err_msg *why)
{
    const struct comm_shm_config cfg = shm_config(j, rank);
    return comm_shm_create(out, &cfg, why);
}

/* Nothing of this test program may be left in the file system of shared memory. */
static void shm_clean(struct job *j)
{
    int fd = shm_open(j->name, O_RDWR, 0);
    assert_int_equal(fd, -1);
    assert_int_equal(errno, ENOENT);
}

static const struct comm_kind shm_kind = {shm_prepare, shm_create, shm_clean};

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
    job_init(&j, &shm_kind, 2, 30, NULL);
    struct comm_shm_config cfg = shm_config(&j, 0);
    cfg.join_ms = 0;
    assert_int_equal(comm_shm_create(&c, &cfg, &why), ERR_PEER);
    assert_string_equal(why.text, "only 1 of 2 ranks joined in time");
    cfg.rank = 1;
    assert_int_equal(comm_shm_create(&c, &cfg, &why), ERR_PEER);
    assert_non_null(strstr(why.text, "rank 0 did not create"));
    job_end(&j);
}

static void parent_knows_that_nobody_comes(void **state)
{
    (void)state;
    struct job j;
    struct comm *c;
    struct err_msg why;
    job_init(&j, &shm_kind, 2, TIMEOUT_MS, NULL);
    struct comm_shm_config cfg = shm_config(&j, 0);
    cfg.peers_alive = no_peer_alive;
    assert_int_equal(comm_shm_create(&c, &cfg, &why), ERR_PEER);
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
    job_init(&j, &shm_kind, 2, TIMEOUT_MS, NULL);
    (void)fflush(NULL);
    j.pids[0] = fork();
    if (j.pids[0] == 0)
        _exit(join_status(shm_config(&j, 0), 0));
    struct comm_shm_config other = shm_config(&j, 1);
    other.max_floats *= 2;
    assert_int_equal(comm_shm_create(&c, &other, &why), ERR_CONFIG);
    other = shm_config(&j, 1); /* the same bytes in all, divided differently */
    other.n_ranks = 1;
    assert_int_equal(comm_shm_create(&c, &other, &why), ERR_INVALID);
    other = shm_config(&j, 0); /* rank 0 again */
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
    job_init(&j, &shm_kind, 3, TIMEOUT_MS, NULL); /* rank 2 never comes */
    (void)fflush(NULL);
    j.pids[0] = fork();
    if (j.pids[0] == 0)
        _exit(join_status(shm_config(&j, 0), 0));
    j.pids[1] = fork();
    if (j.pids[1] == 0)
        _exit(join_status(shm_config(&j, 1), ERR_PEER));
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
        cmocka_unit_test(self_is_the_identity),           COMM_CASES(&shm_kind),
        cmocka_unit_test(bad_configurations_are_named),   cmocka_unit_test(nobody_comes),
        cmocka_unit_test(parent_knows_that_nobody_comes), cmocka_unit_test(strangers_are_refused),
        cmocka_unit_test(leader_dies_while_gathering),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
