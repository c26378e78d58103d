#include "calibration/calib_rel.h"

#include "core/mem.h"
#include "kvcache/kv_view.h"

#include <math.h>
#include <string.h>

enum {
    FIRST_LENGTH = 1024,
    N_BINS = CALIB_REL_BELOW_1 + 1,
    N_GATED = CALIB_REL_TRIALS - CALIB_REL_BELOW_1
};

static const float same_length = 0.02f; /* of logarithms */
static const float ln_8 = 2.0795f;      /* and a little more: lengths are whole numbers */

/* ln of 1e-6, 5e-6, ... 5e-3, then of what large sparsity takes, up to the most that a density may
 * get. */
static const float trials[CALIB_REL_TRIALS] = {
    -13.815511f, -12.206073f, -11.512925f, -9.903488f, -9.210340f,           -7.600902f, -6.907755f,
    -5.298317f,  -4.605170f,  -3.912023f,  -2.995732f, -2.302585f,           -1.609438f, -1.203973f,
    -0.916291f,  -0.693147f,  -0.356675f,  -0.223144f, -0.105361f,           -0.010050f, 0.4f,
    0.9f,        1.5f,        2.3f,        3.5f,       THRESHOLDS_REL_LN_MAX};

/* S at every trial, of a prompt or its beginning; NAN where the trial was not run. */
struct curve {
    float ln_length; /* ln(L) */
    float skipped[CALIB_REL_TRIALS];
};

struct calib_rel {
    int32_t n_layers, n_heads;
    struct attn_rel_counts counts; /* of the prompt so far */
    uint64_t *sums;                /* of whole prompts, likewise [n_layers, 2, n_heads, N_BINS] */
    int32_t next;                  /* length of the prompt's next point */
    double diagonal[2];            /* diagonal pages of a head, of whole prompts, by rows_index */
    struct attn_counts *heads;     /* of whole prompts, [2, N_GATED, n_layers, n_heads] */
    struct curve *curves[2];       /* by rows_index */
    int32_t n_curves[2], room[2];
    float longest[2]; /* of ln_length */
};

static int rows_index(int32_t gate_rows)
{
    ASSERT(gate_rows == 128 || gate_rows == 64);
    return gate_rows == 128 ? 0 : 1;
}

static size_t n_heads_of(const struct calib_rel *r)
{
    return (size_t)r->n_layers * (size_t)r->n_heads;
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
    r->counts = (struct attn_rel_counts){trials, CALIB_REL_BELOW_1,
                                         mem_zalloc(n_bins(r), sizeof *r->counts.bins)};
    r->heads = mem_zalloc((size_t)2 * N_GATED * n_heads_of(r), sizeof *r->heads);
    r->next = FIRST_LENGTH;
    *out = r;
}

