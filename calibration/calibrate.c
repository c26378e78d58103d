#include "calibration/calibrate.h"

#include "calibration/calib_device.h"
#include "core/mem.h"
#include "core/pool.h"
#include "kvcache/kv_view.h"

#include <errno.h>
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

enum { PAGES_PER_BLOCK = KV_BLOCK_TOKENS / KV_PAGE_TOKENS };

struct calib {
    struct calib_config cfg;
    int32_t k[CALIB_MAX_LEVELS];
    double *sums;                /* [n_levels, n_layers, n_heads, n_blocks] */
    double *sample;              /* the same of the current sample; where k leaves a choice */
    int32_t *n_samples;          /* [n_blocks] that filled the block */
    struct calib_device *device; /* NULL: maxima come to the host */
    float *scratch;              /* [workers, pages] */
    int32_t scratch_len;
    atomic_bool not_finite;
};

static int check_config(const struct calib_config *c, struct err_msg *why)
{
    if (c->n_layers < 1 || c->n_heads < 1) {
        return err_set(why, ERR_INVALID, "calibration: %d layers, %d heads", c->n_layers,
                       c->n_heads);
    }
    if (c->n_blocks < 1)
        return err_set(why, ERR_INVALID, "calibration: no sample has %d tokens", KV_BLOCK_TOKENS);
    if (c->gate_rows != 128 && c->gate_rows != 64 && (c->gate_rows != 1 || c->dev)) {
        return err_set(why, ERR_INVALID,
                       "calibration: gate_rows is %d, must be 128, 64 or, on the CPU, 1",
                       c->gate_rows);
    }
    if (c->n_levels < 1 || c->n_levels > CALIB_MAX_LEVELS) {
        return err_set(why, ERR_INVALID, "calibration: %d levels, must be 1 to %d", c->n_levels,
                       CALIB_MAX_LEVELS);
    }
    for (int32_t i = 0; i < c->n_levels; i++) {
        if (c->k[i] < 1 || (i > 0 && c->k[i] <= c->k[i - 1])) {
            return err_set(why, ERR_INVALID, "calibration: k[%d] = %d: not positive and increasing",
                           i, c->k[i]);
        }
    }
    return 0;
}

static size_t n_sums(const struct calib_config *c)
{
    return (size_t)c->n_levels * (size_t)c->n_layers * (size_t)c->n_heads * (size_t)c->n_blocks;
}

int calib_create(struct calib **out, const struct calib_config *cfg, struct err_msg *why)
{
    TRY(check_config(cfg, why));
    struct calib *c = mem_zalloc(1, sizeof *c);
    size_t workers = cfg->pool ? (size_t)pool_size(cfg->pool) : 1;
    c->cfg = *cfg;
    memcpy(c->k, cfg->k, (size_t)cfg->n_levels * sizeof *c->k);
    c->cfg.k = c->k;
    c->scratch_len = cfg->n_blocks * PAGES_PER_BLOCK;
    c->sums = mem_try_aligned(n_sums(cfg), sizeof *c->sums);
    c->sample = mem_try_aligned(n_sums(cfg), sizeof *c->sample);
    c->n_samples = mem_try_aligned((size_t)cfg->n_blocks, sizeof *c->n_samples);
    c->scratch = mem_try_aligned(workers * (size_t)c->scratch_len, sizeof *c->scratch);
    int err = 0;
    if (!c->sums || !c->sample || !c->n_samples || !c->scratch)
        err = err_set(why, -ENOMEM, "calibration: no memory for %zu sums", n_sums(cfg));
    else if (cfg->dev)
        err = calib_device_create(&c->device, &c->cfg, why);
    if (err < 0) {
        calib_destroy(c);
        return err;
    }
    *out = c;
    return 0;
}

void calib_destroy(struct calib *c)
{
    if (!c)
        return;
    calib_device_destroy(c->device);
    mem_free(c->sums);
    mem_free(c->sample);
    mem_free(c->n_samples);
    mem_free(c->scratch);
    mem_free(c);
}

/* ---- selection ------------------------------------------------------------------------------ */

static float median3(float a, float b, float c)
{
    if (a > b) {
        float t = a;
        a = b;
        b = t;
    }
    return c < a ? a : c > b ? b : c;
}

