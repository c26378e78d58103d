/* What the scheduler learns of the time that prompts take (scheduler/sched_cost.h). */
#include "tests/test.h"

#include "scheduler/sched_cost.h"

#include <math.h>

enum { TOKEN_US = 22, DECODE_US = 9000, LONG = 131072 };

static const double pair_us = 3.3 * TOKEN_US / LONG;

/* +-5% */
static double noisy(struct rng *rng, double us)
{
    return us * (0.95 + 1e-6 * rng_range(rng, 0, 100000));
}

static double true_us(struct sched_work w)
{
    return TOKEN_US * w.tokens + pair_us * w.pairs;
}

static void work(void **state)
{
    (void)state;
    double pairs = 0;
    for (int i = 0; i < 700; i++) /* the query sees half of its own token, so to speak */
        pairs += 300 + i + 0.5;
    assert_close(sched_work_of(300, 700).pairs, pairs, 1e-9, 0);
    assert_close(sched_work_of(300, 700).tokens, 700, 0, 0);
    assert_true(sched_work_of(LONG * 8, LONG * 8).pairs > 1e12); /* no overflow */
}

static void nothing_known(void **state)
{
    struct sched_cost c = {0};
    (void)state;
    assert_int_equal(sched_cost_room(&c, 0, 4096, 1000), 4096);
    assert_int_equal(sched_cost_room(&c, 0, 4096, (double)INFINITY), 4096);
    assert_int_equal(sched_cost_room(&c, 0, 4096, 0), 0);
    assert_int_equal(sched_cost_room(&c, 0, 4096, -5), 0);
    assert_true(sched_cost_us(&c, sched_work_of(0, 128)) == 0);
    sched_cost_learn(&c, (struct sched_work){0}, true,
                     DECODE_US); /* tokens alone: nothing of prompts */
    assert_close(c.decode_us, DECODE_US, 0, 0);
    assert_int_equal(sched_cost_room(&c, 0, 4096, 1000), 4096);
}

/* Chunks of any size at any place, with noise: the fit foretells those to come. */
static void learns(void **state)
{
    struct rng rng = test_rng("learns", 3);
    double worst = 0;
    (void)state;
    for (int round = 0; round < 50; round++) {
        struct sched_cost c = {0};
        for (int i = 0; i < 60; i++) {
            const int32_t n = 128 * rng_range(&rng, 1, 64);
            const struct sched_work w = sched_work_of(128 * rng_range(&rng, 0, 900), n);
            sched_cost_learn(&c, w, true, noisy(&rng, DECODE_US + true_us(w)));
            if (i % 4 == 0)
                sched_cost_learn(&c, (struct sched_work){0}, true, noisy(&rng, DECODE_US));
        }
        for (int i = 0; i < 20; i++) {
            const int32_t start = 128 * rng_range(&rng, 0, 900);
            const double us = 1e4 * rng_range(&rng, 5, 60);
            const int32_t n = sched_cost_room(&c, start, 1 << 20, us);
            const double off = true_us(sched_work_of(start, n)) / us - 1;
            assert_close(sched_cost_us(&c, sched_work_of(start, n)), us, 100, 0.01);
            worst = fabs(off) > worst ? fabs(off) : worst;
        }
    }
    printf("# foretold times are off by %.3f at most\n", worst);
    assert_true(worst < 0.2);
}

/* A prompt that grows tells the two costs apart although its chunks are alike. When its gate falls,
 * the cost of pairs follows within some steps. */
static void follows_a_change(void **state)
{
    struct sched_cost c = {0};
    (void)state;
    for (int32_t at = 0; at < LONG; at += 8192)
        sched_cost_learn(&c, sched_work_of(at, 8192), false, true_us(sched_work_of(at, 8192)));
    assert_close(c.token_us, TOKEN_US, 0, 1e-6);
    assert_close(c.pair_us, pair_us, 0, 1e-6);
    for (int32_t at = 0; at < LONG; at += 4096) {
        const struct sched_work w = sched_work_of(at, 4096);
        sched_cost_learn(&c, w, true, TOKEN_US * w.tokens + 0.4 * pair_us * w.pairs);
    }
    const struct sched_work next = sched_work_of(LONG, 4096);
    const double want = TOKEN_US * next.tokens + 0.4 * pair_us * next.pairs;
    assert_close(sched_cost_us(&c, next) / want, 1, 0.03, 0);
}

/* Decodes that took long once, while there are prompts in every step since; and a prompt alone,
 * whose steps have none. */
static void decodes_are_not_believed_for_ever(void **state)
{
    struct sched_cost c = {0};
    const struct sched_work w = sched_work_of(4096, 1024);
    (void)state;
    sched_cost_learn(&c, (struct sched_work){0}, true, 1e6);
    sched_cost_learn(&c, w, false, 40000);
    assert_close(sched_cost_us(&c, w), 40000, 0, 1e-9);
    for (int i = 0; i < 3; i++)
        sched_cost_learn(&c, w, true, 50000);
    assert_true(c.decode_us <= 50000);
    assert_true(sched_cost_us(&c, w) <= 40001);
}

/* Steps that cannot be told apart, times that fit no such model: never negative, never NaN. */
static void odd_steps(void **state)
{
    struct rng rng = test_rng("odd_steps", 4);
    struct sched_cost c = {0};
    (void)state;
    for (int i = 0; i < 20; i++)
        sched_cost_learn(&c, sched_work_of(4096, 1024), false, 30000);
    assert_close(sched_cost_us(&c, sched_work_of(4096, 1024)), 30000, 0.01, 0);
    for (int i = 0; i < 5000; i++) {
        const struct sched_work w =
            sched_work_of(rng_range(&rng, 0, 1 << 20), rng_range(&rng, 1, 1 << 15));
        sched_cost_learn(&c, i % 7 ? w : (struct sched_work){0}, i % 5 < 3,
                         rng_range(&rng, 0, 3) * 1e5);
        assert_true(c.token_us >= 0 && c.pair_us >= 0 && isfinite(c.token_us + c.pair_us));
        const int32_t n =
            sched_cost_room(&c, rng_range(&rng, 0, 1 << 20), 8192, rng_range(&rng, -10, 1000000));
        assert_in_range(n, 0, 8192);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(work),      cmocka_unit_test(nothing_known),
        cmocka_unit_test(learns),    cmocka_unit_test(follows_a_change),
        cmocka_unit_test(odd_steps), cmocka_unit_test(decodes_are_not_believed_for_ever),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
