/* Checks of the Hopper decode kernel against double precision, on the device.
 * test_attn_decode_sm90 [quick]: quick is the reduced set for compute-sanitizer. Exit status 77: no
 * device. */
#include "tests/attn_decode_harness.h"

static int failures;
static struct dec_world w; /* the one under test */

static void check(int ok, const char *what, const char *detail)
{
    printf("%-5s %s %s\n", ok ? "ok" : "FAIL", what, detail);
    failures += !ok;
}

/* Which pages each row keeps, by sequence: [n_rows, n_heads, n_pages]; NULL: all. */
struct keeps {
    uint8_t *host[64], *dev[64];
    unsigned long long visited, kept;
};

static size_t keep_len(int seq)
{
    return (size_t)w.seqs[seq].n_rows * (size_t)w.shape.n_heads * (size_t)w.n_pages[seq];
}

/* ---- running and comparing ---- */

static void run(int gate, const char *what)
{
    CK(cudaMemset(w.out, 0xff, dec_q_len(&w) * 2));
    CK(cudaMemset(w.lse, 0xff, (size_t)(w.rows * w.shape.n_heads) * 4));
    CK(cudaMemset(w.counts, 0, ((size_t)w.shape.n_heads + DEC_MAX_SEQS) * sizeof *w.counts));
    int e = dec_run(&w, gate);
    cudaError_t s = cudaDeviceSynchronize();
    if (e || s) {
        printf("FAIL %s: launch %d sync %s\n", what, e, cudaGetErrorString(s));
        exit(1);
    }
}

