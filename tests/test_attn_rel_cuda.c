/* What a GPU counts for the REL gate, through attn_cuda.h, against what the CPU kernel counts of
 * the same numbers: all of its decisions are there, and those at an edge differ by rounding alone.
 * Chunks that end on blocks count what the whole does, exactly. Exit status 77: no device. */
#include "tests/cuda_case.h"

#include "attention/attn_cuda.h"
#include "core/mem.h"

enum {
    SEQS = 2,
    LAYERS = 2,
    LAYER = 1, /* the one that runs */
    ROWS = 1200,
    PAGES = 22, /* of the pool; the sequences have 11 and 8 of them */
    MAX_HEADS = 8,
    EDGES = 12,
    BINS = EDGES + 1
};

/* One prompt, and one with generated rows that the prefill kernel takes, behind a cut block. */
static const int32_t lengths[SEQS] = {700, 500}, prompt_ends[SEQS] = {700, 430};

struct shape {
    int head_dim, dtype, n_heads, n_kv_heads;
    enum attn_order order;
    bool visits, nan;
    double sharpness; /* 1: scores of about unit variance */
};

struct counts {
    uint64_t bins[2][MAX_HEADS][BINS];
};

struct world {
    struct shape shape;
    int32_t pages[SEQS][PAGES];
    float edges[EDGES];
    struct attn_head_policy heads[LAYERS * MAX_HEADS];
    struct attn_policy policy;
    uint16_t *q16, *k16; /* [ROWS, heads, dim], [PAGES, KV heads, page, dim] */
    size_t n_q, n_k;
    struct dev *cpu;
    float *q, *k; /* the same, for the CPU */
    void *dev_q, *dev_k, *dev_out;
    struct attn_cuda *attn;
};

/* Rows [pos, pos + n) of a sequence; a step has as many as have n > 0. */
struct chunk {
    int32_t seq, pos, n;
};

static struct attn_seq seq_of(const struct world *w, const struct chunk *c)
{
    return (struct attn_seq){.row = (c->seq > 0 ? lengths[0] : 0) + c->pos,
                             .n_rows = c->n,
                             .pos = c->pos,
                             .prompt_end = prompt_ends[c->seq],
                             .pages = w->pages[c->seq]};
}

static int32_t seqs_of(const struct world *w, const struct chunk *step, struct attn_seq *seqs)
{
    int32_t n = 0;
    while (n < SEQS && step[n].n > 0) {
        seqs[n] = seq_of(w, &step[n]);
        n++;
    }
    return n;
}

/* ---- the CPU ---- */

static float *widen(const uint16_t *x, size_t n, int dtype)
{
    float *f = host_alloc(n * sizeof *f);
    for (size_t i = 0; i < n; i++)
        f[i] = from16(x[i], dtype);
    return f;
}

static void run_cpu(const struct world *w, const struct chunk (*steps)[SEQS], int n_steps,
                    struct counts *to)
{
    const struct shape *s = &w->shape;
    void *pools[LAYERS] = {w->k, w->k};
    const struct kv_view kv = {DTYPE_F32, LAYERS, PAGES, s->n_kv_heads, s->head_dim, pools, pools};
    uint64_t *bins = host_alloc(2 * (size_t)s->n_heads * BINS * sizeof *bins);
    const struct attn_rel_counts rel = {w->edges, EDGES, bins};
    struct attn_seq seqs[SEQS];
    float *out = host_alloc(w->n_q * sizeof *out);
    struct attn_problem p = {.layer = LAYER,
                             .n_heads = s->n_heads,
                             .scale = 1.0f / sqrtf((float)s->head_dim),
                             .q = w->q,
                             .out = out,
                             .q_stride = (int64_t)s->n_heads * s->head_dim,
                             .out_stride = (int64_t)s->n_heads * s->head_dim,
                             .seqs = seqs,
                             .rel_counts = &rel};
    p.workspace = mem_try_aligned(1, attn_cpu.workspace_bytes(s->n_heads, &kv, w->cpu));
    assert_non_null(p.workspace);
    for (int i = 0; i < n_steps; i++) {
        p.n_seqs = seqs_of(w, steps[i], seqs);
        assert_ok(attn_cpu.run(&p, &kv, &w->policy, w->cpu));
    }
    memset(to, 0, sizeof *to);
    for (int g = 0; g < 2; g++)
        memcpy(to->bins[g], bins + g * s->n_heads * BINS,
               (size_t)s->n_heads * sizeof to->bins[0][0]);
    mem_free(p.workspace);
    free(bins);
    free(out);
}