/* Splits v[0, n) into greater than the pivot, equal, less; *n_greater and *n_less get the sizes.
 * Three ways, for filler text repeats and with it the maxima. */
static void partition(float *v, int32_t n, int32_t *n_greater, int32_t *n_less)
{
    const float pivot = median3(v[0], v[n / 2], v[n - 1]);
    int32_t lo = 0, i = 0, hi = n;
    while (i < hi) {
        float x = v[i];
        if (x > pivot) {
            v[i++] = v[lo];
            v[lo++] = x;
        } else if (x < pivot) {
            v[i] = v[--hi];
            v[hi] = x;
        } else {
            i++;
        }
    }
    *n_greater = lo;
    *n_less = n - hi;
}

/* Puts the element of rank `at` (0: the largest) in its place, none smaller before it, none larger
 * behind it. */
static void quickselect(float *v, int32_t n, int32_t at)
{
    while (n > 1) {
        int32_t n_greater, n_less;
        partition(v, n, &n_greater, &n_less);
        if (at < n_greater) {
            n = n_greater;
        } else if (at >= n - n_less) {
            v += n - n_less;
            at -= n - n_less;
            n = n_less;
        } else {
            return;
        }
    }
}

/* From the largest rank down: what is in place, v[r - 1] and behind, the next selection leaves
 * alone. */
void calib_select(float *v, int32_t n, const int32_t *ranks, int32_t n_ranks)
{
    for (int32_t i = n_ranks; i-- > 0;) {
        const int32_t r = ranks[i];
        int32_t least = r - 1;
        if (r < n) /* else v[r] is the v[r' - 1] of the rank before */
            quickselect(v, n, r);
        for (int32_t j = 0; j < r; j++)
            least = v[j] < v[least] ? j : least;
        float x = v[least];
        v[least] = v[r - 1];
        v[r - 1] = x;
        n = r - 1;
    }
}

/* ---- one chunk ------------------------------------------------------------------------------ */

struct chunk {
    struct calib *c;
    int layer;
    int32_t first_block, n_blocks; /* full ones */
    const float *max;
    int32_t n_groups, n_pages;
};

static double *sample_at(const struct calib *c, int32_t level, int layer, int32_t head,
                         int32_t block)
{
    size_t at = ((size_t)level * (size_t)c->cfg.n_layers + (size_t)layer) * (size_t)c->cfg.n_heads;
    return c->sample + (at + (size_t)head) * (size_t)c->cfg.n_blocks + (size_t)block;
}

/* The midpoints of one of the block's `halves` row groups (1: the whole block). */
static void add_group(const struct chunk *ch, int32_t head, int32_t block, const float *max,
                      int32_t half, int32_t halves, float *v)
{
    struct calib *c = ch->c;
    const int32_t available = block * PAGES_PER_BLOCK;
    int32_t n = 0;
    for (int32_t j = 0; j < available; j++) {
        if (!isfinite(max[j])) {
            atomic_store_explicit(&c->not_finite, true, memory_order_relaxed);
            return;
        }
        v[j] = max[j];
    }
    while (n < c->cfg.n_levels && c->k[n] < available)
        n++;
    calib_select(v, available, c->k, n);
    for (int32_t s = 0; s < n; s++) {
        double mid = ((double)v[c->k[s] - 1] + (double)v[c->k[s]]) / 2 / halves;
        double *t = sample_at(c, s, ch->layer, head, block);
        *t = half > 0 ? *t + mid : mid;
    }
}

static void add_head(void *arg, int head, int worker)
{
    const struct chunk *ch = arg;
    const struct calib *c = ch->c;
    const int32_t per_block = KV_BLOCK_TOKENS / c->cfg.gate_rows;
    float *v = c->scratch + (size_t)worker * (size_t)c->scratch_len;
    for (int32_t i = 0; i < ch->n_blocks; i++) {
        for (int32_t half = 0; half < per_block; half++) {
            size_t group = (size_t)head * (size_t)ch->n_groups + (size_t)(i * per_block + half);
            const float *max = ch->max + group * (size_t)ch->n_pages;
            add_group(ch, head, ch->first_block + i, max, half, per_block, v);
        }
    }
}

