/* kvcache/kv_store: every element lands where kv_view.h says, nothing else is touched, sizes. */
#include "tests/test.h"

#include "kvcache/kv_store.h"

#include <errno.h>
#include <stdbool.h>

enum { LAYERS = 2, PAGES = 5, HEADS = 3 };

static struct dev *open_dev(void)
{
    struct dev *d = NULL;
    assert_ok(dev_open(&d, &dev_cpu, 0, 1, NULL));
    return d;
}

static double read_elem(const struct kv_view *kv, void *pool, size_t at)
{
    return kv->dtype == DTYPE_F32 ? (double)((float *)pool)[at]
                                  : (double)dtype_bf16_f32(((uint16_t *)pool)[at]);
}

/* What was written where, in plain arrays: [layer][k or v][pool element]. */
static double *expected(size_t n)
{
    double *e = calloc(n * LAYERS, 2 * sizeof *e);
    assert_non_null(e);
    return e;
}

static void write_random(const struct kv_view *kv, struct rng *r, double *want, size_t pool_n)
{
    enum { MAX_N = 150, SLACK = 5 };
    int32_t pages[4] = {3, 0, 4, 1}, pos = rng_range(r, 0, 4 * 64 - 1);
    int32_t n = rng_range(r, 1, 4 * 64 - pos < MAX_N ? 4 * 64 - pos : MAX_N);
    int layer = rng_range(r, 0, LAYERS - 1);
    size_t row = (size_t)HEADS * (size_t)kv->head_dim, stride = row + SLACK;
    float *k = calloc((size_t)n * stride, sizeof *k), *v = calloc((size_t)n * stride, sizeof *v);
    assert_true(k && v);
    for (size_t i = 0; i < (size_t)n * stride; i++) {
        k[i] = (float)rng_normal(r);
        v[i] = (float)rng_normal(r);
    }
    kv_store_write_cpu(kv, layer, pages, pos, n, k, v, stride);
    for (int32_t t = 0; t < n; t++) {
        for (size_t c = 0; c < row; c++) {
            size_t head = c / (size_t)kv->head_dim, dim = c % (size_t)kv->head_dim;
            size_t page = (size_t)pages[(pos + t) / 64], in = (size_t)((pos + t) % 64);
            size_t at = ((page * HEADS + head) * 64 + in) * (size_t)kv->head_dim + dim;
            float kf = k[(size_t)t * stride + c], vf = v[(size_t)t * stride + c];
            bool bf16 = kv->dtype == DTYPE_BF16;
            want[(size_t)layer * 2 * pool_n + at] =
                (double)(bf16 ? dtype_bf16_f32(dtype_f32_bf16(kf)) : kf);
            want[((size_t)layer * 2 + 1) * pool_n + at] =
                (double)(bf16 ? dtype_bf16_f32(dtype_f32_bf16(vf)) : vf);
        }
    }
    free(k);
    free(v);
}

static void compare(const struct kv_view *kv, const double *want, size_t pool_n)
{
    for (int l = 0; l < LAYERS; l++) {
        for (size_t i = 0; i < pool_n; i++) {
            if (read_elem(kv, kv->k[l], i) != want[(size_t)l * 2 * pool_n + i] ||
                read_elem(kv, kv->v[l], i) != want[((size_t)l * 2 + 1) * pool_n + i])
                fail_msg("layer %d element %zu", l, i);
        }
    }
}

static void writes(enum dtype dtype, int32_t head_dim)
{
    struct rng r = test_rng("kv_store", 5);
    struct dev *d = open_dev();
    struct kv_store *s = NULL;
    struct kv_store_config cfg = {dtype, LAYERS, PAGES, HEADS, head_dim};
    size_t pool_n = (size_t)PAGES * HEADS * 64 * (size_t)head_dim;
    double *want = expected(pool_n);
    assert_ok(kv_store_create(&s, d, &cfg, NULL));
    const struct kv_view *kv = kv_store_view(s);
    compare(kv, want, pool_n); /* zeroed */
    for (int i = 0; i < 30; i++)
        write_random(kv, &r, want, pool_n);
    compare(kv, want, pool_n);
    kv_store_copy_page_cpu(kv, 2, 4);
    kv_store_copy_page_cpu(kv, 1, 1);
    size_t page_n = pool_n / PAGES;
    for (size_t l = 0; l < LAYERS * 2; l++) {
        memcpy(want + l * pool_n + 2 * page_n, want + l * pool_n + 4 * page_n,
               page_n * sizeof *want);
    }
    compare(kv, want, pool_n);
    free(want);
    kv_store_destroy(s);
    dev_close(d);
}

static void writes_all(void **state)
{
    (void)state;
    static const int32_t dims[] = {1, 8, 20, 64, 128};
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
        writes(DTYPE_F32, dims[i]);
        writes(DTYPE_BF16, dims[i]);
    }
}

static void sizes(void **state)
{
    (void)state;
    struct kv_store_config cfg = {DTYPE_BF16, 32, 1, 8, 128};
    assert_int_equal(kv_store_page_bytes(&cfg), 8 << 20); /* 128 KiB a token, Llama-3.1-8B */
    struct kv_view v = {.n_kv_heads = 8, .head_dim = 128};
    assert_int_equal(kv_tile_offset(&v, 3, 2), (3 * 8 + 2) * 64 * 128);
    assert_int_equal(kv_pages_for(0), 0);
    assert_int_equal(kv_pages_for(64), 1);
    assert_int_equal(kv_pages_for(65), 2);
}

static void refusals(void **state)
{
    (void)state;
    static const struct {
        struct kv_store_config cfg;
        int err;
        const char *says;
    } cases[] = {
        {{DTYPE_F16, 1, 1, 1, 64}, ERR_UNSUPPORTED, "cache dtype f16"},
        {{DTYPE_F32, 0, 1, 1, 64}, ERR_INVALID, "0 layers"},
        {{DTYPE_F32, 1, 0, 1, 64}, ERR_INVALID, "0 pages"},
        {{DTYPE_F32, 1, 1, -1, 64}, ERR_INVALID, "-1 kv heads"},
        {{DTYPE_F32, 1, 1, 1, 1 << 20}, ERR_INVALID, "head_dim 1048576"},
        {{DTYPE_F32, 100, INT32_MAX, 100, 128}, -ENOMEM, "2147483647 pages x 640000.0 KiB"},
        {{DTYPE_F32, 4096, INT32_MAX, 4096, 1024}, -ENOMEM, "overflow"},
    };
    struct dev *d = open_dev();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct kv_store *s = NULL;
        struct err_msg why = {""};
        assert_int_equal(kv_store_create(&s, d, &cases[i].cfg, &why), cases[i].err);
        if (!strstr(why.text, cases[i].says))
            fail_msg("'%s' lacks '%s'", why.text, cases[i].says);
        assert_null(s);
    }
    kv_store_destroy(NULL);
    dev_close(d);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(writes_all),
        cmocka_unit_test(sizes),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
