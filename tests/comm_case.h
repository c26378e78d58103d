/* Cases that every communicator between processes must pass, and the forked ranks they run on.
 * Every rank is a child; a child reports through its exit status, so an assertion there is `return`
 * with a line number (see CHECK). A test program gives its kind of communicator and lists
 * COMM_CASES. */
#ifndef TESTS_COMM_CASE_H
#define TESTS_COMM_CASE_H

#include "tests/test.h"

#include "parallel/comm.h"

#include <stdbool.h>
#include <sys/types.h>

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

struct job;

struct comm_kind {
    int (*prepare)(struct job *j); /* before the ranks start, in the test */
    int (*create)(struct comm **out, const struct job *j, int rank, struct err_msg *why);
    void (*clean)(struct job *j); /* after they have ended: releases, and checks what is left */
};

struct job {
    const struct comm_kind *kind;
    int n_ranks;
    int64_t timeout_ms;
    uint64_t seed;
    char name[64]; /* where the ranks meet, as the kind understands it */
    int listen_fd; /* rank 0's, where the kind has one */
    int pipe[2];   /* ranks tell the test that they are about to block */
    int (*run)(struct job *j, struct comm *c);
    pid_t pids[MAX_RANKS];
};

void job_init(struct job *j, const struct comm_kind *kind, int n_ranks, int64_t timeout_ms,
              int (*run)(struct job *j, struct comm *c));
void job_start(struct job *j);
void job_await(struct job *j, int n); /* blocks until n ranks have said something */
void job_say(const struct job *j);
void job_end(struct job *j);
void job_run_all(const struct comm_kind *kind, int n_ranks, uint64_t seed,
                 int (*run)(struct job *j, struct comm *c));
void assert_ended_well(struct job *j, int rank);
void assert_killed(struct job *j, int rank);

/* Their state is the kind. */
void sums_have_equal_bits(void **state);
void gather_keeps_rank_order(void **state);
void any_mixture_works(void **state);
void messages_arrive_in_order(void **state);
void killed_rank_fails_the_others(void **state);
void zombie_rank_fails_the_others(void **state);
void stopped_rank_fails_the_others(void **state);
void diverged_ranks_fail(void **state);
void idle_followers_see_the_leader_die(void **state);
void idle_followers_have_no_deadline(void **state);
void another_deadline_can_be_set(void **state);
void abort_wakes_everybody(void **state);

#define COMM_CASES(kind)                                                                           \
    cmocka_unit_test_prestate(sums_have_equal_bits, (void *)(uintptr_t)(kind)),                    \
        cmocka_unit_test_prestate(gather_keeps_rank_order, (void *)(uintptr_t)(kind)),             \
        cmocka_unit_test_prestate(any_mixture_works, (void *)(uintptr_t)(kind)),                   \
        cmocka_unit_test_prestate(messages_arrive_in_order, (void *)(uintptr_t)(kind)),            \
        cmocka_unit_test_prestate(killed_rank_fails_the_others, (void *)(uintptr_t)(kind)),        \
        cmocka_unit_test_prestate(zombie_rank_fails_the_others, (void *)(uintptr_t)(kind)),        \
        cmocka_unit_test_prestate(stopped_rank_fails_the_others, (void *)(uintptr_t)(kind)),       \
        cmocka_unit_test_prestate(diverged_ranks_fail, (void *)(uintptr_t)(kind)),                 \
        cmocka_unit_test_prestate(idle_followers_see_the_leader_die, (void *)(uintptr_t)(kind)),   \
        cmocka_unit_test_prestate(idle_followers_have_no_deadline, (void *)(uintptr_t)(kind)),     \
        cmocka_unit_test_prestate(another_deadline_can_be_set, (void *)(uintptr_t)(kind)),         \
        cmocka_unit_test_prestate(abort_wakes_everybody, (void *)(uintptr_t)(kind))

/* peers_alive of a parent whose children are all gone. */
bool no_peer_alive(void *arg);

#endif
