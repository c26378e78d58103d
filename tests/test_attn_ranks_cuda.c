/* The page policy over ranks: a rank that holds half of the heads decides for each of them, bit by
 * bit, as one that holds them all. The same q, K and V; thresholds are the rank's view of the same
 * tensor, and one of them runs its steps in halves. Which pages a head kept shows in its counters,
 * and in every bit of its output; generated rows are cut into other pieces by a rank, so that of
 * theirs it shows in the counters alone. */
#include "tests/cuda_case.h"

#include "attention/attn_cuda.h"
#include "kvcache/kv_view.h"

enum {
    HEADS = 8,
    KV_HEADS = 4,
    RANKS = 2,
    TOKENS = 1500,
    PAGES = (TOKENS + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS,
    BLOCKS = 6,                /* of the thresholds; the last stands for the rest */
    GENERATED = 8,             /* rows of a step that the decode kernel takes */
    CUT = 6 * KV_BLOCK_TOKENS, /* of a step in halves */
    MAX_DIM = 128
};

/* Of one share of the heads, on the device. */
struct share {
    int32_t n_heads, n_kv_heads, head_dim;
    int32_t cut; /* 0, or where its steps are divided */
    uint16_t *q, *out;
    void *k, *v;
    struct kv_view kv;
    struct attn_cuda *attn;
    uint16_t *got; /* [TOKENS, n_heads * head_dim] */
    struct attn_counts heads[HEADS], seq;
};

struct inputs {
    int head_dim;
    uint16_t *q, *k, *v; /* [TOKENS, HEADS, dim], [PAGES, KV_HEADS, page, dim] */
    float t[HEADS][BLOCKS], decode[HEADS][BLOCKS];
    float densities[2][HEADS];
};

/* Heads [first, first + n) of [outer, n_all, inner] elements. */
static void *slice(const uint16_t *x, size_t outer, int32_t n_all, int32_t first, int32_t n,
                   size_t inner)
{
    uint16_t *part = host_alloc(outer * (size_t)n * inner * sizeof *part);
    for (size_t i = 0; i < outer; i++)
        memcpy(part + i * (size_t)n * inner, x + (i * (size_t)n_all + (size_t)first) * inner,
               (size_t)n * inner * sizeof *part);
    void *p = device_copy(part, outer * (size_t)n * inner * sizeof *part);
    free(part);
    return p;
}

static void open_share(struct share *s, const struct inputs *in, int rank, int n_ranks)
{
    const size_t dim = (size_t)in->head_dim;
    struct err_msg why = {""};
    *s = (struct share){.n_heads = HEADS / n_ranks,
                        .n_kv_heads = KV_HEADS / n_ranks,
                        .head_dim = in->head_dim,
                        .cut = rank == 1 ? CUT : 0};
    s->q = slice(in->q, TOKENS, HEADS, rank * s->n_heads, s->n_heads, dim);
    s->k = slice(in->k, PAGES, KV_HEADS, rank * s->n_kv_heads, s->n_kv_heads, KV_PAGE_TOKENS * dim);
    s->v = slice(in->v, PAGES, KV_HEADS, rank * s->n_kv_heads, s->n_kv_heads, KV_PAGE_TOKENS * dim);
    s->out = device_copy(NULL, TOKENS * (size_t)s->n_heads * dim * sizeof *s->out);
    s->kv = (struct kv_view){DTYPE_BF16, 1, PAGES, s->n_kv_heads, s->head_dim, &s->k, &s->v};
    const struct attn_cuda_config cfg = {.dev = dev,
                                         .kv = &s->kv,
                                         .n_heads = s->n_heads,
                                         .max_seqs = 2,
                                         .max_rows = TOKENS,
                                         .max_position = TOKENS,
                                         .scale = 1.0f / sqrtf((float)in->head_dim),
                                         .q = s->q,
                                         .out = s->out,
                                         .q_rows = TOKENS,
                                         .q_stride = (int64_t)s->n_heads * s->head_dim,
                                         .out_stride = (int64_t)s->n_heads * s->head_dim};
    assert_ok(attn_cuda_create(&s->attn, &cfg, &why));
    struct attn_policy policy = {.abs = {in->t[rank * s->n_heads], 1, 1, s->n_heads, BLOCKS,
                                         HEADS * BLOCKS, HEADS * BLOCKS, BLOCKS}};
    policy.decode = policy.abs;
    policy.decode.t = in->decode[rank * s->n_heads];
    policy.rel_128 = (struct attn_thresholds){
        &in->densities[0][rank * s->n_heads], 2, 1, s->n_heads, 1, HEADS, HEADS, 1};
    policy.rel_64 = policy.abs_pages = policy.rel_128;
    assert_ok(attn_cuda_set_policy(s->attn, &policy, &why));
}

/* One step of all tokens of one sequence, or of its last ones as generated rows. */
static void run_share(struct share *s, const struct attn_choice *choice)
{
    const int32_t n_rows = choice->decode_gate != ATTN_GATE_NONE ? GENERATED : TOKENS;
    static int32_t pages[PAGES];
    const size_t counts = attn_cuda_counts_bytes(s->attn);
    struct upload u = {.bytes = upload_round(counts) + attn_cuda_upload_bytes(s->attn)};
    const struct attn_seq seq = {.n_rows = n_rows,
                                 .pos = TOKENS - n_rows,
                                 .prompt_end = n_rows < TOKENS ? TOKENS - n_rows : TOKENS,
                                 .pages = pages,
                                 .choice = *choice};

    for (int32_t i = 0; i < PAGES; i++)
        pages[i] = PAGES - 1 - i;
    u.host = host_alloc(u.bytes);
    u.dev = device_copy(u.host, u.bytes);
    const struct upload_piece results = upload_take(&u, counts);
    attn_cuda_plan(s->attn, &(struct attn_cuda_step){&seq, 1, s->cut, NULL}, &u, results.dev);
    assert_true(attn_cuda_has_halves(s->attn) == (s->cut > 0));
    assert_ok(dev_upload(dev, u.dev, u.host, u.used));
    for (int half = 0; half < (s->cut > 0 ? 2 : 1); half++)
        assert_ok(s->cut > 0 ? attn_cuda_run_half(s->attn, 0, half) : attn_cuda_run(s->attn, 0));
    assert_ok(dev_download(dev, results.host, results.dev, counts));
    attn_cuda_counts(s->attn, results.host, &s->seq, 1);
    assert_ok(attn_cuda_head_counts(s->attn, s->heads));
    dev_release(dev, u.dev, u.bytes);
    free(u.host);
}

static void close_share(struct share *s)
{
    const size_t dim = (size_t)s->head_dim, q_bytes = TOKENS * (size_t)s->n_heads * dim * 2;
    const size_t kv_bytes = (size_t)PAGES * KV_PAGE_TOKENS * (size_t)s->n_kv_heads * dim * 2;
    s->got = host_alloc(q_bytes);
    device_take(s->got, s->out, q_bytes);
    dev_release(dev, s->q, q_bytes);
    dev_release(dev, s->k, kv_bytes);
    dev_release(dev, s->v, kv_bytes);
    attn_cuda_destroy(s->attn);
}

static void compare(const struct share *all, const struct share *part, int rank, bool generated)
{
    const size_t width = (size_t)part->n_heads * (size_t)part->head_dim;
    const int32_t first = rank * part->n_heads;
    for (size_t row = 0; row < (generated ? GENERATED : TOKENS); row++) {
        const uint16_t *got = part->got + row * width;
        const uint16_t *want = all->got + row * width * RANKS + (size_t)rank * width;
        if (!generated)
            assert_memory_equal(got, want, width * sizeof *got);
        for (size_t i = 0; i < width && generated; i++)
            assert_close(from16(got[i], 0), from16(want[i], 0), 0.02, 0.01);
    }
    for (int32_t h = 0; h < part->n_heads; h++)
        assert_memory_equal(&part->heads[h], &all->heads[first + h], sizeof part->heads[h]);
}

static void make_inputs(struct inputs *in, int head_dim, struct rng *rng)
{
    const size_t dim = (size_t)head_dim, kv = (size_t)PAGES * KV_HEADS * KV_PAGE_TOKENS * dim;
    in->head_dim = head_dim;
    in->q = random16(TOKENS * HEADS * dim, 0, 1.0, rng);
    in->k = random16(kv, 0, 1.0, rng);
    in->v = random16(kv, 0, 1.0, rng);
    uneven_tiles(in->k, kv, KV_PAGE_TOKENS * dim, rng);
    for (int h = 0; h < HEADS; h++) /* about the largest of 8192 normal scores */
        for (int b = 0; b < BLOCKS; b++)
            in->t[h][b] = 3.6f + 0.08f * (float)h + 0.05f * (float)b;
    for (int i = 0; i < 2 * HEADS; i++)
        in->densities[i / HEADS][i % HEADS] = 0.3f + 0.1f * (float)(i % 5);
    for (int i = 0; i < HEADS * BLOCKS; i++) /* about the largest of 64 */
        in->decode[i / BLOCKS][i % BLOCKS] = in->t[i / BLOCKS][i % BLOCKS] - 1.4f;
}

static void check_choice(const struct inputs *in, const struct attn_choice *choice)
{
    const bool generated = choice->decode_gate != ATTN_GATE_NONE;
    struct share all, parts[RANKS];
    uint64_t kept = 0;
    open_share(&all, in, 0, 1);
    run_share(&all, choice);
    close_share(&all);
    for (int r = 0; r < RANKS; r++) {
        open_share(&parts[r], in, r, RANKS);
        run_share(&parts[r], choice);
        close_share(&parts[r]);
        compare(&all, &parts[r], r, generated);
        kept += parts[r].seq.kept;
        free(parts[r].got);
    }
    free(all.got);
    assert_true(kept == all.seq.kept);
    if (choice->gate != ATTN_GATE_NONE || generated) /* some pages fell, and some did not */
        assert_true(all.seq.kept < all.seq.reachable / 10 * 9 &&
                    all.seq.kept > all.seq.reachable / 10);
    printf("# head_dim %d gate %d%s rows %d: %.3f of the pages kept\n", in->head_dim, choice->gate,
           generated ? " decode" : "", choice->gate_rows,
           (double)all.seq.kept / (double)all.seq.reachable);
}

static void test_heads(void **state)
{
    static const struct attn_choice choices[] = {
        {.gate = ATTN_GATE_NONE, .gate_rows = 128},
        {.gate = ATTN_GATE_ABS, .gate_rows = 128},
        {.gate = ATTN_GATE_ABS, .gate_rows = 64},
        {.gate = ATTN_GATE_REL, .gate_rows = 128, .ln_lambda = -0.4f},
        {.gate = ATTN_GATE_REL, .gate_rows = 64, .ln_lambda = -0.7f},
        {.gate = ATTN_GATE_REL, .gate_rows = 128, .ln_lambda = -0.4f, .steer = 1, .blend = 0.5f},
        {.gate = ATTN_GATE_REL, .gate_rows = 64, .ln_lambda = -0.7f, .steer = 1},
        {.gate = ATTN_GATE_ABS, .gate_rows = 128, .steer = 1, .blend = 20},
        {.gate = ATTN_GATE_ABS, .gate_rows = 64, .steer = 1, .blend = 20},
        {.gate = ATTN_GATE_NONE, .gate_rows = 128, .decode_gate = ATTN_GATE_ABS},
    };
    struct rng rng = {7};
    (void)state;
    for (int head_dim = 64; head_dim <= MAX_DIM; head_dim *= 2) {
        struct inputs in;
        make_inputs(&in, head_dim, &rng);
        for (size_t i = 0; i < sizeof choices / sizeof *choices; i++)
            check_choice(&in, &choices[i]);
        free(in.q);
        free(in.k);
        free(in.v);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_heads)};
    if (!have_device())
        return 77;
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dev_close(dev);
    return failed;
}
