/* parallel/shm_area between threads of one process, over plain memory: the same protocol as between
 * processes, but visible to ThreadSanitizer, which would report any share or message that is read
 * without having been waited for. */
#include "tests/test.h"

#include "core/clock.h"
#include "core/mem.h"
#include "parallel/shm_area.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>

enum { MAX_RANKS = 4, PIECE = 100, BIG = 3 * PIECE + 7, MAX_MSG = 64, ROUNDS = 200 };

struct world {
    void *mem;
    int n_ranks;
    int64_t timeout_us;
    int (*run)(struct shm_area *a);
    uint32_t first; /* number of the first exchange and message */
};

struct seat {
    struct world *world;
    int rank, status;
    struct shm_area area;
};

static void *rank_main(void *arg)
{
    struct seat *s = arg;
    struct world *w = s->world;
    s->status = shm_area_attach(&s->area, w->mem, s->rank, w->n_ranks, PIECE, MAX_MSG, NULL);
    s->area.timeout_us = w->timeout_us;
    s->area.n_exchanges = s->area.n_posted = w->first;
    if (s->status == 0)
        s->status = shm_area_await_join(&s->area, 60000000);
    if (s->status == 0)
        s->status = w->run(&s->area);
    return NULL;
}

static void set_counters(struct shm_head *h, int n_ranks, uint32_t first)
{
    atomic_store(&h->posted.value, first * 2);
    for (int r = 0; r < n_ranks; r++) {
        atomic_store(&h->ranks[r].arrived.value, first * 2);
        atomic_store(&h->ranks[r].taken.value, first * 2);
    }
}

/* Runs one function on every rank; statuses end in the seats. */
static void run_world(struct world *w, struct seat *seats)
{
    pthread_t threads[MAX_RANKS];
    size_t bytes = shm_area_bytes(w->n_ranks, PIECE, MAX_MSG);
    w->mem = mem_try_aligned(bytes, 1);
    assert_non_null(w->mem);
    assert_false(shm_area_ready(w->mem));
    shm_area_format(w->mem, w->n_ranks, PIECE, MAX_MSG);
    assert_true(shm_area_ready(w->mem));
    set_counters(w->mem, w->n_ranks, w->first);
    for (int r = 0; r < w->n_ranks; r++) {
        seats[r] = (struct seat){.world = w, .rank = r};
        assert_int_equal(pthread_create(&threads[r], NULL, rank_main, &seats[r]), 0);
    }
    for (int r = 0; r < w->n_ranks; r++)
        (void)pthread_join(threads[r], NULL);
    mem_free(w->mem);
}

static float share_value(int rank, int round, size_t i)
{
    return (float)(rank + 1) * 0.1f + (float)round + (float)i * 0.001f;
}

static bool right_sums(const struct shm_area *a, const float *buf, size_t n, int round)
{
    for (size_t i = 0; i < n; i++) {
        float want = share_value(0, round, i);
        for (int r = 1; r < a->n_ranks; r++)
            want += share_value(r, round, i);
        if (buf[i] != want)
            return false;
    }
    return true;
}

static bool right_shares(const struct shm_area *a, const float *out, size_t n, int round)
{
    for (int r = 0; r < a->n_ranks; r++) {
        for (size_t i = 0; i < n; i++) {
            if (out[(size_t)r * n + i] != share_value(r, round, i))
                return false;
        }
    }
    return true;
}

static int one_message(struct shm_area *a, int round)
{
    char msg[MAX_MSG];
    size_t len = 0, want = (size_t)(round % (MAX_MSG + 1));
    if (a->rank == 0) {
        memset(msg, round & 127, sizeof msg);
        return shm_area_post(a, msg, want);
    }
    TRY(shm_area_wait(a, msg, sizeof msg, &len));
    for (size_t i = 0; i < len; i++) {
        if (msg[i] != (char)(round & 127))
            return ERR_INTERNAL;
    }
    return len == want ? 0 : ERR_INTERNAL;
}

static int run_everything(struct shm_area *a)
{
    float *buf = mem_alloc(BIG * sizeof *buf), *out = mem_alloc(MAX_RANKS * BIG * sizeof *out);
    int err = 0;
    for (int round = 0; round < ROUNDS && err == 0; round++) {
        size_t n = (size_t)(round * 37) % (BIG + 1);
        for (size_t i = 0; i < n; i++)
            buf[i] = share_value(a->rank, round, i);
        err = shm_area_gather(a, out, buf, n);
        if (err == 0 && !right_shares(a, out, n, round))
            err = ERR_INTERNAL;
        if (err == 0)
            err = shm_area_reduce(a, buf, n);
        if (err == 0 && !right_sums(a, buf, n, round))
            err = ERR_INTERNAL;
        if (err == 0)
            err = one_message(a, round);
        if (err == 0 && round % 3 == 0)
            err = shm_area_barrier(a);
    }
    mem_free(buf);
    mem_free(out);
    return err;
}

static void ranks_agree(void **state)
{
    (void)state;
    struct seat seats[MAX_RANKS];
    for (int n = 1; n <= MAX_RANKS; n++) {
        struct world w = {.n_ranks = n, .timeout_us = 60000000, .run = run_everything};
        run_world(&w, seats);
        for (int r = 0; r < n; r++)
            assert_int_equal(seats[r].status, 0);
    }
}

