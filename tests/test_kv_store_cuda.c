/* Appending to pages and copying them on the device: every element against doubles, over pages that
 * held NaN, and that nothing else changes. */
#include "kvcache/kv_store.h"
#include "kvcache/kv_store_cuda.h"
#include "tests/cuda_case.h"

#include <errno.h>

enum { POSITIONS = 1200, MAX_ROWS = 600 };

struct append_case {
    int dtype;
    int32_t n_heads, n_kv_heads, head_dim, slack;
    bool bias;
};

/* One step: sequences of random spans over a shuffled pool, some rows left out. */
struct step {
    int32_t n_rows, n_pages;
    int32_t positions[MAX_ROWS], slots[MAX_ROWS], tails[MAX_ROWS];
    int32_t pool[512];                /* page ids, shuffled */
    bool clean[512 * KV_PAGE_TOKENS]; /* pool rows that must be zero afterwards */
};

static void shuffle(int32_t *x, int32_t n, struct rng *rng)
{
    for (int32_t i = 0; i < n; i++)
        x[i] = i;
    for (int32_t i = n - 1; i > 0; i--) {
        const int32_t k = rng_range(rng, 0, i), t = x[i];
        x[i] = x[k];
        x[k] = t;
    }
}

static void make_step(struct step *s, struct rng *rng)
{
    int32_t used = 0;
    memset(s, 0, sizeof *s);
    s->n_pages = 200;
    shuffle(s->pool, s->n_pages, rng);
    for (int i = 0; i < 7; i++) {
        const int32_t n = i % 3 == 0 ? 1 : rng_range(rng, 1, 150);
        const int32_t pos = i % 2 ? rng_range(rng, 0, POSITIONS - n) : rng_range(rng, 0, 3) * 64;
        const int32_t *pages = s->pool + used, end = pos + n;
        used += kv_pages_for(end);
        if (used > s->n_pages || s->n_rows + n + 1 > MAX_ROWS)
            break;
        kv_append_rows(s->slots + s->n_rows, s->tails + s->n_rows, pages, pos, n);
        for (int32_t k = 0; k < n; k++)
            s->positions[s->n_rows + k] = pos + k;
        s->n_rows += n;
        if (i == 3) { /* a padding row */
            s->slots[s->n_rows] = -1;
            s->positions[s->n_rows++] = 0;
        }
        /* the rule told another way: of pages whose first token this step writes, the rest is zero
         */
        for (int32_t t = end; t % KV_PAGE_TOKENS != 0; t++) {
            if (end - end % KV_PAGE_TOKENS >= pos)
                s->clean[pages[t / KV_PAGE_TOKENS] * KV_PAGE_TOKENS + t % KV_PAGE_TOKENS] = true;
        }
    }
}

struct append_data {
    const struct append_case *c;
    const struct step *s;
    uint16_t *before, *after, *bias, *pools[2], *want_zero;
    float *cos_sin;
    size_t width, stride, pool_n;
};

/* Element of a head after bias and rotation. */
static double expected(const struct append_data *a, size_t row, size_t head, size_t j, bool rotate,
                       double *scale)
{
    const size_t d = (size_t)a->c->head_dim, half = d / 2, first = row * a->stride + head * d;
    const float *table = a->cos_sin + (size_t)a->s->positions[row] * d;
    double x[2];
    for (size_t k = 0; k < 2; k++) {
        const size_t col = j % half + k * half;
        float v = from16(a->before[first + col], a->c->dtype);
        if (a->bias)
            v += from16(a->bias[head * d + col], a->c->dtype);
        x[k] = (double)v;
    }
    *scale = fabs(x[0]) + fabs(x[1]);
    if (!rotate)
        return x[j / half];
    const double c = (double)table[j % half], s = (double)table[half + j % half];
    return j < half ? x[0] * c - x[1] * s : x[1] * c + x[0] * s;
}

static void check_row(struct append_data *a, size_t row)
{
    const struct append_case *c = a->c;
    const size_t d = (size_t)c->head_dim, heads = (size_t)c->n_heads, kv = (size_t)c->n_kv_heads;
    const int32_t slot = a->s->slots[row];
    double scale;
    for (size_t col = 0; col < a->stride; col++) { /* q turns where it stands, the rest stays */
        const size_t at = row * a->stride + col;
        if (slot < 0 || col >= heads * d)
            assert_int_equal(a->after[at], a->before[at]);
        else {
            double want = expected(a, row, col / d, col % d, true, &scale);
            check16(a->after[at], want, scale, c->dtype, "q");
        }
    }
    for (size_t i = 0; i < kv * d && slot >= 0; i++) {
        const size_t page = (size_t)slot / 64, in_page = (size_t)slot % 64;
        const size_t at = ((page * kv + i / d) * 64 + in_page) * d + i % d;
        double want = expected(a, row, heads + i / d, i % d, true, &scale);
        check16(a->pools[0][at], want, scale, c->dtype, "k");
        want = expected(a, row, heads + kv + i / d, i % d, false, &scale);
        check16(a->pools[1][at], want, 0.0, c->dtype, "v");
        a->want_zero[at] = 2; /* accounted for */
    }
}

