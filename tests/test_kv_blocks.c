/* kvcache/kv_blocks: order of the free list, references, and a random run beside a plain array. */
#include "tests/test.h"

#include "kvcache/kv_blocks.h"

enum { N = 17 };

static void check(const struct kv_blocks *b)
{
    struct err_msg why = {""};
    int32_t pos[N];
    if (kv_blocks_check(b, pos, &why) < 0)
        fail_msg("%s", why.text);
}

static void order(void **state)
{
    (void)state;
    struct kv_blocks b;
    assert_ok(kv_blocks_init(&b, 4));
    for (int32_t i = 0; i < 4; i++)
        assert_int_equal(kv_blocks_alloc(&b), i);
    assert_int_equal(kv_blocks_alloc(&b), -1);
    kv_blocks_put(&b, 2, true);
    kv_blocks_put(&b, 0, true);
    kv_blocks_put(&b, 3, false);
    kv_blocks_get(&b, 1);
    kv_blocks_put(&b, 1, false); /* still referenced once */
    assert_int_equal(b.n_free, 3);
    kv_blocks_get(&b, 2); /* out of the middle */
    kv_blocks_put(&b, 2, true);
    kv_blocks_demote(&b, 0);
    assert_int_equal(kv_blocks_alloc(&b), 0);
    assert_int_equal(kv_blocks_alloc(&b), 3);
    assert_int_equal(kv_blocks_alloc(&b), 2);
    assert_int_equal(kv_blocks_alloc(&b), -1);
    kv_blocks_deinit(&b);
}

static void check_finds_damage(void **state)
{
    (void)state;
    struct kv_blocks b;
    struct err_msg why = {""};
    int32_t pos[N];
    assert_ok(kv_blocks_init(&b, N));
    b.blocks[5].refs = 1;
    assert_int_equal(kv_blocks_check(&b, pos, &why), ERR_INTERNAL);
    assert_string_equal(why.text, "page 5 is free with 1 references");
    b.blocks[5].refs = 0;
    list_unlink(&b.blocks[3].link);
    assert_int_equal(kv_blocks_check(&b, pos, &why), ERR_INTERNAL);
    b.n_free--;
    assert_int_equal(kv_blocks_check(&b, pos, &why), ERR_INTERNAL);
    assert_string_equal(why.text, "page 3: 0 references, not in the free list");
    kv_blocks_deinit(&b);
}

struct model {
    int32_t order[N], n; /* free pages, head first */
    int32_t refs[N];
};

static void model_remove(struct model *m, int32_t page)
{
    int32_t at = 0;
    while (m->order[at] != page)
        at++;
    m->n--;
    memmove(m->order + at, m->order + at + 1, (size_t)(m->n - at) * sizeof *m->order);
}

static void model_add(struct model *m, int32_t page, bool back)
{
    int32_t at = back ? m->n : 0;
    memmove(m->order + at + 1, m->order + at, (size_t)(m->n - at) * sizeof *m->order);
    m->order[at] = page;
    m->n++;
}

static void step(struct kv_blocks *b, struct model *m, struct rng *r)
{
    int32_t page = rng_range(r, 0, N - 1);
    bool keep = rng_u64(r) & 1;
    switch (rng_range(r, 0, 3)) {
    case 0:
        page = kv_blocks_alloc(b);
        assert_int_equal(page, m->n ? m->order[0] : -1);
        if (page >= 0) {
            model_remove(m, page);
            m->refs[page] = 1;
        }
        break;
    case 1:
        kv_blocks_get(b, page);
        if (m->refs[page]++ == 0)
            model_remove(m, page);
        break;
    case 2:
        if (m->refs[page] == 0)
            break;
        kv_blocks_put(b, page, keep);
        if (--m->refs[page] == 0)
            model_add(m, page, keep);
        break;
    default:
        if (m->refs[page] > 0)
            break;
        kv_blocks_demote(b, page);
        model_remove(m, page);
        model_add(m, page, false);
    }
}

static void random_run(void **state)
{
    (void)state;
    struct rng r = test_rng("kv_blocks", 42);
    struct kv_blocks b;
    struct model m = {.n = N};
    assert_ok(kv_blocks_init(&b, N));
    for (int32_t i = 0; i < N; i++)
        m.order[i] = i;
    for (int i = 0; i < 20000; i++) {
        step(&b, &m, &r);
        check(&b);
        int32_t at = 0;
        assert_int_equal(b.n_free, m.n);
        LIST_FOREACH (l, &b.free)
            assert_int_equal(kv_blocks_id(&b, l), m.order[at++]);
        for (int32_t p = 0; p < N; p++)
            assert_int_equal(kv_blocks_refs(&b, p), m.refs[p]);
    }
    kv_blocks_deinit(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(order),
        cmocka_unit_test(check_finds_damage),
        cmocka_unit_test(random_run),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
