/* Steered gates on the GPU beside the CPU kernel (held to the oracle): the same bf16 inputs,
 * with heads that visit all pages and heads with windows, in both orders of pages, in blocks that
 * have fewer pages than their level and begin with another block's threshold. Gates differ by
 * rounding, so a decision may too, near its gate: counts may differ by a page in a hundred. */
#include "tests/cuda_case.h"

#include "attention/attention.h"
#include "attention/attn_cuda.h"
#include "kvcache/kv_view.h"

enum {
    HEADS = 4,
    KV_HEADS = 2,
    TOKENS = 3000,
    PAGES = (TOKENS + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS,
    BLOCKS = 8, /* of the thresholds; the last stands for the rest */
    CHUNK = 1280
};

struct inputs {
    int dim;
    uint16_t *q, *k, *v; /* [TOKENS, HEADS, dim], [PAGES, KV_HEADS, page, dim] */
    float t[HEADS][BLOCKS], pages[HEADS], densities[2][HEADS];
};

struct results {
    float *out; /* [TOKENS, HEADS, dim] */
    struct attn_counts heads[HEADS];
};

static const struct attn_head_policy heads[HEADS] = {
    {ATTN_VISIT_ALL, 0, 0},
    {ATTN_VISIT_SINK_LOCAL, 1, 12},
    {ATTN_VISIT_SINK_LOCAL, 3, 8},
    {ATTN_VISIT_ALL, 0, 0},
};

static void make_inputs(struct inputs *in, int dim, struct rng *rng)
{
    const size_t page = (size_t)KV_PAGE_TOKENS * (size_t)dim, kv = PAGES * KV_HEADS * page;
    in->dim = dim;
    in->q = random16((size_t)TOKENS * HEADS * (size_t)dim, 0, 1.0, rng);
    in->k = random16(kv, 0, 1.0, rng);
    in->v = random16(kv, 0, 1.0, rng);
    uneven_tiles(in->k, kv, page, rng);
    for (int h = 0; h < HEADS; h++) {
        for (int b = 0; b < BLOCKS; b++)
            in->t[h][b] = 3.4f + 0.1f * (float)h + 0.15f * (float)b;
        in->pages[h] = 7.0f + 2.0f * (float)h; /* first gated row: 4 to 7 */
        in->densities[0][h] = 0.55f - 0.1f * (float)h;
        in->densities[1][h] = 0.3f;
    }
}

static struct attn_policy policy_of(const struct inputs *in, enum attn_order order, bool windows)
{
    struct attn_policy p = {
        .order = order,
        .heads = windows ? heads : NULL,
        .abs = {in->t[0], 1, 1, HEADS, BLOCKS, HEADS * BLOCKS, HEADS * BLOCKS, BLOCKS},
        .abs_pages = {in->pages, 1, 1, HEADS, 1, HEADS, HEADS, 1},
        .rel_128 = {in->densities[0], 2, 1, HEADS, 1, HEADS, HEADS, 1}};
    p.rel_64 = p.rel_128;
    return p;
}

static struct results results_make(const struct inputs *in)
{
    return (struct results){
        .out = host_alloc((size_t)TOKENS * HEADS * (size_t)in->dim * sizeof(float))};
}

static struct results on_cpu(const struct inputs *in, const struct attn_policy *policy,
                             const struct attn_choice *choice)
{
    const size_t n = (size_t)TOKENS * HEADS * (size_t)in->dim;
    static int32_t pages[PAGES];
    struct results r = results_make(in);
    struct dev *cpu;
    struct kv_view kv = {DTYPE_BF16, 1, PAGES, KV_HEADS, in->dim, (void **)&in->k, (void **)&in->v};
    float *q = host_alloc(n * sizeof *q);
    assert_ok(dev_open(&cpu, &dev_cpu, 0, 1, NULL));
    for (size_t i = 0; i < n; i++)
        q[i] = from16(in->q[i], 0);
    for (int32_t i = 0; i < PAGES; i++)
        pages[i] = PAGES - 1 - i;
    const struct attn_seq seq = {
        .n_rows = TOKENS, .prompt_end = TOKENS, .pages = pages, .choice = *choice};
    const struct attn_problem p = {
        .n_heads = HEADS,
        .scale = 1.0f / sqrtf((float)in->dim),
        .q = q,
        .out = r.out,
        .q_stride = (int64_t)HEADS * in->dim,
        .out_stride = (int64_t)HEADS * in->dim,
        .seqs = &seq,
        .n_seqs = 1,
        .head_counts = r.heads,
        .workspace = host_alloc(attn_cpu.workspace_bytes(HEADS, &kv, cpu)),
    };
    assert_ok(attn_cpu.run(&p, &kv, policy, cpu));
    free(p.workspace);
    free(q);
    dev_close(cpu);
    return r;
}

static void run_chunk(struct attn_cuda *attn, const struct attn_choice *choice, int32_t pos,
                      const int32_t *pages)
{
    const size_t bytes = attn_cuda_counts_bytes(attn);
    struct attn_counts seq_counts;
    struct upload u = {.bytes = upload_round(bytes) + attn_cuda_upload_bytes(attn)};
    const struct attn_seq seq = {.row = pos,
                                 .n_rows = TOKENS - pos < CHUNK ? TOKENS - pos : CHUNK,
                                 .pos = pos,
                                 .prompt_end = TOKENS,
                                 .pages = pages,
                                 .choice = *choice};
    u.host = host_alloc(u.bytes);
    u.dev = device_copy(u.host, u.bytes);
    const struct upload_piece results = upload_take(&u, bytes);
    attn_cuda_plan(attn, &(struct attn_cuda_step){&seq, 1, 0, NULL}, &u, results.dev);
    assert_ok(dev_upload(dev, u.dev, u.host, u.used));
    assert_ok(attn_cuda_run(attn, 0));
    assert_ok(dev_download(dev, results.host, results.dev, bytes));
    attn_cuda_counts(attn, results.host, &seq_counts, 1);
    dev_release(dev, u.dev, u.bytes);
    free(u.host);
}

static struct results on_gpu(const struct inputs *in, const struct attn_policy *policy,
                             const struct attn_choice *choice)
{
    const size_t n = (size_t)TOKENS * HEADS * (size_t)in->dim;
    const size_t kv_bytes = (size_t)PAGES * KV_HEADS * KV_PAGE_TOKENS * (size_t)in->dim * 2;
    static int32_t pages[PAGES];
    struct results r = results_make(in);
    struct err_msg why = {""};
    void *q = device_copy(in->q, n * 2), *out = device_copy(NULL, n * 2);
    void *k = device_copy(in->k, kv_bytes), *v = device_copy(in->v, kv_bytes);
    const struct kv_view kv = {DTYPE_BF16, 1, PAGES, KV_HEADS, in->dim, &k, &v};
    const struct attn_cuda_config cfg = {.dev = dev,
                                         .kv = &kv,
                                         .n_heads = HEADS,
                                         .max_seqs = 1,
                                         .max_rows = CHUNK,
                                         .max_position = TOKENS,
                                         .scale = 1.0f / sqrtf((float)in->dim),
                                         .q = q,
                                         .out = out,
                                         .q_rows = TOKENS,
                                         .q_stride = (int64_t)HEADS * in->dim,
                                         .out_stride = (int64_t)HEADS * in->dim};
    struct attn_cuda *attn;
    uint16_t *got = host_alloc(n * sizeof *got);
    for (int32_t i = 0; i < PAGES; i++)
        pages[i] = PAGES - 1 - i;
    assert_ok(attn_cuda_create(&attn, &cfg, &why));
    assert_ok(attn_cuda_set_policy(attn, policy, &why));
    for (int32_t pos = 0; pos < TOKENS; pos += CHUNK)
        run_chunk(attn, choice, pos, pages);
    assert_ok(attn_cuda_head_counts(attn, r.heads)); /* of all chunks */
    attn_cuda_destroy(attn);
    device_take(got, out, n * 2);
    for (size_t i = 0; i < n; i++)
        r.out[i] = from16(got[i], 0);
    free(got);
    dev_release(dev, q, n * 2);
    dev_release(dev, k, kv_bytes);
    dev_release(dev, v, kv_bytes);
    return r;
}

static void check_choice(const struct inputs *in, const struct attn_choice *choice,
                         enum attn_order order, bool windows)
{
    const struct attn_policy policy = policy_of(in, order, windows);
    struct results cpu = on_cpu(in, &policy, choice), gpu = on_gpu(in, &policy, choice);
    uint64_t kept = 0, visited = 0;
    int n_compared = 0;
    for (int h = 0; h < HEADS; h++) {
        const struct attn_counts *c = &cpu.heads[h], *g = &gpu.heads[h];
        assert_true(g->reachable == c->reachable && g->visited == c->visited);
        assert_true(100 * llabs((long long)g->kept - (long long)c->kept) <= (long long)c->kept);
        kept += c->kept;
        visited += c->visited;
        n_compared += g->kept == c->kept;
        for (size_t row = 0; row < TOKENS && g->kept == c->kept; row++) {
            const size_t at = (row * HEADS + (size_t)h) * (size_t)in->dim;
            for (size_t i = at; i < at + (size_t)in->dim; i++)
                assert_close(gpu.out[i], cpu.out[i], 0.02, 0.02);
        }
        printf("%s%s%llu of %llu", h ? ", " : "# kept ", g->kept == c->kept ? "" : "near ",
               (unsigned long long)c->kept, (unsigned long long)c->visited);
    }
    printf("; head_dim %d, %s of %d rows, %s%s\n", in->dim,
           choice->gate == ATTN_GATE_ABS ? "ABS" : "REL", choice->gate_rows,
           order == ATTN_ORDER_L2R ? "left to right" : "diagonal first",
           windows ? ", windows" : "");
    assert_true(n_compared >= HEADS / 2);
    assert_true(kept < visited / 10 * 9 && kept > visited / 10); /* some fell, and some did not */
    free(cpu.out);
    free(gpu.out);
}

static void test_steered(void **state)
{
    static const struct attn_choice choices[] = {
        {.gate = ATTN_GATE_ABS, .gate_rows = 128, .steer = 1, .blend = 1},
        {.gate = ATTN_GATE_ABS, .gate_rows = 128, .steer = 1, .blend = 0.5f},
        {.gate = ATTN_GATE_ABS, .gate_rows = 64, .steer = 2, .blend = 0.7f},
        {.gate = ATTN_GATE_REL, .gate_rows = 128, .ln_lambda = -0.4f, .steer = 1, .blend = 0.5f},
        {.gate = ATTN_GATE_REL, .gate_rows = 64, .ln_lambda = 0.2f, .steer = 1},
    };
    struct rng rng = {11};
    (void)state;
    printf("# seed 11\n");
    for (int dim = 64; dim <= 128; dim *= 2) {
        struct inputs in;
        make_inputs(&in, dim, &rng);
        for (size_t i = 0; i < sizeof choices / sizeof *choices; i++) {
            for (int kind = 0; kind < 4; kind++)
                check_choice(&in, &choices[i], kind & 1 ? ATTN_ORDER_L2R : ATTN_ORDER_DIAG_SINK_R2L,
                             kind & 2);
        }
        free(in.q);
        free(in.k);
        free(in.v);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_steered)};
    if (!have_device())
        return 77;
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dev_close(dev);
    return failed;
}