/* Elements that no row wrote: zero in clean rows, else as they were. */
static void check_rest(const struct append_data *a)
{
    const size_t d = (size_t)a->c->head_dim, kv = (size_t)a->c->n_kv_heads;
    for (size_t at = 0; at < a->pool_n; at++) {
        const size_t page = at / (kv * 64 * d), in_page = at / d % 64;
        const uint16_t want = a->s->clean[page * 64 + in_page] ? 0 : 0xffff;
        if (a->want_zero[at] == 2)
            continue;
        if (a->pools[0][at] != want || a->pools[1][at] != want)
            fail_msg("page %zu row %zu: %x %x, want %x", page, in_page, a->pools[0][at],
                     a->pools[1][at], want);
    }
}

static void check_append(const struct append_case *c, struct rng *rng)
{
    static struct step s;
    make_step(&s, rng);
    const size_t d = (size_t)c->head_dim, n = (size_t)s.n_rows;
    struct append_data a = {.c = c, .s = &s};
    a.width = (size_t)(c->n_heads + 2 * c->n_kv_heads) * d;
    a.stride = a.width + (size_t)c->slack;
    a.pool_n = (size_t)s.n_pages * (size_t)c->n_kv_heads * 64 * d;
    a.before = random16(n * a.stride, c->dtype, 2.0, rng);
    a.after = host_alloc(n * a.stride * 2);
    a.bias = c->bias ? random16(a.width, c->dtype, 1.0, rng) : NULL;
    a.cos_sin = host_alloc(POSITIONS * d * sizeof *a.cos_sin);
    for (size_t i = 0; i < POSITIONS * d; i++) /* any numbers: the kernel need not know angles */
        a.cos_sin[i] = (float)(2.0 * rng_unit(rng) - 1.0);
    struct kv_append k = {.qkv = device_copy(a.before, n * a.stride * 2),
                          .bias = a.bias ? device_copy(a.bias, a.width * 2) : NULL,
                          .cos_sin = device_copy(a.cos_sin, POSITIONS * d * sizeof(float)),
                          .positions = device_copy(s.positions, n * 4),
                          .slots = device_copy(s.slots, n * 4),
                          .tails = device_copy(s.tails, n * 4),
                          .k = device_copy(NULL, a.pool_n * 2),
                          .v = device_copy(NULL, a.pool_n * 2),
                          .stride = (int64_t)a.stride,
                          .n_rows = s.n_rows,
                          .n_heads = c->n_heads,
                          .n_kv_heads = c->n_kv_heads,
                          .head_dim = c->head_dim};
    assert_int_equal(kv_append_cuda(&k, c->dtype, dev_cuda_stream(dev)), 0);
    for (int i = 0; i < 2; i++)
        a.pools[i] = host_alloc(a.pool_n * 2);
    a.want_zero = host_alloc(a.pool_n * 2);
    device_take(a.after, k.qkv, n * a.stride * 2);
    device_take(a.pools[0], k.k, a.pool_n * 2);
    device_take(a.pools[1], k.v, a.pool_n * 2);
    for (size_t row = 0; row < n; row++)
        check_row(&a, row);
    check_rest(&a);
    dev_release(dev, (void *)k.bias, 1), dev_release(dev, (void *)k.cos_sin, 1);
    dev_release(dev, (void *)k.positions, 1), dev_release(dev, (void *)k.slots, 1);
    dev_release(dev, (void *)k.tails, 1);
    free(a.before), free(a.after), free(a.bias), free(a.cos_sin);
    free(a.pools[0]), free(a.pools[1]), free(a.want_zero);
}

static void test_append(void **state)
{
    static const struct append_case cases[] = {
        {0, 8, 2, 128, 0, false}, {1, 8, 2, 128, 8, true},   {0, 4, 4, 64, 0, true},
        {1, 3, 1, 64, 5, false},  {0, 5, 1, 80, 0, true},    {1, 2, 2, 20, 0, false},
        {0, 1, 1, 6, 3, true},    {0, 70, 10, 16, 0, false},
    };
    struct rng rng = test_rng("kv append", 321);
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_append(&cases[i], &rng);
}