void calib_rel_destroy(struct calib_rel *r)
{
    if (!r)
        return;
    mem_free(r->sums);
    mem_free(r->counts.bins);
    mem_free(r->heads);
    mem_free(r->curves[0]);
    mem_free(r->curves[1]);
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

/* A curve at n_tokens, all of whose trials are still NAN. */
static struct curve *add_curve(struct calib_rel *r, int which, int32_t n_tokens)
{
    if (r->n_curves[which] == r->room[which]) {
        r->room[which] = r->room[which] ? 2 * r->room[which] : 16;
        r->curves[which] =
            mem_realloc(r->curves[which], (size_t)r->room[which] * sizeof *r->curves[which]);
    }
    struct curve *c = &r->curves[which][r->n_curves[which]++];
    c->ln_length = logf((float)n_tokens);
    r->longest[which] = c->ln_length > r->longest[which] ? c->ln_length : r->longest[which];
    for (int32_t i = 0; i < CALIB_REL_TRIALS; i++)
        c->skipped[i] = NAN;
    return c;
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

/* Layers that a served prompt's density is of: the last computes one block (model/llama.h). */
static int32_t counted_layers(const struct calib_rel *r)
{
    return r->n_layers > 1 ? r->n_layers - 1 : 1;
}

/* Adds up a kind of row groups over layers and heads, into bins [N_BINS]. */
static double collect(const struct calib_rel *r, const uint64_t *counts, int32_t gate_rows,
                      double bins[N_BINS])
{
    double all = 0;
    memset(bins, 0, N_BINS * sizeof *bins);
    for (int32_t l = 0; l < counted_layers(r); l++) {
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

static void take_curve(struct calib_rel *r, int32_t gate_rows, int32_t n_tokens)
{
    double bins[N_BINS], skipped = 0;
    const double off = collect(r, r->counts.bins, gate_rows, bins);
    const double all =
        off + diagonal(gate_rows, n_tokens) * (double)counted_layers(r) * (double)r->n_heads;
    struct curve *c = add_curve(r, rows_index(gate_rows), n_tokens);
    for (int32_t i = 0; i < CALIB_REL_BELOW_1; i++) {
        skipped += bins[i];
        c->skipped[i] = (float)(skipped / all);
    }
}

/* Whether the prompt has a curve here; moves on to the next, or to the next prompt. */
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
        take_curve(r, 128, n_tokens);
        take_curve(r, 64, n_tokens);
    }
    if (!last)
        return;
    r->diagonal[0] += diagonal(128, n_tokens);
    r->diagonal[1] += diagonal(64, n_tokens);
    for (size_t i = 0; i < n_bins(r); i++)
        r->sums[i] += r->counts.bins[i];
    memset(r->counts.bins, 0, n_bins(r) * sizeof *r->counts.bins);
}

/* The curve of the prompt at this length is the last one of that length, while its trial is not
 * run.
 */
void calib_rel_gated(struct calib_rel *r, int32_t gate_rows, int32_t trial, double density,
                     int32_t n_tokens, bool last)
{
    const int which = rows_index(gate_rows);
    const float ln_length = logf((float)n_tokens);
    struct curve *c = NULL;
    if (!is_due(r, n_tokens, last))
        return;
    for (int32_t i = r->n_curves[which]; i-- > 0 && !c;) {
        if (r->curves[which][i].ln_length == ln_length)
            c = &r->curves[which][i];
    }
    if (!c || !isnan(c->skipped[trial]))
        c = add_curve(r, which, n_tokens);
    c->skipped[trial] = (float)(1 - density);
}

/* Decisions off the diagonal that a head skips at a trial, and all of them. */
static void count_skipped(const struct calib_rel *r, int which, int32_t trial, int32_t layer,
                          int32_t head, double *skipped, double *all)
{
    const int32_t row = (2 * layer + which) * r->n_heads + head;
    const uint64_t *bins = r->sums + (size_t)row * N_BINS;
    *skipped = *all = 0;
    for (int32_t i = 0; i < N_BINS; i++) {
        *skipped += i <= trial ? (double)bins[i] : 0;
        *all += (double)bins[i];
    }
}

double calib_rel_skipped(const struct calib_rel *r, int32_t gate_rows, int32_t trial, int32_t layer,
                         int32_t head)
{
    double skipped, all;
    count_skipped(r, rows_index(gate_rows), trial, layer, head, &skipped, &all);
    return skipped / all;
}

static struct attn_counts *gated_heads(const struct calib_rel *r, int which, int32_t trial)
{
    return r->heads +
           ((size_t)which * N_GATED + (size_t)(trial - CALIB_REL_BELOW_1)) * n_heads_of(r);
}

void calib_rel_heads(struct calib_rel *r, int32_t gate_rows, int32_t trial,
                     const struct attn_counts *heads)
{
    struct attn_counts *to = gated_heads(r, rows_index(gate_rows), trial);
    for (size_t i = 0; i < n_heads_of(r); i++) {
        to[i].reachable += heads[i].reachable;
        to[i].kept += heads[i].kept;
    }
}

/* Share of its pages that a head keeps at a trial, diagonal ones among them. */
static double kept_share(const struct calib_rel *r, int which, int32_t trial, int32_t layer,
                         int32_t head)
{
    double skipped, all;
    if (trial >= CALIB_REL_BELOW_1) {
        const struct attn_counts *c = &gated_heads(r, which, trial)[layer * r->n_heads + head];
        return c->reachable > 0 ? (double)c->kept / (double)c->reachable : 1;
    }
    count_skipped(r, which, trial, layer, head, &skipped, &all);
    all += r->diagonal[which];
    return all > 0 ? 1 - skipped / all : 1;
}

int32_t calib_rel_steps(const struct calib_rel *r, int32_t gate_rows, float *out)
{
    const double least = 0.002;
    const size_t n = n_heads_of(r);
    double before = 1;
    int32_t n_steps = 1;
    for (size_t i = 0; i < n; i++)
        out[i] = 1;
    for (int32_t trial = 0; trial < CALIB_REL_TRIALS; trial++) {
        float *step = out + (size_t)n_steps * n;
        double sum = 0;
        for (int32_t l = 0; l < r->n_layers; l++) {
            for (int32_t h = 0; h < r->n_heads; h++) {
                const double kept = kept_share(r, rows_index(gate_rows), trial, l, h);
                *step++ = (float)kept;
                sum += l < counted_layers(r) ? kept : 0;
            }
        }
        const double mean = sum / ((double)counted_layers(r) * (double)r->n_heads);
        if (mean > before - least)
            continue;
        before = mean;
        n_steps++;
    }
    return n_steps;
}

/* ln(lambda) where a curve first skips s; NAN where its trials do not say. */
static double crossing(const struct curve *c, double s)
{
    int32_t t = 0;
    while (t < CALIB_REL_TRIALS && (double)c->skipped[t] < s)
        t++;
    if (t == 0 || t == CALIB_REL_TRIALS || isnan(c->skipped[t]) || isnan(c->skipped[t - 1]))
        return NAN;
    const double before = (double)c->skipped[t - 1], after = (double)c->skipped[t];
    const double from = (double)trials[t - 1], to = (double)trials[t];
    return from + (to - from) * (s - before) / (after - before);
}

/* The mean of the curves of about the length of curve i, of which that is the first; how many, or 0
 * where an earlier one is. A trial that one of them lacks is NAN. */
static int32_t mean_curve(const struct calib_rel *r, int which, int32_t i, struct curve *mean)
{
    const struct curve *c = r->curves[which];
    int32_t n = 0;
    *mean = (struct curve){.ln_length = c[i].ln_length};
    for (int32_t k = 0; k < r->n_curves[which]; k++) {
        if (fabsf(c[k].ln_length - c[i].ln_length) > same_length)
            continue;
        if (k < i)
            return 0;
        n++;
        for (int32_t t = 0; t < CALIB_REL_TRIALS; t++)
            mean->skipped[t] += c[k].skipped[t];
    }
    for (int32_t t = 0; t < CALIB_REL_TRIALS; t++)
        mean->skipped[t] /= (float)n;
    return n;
}

/* The line of ln(lambda * L) over ln(L) through mean curves of at least an eighth of the longest,
 * where they skip s: its height at the longest, and its slope. False where none says. */
static bool find_knot(const struct calib_rel *r, int which, double s, double *knot, double *slope)
{
    const double longest = (double)r->longest[which];
    double n = 0, x = 0, y = 0, xx = 0, xy = 0;
    for (int32_t i = 0; i < r->n_curves[which]; i++) {
        struct curve c;
        const double weight = mean_curve(r, which, i, &c);
        const double off = (double)c.ln_length - longest, ln_lambda = crossing(&c, s);
        if (weight == 0 || off < -(double)ln_8 || isnan(ln_lambda))
            continue;
        n += weight;
        x += weight * off;
        y += weight * (ln_lambda + (double)c.ln_length);
        xx += weight * off * off;
        xy += weight * off * (ln_lambda + (double)c.ln_length);
    }
    if (n == 0)
        return false;
    const double spread = xx - x * x / n;
    *slope = spread > 1e-6 * n ? (xy - x * y / n) / spread : 0;
    *knot = (y - *slope * x) / n;
    return true;
}

/* At S = 0.1, 0.2, ...; beyond what is reached, as the law goes on. */
static void find_knots(const struct calib_rel *r, int which, struct thresholds_rel *fit)
{
    const double least = 0.01; /* between knots, which increase */
    fit->ln_tokens = (double)r->longest[which];
    for (int i = 0; i < THRESHOLDS_REL_KNOTS; i++) {
        const double law = (i > 0 ? fit->knots[i - 1] : fit->ln_a) + fit->b / 10;
        if (!find_knot(r, which, (i + 1) / 10.0, &fit->knots[i], &fit->slopes[i])) {
            fit->knots[i] = law;
            fit->slopes[i] = i > 0 ? fit->slopes[i - 1] : 0;
        }
        if (i > 0 && fit->knots[i] < fit->knots[i - 1] + least)
            fit->knots[i] = fit->knots[i - 1] + least;
    }
}

int calib_rel_fit(const struct calib_rel *r, int32_t gate_rows, struct thresholds_rel *fit,
                  struct err_msg *why)
{
    const int which = rows_index(gate_rows);
    double n = 0, x = 0, y = 0, xx = 0, xy = 0, yy = 0;
    *fit = (struct thresholds_rel){.min = 1};
    for (int32_t i = 0; i < r->n_curves[which] * CALIB_REL_TRIALS; i++) {
        const struct curve *c = &r->curves[which][i / CALIB_REL_TRIALS];
        const double s = (double)c->skipped[i % CALIB_REL_TRIALS];
        const double v = (double)trials[i % CALIB_REL_TRIALS] + (double)c->ln_length;
        if (!(s >= 0.1 && s <= 0.9))
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
    const double spread = xx - x * x / n, both = xy - x * y / n, variance = yy - y * y / n;
    if (n < 4 || !(spread > 1e-9) || !(both > 0)) {
        return err_set(
            why, ERR_INVALID,
            "the REL gate of %d rows: %d trials skip 0.1 to 0.9 of the pages, from which "
            "no law follows",
            gate_rows, (int)n);
    }
    fit->b = both / spread;
    fit->ln_a = (y - fit->b * x) / n;
    fit->r2 = variance > 0 ? both * both / (spread * variance) : 1;
    find_knots(r, which, fit);
    return 0;
}
