#include "calibration/calib_pool.h"

#include "core/mem.h"
#include "core/pool.h"
#include "kvcache/kv_view.h"

#include <errno.h>
#include <math.h>
#include <string.h>

enum { PAGES_PER_BLOCK = KV_BLOCK_TOKENS / KV_PAGE_TOKENS, BISECTIONS = 48 };

struct calib_pool {
    struct calib_config cfg;
    int32_t k[CALIB_MAX_LEVELS]; /* ranks of the grid */
    int32_t max_samples, n_samples;
    int32_t *n_blocks; /* [max_samples] that a sample fills */
    float **samples;   /* [max_samples] of [n_layers, n_heads, n_blocks, ranks] */
};

int32_t calib_pool_grid(int32_t grid[CALIB_MAX_LEVELS], const int32_t *k, int32_t n,
                        int32_t n_blocks)
{
    const int32_t most = PAGES_PER_BLOCK * (n_blocks - 1) - 1;
    const int32_t steps = CALIB_MAX_LEVELS - n;
    int32_t n_grid = 0;
    for (int32_t i = 0, taken = 0, last = 0; i < steps || taken < n;) {
        /* from 1 to `most` in equal ratios, but at least one further each time */
        double at = steps > 1 ? pow(most > 1 ? most : 1, (double)i / (steps - 1)) : 1;
        int32_t rank = (int32_t)lround(at);
        rank = rank > last ? rank : last + 1;
        if (taken < n && (i >= steps || k[taken] <= rank)) {
            i += k[taken] == rank;
            rank = k[taken++];
        } else {
            i++;
            if (rank > most)
                continue;
        }
        grid[n_grid++] = last = rank;
    }
    return n_grid;
}

int calib_pool_create(struct calib_pool **out, const struct calib_config *cfg, int32_t max_samples,
                      struct err_msg *why)
{
    struct calib_pool *p = mem_zalloc(1, sizeof *p);
    ASSERT(max_samples > 0 && cfg->n_levels <= CALIB_MAX_LEVELS);
    p->cfg = *cfg;
    memcpy(p->k, cfg->k, (size_t)cfg->n_levels * sizeof *p->k);
    p->max_samples = max_samples;
    p->n_blocks = mem_try_aligned((size_t)max_samples, sizeof *p->n_blocks);
    p->samples = (float **)mem_try_aligned((size_t)max_samples, sizeof *p->samples);
    if (!p->n_blocks || !p->samples) {
        calib_pool_destroy(p);
        return err_set(why, -ENOMEM, "calibration: no memory for %d samples", max_samples);
    }
    *out = p;
    return 0;
}

void calib_pool_destroy(struct calib_pool *p)
{
    if (!p)
        return;
    for (int32_t i = 0; p->samples && i < p->n_samples; i++)
        mem_free(p->samples[i]);
    mem_free((void *)p->samples);
    mem_free(p->n_blocks);
    mem_free(p);
}

/* Ranks become the fastest index: they are read together. */
int calib_pool_add(struct calib_pool *p, const double *sample, int32_t n_tokens)
{
    const size_t n = (size_t)p->cfg.n_levels;
    const size_t cells = (size_t)p->cfg.n_layers * (size_t)p->cfg.n_heads * (size_t)p->cfg.n_blocks;
    ASSERT(p->n_samples < p->max_samples);
    float *v = mem_try_aligned(cells, n * sizeof *v);
    if (!v)
        return -ENOMEM;
    for (size_t i = 0; i < cells; i++) {
        for (size_t s = 0; s < n; s++)
            v[i * n + s] = (float)sample[s * cells + i];
    }
    p->n_blocks[p->n_samples] = n_tokens / KV_BLOCK_TOKENS;
    p->samples[p->n_samples++] = v;
    return 0;
}

/* ---- one threshold -------------------------------------------------------------------------- */

/* Pages that a sample keeps at threshold t, of a block with `pages` of them: v[m] keeps k[m] for
 * the n ranks less than `pages`. Linear between those, and beyond them as steep as next to them. */
static double kept_at(const float *v, const int32_t *k, int32_t n, int32_t pages, double t)
{
    int32_t lo = 0, hi = n; /* v[lo - 1] > t >= v[hi] at the end, where there are such */
    while (lo < hi) {
        int32_t mid = (lo + hi) / 2;
        if ((double)v[mid] > t)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo > 0 && lo < n) {
        const double span = (double)v[lo - 1] - (double)v[lo];
        return k[lo] - (k[lo] - k[lo - 1]) * (t - (double)v[lo]) / span;
    }
    const int32_t a = lo == 0 ? 0 : n - 1, b = lo == 0 ? 1 : n - 2; /* the end, its neighbour */
    double slope = 0;
    if (n > 1)
        slope = (k[a] - k[b]) / ((double)v[a] - (double)v[b]);
    double kept = isfinite(slope) ? k[a] + slope * (t - (double)v[a]) : k[a];
    if (kept < 0)
        return 0;
    return kept < pages ? kept : pages;
}

