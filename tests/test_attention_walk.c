/* Page walks and task plans: every page a head visits is walked once and in the policy's order, and
 * every row and head of a batch is in exactly one task. */
#include "test.h"

#include "attention/attn_plan.h"
#include "attention/attn_walk.h"
#include "core/mem.h"

enum { MAX_PAGES = 64 };

/* The order as policy.h words it. */
static int32_t wanted_order(enum attn_order order, int32_t diag, int32_t last, int32_t *list)
{
    int32_t n = 0;
    if (order == ATTN_ORDER_L2R) {
        for (int32_t j = 0; j <= last; j++)
            list[n++] = j;
        return n;
    }
    for (int32_t j = diag; j <= last; j++)
        list[n++] = j;
    if (diag > 0)
        list[n++] = 0;
    for (int32_t j = diag - 1; j >= 1; j--)
        list[n++] = j;
    return n;
}

static bool some_head_visits(const struct attn_head_policy *heads, int32_t n, int32_t page,
                             int32_t diag)
{
    for (int32_t h = 0; h < n; h++) {
        if (!heads || attn_visits(&heads[h], page, diag))
            return true;
    }
    return false;
}

static void check_walk(enum attn_order order, int32_t diag, int32_t last,
                       const struct attn_head_policy *heads, int32_t n_heads)
{
    int32_t want[MAX_PAGES], at = 0, walked = 0;
    struct attn_walk w;
    int32_t n = wanted_order(order, diag, last, want);
    attn_walk_init(&w, order, diag, last, heads, n_heads);
    assert_true(w.n_spans <= ATTN_WALK_SPANS);
    for (int i = 0; i < w.n_spans; i++) {
        const int32_t step = w.spans[i].first <= w.spans[i].last ? 1 : -1;
        for (int32_t page = w.spans[i].first; page != w.spans[i].last + step; page += step) {
            while (at < n && want[at] != page) /* what the walk leaves out, nobody visits */
                assert_false(some_head_visits(heads, n_heads, want[at++], diag));
            assert_true(at < n);
            at++;
            walked++;
        }
    }
    while (at < n)
        assert_false(some_head_visits(heads, n_heads, want[at++], diag));
    if (n_heads == 1) /* one head: nothing is walked in vain */
        for (int32_t j = 0; j < n; j++)
            walked -= some_head_visits(heads, n_heads, want[j], diag);
    assert_true(n_heads > 1 || walked == 0);
}

static void walks_follow_the_policy(void **state)
{
    (void)state;
    for (int32_t diag = 0; diag <= 12; diag += 2) {
        for (int32_t i = 0; i < 2 * 6 * 6 * 2; i++) {
            const struct attn_head_policy heads[2] = {{ATTN_VISIT_SINK_LOCAL, i % 6, i / 6 % 6},
                                                      {ATTN_VISIT_SINK_LOCAL, 2, i % 5}};
            enum attn_order order = i / 36 % 2 ? ATTN_ORDER_L2R : ATTN_ORDER_DIAG_SINK_R2L;
            int32_t last = diag + i / 72;
            check_walk(order, diag, last, heads, 1);
            check_walk(order, diag, last, heads, 2);
            check_walk(order, diag, last, NULL, 1);
        }
    }
}

struct coverage {
    uint8_t *seen; /* [rows, heads] */
    int32_t n_heads;
    uint32_t last_cost;
};

static void cover(struct coverage *c, const struct attn_plan *plan, const struct attn_problem *p,
                  int32_t group)
{
    for (int32_t i = 0; i < plan->n_tasks; i++) {
        const struct attn_task *t = &plan->tasks[plan->order[i]];
        const struct attn_seq *s = &p->seqs[t->seq];
        assert_int_equal(t->pos - s->pos, t->row - s->row);
        assert_int_equal(t->pos / KV_BLOCK_TOKENS, (t->pos + t->n_rows - 1) / KV_BLOCK_TOKENS);
        assert_int_equal(t->generated, t->pos >= s->prompt_end);
        assert_int_equal(t->generated, t->pos + t->n_rows > s->prompt_end);
        assert_int_equal(t->head / group, (t->head + t->n_heads - 1) / group);
        assert_true(t->n_rows * t->n_heads <= ATTN_TASK_ROWS);
        assert_true(i == 0 || t->cost >= c->last_cost); /* cost is now a rank: 0 is the longest */
        c->last_cost = t->cost;
        for (int32_t r = 0; r < t->n_rows; r++) {
            for (int32_t h = 0; h < t->n_heads; h++)
                c->seen[(t->row + r) * c->n_heads + t->head + h]++;
        }
    }
}

static void plans_cover_the_batch_once(void **state)
{
    struct rng r = test_rng("plans", 61);
    struct attn_plan *plan = mem_alloc(sizeof *plan);
    (void)state;
    for (int k = 0; k < 40; k++) {
        struct attn_seq seqs[8];
        const int32_t n_kv = rng_range(&r, 1, 8), group = rng_range(&r, 1, k % 4 ? 6 : 60);
        int32_t rows = 0, n_seqs = rng_range(&r, 0, 8);
        for (int32_t i = 0; i < n_seqs; i++) {
            seqs[i] = (struct attn_seq){.row = rows,
                                        .n_rows = rng_range(&r, 1, 3000),
                                        .pos = rng_range(&r, 0, 4000),
                                        .prompt_end = rng_range(&r, 0, 7000)};
            rows += seqs[i].n_rows;
        }
        struct attn_problem p = {.n_heads = n_kv * group, .seqs = seqs, .n_seqs = n_seqs};
        struct coverage c = {.n_heads = p.n_heads};
        c.seen = mem_zalloc((size_t)rows * (size_t)p.n_heads + 1, 1);
        attn_plan_start(plan);
        while (attn_plan_next(plan, &p, n_kv))
            cover(&c, plan, &p, group);
        for (int32_t i = 0; i < rows * p.n_heads; i++)
            assert_int_equal(c.seen[i], 1);
        mem_free(c.seen);
    }
    mem_free(plan);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(walks_follow_the_policy),
        cmocka_unit_test(plans_cover_the_batch_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