/* Output and LSE, end to end. */
static void *grab(void)
{
    const size_t n = dec_q_len(&w) * 2, m = (size_t)(w.rows * w.shape.n_heads) * 4;
    char *h = malloc(n + m);
    CK(cudaMemcpy(h, w.out, n, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(h + n, w.lse, m, cudaMemcpyDeviceToHost));
    return h;
}

/* Runs and compares bit for bit with what was grabbed before. */
static void run_same(int gate, const void *want, const char *what)
{
    run(gate, what);
    void *got = grab();
    const size_t n = dec_q_len(&w) * 2 + (size_t)(w.rows * w.shape.n_heads) * 4;
    check(memcmp(got, want, n) == 0, what, "equal bits");
    free(got);
}

struct errors {
    double out, naive, lse, sum, naive_sum, ref_sum;
    long nan;
};

static void add_row(struct errors *e, const double *ref, const double *naive, const uint16_t *out)
{
    for (int j = 0; j < w.shape.head_dim; j++) {
        double x = ref[j], y = (double)of16(out[j], w.shape.dtype);
        if (isnan(x) || isnan(y)) {
            e->nan += isnan(x) != isnan(y);
            continue;
        }
        e->out = fmax(e->out, fabs(y - x)), e->naive = fmax(e->naive, fabs(naive[j] - x));
        e->sum += (y - x) * (y - x), e->naive_sum += (naive[j] - x) * (naive[j] - x);
        e->ref_sum += x * x;
    }
}

static void *to_host(const void *dev, size_t n)
{
    void *h = malloc(n);
    CK(cudaMemcpy(h, dev, n, cudaMemcpyDeviceToHost));
    return h;
}

/* Fills ref, naive [rows, heads, d] and their LSE, on the device. */
static void references(const struct keeps *keep, double *ref, double *lse, double *naive,
                       double *naive_lse)
{
    for (int i = 0; i < w.n_seqs; i++) {
        struct dec_ref p = dec_ref_of(&w, i);
        p.keep = keep ? keep->dev[i] : NULL;
        p.scratch = dec_device(keep_len(i) * 64 * sizeof(double));
        dec_ref_f64(&p, ref, lse);
        dec_ref_naive(&p, naive, naive_lse);
        CK(cudaDeviceSynchronize());
        cudaFree(p.scratch);
    }
}

static void compare(const struct keeps *keep, const char *what)
{
    const size_t n = (size_t)(w.rows * w.shape.n_heads), d = (size_t)w.shape.head_dim;
    double *dev = dec_device(2 * n * (d + 1) * 8);
    references(keep, dev, dev + n * d, dev + n * (d + 1), dev + n * (2 * d + 1));
    double *ref = to_host(dev, 2 * n * (d + 1) * 8), *lse = ref + n * d, *naive = lse + n;
    uint16_t *out = to_host(w.out, n * d * 2);
    float *got = to_host(w.lse, n * 4);
    struct errors e = {0};
    for (size_t r = 0; r < n; r++) {
        if (isnan(lse[r]))
            e.nan += !isnan(got[r]);
        else if (!(fabs((double)got[r] - lse[r]) <= 1e30))
            e.nan++;
        else
            e.lse = fmax(e.lse, fabs((double)got[r] - lse[r]) / fmax(1, fabs(lse[r])));
        add_row(&e, ref + r * d, naive + r * d, out + r * d);
    }
    char text[160];
    snprintf(text, sizeof text, "max %.2e naive %.2e | rel %.2e naive %.2e | lse %.1e nan %ld",
             e.out, e.naive, sqrt(e.sum / e.ref_sum), sqrt(e.naive_sum / e.ref_sum), e.lse, e.nan);
    check(e.out <= 2 * e.naive + 1e-6 && e.sum <= 4 * e.naive_sum + 1e-12 && e.lse < 1e-4 &&
              e.nan == 0,
          what, text);
    cudaFree(dev), free(ref), free(out), free(got);
}

/* NaN wherever no sequence may look: behind the last token of each and in pages of nobody. */
static void poison_stale(void)
{
    const size_t row = (size_t)w.shape.head_dim * 2, tile = 64 * row;
    const size_t page = tile * (size_t)w.shape.n_kv_heads;
    char *used = calloc(1, (size_t)w.pool_pages);
    for (int i = 0; i < w.n_seqs; i++) {
        const int *t = w.host_table + (w.seqs[i].pages - w.table);
        const size_t end = (size_t)(w.seqs[i].pos + w.seqs[i].n_rows - 1) % 64 + 1;
        for (int j = 0; j < w.n_pages[i]; j++)
            used[t[j]] = 1;
        const size_t at = (size_t)t[w.n_pages[i] - 1] * page + end * row;
        for (int h = 0; h < w.shape.n_kv_heads && end < 64; h++) {
            CK(cudaMemset((char *)w.k + at + (size_t)h * tile, 0xff, (64 - end) * row));
            CK(cudaMemset((char *)w.v + at + (size_t)h * tile, 0xff, (64 - end) * row));
        }
    }
    for (size_t p = 0; p < (size_t)w.pool_pages; p++)
        if (!used[p]) {
            CK(cudaMemset((char *)w.k + p * page, 0xff, page));
            CK(cudaMemset((char *)w.v + p * page, 0xff, page));
        }
    free(used);
}

static void make(int heads, int kv, int d, int dtype, int n_seqs, const int (*span)[2],
                 uint64_t seed)
{
    dec_make(&w, heads, kv, d, dtype, n_seqs, span, seed);
    w.args.head_counts = w.counts;
    w.args.seq_counts = w.counts + heads;
    poison_stale();
    dec_plan(&w);
}

/* ---- what the gates must decide ---- */

static bool visits(int head, int pos, int page)
{
    if (page > pos / 64)
        return false;
    if (!w.heads || w.heads[head].visit == ATTN_VISIT_ALL)
        return true;
    return page < w.heads[head].sink_pages || page >= pos / 128 * 2 - w.heads[head].local_pages;
}

/* A piece in the simulation: running maxima of its rows, by warp, now and as shown two steps ago.
 */
struct walk {
    const struct dec_piece *p;
    int n, gate;
    const float *t, *max; /* [n_heads, t_blocks]; page maxima [n_rows, n_heads, n_pages] */
    float m[DEC_WARPS][DEC_ROWS], shown[3][DEC_WARPS][DEC_ROWS];
};

static float threshold(const float *t, int head, int pos)
{
    const int n = w.args.t_blocks, block = pos / 128;
    return t[head * n + (block < n ? block : n - 1)];
}

static float bound_of(const struct walk *k, int warp, int r, int head, int pos, int step)
{
    if (k->gate == SM90_GATE_ABS)
        return w.seqs[k->p->seq].t ? threshold(k->t, head, pos) : -INFINITY;
    float m = k->m[warp][r];
    for (int i = 0; i < DEC_WARPS && step >= 2; i++)
        m = fmaxf(m, k->shown[(step - 2) % 3][i][r]);
    return m + w.seqs[k->p->seq].ln_lambda;
}

/* One page of a warp. */
static void decide_page(struct keeps *keep, struct walk *k, int warp, int i, int step)
{
    const struct dec_piece *p = k->p;
    const struct dec_seq *s = &w.seqs[p->seq];
    const int group = dec_group(&w.shape), first = p->tile * DEC_ROWS;
    const int page = i < p->n_run ? p->last - i : p->sink - 1 - (i - p->n_run);
    const bool alone = k->gate == SM90_GATE_ABS;
    bool want = k->gate == SM90_GATE_NONE || (!alone && page * 64 + 64 > s->pos + first / group);
    size_t at[DEC_ROWS];
    bool sees[DEC_ROWS], keeps[DEC_ROWS];
    for (int r = 0; r < k->n; r++) {
        const int token = (first + r) / group, head = p->kv_head * group + (first + r) % group;
        at[r] = (size_t)((token * w.shape.n_heads + head) * w.n_pages[p->seq] + page);
        const int pos = s->pos + token;
        sees[r] = visits(head, pos, page);
        keeps[r] = sees[r] && ((alone && page == pos / 64) ||
                               !(k->max[at[r]] < bound_of(k, warp, r, head, pos, step)));
        want |= keeps[r];
    }
    for (int r = 0; r < k->n; r++) {
        if (!alone)
            keeps[r] = sees[r] && want;
        keep->visited += sees[r];
        keep->kept += keeps[r];
        keep->host[p->seq][at[r]] = keeps[r];
        if (keeps[r])
            k->m[warp][r] = fmaxf(k->m[warp][r], k->max[at[r]]);
    }
}

static void decide_piece(struct keeps *keep, const struct dec_piece *p, int gate, const float *t,
                         const float *max)
{
    struct walk k = {.p = p, .gate = gate, .t = t, .max = max};
    const int rows = w.seqs[p->seq].n_rows * dec_group(&w.shape) - p->tile * DEC_ROWS;
    k.n = rows < DEC_ROWS ? rows : DEC_ROWS;
    for (int i = 0; i < DEC_WARPS * DEC_ROWS; i++)
        k.m[i / DEC_ROWS][i % DEC_ROWS] = -INFINITY;
    for (int step = 0; p->begin + step * DEC_WARPS < p->end; step++) {
        for (int warp = 0; warp < DEC_WARPS; warp++)
            if (p->begin + step * DEC_WARPS + warp < p->end)
                decide_page(keep, &k, warp, p->begin + step * DEC_WARPS + warp, step);
        memcpy(k.shown[step % 3], k.m, sizeof k.m);
    }
}

static void decide(struct keeps *keep, int gate, const float *t)
{
    float *max[64];
    memset(keep, 0, sizeof *keep);
    for (int i = 0; i < w.n_seqs; i++) {
        struct dec_ref p = dec_ref_of(&w, i);
        float *dev = dec_device(keep_len(i) * 4);
        dec_ref_page_max(&p, dev);
        max[i] = to_host(dev, keep_len(i) * 4);
        keep->host[i] = calloc(keep_len(i), 1);
        cudaFree(dev);
    }
    for (int j = 0; j < w.n_pieces; j++)
        decide_piece(keep, &w.plan.pieces[j], gate, t, max[w.plan.pieces[j].seq]);
    for (int i = 0; i < w.n_seqs; i++) {
        keep->dev[i] = dec_device(keep_len(i));
        CK(cudaMemcpy(keep->dev[i], keep->host[i], keep_len(i), cudaMemcpyHostToDevice));
        free(max[i]);
    }
}

static void keeps_free(struct keeps *k)
{
    for (int i = 0; i < w.n_seqs; i++)
        free(k->host[i]), cudaFree(k->dev[i]);
}

static void check_counts(const struct keeps *k)
{
    struct sm90_counts *c = to_host(w.counts, ((size_t)w.shape.n_heads + 64) * sizeof *c);
    unsigned long long want[3] = {0, k->visited, k->kept}, heads[3] = {0}, seqs[3] = {0};
    for (int i = 0; i < w.n_seqs; i++)
        for (int r = 0; r < w.seqs[i].n_rows; r++)
            want[0] += (unsigned)(((w.seqs[i].pos + r) / 64 + 1) * w.shape.n_heads);
    for (int i = 0; i < w.shape.n_heads; i++)
        heads[0] += c[i].reachable, heads[1] += c[i].visited, heads[2] += c[i].kept;
    for (int i = w.shape.n_heads; i < w.shape.n_heads + w.n_seqs; i++)
        seqs[0] += c[i].reachable, seqs[1] += c[i].visited, seqs[2] += c[i].kept;
    char text[120];
    snprintf(text, sizeof text, "reachable %llu visited %llu kept %llu want %llu %llu %llu",
             heads[0], heads[1], heads[2], want[0], want[1], want[2]);
    check(!memcmp(want, heads, sizeof want) && !memcmp(want, seqs, sizeof want), "  counters",
          text);
    free(c);
}

/* Runs a gate and compares with what it must keep. */
static void check_gate(int gate, const float *t, const char *what)
{
    struct keeps keep;
    decide(&keep, gate, t);
    run(gate, what);
    compare(&keep, what);
    check_counts(&keep);
    keeps_free(&keep);
}

/* ---- the tests ---- */

static const int ragged[10][2] = {{0, 1},    {63, 1}, {64, 1},   {126, 5}, {1000, 1},
                                  {2047, 8}, {62, 8}, {5000, 3}, {300, 2}, {12345, 1}};

static void test_dense(int d, int dtype)
{
    static const int heads[][2] = {{8, 2}, {32, 8}, {16, 1}, {6, 2}, {4, 4}, {24, 1}, {7, 1}};
    char text[80];
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        make(heads[i][0], heads[i][1], d, dtype, 10, ragged, 7 + i);
        snprintf(text, sizeof text, "dense d%d t%d heads %d/%d", d, dtype, heads[i][0],
                 heads[i][1]);
        run(SM90_GATE_NONE, text);
        compare(NULL, text);
        void *first = grab();
        for (int j = 0; j < 3; j++)
            run_same(SM90_GATE_NONE, first, "  again");
        run_same(SM90_GATE_ABS, first, "  ABS without thresholds");
        run_same(SM90_GATE_REL, first, "  REL, lambda 0");
        free(first);
        dec_free(&w);
    }
    const int one[1][2] = {{100000, 1}};
    make(8, 2, d, dtype, 1, one, 3);
    run(SM90_GATE_NONE, "long");
    compare(NULL, "  one of 100001");
    dec_free(&w);
}