struct job {
    const struct calib_pool *p;
    const int32_t *k;
    int32_t n;
    int32_t filled;
    float *t;
};

/* Pages that all samples which fill the block keep at t, less k each. */
static double excess(const struct job *j, size_t row, int32_t block, int32_t k, double t)
{
    const struct calib_pool *p = j->p;
    const int32_t pages = calib_available(p->cfg.gate_rows, block);
    const size_t n = (size_t)p->cfg.n_levels;
    int32_t ranks = 0;
    double sum = 0;
    while (ranks < p->cfg.n_levels && p->k[ranks] < pages)
        ranks++;
    for (int32_t i = 0; i < p->n_samples; i++) {
        const float *v = p->samples[i] + (row * (size_t)p->cfg.n_blocks + (size_t)block) * n;
        if (block < p->n_blocks[i])
            sum += kept_at(v, p->k, ranks, pages, t) - k;
    }
    return sum;
}

/* The threshold of one block lies between the samples' own. */
static double solve(const struct job *j, size_t row, int32_t block, int32_t level)
{
    const struct calib_pool *p = j->p;
    const int32_t k = j->k[level];
    double lo = INFINITY, hi = -INFINITY;
    int32_t at = 0;
    while (at < p->cfg.n_levels && p->k[at] < k)
        at++;
    ASSERT(at < p->cfg.n_levels && p->k[at] == k);
    for (int32_t i = 0; i < p->n_samples; i++) {
        const size_t cell = row * (size_t)p->cfg.n_blocks + (size_t)block;
        const double own = (double)p->samples[i][cell * (size_t)p->cfg.n_levels + (size_t)at];
        if (block >= p->n_blocks[i])
            continue;
        lo = own < lo ? own : lo;
        hi = own > hi ? own : hi;
    }
    for (int i = 0; i < BISECTIONS && lo < hi; i++) {
        const double mid = (lo + hi) / 2;
        if (excess(j, row, block, k, mid) > 0)
            lo = mid;
        else
            hi = mid;
    }
    return (lo + hi) / 2;
}

static void solve_row(void *arg, int row, int worker)
{
    const struct job *j = arg;
    const int32_t n_blocks = j->p->cfg.n_blocks;
    const size_t rows = (size_t)j->p->cfg.n_layers * (size_t)j->p->cfg.n_heads;
    (void)worker;
    for (int32_t s = 0; s < j->n; s++) {
        float *t = j->t + ((size_t)s * rows + (size_t)row) * (size_t)n_blocks;
        for (int32_t i = 0; i < n_blocks; i++) {
            if (i >= j->filled)
                t[i] = t[j->filled - 1];
            else if (calib_available(j->p->cfg.gate_rows, i) <= j->k[s])
                t[i] = -INFINITY;
            else
                t[i] = (float)solve(j, (size_t)row, i, s);
        }
    }
}

int calib_pool_thresholds(const struct calib_pool *p, const int32_t *k, int32_t n, float *t,
                          struct err_msg *why)
{
    struct job j = {.p = p, .k = k, .n = n, .t = t};
    const int rows = p->cfg.n_layers * p->cfg.n_heads;
    for (int32_t i = 0; i < p->n_samples; i++)
        j.filled = p->n_blocks[i] > j.filled ? p->n_blocks[i] : j.filled;
    if (j.filled == 0)
        return err_set(why, ERR_INVALID, "calibration: no sample has %d tokens", KV_BLOCK_TOKENS);
    if (p->cfg.pool) {
        pool_run(p->cfg.pool, solve_row, &j, rows);
        return 0;
    }
    for (int row = 0; row < rows; row++)
        solve_row(&j, row, 0);
    return 0;
}

/* ---- smoothing ------------------------------------------------------------------------------ */

/* Pool adjacent violators: runs of blocks that share their mean, each mean above the one before. */
static void smooth_row(float *t, int32_t n, double *mean, int32_t *len)
{
    int32_t runs = 0, at = 0;
    for (int32_t i = 0; i < n; i++) {
        mean[runs] = (double)t[i];
        len[runs++] = 1;
        while (runs > 1 && mean[runs - 2] > mean[runs - 1]) {
            const int32_t a = len[runs - 2], b = len[runs - 1];
            mean[runs - 2] = (mean[runs - 2] * a + mean[runs - 1] * b) / (a + b);
            len[runs - 2] = a + b;
            runs--;
        }
    }
    for (int32_t r = 0; r < runs; r++) {
        for (int32_t i = 0; i < len[r]; i++)
            t[at++] = (float)mean[r];
    }
}

void calib_smooth(float *t, int64_t n_rows, int32_t n_blocks, int32_t first)
{
    const int32_t n = n_blocks - first;
    if (n <= 1)
        return;
    double *mean = mem_zalloc((size_t)n, sizeof *mean);
    int32_t *len = mem_zalloc((size_t)n, sizeof *len);
    for (int64_t r = 0; r < n_rows; r++)
        smooth_row(t + r * n_blocks + first, n, mean, len);
    mem_free(mean);
    mem_free(len);
}