/* The host's rule at its edges. */
static void test_rows(void **state)
{
    static const struct {
        int32_t pos, n, tail;
    } cases[] = {{0, 1, 63}, {0, 64, 0},   {0, 65, 63}, {63, 1, 0},  {64, 1, 63},
                 {10, 5, 0}, {60, 10, 58}, {1, 62, 0},  {64, 63, 1}, {100, 200, 20}};
    const int32_t pages[] = {7, 3, 9, 1, 5};
    int32_t slots[256], tails[256];
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int32_t n = cases[i].n;
        kv_append_rows(slots, tails, pages, cases[i].pos, n);
        assert_int_equal(slots[0], pages[cases[i].pos / 64] * 64 + cases[i].pos % 64);
        assert_int_equal(tails[n - 1], cases[i].tail);
        for (int32_t k = 0; k + 1 < n; k++)
            assert_int_equal(tails[k], 0);
    }
}

static void check_copy(enum dtype dtype, int32_t layers, int32_t kv_heads, int32_t d,
                       struct rng *rng)
{
    enum { PAGES = 12, PAIRS = 4 };
    const struct kv_store_config cfg = {dtype, layers, PAGES, kv_heads, d};
    struct kv_store *store = NULL;
    int32_t order[PAGES];
    assert_ok(kv_store_create(&store, dev, &cfg, NULL));
    const struct kv_view *kv = kv_store_view(store);
    const size_t page = (size_t)kv_heads * 64 * (size_t)d, n = PAGES * page;
    uint16_t *want = host_alloc(n * 2), *got = host_alloc(n * 2);
    for (int32_t l = 0; l < 2 * layers; l++) {
        void *pool = l % 2 ? kv->v[l / 2] : kv->k[l / 2];
        assert_ok(dev_download(dev, got, pool, n * 2));
        assert_memory_equal(got, want, n * 2); /* zeroed at first */
        for (size_t i = 0; i < n; i++)
            got[i] = (uint16_t)((size_t)l * 7919 + i * 31 + (i >> 9));
        assert_ok(dev_upload(dev, pool, got, n * 2));
    }
    shuffle(order, PAGES, rng);
    void *pairs = device_copy(order, 2 * PAIRS * sizeof *order);
    assert_int_equal(kv_copy_pages_cuda(kv, pairs, PAIRS, dev_cuda_stream(dev)), 0);
    assert_int_equal(kv_copy_pages_cuda(kv, pairs, 0, dev_cuda_stream(dev)), 0);
    for (int32_t l = 0; l < 2 * layers; l++) {
        for (size_t i = 0; i < n; i++)
            want[i] = (uint16_t)((size_t)l * 7919 + i * 31 + (i >> 9));
        for (int k = 0; k < PAIRS; k++)
            memcpy(want + (size_t)order[2 * k] * page, want + (size_t)order[2 * k + 1] * page,
                   page * 2);
        assert_ok(dev_download(dev, got, l % 2 ? kv->v[l / 2] : kv->k[l / 2], n * 2));
        assert_memory_equal(got, want, n * 2);
    }
    dev_release(dev, pairs, 1);
    free(want), free(got);
    kv_store_destroy(store);
}

static void test_copy(void **state)
{
    struct rng rng = test_rng("kv copy", 322);
    (void)state;
    check_copy(DTYPE_BF16, 3, 8, 128, &rng);
    check_copy(DTYPE_F16, 2, 1, 64, &rng);
    check_copy(DTYPE_BF16, 1, 3, 6, &rng);
    check_copy(DTYPE_F16, 130, 1, 2, &rng); /* more layers than one launch takes */
}

static void test_refusals(void **state)
{
    const struct kv_store_config f32 = {DTYPE_F32, 1, 1, 1, 64};
    const struct kv_store_config huge = {DTYPE_BF16, 80, 1 << 22, 8, 128};
    const struct kv_append odd = {.n_rows = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = 5};
    const struct kv_append none = {.n_rows = 0, .n_heads = 1, .n_kv_heads = 1, .head_dim = 8};
    struct kv_store *s = NULL;
    struct err_msg why = {""};
    (void)state;
    assert_int_equal(kv_store_create(&s, dev, &f32, &why), ERR_UNSUPPORTED);
    assert_non_null(strstr(why.text, "only f16 and bf16"));
    assert_int_equal(kv_store_create(&s, dev, &huge, &why), -ENOMEM);
    assert_non_null(strstr(why.text, "4194304 pages x 20480.0 KiB"));
    assert_non_null(strstr(why.text, "free of"));
    assert_null(s);
    assert_true(kv_append_cuda(&odd, 0, dev_cuda_stream(dev)) != 0);
    assert_int_equal(kv_append_cuda(&none, 0, dev_cuda_stream(dev)), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_append),
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_copy),
        cmocka_unit_test(test_refusals),
    };
    if (!have_device())
        return 77;
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dev_close(dev);
    return failed;
}
