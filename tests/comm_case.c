#include "tests/comm_case.h"

#include "core/clock.h"

#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

void job_init(struct job *j, const struct comm_kind *kind, int n_ranks, int64_t timeout_ms,
              int (*run)(struct job *j, struct comm *c))
{
    *j = (struct job){.kind = kind, .n_ranks = n_ranks, .timeout_ms = timeout_ms, .run = run};
    assert_ok(kind->prepare(j));
    assert_int_equal(pipe(j->pipe), 0);
}

_Noreturn static void child(struct job *j, int rank)
{
    struct err_msg why = {""};
    struct comm *c = NULL;

    (void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* a failed test leaves nobody behind */
    int err = j->kind->create(&c, j, rank, &why);
    if (err < 0) {
        (void)fprintf(stderr, "rank %d: %s\n", rank, err_why(&why, err));
        _exit(2);
    }
    int status = j->run(j, c);
    comm_close(c);
    _exit(status ? status : STATUS_OK);
}

void job_start(struct job *j)
{
    for (int r = 0; r < j->n_ranks; r++) {
        (void)fflush(NULL);
        j->pids[r] = fork();
        assert_true(j->pids[r] >= 0);
        if (j->pids[r] == 0)
            child(j, r);
    }
}

void job_await(struct job *j, int n)
{
    char byte;
    for (int i = 0; i < n; i++)
        assert_int_equal(read(j->pipe[0], &byte, 1), 1);
}

void job_say(const struct job *j)
{
    if (write(j->pipe[1], "x", 1) != 1)
        _exit(3);
}

void assert_ended_well(struct job *j, int rank)
{
    int status;
    assert_int_equal(waitpid(j->pids[rank], &status, 0), j->pids[rank]);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != STATUS_OK)
        fail_msg("rank %d of %d: wait status %#x", rank, j->n_ranks, status);
}

void assert_killed(struct job *j, int rank)
{
    int status;
    assert_int_equal(waitpid(j->pids[rank], &status, 0), j->pids[rank]);
    assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

void job_end(struct job *j)
{
    j->kind->clean(j);
    (void)close(j->pipe[0]);
    (void)close(j->pipe[1]);
}

void job_run_all(const struct comm_kind *kind, int n_ranks, uint64_t seed,
                 int (*run)(struct job *j, struct comm *c))
{
    struct job j;
    job_init(&j, kind, n_ranks, TIMEOUT_MS, run);
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

void sums_have_equal_bits(void **state)
{
    const struct comm_kind *kind = *state;
    struct rng g = test_rng("sums_have_equal_bits", 11);
    for (int n = 1; n <= MAX_RANKS; n++)
        job_run_all(kind, n, rng_u64(&g) >> 16, reduce_rank);
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

void gather_keeps_rank_order(void **state)
{
    const struct comm_kind *kind = *state;
    struct rng g = test_rng("gather_keeps_rank_order", 12);
    for (int n = 1; n <= MAX_RANKS; n++)
        job_run_all(kind, n, rng_u64(&g) >> 16, gather_rank);
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

void any_mixture_works(void **state)
{
    const struct comm_kind *kind = *state;
    struct rng g = test_rng("any_mixture_works", 13);
    for (int n = 2; n <= MAX_RANKS; n++)
        job_run_all(kind, n, rng_u64(&g) >> 16, mixture_rank);
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

void messages_arrive_in_order(void **state)
{
    const struct comm_kind *kind = *state;
    for (int n = 2; n <= MAX_RANKS; n++)
        job_run_all(kind, n, 0, post_rank);
}

/* ---- failures ---- */

static int reduce_until_failure(struct job *j, struct comm *c)
{
    static float buf[BIG];
    job_say(j);
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

void killed_rank_fails_the_others(void **state)
{
    const struct comm_kind *kind = *state;
    for (int victim = 0; victim < 3; victim++) {
        struct job j;
        job_init(&j, kind, 3, TIMEOUT_MS, reduce_until_failure);
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
void zombie_rank_fails_the_others(void **state)
{
    const struct comm_kind *kind = *state;
    struct job j;
    job_init(&j, kind, 2, TIMEOUT_MS, reduce_until_failure);
    job_start(&j);
    job_await(&j, 2);
    int64_t start = clock_monotonic_us(NULL);
    assert_int_equal(kill(j.pids[1], SIGKILL), 0);
    assert_ended_well(&j, 0);
    assert_true(clock_monotonic_us(NULL) - start < TIMEOUT_MS * 1000 / 4);
    assert_killed(&j, 1);
    job_end(&j);
}

void stopped_rank_fails_the_others(void **state)
{
    const struct comm_kind *kind = *state;
    for (int victim = 0; victim < 3; victim++) {
        struct job j;
        job_init(&j, kind, 3, SHORT_MS, reduce_until_failure);
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

void diverged_ranks_fail(void **state)
{
    const struct comm_kind *kind = *state;
    job_run_all(kind, 3, 0, diverge_rank);
}

static int idle_rank(struct job *j, struct comm *c)
{
    char buf[8];
    size_t len;
    job_say(j);
    if (c->rank == 0) {
        (void)pause();
        return 1;
    }
    CHECK(comm_wait(c, buf, sizeof buf, &len) == ERR_PEER);
    return 0;
}

void idle_followers_see_the_leader_die(void **state)
{
    const struct comm_kind *kind = *state;
    struct job j;
    job_init(&j, kind, 3, TIMEOUT_MS, idle_rank);
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
        const struct timespec idle = {0, 3000000L * j->timeout_ms}; /* the time under test */
        (void)nanosleep(&idle, NULL);
        CHECK(comm_post(c, "go", 2) == 0);
        return 0;
    }
    CHECK(comm_wait(c, buf, sizeof buf, &len) == 0);
    return 0;
}

void idle_followers_have_no_deadline(void **state)
{
    const struct comm_kind *kind = *state;
    struct job j;
    job_init(&j, kind, 2, 100, patient_rank);
    job_start(&j);
    assert_ended_well(&j, 0);
    assert_ended_well(&j, 1);
    job_end(&j);
}

static int late_rank(struct job *j, struct comm *c)
{
    comm_set_timeout(c, TIMEOUT_MS);
    if (c->rank == 0) {
        const struct timespec late = {0, 4000000L * j->timeout_ms}; /* the time under test */
        (void)nanosleep(&late, NULL);
    }
    CHECK(comm_barrier(c) == 0);
    return 0;
}

void another_deadline_can_be_set(void **state)
{
    const struct comm_kind *kind = *state;
    struct job j;
    job_init(&j, kind, 3, 100, late_rank);
    job_start(&j);
    for (int r = 0; r < 3; r++)
        assert_ended_well(&j, r);
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
    job_say(j);
    if (c->rank == 1)
        CHECK(comm_barrier(c) == ERR_PEER);
    else
        CHECK(comm_wait(c, buf, sizeof buf, &len) == ERR_PEER);
    CHECK(clock_monotonic_us(NULL) - start < TIMEOUT_MS * 1000 / 4);
    return 0;
}

void abort_wakes_everybody(void **state)
{
    const struct comm_kind *kind = *state;
    job_run_all(kind, 3, 0, abort_rank);
}

bool no_peer_alive(void *arg)
{
    (void)arg;
    return false;
}
