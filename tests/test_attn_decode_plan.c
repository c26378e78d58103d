/* The decode plan: random ragged batches against the definitions it must obey. */
#include "attention/attn_decode_plan.h"
#include "tests/test.h"

#include <time.h>

enum { MAX_SEQS = 256, GUARD = 8 };

struct batch {
    struct dec_shape shape;
    struct dec_seq seqs[MAX_SEQS];
    struct attn_head_policy heads[64];
    int32_t n_seqs;
    bool by_head;
    struct dec_plan plan;
    size_t capacity;
    int32_t n_pieces;
};

static void plan_make(struct batch *b)
{
    b->capacity = dec_plan_max_pieces(&b->shape, b->n_seqs, DEC_MAX_TOKENS);
    b->plan.pieces = malloc((b->capacity + GUARD) * sizeof *b->plan.pieces);
    b->plan.first = malloc(((size_t)b->shape.n_shares + 1 + GUARD) * sizeof *b->plan.first);
    memset(b->plan.pieces, 0x5a, (b->capacity + GUARD) * sizeof *b->plan.pieces);
    memset(b->plan.first, 0x5a, ((size_t)b->shape.n_shares + 1 + GUARD) * sizeof *b->plan.first);
    b->n_pieces =
        dec_plan_make(&b->plan, &b->shape, b->seqs, b->n_seqs, b->by_head ? b->heads : NULL);
}

static void plan_free(struct batch *b)
{
    free(b->plan.pieces);
    free(b->plan.first);
}

static int32_t page_at(const struct dec_piece *p, int32_t i)
{
    return i < p->n_run ? p->last - i : p->sink - 1 - (i - p->n_run);
}

/* Whether any query head of the group visits the page for any packed row of the tile. */
static bool wanted(const struct batch *b, const struct dec_piece *p, int32_t page)
{
    const struct dec_seq *s = &b->seqs[p->seq];
    const int32_t group = dec_group(&b->shape), rows = s->n_rows * group;
    for (int32_t r = p->tile * DEC_ROWS; r < p->tile * DEC_ROWS + DEC_ROWS && r < rows; r++) {
        const int32_t pos = s->pos + r / group;
        if (page > pos / 64)
            continue;
        for (int32_t g = 0; g < group; g++) {
            const struct attn_head_policy *h = &b->heads[p->kv_head * group + g];
            if (!b->by_head || h->visit == ATTN_VISIT_ALL || page < h->sink_pages ||
                page >= pos / 128 * 2 - h->local_pages)
                return true;
        }
    }
    return false;
}

/* A task's walk holds every wanted page once, newest first, and no other. */
static void check_walk(const struct batch *b, const struct dec_piece *p, int32_t n)
{
    const int32_t newest = (b->seqs[p->seq].pos + b->seqs[p->seq].n_rows - 1) / 64;
    int32_t i = 0;
    for (int32_t page = newest; page >= 0; page--)
        if (wanted(b, p, page)) {
            assert_true(i < n);
            assert_int_equal(page_at(p, i), page);
            i++;
        }
    assert_int_equal(i, n);
}

static int32_t share_of(const struct batch *b, int32_t piece)
{
    int32_t s = 0;
    while (b->plan.first[s + 1] <= piece)
        s++;
    return s;
}

/* Checks the parts of the task that starts at `piece`; returns the piece after them. */
static int32_t check_task(const struct batch *b, int32_t piece, int32_t seq, int32_t kv,
                          int32_t tile, int64_t *cost)
{
    const struct dec_piece *p = b->plan.pieces + piece, *head = p;
    const int32_t share = share_of(b, piece);
    int32_t at = 0;
    for (int32_t part = 0; part < head->n_parts; part++, p++) {
        const int32_t mine = share_of(b, piece + part);
        const bool starts = b->plan.first[mine] == piece + part;
        assert_true(p->seq == seq && p->kv_head == kv && p->tile == tile);
        assert_ptr_equal(p->pages, b->seqs[seq].pages);
        assert_true(p->row == b->seqs[seq].row && p->pos == b->seqs[seq].pos);
        assert_int_equal(p->n_rows, b->seqs[seq].n_rows);
        assert_int_equal(p->begin, at);
        assert_true(p->end > p->begin);
        assert_true(head->n_parts == 1 || p->end - p->begin >= DEC_MIN_PAGES);
        assert_int_equal(mine, share + part);
        assert_int_equal(p->slot, 2 * mine + !starts);
        assert_int_equal(p->first_slot, head->slot);
        assert_int_equal(p->n_parts, head->n_parts);
        assert_true(part == 0 || starts);
        cost[mine] += p->end - p->begin + DEC_PIECE_COST;
        at = p->end;
    }
    check_walk(b, head, at);
    return piece + head->n_parts;
}

