/* Row operations on the device against doubles, for both formats, wide and odd widths; that a row's
 * bits do not depend on the batch; that nothing outside the rows changes. */
#include "core/mem.h"
#include "model/nn_cuda.h"
#include "tests/cuda_case.h"

enum { GUARD = 64 /* elements behind every output that must stay */ };

static void *stream;

/* Device output of n elements with a poisoned guard; taken back and checked by take16. */
static uint16_t *out16(size_t n)
{
    return device_copy(NULL, (n + GUARD) * sizeof(uint16_t));
}

static uint16_t *take16(uint16_t *d, size_t n)
{
    uint16_t *h = host_alloc((n + GUARD) * sizeof *h);
    device_take(h, d, (n + GUARD) * sizeof *h);
    for (size_t i = n; i < n + GUARD; i++)
        assert_int_equal(h[i], 0xffff);
    return h;
}

static void drop(void *d)
{
    dev_release(dev, d, 1);
}

static void check_gather(int dtype, int32_t width, struct rng *rng)
{
    enum { N = 70, TABLE = 33 };
    const size_t w = (size_t)width;
    uint16_t *table = random16(TABLE * w, dtype, 1.0, rng), *d_out = out16(N * w);
    int32_t ids[N];
    for (int i = 0; i < N; i++)
        ids[i] = i % 10 == 9 ? (i % 20 == 9 ? -1 : TABLE) : rng_range(rng, 0, TABLE - 1);
    void *d_table = device_copy(table, TABLE * w * 2), *d_ids = device_copy(ids, sizeof ids);
    assert_int_equal(nn_cuda_gather(d_out, d_table, d_ids, N, width, TABLE, dtype, stream), 0);
    uint16_t *out = take16(d_out, N * w);
    for (size_t i = 0; i < N; i++) {
        for (size_t j = 0; j < w; j++)
            assert_int_equal(out[i * w + j],
                             ids[i] < 0 || ids[i] >= TABLE ? 0 : table[(size_t)ids[i] * w + j]);
    }
    drop(d_table), drop(d_ids);
    free(table), free(out);
}

static void test_gather(void **state)
{
    static const int32_t widths[] = {1, 7, 8, 40, 2048, 4096};
    struct rng rng = test_rng("nn gather", 301);
    (void)state;
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        check_gather(0, widths[i], &rng);
        check_gather(1, widths[i], &rng);
    }
}

struct norm_case {
    int dtype;
    int32_t width;
    bool add;
    int more;                  /* shares */
    bool bias, pick, sum_only; /* pick: rows of a larger matrix */
};

enum { NORM_ROWS = 21, NORM_ALL = 40, NORM_SHARES = 3 };

struct norm_data {
    uint16_t *residual, *x, *more, *bias, *weight; /* host */
    int32_t rows[NORM_ROWS];
};

/* Runs n rows from `first` on; residual and out come back. */
static void run_norm(const struct norm_case *c, const struct norm_data *data, int32_t first,
                     int32_t n, uint16_t **residual, uint16_t **out)
{
    const size_t w = (size_t)c->width, bytes = NORM_ALL * w * 2;
    uint16_t *d_out = out16((size_t)n * w);
    struct nn_cuda_norm p = {.out = c->sum_only ? NULL : d_out,
                             .residual = device_copy(data->residual, bytes),
                             .x = device_copy(data->x, bytes),
                             .more = device_copy(data->more, NORM_SHARES * bytes),
                             .more_rows = NORM_ALL,
                             .bias = device_copy(data->bias, w * 2),
                             .weight = device_copy(data->weight, w * 2),
                             .rows = device_copy(data->rows + first, (size_t)n * 4),
                             .n = n,
                             .width = c->width,
                             .eps = 1e-5f};
    struct nn_cuda_norm q = p;
    q.x = c->add ? p.x : NULL;
    q.n_more = c->more;
    q.bias = c->bias ? p.bias : NULL;
    q.rows = c->pick ? p.rows : NULL;
    assert_int_equal(nn_cuda_residual_norm(&q, c->dtype, stream), 0);
    *out = take16(d_out, (size_t)n * w);
    *residual = host_alloc(bytes);
    device_take(*residual, p.residual, bytes);
    drop((void *)p.x), drop((void *)p.more), drop((void *)p.bias);
    drop((void *)p.weight), drop((void *)p.rows);
}

static void check_norm_row(const struct norm_case *c, const struct norm_data *data, size_t row,
                           const uint16_t *residual, const uint16_t *out)
{
    const size_t w = (size_t)c->width;
    double sum = 0.0;
    for (size_t j = 0; j < w; j++) {
        float s = from16(data->residual[row * w + j], c->dtype);
        if (c->add) {
            float b = c->bias ? from16(data->bias[j], c->dtype) : 0.0f;
            float x = from16(data->x[row * w + j], c->dtype);
            for (size_t k = 0; k < (size_t)c->more; k++)
                x += from16(data->more[(k * NORM_ALL + row) * w + j], c->dtype);
            s += x + b;
        }
        assert_int_equal(residual[row * w + j], to16(s, c->dtype)); /* the sum, rounded once */
        double r = (double)from16(residual[row * w + j], c->dtype);
        sum += r * r;
    }
    const double scale = 1.0 / sqrt(sum / (double)w + 1e-5);
    for (size_t j = 0; j < w; j++) {
        double r = (double)from16(residual[row * w + j], c->dtype);
        double want = r * scale * (double)from16(data->weight[j], c->dtype);
        if (c->sum_only)
            assert_int_equal(out[j], 0xffff);
        else
            check16(out[j], want, fabs(want), c->dtype, "norm");
    }
}