static void test_values(int d, int dtype)
{
    make(8, 2, d, dtype, 10, ragged, 11);
    const int64_t n = (int64_t)dec_q_len(&w);
    ref_fill_normal(w.q, n, 5, dtype ? 100.0f : 1000.0f, dtype);
    run(SM90_GATE_NONE, "extreme");
    compare(NULL, "extreme scores");
    CK(cudaMemset(w.q, 0, (size_t)n * 2));
    run(SM90_GATE_NONE, "equal");
    compare(NULL, "equal scores");
    ref_fill_normal(w.q, n, 5, 1.0f, dtype);
    CK(cudaMemset(w.q + 3 * 8 * d, 0xff, 2));
    run(SM90_GATE_NONE, "NaN in q");
    compare(NULL, "NaN in q of one head");
    dec_free(&w);
}

/* NaN in K and V of sequence 5: its own outputs as in the reference, all others' as without. */
static void test_nan(int d, int dtype)
{
    make(8, 2, d, dtype, 10, ragged, 13);
    run(SM90_GATE_NONE, "clean");
    char *clean = grab();
    const size_t page = (size_t)w.host_table[w.seqs[5].pages - w.table + 7];
    const size_t tile = page * 2 * 64 * (size_t)d;
    CK(cudaMemset(w.k + tile + 10 * d + 3, 0xff, 2));
    CK(cudaMemset(w.v + tile + (64 + 20) * d + 5, 0xff, 2));
    for (int gate = 0; gate < 3; gate++) {
        run(gate, "NaN in K and V");
        compare(NULL, "NaN in K and V of one sequence");
        char *got = grab();
        const size_t row = (size_t)(8 * d) * 2, from = (size_t)w.seqs[5].row * row;
        const size_t to = from + 8 * row, end = (size_t)w.rows * row;
        check(!memcmp(got, clean, from) && !memcmp(got + to, clean + to, end - to),
              "  the others unchanged", "");
        free(got);
    }
    free(clean);
    dec_free(&w);
}

