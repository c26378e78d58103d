/* kvcache/kv_prefix: chains, seeds, twins, collisions, and the table under hashes that all want the
 * same slot. */
#include "tests/test.h"

#include "core/hash.h"
#include "kvcache/kv_prefix.h"

enum { N = 24, VARIANTS = 3 };

/* Every hash starts probing at the same slot, yet no two are equal. */
static uint64_t hash_one_home(uint64_t parent, const int32_t *tokens)
{
    return hash_bytes(tokens, KV_PAGE_TOKENS * sizeof *tokens, parent) << 16 | 0xfffe;
}

/* Four values in all: most insertions collide. */
static uint64_t hash_tiny(uint64_t parent, const int32_t *tokens)
{
    return hash_bytes(tokens, KV_PAGE_TOKENS * sizeof *tokens, parent) & 3;
}

static void check(const struct kv_prefix *p)
{
    struct err_msg why = {""};
    if (kv_prefix_check(p, &why) < 0)
        fail_msg("%s", why.text);
}

static void fill(int32_t *tokens, int32_t v)
{
    for (int32_t i = 0; i < KV_BLOCK_TOKENS; i++)
        tokens[i] = v;
}

static int32_t find(const struct kv_prefix *p, int32_t parent, uint64_t parent_hash,
                    const int32_t *tokens, bool *collision)
{
    return kv_prefix_find(p, parent, parent_hash, kv_prefix_hash(p, parent_hash, tokens), tokens,
                          collision);
}

static int32_t insert(struct kv_prefix *p, int32_t parent, uint64_t parent_hash,
                      const int32_t *tokens, int32_t page)
{
    return kv_prefix_insert(p, parent, parent_hash, kv_prefix_hash(p, parent_hash, tokens), tokens,
                            page);
}

static void chains(void **state)
{
    (void)state;
    struct kv_prefix p;
    int32_t a[KV_BLOCK_TOKENS], b[KV_BLOCK_TOKENS];
    bool collision;
    fill(a, 7);
    fill(b, 7);
    b[127] = 8; /* of its second page */
    assert_ok(kv_prefix_init(&p, N, NULL));
    int32_t root = insert(&p, KV_NODE_NONE, 1, a, 0);
    uint64_t h = p.nodes[root].hash;
    int32_t child = insert(&p, root, h, a, 1);
    assert_int_equal(find(&p, KV_NODE_NONE, 1, a, &collision), root);
    assert_int_equal(find(&p, root, h, a, &collision), child);
    assert_int_equal(find(&p, KV_NODE_NONE, 2, a, &collision), KV_NODE_NONE); /* other seed */
    assert_int_equal(find(&p, KV_NODE_NONE, 1, b, &collision), KV_NODE_NONE); /* last token */
    assert_int_equal(find(&p, child, p.nodes[child].hash, a, &collision), KV_NODE_NONE);
    check(&p);
    kv_prefix_leave(&p, 1);
    assert_int_equal(find(&p, root, h, a, &collision), KV_NODE_NONE);
    kv_prefix_leave(&p, 0);
    assert_int_equal(p.n_nodes, 0);
    check(&p);
    kv_prefix_deinit(&p);
}

static void twins(void **state)
{
    (void)state;
    struct kv_prefix p;
    int32_t a[KV_BLOCK_TOKENS];
    bool collision;
    fill(a, 1);
    assert_ok(kv_prefix_init(&p, N, NULL));
    int32_t node = insert(&p, KV_NODE_NONE, 1, a, 3);
    assert_false(kv_prefix_shared(&p, 3));
    kv_prefix_join(&p, node, 5);
    kv_prefix_join(&p, node, 4);
    assert_int_equal(p.nodes[node].page, 3); /* the first one wins */
    check(&p);
    kv_prefix_leave(&p, 3);
    assert_int_equal(p.nodes[node].page, 5); /* then the next that joined */
    assert_true(kv_prefix_shared(&p, 4));
    kv_prefix_leave(&p, 4);
    assert_false(kv_prefix_shared(&p, 5));
    assert_int_equal(find(&p, KV_NODE_NONE, 1, a, &collision), node);
    kv_prefix_leave(&p, 5);
    assert_int_equal(find(&p, KV_NODE_NONE, 1, a, &collision), KV_NODE_NONE);
    check(&p);
    kv_prefix_deinit(&p);
}