void calib_tiles(void *calib, int layer, int32_t pos, int32_t n_tokens, const float *max,
                 int32_t n_groups, int32_t n_pages)
{
    struct calib *c = calib;
    struct chunk ch = {.c = c,
                       .layer = layer,
                       .first_block = pos / KV_BLOCK_TOKENS,
                       .n_blocks = n_tokens / KV_BLOCK_TOKENS,
                       .max = max,
                       .n_groups = n_groups,
                       .n_pages = n_pages};
    ASSERT(layer >= 0 && layer < c->cfg.n_layers && pos % KV_BLOCK_TOKENS == 0);
    ASSERT(c->cfg.gate_rows > 1);
    ASSERT(ch.first_block + ch.n_blocks <= c->cfg.n_blocks);
    ASSERT(ch.n_blocks == 0 || (ch.first_block + ch.n_blocks - 1) * PAGES_PER_BLOCK <= n_pages);
    if (c->cfg.pool) {
        pool_run(c->cfg.pool, add_head, &ch, c->cfg.n_heads);
        return;
    }
    for (int32_t h = 0; h < c->cfg.n_heads; h++)
        add_head(&ch, h, 0);
}

/* ---- single rows ---------------------------------------------------------------------------- */

struct rows {
    struct calib *c;
    int layer;
    int32_t pos, n_rows, n_pages;
    int32_t n_blocks; /* that the sample fills with the last of them */
    const float *max;
};

/* `want` of n pages, evenly spread, the first and the last among them. */
static void thin(float *v, int32_t want, const float *max, int32_t n)
{
    for (int64_t j = 0; j < want; j++)
        v[j] = max[want > 1 ? (j * (n - 1) + (want - 1) / 2) / (want - 1) : n - 1];
}

/* A row's part of the midpoints of one block. */
static void add_row(const struct rows *x, int32_t head, int32_t block, int32_t row, float *v)
{
    struct calib *c = x->c;
    const size_t at = (size_t)head * (size_t)x->n_rows + (size_t)row;
    const int32_t available = calib_available(1, block);
    int32_t n = 0;
    while (n < c->cfg.n_levels && c->k[n] < available)
        n++;
    thin(v, available, x->max + at * (size_t)x->n_pages, (x->pos + row) / KV_PAGE_TOKENS);
    calib_select(v, available, c->k, n);
    for (int32_t s = 0; s < n; s++) {
        double mid = ((double)v[c->k[s] - 1] + (double)v[c->k[s]]) / 2 / x->n_rows;
        double *t = sample_at(c, s, x->layer, head, block);
        *t = row > 0 ? *t + mid : mid;
    }
}

static void add_rows(void *arg, int head, int worker)
{
    const struct rows *x = arg;
    float *v = x->c->scratch + (size_t)worker * (size_t)x->c->scratch_len;
    for (int32_t r = 0; r < x->n_rows; r++) {
        const size_t at = (size_t)head * (size_t)x->n_rows + (size_t)r;
        const float *max = x->max + at * (size_t)x->n_pages;
        for (int32_t j = 0; j < (x->pos + r) / KV_PAGE_TOKENS; j++) {
            if (!isfinite(max[j])) {
                atomic_store_explicit(&x->c->not_finite, true, memory_order_relaxed);
                return;
            }
        }
    }
    for (int32_t i = 0; i < x->n_blocks; i++) {
        for (int32_t r = 0; r < x->n_rows; r++)
            add_row(x, head, i, r, v);
    }
}

void calib_rows(void *calib, int layer, int32_t pos, int32_t n_rows, const float *max,
                int32_t n_groups, int32_t n_pages)
{
    struct calib *c = calib;
    struct rows x = {.c = c,
                     .layer = layer,
                     .pos = pos,
                     .n_rows = n_rows,
                     .n_pages = n_pages,
                     .n_blocks = (pos + n_rows) / KV_BLOCK_TOKENS,
                     .max = max};
    ASSERT(c->cfg.gate_rows == 1 && layer >= 0 && layer < c->cfg.n_layers);
    ASSERT(n_rows >= 1 && n_rows <= CALIB_MAX_ROWS && n_groups == n_rows);
    ASSERT(x.n_blocks <= c->cfg.n_blocks && (pos + n_rows - 1) / KV_PAGE_TOKENS <= n_pages);
    if (c->cfg.pool) {
        pool_run(c->cfg.pool, add_rows, &x, c->cfg.n_heads);
        return;
    }
    for (int32_t h = 0; h < c->cfg.n_heads; h++)
        add_rows(&x, h, 0);
}

