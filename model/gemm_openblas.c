#include "model/gemm.h"

#include "core/mem.h"
#include "core/pool.h"

#include <cblas.h>
#include <errno.h>
#include <stdbool.h>
#include <string.h>

/* On the AVX-512 kernels of OpenBLAS 0.3.21 the one source of differing bits is the small-matrix
 * path (rows * columns up to 1200 and rows * columns * k up to 10^6): the granule is 8 rows from
 * panels of 160 columns on, more for narrower ones. The panel is wide enough to amortise packing
 * and narrow enough that a few rows still feed several threads. */
enum { PANEL = 256, PANEL_MIN = 64, PANEL_STEP = 16, MIN_TILE_BIT = 3, MAX_TILE_BIT = 8 };
_Static_assert(1 << MAX_TILE_BIT == GEMM_MAX_TILE, "largest tile");

struct gemm {
    struct pool *pool;
};

int gemm_open(struct gemm **out, struct dev *d)
{
    openblas_set_num_threads(1);
    *out = mem_zalloc(1, sizeof **out);
    (*out)->pool = d->pool;
    return 0;
}

void gemm_close(struct gemm *g)
{
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

/* One tile of rows times columns [col, col + cols) of w. */
static void multiply(const struct gemm_plan *p, float *y, const float *x, const float *w,
                     int32_t rows, int32_t col)
{
    int32_t cols = p->n - col < p->panel ? p->n - col : p->panel;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, cols, p->k, 1.0f, x, p->k,
                w + (size_t)col * (size_t)p->k, p->k, 0.0f, y + col, p->n);
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
    float *want, *got;
};

/* Whether tiles of `tile` rows give the bits of c->want, for rows that start at `offset`. The
 * offset moves every row to another place in its tile and gives it other neighbours. */
static bool tile_agrees(const struct self_check *c, int32_t tile, int32_t offset)
{
    const struct gemm_plan *p = c->plan;
    const int32_t checked = tile < 64 ? 64 : tile; /* rows; all places of a tile occur */
    const size_t row_bytes = (size_t)p->n * sizeof(float);

    for (int32_t r = 0; r < checked; r += tile) {
        for (int32_t col = 0; col < p->n; col += p->panel)
            multiply(p, c->got, c->x + (size_t)(offset + r) * (size_t)p->k, c->w, tile, col);
        for (int32_t i = 0; i < tile; i++) {
            int32_t row = (offset + r + i) % GEMM_MAX_TILE;
            if (memcmp(c->got + (size_t)i * (size_t)p->n, c->want + (size_t)row * (size_t)p->n,
                       row_bytes) != 0)
                return false;
        }
    }
    return true;
}

static void measure_tiles(const struct self_check *c)
{
    struct gemm_plan *p = c->plan;
    for (int32_t col = 0; col < p->n; col += p->panel)
        multiply(p, c->want, c->x, c->w, GEMM_MAX_TILE, col);
    for (int b = MAX_TILE_BIT; b >= MIN_TILE_BIT; b--) {
        if (tile_agrees(c, 1 << b, 0) && tile_agrees(c, 1 << b, 5))
            p->tiles |= 1u << b;
        else if (b == MAX_TILE_BIT)
            break; /* the reference depends on a row's place: no tile can be trusted */
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
    (void)g;
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
                           .got = buf + 2 * nx + nw + ny};
    fill_random(buf, nx, 1);
    memcpy(buf + nx, buf, nx * sizeof *buf);
    fill_random(buf + 2 * nx, nw, 2);
    measure_tiles(&c);
    plan->tiles = probe.tiles;
    plan->granule = probe.granule;
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
    (void)worker;
    multiply(p, j->y + (size_t)first * (size_t)p->n, j->x + (size_t)first * (size_t)p->k, j->w,
             size, task % j->n_panels * p->panel);
}

void gemm_run(const struct gemm *g, const struct gemm_plan *plan, float *y, const float *x,
              const float *w, int32_t rows)
{
    struct gemm_job j = {.plan = plan,
                         .y = y,
                         .x = x,
                         .w = w,
                         .rows = rows,
                         .n_panels = (plan->n + plan->panel - 1) / plan->panel};
    pool_run(g->pool, run_task, &j, count_tiles(plan, rows) * j.n_panels);
}
