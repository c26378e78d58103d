/* The tile functions one by one, for every table this processor can run: the error of exp, exact
 * packing, and the promise that a row's bits do not depend on the rows beside it. */
#include "test.h"

#include "attention/attn_tile.h"
#include "core/mem.h"

enum { ROWS = 23, PAGE = KV_PAGE_TOKENS };

static void each_table(void (*check)(const struct attn_tile_ops *, struct rng *), struct rng *r)
{
    const struct attn_tile_ops *tables[ATTN_TILE_TABLES + 1];
    attn_tile_list(tables);
    assert_ptr_equal(tables[0], attn_tile_best());
    for (int i = 0; tables[i]; i++)
        check(tables[i], r);
}

static float *normals(struct rng *r, size_t n)
{
    float *x = mem_alloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = (float)rng_normal(r);
    return x;
}

static double ulps(float got, double want)
{
    float w = (float)want;
    return fabs((double)got - want) / ((double)nextafterf(w, INFINITY) - (double)w);
}

/* softmax of a row whose maximum is already 0 is exp of it. */
static void check_exp(const struct attn_tile_ops *tile, struct rng *r)
{
    enum { STEPS = 10000 };
    double worst = 0;
    (void)r;
    for (int i = 0; i < STEPS; i++) {
        float s[PAGE], in[PAGE], m = 0, l = 0, alpha, top = 0;
        for (int j = 0; j < PAGE; j++)
            in[j] = s[j] = -86.0f * (float)(i * PAGE + j) / (float)(STEPS * PAGE);
        tile->softmax(s, &m, &l, &alpha, &top, 1);
        for (int j = 0; j < PAGE; j++)
            worst = fmax(worst, ulps(s[j], exp((double)in[j])));
        assert_true(alpha == 1 && m == 0);
    }
    printf("# %s: exp is off by at most %.2f ulp\n", tile->name, worst);
    assert_true(worst < 1.5);
}

static void exp_is_accurate(void **state)
{
    (void)state;
    each_table(check_exp, NULL);
}

static void check_edges(const struct attn_tile_ops *tile, struct rng *r)
{
    float s[PAGE] = {0, -1, -85.5f, -86.5f, -1e4f, -INFINITY, NAN}, m = -INFINITY, l = 0, alpha;
    float top = 0;
    (void)r;
    tile->softmax(s, &m, &l, &alpha, &top, 1);
    assert_true(s[0] == 1 && s[1] < 0.3679f && s[2] > 0);
    assert_true(s[3] == 0 && s[4] == 0 && s[5] == 0);
    assert_true(isnan(s[6]) && isnan(l) && m == 0 && alpha == 0);

    /* a page without a visible key leaves a fresh row and an old one alone */
    for (int old = 0; old < 2; old++) {
        m = old ? 3.0f : -INFINITY;
        l = old ? 5.0f : 0.0f;
        top = -INFINITY;
        for (int j = 0; j < PAGE; j++)
            s[j] = -INFINITY;
        tile->softmax(s, &m, &l, &alpha, &top, 1);
        assert_true(m == (old ? 3.0f : -INFINITY) && l == (old ? 5.0f : 0.0f) && alpha == 1);
        for (int j = 0; j < PAGE; j++)
            assert_true(s[j] == 0);
    }
}

static void softmax_edges(void **state)
{
    (void)state;
    each_table(check_edges, NULL);
}

