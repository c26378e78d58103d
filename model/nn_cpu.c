#include "model/nn.h"

#include "core/pool.h"

#include <math.h>
#include <string.h>

enum {
    ROWS_PER_TASK = 16,
    NORM_LANES = 16 /* partial sums of a row; fixed, so the order of additions is */
};

struct row_task {
    void (*row)(const struct row_task *t, int32_t i);
    float *out;
    const float *in, *weight;
    const int32_t *index;
    const struct nn_rope *rope;
    int32_t n, width;
    float eps;
};

static void run_rows(void *arg, int task, int worker)
{
    const struct row_task *t = arg;
    int32_t end = (task + 1) * ROWS_PER_TASK;
    (void)worker;
    for (int32_t i = task * ROWS_PER_TASK; i < end && i < t->n; i++)
        t->row(t, i);
}

static void each_row(struct dev *d, struct row_task *t)
{
    pool_run(d->pool, run_rows, t, (t->n + ROWS_PER_TASK - 1) / ROWS_PER_TASK);
}

static void gather_row(const struct row_task *t, int32_t i)
{
    memcpy(t->out + (size_t)i * (size_t)t->width, t->in + (size_t)t->index[i] * (size_t)t->width,
           (size_t)t->width * sizeof(float));
}

void nn_gather(struct dev *d, float *out, const float *table, const int32_t *ids, int32_t n,
               int32_t width)
{
    struct row_task t = {
        .row = gather_row, .out = out, .in = table, .index = ids, .n = n, .width = width};
    each_row(d, &t);
}

static float sum_squares(const float *x, int32_t n)
{
    float lane[NORM_LANES] = {0}, sum = 0;
    int32_t i = 0;
    for (; i + NORM_LANES <= n; i += NORM_LANES) {
        for (int32_t j = 0; j < NORM_LANES; j++)
            lane[j] += x[i + j] * x[i + j];
    }
    for (; i < n; i++)
        lane[i % NORM_LANES] += x[i] * x[i];
    for (int32_t j = 0; j < NORM_LANES; j++)
        sum += lane[j];
    return sum;
}

static void norm_row(const struct row_task *t, int32_t i)
{
    const float *x = t->in + (size_t)i * (size_t)t->width;
    float *out = t->out + (size_t)i * (size_t)t->width;
    float scale = 1.0f / sqrtf(sum_squares(x, t->width) / (float)t->width + t->eps);
    for (int32_t j = 0; j < t->width; j++)
        out[j] = t->weight[j] * (x[j] * scale);
}

void nn_rms_norm(struct dev *d, float *out, const float *x, const float *weight, int32_t n,
                 int32_t width, float eps)
{
    struct row_task t = {
        .row = norm_row, .out = out, .in = x, .weight = weight, .n = n, .width = width, .eps = eps};
    each_row(d, &t);
}

static void rope_row(const struct row_task *t, int32_t i)
{
    const struct nn_rope *r = t->rope;
    const int32_t half = r->head_dim / 2;
    const float *c = r->cos_sin + (size_t)t->index[i] * (size_t)r->head_dim, *s = c + half;
    float *x = t->out + i * r->stride;

    for (int32_t h = 0; h < r->n_heads; h++, x += r->head_dim) {
        for (int32_t j = 0; j < half; j++) {
            float a = x[j], b = x[half + j];
            x[j] = a * c[j] - b * s[j];
            x[half + j] = b * c[j] + a * s[j];
        }
    }
}

void nn_rope(struct dev *d, float *x, const struct nn_rope *r, const int32_t *positions, int32_t n)
{
    struct row_task t = {.row = rope_row, .out = x, .index = positions, .rope = r, .n = n};
    each_row(d, &t);
}

static void swiglu_row(const struct row_task *t, int32_t i)
{
    const float *g = t->in + (size_t)i * 2 * (size_t)t->width, *u = g + t->width;
    float *out = t->out + (size_t)i * (size_t)t->width;
    for (int32_t j = 0; j < t->width; j++)
        out[j] = g[j] / (1.0f + expf(-g[j])) * u[j];
}

void nn_swiglu(struct dev *d, float *out, const float *gate_up, int32_t n, int32_t width)
{
    struct row_task t = {.row = swiglu_row, .out = out, .in = gate_up, .n = n, .width = width};
    each_row(d, &t);
}

static void bias_row(const struct row_task *t, int32_t i)
{
    float *x = t->out + (size_t)i * (size_t)t->width;
    for (int32_t j = 0; j < t->width; j++)
        x[j] += t->weight[j];
}

void nn_add_bias(struct dev *d, float *x, const float *bias, int32_t n, int32_t width)
{
    struct row_task t = {.row = bias_row, .out = x, .weight = bias, .n = n, .width = width};
    each_row(d, &t);
}

static void residual_row(const struct row_task *t, int32_t i)
{
    const float *y = t->in + (size_t)i * (size_t)t->width;
    float *x = t->out + (size_t)i * (size_t)t->width;
    if (t->weight) {
        for (int32_t j = 0; j < t->width; j++)
            x[j] += y[j] + t->weight[j];
    } else {
        for (int32_t j = 0; j < t->width; j++)
            x[j] += y[j];
    }
}

void nn_residual(struct dev *d, float *x, const float *y, const float *bias, int32_t n,
                 int32_t width)
{
    struct row_task t = {
        .row = residual_row, .out = x, .in = y, .weight = bias, .n = n, .width = width};
    each_row(d, &t);
}