/* The same tokens in other pages. */
static void test_shuffle(int d, int dtype)
{
    make(8, 2, d, dtype, 10, ragged, 17);
    run(SM90_GATE_NONE, "order");
    void *first = grab();
    const size_t page = (size_t)(2 * 64 * d), len = dec_pool_len(&w), used = w.table_len;
    int *old = malloc(used * sizeof *old);
    memcpy(old, w.host_table, used * sizeof *old);
    uint16_t *k = w.k, *v = w.v;
    w.k = dec_device(len * 2), w.v = dec_device(len * 2);
    CK(cudaMemset(w.k, 0xff, len * 2));
    CK(cudaMemset(w.v, 0xff, len * 2));
    dec_deal(&w, 99);
    for (size_t i = 0; i < used; i++) {
        const size_t to = (size_t)w.host_table[i] * page, from = (size_t)old[i] * page;
        CK(cudaMemcpy(w.k + to, k + from, page * 2, cudaMemcpyDeviceToDevice));
        CK(cudaMemcpy(w.v + to, v + from, page * 2, cudaMemcpyDeviceToDevice));
    }
    const struct sm90_shape s = {8, 2, d, dtype};
    if (sm90_maps_make(&w.maps, &s, w.q, w.rows, 8 * d, w.k, w.v, w.pool_pages))
        check(0, "maps", "");
    dec_plan(&w);
    run_same(SM90_GATE_NONE, first, "pages in another order");
    free(first), free(old), cudaFree(k), cudaFree(v);
    dec_free(&w);
}

