/* calibration/select_cuda on the device, beside calib_select on the host: every level's midpoint
 * bit for bit over random maxima, many equal ones, few pages and the most there may be; both sizes
 * of row groups; what is not a number; what must not be written. test_select_cuda [quick]: the last
 * two alone, for slow tools. Exit status 77: no device.
 */
#include "tests/cuda_case.h"

#include "calibration/calibrate.h"
#include "calibration/select_cuda.h"

#include <cuda_runtime_api.h>

enum { HEADS = 3, STRIDE_SLACK = 2 };
static const float scale = 0.0883883461f;

static int32_t ordered(float x)
{
    int32_t i;
    memcpy(&i, &x, sizeof i);
    if (isnan(x))
        return INT32_MAX;
    return i < 0 ? i ^ 0x7fffffff : i;
}

static float score(int32_t x)
{
    const int32_t bits = x < 0 ? x ^ 0x7fffffff : x;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* kind 0: random, 1: few values and both zeros, 2: all equal, 3: tiny and huge. */
static float draw(struct rng *r, int kind)
{
    static const float few[] = {-2.5f, -0.0f, 0.0f, 7.0f};
    switch (kind) {
    case 0: return (float)(rng_normal(r) * 30);
    case 1: return few[rng_range(r, 0, 3)];
    case 2: return -1.5f;
    default: return (float)ldexp(rng_normal(r), rng_range(r, -140, 120));
    }
}

struct select_case {
    struct select_cuda s;
    int32_t *max; /* host */
    size_t n_max, n_t;
};

static void make(struct select_case *c, struct rng *r, int32_t first, int32_t n, int32_t gate_rows,
                 int kind)
{
    const int32_t per = 128 / gate_rows, groups = n * per + rng_range(r, 0, 2);
    const int32_t pages = 2 * (first + n - 1) + rng_range(r, 0, 5) + 1;
    c->s = (struct select_cuda){.max_groups = groups,
                                .max_pages = pages,
                                .n_heads = HEADS,
                                .first_block = first,
                                .n_blocks = n,
                                .gate_rows = gate_rows,
                                .scale = scale,
                                .head_stride = first + n + STRIDE_SLACK};
    for (int32_t k = 1; c->s.n_levels < SELECT_CUDA_MAX_LEVELS && k < pages + 8;
         k += 1 + rng_range(r, 0, pages / 20))
        c->s.k[c->s.n_levels++] = k;
    c->s.level_stride = HEADS * c->s.head_stride;
    c->n_max = (size_t)HEADS * (size_t)groups * (size_t)pages;
    c->n_t = (size_t)c->s.n_levels * (size_t)c->s.level_stride;
    c->max = host_alloc(c->n_max * sizeof *c->max);
    for (size_t i = 0; i < c->n_max; i++)
        c->max[i] = SELECT_CUDA_EMPTY;
    for (int32_t g = 0; g < HEADS * groups; g++) {
        const int32_t block = first + g % groups / per;
        for (int32_t p = 0; p < 2 * block && p < pages; p++)
            c->max[(size_t)g * (size_t)pages + (size_t)p] = ordered(draw(r, kind));
    }
}

static const int32_t *row_of(const struct select_case *c, int32_t head, int32_t i, int32_t half)
{
    const int32_t group = head * c->s.max_groups + i * (128 / c->s.gate_rows) + half;
    return c->max + (size_t)group * (size_t)c->s.max_pages;
}

/* What level s of a block should be. */
static double expected(const struct select_case *c, int32_t level, int32_t head, int32_t i)
{
    const int32_t a = 2 * (c->s.first_block + i), halves = 128 / c->s.gate_rows;
    const int32_t k = c->s.k[level];
    double sum = 0;
    float *v = host_alloc((size_t)a * sizeof *v);
    for (int32_t half = 0; half < halves; half++) {
        const int32_t *row = row_of(c, head, i, half);
        bool good = true;
        for (int32_t p = 0; p < a; p++) {
            v[p] = score(row[p]) * scale;
            good = good && row[p] != SELECT_CUDA_EMPTY && isfinite(score(row[p]));
        }
        if (good && k < a)
            calib_select(v, a, &k, 1);
        sum += !good    ? (double)NAN
               : k >= a ? -(double)INFINITY
                        : ((double)v[k - 1] + (double)v[k]) / 2 / halves;
    }
    free(v);
    return sum;
}

/* Runs the case; every value of t is as expected, or untouched. */
static void check_case(const struct select_case *c, long *seen)
{
    const struct select_cuda *s = &c->s;
    struct select_cuda on = *s;
    const size_t bytes = c->n_t * sizeof(double);
    double *t = host_alloc(bytes), poison;
    memset(&poison, 0xff, sizeof poison);
    int32_t *max = device_copy(c->max, c->n_max * sizeof *c->max);
    on.max = max;
    on.t = device_copy(NULL, bytes);
    assert_int_equal(select_cuda_launch(&on, dev_cuda_stream(dev)), cudaSuccess);
    assert_ok(dev_sync(dev));
    device_take(t, on.t, bytes);
    dev_release(dev, max, c->n_max * sizeof *c->max);
    for (size_t at = 0; at < c->n_t; at++) {
        const int32_t level = (int32_t)(at / (size_t)s->level_stride);
        const int32_t head = (int32_t)(at % (size_t)s->level_stride / (size_t)s->head_stride);
        const int32_t i = (int32_t)(at % (size_t)s->head_stride) - s->first_block;
        if (i < 0 || i >= s->n_blocks) {
            assert_memory_equal(&t[at], &poison, sizeof poison);
            continue;
        }
        const double want = expected(c, level, head, i);
        if (!(t[at] == want || (isnan(t[at]) && isnan(want))))
            fail_msg("k %d of %d, head %d: %.17g, want %.17g", s->k[level],
                     2 * (s->first_block + i), head, t[at], want);
        (*seen)++;
    }
    free(t);
}

static void like_the_host(void **state)
{
    (void)state;
    struct rng r = test_rng("select_cuda", 1);
    long seen = 0;
    for (int round = 0; round < 80; round++) {
        struct select_case c;
        const int32_t first = round < 40 ? rng_range(&r, 0, 12) : rng_range(&r, 0, 300);
        make(&c, &r, first, rng_range(&r, 1, 9), round & 1 ? 64 : 128, round / 2 % 4);
        check_case(&c, &seen);
        free(c.max);
    }
    assert_true(seen > 20000);
}

/* 1M tokens. */
static void the_longest(void **state)
{
    (void)state;
    struct rng r = test_rng("select_cuda", 2);
    long seen = 0;
    for (int kind = 0; kind < 3; kind++) {
        struct select_case c;
        make(&c, &r, SELECT_CUDA_MAX_PAGES / 2 - 1, 2, kind & 1 ? 64 : 128, kind);
        check_case(&c, &seen);
        free(c.max);
    }
    assert_true(seen > 0);
}

/* NaN, infinities and entries that nobody wrote spoil their block, and no other. */
static void not_a_number(void **state)
{
    (void)state;
    static const int32_t bad[] = {INT32_MAX, SELECT_CUDA_EMPTY, 0x7f800000,
                                  (int32_t)(0xff800000u ^ 0x7fffffffu)};
    struct rng r = test_rng("select_cuda", 3);
    long seen = 0;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct select_case c;
        make(&c, &r, 3, 4, i & 1 ? 64 : 128, 0);
        const int32_t at = rng_range(&r, 0, 9); /* block 5 has 10 pages */
        ((int32_t *)row_of(&c, 1, 2, c.s.gate_rows == 64))[at] = bad[i];
        assert_true(isnan(expected(&c, 0, 1, 2)) && !isnan(expected(&c, 0, 1, 1)));
        check_case(&c, &seen);
        free(c.max);
    }
}

