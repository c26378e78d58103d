/* core/dev_cuda: memory, copies, errors that a person reads, threads, and what a broken kernel
 * leaves behind. */
#include "model/nn_cuda.h"
#include "tests/cuda_case.h"

#include <errno.h>
#include <pthread.h>

static void expect_text(const struct err_msg *why, const char *part)
{
    if (!strstr(why->text, part))
        fail_msg("'%s' lacks '%s'", why->text, part);
}

static void test_open(void **state)
{
    struct err_msg why = {""};
    struct dev *d = NULL;
    (void)state;
    assert_int_equal(dev_open(&d, &dev_cuda, dev_cuda_count(), 1, &why), -ENODEV);
    assert_null(d);
    expect_text(&why, "this machine has");
    assert_int_equal(dev_open(&d, &dev_cuda, -1, 1, &why), -ENODEV);
    assert_non_null(dev_cuda_stream(dev));
    assert_int_equal(dev_cuda_index(dev), 0);
    assert_in_range(dev_cuda_sms(dev), 8, 256);
    assert_non_null(dev->pool);
    dev_close(NULL);
}

static void test_memory(void **state)
{
    enum { BYTES = 300 << 20 };
    size_t before, after, total;
    void *p = NULL;
    unsigned char *host = host_alloc(BYTES);
    (void)state;
    for (int i = 0; i < 2; i++) { /* zeroed, also where an earlier owner wrote */
        assert_ok(dev_mem_info(dev, &before, &total));
        assert_ok(dev_alloc(dev, &p, BYTES, NULL));
        assert_ok(dev_mem_info(dev, &after, &total));
        assert_true(before - after >= BYTES && before <= total);
        assert_int_equal((uintptr_t)p % 256, 0);
        memset(host, 1, BYTES);
        assert_ok(dev_download(dev, host, p, BYTES));
        for (size_t k = 0; k < BYTES; k++) {
            if (host[k] != 0)
                fail_msg("byte %zu is %d", k, host[k]);
        }
        memset(host, 0xa5, BYTES);
        assert_ok(dev_upload(dev, p, host, BYTES));
        dev_release(dev, p, BYTES);
    }
    assert_ok(dev_alloc(dev, &p, 0, NULL));
    dev_release(dev, p, 0);
    dev_release(dev, NULL, 0);
    free(host);
}

static void test_too_much(void **state)
{
    struct err_msg why = {""};
    void *p = NULL;
    (void)state;
    assert_int_equal(dev_alloc(dev, &p, (size_t)1 << 42, &why), -ENOMEM);
    assert_null(p);
    expect_text(&why, "need 4096.00 GiB, ");
    expect_text(&why, " GiB on GPU 0 (");
    printf("# %s\n", why.text);
    assert_ok(dev_sync(dev)); /* the device is well */
    assert_ok(dev_alloc(dev, &p, 64, &why));
    dev_release(dev, p, 64);
}

/* The source may change as soon as an upload returns. */
static void test_copies(void **state)
{
    enum { BYTES = 9 << 20 };
    struct rng rng = test_rng("dev cuda copies", 311);
    unsigned char *src = host_alloc(BYTES), *want = host_alloc(BYTES), *got = host_alloc(BYTES);
    void *pinned = NULL, *back = NULL, *p = device_copy(NULL, BYTES);
    (void)state;
    assert_ok(dev_cuda_pin_alloc(dev, &pinned, BYTES, NULL));
    assert_ok(dev_cuda_pin_alloc(dev, &back, BYTES, NULL));
    assert_int_equal(((unsigned char *)pinned)[BYTES - 1], 0);
    for (int i = 0; i < 20; i++) {
        const size_t n = (size_t)rng_range(&rng, 1, BYTES), at = (size_t)rng_range(&rng, 0, 99);
        unsigned char *from = i % 2 ? pinned : src;
        for (size_t k = 0; k < n; k++)
            want[k] = (unsigned char)rng_u64(&rng);
        memcpy(from, want, n);
        assert_ok(dev_upload(dev, (char *)p + (n + at <= BYTES ? at : 0), from, n));
        memset(from, 0, n);
        assert_ok(dev_download(dev, got, (char *)p + (n + at <= BYTES ? at : 0), n));
        assert_memory_equal(got, want, n);
        memcpy(pinned, want, n);
        memset(back, 0, n);
        assert_ok(dev_cuda_upload_async(dev, p, pinned, n));
        assert_ok(dev_cuda_download_async(dev, back, p, n));
        assert_ok(dev_sync(dev));
        assert_memory_equal(back, want, n);
    }
    dev_cuda_pin_free(dev, pinned);
    dev_cuda_pin_free(dev, back);
    dev_cuda_pin_free(dev, NULL);
    dev_release(dev, p, BYTES);
    free(src), free(want), free(got);
}

/* A kernel and a copy from a thread that did not open the device. */
static void *in_thread(void *arg)
{
    uint16_t *d_x = arg, x[8];
    for (int i = 0; i < 8; i++)
        x[i] = to16((float)i, 0);
    int err = dev_cuda_bind(dev);
    if (err == 0)
        err = dev_upload(dev, d_x, x, sizeof x);
    if (err == 0)
        err = nn_cuda_add_bias(d_x, d_x, 1, 8, 0, dev_cuda_stream(dev));
    return (void *)(intptr_t)err;
}

static void test_thread(void **state)
{
    pthread_t thread;
    void *result = NULL, *p = device_copy(NULL, 16);
    uint16_t x[8];
    (void)state;
    assert_int_equal(pthread_create(&thread, NULL, in_thread, p), 0);
    assert_int_equal(pthread_join(thread, &result), 0);
    assert_null(result);
    device_take(x, p, sizeof x);
    for (int i = 0; i < 8; i++)
        assert_int_equal(x[i], to16(2.0f * (float)i, 0));
}

/* Last: after it the process has no working device any more. */
static void test_broken_kernel(void **state)
{
    void *p = device_copy(NULL, 64);
    const int32_t *wild = (const int32_t *)(uintptr_t)0x10;
    (void)state;
    assert_int_equal(nn_cuda_gather(p, p, wild, 1, 8, 1, 0, dev_cuda_stream(dev)), 0);
    assert_int_equal(dev_sync(dev), ERR_CUDA);
    assert_int_equal(dev_sync(dev), ERR_CUDA); /* it sticks */
    assert_int_equal(dev_upload(dev, p, "x", 1), ERR_CUDA);
    struct err_msg why = {""};
    assert_int_equal(dev_alloc(dev, &p, 64, &why), ERR_CUDA);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_open),     cmocka_unit_test(test_memory),
        cmocka_unit_test(test_too_much), cmocka_unit_test(test_copies),
        cmocka_unit_test(test_thread),   cmocka_unit_test(test_broken_kernel),
    };
    if (!have_device())
        return 77;
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dev_close(dev);
    return failed;
}
