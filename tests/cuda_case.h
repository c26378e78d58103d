/* What the tests of CUDA kernels share: a device or a skip, and the memory of a case. */
#ifndef TESTS_CUDA_CASE_H
#define TESTS_CUDA_CASE_H

#include "tests/test.h"

#include "core/dev_cuda.h"

#include <stdbool.h>

static struct dev *dev;

/* Opens `dev`; false where there is no GPU that the kernels run on (exit status 77). */
static inline bool have_device(void)
{
    struct err_msg why = {""};
    const int err = dev_cuda_count() > 0 ? dev_open(&dev, &dev_cuda, 0, 2, &why) : ERR_UNSUPPORTED;
    if (err < 0 && err != ERR_UNSUPPORTED) {
        printf("%s\n", err_why(&why, err));
        exit(1);
    }
    return err == 0;
}

/* Device memory, filled from src or, where that is NULL, with bytes 0xff: NaN in every format. */
static inline void *device_copy(const void *src, size_t bytes)
{
    void *p = NULL, *poison = NULL;
    assert_ok(dev_alloc(dev, &p, bytes, NULL));
    if (!src) {
        poison = malloc(bytes);
        assert_non_null(poison);
        memset(poison, 0xff, bytes);
    }
    assert_ok(dev_upload(dev, p, src ? src : poison, bytes));
    free(poison);
    return p;
}

/* Copies to the host and gives the device memory back. */
static inline void device_take(void *dst, void *p, size_t bytes)
{
    assert_ok(dev_download(dev, dst, p, bytes));
    dev_release(dev, p, bytes);
}

static inline void *host_alloc(size_t bytes)
{
    void *p = calloc(1, bytes ? bytes : 1);
    assert_non_null(p);
    return p;
}

/* ---- 16-bit numbers; dtype 0 bf16, 1 f16 ---- */

static inline float from16(uint16_t x, int dtype)
{
    return dtype == 0 ? dtype_bf16_f32(x) : dtype_f16_f32(x);
}

static inline uint16_t to16(float x, int dtype)
{
    return dtype == 0 ? dtype_f32_bf16(x) : dtype_f32_f16(x);
}

static inline uint16_t *random16(size_t n, int dtype, double scale, struct rng *rng)
{
    uint16_t *x = host_alloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = to16((float)(scale * rng_normal(rng)), dtype);
    return x;
}

/* Scales each tile of bf16 keys by 0.2 to 1.8, so that pages matter more, or less. */
static inline void uneven_tiles(uint16_t *x, size_t n, size_t tile, struct rng *rng)
{
    for (size_t i = 0; i < n; i += tile) {
        const float scale = 0.2f + 1.6f * (float)(rng_u64(rng) >> 40) * 0x1p-24f;
        for (size_t j = i; j < i + tile; j++)
            x[j] = to16(scale * from16(x[j], 0), 0);
    }
}

/* Half a unit in the last place, after f32 arithmetic that erred by 2e-6 of `scale`. */
static inline void check16(uint16_t got, double want, double scale, int dtype, const char *what)
{
    const int bits = dtype == 0 ? 8 : 11, least = dtype == 0 ? -126 : -14;
    const int exponent = want == 0.0 || ilogb(want) < least ? least : ilogb(want);
    const double x = (double)from16(got, dtype);
    if (!(fabs(x - want) <= ldexp(1.0, exponent - bits) * (1.0 + 1e-9) + 2e-6 * scale))
        fail_msg("%s: %.9g, want %.9g", what, x, want);
}

#endif