int calib_tiles_dev(void *calib, const struct model_tiles *tiles)
{
    struct calib *c = calib;
    return calib_device_tiles(c->device, tiles);
}

bool calib_on_device(const struct calib *c)
{
    return c->device != NULL;
}

/* First block of which level s leaves pages out. */
static int32_t first_gated(const struct calib *c, int32_t s)
{
    return calib_first_gated(c->cfg.gate_rows, c->k[s]);
}

/* Whether all midpoints of a sample of n full blocks are numbers. */
static bool sample_is_finite(const struct calib *c, int32_t n)
{
    const size_t rows = (size_t)c->cfg.n_layers * (size_t)c->cfg.n_heads;
    for (int32_t s = 0; s < c->cfg.n_levels; s++) {
        for (size_t r = 0; r < rows; r++) {
            const double *t = c->sample + ((size_t)s * rows + r) * (size_t)c->cfg.n_blocks;
            for (int32_t i = first_gated(c, s); i < n; i++) {
                if (!isfinite(t[i]))
                    return false;
            }
        }
    }
    return true;
}

static void add_sample(struct calib *c, int32_t n)
{
    const size_t rows = (size_t)c->cfg.n_layers * (size_t)c->cfg.n_heads;
    for (int32_t s = 0; s < c->cfg.n_levels; s++) {
        for (size_t r = 0; r < rows; r++) {
            const size_t at = ((size_t)s * rows + r) * (size_t)c->cfg.n_blocks;
            for (int32_t i = first_gated(c, s); i < n; i++)
                c->sums[at + (size_t)i] += c->sample[at + (size_t)i];
        }
    }
    for (int32_t i = 0; i < n; i++)
        c->n_samples[i]++;
}

double *calib_sample(struct calib *c)
{
    return c->sample;
}

int calib_restore_sample(struct calib *c, int32_t n_tokens, struct err_msg *why)
{
    const int32_t n = n_tokens / KV_BLOCK_TOKENS;
    if (n_tokens < 0 || n > c->cfg.n_blocks)
        return err_set(why, ERR_INVALID, "a sample of %d tokens", n_tokens);
    if (!sample_is_finite(c, n))
        return err_set(why, ERR_NUMERIC, "a page maximum is NaN or infinite");
    add_sample(c, n);
    return 0;
}

int calib_end_sample(struct calib *c, int32_t n_tokens, struct err_msg *why)
{
    if (c->device)
        TRY(calib_device_fetch(c->device, c->sample));
    if (atomic_exchange(&c->not_finite, false))
        return err_set(why, ERR_NUMERIC, "a page maximum is NaN or infinite");
    return calib_restore_sample(c, n_tokens, why);
}

int32_t calib_filled_blocks(const struct calib *c)
{
    int32_t n = 0;
    while (n < c->cfg.n_blocks && c->n_samples[n] > 0)
        n++;
    return n;
}

int calib_thresholds(const struct calib *c, float *t, struct err_msg *why)
{
    const int32_t filled = calib_filled_blocks(c), n_blocks = c->cfg.n_blocks;
    if (filled == 0)
        return err_set(why, ERR_INVALID, "calibration: no sample has %d tokens", KV_BLOCK_TOKENS);
    const size_t rows = (size_t)c->cfg.n_layers * (size_t)c->cfg.n_heads;
    for (int32_t s = 0; s < c->cfg.n_levels; s++) {
        for (size_t r = 0; r < rows; r++) {
            size_t at = ((size_t)s * rows + r) * (size_t)n_blocks;
            for (int32_t i = 0; i < n_blocks; i++) {
                int32_t from = i < filled ? i : filled - 1;
                double mean = c->sums[at + (size_t)from] / c->n_samples[from];
                t[at + (size_t)i] = from < first_gated(c, s) ? -INFINITY : (float)mean;
            }
        }
    }
    return 0;
}
