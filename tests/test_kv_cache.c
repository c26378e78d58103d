/* kvcache/kv_cache: exact pages and eviction order beside a naive model, hit rounding, sizes at and
 * around every limit, nothing changed on failure, and soundness under hashes that collide.
 *
 * Content in the random runs: a page is filled with one of a few values, so a prefix is a short
 * string of digits and sequences often share one. */
#include "tests/test.h"

#include "core/hash.h"
#include "kvcache/kv_cache.h"

enum { MAX_PAGES = 40, SEQS = 5, SEQ_PAGES = 12, MAX_TOKENS = SEQ_PAGES * KV_PAGE_TOKENS };

static uint64_t hash_one_home(uint64_t parent, const int32_t *tokens)
{
    return hash_bytes(tokens, KV_PAGE_TOKENS * sizeof *tokens, parent) << 16 | 0xfffe;
}

static uint64_t hash_tiny(uint64_t parent, const int32_t *tokens)
{
    return hash_bytes(tokens, KV_PAGE_TOKENS * sizeof *tokens, parent) & 7;
}

static void check(const struct kv_cache *kv)
{
    struct err_msg why = {""};
    if (kv_check(kv, &why) < 0)
        fail_msg("%s", why.text);
}

static struct kv_cache *create(int32_t n_pages, int32_t seqs, int32_t seq_pages)
{
    struct kv_cache *kv = NULL;
    struct err_msg why = {""};
    struct kv_cache_config cfg = {n_pages, seqs, seq_pages, true, NULL};
    if (kv_cache_create(&kv, &cfg, &why) < 0)
        fail_msg("%s", why.text);
    return kv;
}

static void fill(int32_t *tokens, int32_t n_tokens, int32_t base)
{
    for (int32_t i = 0; i < n_tokens; i++)
        tokens[i] = base + i;
}

/* Opens, attaches, reserves and publishes a whole prompt; returns the slot. */
static int32_t run_prompt(struct kv_cache *kv, uint64_t seed, const int32_t *tokens, int32_t n,
                          int32_t *hit)
{
    int32_t slot;
    assert_ok(kv_seq_open(kv, &slot));
    *hit = kv_seq_attach(kv, slot, seed, tokens, n);
    assert_ok(kv_seq_reserve(kv, slot, n));
    kv_seq_publish(kv, slot, seed, tokens, n);
    check(kv);
    return slot;
}

static void rounding(void **state)
{
    (void)state;
    static const int32_t cases[][2] = {{1, 0},     {64, 0},    {127, 0},   {128, 0},
                                       {129, 128}, {256, 128}, {257, 256}, {320, 256},
                                       {384, 256}, {385, 256}, {640, 256}};
    int32_t tokens[MAX_TOKENS], hit, n;
    struct kv_cache *kv = create(20, 2, SEQ_PAGES);
    fill(tokens, MAX_TOKENS, 0);
    kv_seq_close(kv,
                 run_prompt(kv, 1, tokens, 320, &hit)); /* five full pages: two and a half blocks */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t slot, free_hits;
        assert_ok(kv_seq_open(kv, &slot));
        assert_int_equal(kv_prefix_peek(kv, 1, tokens, cases[i][0], &free_hits), cases[i][1]);
        assert_int_equal(free_hits, cases[i][1] / KV_PAGE_TOKENS);
        assert_int_equal(kv_seq_attach(kv, slot, 1, tokens, cases[i][0]), cases[i][1]);
        (void)kv_seq_pages(kv, slot, &n);
        assert_int_equal(n, cases[i][1] / KV_PAGE_TOKENS);
        assert_int_equal(kv_prefix_peek(kv, 1, tokens, cases[i][0], &free_hits), cases[i][1]);
        assert_int_equal(free_hits, 0);
        check(kv);
        kv_seq_close(kv, slot);
    }
    assert_int_equal(kv_prefix_peek(kv, 2, tokens, 320, NULL), 0); /* another seed */
    tokens[130]++;
    assert_int_equal(kv_prefix_peek(kv, 1, tokens, 320, NULL), 128);
    tokens[0]++;
    assert_int_equal(kv_prefix_peek(kv, 1, tokens, 320, NULL), 0);
    assert_int_equal(kv_prefix_peek(kv, 1, NULL, 0, NULL), 0);
    kv_cache_destroy(kv);
}