/* Rank 0 gives up while the others wait in an exchange, or in the mailbox. */
static int run_until_failed(struct shm_area *a)
{
    char msg[MAX_MSG];
    size_t len;
    if (a->rank == 0) {
        shm_area_fail(a);
        return shm_area_post(a, msg, 0);
    }
    return a->rank == 1 ? shm_area_barrier(a) : shm_area_wait(a, msg, sizeof msg, &len);
}

static void failure_reaches_all(void **state)
{
    (void)state;
    struct seat seats[MAX_RANKS];
    for (int i = 0; i < 50; i++) { /* before, while and after the others fall asleep */
        struct world w = {.n_ranks = 3, .timeout_us = 60000000, .run = run_until_failed};
        int64_t start = clock_monotonic_us(NULL);
        run_world(&w, seats);
        for (int r = 0; r < 3; r++)
            assert_int_equal(seats[r].status, ERR_PEER);
        assert_true(clock_monotonic_us(NULL) - start < 20000000);
    }
}

static int run_late(struct shm_area *a)
{
    return a->rank == 2 ? 0 : shm_area_barrier(a); /* rank 2 never comes */
}

static void absence_times_out(void **state)
{
    (void)state;
    struct seat seats[MAX_RANKS];
    struct world w = {.n_ranks = 3, .timeout_us = 20000, .run = run_late};
    run_world(&w, seats);
    assert_int_equal(seats[0].status, ERR_PEER);
    assert_int_equal(seats[1].status, ERR_PEER);
}

/* Rank 0 does not post again before everybody has read: a slow follower is a stuck peer. */
static int run_deaf(struct shm_area *a)
{
    if (a->rank != 0)
        return 0;
    TRY(shm_area_post(a, "x", 1));
    return shm_area_post(a, "y", 1);
}

static void an_unread_message_times_out(void **state)
{
    (void)state;
    struct seat seats[MAX_RANKS];
    struct world w = {.n_ranks = 2, .timeout_us = 20000, .run = run_deaf};
    run_world(&w, seats);
    assert_int_equal(seats[0].status, ERR_PEER);
}

/* The counters wrap around after 2^31 events; start shortly before. */
static void counters_wrap(void **state)
{
    (void)state;
    struct seat seats[MAX_RANKS];
    struct world w = {
        .n_ranks = 2, .timeout_us = 60000000, .run = run_everything, .first = UINT32_MAX / 2 - 50};
    run_world(&w, seats);
    assert_int_equal(seats[0].status, 0);
    assert_int_equal(seats[1].status, 0);
}

static void strangers_are_refused(void **state)
{
    (void)state;
    struct shm_area a, b;
    struct err_msg why = {""};
    void *mem = mem_try_aligned(shm_area_bytes(2, PIECE, MAX_MSG), 1);
    assert_non_null(mem);
    assert_int_equal(shm_area_attach(&a, mem, 0, 2, PIECE, MAX_MSG, &why), ERR_VERSION);
    shm_area_format(mem, 2, PIECE, MAX_MSG);
    assert_int_equal(shm_area_attach(&a, mem, 0, 3, PIECE, MAX_MSG, &why), ERR_CONFIG);
    assert_string_equal(why.text, "n_ranks is 3 here and 2 on rank 0");
    assert_int_equal(shm_area_attach(&a, mem, 0, 2, PIECE + 1, MAX_MSG, &why), ERR_CONFIG);
    assert_non_null(strstr(why.text, "max_floats"));
    assert_int_equal(shm_area_attach(&a, mem, 0, 2, PIECE, MAX_MSG + 1, &why), ERR_CONFIG);
    assert_non_null(strstr(why.text, "max_msg"));
    assert_int_equal(shm_area_attach(&a, mem, 2, 2, PIECE, MAX_MSG, &why), ERR_INVALID);
    assert_ok(shm_area_attach(&a, mem, 1, 2, PIECE, MAX_MSG, &why));
    assert_int_equal(shm_area_attach(&b, mem, 1, 2, PIECE, MAX_MSG, &why), -EEXIST);
    assert_non_null(strstr(why.text, "rank 1 has already joined"));
    assert_int_equal(shm_area_n_joined(&a), 1);
    assert_int_equal(shm_area_await_join(&a, 0), -ETIMEDOUT);
    mem_free(mem);
}

static void sizes_are_checked(void **state)
{
    (void)state;
    assert_int_equal(shm_area_bytes(0, 1, 1), 0);
    assert_int_equal(shm_area_bytes(SHM_MAX_RANKS + 1, 1, 1), 0);
    assert_int_equal(shm_area_bytes(1, 0, 1), 0);
    assert_int_equal(shm_area_bytes(2, SIZE_MAX, 1), 0);
    assert_int_equal(shm_area_bytes(2, 1, SIZE_MAX), 0);
    assert_true(shm_area_bytes(2, 1, 0) >= sizeof(struct shm_head) + 4 * SHM_LINE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranks_agree),       cmocka_unit_test(failure_reaches_all),
        cmocka_unit_test(absence_times_out), cmocka_unit_test(an_unread_message_times_out),
        cmocka_unit_test(counters_wrap),     cmocka_unit_test(strangers_are_refused),
        cmocka_unit_test(sizes_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
