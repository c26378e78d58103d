/* Checks of the page maxima that the Hopper prefill kernel writes, on the device: against double
 * precision, and against the decisions that the kernel takes from them. test_attn_max_sm90 [quick].
 * Exit status 77: no device. */
#include "tests/attn_sm90_harness.h"

#include <limits.h>

enum { HEADS = 6, KV_HEADS = 2, N_TOKENS = 2000, CHUNK = 640, POISON = (int)0x80808080 };

static int failures;

static void check(int ok, const char *what, const char *detail)
{
    printf("%-5s %s %s\n", ok ? "ok" : "FAIL", what, detail);
    failures += !ok;
}

static float of_ordered(int32_t x)
{
    const int32_t bits = x < 0 ? x ^ 0x7fffffff : x;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Runs the chunk w->seqs[0] and returns its maxima on the host: [HEADS, groups, pages]. */
static int32_t *run(struct world *w, int gate, int groups, int pages)
{
    const size_t n = (size_t)HEADS * (size_t)groups * (size_t)pages;
    int32_t *host = malloc(n * sizeof *host);
    CK(cudaMalloc((void **)&w->args.page_max, n * sizeof *host));
    CK(cudaMemset(w->args.page_max, 0x80, n * sizeof *host));
    w->args.max_groups = groups;
    w->args.max_pages = pages;
    world_plan(w);
    int e = world_run(w, gate);
    CK(cudaDeviceSynchronize());
    check(e == 0, "launch", "");
    CK(cudaMemcpy(host, w->args.page_max, n * sizeof *host, cudaMemcpyDeviceToHost));
    CK(cudaFree(w->args.page_max));
    return host;
}

static float *reference(const struct world *w)
{
    const struct ref_problem p = world_ref(w, 0, 1);
    const size_t n = 2 * (size_t)p.n_heads * (size_t)p.n_blocks * (size_t)p.n_pages;
    float *dev, *host = malloc(n * sizeof *host);
    CK(cudaMalloc((void **)&dev, n * sizeof *host));
    ref_page_max(&p, dev);
    CK(cudaMemcpy(host, dev, n * sizeof *host, cudaMemcpyDeviceToHost));
    CK(cudaFree(dev));
    return host;
}

/* The chunk [pos, pos + n_rows) of the prompt, whose rows of q begin at pos too. */
static void take_chunk(struct world *w, int pos, int n_rows, int gate_rows)
{
    w->seqs[0].row = w->seqs[0].pos = pos;
    w->seqs[0].n_rows = n_rows;
    w->seqs[0].gate_rows = gate_rows;
}

/* All chunks of a prompt against double precision; entries that must not be written are not. */
static void test_values(int d, int dtype, int rows)
{
    const int span[1][2] = {{0, N_TOKENS}}, per = 128 / rows, groups = (CHUNK + 127) / 128 * per;
    const int pages = (N_TOKENS + 127) / 128 * 2 + 3;
    struct world w;
    double worst = 0;
    long wrong = 0, seen = 0;
    char text[120];

    world_make(&w, HEADS, KV_HEADS, d, dtype, 1, span, 71);
    take_chunk(&w, 0, N_TOKENS, rows);
    const struct ref_problem p = world_ref(&w, 0, 1);
    float *ref = reference(&w);
    for (int pos = 0; pos < N_TOKENS; pos += CHUNK) {
        const int n = N_TOKENS - pos < CHUNK ? N_TOKENS - pos : CHUNK;
        take_chunk(&w, pos, n, rows);
        int32_t *max = run(&w, SM90_GATE_ABS_MAX, groups, pages);
        for (int i = 0; i < HEADS * groups * pages; i++) {
            const int h = i / pages / groups, g = i / pages % groups, page = i % pages;
            const int block = pos / 128 + g / per;
            if (g * rows >= n || page >= 2 * block) {
                wrong += max[i] != POISON;
                continue;
            }
            const size_t at =
                ((size_t)h * (size_t)p.n_blocks + (size_t)block) * (size_t)p.n_pages + (size_t)page;
            const size_t half = (size_t)HEADS * (size_t)p.n_blocks * (size_t)p.n_pages;
            const float want =
                rows == 64 ? ref[at + (size_t)(g % 2) * half] : fmaxf(ref[at], ref[at + half]);
            worst =
                fmax(worst, fabs((double)of_ordered(max[i]) * (double)w.args.scale - (double)want));
            seen++;
        }
        free(max);
    }
    (void)snprintf(text, sizeof text, "%ld of them, error %.1e, %ld written that should not be",
                   seen, worst, wrong);
    check(worst < 2e-5 && wrong == 0 && seen > 1000, "maxima", text);
    free(ref);
    world_free(&w);
}

/* A threshold that is one of the maxima keeps that page: the kernel decides by the numbers it
 * writes. head_dim 64, whose scale is a power of two. Results are those of the kernel that writes
 * nothing. */
static void test_decides(int dtype, int rows)
{
    const int span[1][2] = {{0, 1024}}, n_blocks = 8, per = 128 / rows, groups = 8 * per;
    const int pages = 16;
    const size_t bytes = (size_t)1024 * HEADS * 64 * 2;
    struct world w;
    struct sm90_counts counts[HEADS];
    float t[HEADS * 8], *dev;
    unsigned long long kept = 0, want = 0;
    char text[120];

    world_make(&w, HEADS, KV_HEADS, 64, dtype, 1, span, 72);
    w.seqs[0].gate_rows = rows;
    int32_t *max = run(&w, SM90_GATE_ABS_MAX, groups, pages);
    for (int i = 0; i < HEADS * n_blocks; i++) {
        const int h = i / n_blocks, block = i % n_blocks;
        const int32_t *of = max + (h * groups + block * per) * pages;
        t[i] = block ? of_ordered(of[(h + block) % (2 * block)]) * w.args.scale : INFINITY;
        want += per == 2 ? 3 : 2; /* on the diagonal */
        for (int g = 0; g < per; g++)
            for (int page = 0; page < 2 * block; page++)
                want += !(of_ordered(of[g * pages + page]) * w.args.scale < t[i]);
    }
    CK(cudaMalloc((void **)&dev, sizeof t));
    CK(cudaMemcpy(dev, t, sizeof t, cudaMemcpyHostToDevice));
    w.seqs[0].t = dev;
    w.args.t_blocks = n_blocks;
    w.args.t_head_stride = n_blocks;
    w.args.head_counts = w.counts;
    CK(cudaMemset(w.counts, 0, sizeof counts));
    CK(cudaMemset(w.out, 0xff, bytes));
    int32_t *again = run(&w, SM90_GATE_ABS_MAX, groups, pages);
    CK(cudaMemcpy(counts, w.counts, sizeof counts, cudaMemcpyDeviceToHost));
    for (int h = 0; h < HEADS; h++)
        kept += counts[h].kept;
    (void)snprintf(text, sizeof text, "kept %llu, want %llu", kept, want);
    check(kept == want, "a threshold equal to a maximum keeps the page:", text);
    check(memcmp(max, again, (size_t)(HEADS * groups * pages) * sizeof *max) == 0,
          "maxima do not depend on what is kept", "");
    void *a = malloc(bytes), *b = malloc(bytes);
    CK(cudaMemcpy(a, w.out, bytes, cudaMemcpyDeviceToHost));
    CK(cudaMemset(w.out, 0xff, bytes));
    check(world_run(&w, SM90_GATE_ABS) == 0, "launch", "");
    CK(cudaMemcpy(b, w.out, bytes, cudaMemcpyDeviceToHost));
    check(memcmp(a, b, bytes) == 0, "outputs are those of the kernel that writes no maxima", "");
    free(a), free(b), free(max), free(again), cudaFree(dev);
    world_free(&w);
}

/* NaN in a row of q: its group's maxima say so, no others do. */
static void test_nan(int d)
{
    const int span[1][2] = {{0, 384}}, pages = 6, groups = 6;
    struct world w;
    long wrong = 0;

    world_make(&w, HEADS, KV_HEADS, d, 0, 1, span, 73);
    w.seqs[0].gate_rows = 64;
    CK(cudaMemset(w.q + (size_t)(200 * HEADS + 1) * (size_t)d, 0xff, 2));
    int32_t *max = run(&w, SM90_GATE_ABS_MAX, groups, pages);
    for (int i = 0; i < HEADS * groups * pages; i++) {
        const int h = i / pages / groups, g = i / pages % groups, page = i % pages;
        if (page < g / 2 * 2)
            wrong += (max[i] == INT_MAX) != (h == 1 && g == 200 / 64);
    }
    check(wrong == 0, "NaN", "");
    free(max);
    world_free(&w);
}

/* The kernels are compiled for compute capability 9.0 alone. */
static int have_hopper(void)
{
    int n = 0, major = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess && n > 0 &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
           major == 9;
}

int main(int argc, char **argv)
{
    if (!have_hopper())
        return 77;
    const int quick = argc > 1 && !strcmp(argv[1], "quick");
    for (int i = 0; i < (quick ? 1 : 8); i++)
        test_values(i & 1 ? 64 : 128, i >> 1 & 1, i & 4 ? 64 : 128);
    for (int i = 0; i < (quick ? 1 : 4); i++)
        test_decides(i & 1, i & 2 ? 64 : 128);
    test_nan(128);
    test_nan(64);
    printf("%d failures\n", failures);
    return failures != 0;
}