static void check_norm(const struct norm_case *c, struct rng *rng)
{
    const size_t w = (size_t)c->width;
    struct norm_data data = {.residual = random16(NORM_ALL * w, c->dtype, 2.0, rng),
                             .x = random16(NORM_ALL * w, c->dtype, 1.0, rng),
                             .more = random16(NORM_SHARES * NORM_ALL * w, c->dtype, 1.0, rng),
                             .bias = random16(w, c->dtype, 1.0, rng),
                             .weight = random16(w, c->dtype, 1.0, rng)};
    uint16_t *residual, *out, *one_residual, *one_out;
    for (int i = 0; i < NORM_ROWS; i++) /* distinct, in a mixed order */
        data.rows[i] = c->pick ? (i * 7 + 3) % NORM_ALL : i;
    memset(data.residual + 3 * w, 0, w * 2); /* a row of zeros stays finite */
    if (!c->add)
        assert_true(!c->bias);
    run_norm(c, &data, 0, NORM_ROWS, &residual, &out);
    for (size_t i = 0; i < NORM_ROWS; i++)
        check_norm_row(c, &data, (size_t)data.rows[i], residual, out + i * w);
    for (int32_t row = 0; row < NORM_ALL; row++) { /* other rows stay */
        bool used = false;
        for (int i = 0; i < NORM_ROWS; i++)
            used |= data.rows[i] == row;
        if (!used)
            assert_memory_equal(residual + (size_t)row * w, data.residual + (size_t)row * w, w * 2);
    }
    if (c->pick && !c->sum_only) { /* alone, a row gives the same bits */
        run_norm(c, &data, 13, 1, &one_residual, &one_out);
        assert_memory_equal(one_out, out + 13 * w, w * 2);
        free(one_residual), free(one_out);
    }
    free(data.residual), free(data.x), free(data.more), free(data.bias), free(data.weight);
    free(residual), free(out);
}

static void test_norm(void **state)
{
    static const int32_t widths[] = {1, 7, 8, 100, 264, 2048, 4096, 8192, 8200, 16384};
    static const struct norm_case kinds[] = {
        {.add = false},
        {.add = true},
        {.add = true, .bias = true},
        {.add = true, .more = 1},
        {.add = true, .more = NORM_SHARES, .bias = true, .pick = true},
        {.add = true, .pick = true},
        {.pick = true},
        {.add = true, .sum_only = true},
    };
    struct rng rng = test_rng("nn norm", 302);
    (void)state;
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++) {
            struct norm_case c = kinds[k];
            c.width = widths[i];
            c.dtype = (int)(i + k) % 2;
            check_norm(&c, &rng);
        }
    }
}

static void check_swiglu(int dtype, int32_t width, bool with_bias, struct rng *rng)
{
    enum { N = 19 };
    static const float gates[] = {0.0f, -1.0f, 100.0f, -100.0f, -1000.0f, 30000.0f, -30000.0f};
    const size_t w = (size_t)width;
    uint16_t *in = random16(N * 2 * w, dtype, 3.0, rng), *bias = random16(2 * w, dtype, 1.0, rng);
    for (size_t i = 0; i < sizeof gates / sizeof *gates; i++)
        in[i * 2 * w] = to16(gates[i], dtype);
    uint16_t *d_out = out16(N * w);
    void *d_in = device_copy(in, N * 2 * w * 2), *d_bias = device_copy(bias, 2 * w * 2);
    assert_int_equal(
        nn_cuda_swiglu(d_out, d_in, with_bias ? d_bias : NULL, N, width, dtype, stream), 0);
    uint16_t *out = take16(d_out, N * w);
    for (size_t i = 0; i < N * w; i++) {
        const size_t at = i / w * 2 * w + i % w;
        double g = (double)from16(in[at], dtype), u = (double)from16(in[at + w], dtype);
        if (with_bias) {
            g += (double)from16(bias[i % w], dtype);
            u += (double)from16(bias[w + i % w], dtype);
        }
        double want = g < -700 ? 0.0 : g / (1.0 + exp(-g)) * u;
        if (fabs(want) < (dtype == 0 ? 1e38 : 65000.0))
            check16(out[i], want, fabs(want) * (1.0 + fabs(g)), dtype, "swiglu");
    }
    drop(d_in), drop(d_bias);
    free(in), free(bias), free(out);
}

