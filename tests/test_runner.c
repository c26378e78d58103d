/* scheduler/runner: one batch out at a time, handed over and back without a race (run it under
 * TSan), every batch collected exactly once, stop waits for the step. */
#include "tests/test.h"

#include "scheduler/runner.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>

enum { N_SEQS = 4, N_BATCHES = 5000 };

/* The model's side and the loop's side of one test. */
struct fixture {
    sem_t notified; /* stands for the loop's wake-up */
    sem_t gate;     /* the step waits here when `gated` */
    bool gated;
    uint64_t steps; /* written by the step only */
    struct runner *runner;
};

static int step(void *arg, const struct batch *b, struct batch_result *r)
{
    struct fixture *f = arg;
    if (f->gated)
        (void)sem_wait(&f->gate);
    f->steps++;
    for (int32_t i = 0; i < b->n_seqs; i++)
        r->tokens[i].token = (int32_t)(b->step_id % 1000) * 10 + i;
    r->total_us = (int64_t)b->step_id;
    return b->step_id % 7 == 0 ? ERR_CUDA : 0;
}

static void notify(void *arg)
{
    (void)sem_post(&((struct fixture *)arg)->notified);
}

static void open_fixture(struct fixture *f, bool gated)
{
    const struct runner_config cfg = {step, f, notify, f, N_SEQS};
    memset(f, 0, sizeof *f);
    f->gated = gated;
    assert_int_equal(sem_init(&f->notified, 0, 0), 0);
    assert_int_equal(sem_init(&f->gate, 0, 0), 0);
    assert_ok(runner_start(&f->runner, &cfg));
}

static void close_fixture(struct fixture *f)
{
    runner_stop(f->runner);
    (void)sem_destroy(&f->notified);
    (void)sem_destroy(&f->gate);
}

/* The batch is rewritten in place between steps, as the scheduler does. */
static void hands_over_and_back(void **state)
{
    struct fixture f = {.gated = false};
    struct batch_seq seqs[N_SEQS];
    struct batch b = {.seqs = seqs};
    struct runner_done done;
    (void)state;
    open_fixture(&f, false);
    assert_false(runner_poll(f.runner, &done));
    for (uint64_t id = 1; id <= N_BATCHES; id++) {
        b.step_id = id;
        b.n_seqs = (int32_t)(id % N_SEQS) + 1;
        assert_ok(runner_submit(f.runner, &b));
        (void)sem_wait(&f.notified);
        assert_true(runner_poll(f.runner, &done));
        assert_ptr_equal(done.batch, &b);
        assert_int_equal(done.status, id % 7 == 0 ? ERR_CUDA : 0);
        assert_int_equal(done.result->total_us, id);
        for (int32_t i = 0; i < b.n_seqs; i++)
            assert_int_equal(done.result->tokens[i].token, (int32_t)(id % 1000) * 10 + i);
        assert_false(runner_poll(f.runner, &done)); /* once per batch */
    }
    close_fixture(&f);
    assert_int_equal(f.steps, N_BATCHES);
}

static void one_at_a_time(void **state)
{
    struct fixture f = {.gated = false};
    struct batch b = {.step_id = 1}, second = {.step_id = 2};
    struct runner_done done;
    (void)state;
    open_fixture(&f, true);
    assert_int_equal(runner_busy_since(f.runner), 0);
    assert_ok(runner_submit(f.runner, &b));
    assert_true(runner_busy_since(f.runner) > 0);
    assert_int_equal(runner_submit(f.runner, &second), -EBUSY);
    assert_false(runner_poll(f.runner, &done)); /* the step stands at the gate */
    (void)sem_post(&f.gate);
    (void)sem_wait(&f.notified);
    assert_int_equal(runner_busy_since(f.runner), 0);
    assert_int_equal(runner_submit(f.runner, &second), -EBUSY); /* not collected yet */
    assert_true(runner_poll(f.runner, &done));
    assert_ptr_equal(done.batch, &b);
    close_fixture(&f);
}

static void *open_gate(void *arg)
{
    (void)sem_post(&((struct fixture *)arg)->gate);
    return NULL;
}

static void stop_waits_for_the_step(void **state)
{
    struct fixture f = {.gated = false};
    struct batch b = {.step_id = 1};
    pthread_t other;
    (void)state;
    open_fixture(&f, true);
    assert_ok(runner_submit(f.runner, &b));
    assert_int_equal(pthread_create(&other, NULL, open_gate, &f), 0);
    runner_stop(f.runner); /* also when the batch is still in the queue */
    (void)pthread_join(other, NULL);
    assert_int_equal(f.steps, 1);
    f.runner = NULL;
    close_fixture(&f);
}

static void stop_without_work(void **state)
{
    struct fixture f = {.gated = false};
    (void)state;
    open_fixture(&f, false);
    close_fixture(&f);
    runner_stop(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hands_over_and_back),
        cmocka_unit_test(one_at_a_time),
        cmocka_unit_test(stop_waits_for_the_step),
        cmocka_unit_test(stop_without_work),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
