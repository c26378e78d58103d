/* Timings of the Hopper prefill kernel: medians over CUDA events on a card brought to its working
 * temperature, L2 flushed before each run; results are checked before they are timed.
 * bench_attn_sm90 [dense|dense64|gate32|once|once64|gate|gatefull|gate64]; bench/peers.py times the
 * peers.
 */
#include "tests/attn_sm90_harness.h"

static void *flush_buf;
static float times[64];

static int up(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* One run between two events, in milliseconds. */
static float time_once(struct world *w, int gate, cudaEvent_t a, cudaEvent_t b)
{
    float ms = 0;
    CK(cudaMemsetAsync(flush_buf, 1, 256 << 20, 0));
    CK(cudaEventRecord(a, 0));
    int e = world_run(w, gate);
    CK(cudaEventRecord(b, 0));
    CK(cudaEventSynchronize(b));
    if (e) {
        printf("launch %d\n", e);
        exit(1);
    }
    CK(cudaEventElapsedTime(&ms, a, b));
    return ms;
}

/* Median milliseconds of n runs, after WARM_MS of them: the first runs on a cool card are up to 12%
 * faster than what it keeps up. A single run is not warmed up. */
static double time_run(struct world *w, int gate, int n)
{
    enum { WARM_MS = 300 };
    cudaEvent_t a, b;
    CK(cudaEventCreate(&a));
    CK(cudaEventCreate(&b));
    for (float spent = n > 1 ? 0 : WARM_MS; spent < WARM_MS;)
        spent += time_once(w, gate, a, b);
    for (int i = 0; i < n; i++)
        times[i] = time_once(w, gate, a, b);
    CK(cudaEventDestroy(a));
    CK(cudaEventDestroy(b));
    qsort(times, (size_t)n, 4, up);
    return (double)times[n / 2];
}

/* Some rows of the first sequence without a gate against double precision. The reference keeps the
 * scores of a row in shared memory, so later positions are left to the tests. */
static void check_result(struct world *w)
{
    enum { MAX_ROWS = 16384 };
    const struct sm90_seq *s = &w->seqs[0];
    const int n_rows = s->n_rows < MAX_ROWS ? s->n_rows : MAX_ROWS;
    const int row_step = n_rows / 4 + 37;
    const size_t d = (size_t)w->shape.head_dim, heads = (size_t)w->shape.n_heads;
    const size_t n = (size_t)w->rows * heads;
    struct ref_problem p = world_ref(w, 0, row_step);
    p.n_rows = n_rows;
    double *ref, *lse, worst = 0;
    CK(cudaMalloc((void **)&ref, n * d * 8));
    CK(cudaMalloc((void **)&lse, n * 8));
    CK(cudaMemset(w->out, 0xff, n * d * 2));
    if (world_run(w, SM90_GATE_NONE))
        exit(1);
    ref_attn_f64(&p, ref, lse);
    CK(cudaDeviceSynchronize());
    double *want = malloc(heads * d * 8);
    uint16_t *got = malloc(heads * d * 2);
    for (int r = 0; r < n_rows; r += row_step) {
        const size_t at = (size_t)(s->row + r) * heads * d;
        CK(cudaMemcpy(want, ref + at, heads * d * 8, cudaMemcpyDeviceToHost));
        CK(cudaMemcpy(got, w->out + at, heads * d * 2, cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < heads * d; i++) {
            double off = fabs((double)of16(got[i], w->shape.dtype) - want[i]);
            worst = isnan(off) ? (double)INFINITY : fmax(worst, off);
        }
    }
    free(want), free(got);
    cudaFree(ref), cudaFree(lse);
    if (!(worst < 0.02)) {
        printf("wrong result: off by %g\n", worst);
        exit(1);
    }
}

static double measure_density(struct world *w, int gate)
{
    struct sm90_counts c[64];
    unsigned long long kept = 0, reachable = 0;
    const size_t bytes = (size_t)w->shape.n_heads * sizeof *c;
    w->args.head_counts = w->counts;
    CK(cudaMemset(w->counts, 0, bytes));
    world_run(w, gate);
    CK(cudaDeviceSynchronize());
    w->args.head_counts = NULL;
    CK(cudaMemcpy(c, w->counts, bytes, cudaMemcpyDeviceToHost));
    for (int h = 0; h < w->shape.n_heads; h++)
        kept += c[h].kept, reachable += c[h].reachable;
    return (double)kept / (double)reachable;
}

/* The k whose predicted density is nearest to the wanted one. */
static int k_for(double want, int n_blocks)
{
    int best = 1;
    double gap = 9;
    for (int k = 1; k < 2 * n_blocks; k++) {
        double a = 0, b = 0;
        for (int i = 0; i < n_blocks; i++)
            a += fmin(k, 2 * i) + 2, b += 2 * i + 2;
        if (fabs(a / b - want) < gap)
            gap = fabs(a / b - want), best = k;
    }
    return best;
}

static double flops(double n, double h, double d)
{
    return 2 * n * n * h * d;
}

static void bench_dense(int d)
{
    const int ns[3] = {8192, 32768, 131072}, reps[3] = {25, 11, 5};
    for (int i = 0; i < 3; i++) {
        struct world w;
        const int one[1][2] = {{0, ns[i]}};
        world_make(&w, 32, 8, d, 0, 1, one, 3);
        world_plan(&w);
        check_result(&w);
        double t = time_run(&w, SM90_GATE_NONE, reps[i]);
        printf("dense d%d %7d  %9.3f ms  %6.1f TFLOP/s\n", d, ns[i], t,
               flops(ns[i], 32, d) / t * 1e-9);
        if (ns[i] == 131072) {
            w.seqs[0].pos = ns[i] - 8192, w.seqs[0].row = 0, w.seqs[0].n_rows = 8192;
            world_plan(&w);
            t = time_run(&w, SM90_GATE_NONE, 7);
            printf("chunk 8192 at end of 128K %9.3f ms  %6.1f TFLOP/s\n", t,
                   (flops(ns[i], 32, d) - flops(ns[i] - 8192, 32, d)) / t * 1e-9);
        }
        world_free(&w);
    }
}

struct gate_bench {
    struct world w;
    int n_blocks, n_pages, reps;
    float *max, *t;
    int *k;
    double dense;
};

/* Thresholds of k[head] by the calibration rule, then density and time. */
static double run_abs(struct gate_bench *g, const int *k, const char *what)
{
    CK(cudaMemcpy(g->k, k, 32 * sizeof *k, cudaMemcpyHostToDevice));
    ref_thresholds(g->max, g->t, 32, g->n_blocks, g->n_pages, g->k);
    double rho = measure_density(&g->w, SM90_GATE_ABS);
    double t = time_run(&g->w, SM90_GATE_ABS, g->reps);
    printf("  ABS %s k=%4d density %.4f %9.3f ms  %.3fx\n", what, k[0], rho, t, g->dense / t);
    return t;
}

/* Densities from 2% to 100% over the heads, mean 0.25, in a mixed order. */
static void run_skewed(struct gate_bench *g, double uniform)
{
    int k[32];
    double exponent = 3.0, sum = 32;
    while (sum / 32 > 0.25) {
        exponent += 0.02, sum = 0;
        for (int h = 0; h < 32; h++)
            sum += 0.02 + 0.98 * pow(h / 31.0, exponent);
    }
    for (int h = 0; h < 32; h++) {
        double x = 0.02 + 0.98 * pow((h * 13 % 32) / 31.0, exponent);
        k[h] = x > 0.99 ? 2 * g->n_blocks : k_for(x, g->n_blocks);
    }
    double t = run_abs(g, k, "skewed heads");
    printf("      uniform 0.25 / this = %.3f\n", uniform / t);
}

/* lambda by bisection on the measured density; below some density it is above 1. */
static void run_rel(struct gate_bench *g, double want)
{
    struct world *w = &g->w;
    float lo = -4, hi = 4;
    for (int j = 0; j < 9; j++) {
        w->seqs[0].ln_lambda = 0.5f * (lo + hi);
        CK(cudaMemcpy(w->d_seqs, w->seqs, sizeof w->seqs, cudaMemcpyHostToDevice));
        if (measure_density(w, SM90_GATE_REL) > want)
            lo = w->seqs[0].ln_lambda;
        else
            hi = w->seqs[0].ln_lambda;
    }
    double rho = measure_density(w, SM90_GATE_REL), t = time_run(w, SM90_GATE_REL, g->reps);
    printf("  REL rows %3d ln(lambda) %.3f density %.4f %9.3f ms  %.3fx\n", w->seqs[0].gate_rows,
           (double)w->seqs[0].ln_lambda, rho, t, g->dense / t);
}

static void bench_gate(int d, int n, int reps, int full)
{
    static struct gate_bench g;
    const int one[1][2] = {{0, n}};
    g.reps = reps, g.n_blocks = n / 128, g.n_pages = n / 64;
    world_make(&g.w, 32, 8, d, 0, 1, one, 3);
    world_plan(&g.w);
    check_result(&g.w);
    g.dense = time_run(&g.w, SM90_GATE_NONE, reps);
    printf("gate d%d %d: dense %.3f ms %.1f TFLOP/s\n", d, n, g.dense,
           flops(n, 32, d) / g.dense * 1e-9);
    double t = time_run(&g.w, SM90_GATE_ABS, reps), uniform = 0;
    printf("  ABS T=-inf %9.3f ms  %.3fx\n", t, g.dense / t);
    CK(cudaMalloc((void **)&g.max, (size_t)32 * (size_t)g.n_blocks * (size_t)g.n_pages * 4));
    CK(cudaMalloc((void **)&g.t, (size_t)32 * (size_t)g.n_blocks * 4));
    CK(cudaMalloc((void **)&g.k, 32 * sizeof(int)));
    struct ref_problem p = world_ref(&g.w, 0, 1);
    ref_page_max_fast(&p, g.max);
    CK(cudaDeviceSynchronize());
    g.w.args.t_head_stride = g.w.args.t_blocks = g.n_blocks;
    g.w.seqs[0].t = g.t;
    world_plan(&g.w);
    const double want[5] = {0.75, 0.50, 0.25, 0.10, 0.0};
    for (int i = full ? 0 : 1; i < 5; i++) {
        int k[32];
        for (int h = 0; h < 32; h++)
            k[h] = want[i] > 0 ? k_for(want[i], g.n_blocks) : 0;
        t = run_abs(&g, k, "uniform");
        uniform = want[i] == 0.25 ? t : uniform;
    }
    if (full) {
        run_skewed(&g, uniform);
        for (int rows = 128; rows >= 64; rows -= 64) {
            g.w.seqs[0].gate_rows = rows;
            world_plan(&g.w);
            for (int i = 1; i < 4; i++)
                run_rel(&g, want[i]);
        }
    }
    cudaFree(g.max), cudaFree(g.t), cudaFree(g.k);
    world_free(&g.w);
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "dense";
    CK(cudaMalloc(&flush_buf, 256 << 20));
    if (!strcmp(mode, "dense"))
        bench_dense(128);
    else if (!strcmp(mode, "dense64"))
        bench_dense(64);
    else if (!strcmp(mode, "gate32"))
        bench_gate(128, 32768, 5, 0);
    else if (!strcmp(mode, "once") || !strcmp(mode, "once64"))
        /* under ncu: a check, no gate, T=-inf; then each density twice */
        bench_gate(mode[4] ? 64 : 128, 32768, 1, 0);
    else if (!strcmp(mode, "gate"))
        bench_gate(128, 131072, 5, 0);
    else if (!strcmp(mode, "gatefull"))
        bench_gate(128, 131072, 5, 1);
    else if (!strcmp(mode, "gate64"))
        bench_gate(64, 131072, 5, 0);
    else
        return 2;
    return 0;
}
