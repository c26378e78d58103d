#include "model/weights_fill.h"

#include "core/pool.h"

#include <math.h>
#include <string.h>

enum { ROWS_PER_TASK = 64, CHUNK = 1024 };

int weights_sink_open(struct weights_sink *s, struct err_msg *why)
{
    return s->ops ? s->ops->open(&s->stage, s->dev, why) : 0;
}

int weights_sink_close(struct weights_sink *s)
{
    int err = s->ops ? s->ops->close(s->stage) : 0;
    s->stage = NULL;
    return err;
}

/* Standard normal, a pure function of (seed, index): the finaliser of splitmix64, then Box-Muller.
 */
static float normal_at(uint64_t seed, uint64_t index)
{
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    float u = (float)((z >> 40) + 1) * 0x1p-24f, angle = (float)(z & 0xffffff) * 0x1p-24f;
    return sqrtf(-2.0f * logf(u)) * cosf(6.28318531f * angle);
}

/* Any format to another, by way of f32 where they differ. A file may place tensors at any byte. */
static void convert(void *dst, enum dtype to, const unsigned char *src, enum dtype from, size_t n)
{
    uint32_t chunk[CHUNK];
    float values[CHUNK];
    const size_t size = dtype_bytes(from);

    if (to == from) {
        memcpy(dst, src, n * size);
        return;
    }
    if (to == DTYPE_F32 && (uintptr_t)src % size == 0) {
        dtype_to_f32(dst, src, from, n);
        return;
    }
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t m = n - at < CHUNK ? n - at : CHUNK;
        memcpy(chunk, src + at * size, m * size);
        dtype_to_f32(values, chunk, from, m);
        dtype_from_f32((char *)dst + at * dtype_bytes(to), to, values, m);
    }
}

static void draw(void *dst, enum dtype to, const struct weights_slice *s, int64_t row)
{
    float values[CHUNK];
    for (int64_t at = 0; at < s->n_cols; at += CHUNK) {
        int64_t m = s->n_cols - at < CHUNK ? s->n_cols - at : CHUNK;
        uint64_t index = (uint64_t)(row * s->width + s->col + at);
        for (int64_t i = 0; i < m; i++)
            values[i] = s->mean + s->std * normal_at(s->seed, index + (uint64_t)i);
        dtype_from_f32((char *)dst + (size_t)at * dtype_bytes(to), to, values, (size_t)m);
    }
}

/* Rows [first, first + n) of a slice to dst. */
struct fill_job {
    const struct weights_slice *s;
    enum dtype to;
    char *dst;
    int64_t first, n;
};

static void fill_rows(void *arg, int task, int worker)
{
    const struct fill_job *j = arg;
    const struct weights_slice *s = j->s;
    const size_t row_bytes = (size_t)s->n_cols * dtype_bytes(j->to);
    int64_t end = (int64_t)(task + 1) * ROWS_PER_TASK;
    (void)worker;
    for (int64_t i = (int64_t)task * ROWS_PER_TASK; i < end && i < j->n; i++) {
        int64_t row = s->row + j->first + i;
        char *dst = j->dst + (size_t)i * row_bytes;
        if (!s->src)
            draw(dst, j->to, s, row);
        else
            convert(dst, j->to, s->src + (size_t)(row * s->width + s->col) * dtype_bytes(s->dtype),
                    s->dtype, (size_t)s->n_cols);
    }
}

static void run_job(struct weights_sink *k, struct fill_job *j)
{
    const size_t read = j->s->src ? dtype_bytes(j->s->dtype) : dtype_bytes(k->dtype);
    pool_run(k->dev->pool, fill_rows, j, (int)((j->n + ROWS_PER_TASK - 1) / ROWS_PER_TASK));
    k->done(k->done_arg, (uint64_t)(j->n * j->s->n_cols) * read);
}

/* Piece by piece of whole rows; a vector is cut where it must be. */
static int fill_staged(struct weights_sink *k, char *dst, struct weights_slice s)
{
    const size_t size = dtype_bytes(k->dtype);
    struct fill_job job = {.s = &s, .to = k->dtype};
    size_t bytes;
    void *half;

    while (job.first < s.n_rows) {
        TRY(k->ops->next(k->stage, &half, &bytes));
        const int64_t rows = (int64_t)(bytes / ((size_t)s.n_cols * size));
        ASSERT(rows > 0);
        job.dst = half;
        job.n = s.n_rows - job.first < rows ? s.n_rows - job.first : rows;
        run_job(k, &job);
        bytes = (size_t)(job.n * s.n_cols) * size;
        TRY(k->ops->send(k->stage, dst, bytes));
        dst += bytes;
        job.first += job.n;
    }
    return 0;
}

int weights_fill(struct weights_sink *k, void *dst, const struct weights_slice *slice)
{
    if (!k->ops) {
        struct fill_job job = {.s = slice, .to = k->dtype, .dst = dst, .n = slice->n_rows};
        run_job(k, &job);
        return 0;
    }
    if (slice->src)
        return fill_staged(k, dst, *slice);
    TRY(k->ops->draw(k->stage, dst, k->dtype, slice));
    k->done(k->done_arg, (uint64_t)(slice->n_rows * slice->n_cols) * dtype_bytes(k->dtype));
    return 0;
}