static void check_plan(const struct batch *b)
{
    int64_t *cost = calloc((size_t)b->shape.n_shares, sizeof *cost), total = 0, most = 0;
    const int32_t group = dec_group(&b->shape);
    int32_t piece = 0;
    assert_true((size_t)b->n_pieces <= b->capacity);
    for (size_t i = 0; i < GUARD * sizeof *b->plan.pieces; i++)
        assert_int_equal(((uint8_t *)(b->plan.pieces + b->capacity))[i], 0x5a);
    for (size_t i = 0; i < GUARD; i++)
        assert_int_equal(b->plan.first[b->shape.n_shares + 1 + (int32_t)i], 0x5a5a5a5a);
    assert_int_equal(b->plan.first[0], 0);
    assert_int_equal(b->plan.first[b->shape.n_shares], b->n_pieces);
    for (int32_t s = 0; s < b->shape.n_shares; s++)
        assert_true(b->plan.first[s] <= b->plan.first[s + 1]);
    for (int32_t i = 0; i < b->n_seqs; i++)
        for (int32_t kv = 0; kv < b->shape.n_kv_heads; kv++)
            for (int32_t t = 0; t * DEC_ROWS < b->seqs[i].n_rows * group; t++)
                piece = check_task(b, piece, i, kv, t, cost);
    assert_int_equal(piece, b->n_pieces);
    for (int32_t s = 0; s < b->shape.n_shares; s++) {
        total += cost[s];
        most = cost[s] > most ? cost[s] : most;
    }
    const int32_t blocks = dec_blocks(b->shape.n_shares), used = b->plan.pieces[0].shares;
    const int64_t least = 2 * DEC_MIN_PAGES + DEC_PIECE_COST, even = total / blocks;
    assert_true(most <= (even > least ? even : least) + 3 * DEC_MIN_PAGES);
    for (int32_t s = 0; s < b->shape.n_shares; s++)
        assert_int_equal(cost[s] > 0, s < used);
    for (int32_t s = blocks; s < used; s++) {
        const int64_t small = total * DEC_SPARE_PERCENT / 100 / (blocks * DEC_SPARE);
        assert_true(cost[s] <= (small > least ? small : least) + 4 * DEC_MIN_PAGES);
    }
    free(cost);
}

static void random_batch(struct batch *b, struct rng *r)
{
    static const int32_t groups[] = {1, 2, 3, 4, 7, 8, 16, 24};
    const int32_t kv = rng_range(r, 1, 3), longest = rng_range(r, 0, 1) ? 400 : 40000;
    memset(b, 0, sizeof *b);
    b->shape.n_kv_heads = kv;
    b->shape.n_heads = kv * groups[rng_range(r, 0, kv == 3 ? 6 : 7)];
    b->shape.head_dim = 128;
    b->shape.n_shares = rng_range(r, 1, rng_range(r, 1, 140)) * (1 + DEC_SPARE);
    b->n_seqs = rng_range(r, 1, 24);
    b->by_head = rng_range(r, 0, 1);
    for (int32_t i = 0; i < b->n_seqs; i++)
        b->seqs[i] = (struct dec_seq){.row = 8 * i,
                                      .n_rows = rng_range(r, 1, DEC_MAX_TOKENS),
                                      .pos = rng_range(r, 0, longest),
                                      .pages = (const int32_t *)(uintptr_t)(64 + i)};
    for (int32_t h = 0; h < b->shape.n_heads; h++)
        b->heads[h] =
            (struct attn_head_policy){rng_range(r, 0, 9) ? ATTN_VISIT_SINK_LOCAL : ATTN_VISIT_ALL,
                                      rng_range(r, 0, 3), rng_range(r, 0, 40)};
}

static void test_random(void **state)
{
    (void)state;
    struct rng r = test_rng("plan", 20261125);
    struct batch b;
    for (int i = 0; i < 400; i++) {
        random_batch(&b, &r);
        plan_make(&b);
        check_plan(&b);
        plan_free(&b);
    }
}

/* The shapes of the speed table, and how long a plan for a full batch takes. */
static void test_even(void **state)
{
    (void)state;
    static struct batch b;
    static const int32_t sizes[][2] = {
        {1, 131072}, {8, 32768}, {32, 8192}, {64, 32768}, {256, 4000}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        memset(&b, 0, sizeof b);
        b.shape = (struct dec_shape){32, 8, 128, 0, 132 * (1 + DEC_SPARE)};
        b.n_seqs = sizes[i][0];
        for (int32_t s = 0; s < b.n_seqs; s++)
            b.seqs[s] = (struct dec_seq){.n_rows = 1, .pos = sizes[i][1] - 1};
        plan_make(&b);
        check_plan(&b);
        struct timespec t0, t1;
        timespec_get(&t0, TIME_UTC);
        for (int k = 0; k < 100; k++)
            dec_plan_make(&b.plan, &b.shape, b.seqs, b.n_seqs, NULL);
        timespec_get(&t1, TIME_UTC);
        printf("# %d sequences: %d pieces, %d shares, %.1f us\n", b.n_seqs, b.n_pieces,
               b.plan.pieces[0].shares,
               ((double)(t1.tv_sec - t0.tv_sec) * 1e9 + (double)(t1.tv_nsec - t0.tv_nsec)) * 1e-5);
        plan_free(&b);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_random), cmocka_unit_test(test_even)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
