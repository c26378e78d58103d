/* Timings of the Hopper decode kernel: medians over CUDA events, L2 flushed before each run, beside
 * a kernel that only reads the same bytes. bench_attn_decode [dense|dense64|short|gate|gate64|once]
 * where once is either kernel once for each row of dense, for a profiler. */
#include "tests/attn_decode_harness.h"

enum { HEADS = 32, KV_HEADS = 8, REPS = 21 };

static void *flush_buf;
static unsigned *sum;
static struct dec_world w;

static int up(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Median milliseconds of the kernel under a gate; gate -1: of reading both pools. */
static double time_run(int gate)
{
    const size_t bytes = dec_pool_len(&w) * 2;
    float times[REPS];
    cudaEvent_t a, b;
    CK(cudaEventCreate(&a));
    CK(cudaEventCreate(&b));
    for (int i = -2; i < REPS; i++) {
        int e = 0;
        CK(cudaMemsetAsync(flush_buf, i & 255, 256 << 20, 0));
        CK(cudaEventRecord(a, 0));
        if (gate < 0) {
            dec_read(w.k, w.v, bytes, w.n_sms, sum);
        } else {
            e = dec_run(&w, gate);
        }
        CK(cudaEventRecord(b, 0));
        CK(cudaEventSynchronize(b));
        if (e) {
            printf("launch %d\n", e);
            exit(1);
        }
        if (i >= 0)
            CK(cudaEventElapsedTime(&times[i], a, b));
    }
    CK(cudaEventDestroy(a));
    CK(cudaEventDestroy(b));
    qsort(times, REPS, sizeof *times, up);
    return (double)times[REPS / 2];
}

/* The last sequence's outputs against double precision. */
static void check_result(void)
{
    const size_t d = (size_t)w.shape.head_dim, n = (size_t)w.rows * HEADS;
    struct dec_ref p = dec_ref_of(&w, w.n_seqs - 1);
    double *dev = dec_device(n * (d + 1) * 8), most = 0;
    p.scratch = dec_device((size_t)HEADS * (size_t)p.n_pages * 64 * 8);
    CK(cudaMemset(w.out, 0xff, n * d * 2));
    if (dec_run(&w, SM90_GATE_NONE))
        exit(1);
    dec_ref_f64(&p, dev, dev + n * d);
    double *ref = malloc(n * d * 8);
    uint16_t *out = malloc(n * d * 2);
    CK(cudaMemcpy(ref, dev, n * d * 8, cudaMemcpyDeviceToHost));
    CK(cudaMemcpy(out, w.out, n * d * 2, cudaMemcpyDeviceToHost));
    for (size_t i = (size_t)p.row * HEADS * d; i < n * d; i++)
        most = fmax(most, fabs((double)of16(out[i], 0) - ref[i]) / (fabs(ref[i]) + 0.05));
    if (!(most < 0.02)) {
        printf("wrong result: relative error %.3g\n", most);
        exit(1);
    }
    cudaFree(dev), cudaFree(p.scratch), free(ref), free(out);
}

static void make(int batch, int context, int d)
{
    static int spans[DEC_MAX_SEQS][2];
    for (int i = 0; i < batch; i++)
        spans[i][0] = context - 1, spans[i][1] = 1;
    dec_make(&w, HEADS, KV_HEADS, d, 0, batch, (const int(*)[2])spans, 3);
    dec_plan(&w);
    check_result();
}

static double kv_bytes(int batch, int context, int d)
{
    return (double)batch * context * KV_HEADS * d * 4.0;
}

static double bench_dense(int batch, int context, int d)
{
    make(batch, context, d);
    const double bytes = kv_bytes(batch, context, d), read = time_run(-1);
    const double t = time_run(SM90_GATE_NONE), read_bytes = (double)dec_pool_len(&w) * 4.0;
    printf("dense d%d %3d x %6d  %8.1f us  %.3f TB/s  read %.3f TB/s  share %.3f\n", d, batch,
           context, t * 1e3, bytes / t * 1e-9, read_bytes / read * 1e-9,
           bytes / t / (read_bytes / read));
    return t;
}

static double density(int gate)
{
    struct sm90_counts c[HEADS];
    unsigned long long kept = 0, reachable = 0;
    w.args.head_counts = w.counts;
    CK(cudaMemset(w.counts, 0, sizeof c));
    if (dec_run(&w, gate))
        exit(1);
    w.args.head_counts = NULL;
    CK(cudaMemcpy(c, w.counts, sizeof c, cudaMemcpyDeviceToHost));
    for (int h = 0; h < HEADS; h++)
        kept += c[h].kept, reachable += c[h].reachable;
    return (double)kept / (double)reachable;
}

static void set_lambda(float ln_lambda)
{
    for (int i = 0; i < w.n_seqs; i++)
        w.seqs[i].ln_lambda = ln_lambda;
    CK(cudaMemcpy(w.d_seqs, w.seqs, sizeof w.seqs, cudaMemcpyHostToDevice));
}

/* lambda by bisection on the measured density. */
static void run_rel(double want, double dense)
{
    float lo = -20, hi = 0;
    for (int i = 0; i < 14; i++) {
        const float mid = 0.5f * (lo + hi);
        set_lambda(mid);
        if (density(SM90_GATE_REL) > want)
            lo = mid;
        else
            hi = mid;
    }
    const double rho = density(SM90_GATE_REL), t = time_run(SM90_GATE_REL);
    printf("  REL ln(lambda) %.3f density %.3f  %8.1f us  %.3fx  (bytes alone %.3fx)\n", (double)hi,
           rho, t * 1e3, dense / t, 2 / (1 + rho));
}

/* One threshold for all heads, by bisection on the measured density. Rows decide alone: V of a page
 * is read where any head of the group keeps it. */
static void run_abs(double want, double dense)
{
    float t[HEADS], lo = 0, hi = 10, *dev = dec_device(sizeof t);
    for (int i = 0; i < w.n_seqs; i++)
        w.seqs[i].t = dev;
    CK(cudaMemcpy(w.d_seqs, w.seqs, sizeof w.seqs, cudaMemcpyHostToDevice));
    for (int i = 0; i < 16; i++) {
        const float mid = 0.5f * (lo + hi);
        for (int h = 0; h < HEADS; h++)
            t[h] = mid;
        CK(cudaMemcpy(dev, t, sizeof t, cudaMemcpyHostToDevice));
        if (density(SM90_GATE_ABS) > want)
            lo = mid;
        else
            hi = mid;
    }
    const double rho = density(SM90_GATE_ABS), ms = time_run(SM90_GATE_ABS);
    const double any = 1 - pow(1 - rho, (double)HEADS / KV_HEADS); /* heads of random q: apart */
    printf("  ABS T %.3f density %.3f  %8.1f us  %.3fx  (bytes alone %.3fx)\n", (double)lo, rho,
           ms * 1e3, dense / ms, 2 / (1 + any));
    cudaFree(dev);
}

static void bench_gate(int d)
{
    const double dense = bench_dense(64, 32768, d);
    set_lambda(-INFINITY);
    double t = time_run(SM90_GATE_REL);
    printf("  REL lambda 0  %8.1f us  %.3fx\n", t * 1e3, dense / t);
    t = time_run(SM90_GATE_ABS);
    printf("  ABS T=-inf    %8.1f us  %.3fx\n", t * 1e3, dense / t);
    run_rel(0.50, dense);
    run_rel(0.27, dense);
    run_rel(0.10, dense);
    run_abs(0.50, dense);
    run_abs(0.10, dense);
    run_abs(0.02, dense);
    dec_free(&w);
}

struct row {
    int batch, context;
};

static const struct row table[] = {{1, 131072}, {8, 32768}, {32, 8192}, {64, 8192}, {64, 32768}};
static const struct row few[] = {{256, 512}, {256, 2048}, {16, 2048}, {1, 8192}, {0, 0}};

static void run_once(int batch, int context)
{
    make(batch, context, 128);
    dec_read(w.k, w.v, dec_pool_len(&w) * 2, w.n_sms, sum);
    if (dec_run(&w, SM90_GATE_NONE))
        exit(1);
    CK(cudaDeviceSynchronize());
    dec_free(&w);
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "dense";
    const int d = strstr(mode, "64") ? 64 : 128;
    const struct row *rows = strncmp(mode, "short", 5) ? table : few;
    CK(cudaMalloc(&flush_buf, 256 << 20));
    CK(cudaMalloc((void **)&sum, 4));
    if (!strncmp(mode, "gate", 4)) {
        bench_gate(d);
        return 0;
    }
    for (size_t i = 0; i < sizeof table / sizeof *table && rows[i].batch; i++) {
        if (!strcmp(mode, "once")) {
            run_once(rows[i].batch, rows[i].context);
            continue;
        }
        bench_dense(rows[i].batch, rows[i].context, d);
        dec_free(&w);
    }
    return 0;
}
