/* Checks of the Hopper prefill kernel against double precision, on the device.
 * test_attn_sm90 [quick|least|turns]: reduced sets for compute-sanitizer; least for racecheck,
 * under which waiting is slow. Exit status 77: no device. */
#include "attention/attn_steer.h"
#include "tests/attn_sm90_harness.h"

static int failures;
static void check(int ok, const char *what, const char *detail)
{
    printf("%-5s %s %s\n", ok ? "ok" : "FAIL", what, detail);
    failures += !ok;
}

/* keep bitmaps of all sequences for the reference, or NULL */
struct keeps {
    uint8_t *host[64], *dev[64];
};

/* Largest errors of the kernel and of the naive same-precision attention, rows of all sequences. */
static void compare(struct world *w, const struct keeps *keep, const char *what, int row_step)
{
    const size_t n = (size_t)w->rows * (size_t)w->shape.n_heads, d = (size_t)w->shape.head_dim;
    double *ro, *rl, *no, *nl;
    CK(cudaMalloc((void **)&ro, n * d * 8));
    CK(cudaMalloc((void **)&rl, n * 8));
    CK(cudaMalloc((void **)&no, n * d * 8));
    CK(cudaMalloc((void **)&nl, n * 8));
    for (int i = 0; i < w->n_seqs; i++) {
        struct ref_problem p = world_ref(w, i, row_step);
        p.keep = keep ? keep->dev[i] : NULL;
        ref_attn_f64(&p, ro, rl);
        ref_attn_naive(&p, no, nl);
    }
    CK(cudaDeviceSynchronize());
    double *ho = malloc(n * d * 8), *hn = malloc(n * d * 8), *hl = malloc(n * 8);
    uint16_t *out = malloc(n * d * 2);
    float *lse = malloc(n * 4);
    CK(cudaMemcpy(ho, ro, n * d * 8, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(hn, no, n * d * 8, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(hl, rl, n * 8, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(out, w->out, n * d * 2, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(lse, w->lse, n * 4, cudaMemcpyDeviceToHost));
    double eo = 0, en = 0, el = 0, so = 0, sn = 0, sr = 0;
    long bad_nan = 0;
    for (int i = 0; i < w->n_seqs; i++)
        for (int r = 0; r < w->seqs[i].n_rows; r += row_step)
            for (int h = 0; h < w->shape.n_heads; h++) {
                size_t at = (size_t)(w->seqs[i].row + r) * (size_t)w->shape.n_heads + (size_t)h;
                if (!isnan(hl[at]))
                    el = fmax(el, fabs((double)lse[at] - hl[at]) / fmax(1, fabs(hl[at])));
                else
                    bad_nan += !isnan(lse[at]);
                for (size_t j = 0; j < d; j++) {
                    double x = ho[at * d + j], y = (double)of16(out[at * d + j], w->shape.dtype);
                    if (isnan(x) || isnan(y)) {
                        bad_nan += isnan(x) != isnan(y);
                        continue;
                    }
                    eo = fmax(eo, fabs(y - x)), en = fmax(en, fabs(hn[at * d + j] - x));
                    so += (y - x) * (y - x), sn += (hn[at * d + j] - x) * (hn[at * d + j] - x),
                        sr += x * x;
                }
            }
    char text[160];
    snprintf(text, sizeof text,
             "max %.2e naive %.2e | rel %.2e naive %.2e | lse %.1e nan-mismatch %ld", eo, en,
             sqrt(so / sr), sqrt(sn / sr), el, bad_nan);
    check(eo <= 2 * en + 1e-6 && so <= 4 * sn + 1e-12 && el < 1e-4 && bad_nan == 0, what, text);
    cudaFree(ro), cudaFree(rl), cudaFree(no), cudaFree(nl);
    free(ho), free(hn), free(hl), free(out), free(lse);
}

static void run(struct world *w, int gate, const char *what)
{
    CK(cudaMemset(w->out, 0xff,
                  (size_t)w->rows * (size_t)(w->shape.n_heads * w->shape.head_dim) * 2));
    CK(cudaMemset(w->lse, 0xff, (size_t)w->rows * (size_t)w->shape.n_heads * 4));
    int e = world_run(w, gate);
    cudaError_t s = cudaDeviceSynchronize();
    if (e || s) {
        printf("FAIL %s: launch %d sync %s\n", what, e, cudaGetErrorString(s));
        exit(1);
    }
}

static void *grab(struct world *w)
{
    size_t n = (size_t)w->rows * (size_t)(w->shape.n_heads * w->shape.head_dim) * 2;
    void *h = malloc(n);
    CK(cudaMemcpy(h, w->out, n, cudaMemcpyDeviceToHost));
    return h;
}
static int same(struct world *w, const void *a, const void *b)
{
    return memcmp(a, b, (size_t)w->rows * (size_t)(w->shape.n_heads * w->shape.head_dim) * 2) == 0;
}

static void keeps_free(struct keeps *k)
{
    for (int i = 0; i < 64; i++)
        free(k->host[i]), k->host[i] ? cudaFree(k->dev[i]) : 0;
}

/* Page maxima of sequence i on the host: [2, heads, blocks, pages]. */
static float *maxima(struct world *w, int i)
{
    struct ref_problem p = world_ref(w, i, 1);
    size_t n = 2 * (size_t)p.n_heads * (size_t)p.n_blocks * (size_t)p.n_pages;
    float *d, *h = malloc(n * 4);
    CK(cudaMalloc((void **)&d, n * 4));
    CK(cudaMemset(d, 0, n * 4));
    ref_page_max(&p, d);
    CK(cudaMemcpy(h, d, n * 4, cudaMemcpyDeviceToHost));
    cudaFree(d);
    return h;
}

static int desc(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}
static float rule(const float *m, int n, int k) /* calibration rule of the paper */
{
    if (n <= k)
        return -INFINITY;
    float *s = malloc((size_t)n * 4);
    memcpy(s, m, (size_t)n * 4);
    qsort(s, (size_t)n, 4, desc);
    float t = 0.5f * (s[k - 1] + s[k]);
    free(s);
    return t;
}

/* ABS: thresholds of level k from seq 0's own maxima (whole prompt at pos 0), or zeros of both
 * signs for k < 0; the keep bitmap, the count. */
static float *make_abs(struct world *w, int k, int rows64, struct keeps *keep, uint64_t *kept)
{
    struct ref_problem p = world_ref(w, 0, 1);
    float *m = maxima(w, 0);
    size_t hb = (size_t)p.n_heads * (size_t)p.n_blocks, np = (size_t)p.n_pages;
    float *t = malloc(hb * 4), *d;
    keep->host[0] = calloc(2 * hb, np);
    *kept = 0;
    for (size_t x = 0; x < hb; x++) {
        int block = (int)(x % (size_t)p.n_blocks);
        float *m0 = m + x * np, *m1 = m + (hb + x) * np, u[4096];
        for (int j = 0; j < 2 * block; j++)
            u[j] = fmaxf(m0[j], m1[j]);
        t[x] = k > 0 ? rule(u, 2 * block, k) : block & 1 ? -0.0f : 0.0f;
        for (int j = 0; j < 2 * block; j++) {
            int k0 = !((rows64 ? m0[j] : u[j]) < t[x]), k1 = !((rows64 ? m1[j] : u[j]) < t[x]);
            keep->host[0][x * np + (size_t)j] = (uint8_t)k0;
            keep->host[0][(hb + x) * np + (size_t)j] = (uint8_t)k1;
            int two = rows64 && p.n_rows - block * 128 > 64;
            *kept += (uint64_t)(two ? k0 + k1 : k0);
        }
        int rows = p.n_rows - block * 128;
        *kept += (uint64_t)(rows64 && rows > 64 ? 3 : rows > 64 ? 2 : 1);
    }
    CK(cudaMalloc((void **)&keep->dev[0], 2 * hb * np));
    CK(cudaMemcpy(keep->dev[0], keep->host[0], 2 * hb * np, cudaMemcpyHostToDevice));
    CK(cudaMalloc((void **)&d, hb * 4));
    CK(cudaMemcpy(d, t, hb * 4, cudaMemcpyHostToDevice));
    free(t), free(m);
    w->args.t_head_stride = w->args.t_blocks = p.n_blocks;
    return d;
}

static void test_dense(int d, int dtype)
{
    char name[80];
    struct world w;
    const int one[1][2] = {{0, 1000}};
    world_make(&w, 8, 2, d, dtype, 1, one, 7);
    world_plan(&w);
    run(&w, SM90_GATE_NONE, "dense");
    snprintf(name, sizeof name, "dense d%d t%d 1000 ", d, dtype);
    compare(&w, NULL, name, 1);
    void *a = grab(&w);
    w.args.order = SM90_ORDER_L2R;
    run(&w, SM90_GATE_NONE, "l2r");
    compare(&w, NULL, "  left to right ", 1);
    w.args.order = 0;
    for (int i = 0; i < 5; i++) {
        run(&w, SM90_GATE_NONE, "again");
        void *b = grab(&w);
        if (!same(&w, a, b))
            check(0, "  repeat ", "differs");
        free(b);
    }
    free(a);
    world_free(&w);
    const int many[8][2] = {{0, 300}, {128, 512}, {77, 200},   {1000, 1},
                            {0, 64},  {0, 65},    {2048, 777}, {63, 2}};
    world_make(&w, 12, 4, d, dtype, 8, many, 11);
    world_plan(&w);
    run(&w, SM90_GATE_NONE, "batch");
    compare(&w, NULL, "  batch of 8 chunks ", 1);
    ref_fill_normal(w.q, (int64_t)w.rows * 12 * d, 5, dtype ? 100.0f : 1000.0f, dtype);
    run(&w, SM90_GATE_NONE, "extreme");
    compare(&w, NULL, "  extreme scores ", 1);
    CK(cudaMemset(w.q, 0, (size_t)w.rows * (size_t)(12 * d) * 2));
    run(&w, SM90_GATE_NONE, "equal");
    compare(&w, NULL, "  equal scores ", 1);
    ref_fill_normal(w.q, (int64_t)w.rows * 12 * d, 5, 1.0f, dtype);
    CK(cudaMemset((char *)w.q + (size_t)(400 * 12 * d) * 2, 0xff, 2)); /* NaN in one row */
    run(&w, SM90_GATE_NONE, "nan");
    compare(&w, NULL, "  NaN in one q row ", 1);
    world_free(&w);
}

static void test_chunks(int d, int dtype, int gate)
{
    enum { N = 4096 + 37 };
    struct world w;
    const int one[1][2] = {{0, N}};
    world_make(&w, 4, 2, d, dtype, 1, one, 21);
    struct keeps keep = {0};
    uint64_t kept;
    float *t = gate == SM90_GATE_ABS ? make_abs(&w, 6, 0, &keep, &kept) : NULL;
    w.seqs[0].t = t;
    w.seqs[0].ln_lambda = -4.0f;
    world_plan(&w);
    run(&w, gate, "whole");
    void *whole = grab(&w);
    const int sizes[4] = {128, 512, 2048, 1024};
    for (int i = 0; i < 4; i++) {
        CK(cudaMemset(w.out, 0xff, (size_t)w.rows * (size_t)(4 * d) * 2));
        for (int pos = 0; pos < N; pos += sizes[i]) {
            w.seqs[0].row = w.seqs[0].pos = pos;
            w.seqs[0].n_rows = N - pos < sizes[i] ? N - pos : sizes[i];
            world_plan(&w);
            if (world_run(&w, gate))
                check(0, "chunk", "launch");
            CK(cudaDeviceSynchronize());
        }
        void *b = grab(&w);
        char name[80];
        snprintf(name, sizeof name, "chunks of %d equal whole, gate %d", sizes[i], gate);
        check(same(&w, whole, b), name, "");
        free(b);
    }
    free(whole), keeps_free(&keep), cudaFree(t);
    world_free(&w);
}

static void counts_of(struct world *w, struct sm90_counts *sum)
{
    struct sm90_counts c[64];
    CK(cudaMemcpy(c, w->counts, (size_t)w->shape.n_heads * sizeof *c, cudaMemcpyDeviceToHost));
    memset(sum, 0, sizeof *sum);
    for (int h = 0; h < w->shape.n_heads; h++)
        sum->reachable += c[h].reachable, sum->visited += c[h].visited, sum->kept += c[h].kept;
}

static void test_abs(int d, int dtype)
{
    struct world w;
    const int one[1][2] = {{0, 3000}};
    char text[160];
    world_make(&w, 8, 2, d, dtype, 1, one, 31);
    world_plan(&w);
    run(&w, SM90_GATE_NONE, "none");
    void *none = grab(&w);
    run(&w, SM90_GATE_ABS, "-inf");
    void *b = grab(&w);
    snprintf(text, sizeof text, "d%d t%d T=-inf bit-equal to the kernel without a gate", d, dtype);
    check(same(&w, none, b), text, "");
    free(b);
    run(&w, SM90_GATE_REL, "rel -inf");
    b = grab(&w);
    check(same(&w, none, b), "  and REL with lambda 0", "");
    free(b), free(none);
    const int ks[4] = {0, 3, 10, 30};
    w.args.head_counts = w.counts;
    for (int rows64 = 0; rows64 < 2; rows64++)
        for (int i = 0; i < 4; i++) {
            struct keeps keep = {0};
            uint64_t kept;
            float *t = make_abs(&w, ks[i] ? ks[i] : 1, rows64, &keep, &kept);
            struct ref_problem p = world_ref(&w, 0, 1);
            if (ks[i] == 0) { /* +inf: diagonal only */
                size_t n = (size_t)(p.n_heads * p.n_blocks);
                float *inf = malloc(n * 4);
                for (size_t x = 0; x < n; x++)
                    inf[x] = INFINITY;
                CK(cudaMemcpy(t, inf, n * 4, cudaMemcpyHostToDevice));
                CK(cudaMemset(keep.dev[0], 0, 2 * n * (size_t)p.n_pages));
                free(inf);
            }
            w.seqs[0].t = t;
            w.seqs[0].gate_rows = rows64 ? 64 : 128;
            world_plan(&w);
            CK(cudaMemset(w.counts, 0, 8 * sizeof *w.counts));
            run(&w, SM90_GATE_ABS, "abs");
            struct sm90_counts c;
            counts_of(&w, &c);
            snprintf(text, sizeof text,
                     "  ABS k=%d rows %d: reachable %llu visited %llu kept %llu want %llu", ks[i],
                     rows64 ? 64 : 128, c.reachable, c.visited, c.kept, (unsigned long long)kept);
            compare(&w, &keep, text, 1);
            if (ks[i])
                check(c.kept == kept && c.visited == c.reachable, "    counters", "");
            void *x = grab(&w);
            run(&w, SM90_GATE_ABS, "abs again");
            void *y = grab(&w);
            check(same(&w, x, y), "    repeat equal", "");
            free(y);
            if (i == 1) {
                w.args.order = SM90_ORDER_L2R;
                run(&w, SM90_GATE_ABS, "abs l2r");
                compare(&w, &keep, "    left to right ", 1);
                w.args.order = 0;
            }
            free(x), keeps_free(&keep), cudaFree(t);
        }
    world_free(&w);
}

/* Rows of head h in block b of sequence i that differ between two outputs. */
static int rows_differ(const struct world *w, const void *a, const void *b, int i, int head,
                       int block)
{
    const size_t bytes = (size_t)w->shape.head_dim * 2;
    int n = 0;
    for (int r = block * 128; r < w->seqs[i].n_rows && r < block * 128 + 128; r++) {
        const size_t at = (size_t)((w->seqs[i].row + r) * w->shape.n_heads + head) * bytes;
        n += memcmp((const char *)a + at, (const char *)b + at, bytes) != 0;
    }
    return n;
}

/* Rows of both sequences that differ from what is theirs: without a gate where a block of a head is
 * open (of sequence 1 all), else gated. */
static int turns_differ(const struct world *w, const void *got, const void *none, const void *gated,
                        const float *t)
{
    const int n_blocks = (w->seqs[0].n_rows + 127) / 128;
    int bad = 0;
    for (int h = 0; h < w->shape.n_heads; h++) {
        for (int b = 0; b < n_blocks; b++)
            bad +=
                rows_differ(w, got, t && t[h * n_blocks + b] == -INFINITY ? none : gated, 0, h, b);
        for (int b = 0; b * 128 < w->seqs[1].n_rows; b++)
            bad += rows_differ(w, got, none, 1, h, b);
    }
    return bad;
}

/* Tiles that keep all pages and others by turns, in few thread blocks, so that each takes many: the
 * first have the bits of the kernel without a gate, the others what they have among themselves. */
static void test_turns(int d, int dtype, int n_rows, int n_sms)
{
    const int two[2][2] = {{0, n_rows}, {0, 300}};
    struct world w;
    char text[100];
    world_make(&w, 6, 2, d, dtype, 2, two, 71);
    const int sms = w.n_sms, n_blocks = (n_rows + 127) / 128;
    const size_t hb = (size_t)(6 * n_blocks);
    float *t = malloc(hb * 4);
    for (int rows64 = 0; rows64 < 2; rows64++) {
        struct keeps keep = {0};
        uint64_t kept;
        float *dev = make_abs(&w, 3, rows64, &keep, &kept);
        w.seqs[0].gate_rows = rows64 ? 64 : 128;
        w.seqs[0].t = dev, w.seqs[0].ln_lambda = -1.0f;
        world_plan(&w);
        run(&w, SM90_GATE_NONE, "turns, none");
        void *none = grab(&w);
        for (int gate = 1; gate < 3; gate++) {
            w.n_sms = sms;
            run(&w, gate, "turns, gated");
            void *gated = grab(&w), *got;
            CK(cudaMemcpy(t, dev, hb * 4, cudaMemcpyDeviceToHost));
            for (size_t x = 0; gate == SM90_GATE_ABS && x < hb; x++)
                if (x * 2654435761u >> 8 & 1 || x / 7 % 3 == 0) /* alone, and in runs */
                    t[x] = -INFINITY;
            CK(cudaMemcpy(dev, t, hb * 4, cudaMemcpyHostToDevice));
            w.n_sms = n_sms;
            run(&w, gate, "turns");
            got = grab(&w);
            snprintf(text, sizeof text, "d%d t%d rows %d gate kernel %d, open tiles between", d,
                     dtype, rows64 ? 64 : 128, gate);
            check(turns_differ(&w, got, none, gated, gate == SM90_GATE_ABS ? t : NULL) == 0, text,
                  "");
            free(gated), free(got);
        }
        free(none), keeps_free(&keep), cudaFree(dev);
    }
    free(t);
    world_free(&w);
}

/* Bits of n 16-bit elements on the device: x & and | or. */
static void set_bits(void *dev, size_t n, uint16_t and, uint16_t or)
{
    uint16_t *x = malloc(n * 2);
    CK(cudaMemcpy(x, dev, n * 2, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++)
        x[i] = (uint16_t)((x[i] & and) | or);
    CK(cudaMemcpy(dev, x, n * 2, cudaMemcpyHostToDevice));
    free(x);
}

/* ABS where no score is positive, and pages whose scores are all zero: the kernel compares scores
 * as integers, in another way for thresholds of each sign. */
static void test_signs(int d, int dtype)
{
    struct world w;
    const int one[1][2] = {{0, 2000}};
    char text[120];
    world_make(&w, 4, 2, d, dtype, 1, one, 91);
    set_bits(w.q, (size_t)w.rows * (size_t)(4 * d), 0x7fff, 0);
    const size_t page = (size_t)(2 * 64 * d);
    for (int i = 0; i < w.pool_pages; i++)
        set_bits((uint16_t *)w.k + (size_t)i * page, page, i % 3 ? 0xffff : 0x8000, 0x8000);
    w.args.head_counts = w.counts;
    const int ks[3] = {-1, 3, 14};
    for (int rows64 = 0; rows64 < 2; rows64++)
        for (int i = 0; i < 3; i++) {
            struct keeps keep = {0};
            uint64_t kept;
            struct sm90_counts c;
            float *t = make_abs(&w, ks[i], rows64, &keep, &kept);
            w.seqs[0].t = t;
            w.seqs[0].gate_rows = rows64 ? 64 : 128;
            world_plan(&w);
            CK(cudaMemset(w.counts, 0, 4 * sizeof *w.counts));
            run(&w, SM90_GATE_ABS, "signs");
            counts_of(&w, &c);
            snprintf(text, sizeof text,
                     "  negative scores d%d t%d k=%d rows %d: kept %llu want %llu of %llu", d,
                     dtype, ks[i], rows64 ? 64 : 128, c.kept, (unsigned long long)kept,
                     c.reachable);
            compare(&w, &keep, text, 1);
            check(c.kept == kept && kept < c.reachable, "    counters", "");
            keeps_free(&keep), cudaFree(t);
        }
    world_free(&w);
}

/* A prompt of the REL test, its tensors in single precision on the host. */
enum { REL_N = 1500, REL_HEADS = 4, REL_BLOCKS = (REL_N + 127) / 128, REL_PAGES = 2 * REL_BLOCKS };

struct rel_case {
    float *q, *k, *score; /* score: maxima [128 rows, REL_PAGES] of one query block */
    int table[REL_PAGES];
    int d, rows64, absolute; /* absolute: ln_lambda is a threshold, density pages */
    float scale, ln_lambda, steer;
    float density[2][REL_HEADS]; /* of two levels, between which it is steered */
};

static float *to_floats(const uint16_t *dev, size_t n, int dtype)
{
    uint16_t *raw = malloc(n * 2);
    float *f = malloc(n * 4);
    CK(cudaMemcpy(raw, dev, n * 2, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++)
        f[i] = of16(raw[i], dtype);
    free(raw);
    return f;
}

static float rel_dot(const struct rel_case *c, int head, int row, int key)
{
    double a = 0;
    const size_t d = (size_t)c->d, page = (size_t)c->table[key / 64];
    const float *x = c->q + ((size_t)row * REL_HEADS + (size_t)head) * d;
    const float *y = c->k + ((page * 2 + (size_t)(head / 2)) * 64 + (size_t)(key % 64)) * d;
    for (size_t i = 0; i < d; i++)
        a += (double)(x[i] * y[i]);
    return (float)(a * (double)c->scale);
}

/* Page maxima of a block's rows; returns in m the maxima over the diagonal. */
static void rel_scores(struct rel_case *c, int head, int block, int rows, float *m)
{
    for (int r = 0; r < rows; r++) {
        float *score = c->score + r * REL_PAGES;
        m[r] = -INFINITY;
        for (int j = 0; j <= block * 128 + r; j++) {
            float s = rel_dot(c, head, block * 128 + r, j);
            if (j >= block * 128)
                m[r] = fmaxf(m[r], s);
            else
                score[j / 64] = j % 64 ? fmaxf(score[j / 64], s) : s;
        }
    }
}

/* Pages before the diagonal that a row group is steered to. */
static float rel_due(const struct rel_case *c, int head, int block, int n_diag)
{
    if (c->absolute)
        return attn_steer_due(c->density[0][head] / 4, 2 * block);
    const float density = c->density[0][head] * 0.75f + c->density[1][head] * 0.25f;
    return attn_steer_due_of(density, 2 * block, n_diag, 2 * block);
}

/* The gate over one query block, page by page in the default order; returns (page, group) kept. */
static uint64_t rel_block(struct rel_case *c, int head, int block, uint8_t *keep)
{
    const int rows = REL_N - block * 128 < 128 ? REL_N - block * 128 : 128;
    const int two = c->rows64 && rows > 64, n = 2 * block;
    uint64_t kept = two ? 3 : rows > 64 ? 2 : 1;
    float m[128];
    struct attn_steering at[2] = {{c->ln_lambda, rel_due(c, head, block, 2), 0, n}};
    at[1] = at[0];
    at[0].rest = rel_due(c, head, block, c->rows64 || rows <= 64 ? 1 : 2);
    for (int g = 0; g < 2; g++)
        at[g].gate = c->steer > 0 && at[g].rest >= (float)n ? -INFINITY : at[g].gate;
    rel_scores(c, head, block, rows, m);
    for (int i = 0, page = 0; i < n; page = n - ++i) {
        int yes[2] = {0, 0};
        for (int r = 0; r < rows; r++)
            yes[r / 64] |= !(c->score[r * REL_PAGES + page] <
                             (c->absolute ? 0 : m[r]) + at[c->rows64 && r >= 64].gate);
        if (!c->rows64)
            yes[0] = yes[1] = yes[0] | yes[1];
        for (int g = 0; g < 2; g++) {
            attn_steer_next(&at[g], c->steer, c->absolute, yes[g]);
            keep[((g * REL_HEADS + head) * REL_BLOCKS + block) * REL_PAGES + page] =
                (uint8_t)yes[g];
        }
        for (int r = 0; r < rows; r++)
            if (yes[r / 64])
                m[r] = fmaxf(m[r], c->score[r * REL_PAGES + page]);
        kept += (uint64_t)(two ? yes[0] + yes[1] : yes[0]);
    }
    return kept;
}

/* REL against a sequential simulation on the host; steered where steer is above 0, and then ABS
 * where that is asked for. */
static void test_rel(int d, int dtype, int rows64, float ln_lambda, float steer, int absolute)
{
    const float density[3][REL_HEADS] = {
        {0.9f, 0.5f, 0.3f, 0.2f}, {0.7f, 0.3f, 0.05f, 0}, {1, 8, 20, 100}};
    float *densities, *t, thresholds[REL_HEADS][2];
    struct world w;
    const int one[1][2] = {{0, REL_N}};
    world_make(&w, REL_HEADS, 2, d, dtype, 1, one, 41);
    w.seqs[0].ln_lambda = ln_lambda;
    w.seqs[0].gate_rows = rows64 ? 64 : 128;
    CK(cudaMalloc((void **)&densities, sizeof density));
    CK(cudaMemcpy(densities, density, sizeof density, cudaMemcpyHostToDevice));
    for (int h = 0; h < REL_HEADS; h++) /* of the first block, and of all others */
        thresholds[h][0] = 9, thresholds[h][1] = ln_lambda;
    CK(cudaMalloc((void **)&t, sizeof thresholds));
    CK(cudaMemcpy(t, thresholds, sizeof thresholds, cudaMemcpyHostToDevice));
    w.seqs[0].keep = densities + (absolute ? 2 * REL_HEADS : 0);
    w.seqs[0].t = t;
    w.args.t_blocks = 2, w.args.t_head_stride = 2;
    w.seqs[0].is_absolute = absolute;
    w.seqs[0].steer = steer;
    w.seqs[0].blend = 0.25f;
    w.args.keep_level_stride = REL_HEADS;
    w.args.head_counts = w.counts;
    world_plan(&w);
    CK(cudaMemset(w.counts, 0, REL_HEADS * sizeof *w.counts));
    run(&w, SM90_GATE_REL, "rel");
    struct rel_case c = {.d = d,
                         .rows64 = rows64,
                         .absolute = absolute,
                         .scale = w.args.scale,
                         .ln_lambda = ln_lambda,
                         .steer = steer};
    memcpy(c.density, density, sizeof c.density);
    if (absolute)
        memcpy(c.density[0], density[2], sizeof c.density[0]);
    c.q = to_floats(w.q, (size_t)REL_N * (size_t)(REL_HEADS * d), dtype);
    c.k = to_floats(w.k, (size_t)w.pool_pages * (size_t)(2 * 64 * d), dtype);
    c.score = malloc(sizeof(float) * 128 * REL_PAGES);
    CK(cudaMemcpy(c.table, w.table[0], (REL_N + 63) / 64 * 4, cudaMemcpyDeviceToHost));
    const size_t bytes = (size_t)2 * REL_HEADS * REL_BLOCKS * REL_PAGES;
    struct keeps keep = {0};
    keep.host[0] = calloc(bytes, 1);
    uint64_t kept = 0;
    for (int h = 0; h < REL_HEADS; h++)
        for (int b = 0; b < REL_BLOCKS; b++)
            kept += rel_block(&c, h, b, keep.host[0]);
    CK(cudaMalloc((void **)&keep.dev[0], bytes));
    CK(cudaMemcpy(keep.dev[0], keep.host[0], bytes, cudaMemcpyHostToDevice));
    struct sm90_counts got;
    counts_of(&w, &got);
    char text[160];
    snprintf(text, sizeof text, "%s d%d t%d rows %d at %.1f steer %.1f: of %llu %llu, want %llu",
             absolute ? "ABS" : "REL", d, dtype, rows64 ? 64 : 128, (double)ln_lambda,
             (double)steer, got.reachable, got.kept, (unsigned long long)kept);
    compare(&w, &keep, text, 1);
    check(got.kept == kept, "    counter", "");
    free(c.q), free(c.k), free(c.score), keeps_free(&keep);
    cudaFree(densities), cudaFree(t);
    world_free(&w);
}

static void test_visit(int d, int dtype, int pos, int n_rows)
{
    struct world w;
    const int one[1][2] = {{pos, n_rows}};
    world_make(&w, 8, 2, d, dtype, 1, one, 51);
    const struct sm90_visit visits[8] = {{1, 4}, {0, 3}, {2, 5}, {1, -1},
                                         {3, 1}, {7, 0}, {9, 8}, {0, 1}};
    struct sm90_visit *dv;
    CK(cudaMalloc((void **)&dv, sizeof visits));
    CK(cudaMemcpy(dv, visits, sizeof visits, cudaMemcpyHostToDevice));
    w.args.visit = dv;
    struct ref_problem p = world_ref(&w, 0, 1);
    size_t n = 2 * 8 * (size_t)p.n_blocks * (size_t)p.n_pages;
    struct keeps keep = {0};
    keep.host[0] = calloc(n, 1);
    for (int g = 0; g < 2; g++)
        for (int h = 0; h < 8; h++)
            for (int b = 0; b < p.n_blocks; b++)
                for (int j = 0; j < 2 * b; j++)
                    keep.host[0][((size_t)((g * 8 + h) * p.n_blocks + b)) * (size_t)p.n_pages +
                                 (size_t)j] =
                        visits[h].local < 0 || j < visits[h].sink || j >= 2 * b - visits[h].local;
    CK(cudaMalloc((void **)&keep.dev[0], n));
    CK(cudaMemcpy(keep.dev[0], keep.host[0], n, cudaMemcpyHostToDevice));
    world_plan(&w);
    for (int order = 0; order < 2; order++)
        for (int gate = 0; gate < 3; gate++) {
            char text[80];
            snprintf(text, sizeof text, "SINK_LOCAL from %d d%d t%d order %d gate kernel %d ", pos,
                     d, dtype, order, gate);
            w.args.order = order;
            run(&w, gate, "visit");
            compare(&w, &keep, text, 1);
        }
    keeps_free(&keep), cudaFree(dv);
    world_free(&w);
}

/* Head counts that leave heads without a partner, or pair heads that share no K. */
static void test_heads(int d, int dtype)
{
    static const int heads[4][2] = {{1, 1}, {3, 1}, {3, 3}, {6, 2}};
    const int two[2][2] = {{0, 700}, {128, 300}};
    for (int i = 0; i < 4; i++) {
        struct world w;
        world_make(&w, heads[i][0], heads[i][1], d, dtype, 2, two, 61);
        world_plan(&w);
        for (int gate = 0; gate < 3; gate++) {
            char text[80];
            snprintf(text, sizeof text, "heads %d of %d d%d t%d gate kernel %d ", heads[i][0],
                     heads[i][1], d, dtype, gate);
            run(&w, gate, "heads");
            compare(&w, NULL, text, 1);
        }
        world_free(&w);
    }
}

/* Every query block of every head is in one tile, and two share a tile wherever they can share K:
 * by pairs of blocks of a head, and by pairs of heads where a block is left over. Needs no device.
 */
static void test_tiles(int heads, int kv)
{
    const struct sm90_seq seqs[2] = {{.pos = 0, .n_rows = 700}, {.pos = 384, .n_rows = 257}};
    const struct sm90_shape shape = {heads, kv, 128, 0};
    const int group = heads / kv;
    const size_t l2[3] = {0, 1 << 20, 1 << 30};
    char text[80];
    snprintf(text, sizeof text, "tiles of %d heads on %d", heads, kv);
    for (int i = 0; i < 3; i++) {
        int seen[2][8][64] = {0}, items = 0, split = 0;
        struct sm90_tile t[2 * 8 * 64];
        const int64_t n = sm90_tiles_make(t, seqs, 2, &shape, l2[i]);
        for (int64_t j = 0; j < n; j++) {
            for (int k = 0; k < 2 && t[j].block[k] >= 0; k++) {
                seen[t[j].seq][t[j].block[k]][t[j].head[k]]++, items++;
                split += t[j].kv_head != t[j].head[k] / group;
            }
            split += t[j].block[1] >= 0 && t[j].head[0] == t[j].head[1] &&
                     t[j].block[1] != t[j].block[0] + 1;
            split += t[j].block[1] >= 0 && t[j].head[0] != t[j].head[1] &&
                     t[j].block[1] != t[j].block[0];
        }
        int once = 1;
        for (int h = 0; h < heads; h++)
            for (int b = 0; b < 6; b++)
                once &= seen[0][b][h] == 1 && seen[1][b][h] == (b >= 3);
        check(once && items == (6 + 3) * heads && split == 0 &&
                  n == (3 + 1) * heads + (group + 1) / 2 * kv &&
                  n <= sm90_tile_count(seqs, 2, heads),
              text, "");
    }
}

/* The longest time of 132 thread blocks that draw tiles from the list, over the mean: what a prompt
 * loses to thread blocks that have nothing left to do. A page takes 1, the ends of a tile 2. */
static void test_balance(int n_rows, double most)
{
    enum { BLOCKS = 132 };
    const struct sm90_seq seq = {.pos = 0, .n_rows = n_rows};
    const struct sm90_shape shape = {32, 8, 128, 0};
    struct sm90_tile *t = malloc((size_t)sm90_tile_count(&seq, 1, 32) * sizeof *t);
    const int64_t n = sm90_tiles_make(t, &seq, 1, &shape, 32 << 20);
    double busy[BLOCKS] = {0}, sum = 0, last = 0;
    char text[80];
    for (int64_t i = 0; i < n; i++) {
        int first = 0;
        for (int b = 1; b < BLOCKS; b++)
            first = busy[b] < busy[first] ? b : first;
        const double time = 2 * fmax(t[i].block[0], t[i].block[1]) + 2 + 2;
        busy[first] += time, sum += time, last = fmax(last, busy[first]);
    }
    snprintf(text, sizeof text, "%d tokens: %.3f of the mean", n_rows, last * BLOCKS / sum);
    check(last * BLOCKS / sum < most, "balance,", text);
    free(t);
}

/* The kernels are compiled for compute capability 9.0 alone. */
static int have_hopper(void)
{
    int n = 0, major = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess && n > 0 &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
           major == 9;
}

/* Each kernel once, on one prompt of four blocks, the last cut short. */
static void test_least(void)
{
    const int one[1][2] = {{0, 420}};
    struct world w;
    world_make(&w, 2, 1, 128, 0, 1, one, 61);
    for (int gate = 0; gate < 3; gate++)
        for (int rows64 = 0; rows64 < (gate ? 2 : 1); rows64++) {
            struct keeps keep = {0};
            uint64_t kept;
            char text[80];
            w.seqs[0].gate_rows = rows64 ? 64 : 128;
            w.seqs[0].ln_lambda = -30.0f; /* a gate that keeps all of these pages */
            float *t = make_abs(&w, 2, rows64, &keep, &kept);
            w.seqs[0].t = gate == SM90_GATE_ABS ? t : NULL;
            world_plan(&w);
            run(&w, gate, "least");
            snprintf(text, sizeof text, "least, gate %d rows %d ", gate, w.seqs[0].gate_rows);
            compare(&w, gate == SM90_GATE_ABS ? &keep : NULL, text, 1);
            keeps_free(&keep), cudaFree(t);
        }
    world_free(&w);
}

static void test_all(int d, int dtype)
{
    test_dense(d, dtype);
    test_visit(d, dtype, 0, 2500);
    test_visit(d, dtype, 1280, 1100); /* an odd number of blocks: two heads that visit otherwise */
    test_heads(d, dtype);
    for (int gate = 0; gate < 3; gate++)
        test_chunks(d, dtype, gate);
    test_abs(d, dtype);
    test_turns(d, dtype, 2900, 3);
    test_signs(d, dtype);
    for (int rows64 = 0; rows64 < 2; rows64++) {
        test_rel(d, dtype, rows64, -4.0f, 0, 0);
        test_rel(d, dtype, rows64, 0.7f, 0, 0); /* pages are skipped that would raise the maximum */
        test_rel(d, dtype, rows64, -0.9f, 0.8f, 0);
        test_rel(d, dtype, rows64, -INFINITY, 0.8f, 0); /* stays open */
        test_rel(d, dtype, rows64, 2.5f, 0.4f, 1);
        test_rel(d, dtype, rows64, -0.5f, 0.8f, 1);
    }
}

int main(int argc, char **argv)
{
    static const int heads[6][2] = {{1, 1}, {3, 1}, {3, 3}, {6, 2}, {32, 8}, {40, 40}};
    for (int i = 0; i < 6; i++)
        test_tiles(heads[i][0], heads[i][1]);
    test_balance(4096, 1.06);
    test_balance(8192, 1.03);
    test_balance(32768, 1.01);
    if (!have_hopper())
        return failures ? 1 : 77;
    if (argc > 1 && !strcmp(argv[1], "quick")) {
        test_dense(128, 0);
        test_abs(128, 0);
        test_turns(128, 0, 900, 1);
        test_signs(128, 0);
        test_rel(128, 0, 0, -4.0f, 0, 0);
        test_rel(128, 0, 1, -0.9f, 0.8f, 0);
        test_rel(128, 0, 0, 2.5f, 0.4f, 1);
    } else if (argc > 1 && !strcmp(argv[1], "least")) {
        test_least();
    } else if (argc > 1 && !strcmp(argv[1], "turns")) { /* for racecheck too */
        test_turns(128, 0, 300, 1);
    } else {
        test_least();
        for (int dtype = 0; dtype < 2; dtype++) {
            test_all(128, dtype);
            test_all(64, dtype);
        }
    }
    printf("%d failures\n", failures);
    return failures != 0;
}
