/* Row operations and the rotary table against doubles, and the edges that a model may reach. */
#include "core/dev.h"
#include "core/mem.h"
#include "model/nn.h"
#include "model/rope.h"
#include "tests/test.h"

enum { ROWS = 37, MAX_WIDTH = 100 };

static struct dev *dev;

static int open_dev(void **state)
{
    (void)state;
    return dev_open(&dev, &dev_cpu, 0, 3, NULL);
}

static int close_dev(void **state)
{
    (void)state;
    dev_close(dev);
    return 0;
}

static void fill(float *x, size_t n, struct rng *rng)
{
    for (size_t i = 0; i < n; i++)
        x[i] = (float)rng_normal(rng);
}

static void check_norm(const float *out, const float *x, const float *w, int32_t n)
{
    double sum = 0.0;
    for (int32_t j = 0; j < n; j++)
        sum += (double)x[j] * (double)x[j];
    for (int32_t j = 0; j < n; j++)
        assert_close((double)out[j], (double)x[j] / sqrt(sum / n + 1e-5) * (double)w[j], 1e-6,
                     1e-6);
}

static void test_rms_norm(void **state)
{
    static const int32_t widths[] = {1, 2, 15, 16, 17, 64, MAX_WIDTH};
    struct rng rng = test_rng("rms norm", 61);
    float x[ROWS * MAX_WIDTH], out[ROWS * MAX_WIDTH], w[MAX_WIDTH];
    (void)state;
    for (size_t k = 0; k < sizeof widths / sizeof *widths; k++) {
        const int32_t n = widths[k];
        fill(x, (size_t)ROWS * (size_t)n, &rng);
        fill(w, (size_t)n, &rng);
        memset(x, 0, (size_t)n * sizeof *x); /* a row of zeros stays finite */
        nn_rms_norm(dev, out, x, w, ROWS, n, 1e-5f);
        for (int32_t i = 0; i < ROWS; i++)
            check_norm(out + (size_t)i * (size_t)n, x + (size_t)i * (size_t)n, w, n);
        nn_rms_norm(dev, x, x, w, ROWS, n, 1e-5f); /* in place */
        assert_memory_equal(x, out, (size_t)ROWS * (size_t)n * sizeof *x);
    }
}

static void test_swiglu(void **state)
{
    static const float gates[] = {0.0f, -1.0f, 2.0f, 100.0f, -100.0f, -1000.0f, 1e30f, -1e30f};
    enum { N = 8 };
    float in[2 * N], out[N];
    (void)state;
    for (int i = 0; i < N; i++) {
        in[i] = gates[i];
        in[N + i] = 3.0f;
    }
    nn_swiglu(dev, out, in, 1, N);
    for (int i = 0; i < N; i++) {
        double g = (double)gates[i];
        assert_close((double)out[i], g < -700 ? 0.0 : 3.0 * g / (1.0 + exp(-g)), 1e-30, 1e-6);
    }
    in[0] = NAN;
    nn_swiglu(dev, out, in, 1, N);
    assert_true(isnan(out[0]) && !isnan(out[1]));
}

static void test_residual(void **state)
{
    float x[6] = {1, 2, 3, 4, 5, 6}, y[6] = {10, 20, 30, 40, 50, 60}, b[3] = {100, 200, 300};
    const float both[6] = {111, 222, 333, 144, 255, 366};
    (void)state;
    nn_residual(dev, x, y, b, 2, 3);
    assert_memory_equal(x, both, sizeof x);
    nn_residual(dev, x, y, NULL, 1, 3);
    assert_close((double)x[0], 121, 0, 0);
    assert_close((double)x[3], 144, 0, 0);
    nn_add_bias(dev, y, b, 2, 3);
    assert_close((double)y[5], 360, 0, 0);
}

static void test_gather(void **state)
{
    const float table[6] = {1, 2, 3, 4, 5, 6};
    const int32_t ids[4] = {2, 0, 2, 1};
    const float want[8] = {5, 6, 1, 2, 5, 6, 3, 4};
    float out[8];
    (void)state;
    nn_gather(dev, out, table, ids, 4, 2);
    assert_memory_equal(out, want, sizeof want);
}

/* Heads at the start of a row turn by position * frequency, the rest of it stays. */
static void test_rope(void **state)
{
    enum { DIM = 6, HEADS = 2, STRIDE = 20, POSITIONS = 300 };
    const struct rope_config config = {.type = ROPE_DEFAULT, .theta = 1e4};
    struct rng rng = test_rng("rope", 62);
    float table[POSITIONS * DIM], x[ROWS * STRIDE], before[ROWS * STRIDE];
    int32_t positions[ROWS];
    const struct nn_rope r = {table, HEADS, DIM, STRIDE};
    (void)state;
    rope_fill(table, &config, DIM, POSITIONS);
    fill(x, sizeof x / sizeof *x, &rng);
    memcpy(before, x, sizeof x);
    for (int32_t i = 0; i < ROWS; i++)
        positions[i] = rng_range(&rng, 0, POSITIONS - 1);
    nn_rope(dev, x, &r, positions, ROWS);
    for (int32_t i = 0; i < ROWS * STRIDE; i++) {
        int32_t col = i % STRIDE, j = col % DIM, first = i - j, half = DIM / 2;
        if (col >= HEADS * DIM) {
            assert_true(x[i] == before[i]);
            continue;
        }
        const int32_t row = i / STRIDE;
        double angle = positions[row] * pow(1e4, -2.0 * (j % half) / DIM);
        double a = (double)before[first + j % half], b = (double)before[first + half + j % half];
        double want = j < half ? a * cos(angle) - b * sin(angle) : b * cos(angle) + a * sin(angle);
        assert_close((double)x[i], want, 1e-4, 0);
    }
}

/* Frequencies of the scaled kinds, by the rules of modeling_rope_utils.py in doubles. */
static void test_rope_scaling(void **state)
{
    enum { DIM = 64 };
    const struct rope_config linear = {.type = ROPE_LINEAR, .theta = 1e4, .factor = 4};
    const struct rope_config llama3 = {.type = ROPE_LLAMA3,
                                       .theta = 5e5,
                                       .factor = 8,
                                       .low_freq_factor = 1,
                                       .high_freq_factor = 4,
                                       .original_max_position = 8192};
    float f[DIM / 2];
    int kept = 0, blended = 0, stretched = 0;
    (void)state;
    rope_frequencies(f, &linear, DIM);
    for (int i = 0; i < DIM / 2; i++)
        assert_close((double)f[i], pow(1e4, -2.0 * i / DIM) / 4, 0, 1e-6);
    rope_frequencies(f, &llama3, DIM);
    for (int i = 0; i < DIM / 2; i++) {
        double base = pow(5e5, -2.0 * i / DIM), turns = 8192 * base / 6.283185307179586;
        double smooth = (turns - 1) / 3, want = base;
        if (turns < 1)
            want = base / 8;
        else if (turns < 4)
            want = (1 - smooth) * base / 8 + smooth * base;
        kept += turns >= 4;
        stretched += turns < 1;
        blended += turns >= 1 && turns < 4;
        assert_close((double)f[i], want, 0, 1e-5);
    }
    assert_true(kept > 0 && blended > 0 && stretched > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rms_norm), cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_residual), cmocka_unit_test(test_gather),
        cmocka_unit_test(test_rope),     cmocka_unit_test(test_rope_scaling),
    };
    return cmocka_run_group_tests(tests, open_dev, close_dev);
}