static void seeds(void **state)
{
    (void)state;
    uint64_t base = kv_seed(1, 2, NULL, 0);
    assert_true(base != kv_seed(2, 1, NULL, 0));
    assert_true(base != kv_seed(1, 3, NULL, 0));
    assert_true(base != kv_seed(1, 2, "", 1));
    assert_true(kv_seed(1, 2, "a", 1) != kv_seed(1, 2, "b", 1));
    assert_true(kv_seed(1, 2, "a", 1) != kv_seed(2, 2, "a", 1));
    assert_true(base == kv_seed(1, 2, NULL, 0));
}

/* The pages a new sequence gets, in order. */
static void expect_alloc(struct kv_cache *kv, const int32_t *want, int32_t n_want)
{
    int32_t slot, n;
    assert_ok(kv_seq_open(kv, &slot));
    assert_ok(kv_seq_reserve(kv, slot, n_want * KV_PAGE_TOKENS));
    const int32_t *row = kv_seq_pages(kv, slot, &n);
    assert_int_equal(n, n_want);
    for (int32_t i = 0; i < n; i++)
        assert_int_equal(row[i], want[i]);
    check(kv);
}

static void eviction_order(void **state)
{
    (void)state;
    int32_t a[MAX_TOKENS], b[MAX_TOKENS], hit;
    struct kv_cache_stats st;
    struct kv_cache *kv = create(10, 4, SEQ_PAGES);
    fill(a, MAX_TOKENS, 0);
    fill(b, MAX_TOKENS, 5000);
    int32_t sa = run_prompt(kv, 1, a, 4 * 64 + 1, &hit); /* pages 0..3 full, 4 partial */
    int32_t sb = run_prompt(kv, 1, b, 3 * 64, &hit);     /* pages 5..7, 7 of half a block */
    kv_seq_close(kv, sb);
    kv_seq_close(kv, sa);
    kv_cache_get_stats(kv, &st);
    assert_int_equal(st.cached_pages, 6);
    assert_int_equal(st.free_pages, 10);
    assert_int_equal(st.peak_used_pages, 8);
    assert_int_equal(st.evictions, 0);
    /* Those of partial blocks, the untouched ones, b's tail first, then a's. */
    expect_alloc(kv, (const int32_t[]){4, 7, 8, 9, 6, 5, 3}, 7);
    kv_cache_get_stats(kv, &st);
    assert_int_equal(st.evictions, 3);
    assert_int_equal(st.cached_pages, 3);
    assert_int_equal(kv_prefix_peek(kv, 1, b, 3 * 64, NULL), 0);
    assert_int_equal(kv_prefix_peek(kv, 1, a, 4 * 64 + 1, NULL), 128); /* the head survives */
    kv_cache_destroy(kv);
}

/* Using cached pages makes them young again. */
static void reuse_is_recent(void **state)
{
    (void)state;
    int32_t a[MAX_TOKENS], b[MAX_TOKENS], hit, n;
    struct kv_cache *kv = create(6, 3, SEQ_PAGES);
    fill(a, MAX_TOKENS, 0);
    fill(b, MAX_TOKENS, 5000);
    kv_seq_close(kv, run_prompt(kv, 1, a, 128, &hit));
    kv_seq_close(kv, run_prompt(kv, 1, b, 128, &hit));
    kv_seq_close(kv, run_prompt(kv, 1, a, 129, &hit));
    assert_int_equal(hit, 128);
    int32_t slot;
    assert_ok(kv_seq_open(kv, &slot));
    assert_ok(kv_seq_reserve(kv, slot, 4 * 64));
    (void)kv_seq_pages(kv, slot, &n);
    assert_int_equal(kv_prefix_peek(kv, 1, a, 129, NULL), 128);
    assert_int_equal(kv_prefix_peek(kv, 1, b, 129, NULL), 0);
    kv_cache_destroy(kv);
}

/* Two sequences compute the same prompt at once: not merged, the first is handed out, the copy goes
 * first when it ends, and the survivor serves later prompts. */
