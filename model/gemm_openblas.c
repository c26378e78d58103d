#include "model/gemm.h"

#include "core/mem.h"
#include "core/pool.h"

#include <cblas.h>
#include <errno.h>
#include <stdbool.h>
#include <string.h>

/* OpenBLAS 0.3.21, measured: the AVX-512 kernels treat all rows alike but for a small-matrix path
 * (rows * columns up to 1200 and rows * columns * k up to 10^6), so that tiles go from 8 rows to
 * the largest. The AVX2 (Haswell, Zen) kernel treats the rows of a group of 12 unlike each other;
 * there 16-row tiles of the transposed product remain, at three quarters of the speed. The SSE and
 * AVX kernels treat all rows alike. The panel is wide enough to amortise packing and narrow enough
 * that a few rows still feed several threads. */
enum {
    PANEL = 256,
    PANEL_MIN = 64,
    PANEL_STEP = 16,
    MIN_TILE_BIT = 3,
    GOOD_TILE_BIT = 6,
    MAX_TILE_BIT = 8
};
_Static_assert(1 << MAX_TILE_BIT == GEMM_MAX_TILE, "largest tile");

struct gemm {
    struct pool *pool;
    float *scratch; /* [workers, PANEL, GEMM_MAX_TILE] for transposed products */
};

int gemm_open(struct gemm **out, struct dev *d)
{
    openblas_set_num_threads(1);
    struct gemm *g = mem_zalloc(1, sizeof *g);
    g->pool = d->pool;
    g->scratch = mem_try_aligned((size_t)pool_size(d->pool) * PANEL * GEMM_MAX_TILE, sizeof(float));
    if (!g->scratch) {
        mem_free(g);
        return -ENOMEM;
    }
    *out = g;
    return 0;
}

void gemm_close(struct gemm *g)
{
    if (!g)
        return;
    mem_free(g->scratch);
    mem_free(g);
}

const char *gemm_backend(void)
{
    return openblas_get_corename();
}

static int32_t panel_width(int32_t n)
{
    int32_t panels = n <= PANEL_MIN ? 1 : n <= PANEL ? 2 : (n + PANEL - 1) / PANEL;
    int32_t width = (n + panels - 1) / panels;
    width = (width + PANEL_STEP - 1) / PANEL_STEP * PANEL_STEP;
    return width < n ? width : n;
}

/* y [rows, cols] of row stride n = t [cols, rows], transposed. */
static void transpose(float *y, int32_t n, const float *t, int32_t rows, int32_t cols)
{
    for (int32_t r = 0; r < rows; r++) {
        for (int32_t c = 0; c < cols; c++)
            y[(size_t)r * (size_t)n + (size_t)c] = t[(size_t)c * (size_t)rows + (size_t)r];
    }
}

/* One tile of rows times columns [col, col + cols) of w; scratch is the worker's. */
static void multiply(const struct gemm_plan *p, float *y, const float *x, const float *w,
                     int32_t rows, int32_t col, float *scratch)
{
    const int32_t k = p->k, cols = p->n - col < p->panel ? p->n - col : p->panel;
    w += (size_t)col * (size_t)k;
    if (!p->transposed) {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, cols, k, 1.0f, x, k, w, k, 0.0f,
                    y + col, p->n);
        return;
    }
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, cols, rows, k, 1.0f, w, k, x, k, 0.0f,
                scratch, rows);
    transpose(y + col, p->n, scratch, rows, cols);
}

/* The tile for the next rows: the largest allowed that they fill, else the smallest. */
static int32_t next_tile(const struct gemm_plan *p, int32_t rows)
{
    for (int b = MAX_TILE_BIT; b >= 0; b--) {
        if ((p->tiles & 1u << b) && 1 << b <= rows)
            return 1 << b;
    }
    return p->granule;
}

struct self_check {
    struct gemm_plan *plan;
    const float *x, *w; /* x holds its GEMM_MAX_TILE rows twice, for wrapping around */
    float *want, *got, *scratch;
};

static void multiply_all(const struct self_check *c, float *y, const float *x, int32_t rows)
{
    for (int32_t col = 0; col < c->plan->n; col += c->plan->panel)
        multiply(c->plan, y, x, c->w, rows, col, c->scratch);
}

/* Whether tiles of `tile` rows give the bits of c->want, for rows that start at `offset`. The
 * offset moves every row to another place in its tile and gives it other neighbours. */
static bool tile_agrees(const struct self_check *c, int32_t tile, int32_t offset)
{
    const size_t k = (size_t)c->plan->k, n = (size_t)c->plan->n;
    const int32_t checked = tile < 64 ? 64 : tile; /* rows; all places of a tile occur */

    for (int32_t r = 0; r < checked; r += tile) {
        multiply_all(c, c->got, c->x + (size_t)(offset + r) * k, tile);
        for (int32_t i = 0; i < tile; i++) {
            size_t row = (size_t)((offset + r + i) % GEMM_MAX_TILE);
            if (memcmp(c->got + (size_t)i * n, c->want + row * n, n * sizeof(float)) != 0)
                return false;
        }
    }
    return true;
}

/* Takes tiles of 1 << top rows for the truth; 0 when not even they agree with themselves. An odd
 * offset suffices: were places p and p + 5 (modulo a power of two) alike for all p, all are. */