/* ---- the GPU ---- */

static void run_step(struct world *w, const struct chunk *step)
{
    const size_t counts = attn_cuda_counts_bytes(w->attn);
    struct upload u = {.bytes = upload_round(counts) + attn_cuda_upload_bytes(w->attn)};
    struct attn_seq seqs[SEQS];
    u.host = host_alloc(u.bytes);
    u.dev = device_copy(u.host, u.bytes);
    const struct upload_piece results = upload_take(&u, counts);
    const int32_t n = seqs_of(w, step, seqs);
    attn_cuda_plan(w->attn, &(struct attn_cuda_step){seqs, n, 0, NULL}, &u, results.dev);
    assert_ok(dev_upload(dev, u.dev, u.host, u.used));
    assert_ok(attn_cuda_run(w->attn, LAYER));
    assert_ok(dev_sync(dev));
    dev_release(dev, u.dev, u.bytes);
    free(u.host);
}

static void run_gpu(struct world *w, const struct chunk (*steps)[SEQS], int n_steps,
                    struct counts *to)
{
    const size_t heads = (size_t)w->shape.n_heads, layer = 2 * heads * BINS;
    uint64_t *bins = host_alloc(LAYERS * layer * sizeof *bins);
    float *edges = device_copy(w->edges, sizeof w->edges);
    uint64_t *dev_bins = device_copy(bins, LAYERS * layer * sizeof *bins);
    const struct attn_rel_counts rel = {edges, EDGES, dev_bins};
    attn_cuda_set_rel_counts(w->attn, &rel);
    for (int i = 0; i < n_steps; i++)
        run_step(w, steps[i]);
    attn_cuda_set_rel_counts(w->attn, NULL);
    device_take(bins, dev_bins, LAYERS * layer * sizeof *bins);
    dev_release(dev, edges, sizeof w->edges);
    for (size_t i = 0; i < layer; i++)
        assert_true(bins[i] == 0); /* the other layer's */
    memset(to, 0, sizeof *to);
    for (size_t g = 0; g < 2; g++)
        memcpy(to->bins[g], bins + (LAYER * 2 + g) * heads * BINS, heads * sizeof to->bins[0][0]);
    free(bins);
}

/* ---- worlds ---- */

/* Pages of the two sequences, shuffled over the pool. */
static void deal_pages(struct world *w, struct rng *rng)
{
    int32_t all[PAGES];
    for (int32_t i = 0; i < PAGES; i++)
        all[i] = i;
    for (int32_t i = PAGES - 1; i > 0; i--) {
        const int32_t j = rng_range(rng, 0, i), t = all[i];
        all[i] = all[j];
        all[j] = t;
    }
    memcpy(w->pages[0], all, 11 * sizeof *all);
    memcpy(w->pages[1], all + 11, 8 * sizeof *all);
}

