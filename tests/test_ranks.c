/* parallel/ranks: starting, watching and ending followers. The followers are this very program:
 * with a first argument it plays a part instead of running the tests. */
#include "tests/test.h"

#include "core/clock.h"
#include "parallel/comm.h"
#include "parallel/ranks.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TIMEOUT_MS = 20000, MAX_EVENTS = 8 };

struct event {
    int rank, status, signal;
};

struct fixture {
    uv_loop_t loop;
    struct ranks *ranks;
    char shm[64];
    struct event events[MAX_EVENTS];
    int n_events;
    bool stop_on_exit;
};

static void on_exit_event(void *ctx, int rank, int status, int signal_number)
{
    struct fixture *f = ctx;
    assert_true(f->n_events < MAX_EVENTS);
    f->events[f->n_events++] = (struct event){rank, status, signal_number};
    if (f->stop_on_exit) {
        ranks_kill(f->ranks);
        ranks_stop(f->ranks, TIMEOUT_MS);
    }
}

static void start(struct fixture *f, int n_ranks, const char *part)
{
    struct err_msg why = {""};
    char *argv[] = {(char *)"test_ranks", (char *)part, NULL};
    *f = (struct fixture){.stop_on_exit = false};
    assert_ok(uv_loop_init(&f->loop));
    assert_ok(comm_shm_name(f->shm, sizeof f->shm));
    const struct ranks_config cfg = {.loop = &f->loop,
                                     .n_ranks = n_ranks,
                                     .argc = 2,
                                     .argv = argv,
                                     .shm = f->shm,
                                     .on_exit = on_exit_event,
                                     .ctx = f};
    int err = ranks_start(&f->ranks, &cfg, &why);
    if (err < 0)
        fail_msg("%s", err_why(&why, err));
}

/* Runs the loop until nothing is left in it, then expects no handle and no child. */
static void finish(struct fixture *f)
{
    assert_int_equal(uv_run(&f->loop, UV_RUN_DEFAULT), 0);
    assert_int_equal(uv_loop_close(&f->loop), 0);
    assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
    assert_int_equal(errno, ECHILD);
    assert_int_equal(shm_open(f->shm, O_RDWR, 0), -1);
}

static struct comm_shm_config comm_config(const char *name, int rank, int n_ranks)
{
    return (struct comm_shm_config){.name = name,
                                    .rank = rank,
                                    .n_ranks = n_ranks,
                                    .max_floats = 16,
                                    .max_msg = 16,
                                    .timeout_ms = TIMEOUT_MS};
}

/* ---- the parts a follower plays ---- */

struct follower_args {
    int rank;
    const char *shm;
};

static struct follower_args parse_follower(int argc, char **argv)
{
    struct follower_args a = {0, NULL};
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "--rank=", 7) == 0)
            a.rank = atoi(argv[i] + 7);
        if (strncmp(argv[i], "--shm=", 6) == 0)
            a.shm = argv[i] + 6;
    }
    return a;
}

/* Sums once with the others, then waits for messages until "stop". */
static int part_follow(const struct follower_args *a, int n_ranks)
{
    struct err_msg why = {""};
    struct comm *c = NULL;
    struct comm_shm_config cfg = comm_config(a->shm, a->rank, n_ranks);
    char msg[16] = "";
    size_t len = 0;
    float x = (float)a->rank;

    int err = comm_shm_create(&c, &cfg, &why);
    if (err == 0)
        err = comm_all_reduce(c, &x, 1);
    while (err == 0 && strcmp(msg, "stop") != 0)
        err = comm_wait(c, msg, sizeof msg, &len);
    comm_close(c);
    return err == 0 ? 0 : 5;
}

static int play(const char *part, int argc, char **argv)
{
    struct follower_args a = parse_follower(argc, argv);
    if (a.rank < 1 || !a.shm || ranks_follower_init(NULL) < 0)
        return 99;
    if (strcmp(part, "follow2") == 0)
        return part_follow(&a, 2);
    if (strcmp(part, "follow3") == 0)
        return part_follow(&a, 3);
    if (strcmp(part, "exit") == 0)
        return 10 + a.rank;
    for (;;) /* "stay": deaf to everything but SIGKILL */
        (void)pause();
}

/* ---- tests ---- */

static void orderly_life(void **state)
{
    (void)state;
    struct fixture f;
    struct comm *c;
    struct err_msg why = {""};
    float x = 0;
    start(&f, 3, "follow3");
    struct comm_shm_config cfg = comm_config(f.shm, 0, 3);
    cfg.peers_alive = ranks_alive;
    cfg.peers_arg = f.ranks;
    assert_ok(comm_shm_create(&c, &cfg, &why));
    assert_ok(comm_all_reduce(c, &x, 1));
    assert_true(x == 3.0f);
    assert_true(ranks_alive(f.ranks));
    assert_true(ranks_pid(f.ranks, 1) > 0 && ranks_pid(f.ranks, 2) > 0);
    assert_int_equal(ranks_pid(f.ranks, 0), 0);
    assert_int_equal(ranks_pid(f.ranks, 3), 0);
    assert_ok(comm_post(c, "stop", 5));
    ranks_stop(f.ranks, TIMEOUT_MS);
    int64_t start_us = clock_monotonic_us(NULL);
    finish(&f);
    assert_true(clock_monotonic_us(NULL) - start_us < TIMEOUT_MS * 1000 / 2); /* not killed */
    assert_int_equal(f.n_events, 0);
    comm_close(c);
}

