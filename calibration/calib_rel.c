#include "calibration/calib_rel.h"

#include "core/mem.h"
#include "kvcache/kv_view.h"

#include <math.h>
#include <string.h>

enum { FIRST_LENGTH = 1024, N_BINS = CALIB_REL_TRIALS + 1 };

/* ln of 1e-6, 5e-6, ... 5e-3, then of what large sparsity takes. */
static const float trials[CALIB_REL_TRIALS] = {
    -13.815511f, -12.206073f, -11.512925f, -9.903488f, -9.210340f, -7.600902f, -6.907755f,
    -5.298317f,  -4.605170f,  -3.912023f,  -2.995732f, -2.302585f, -1.609438f, -1.203973f,
    -0.916291f,  -0.693147f,  -0.356675f,  -0.223144f, -0.105361f, -0.010050f};

struct point {
    float skipped, ln_lambda_l; /* S, ln(lambda * L) */
};

struct calib_rel {
    int32_t n_layers, n_heads;
    struct attn_rel_counts counts; /* of the prompt so far */
    uint64_t *sums;                /* of whole prompts, likewise [n_layers, 2, n_heads, N_BINS] */
    int32_t next;                  /* length of the prompt's next point */
    struct point *points[2];       /* by rows_index */
    int32_t n_points[2], room[2];
};

static int rows_index(int32_t gate_rows)
{
    ASSERT(gate_rows == 128 || gate_rows == 64);
    return gate_rows == 128 ? 0 : 1;
}

static size_t n_bins(const struct calib_rel *r)
{
    return (size_t)r->n_layers * 2 * (size_t)r->n_heads * N_BINS;
}

void calib_rel_create(struct calib_rel **out, int32_t n_layers, int32_t n_heads)
{
    struct calib_rel *r = mem_zalloc(1, sizeof *r);
    r->n_layers = n_layers;
    r->n_heads = n_heads;
    r->sums = mem_zalloc(n_bins(r), sizeof *r->sums);
    r->counts = (struct attn_rel_counts){trials, CALIB_REL_TRIALS,
                                         mem_zalloc(n_bins(r), sizeof *r->counts.bins)};
    r->next = FIRST_LENGTH;
    *out = r;
}

void calib_rel_destroy(struct calib_rel *r)
{
    if (!r)
        return;
    mem_free(r->sums);
    mem_free(r->counts.bins);
    mem_free(r->points[0]);
    mem_free(r->points[1]);
    mem_free(r);
}

const float *calib_rel_trials(void)
{
    return trials;
}

const struct attn_rel_counts *calib_rel_counts(struct calib_rel *r)
{
    return &r->counts;
}

static void add_point(struct calib_rel *r, int32_t gate_rows, int32_t trial, int32_t n_tokens,
                      double density)
{
    const int i = rows_index(gate_rows);
    if (r->n_points[i] == r->room[i]) {
        r->room[i] = r->room[i] ? 2 * r->room[i] : 64;
        r->points[i] = mem_realloc(r->points[i], (size_t)r->room[i] * sizeof *r->points[i]);
    }
    r->points[i][r->n_points[i]++] =
        (struct point){(float)(1 - density), trials[trial] + logf((float)n_tokens)};
}