static int falling(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* T[h]: midpoint of the k-th and (k+1)-th largest page maximum of one sequence's first row. */
static void thresholds(float *t, int seq, int k)
{
    struct dec_ref p = dec_ref_of(&w, seq);
    float *dev = dec_device(keep_len(seq) * 4);
    dec_ref_page_max(&p, dev);
    float *max = to_host(dev, keep_len(seq) * 4);
    const int n = w.n_pages[seq];
    for (int h = 0; h < w.shape.n_heads; h++) {
        qsort(max + h * n, (size_t)n, 4, falling);
        t[h] = k == 0 ? INFINITY : 0.5f * (max[h * n + k - 1] + max[h * n + k]);
    }
    cudaFree(dev), free(max);
}

/* Moves thresholds [n_heads, t_blocks] off all page maxima: no decision hangs on a rounding. */
static void stand_clear(float *t)
{
    for (int i = 0; i < w.n_seqs; i++) {
        struct dec_ref p = dec_ref_of(&w, i);
        float *dev = dec_device(keep_len(i) * 4);
        dec_ref_page_max(&p, dev);
        float *max = to_host(dev, keep_len(i) * 4);
        for (size_t j = 0; j < keep_len(i); j++)
            for (int b = 0; b < w.args.t_blocks; b++) {
                const int head = (int)(j / (size_t)w.n_pages[i]) % w.shape.n_heads;
                float *at = &t[head * w.args.t_blocks + b];
                if (fabsf(max[j] - *at) < 1e-5f) {
                    *at += 3e-5f;
                    i = -1; /* all once more */
                }
            }
        cudaFree(dev), free(max);
    }
}

static void test_gates(int d, int dtype)
{
    static const int ks[4] = {0, 2, 20, 100};
    static const float lambdas[3] = {-0.2f, -1.0f, -3.0f};
    float t[32], *dev = dec_device(sizeof t);
    char text[80];
    make(8, 2, d, dtype, 10, ragged, 19);
    run(SM90_GATE_NONE, "dense");
    void *dense = grab();
    for (int h = 0; h < 32; h++)
        t[h] = -INFINITY;
    CK(cudaMemcpy(dev, t, sizeof t, cudaMemcpyHostToDevice));
    for (int i = 0; i < w.n_seqs; i++)
        w.seqs[i].t = dev;
    dec_plan(&w);
    run_same(SM90_GATE_ABS, dense, "ABS T=-inf");
    free(dense);
    for (int i = 0; i < 4; i++) {
        thresholds(t, 9, ks[i]);
        stand_clear(t);
        CK(cudaMemcpy(dev, t, sizeof t, cudaMemcpyHostToDevice));
        snprintf(text, sizeof text, "ABS d%d t%d k %d", d, dtype, ks[i]);
        check_gate(SM90_GATE_ABS, t, text);
    }
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < w.n_seqs; j++)
            w.seqs[j].ln_lambda = j % 4 == 3 ? -INFINITY : lambdas[i];
        dec_plan(&w);
        snprintf(text, sizeof text, "REL d%d t%d ln(lambda) %.1f", d, dtype, (double)lambdas[i]);
        check_gate(SM90_GATE_REL, NULL, text);
    }
    cudaFree(dev);
    dec_free(&w);
}

/* Heads [first, end) of a sequence: whether both results have the same bits. */
static bool same_heads(const void *x, const void *y, int seq, int first, int end)
{
    const size_t head = (size_t)w.shape.head_dim * 2, heads = (size_t)w.shape.n_heads;
    const size_t lse = dec_q_len(&w) * 2, n = (size_t)(end - first);
    bool same = true;
    for (int r = w.seqs[seq].row; r < w.seqs[seq].row + w.seqs[seq].n_rows; r++) {
        const size_t at = (size_t)r * heads + (size_t)first;
        same &= !memcmp((const char *)x + at * head, (const char *)y + at * head, n * head);
        same &= !memcmp((const char *)x + lse + at * 4, (const char *)y + lse + at * 4, n * 4);
    }
    return same;
}