static void twins(void **state)
{
    (void)state;
    int32_t a[MAX_TOKENS], s1, s2, s3, n1, n2, n3;
    struct kv_cache_stats st;
    struct kv_cache *kv = create(12, 4, SEQ_PAGES);
    fill(a, MAX_TOKENS, 0);
    assert_ok(kv_seq_open(kv, &s1));
    assert_ok(kv_seq_open(kv, &s2));
    assert_ok(kv_seq_reserve(kv, s1, 128));
    assert_ok(kv_seq_reserve(kv, s2, 256));
    kv_seq_publish(kv, s1, 1, a, 128);
    kv_seq_publish(kv, s2, 1, a, 256);
    check(kv);
    const int32_t *r1 = kv_seq_pages(kv, s1, &n1), *r2 = kv_seq_pages(kv, s2, &n2);
    assert_true(r1[0] != r2[0]);
    assert_ok(kv_seq_open(kv, &s3));
    assert_int_equal(kv_seq_attach(kv, s3, 1, a, 300), 256);
    const int32_t *r3 = kv_seq_pages(kv, s3, &n3);
    assert_int_equal(r3[0], r1[0]);
    assert_int_equal(r3[2], r2[2]);
    int32_t copy = r1[0], kept = r2[0];
    kv_seq_close(kv, s3);
    check(kv);
    kv_seq_close(kv, s1); /* its pages are copies now */
    check(kv);
    kv_cache_get_stats(kv, &st);
    assert_int_equal(st.cached_pages, 0);
    expect_alloc(kv, &copy, 1);
    assert_ok(kv_seq_open(kv, &s3));
    assert_int_equal(kv_seq_attach(kv, s3, 1, a, 300), 256);
    r3 = kv_seq_pages(kv, s3, &n3);
    assert_int_equal(r3[0], kept);
    kv_cache_destroy(kv);
}

/* A prompt of exactly the cached length computes its last block again: the new pages take the place
 * of the free ones. */
static void recomputed_block(void **state)
{
    (void)state;
    int32_t a[MAX_TOKENS], hit;
    struct kv_cache_stats st;
    struct kv_cache *kv = create(8, 2, SEQ_PAGES);
    fill(a, MAX_TOKENS, 0);
    kv_seq_close(kv, run_prompt(kv, 1, a, 256, &hit));
    kv_seq_close(kv, run_prompt(kv, 1, a, 256, &hit));
    assert_int_equal(hit, 128);
    kv_cache_get_stats(kv, &st);
    assert_int_equal(st.cached_pages, 4);
    check(kv);
    kv_cache_destroy(kv);
}

/* The rows of a block may share a gate, so that K and V of its first page depend on the tokens of
 * its second: prompts that differ there share neither, and half a block is not shared at all. */
static void blocks_are_shared_whole(void **state)
{
    (void)state;
    int32_t a[MAX_TOKENS], b[MAX_TOKENS], hit, n, of_a, of_b;
    struct kv_cache *kv = create(20, 2, SEQ_PAGES);
    fill(a, MAX_TOKENS, 0);
    fill(b, MAX_TOKENS, 0);
    b[255] = 1;                                        /* of page 3 */
    kv_seq_close(kv, run_prompt(kv, 1, a, 200, &hit)); /* page 2, under other rows of its block */
    int32_t sa = run_prompt(kv, 1, a, 257, &hit);
    assert_int_equal(hit, 128);
    int32_t sb = run_prompt(kv, 1, b, 257, &hit);
    assert_int_equal(hit, 128);
    of_a = kv_seq_pages(kv, sa, &n)[2];
    of_b = kv_seq_pages(kv, sb, &n)[2];
    assert_int_not_equal(of_a, of_b);
    kv_seq_close(kv, sb);
    kv_seq_close(kv, sa);
    sb = run_prompt(kv, 1, b, 257, &hit);
    assert_int_equal(hit, 256);
    assert_int_equal(kv_seq_pages(kv, sb, &n)[2], of_b);
    sa = run_prompt(kv, 1, a, 257, &hit);
    assert_int_equal(hit, 256);
    assert_int_equal(kv_seq_pages(kv, sa, &n)[2], of_a);
    kv_cache_destroy(kv);
}

