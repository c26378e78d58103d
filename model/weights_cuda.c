/* The stage of weights_fill.h on a CUDA device: two halves of pinned memory. While one is copied,
 * the host converts (or faults in from the file) the other, so loading runs at the speed of the
 * slower of disk and PCIe. */
#include "model/weights_cuda.h"

#include "core/dev_cuda.h"
#include "core/mem.h"
#include "model/nn_cuda.h"

#include <cuda_runtime_api.h>

enum { HALF_BYTES = 32 << 20 };

struct weights_stage {
    struct dev *dev;
    void *memory; /* both halves */
    cudaEvent_t copied[2];
    bool busy[2];
    int now; /* the half that next gave */
};

static int close_stage(struct weights_stage *s)
{
    if (!s)
        return 0;
    int err = dev_sync(s->dev);
    for (int i = 0; i < 2; i++) {
        if (s->copied[i])
            (void)cudaEventDestroy(s->copied[i]);
    }
    dev_cuda_pin_free(s->dev, s->memory);
    mem_free(s);
    return err;
}

static int make_events(struct weights_stage *s)
{
    for (int i = 0; i < 2; i++)
        CUDA_TRY(cudaEventCreateWithFlags(&s->copied[i], cudaEventDisableTiming));
    return 0;
}

static int open_stage(struct weights_stage **out, struct dev *d, struct err_msg *why)
{
    struct weights_stage *s = mem_zalloc(1, sizeof *s);
    s->dev = d;
    int err = dev_cuda_pin_alloc(d, &s->memory, 2 * (size_t)HALF_BYTES, why);
    if (err == 0)
        err = make_events(s);
    if (err < 0) {
        (void)close_stage(s);
        return err;
    }
    *out = s;
    return 0;
}

static int next_half(struct weights_stage *s, void **half, size_t *bytes)
{
    s->now = !s->now;
    if (s->busy[s->now])
        CUDA_TRY(cudaEventSynchronize(s->copied[s->now]));
    *half = (char *)s->memory + (size_t)s->now * HALF_BYTES;
    *bytes = HALF_BYTES;
    return 0;
}

static int send_half(struct weights_stage *s, void *dst, size_t bytes)
{
    const char *half = (const char *)s->memory + (size_t)s->now * HALF_BYTES;
    TRY(dev_cuda_upload_async(s->dev, dst, half, bytes));
    CUDA_TRY(cudaEventRecord(s->copied[s->now], dev_cuda_stream(s->dev)));
    s->busy[s->now] = true;
    return 0;
}

static int draw(struct weights_stage *s, void *dst, enum dtype dtype,
                const struct weights_slice *slice)
{
    const struct nn_cuda_fill fill = {.out = dst,
                                      .n_rows = slice->n_rows,
                                      .n_cols = slice->n_cols,
                                      .row = slice->row,
                                      .col = slice->col,
                                      .pitch = slice->width,
                                      .seed = slice->seed,
                                      .mean = slice->mean,
                                      .std = slice->std};
    CUDA_TRY(nn_cuda_fill_normal(&fill, dev_cuda_dtype(dtype), dev_cuda_stream(s->dev)));
    return 0;
}

const struct weights_stage_ops weights_stage_cuda = {
    .open = open_stage,
    .next = next_half,
    .send = send_half,
    .draw = draw,
    .close = close_stage,
};