static void refusals(void **state)
{
    (void)state;
    const struct select_cuda good = {.max_groups = 8,
                                     .max_pages = 64,
                                     .n_heads = 1,
                                     .n_blocks = 4,
                                     .gate_rows = 64,
                                     .n_levels = 1,
                                     .k = {1},
                                     .scale = 1.0f};
    struct select_cuda s;
#define REFUSED(field, value)                                                                      \
    (s = good, s.field = (value),                                                                  \
     assert_int_equal(select_cuda_launch(&s, NULL), cudaErrorInvalidValue))
    REFUSED(n_heads, 0);
    REFUSED(first_block, -1);
    REFUSED(n_blocks, 5); /* more than there are groups for */
    REFUSED(gate_rows, 32);
    REFUSED(n_levels, 0);
    REFUSED(n_levels, SELECT_CUDA_MAX_LEVELS + 1);
    REFUSED(scale, 0.0f);
    REFUSED(scale, NAN);
    REFUSED(max_pages, 5);
    s = good;
    s.first_block = SELECT_CUDA_MAX_PAGES / 2;
    s.max_pages = 1 << 20;
    assert_int_equal(select_cuda_launch(&s, NULL), cudaErrorInvalidValue);
    s = good;
    s.n_blocks = 0;
    assert_int_equal(select_cuda_launch(&s, NULL), cudaSuccess); /* nothing to do */
}

int main(int argc, char **argv)
{
    const struct CMUnitTest host[] = {cmocka_unit_test(refusals)};
    const struct CMUnitTest device[] = {
        cmocka_unit_test(like_the_host),
        cmocka_unit_test(the_longest),
        cmocka_unit_test(not_a_number),
    };
    const struct CMUnitTest quick[] = {cmocka_unit_test(not_a_number)};
    int failed = cmocka_run_group_tests(host, NULL, NULL);
    if (failed || !have_device())
        return failed ? failed : 77;
    if (argc > 1 && strcmp(argv[1], "quick") == 0)
        return cmocka_run_group_tests(quick, NULL, NULL);
    return cmocka_run_group_tests(device, NULL, NULL);
}