static void fill(struct world *w, struct rng *rng)
{
    const struct shape *s = &w->shape;
    const size_t tile = (size_t)KV_PAGE_TOKENS * (size_t)s->head_dim;
    const double range = s->sharpness > 100 ? 2.5 : 2.5 * s->sharpness;
    w->n_q = (size_t)ROWS * (size_t)s->n_heads * (size_t)s->head_dim;
    w->n_k = (size_t)PAGES * (size_t)s->n_kv_heads * tile;
    w->q16 = random16(w->n_q, s->dtype, s->sharpness, rng);
    w->k16 = random16(w->n_k, s->dtype, 1.0, rng);
    for (size_t i = 0; i < w->n_k; i += tile) { /* pages that matter more, or less */
        const float scale = 0.3f + 1.2f * (float)rng_unit(rng);
        for (size_t j = i; j < i + tile; j++)
            w->k16[j] = to16(scale * from16(w->k16[j], s->dtype), s->dtype);
    }
    if (s->nan) /* of a head's row in a block that is whole */
        w->q16[((size_t)200 * (size_t)s->n_heads + 1) * (size_t)s->head_dim + 5] =
            to16(NAN, s->dtype);
    for (int i = 0; i < EDGES; i++)
        w->edges[i] = (float)(-range * (EDGES - 1 - i + 0.9 * rng_unit(rng)) / EDGES);
    for (int i = 0; i < LAYERS * s->n_heads; i++)
        w->heads[i] = (struct attn_head_policy){i % 3 == 1 ? ATTN_VISIT_ALL : ATTN_VISIT_SINK_LOCAL,
                                                rng_range(rng, 1, 3),
                                                i % 4 == 3 ? 1000 : rng_range(rng, 0, 6)};
    w->policy = (struct attn_policy){.order = s->order, .heads = s->visits ? w->heads : NULL};
}

static void open_world(struct world *w, const struct shape *s, struct rng *rng)
{
    struct err_msg why = {""};
    *w = (struct world){.shape = *s};
    deal_pages(w, rng);
    fill(w, rng);
    assert_ok(dev_open(&w->cpu, &dev_cpu, 0, 4, &why));
    w->q = widen(w->q16, w->n_q, s->dtype);
    w->k = widen(w->k16, w->n_k, s->dtype);
    w->dev_q = device_copy(w->q16, w->n_q * 2);
    w->dev_k = device_copy(w->k16, w->n_k * 2);
    w->dev_out = device_copy(NULL, w->n_q * 2);
}

/* kv must outlive the object. */
static void open_attn(struct world *w, const struct kv_view *kv)
{
    const struct shape *s = &w->shape;
    struct err_msg why = {""};
    const int64_t stride = (int64_t)s->n_heads * s->head_dim;
    const struct attn_cuda_config cfg = {.dev = dev,
                                         .kv = kv,
                                         .n_heads = s->n_heads,
                                         .max_seqs = SEQS,
                                         .max_rows = ROWS,
                                         .max_position = ROWS,
                                         .scale = 1.0f / sqrtf((float)s->head_dim),
                                         .q = w->dev_q,
                                         .out = w->dev_out,
                                         .q_rows = ROWS,
                                         .q_stride = stride,
                                         .out_stride = stride};
    if (attn_cuda_create(&w->attn, &cfg, &why) < 0 ||
        attn_cuda_set_policy(w->attn, &w->policy, &why) < 0)
        fail_msg("%s", why.text);
}

static void close_world(struct world *w)
{
    attn_cuda_destroy(w->attn);
    dev_release(dev, w->dev_q, w->n_q * 2);
    dev_release(dev, w->dev_k, w->n_k * 2);
    dev_release(dev, w->dev_out, w->n_q * 2);
    dev_close(w->cpu);
    free(w->q16);
    free(w->k16);
    free(w->q);
    free(w->k);
}

/* ---- checks ---- */

/* Decisions between the ends of the edges; totals agree, and so do all sums from the first bin on
 * but for what rounding moves over an edge. */
static uint64_t compare(const struct counts *got, const struct counts *want, int n_heads)
{
    uint64_t inner = 0;
    for (int i = 0; i < 2 * n_heads; i++) {
        const uint64_t *a = got->bins[i / n_heads][i % n_heads];
        const uint64_t *b = want->bins[i / n_heads][i % n_heads];
        uint64_t total = 0, sum_a = 0, sum_b = 0;
        for (int k = 0; k < BINS; k++)
            total += b[k];
        for (int k = 0; k < BINS; k++) {
            sum_a += a[k];
            sum_b += b[k];
            if (fabs((double)sum_a - (double)sum_b) > 1 + (double)total / 100)
                fail_msg("groups %d head %d: %llu decisions up to bin %d, want %llu of %llu",
                         i / n_heads, i % n_heads, (unsigned long long)sum_a, k,
                         (unsigned long long)sum_b, (unsigned long long)total);
        }
        assert_true(sum_a == total && total > 0);
        inner += total - b[0] - b[EDGES];
    }
    return inner;
}