static uint32_t agreeing_tiles(const struct self_check *c, int top)
{
    const int32_t size = 1 << top;
    uint32_t tiles = 0;
    for (int32_t r = 0; r < GEMM_MAX_TILE; r += size)
        multiply_all(c, c->want + (size_t)r * (size_t)c->plan->n,
                     c->x + (size_t)r * (size_t)c->plan->k, size);
    for (int b = top; b >= MIN_TILE_BIT; b--) {
        if (tile_agrees(c, 1 << b, 0) && tile_agrees(c, 1 << b, 5))
            tiles |= 1u << b;
        else if (b == top)
            break;
    }
    return tiles;
}

/* The tiles of the largest height that can be trusted, in the plan's direction. */
static uint32_t measure_direction(const struct self_check *c, bool transposed)
{
    uint32_t tiles = 0;
    c->plan->transposed = transposed;
    for (int top = MAX_TILE_BIT; top >= MIN_TILE_BIT && tiles == 0; top--)
        tiles = agreeing_tiles(c, top);
    return tiles;
}

static void measure_tiles(const struct self_check *c)
{
    struct gemm_plan *p = c->plan;
    p->tiles = measure_direction(c, false);
    if (p->tiles >> GOOD_TILE_BIT == 0) {
        uint32_t other = measure_direction(c, true);
        p->transposed = other > p->tiles;
        if (p->transposed)
            p->tiles = other;
    }
    if (p->tiles == 0)
        p->tiles = 1;
    p->granule = (int32_t)(p->tiles & -p->tiles);
}

/* Values of an LCG in [-0.5, 0.5): plain numbers with full mantissas show any change of order. */
static void fill_random(float *x, size_t n, uint32_t seed)
{
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(seed >> 8) * 0x1p-24f - 0.5f;
    }
}

/* The check needs only the panel widths that occur: one full panel and the last one. */
static int32_t checked_columns(const struct gemm_plan *p)
{
    int32_t last = p->n % p->panel;
    return p->n <= p->panel ? p->n : p->panel + last;
}

int gemm_plan(const struct gemm *g, struct gemm_plan *plan, int32_t n, int32_t k,
              struct err_msg *why)
{
    *plan = (struct gemm_plan){.n = n, .k = k, .panel = panel_width(n)};
    struct gemm_plan probe = *plan;
    probe.n = checked_columns(plan);
    const size_t rows = GEMM_MAX_TILE;
    const size_t nx = rows * (size_t)k, nw = (size_t)probe.n * (size_t)k,
                 ny = rows * (size_t)probe.n;
    float *buf = mem_try_aligned(2 * nx + nw + 2 * ny, sizeof *buf);
    if (!buf)
        return err_set(why, -ENOMEM, "gemm self-check of [%d, %d]: no memory", n, k);
    struct self_check c = {.plan = &probe,
                           .x = buf,
                           .w = buf + 2 * nx,
                           .want = buf + 2 * nx + nw,
                           .got = buf + 2 * nx + nw + ny,
                           .scratch = g->scratch};
    fill_random(buf, nx, 1);
    memcpy(buf + nx, buf, nx * sizeof *buf);
    fill_random(buf + 2 * nx, nw, 2);
    measure_tiles(&c);
    plan->tiles = probe.tiles;
    plan->granule = probe.granule;
    plan->transposed = probe.transposed;
    mem_free(buf);
    return 0;
}

int32_t gemm_padded_rows(const struct gemm_plan *plan, int32_t rows)
{
    return (rows + plan->granule - 1) / plan->granule * plan->granule;
}

struct gemm_job {
    const struct gemm_plan *plan;
    float *y;
    const float *x, *w;
    float *scratch;
    int32_t rows, n_panels;
};

/* Where tile number `tile` of a product with `rows` rows lies; its size is returned. */
static int32_t locate_tile(const struct gemm_plan *p, int32_t rows, int32_t tile, int32_t *first)
{
    int32_t size = next_tile(p, rows), full = rows / size;
    *first = 0;
    if (tile < full) { /* the run of largest tiles needs no walk */
        *first = tile * size;
        return size;
    }
    *first = full * size;
    for (int32_t i = full;; i++) {
        size = next_tile(p, rows - *first);
        if (i == tile)
            return size;
        *first += size;
    }
}

static int32_t count_tiles(const struct gemm_plan *p, int32_t rows)
{
    int32_t n = 0;
    for (int32_t at = 0; at < rows; n++)
        at += next_tile(p, rows - at);
    return n;
}

static void run_task(void *arg, int task, int worker)
{
    const struct gemm_job *j = arg;
    const struct gemm_plan *p = j->plan;
    int32_t first, size = locate_tile(p, j->rows, task / j->n_panels, &first);
    multiply(p, j->y + (size_t)first * (size_t)p->n, j->x + (size_t)first * (size_t)p->k, j->w,
             size, task % j->n_panels * p->panel,
             j->scratch + (size_t)worker * PANEL * GEMM_MAX_TILE);
}

void gemm_run(const struct gemm *g, const struct gemm_plan *plan, float *y, const float *x,
              const float *w, int32_t rows)
{
    struct gemm_job j = {.plan = plan,
                         .y = y,
                         .x = x,
                         .w = w,
                         .scratch = g->scratch,
                         .rows = rows,
                         .n_panels = (plan->n + plan->panel - 1) / plan->panel};
    pool_run(g->pool, run_task, &j, count_tiles(plan, rows) * j.n_panels);
}