static void an_unexpected_exit_is_reported(void **state)
{
    (void)state;
    struct fixture f;
    start(&f, 3, "exit");
    while (f.n_events < 2)
        (void)uv_run(&f.loop, UV_RUN_ONCE);
    assert_int_equal(f.events[0].status, 10 + f.events[0].rank);
    assert_int_equal(f.events[1].status, 10 + f.events[1].rank);
    assert_int_equal(f.events[0].rank + f.events[1].rank, 3);
    assert_int_equal(f.events[0].signal, 0);
    assert_false(ranks_alive(f.ranks));
    ranks_stop(f.ranks, TIMEOUT_MS);
    finish(&f);
}

static void a_killed_rank_is_reported_and_the_rest_killed(void **state)
{
    (void)state;
    struct fixture f;
    start(&f, 4, "stay");
    f.stop_on_exit = true;
    assert_int_equal(kill(ranks_pid(f.ranks, 2), SIGKILL), 0);
    finish(&f);
    assert_int_equal(f.n_events, 1); /* the others were ended on purpose */
    assert_int_equal(f.events[0].rank, 2);
    assert_int_equal(f.events[0].signal, SIGKILL);
}

static void stubborn_ranks_are_killed_after_the_grace_time(void **state)
{
    (void)state;
    struct fixture f;
    start(&f, 3, "stay");
    assert_int_equal(kill(ranks_pid(f.ranks, 1), SIGSTOP), 0); /* a stopped one as well */
    ranks_stop(f.ranks, 10);
    finish(&f);
    assert_int_equal(f.n_events, 0);
}

static void a_missing_program_is_an_error(void **state)
{
    (void)state;
    struct fixture f = {.stop_on_exit = false};
    struct err_msg why = {""};
    char *argv[] = {(char *)"x", NULL};
    assert_ok(uv_loop_init(&f.loop));
    const struct ranks_config cfg = {.loop = &f.loop,
                                     .n_ranks = 3,
                                     .argc = 1,
                                     .argv = argv,
                                     .shm = "/x",
                                     .exe = "/nonexistent/sluiced"};
    assert_int_equal(ranks_start(&f.ranks, &cfg, &why), -ENOENT);
    assert_non_null(strstr(why.text, "rank 1 (/nonexistent/sluiced)"));
    assert_null(f.ranks);
    (void)snprintf(f.shm, sizeof f.shm, "/x");
    finish(&f);
    ranks_kill(NULL);
    ranks_stop(NULL, 1);
}

/* A follower that ends before it has joined must not cost the whole join time. */
static void a_start_up_death_ends_the_gathering(void **state)
{
    (void)state;
    struct fixture f;
    struct comm *c;
    struct err_msg why = {""};
    start(&f, 2, "exit");
    struct comm_shm_config cfg = comm_config(f.shm, 0, 2);
    cfg.peers_alive = ranks_alive;
    cfg.peers_arg = f.ranks;
    int64_t start_us = clock_monotonic_us(NULL);
    assert_int_equal(comm_shm_create(&c, &cfg, &why), ERR_PEER);
    assert_true(clock_monotonic_us(NULL) - start_us < TIMEOUT_MS * 1000 / 2);
    ranks_stop(f.ranks, TIMEOUT_MS);
    finish(&f);
}

/* Plays a leader that dies by SIGKILL; writes its followers' pids to fd first. */
_Noreturn static void doomed_leader(int fd, const char *part)
{
    struct fixture f;
    start(&f, 3, part);
    int pids[2] = {ranks_pid(f.ranks, 1), ranks_pid(f.ranks, 2)};
    if (strcmp(part, "follow3") == 0) { /* followers idle in comm_wait */
        struct comm *c = NULL;
        struct comm_shm_config cfg = comm_config(f.shm, 0, 3);
        float x = 0;
        if (comm_shm_create(&c, &cfg, NULL) < 0 || comm_all_reduce(c, &x, 1) < 0)
            _exit(1);
    }
    if (write(fd, pids, sizeof pids) != (ssize_t)sizeof pids)
        _exit(1);
    for (;;)
        (void)pause();
}

/* The test adopts the orphans (child subreaper), so it can see how they ended. */
static void followers_die_with_the_leader(void **state)
{
    (void)state;
    int fds[2], pids[2], status;
    assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 1), 0);
    assert_int_equal(pipe(fds), 0);
    (void)fflush(NULL);
    pid_t leader = fork();
    if (leader == 0)
        doomed_leader(fds[1], "follow3");
    assert_int_equal(read(fds[0], pids, sizeof pids), sizeof pids);
    assert_int_equal(kill(leader, SIGKILL), 0);
    assert_int_equal(waitpid(leader, &status, 0), leader);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(waitpid(pids[i], &status, 0), pids[i]);
        /* the kernel's signal or comm_wait's own check, whichever comes first */
        assert_true((WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) ||
                    (WIFEXITED(status) && WEXITSTATUS(status) == 5));
    }
    assert_int_equal(prctl(PR_SET_CHILD_SUBREAPER, 0), 0);
    (void)close(fds[0]);
    (void)close(fds[1]);
}

int main(int argc, char **argv)
{
    if (argc > 1)
        return play(argv[1], argc, argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(orderly_life),
        cmocka_unit_test(an_unexpected_exit_is_reported),
        cmocka_unit_test(a_killed_rank_is_reported_and_the_rest_killed),
        cmocka_unit_test(stubborn_ranks_are_killed_after_the_grace_time),
        cmocka_unit_test(a_missing_program_is_an_error),
        cmocka_unit_test(a_start_up_death_ends_the_gathering),
        cmocka_unit_test(followers_die_with_the_leader),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