static void check_shape(const struct shape *s, struct rng *rng)
{
    static const struct chunk whole[][SEQS] = {{{0, 0, 700}, {1, 0, 500}}};
    static const struct chunk blocks[][SEQS] = {
        {{0, 0, 256}, {1, 0, 128}}, {{0, 256, 384}}, {{1, 128, 372}, {0, 640, 60}}};
    static const struct chunk ragged[][SEQS] = {
        {{0, 0, 100}}, {{0, 100, 300}, {1, 0, 333}}, {{1, 333, 97}, {0, 400, 300}}};
    struct world w;
    struct counts got, want, again;
    open_world(&w, s, rng);
    void *pools[LAYERS] = {w.dev_k, w.dev_k};
    const struct kv_view kv = {s->dtype == 0 ? DTYPE_BF16 : DTYPE_F16,
                               LAYERS,
                               PAGES,
                               s->n_kv_heads,
                               s->head_dim,
                               pools,
                               pools};
    open_attn(&w, &kv);
    run_cpu(&w, whole, 1, &want);
    run_gpu(&w, whole, 1, &got);
    const uint64_t inner = compare(&got, &want, s->n_heads);
    printf("# head_dim %d dtype %d heads %d/%d order %d%s%s sharpness %g: %llu between the edges\n",
           s->head_dim, s->dtype, s->n_heads, s->n_kv_heads, (int)s->order,
           s->visits ? " visits" : "", s->nan ? " NaN" : "", s->sharpness,
           (unsigned long long)inner);
    assert_true(inner > 0 || s->sharpness > 100);
    run_gpu(&w, blocks, 3, &again);
    assert_memory_equal(&again, &got, sizeof got);
    run_cpu(&w, ragged, 3, &want);
    run_gpu(&w, ragged, 3, &got);
    (void)compare(&got, &want, s->n_heads);
    close_world(&w);
}

static void counts_are_the_cpus(void **state)
{
    static const int heads[3][2] = {{2, 2}, {8, 2}, {8, 1}};
    struct rng rng = test_rng("rel counts on a GPU", 23);
    (void)state;
    for (int i = 0; i < 24; i++) {
        const struct shape s = {.head_dim = i & 1 ? 128 : 64,
                                .dtype = i >> 1 & 1,
                                .n_heads = heads[i >> 3][0],
                                .n_kv_heads = heads[i >> 3][1],
                                .order = i & 4 ? ATTN_ORDER_L2R : ATTN_ORDER_DIAG_SINK_R2L,
                                .visits = (i / 3) % 2,
                                .nan = i % 5 == 2,
                                .sharpness = i % 7 == 3 ? 40 : 1};
        check_shape(&s, &rng);
    }
}

/* Gaps far beyond any edge, and decisions by rounding alone at none. */
static void huge_scores(void **state)
{
    struct rng rng = test_rng("rel counts of huge scores", 24);
    (void)state;
    for (int i = 0; i < 4; i++) {
        const struct shape s = {.head_dim = i & 1 ? 128 : 64,
                                .n_heads = 4,
                                .n_kv_heads = 2,
                                .order = i & 2 ? ATTN_ORDER_L2R : ATTN_ORDER_DIAG_SINK_R2L,
                                .nan = true,
                                .sharpness = 1e15};
        check_shape(&s, &rng);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(counts_are_the_cpus),
        cmocka_unit_test(huge_scores),
    };
    if (!have_device())
        return 77;
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dev_close(dev);
    return failed;
}