/* The sequences' thresholds: of a layer behind another that has NaN, in every other sequence or in
 * all. */
static void *run_blocks(float *dev, const float *t, size_t n, int step, const char *what)
{
    CK(cudaMemset(dev, 0xff, n * 4));
    CK(cudaMemcpy(dev + n, t, n * 4, cudaMemcpyHostToDevice));
    w.args.t_layer = (int64_t)n;
    for (int i = 0; i < w.n_seqs; i++)
        w.seqs[i].t = i % step == 0 ? dev : NULL;
    dec_plan(&w);
    check_gate(SM90_GATE_ABS, t, what);
    return grab();
}

/* ABS: a row asks neither the heads that share its KV head nor other rows, and thresholds go by its
 * position. */
static void test_alone(int d, int dtype)
{
    enum { BLOCKS = 4, N = 8 * BLOCKS };
    float base[8], t[N], *dev = dec_device(sizeof t * 2);
    make(8, 2, d, dtype, 10, ragged, 47);
    w.args.t_blocks = BLOCKS;
    thresholds(base, 9, 20);
    for (int i = 0; i < N; i++)
        t[i] = base[i / BLOCKS] - 0.3f * (float)(i % BLOCKS);
    stand_clear(t);
    run(SM90_GATE_NONE, "dense");
    char *dense = grab(), *all = run_blocks(dev, t, N, 1, "ABS, thresholds by block");
    char *half = run_blocks(dev, t, N, 2, "ABS, every other sequence");
    for (int b = 0; b < BLOCKS; b++)
        t[b] = t[5 * BLOCKS + b] = -INFINITY;
    char *some = run_blocks(dev, t, N, 1, "ABS, two heads dense");
    bool as_dense = true, as_all = true, open = true, others = true;
    for (int i = 0; i < w.n_seqs; i++) {
        as_dense &= i % 2 == 0 || same_heads(half, dense, i, 0, 8);
        as_all &= i % 2 != 0 || same_heads(half, all, i, 0, 8);
        open &= same_heads(some, dense, i, 0, 1) && same_heads(some, dense, i, 5, 6);
        others &= same_heads(some, all, i, 1, 5) && same_heads(some, all, i, 6, 8);
    }
    check(as_dense, "  sequences without a gate beside gated ones", "bits of the dense kernel");
    check(as_all, "  gated sequences beside others", "equal bits");
    check(open, "  heads with T=-inf beside gated ones", "bits of the dense kernel");
    check(others, "  gated heads beside such", "equal bits");
    check(!same_heads(all, dense, 9, 0, 1), "  the gate does something", "");
    free(dense), free(all), free(half), free(some);
    cudaFree(dev);
    dec_free(&w);
}

/* Sinks and windows that differ within a group, and one group that sees all. */
static void test_visit(int d, int dtype)
{
    static const struct attn_head_policy heads[12] = {{1, 1, 4}, {1, 0, 9}, {1, 3, 2}, {1, 0, 0},
                                                      {1, 1, 6}, {1, 2, 6}, {0, 0, 0}, {1, 1, 8},
                                                      {1, 0, 3}, {1, 1, 1}, {1, 0, 1}, {1, 0, 0}};
    struct sm90_visit v[12], *dev = dec_device(sizeof v);
    float t[12], *dt = dec_device(sizeof t);
    for (int h = 0; h < 12; h++)
        v[h] = (struct sm90_visit){heads[h].sink_pages,
                                   heads[h].visit == ATTN_VISIT_ALL ? -1 : heads[h].local_pages};
    CK(cudaMemcpy(dev, v, sizeof v, cudaMemcpyHostToDevice));
    make(12, 4, d, dtype, 10, ragged, 23);
    w.heads = heads;
    w.args.visit = dev;
    thresholds(t, 9, 40);
    stand_clear(t);
    CK(cudaMemcpy(dt, t, sizeof t, cudaMemcpyHostToDevice));
    for (int i = 0; i < w.n_seqs; i++) {
        w.seqs[i].t = dt;
        w.seqs[i].ln_lambda = -0.5f;
    }
    dec_plan(&w);
    check_gate(SM90_GATE_NONE, t, "SINK_LOCAL");
    check_gate(SM90_GATE_ABS, t, "SINK_LOCAL and ABS");
    check_gate(SM90_GATE_REL, t, "SINK_LOCAL and REL");
    cudaFree(dev), cudaFree(dt);
    dec_free(&w);
}

