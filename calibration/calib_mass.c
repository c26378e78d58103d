#include "calibration/calib_mass.h"

#include "calibration/calib_pool.h"
#include "calibration/thresholds.h"
#include "core/mem.h"
#include "core/pool.h"
#include "kvcache/kv_view.h"
#include "model/model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PAGES_PER_BLOCK = KV_BLOCK_TOKENS / KV_PAGE_TOKENS };

struct page {
    float max, mass;
};

struct calib_mass {
    struct calib_config cfg;
    int32_t k[CALIB_MAX_LEVELS];
    double *sums, *sample; /* [n_levels, n_layers, n_heads] */
    int64_t n_groups;      /* row groups in sums, of each head */
    struct page *scratch;  /* [workers, pages] */
};

int32_t calib_mass_candidates(int32_t k[CALIB_MAX_LEVELS], int32_t n_blocks)
{
    const int32_t n = calib_pool_grid(k, NULL, 0, n_blocks);
    if (n == 0)
        k[0] = 1; /* no block has two pages to choose from */
    return n > 0 ? n : 1;
}

static size_t n_sums(const struct calib_config *c)
{
    return (size_t)c->n_levels * (size_t)c->n_layers * (size_t)c->n_heads;
}

void calib_mass_create(struct calib_mass **out, const struct calib_config *cfg)
{
    struct calib_mass *m = mem_zalloc(1, sizeof *m);
    const size_t workers = cfg->pool ? (size_t)pool_size(cfg->pool) : 1;
    ASSERT(cfg->n_levels > 0 && cfg->n_levels <= CALIB_MAX_LEVELS && cfg->n_blocks > 0);
    m->cfg = *cfg;
    memcpy(m->k, cfg->k, (size_t)cfg->n_levels * sizeof *m->k);
    m->cfg.k = m->k;
    m->sums = mem_zalloc(n_sums(cfg), sizeof *m->sums);
    m->sample = mem_zalloc(n_sums(cfg), sizeof *m->sample);
    m->scratch = mem_zalloc(workers * (size_t)cfg->n_blocks, PAGES_PER_BLOCK * sizeof *m->scratch);
    *out = m;
}

void calib_mass_destroy(struct calib_mass *m)
{
    if (!m)
        return;
    mem_free(m->sums);
    mem_free(m->sample);
    mem_free(m->scratch);
    mem_free(m);
}

/* ---- one chunk ------------------------------------------------------------------------------ */

struct chunk {
    struct calib_mass *m;
    const struct model_mass *tiles;
};

/* Of two equal maxima the one with less mass first: what is lost is not made to look smaller. */
static int by_max(const void *a, const void *b)
{
    const struct page *x = a, *y = b;
    if (x->max != y->max)
        return x->max < y->max ? 1 : -1;
    return (x->mass > y->mass) - (x->mass < y->mass);
}

/* Adds what one row group loses at every candidate; lost [n_levels] are `stride` apart. */
static void add_group(const struct calib_mass *m, struct page *pages, int32_t n, double *lost,
                      size_t stride)
{
    double left = 0; /* mass of the pages from `rank` on */
    int32_t rank = n;
    qsort(pages, (size_t)n, sizeof *pages, by_max);
    for (int32_t s = m->cfg.n_levels; s-- > 0;) {
        for (; rank > m->k[s]; rank--)
            left += (double)pages[rank - 1].mass;
        lost[(size_t)s * stride] += left;
    }
}

static void add_head(void *arg, int head, int worker)
{
    const struct chunk *ch = arg;
    const struct calib_mass *m = ch->m;
    const struct model_mass *t = ch->tiles;
    const int32_t halves = KV_BLOCK_TOKENS / m->cfg.gate_rows;
    const size_t rows = (size_t)m->cfg.n_layers * (size_t)m->cfg.n_heads;
    struct page *pages = m->scratch + (size_t)worker * (size_t)m->cfg.n_blocks * PAGES_PER_BLOCK;
    double *lost = m->sample + (size_t)t->layer * (size_t)m->cfg.n_heads + (size_t)head;
    for (int32_t g = 0; g < t->n_tokens / KV_BLOCK_TOKENS * halves; g++) { /* of full blocks */
        const size_t at = ((size_t)head * (size_t)t->n_groups + (size_t)g) * (size_t)t->n_pages;
        const int32_t n = (t->pos / KV_BLOCK_TOKENS + g / halves) * PAGES_PER_BLOCK;
        for (int32_t j = 0; j < n; j++)
            pages[j] = (struct page){t->max[at + (size_t)j], t->mass[at + (size_t)j]};
        add_group(m, pages, n, lost, rows);
    }
}

void calib_mass_tiles(struct calib_mass *m, const struct model_mass *tiles)
{
    struct chunk ch = {m, tiles};
    ASSERT(tiles->layer >= 0 && tiles->layer < m->cfg.n_layers);
    ASSERT(tiles->pos % KV_BLOCK_TOKENS == 0);
    ASSERT((tiles->pos + tiles->n_tokens) / KV_BLOCK_TOKENS <= m->cfg.n_blocks);
    if (m->cfg.pool) {
        pool_run(m->cfg.pool, add_head, &ch, m->cfg.n_heads);
        return;
    }
    for (int32_t h = 0; h < m->cfg.n_heads; h++)
        add_head(&ch, h, 0);
}