static void test_swiglu(void **state)
{
    static const int32_t widths[] = {1, 9, 8, 1000, 14336};
    struct rng rng = test_rng("nn swiglu", 303);
    (void)state;
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        for (int k = 0; k < 4; k++)
            check_swiglu(k % 2, widths[i], k / 2, &rng);
    }
}

static void check_bias(int dtype, int32_t width, struct rng *rng)
{
    enum { N = 23 };
    const size_t w = (size_t)width, n = N * w;
    uint16_t *x = random16(n, dtype, 3.0, rng), *bias = random16(w, dtype, 1.0, rng);
    uint16_t *d_x = out16(n);
    assert_ok(dev_upload(dev, d_x, x, n * 2));
    void *d_bias = device_copy(bias, w * 2);
    float *d_wide = device_copy(NULL, n * 4), *wide = host_alloc(n * 4);
    uint16_t *d_again = out16(n);
    assert_int_equal(nn_cuda_add_bias(d_x, d_bias, N, width, dtype, stream), 0);
    assert_int_equal(nn_cuda_to_f32(d_wide, d_x, (int64_t)n, dtype, stream), 0);
    assert_int_equal(nn_cuda_from_f32(d_again, d_wide, (int64_t)n, dtype, stream), 0);
    uint16_t *got = take16(d_x, n), *again = take16(d_again, n);
    device_take(wide, d_wide, n * 4);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(got[i], to16(from16(x[i], dtype) + from16(bias[i % w], dtype), dtype));
        assert_true(wide[i] == from16(got[i], dtype));
        assert_int_equal(again[i], got[i]);
    }
    drop(d_bias);
    free(x), free(bias), free(wide), free(got), free(again);
}

static void test_bias(void **state)
{
    struct rng rng = test_rng("nn bias", 304);
    (void)state;
    for (int dtype = 0; dtype < 2; dtype++) {
        check_bias(dtype, 3, &rng);
        check_bias(dtype, 6144, &rng);
    }
}

/* Moments of the whole matrix; a part of it is the same numbers. */
static void test_fill(void **state)
{
    enum { ROWS = 400, COLS = 500, R0 = 17, C0 = 33, R = 100, C = 77 };
    (void)state;
    for (int dtype = 0; dtype < 2; dtype++) {
        struct nn_cuda_fill f = {.out = out16(ROWS * COLS),
                                 .n_rows = ROWS,
                                 .n_cols = COLS,
                                 .pitch = COLS,
                                 .seed = 99,
                                 .mean = 0.5f,
                                 .std = 0.25f};
        assert_int_equal(nn_cuda_fill_normal(&f, dtype, stream), 0);
        uint16_t *all = take16(f.out, ROWS * COLS);
        f.out = out16(R * C);
        f.row = R0, f.col = C0, f.n_rows = R, f.n_cols = C;
        assert_int_equal(nn_cuda_fill_normal(&f, dtype, stream), 0);
        uint16_t *part = take16(f.out, R * C);
        for (int i = 0; i < R * C; i++)
            assert_int_equal(part[i], all[(R0 + i / C) * COLS + C0 + i % C]);
        double m[5] = {0};
        for (int i = 0; i < ROWS * COLS; i++) {
            double z = ((double)from16(all[i], dtype) - 0.5) / 0.25;
            for (int k = 1; k < 5; k++)
                m[k] += pow(z, k) / (ROWS * COLS);
        }
        /* five standard deviations of 200,000 draws, and the rounding of bf16 */
        assert_close(m[1], 0.0, 0.012, 0);
        assert_close(m[2], 1.0, 0.017, 0);
        assert_close(m[3], 0.0, 0.03, 0);
        assert_close(m[4], 3.0, 0.12, 0);
        f.seed = 100, f.out = out16(R * C);
        assert_int_equal(nn_cuda_fill_normal(&f, dtype, stream), 0);
        uint16_t *other = take16(f.out, R * C);
        assert_true(memcmp(part, other, R * C * 2) != 0);
        free(all), free(part), free(other);
    }
}

static void test_empty(void **state)
{
    const struct nn_cuda_norm none = {.width = 8};
    const struct nn_cuda_fill nothing = {.n_cols = 4};
    (void)state;
    assert_int_equal(nn_cuda_gather(NULL, NULL, NULL, 0, 8, 1, 0, stream), 0);
    assert_int_equal(nn_cuda_residual_norm(&none, 0, stream), 0);
    assert_int_equal(nn_cuda_swiglu(NULL, NULL, NULL, 0, 8, 0, stream), 0);
    assert_int_equal(nn_cuda_add_bias(NULL, NULL, 0, 8, 0, stream), 0);
    assert_int_equal(nn_cuda_to_f32(NULL, NULL, 0, 0, stream), 0);
    assert_int_equal(nn_cuda_fill_normal(&nothing, 0, stream), 0);
    assert_ok(dev_sync(dev));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gather), cmocka_unit_test(test_norm), cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_bias),   cmocka_unit_test(test_fill), cmocka_unit_test(test_empty),
    };
    if (!have_device())
        return 77;
    stream = dev_cuda_stream(dev);
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dev_close(dev);
    return failed;
}