/* Transposed, converted, padded; the largest magnitude, NaN if there is one. */
static void check_pack_of(const struct attn_tile_ops *tile, int32_t d, enum dtype t, struct rng *r)
{
    const int32_t dv = attn_tile_dv(d), n = PAGE * d;
    float *x = normals(r, (size_t)n), top = 0;
    uint16_t *half = mem_alloc((size_t)n * sizeof *half);
    float *kt = mem_alloc((size_t)n * sizeof *kt);
    float *v = mem_alloc((size_t)dv * PAGE * sizeof *v);
    const void *src = t == DTYPE_BF16 ? (const void *)half : x;
    for (int32_t i = 0; i < n; i++) {
        half[i] = dtype_f32_bf16(x[i]);
        x[i] = t == DTYPE_BF16 ? dtype_bf16_f32(half[i]) : x[i];
        top = fmaxf(top, fabsf(x[i]));
    }
    assert_true(tile->pack_k(kt, src, t, d) == top);
    tile->pack_v(v, src, t, d);
    for (int32_t i = 0; i < PAGE * dv; i++) {
        int32_t token = i / dv, column = i % dv;
        float want = column < d ? x[token * d + column] : 0;
        assert_true(v[i] == want);
        assert_true(column >= d || kt[column * PAGE + token] == want);
    }
    int32_t at = rng_range(r, 0, n - 1);
    x[at] = -NAN;
    half[at] = 0xffc0;
    assert_true(isnan(tile->pack_k(kt, src, t, d)));
    mem_free(x);
    mem_free(half);
    mem_free(kt);
    mem_free(v);
}

static void check_pack(const struct attn_tile_ops *tile, struct rng *r)
{
    for (int32_t d = 1; d <= 70; d += d < 34 ? 1 : 9) {
        check_pack_of(tile, d, DTYPE_F32, r);
        check_pack_of(tile, d, DTYPE_BF16, r);
    }
}

static void packing_is_exact(void **state)
{
    struct rng r = test_rng("packing", 51);
    (void)state;
    each_table(check_pack, &r);
}

struct tile_state {
    float s[ROWS * PAGE], row_max[ROWS], m[ROWS], l[ROWS], alpha[ROWS], *o;
};

/* One page for rows [first, end) of the state. */
static void step(const struct attn_tile_ops *tile, struct tile_state *x, const float *const in[3],
                 int32_t d, int32_t first, int32_t end)
{
    const int32_t dv = attn_tile_dv(d), n = end - first;
    float *s = x->s + first * PAGE;
    tile->qk(s, x->row_max + first, in[0] + first * d, in[1], n, d);
    tile->softmax(s, x->m + first, x->l + first, x->alpha + first, x->row_max + first, n);
    tile->pv(x->o + first * dv, s, in[2], x->alpha + first, n, 61, dv);
}

static void check_rows(const struct attn_tile_ops *tile, struct rng *r)
{
    static const int32_t dims[] = {1, 16, 33, 64, 80, 96, 128};
    for (size_t k = 0; k < sizeof dims / sizeof *dims; k++) {
        const int32_t d = dims[k], dv = attn_tile_dv(d);
        float *in[3] = {normals(r, (size_t)(ROWS * d)), normals(r, (size_t)(PAGE * d)),
                        normals(r, (size_t)(PAGE * dv))};
        struct tile_state all, one;
        memset(&all, 0, sizeof all);
        for (int i = 0; i < ROWS; i++)
            all.m[i] = (float)rng_normal(r);
        one = all;
        all.o = normals(r, (size_t)(ROWS * dv));
        one.o = mem_alloc((size_t)(ROWS * dv) * sizeof(float));
        memcpy(one.o, all.o, (size_t)(ROWS * dv) * sizeof(float));
        step(tile, &all, (const float *const *)in, d, 0, ROWS);
        for (int32_t at = 0, n; at < ROWS; at += n) {
            n = rng_range(r, 1, ROWS - at < 7 ? ROWS - at : 7);
            step(tile, &one, (const float *const *)in, d, at, at + n);
        }
        assert_memory_equal(all.o, one.o, (size_t)(ROWS * dv) * sizeof(float));
        mem_free(all.o);
        mem_free(one.o);
        all.o = one.o = NULL;
        assert_memory_equal(&all, &one, sizeof all);
        for (int i = 0; i < 3; i++)
            mem_free(in[i]);
    }
}

static void rows_do_not_depend_on_their_neighbours(void **state)
{
    struct rng r = test_rng("tile rows", 52);
    (void)state;
    for (int i = 0; i < 5; i++)
        each_table(check_rows, &r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exp_is_accurate),
        cmocka_unit_test(softmax_edges),
        cmocka_unit_test(packing_is_exact),
        cmocka_unit_test(rows_do_not_depend_on_their_neighbours),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