static void no_pages_changes_nothing(void **state)
{
    (void)state;
    int32_t a[MAX_TOKENS], s1, s2, n, hit;
    struct kv_cache_stats before, after;
    struct kv_cache *kv = create(6, 2, 5);
    fill(a, MAX_TOKENS, 0);
    s1 = run_prompt(kv, 1, a, 3 * 64, &hit);
    assert_ok(kv_seq_open(kv, &s2));
    assert_ok(kv_seq_reserve(kv, s2, 65));
    kv_cache_get_stats(kv, &before);
    assert_int_equal(kv_seq_reserve(kv, s2, 3 * 64 + 1), ERR_NO_BLOCKS);
    assert_int_equal(kv_seq_reserve(kv, s2, 5 * 64 + 1), ERR_TOO_LONG);
    assert_int_equal(kv_seq_open(kv, &n), ERR_NO_BLOCKS);
    kv_cache_get_stats(kv, &after);
    assert_memory_equal(&before, &after, sizeof before);
    (void)kv_seq_pages(kv, s2, &n);
    assert_int_equal(n, 2);
    assert_ok(kv_seq_reserve(kv, s2, 3 * 64)); /* exactly what is left */
    assert_ok(kv_seq_reserve(kv, s2, 1));      /* covered already */
    (void)kv_seq_pages(kv, s2, &n);
    assert_int_equal(n, 3);
    assert_int_equal(kv_free_pages(kv), 0);
    check(kv);
    kv_seq_close(kv, s1);
    kv_seq_close(kv, s2);
    assert_int_equal(kv_free_pages(kv), 6);
    check(kv);
    kv_cache_destroy(kv);
}

/* The one formula: a request of exactly that length fits an empty pool, one token more does not. */
static void servable(void **state)
{
    (void)state;
    assert_int_equal(kv_max_servable_tokens(6, 4), 256);
    assert_int_equal(kv_max_servable_tokens(4, 6), 256);
    assert_int_equal(kv_max_servable_tokens(0, 6), 0);
    assert_int_equal(kv_max_servable_tokens(INT32_MAX, INT32_MAX), INT32_MAX);
    for (int32_t pages = 1; pages < 8; pages++) {
        struct kv_cache *kv = create(pages, 1, 5);
        int32_t slot, most = kv_max_servable_tokens(pages, 5);
        assert_ok(kv_seq_open(kv, &slot));
        assert_true(kv_seq_reserve(kv, slot, most + 1) < 0);
        assert_ok(kv_seq_reserve(kv, slot, most - 1));
        assert_ok(kv_seq_reserve(kv, slot, most));
        check(kv);
        kv_cache_destroy(kv);
    }
}