/* Pages of the diagonal that the row groups of a prompt reach. */
static double diagonal(int32_t gate_rows, int32_t n_tokens)
{
    const int32_t full = n_tokens / KV_BLOCK_TOKENS, rest = n_tokens % KV_BLOCK_TOKENS;
    const int32_t pages = (rest + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    if (gate_rows == KV_BLOCK_TOKENS)
        return 2.0 * full + pages;
    return 3.0 * full + (pages == 2 ? 3 : pages);
}

/* Adds up a kind of row groups over layers and heads, into bins [N_BINS]. */
static double collect(const struct calib_rel *r, const uint64_t *counts, int32_t gate_rows,
                      double bins[N_BINS])
{
    double all = 0;
    memset(bins, 0, N_BINS * sizeof *bins);
    for (int32_t l = 0; l < r->n_layers; l++) {
        for (int32_t h = 0; h < r->n_heads; h++) {
            const int32_t row = (2 * l + rows_index(gate_rows)) * r->n_heads + h;
            for (int32_t i = 0; i < N_BINS; i++) {
                const double n = (double)counts[(size_t)row * N_BINS + (size_t)i];
                bins[i] += n;
                all += n;
            }
        }
    }
    return all;
}

static void take_points(struct calib_rel *r, int32_t gate_rows, int32_t n_tokens)
{
    double bins[N_BINS], skipped = 0;
    const double off = collect(r, r->counts.bins, gate_rows, bins);
    const double all =
        off + diagonal(gate_rows, n_tokens) * (double)r->n_layers * (double)r->n_heads;
    for (int32_t i = 0; i < CALIB_REL_TRIALS; i++) {
        skipped += bins[i];
        add_point(r, gate_rows, i, n_tokens, 1 - skipped / all);
    }
}

/* Whether the prompt has a point here; moves on to the next, or to the next prompt. */
static bool is_due(struct calib_rel *r, int32_t n_tokens, bool last)
{
    const bool due = n_tokens >= r->next || last;
    while (r->next <= n_tokens)
        r->next *= 2;
    if (last)
        r->next = FIRST_LENGTH;
    return due;
}

void calib_rel_reached(struct calib_rel *r, int32_t n_tokens, bool last)
{
    if (is_due(r, n_tokens, last)) {
        take_points(r, 128, n_tokens);
        take_points(r, 64, n_tokens);
    }
    if (!last)
        return;
    for (size_t i = 0; i < n_bins(r); i++)
        r->sums[i] += r->counts.bins[i];
    memset(r->counts.bins, 0, n_bins(r) * sizeof *r->counts.bins);
}

void calib_rel_gated(struct calib_rel *r, int32_t gate_rows, int32_t trial, double density,
                     int32_t n_tokens, bool last)
{
    if (is_due(r, n_tokens, last))
        add_point(r, gate_rows, trial, n_tokens, density);
}

double calib_rel_skipped(const struct calib_rel *r, int32_t gate_rows, int32_t trial, int32_t layer,
                         int32_t head)
{
    const int32_t row = (2 * layer + rows_index(gate_rows)) * r->n_heads + head;
    const uint64_t *bins = r->sums + (size_t)row * N_BINS;
    double skipped = 0, all = 0;
    for (int32_t i = 0; i < N_BINS; i++) {
        skipped += i <= trial ? (double)bins[i] : 0;
        all += (double)bins[i];
    }
    return skipped / all;
}

int calib_rel_fit(const struct calib_rel *r, int32_t gate_rows, struct calib_rel_fit *fit,
                  struct err_msg *why)
{
    const struct point *p = r->points[rows_index(gate_rows)];
    double n = 0, x = 0, y = 0, xx = 0, xy = 0, yy = 0;
    *fit = (struct calib_rel_fit){.min = 1, .gate_rows = gate_rows};
    for (int32_t i = 0; i < r->n_points[rows_index(gate_rows)]; i++) {
        const double s = (double)p[i].skipped, v = (double)p[i].ln_lambda_l;
        if (s < 0.1 || s > 0.9)
            continue;
        fit->min = s < fit->min ? s : fit->min;
        fit->max = s > fit->max ? s : fit->max;
        n++;
        x += s;
        y += v;
        xx += s * s;
        xy += s * v;
        yy += v * v;
    }
    fit->n_points = (int32_t)n;
    const double spread = xx - x * x / n, both = xy - x * y / n, variance = yy - y * y / n;
    if (n < 4 || !(spread > 1e-9) || !(both > 0)) {
        return err_set(
            why, ERR_INVALID,
            "the REL gate of %d rows: %d trials skip 0.1 to 0.9 of the pages, from which "
            "no law follows",
            gate_rows, fit->n_points);
    }
    fit->b = both / spread;
    fit->ln_a = (y - fit->b * x) / n;
    fit->r2 = variance > 0 ? both * both / (spread * variance) : 1;
    return 0;
}

double calib_rel_ln_lambda(double ln_a, double b, double density, int64_t n_tokens)
{
    const double ln = ln_a + b * (1 - density) - log((double)(n_tokens > 0 ? n_tokens : 1));
    if (ln > -1e-4)
        return -1e-4;
    return ln > -60 ? ln : -60;
}