/* One captured launch follows lengths, tables and plan. */
static void test_graph(int d, int dtype)
{
    static const int spans[3][4][2] = {{{70, 1}, {9000, 1}, {5, 2}, {640, 1}},
                                       {{3000, 2}, {1, 1}, {128, 1}, {127, 1}},
                                       {{9001, 1}, {9000, 1}, {3, 1}, {64, 4}}};
    cudaStream_t s;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    make(8, 2, d, dtype, 10, ragged, 29);
    CK(cudaStreamCreate(&s));
    CK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    int e = decode_sm90_launch(&w.maps, &w.args, d, dtype, SM90_GATE_NONE, s);
    CK(cudaStreamEndCapture(s, &graph));
    CK(cudaGraphInstantiate(&exec, graph, 0));
    check(e == 0, "capture", "");
    for (int i = 0; i < 3; i++) {
        dec_spans(&w, 4, spans[i]);
        dec_deal(&w, (uint64_t)(100 + i));
        ref_fill_normal(w.k, (int64_t)dec_pool_len(&w), (uint64_t)i, 1.0f, dtype);
        ref_fill_normal(w.v, (int64_t)dec_pool_len(&w), (uint64_t)i + 50, 1.0f, dtype);
        poison_stale();
        dec_plan(&w);
        run(SM90_GATE_NONE, "direct");
        compare(NULL, "other lengths in the same buffers");
        void *direct = grab();
        CK(cudaMemset(w.out, 0xff, dec_q_len(&w) * 2));
        CK(cudaMemset(w.lse, 0xff, (size_t)(w.rows * 8) * 4));
        CK(cudaDeviceSynchronize());
        CK(cudaGraphLaunch(exec, s));
        CK(cudaStreamSynchronize(s));
        void *replay = grab();
        check(!memcmp(direct, replay, dec_q_len(&w) * 2 + (size_t)(w.rows * 8) * 4),
              "  graph replay equals direct launch", "");
        free(direct), free(replay);
    }
    CK(cudaGraphExecDestroy(exec));
    CK(cudaGraphDestroy(graph));
    CK(cudaStreamDestroy(s));
    dec_free(&w);
}

static void *twin(const void *dev, size_t n)
{
    void *p = dec_device(n);
    CK(cudaMemcpy(p, dev, n, cudaMemcpyDeviceToDevice));
    return p;
}

/* A launch that begins while the kernel before it still has to write q and the step's own pages. */
static void test_early(int d, int dtype)
{
    static const int spans[4][2] = {{9000, 1}, {640, 1}, {126, 4}, {8191, 1}};
    make(8, 2, d, dtype, 4, spans, 43);
    run(SM90_GATE_NONE, "early");
    void *direct = grab();
    const size_t n = dec_q_len(&w) * 2, pool = dec_pool_len(&w) * 2;
    struct dec_late late = {.dst = w.q,
                            .pool = {w.k, w.v},
                            .src = twin(w.q, n),
                            .from = {twin(w.k, pool), twin(w.v, pool)},
                            .n = n,
                            .page_bytes = pool / (size_t)w.pool_pages};
    for (int i = 0; i < w.n_seqs; i++) {
        for (int p = w.seqs[i].pos / 64; p < w.n_pages[i]; p++)
            late.pages[late.n_pages++] = w.host_table[w.seqs[i].pages - w.table + p];
    }
    w.args.early = true;
    for (int round = 0; round < 10; round++) {
        CK(cudaMemset(w.q, 0xff, n));
        for (int i = 0; i < 2 * late.n_pages; i++)
            CK(cudaMemset((char *)late.pool[i % 2] + (size_t)late.pages[i / 2] * late.page_bytes,
                          0xff, late.page_bytes));
        CK(cudaMemset(w.out, 0xff, n));
        CK(cudaDeviceSynchronize());
        dec_write_late(&late);
        int e = dec_run(&w, SM90_GATE_NONE);
        CK(cudaDeviceSynchronize());
        void *got = grab();
        check(e == 0 && !memcmp(got, direct, n), "early launch", "equal bits");
        free(got);
    }
    free(direct);
    cudaFree((void *)late.src), cudaFree((void *)late.from[0]), cudaFree((void *)late.from[1]);
    dec_free(&w);
}

