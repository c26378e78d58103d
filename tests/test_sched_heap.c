/* The scheduler's heap beside a search through all items. */
#include "tests/test.h"

#include "scheduler/sched_heap.h"

struct item {
    struct heap_node node;
    int32_t key, id;
};

static bool item_before(const struct heap_node *a, const struct heap_node *b)
{
    const struct item *x = (const struct item *)(const void *)a;
    const struct item *y = (const struct item *)(const void *)b;
    return x->key != y->key ? x->key < y->key : x->id < y->id;
}

static struct item *least(struct item *items, int n)
{
    struct item *best = NULL;
    for (int i = 0; i < n; i++)
        if (heap_linked(&items[i].node) && (!best || item_before(&items[i].node, &best->node)))
            best = &items[i];
    return best;
}

static void heap_operations(void **state)
{
    enum { N = 200 };
    struct item items[N];
    struct heap h = {.before = item_before};
    struct rng rng = test_rng("heap_operations", 3);
    int32_t n = 0;
    (void)state;
    memset(items, 0, sizeof items);
    for (int round = 0; round < 20000; round++) {
        struct item *it = &items[rng_range(&rng, 0, N - 1)];
        if (heap_linked(&it->node)) {
            it->key = 99; /* removal may not look at it */
            heap_remove(&h, &it->node);
            n--;
        } else {
            it->key = rng_range(&rng, 0, 50);
            it->id = (int32_t)(it - items);
            heap_insert(&h, &it->node);
            n++;
        }
        struct item *want = least(items, N);
        assert_ptr_equal(h.root, want ? &want->node : NULL);
        assert_int_equal(heap_check(&h), n);
    }
    while (h.root)
        heap_remove(&h, h.root);
    assert_int_equal(heap_check(&h), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(heap_operations)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
