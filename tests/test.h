/* What every test file includes: cmocka in the order it wants, seeds, float comparison. */
#ifndef TESTS_TEST_H
#define TESTS_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include <math.h>
#include <string.h>

/* SplitMix64: small, seedable, the same everywhere. */
struct rng {
    uint64_t s;
};

static inline uint64_t rng_u64(struct rng *r)
{
    uint64_t z = (r->s += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* Uniform in [lo, hi], inclusive. */
static inline int32_t rng_range(struct rng *r, int32_t lo, int32_t hi)
{
    return lo + (int32_t)(rng_u64(r) % (uint64_t)((int64_t)hi - lo + 1));
}

static inline double rng_unit(struct rng *r)
{
    return (double)(rng_u64(r) >> 11) * 0x1p-53;
}

static inline double rng_normal(struct rng *r)
{
    double u = rng_unit(r) + 0x1p-54, v = rng_unit(r);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

/* Seed of a randomised test: TEST_SEED from the environment or `fallback`; printed so that a
 * failure can be replayed. */
static inline struct rng test_rng(const char *name, uint64_t fallback)
{
    const char *env = getenv("TEST_SEED"); // NOLINT(concurrency-mt-unsafe)
    uint64_t seed = env ? strtoull(env, NULL, 0) : fallback;
    printf("# %s: TEST_SEED=%llu\n", name, (unsigned long long)seed);
    return (struct rng){seed};
}

#define assert_close(got, want, atol, rtol)                                                        \
    do {                                                                                           \
        double got_ = (got), want_ = (want);                                                       \
        if (!(fabs(got_ - want_) <= (atol) + (rtol)*fabs(want_)))                                  \
            fail_msg("%s = %.9g, want %.9g", #got, got_, want_);                                   \
    } while (0)

#define assert_ok(e)                                                                               \
    do {                                                                                           \
        int err_ = (e);                                                                            \
        if (err_ < 0)                                                                              \
            fail_msg("%s: %d", #e, err_);                                                          \
    } while (0)

#endif