static void absurd_sizes(void **state)
{
    (void)state;
    static const struct {
        struct kv_cache_config cfg;
        const char *says;
    } cases[] = {
        {{0, 1, 1, true, NULL}, "n_pages 0 is outside 1 to 16777216"},
        {{INT32_MAX, 1, 1, true, NULL}, "n_pages 2147483647 is outside"},
        {{-5, 1, 1, true, NULL}, "n_pages -5"},
        {{1, 0, 1, true, NULL}, "max_seqs 0"},
        {{1, 1 << 17, 1, true, NULL}, "max_seqs 131072"},
        {{1, 1, 0, true, NULL}, "max_pages_per_seq 0"},
        {{1, 1 << 16, 1 << 24, true, NULL},
         "65536 sequences x 16777216 pages x 4 bytes = 4096.0 GiB"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct kv_cache *kv = NULL;
        struct err_msg why = {""};
        assert_int_equal(kv_cache_create(&kv, &cases[i].cfg, &why), ERR_INVALID);
        assert_null(kv);
        if (!strstr(why.text, cases[i].says))
            fail_msg("'%s' lacks '%s'", why.text, cases[i].says);
    }
    kv_cache_destroy(NULL);
    /* 256 sequences of a million tokens are fine. */
    kv_cache_destroy(create(1000, 256, 16384));
}

static void without_index(void **state)
{
    (void)state;
    struct kv_cache *kv = NULL;
    struct kv_cache_config cfg = {8, 2, 8, false, NULL};
    struct kv_cache_stats st;
    int32_t a[MAX_TOKENS], hit;
    fill(a, MAX_TOKENS, 0);
    assert_ok(kv_cache_create(&kv, &cfg, NULL));
    kv_seq_close(kv, run_prompt(kv, 1, a, 256, &hit));
    kv_seq_close(kv, run_prompt(kv, 1, a, 300, &hit));
    assert_int_equal(hit, 0);
    kv_cache_get_stats(kv, &st);
    assert_int_equal(st.cached_pages, 0);
    kv_cache_destroy(kv);
}

/* ---- the random run ------------------------------------------------------------------------- */

struct content {
    uint64_t seed;
    int32_t n; /* pages from the chain's start, 0: none */
    uint8_t path[SEQ_PAGES];
};

struct mseq {
    bool open;
    int32_t slot, n, published;
    int32_t pages[SEQ_PAGES];
    struct content want; /* the tokens it will hold */
};

/* The same rules as the cache's, written with linear scans. */
struct model {
    int32_t n_pages, n_free, joins;
    int32_t order[MAX_PAGES]; /* free pages, head first */
    int32_t refs[MAX_PAGES], joined[MAX_PAGES];
    struct content listed[MAX_PAGES];
    struct mseq seqs[SEQS];
    uint64_t evictions;
};

static bool same(const struct content *a, const struct content *b, int32_t n)
{
    const size_t block_end = ((size_t)n + 1) / 2 * 2; /* whose rows may share a gate */
    return a->n == n && a->seed == b->seed && memcmp(a->path, b->path, block_end) == 0;
}

/* The page handed out for the first n pages of c; -1: none. */
static int32_t model_find(const struct model *m, const struct content *c, int32_t n, int32_t except)
{
    int32_t best = -1;
    for (int32_t p = 0; p < m->n_pages; p++) {
        if (p != except && same(&m->listed[p], c, n) &&
            (best < 0 || m->joined[p] < m->joined[best]))
            best = p;
    }
    return best;
}

static void model_unfree(struct model *m, int32_t page)
{
    int32_t at = 0;
    while (m->order[at] != page)
        at++;
    m->n_free--;
    memmove(m->order + at, m->order + at + 1, (size_t)(m->n_free - at) * sizeof *m->order);
}

static void model_free(struct model *m, int32_t page, bool back)
{
    int32_t at = back ? m->n_free : 0;
    memmove(m->order + at + 1, m->order + at, (size_t)(m->n_free - at) * sizeof *m->order);
    m->order[at] = page;
    m->n_free++;
}

static int32_t model_attach(struct model *m, struct mseq *s, int32_t n_tokens)
{
    int32_t n = 0, most = (n_tokens - 1) / 128 * 2;
    while (n < most && (s->pages[n] = model_find(m, &s->want, n + 1, -1)) >= 0)
        n++;
    n -= n % 2;
    for (int32_t i = 0; i < n; i++) {
        if (m->refs[s->pages[i]]++ == 0)
            model_unfree(m, s->pages[i]);
    }
    s->n = s->published = n;
    return n * 64;
}

static void model_reserve(struct model *m, struct mseq *s, int32_t pages)
{
    while (s->n < pages) {
        int32_t p = m->order[0];
        model_unfree(m, p);
        m->evictions += m->listed[p].n > 0;
        m->listed[p].n = 0;
        m->refs[p] = 1;
        s->pages[s->n++] = p;
    }
}

static void model_publish(struct model *m, struct mseq *s, int32_t pages)
{
    for (; s->published < pages; s->published++) {
        int32_t p = s->pages[s->published], old = model_find(m, &s->want, s->published + 1, -1);
        if (old >= 0 && m->refs[old] == 0) {
            m->listed[old].n = 0;
            model_unfree(m, old);
            model_free(m, old, false);
        }
        m->listed[p] = s->want;
        m->listed[p].n = s->published + 1;
        m->joined[p] = m->joins++;
    }
}

static void model_close(struct model *m, struct mseq *s)
{
    for (int32_t i = s->n; i-- > 0;) {
        int32_t p = s->pages[i];
        if (--m->refs[p] > 0)
            continue;
        if (m->listed[p].n > 0 && model_find(m, &m->listed[p], m->listed[p].n, p) >= 0)
            m->listed[p].n = 0;
        model_free(m, p, m->listed[p].n > 0);
    }
    s->open = false;
}

static void model_reset(struct model *m)
{
    int32_t cached[MAX_PAGES], n = 0;
    for (int32_t i = 0; i < m->n_free; i++) {
        if (m->listed[m->order[i]].n > 0)
            cached[n++] = m->order[i];
    }
    for (int32_t i = 0; i < n; i++) {
        m->listed[cached[i]].n = 0;
        model_unfree(m, cached[i]);
        model_free(m, cached[i], false);
    }
}

static void content_tokens(const struct content *c, int32_t *tokens)
{
    for (int32_t i = 0; i < MAX_TOKENS; i++)
        tokens[i] = c->path[i / KV_PAGE_TOKENS];
}

static void op_open(struct kv_cache *kv, struct model *m, struct mseq *s, struct rng *r)
{
    int32_t tokens[MAX_TOKENS], n_tokens = rng_range(r, 1, MAX_TOKENS), free_hits, n_free = 0;
    assert_ok(kv_seq_open(kv, &s->slot));
    *s = (struct mseq){.open = true, .slot = s->slot, .want = {.seed = rng_u64(r) % 2}};
    for (int32_t i = 0; i < SEQ_PAGES; i++) /* shared heads, differing tails */
        s->want.path[i] = (uint8_t)(rng_range(r, 0, 9) < (i < 4 ? 9 : 6) ? 0 : rng_range(r, 1, 2));
    content_tokens(&s->want, tokens);
    int32_t peek = kv_prefix_peek(kv, s->want.seed, tokens, n_tokens, &free_hits);
    int32_t before = kv_free_pages(kv), hit = model_attach(m, s, n_tokens);
    n_free = before - m->n_free;
    assert_int_equal(peek, hit);
    assert_int_equal(free_hits, n_free);
    assert_int_equal(kv_seq_attach(kv, s->slot, s->want.seed, tokens, n_tokens), hit);
}

static void op_grow(struct kv_cache *kv, struct model *m, struct mseq *s, struct rng *r)
{
    int32_t n_tokens = rng_range(r, 0, MAX_TOKENS), pages = kv_pages_for(n_tokens);
    int err = kv_seq_reserve(kv, s->slot, n_tokens);
    if (pages - s->n > m->n_free)
        assert_int_equal(err, ERR_NO_BLOCKS);
    else
        assert_ok(err);
    if (err == 0)
        model_reserve(m, s, pages);
}

static void op_publish(struct kv_cache *kv, struct model *m, struct mseq *s, struct rng *r)
{
    int32_t tokens[MAX_TOKENS], n_tokens = rng_range(r, 0, s->n * KV_PAGE_TOKENS);
    content_tokens(&s->want, tokens);
    kv_seq_publish(kv, s->slot, s->want.seed, tokens, n_tokens);
    model_publish(m, s, n_tokens / KV_BLOCK_TOKENS * 2);
}

static void compare(const struct kv_cache *kv, const struct model *m)
{
    struct kv_cache_stats st;
    int32_t cached = 0, n;
    for (int32_t i = 0; i < m->n_free; i++)
        cached += m->listed[m->order[i]].n > 0;
    kv_cache_get_stats(kv, &st);
    assert_int_equal(st.free_pages, m->n_free);
    assert_int_equal(st.used_pages + st.free_pages, m->n_pages);
    assert_int_equal(st.cached_pages, cached);
    assert_int_equal(st.evictions, m->evictions);
    for (int32_t i = 0; i < SEQS; i++) {
        const struct mseq *s = &m->seqs[i];
        if (!s->open)
            continue;
        const int32_t *row = kv_seq_pages(kv, s->slot, &n);
        assert_int_equal(n, s->n);
        for (int32_t j = 0; j < n; j++)
            assert_int_equal(row[j], s->pages[j]);
    }
}

/* Which page any allocation gets is fixed by the free list's order, so equal tables over a long run
 * mean equal order. */
static void exact_run(uint64_t (*hash)(uint64_t, const int32_t *), const char *name,
                      int32_t n_pages)
{
    struct rng r = test_rng(name, 11);
    struct kv_cache *kv = NULL;
    struct kv_cache_config cfg = {n_pages, SEQS, SEQ_PAGES, true, hash};
    struct model m = {.n_pages = n_pages, .n_free = n_pages};
    assert_ok(kv_cache_create(&kv, &cfg, NULL));
    for (int32_t i = 0; i < n_pages; i++)
        m.order[i] = i;
    for (int step = 0; step < 20000; step++) {
        struct mseq *s = &m.seqs[rng_range(&r, 0, SEQS - 1)];
        int32_t op = rng_range(&r, 0, 99);
        if (op == 0) {
            kv_prefix_reset(kv);
            model_reset(&m);
        } else if (!s->open) {
            op_open(kv, &m, s, &r);
        } else if (op < 25) {
            kv_seq_close(kv, s->slot);
            model_close(&m, s);
        } else if (op < 60) {
            op_grow(kv, &m, s, &r);
        } else {
            op_publish(kv, &m, s, &r);
        }
        check(kv);
        compare(kv, &m);
    }
    assert_true(m.evictions > 100);
    kv_cache_destroy(kv);
}

static void exact_tiny_pool(void **state)
{
    (void)state;
    exact_run(NULL, "kv_cache 9 pages", 9);
}

static void exact_larger_pool(void **state)
{
    (void)state;
    exact_run(NULL, "kv_cache 40 pages", MAX_PAGES);
}

static void exact_one_home(void **state)
{
    (void)state;
    exact_run(hash_one_home, "kv_cache one home", 25);
}

/* With eight hashes in all, hits are rare; but every page handed out holds what was asked for. */
static void sound_under_collisions(void **state)
{
    (void)state;
    struct rng r = test_rng("kv_cache collisions", 3);
    struct kv_cache *kv = NULL;
    struct kv_cache_config cfg = {30, 1, SEQ_PAGES, true, hash_tiny};
    struct content held[30] = {{0}};
    struct kv_cache_stats st;
    int32_t tokens[MAX_TOKENS], n;
    assert_ok(kv_cache_create(&kv, &cfg, NULL));
    for (int step = 0; step < 20000; step++) {
        struct mseq s = {.want = {.seed = rng_u64(&r) % 2}};
        for (int32_t i = 0; i < SEQ_PAGES; i++)
            s.want.path[i] = (uint8_t)rng_range(&r, 0, 1);
        content_tokens(&s.want, tokens);
        int32_t n_tokens = rng_range(&r, 1, MAX_TOKENS);
        assert_ok(kv_seq_open(kv, &s.slot));
        int32_t hit = kv_seq_attach(kv, s.slot, s.want.seed, tokens, n_tokens);
        const int32_t *row = kv_seq_pages(kv, s.slot, &n);
        for (int32_t i = 0; i < hit / KV_PAGE_TOKENS; i++)
            assert_true(same(&held[row[i]], &s.want, i + 1));
        assert_ok(kv_seq_reserve(kv, s.slot, n_tokens));
        (void)kv_seq_pages(kv, s.slot, &n);
        for (int32_t i = 0; i < n; i++) {
            held[row[i]] = s.want;
            held[row[i]].n = i + 1;
        }
        kv_seq_publish(kv, s.slot, s.want.seed, tokens, n_tokens);
        check(kv);
        kv_seq_close(kv, s.slot);
        check(kv);
    }
    kv_cache_get_stats(kv, &st);
    assert_true(st.collisions > 1000);
    assert_true(st.hit_tokens > 0);
    kv_cache_destroy(kv);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rounding),
        cmocka_unit_test(seeds),
        cmocka_unit_test(eviction_order),
        cmocka_unit_test(reuse_is_recent),
        cmocka_unit_test(twins),
        cmocka_unit_test(recomputed_block),
        cmocka_unit_test(blocks_are_shared_whole),
        cmocka_unit_test(no_pages_changes_nothing),
        cmocka_unit_test(servable),
        cmocka_unit_test(absurd_sizes),
        cmocka_unit_test(without_index),
        cmocka_unit_test(exact_tiny_pool),
        cmocka_unit_test(exact_larger_pool),
        cmocka_unit_test(exact_one_home),
        cmocka_unit_test(sound_under_collisions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