/* Integers from -2 to 2: scores are exact, so that no decision hangs on a rounding. */
static void fill_integers(uint16_t *dev, size_t n, uint64_t seed)
{
    static const uint16_t values[2][5] = {{0xc000, 0xbf80, 0, 0x3f80, 0x4000},
                                          {0xc000, 0xbc00, 0, 0x3c00, 0x4000}};
    uint16_t *h = malloc(n * sizeof *h);
    for (size_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        h[i] = values[w.shape.dtype][(seed >> 33) % 5];
    }
    CK(cudaMemcpy(dev, h, n * sizeof *h, cudaMemcpyHostToDevice));
    free(h);
}

/* Long pieces on two thread blocks, which draw small shares: gates that skip most pages. */
static void test_draws(int d, int dtype)
{
    static const int spans[4][2] = {{20000, 1}, {30000, 2}, {12345, 1}, {70, 1}};
    static const float steps[4] = {0.5f, 8.5f, 16.5f, 30.5f};
    float t[8], *dev = dec_device(sizeof t);
    char text[80];
    make(8, 2, d, dtype, 4, spans, 41);
    fill_integers(w.q, dec_q_len(&w), 1);
    fill_integers(w.k, dec_pool_len(&w), 2);
    poison_stale();
    w.shape.n_shares = w.args.n_shares = 2 * (1 + DEC_SPARE);
    dec_plan(&w);
    snprintf(text, sizeof text, "%d shares in use", w.plan.pieces[0].shares);
    check(w.plan.pieces[0].shares > 2 + DEC_SPARE, "small shares", text);
    run(SM90_GATE_NONE, "draws");
    compare(NULL, "  drawn");
    void *first = grab();
    for (int i = 0; i < 5; i++)
        run_same(SM90_GATE_NONE, first, "  again");
    run_same(SM90_GATE_REL, first, "  REL, lambda 0");
    free(first);
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < w.n_seqs; j++)
            w.seqs[j].ln_lambda = -steps[i] * w.args.scale;
        dec_plan(&w);
        snprintf(text, sizeof text, "REL d%d t%d, %.1f steps below the maximum", d, dtype,
                 (double)steps[i]);
        check_gate(SM90_GATE_REL, NULL, text);
    }
    thresholds(t, 0, 40);
    CK(cudaMemcpy(dev, t, sizeof t, cudaMemcpyHostToDevice));
    for (int j = 0; j < w.n_seqs; j++)
        w.seqs[j].t = dev;
    dec_plan(&w);
    check_gate(SM90_GATE_ABS, t, "ABS with thresholds that some maxima equal");
    cudaFree(dev);
    dec_free(&w);
}

/* As many sequences as a step may hold, and as many tokens as a sequence may. */
static void test_sizes(int d, int dtype)
{
    static int spans[DEC_MAX_SEQS][2];
    for (int i = 0; i < DEC_MAX_SEQS; i++)
        spans[i][0] = i * 7919 % 1500, spans[i][1] = 1 + i % 3;
    make(8, 2, d, dtype, DEC_MAX_SEQS, (const int(*)[2])spans, 31);
    run(SM90_GATE_NONE, "many");
    compare(NULL, "1024 sequences");
    dec_free(&w);
    const int one[1][2] = {{(1 << 20) - 1, 1}};
    make(4, 1, d, dtype, 1, one, 37);
    run(SM90_GATE_NONE, "longest");
    compare(NULL, "1048576 tokens");
    dec_free(&w);
}

/* The kernels are compiled for compute capability 9.0 alone. */
static int have_hopper(void)
{
    int n = 0, major = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess && n > 0 &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
           major == 9;
}

static void test_all(int d, int dtype)
{
    test_dense(d, dtype);
    test_values(d, dtype);
    test_nan(d, dtype);
    test_shuffle(d, dtype);
    test_gates(d, dtype);
    test_alone(d, dtype);
    test_visit(d, dtype);
    test_graph(d, dtype);
    test_early(d, dtype);
    test_draws(d, dtype);
    test_sizes(d, dtype);
}

int main(int argc, char **argv)
{
    if (!have_hopper())
        return 77;
    if (argc > 1 && !strcmp(argv[1], "quick")) {
        test_visit(128, 0);
        test_visit(64, 1);
        test_alone(128, 0);
        test_nan(64, 0);
        test_graph(128, 1);
        test_early(128, 0);
    } else {
        for (int dtype = 0; dtype < 2; dtype++) {
            test_all(128, dtype);
            test_all(64, dtype);
        }
    }
    printf("%d failures\n", failures);
    return failures != 0;
}