/* An equal hash is believed only with equal tokens, an equal parent and an equal parent hash. */
static void collisions(void **state)
{
    (void)state;
    struct kv_prefix p;
    int32_t a[KV_BLOCK_TOKENS], b[KV_BLOCK_TOKENS];
    bool collision;
    fill(a, 1);
    fill(b, 2);
    assert_ok(kv_prefix_init(&p, N, NULL));
    int32_t x = kv_prefix_insert(&p, KV_NODE_NONE, 1, 99, a, 0);
    int32_t y = kv_prefix_insert(&p, KV_NODE_NONE, 1, 98, b, 1);
    assert_int_equal(kv_prefix_find(&p, KV_NODE_NONE, 1, 99, a, &collision), x);
    assert_false(collision);
    assert_int_equal(kv_prefix_find(&p, KV_NODE_NONE, 1, 99, b, &collision), KV_NODE_NONE);
    assert_true(collision);
    assert_int_equal(kv_prefix_find(&p, KV_NODE_NONE, 2, 99, a, &collision), KV_NODE_NONE);
    assert_true(collision); /* another tenant's seed */
    assert_int_equal(kv_prefix_find(&p, y, 1, 99, a, &collision), KV_NODE_NONE);
    assert_true(collision); /* another history */
    assert_int_equal(kv_prefix_find(&p, KV_NODE_NONE, 1, 97, a, &collision), KV_NODE_NONE);
    assert_false(collision);
    kv_prefix_deinit(&p);
}

/* Random trees of content: insert where find says so, remove random leaves, compare with a list. */
static void random_run(kv_hash_fn hash, const char *name, bool collides)
{
    struct rng r = test_rng(name, 7);
    struct kv_prefix p;
    int32_t node_of[N], variant[N], parent_page[N], n_collisions = 0;
    assert_ok(kv_prefix_init(&p, N, hash));
    for (int32_t i = 0; i < N; i++)
        node_of[i] = KV_NODE_NONE;
    for (int step = 0; step < 20000; step++) {
        int32_t page = rng_range(&r, 0, N - 1), up = rng_range(&r, -1, N - 1), t[KV_BLOCK_TOKENS];
        if (node_of[page] != KV_NODE_NONE) {
            if (p.nodes[node_of[page]].n_children == 0) {
                kv_prefix_leave(&p, page);
                node_of[page] = KV_NODE_NONE;
            }
        } else if (up < 0 || node_of[up] != KV_NODE_NONE) {
            bool collision;
            int32_t v = rng_range(&r, 0, VARIANTS - 1), known = KV_NODE_NONE;
            int32_t parent = up < 0 ? KV_NODE_NONE : node_of[up];
            uint64_t parent_hash = up < 0 ? 5 : p.nodes[parent].hash;
            fill(t, v);
            for (int32_t i = 0; i < N; i++) {
                if (node_of[i] != KV_NODE_NONE && variant[i] == v && parent_page[i] == up)
                    known = node_of[i];
            }
            assert_int_equal(find(&p, parent, parent_hash, t, &collision), known);
            n_collisions += collision;
            if (known == KV_NODE_NONE && !collision) {
                node_of[page] = insert(&p, parent, parent_hash, t, page);
                variant[page] = v;
                parent_page[page] = up;
            }
        }
        check(&p);
    }
    assert_true(collides == (n_collisions > 0));
    kv_prefix_deinit(&p);
}

static void random_good_hash(void **state)
{
    (void)state;
    random_run(NULL, "kv_prefix good hash", false);
}

static void random_one_home(void **state)
{
    (void)state;
    random_run(hash_one_home, "kv_prefix one home", false);
}

static void random_tiny_hash(void **state)
{
    (void)state;
    random_run(hash_tiny, "kv_prefix tiny hash", true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chains),          cmocka_unit_test(twins),
        cmocka_unit_test(collisions),      cmocka_unit_test(random_good_hash),
        cmocka_unit_test(random_one_home), cmocka_unit_test(random_tiny_hash),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