double *calib_mass_sample(struct calib_mass *m)
{
    return m->sample;
}

int calib_mass_end_sample(struct calib_mass *m, int32_t n_tokens, struct err_msg *why)
{
    const size_t n = n_sums(&m->cfg);
    bool finite = true;
    for (size_t i = 0; i < n; i++)
        finite = finite && isfinite(m->sample[i]);
    for (size_t i = 0; finite && i < n; i++)
        m->sums[i] += m->sample[i];
    if (finite)
        m->n_groups += (int64_t)(n_tokens / KV_BLOCK_TOKENS) * (KV_BLOCK_TOKENS / m->cfg.gate_rows);
    memset(m->sample, 0, n * sizeof *m->sample);
    return finite ? 0 : err_set(why, ERR_NUMERIC, "a page's softmax mass is NaN or infinite");
}

/* ---- choosing ------------------------------------------------------------------------------- */

/* Mean mass lost at candidate s. */
static double lost_at(const struct calib_mass *m, int32_t head, int32_t s)
{
    const size_t rows = (size_t)m->cfg.n_layers * (size_t)m->cfg.n_heads;
    const int64_t n = m->n_groups > 0 ? m->n_groups : 1;
    return m->sums[(size_t)s * rows + (size_t)head] / (double)n;
}

double calib_mass_lost(const struct calib_mass *m, int32_t head, int32_t k)
{
    const int32_t n = m->cfg.n_levels;
    int32_t s = 0;
    while (s < n && m->k[s] < k)
        s++;
    if (s == n)
        return lost_at(m, head, n - 1);
    if (s == 0 || m->k[s] == k)
        return lost_at(m, head, s);
    const double share = (double)(k - m->k[s - 1]) / (m->k[s] - m->k[s - 1]);
    return lost_at(m, head, s - 1) * (1 - share) + lost_at(m, head, s) * share;
}

void calib_mass_choose(const struct calib_mass *m, double density, int64_t n_tokens,
                       int32_t *head_k)
{
    const int32_t rows = m->cfg.n_layers * m->cfg.n_heads, n = m->cfg.n_levels;
    double cost[CALIB_MAX_LEVELS] = {0};
    double *lost = mem_zalloc((size_t)rows * (size_t)n, sizeof *lost);
    for (int32_t s = 0; s < n; s++)
        cost[s] = thresholds_predicted_density(m->k[s], n_tokens, m->cfg.gate_rows);
    for (int32_t i = 0; i < rows * n; i++)
        lost[i] = lost_at(m, i / n, i % n);
    calib_budget(cost, lost, rows, n, density * rows, head_k);
    for (int32_t i = 0; i < rows; i++)
        head_k[i] = m->k[head_k[i]];
    mem_free(lost);
}

/* From cost[at - 1] to cost[at] in one row. */
struct step {
    double gain; /* per unit of cost, on the convex hull */
    int32_t row, at;
};

/* A row's steps in their order, then rows in theirs. */
static int by_gain(const void *a, const void *b)
{
    const struct step *x = a, *y = b;
    if (x->gain != y->gain)
        return x->gain < y->gain ? 1 : -1;
    if (x->at != y->at)
        return x->at < y->at ? -1 : 1;
    return (x->row > y->row) - (x->row < y->row);
}

/* The n - 1 steps of a row: those that gain more than the one before share their mean with it. */
static void make_steps(const double *cost, const double *lost, int32_t row, int32_t n,
                       struct step *steps)
{
    int32_t first[CALIB_MAX_LEVELS], runs = 0; /* step that a run of equal gain begins with */
    double gain[CALIB_MAX_LEVELS];
    for (int32_t i = 1; i < n; i++) {
        first[runs] = i;
        gain[runs++] = (lost[i - 1] - lost[i]) / (cost[i] - cost[i - 1]);
        for (; runs > 1 && gain[runs - 1] > gain[runs - 2]; runs--) {
            const int32_t from = first[runs - 2] - 1;
            gain[runs - 2] = (lost[from] - lost[i]) / (cost[i] - cost[from]);
        }
    }
    for (int32_t i = 1, r = 0; i < n; i++) {
        r += r + 1 < runs && first[r + 1] == i;
        steps[i - 1] = (struct step){gain[r], row, i};
    }
}

void calib_budget(const double *cost, const double *lost, int32_t n_rows, int32_t n, double budget,
                  int32_t *pick)
{
    const size_t n_steps = (size_t)n_rows * (size_t)(n - 1);
    struct step *steps = mem_zalloc(n_steps + 1, sizeof *steps);
    double left = budget - n_rows * cost[0];
    ASSERT(n >= 1 && n <= CALIB_MAX_LEVELS);
    for (int32_t r = 0; r < n_rows; r++) {
        pick[r] = 0;
        make_steps(cost, lost + (size_t)r * (size_t)n, r, n, steps + (size_t)r * (size_t)(n - 1));
    }
    qsort(steps, n_steps, sizeof *steps, by_gain);
    for (size_t i = 0; i < n_steps; i++) {
        const struct step *s = &steps[i];
        const double price = cost[s->at] - cost[s->at - 1];
        if (left < price / 2) /* without it is nearer */
            break;
        pick[s->row] = s->at;
        left -= price;
    }
    mem_free(steps);
}
