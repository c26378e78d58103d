/* The report of sluice-calibrate as a folder: a page of text and drawings. */
#include "cmd/calibrate_report.h"
#include "core/mem.h"
#include "kvcache/kv_view.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum {
    PAD = 16,
    TITLE = 20,
    PANELS_A_ROW = 4,
    PLOT_WIDTH = 640,
    PLOT_HEIGHT = 360,
    PLOT_LEFT = 48,
    PLOT_POINTS = 256 /* along position, at most */
};

static void begin_svg(FILE *to, int width, int height)
{
    (void)fprintf(to,
                  "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
                  "viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" font-size=\"12\">\n"
                  "<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n",
                  width, height, width, height);
}

static void end_svg(FILE *to)
{
    (void)fprintf(to, "</svg>\n");
}

/* ---- heat maps ---- */

static int cell_size(const struct calibrate_report *r)
{
    const int most = r->n_heads > r->n_layers ? r->n_heads : r->n_layers;
    const int size = 240 / most;
    return size < 6 ? 6 : size > 24 ? 24 : size;
}

static int panel_width(const struct calibrate_report *r)
{
    const int cells = r->n_heads * cell_size(r);
    return cells < 256 ? 256 : cells; /* the title's */
}

static bool is_off(const struct calibrate_report *r, int32_t level, int32_t head)
{
    return fabs(calibrate_head_density(r, level, head) - calibrate_head_predicted(r, level, head)) >
           CALIBRATE_TOLERANCE;
}

/* Begins the cell of a head in the panel at x, y; white is a share of 0, blue of 1. */
static void draw_cell(const struct calibrate_report *r, int32_t head, int x, int y, double share,
                      const char *outline, FILE *to)
{
    const int size = cell_size(r);
    const int red = (int)lround(255 - 235 * share), green = (int)lround(255 - 180 * share);
    (void)fprintf(to,
                  "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"#%02x%02xff\"%s>"
                  "<title>layer %d head %d: ",
                  x + head % r->n_heads * size, y + TITLE + head / r->n_heads * size, size - 1,
                  size - 1, red, green, outline, head / r->n_heads, head % r->n_heads);
}

/* An outline where the prediction is left. */
static void draw_panel(const struct calibrate_report *r, int32_t level, int x, int y, FILE *to)
{
    const struct calibrate_density *d = &r->levels[level];
    (void)fprintf(to, "<text x=\"%d\" y=\"%d\">k=%d: %.3f predicted, %.3f +- %.3f</text>\n", x,
                  y + 12, d->k, d->predicted, calibrate_density_mean(d), calibrate_density_std(d));
    for (int32_t i = 0; i < r->n_layers * r->n_heads; i++) {
        const double density = calibrate_head_density(r, level, i);
        draw_cell(r, i, x, y, density,
                  is_off(r, level, i) ? " stroke=\"#d00000\" stroke-width=\"0.8\"" : "", to);
        (void)fprintf(to, "%.3f</title></rect>\n", density);
    }
}

/* Pages that heads keep, as a share of the most that one does. */
static void draw_k_panel(const struct calibrate_report *r, int32_t level, int x, int y, FILE *to)
{
    int32_t min, max;
    calibrate_k_range(r, level, &min, &max);
    (void)fprintf(to, "<text x=\"%d\" y=\"%d\">k=%d: %d to %d pages</text>\n", x, y + 12,
                  r->levels[level].k, min, max);
    for (int32_t i = 0; i < r->n_layers * r->n_heads; i++) {
        const int32_t k = calibrate_head_k(r, level, i);
        draw_cell(r, i, x, y, (double)k / max, "", to);
        (void)fprintf(to, "%d</title></rect>\n", k);
    }
}

/* One panel a level. */
static void draw_panels(const struct calibrate_report *r, const char *title,
                        void (*panel)(const struct calibrate_report *r, int32_t level, int x, int y,
                                      FILE *to),
                        FILE *to)
{
    const int columns = r->n_levels < PANELS_A_ROW ? r->n_levels : PANELS_A_ROW;
    const int rows = (r->n_levels + columns - 1) / columns;
    const int width = panel_width(r) + PAD, height = TITLE + r->n_layers * cell_size(r) + PAD;
    begin_svg(to, columns * width + PAD, rows * height + PAD + TITLE);
    (void)fprintf(to, "<text x=\"%d\" y=\"%d\">%s</text>\n", PAD, PAD + 4, title);
    for (int32_t i = 0; i < r->n_levels; i++)
        panel(r, i, PAD + i % columns * width, TITLE + PAD + i / columns * height, to);
    end_svg(to);
}

static void draw_density(const struct calibrate_report *r, FILE *to)
{
    char title[128];
    (void)snprintf(title, sizeof title,
                   "Density by layer (down) and head (across); outlined: more than %.2f from the "
                   "prediction",
                   CALIBRATE_TOLERANCE);
    draw_panels(r, title, draw_panel, to);
}

static void draw_k(const struct calibrate_report *r, FILE *to)
{
    draw_panels(r, "Pages kept by layer (down) and head (across)", draw_k_panel, to);
}

/* ---- thresholds along position ---- */

/* Quantiles over all heads, at one block of one level. */
struct spread {
    float low, middle, high; /* 10%, 50%, 90% */
};

struct plot {
    const struct calibrate_report *r;
    FILE *to;
    float *heads;         /* scratch [n_layers * n_heads] */
    struct spread *curve; /* [PLOT_POINTS] */
    int32_t *blocks;      /* [PLOT_POINTS] */
    float min, max;       /* of all curves */
};

static int ascending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static struct spread spread_at(const struct plot *p, int32_t level, int32_t block)
{
    const struct calibrate_report *r = p->r;
    const size_t n = (size_t)r->n_layers * (size_t)r->n_heads;
    for (size_t i = 0; i < n; i++)
        p->heads[i] = r->t[((size_t)level * n + i) * (size_t)r->n_blocks + (size_t)block];
    qsort(p->heads, n, sizeof *p->heads, ascending);
    return (struct spread){p->heads[n / 10], p->heads[n / 2], p->heads[n - 1 - n / 10]};
}

/* The level's curve where all of it is finite; how many points it has. */
static int32_t make_curve(struct plot *p, int32_t level)
{
    const int32_t step = (p->r->n_blocks + PLOT_POINTS - 1) / PLOT_POINTS;
    int32_t n = 0;
    for (int32_t i = 0; i < p->r->n_blocks; i += step) {
        const struct spread s = spread_at(p, level, i);
        if (!isfinite(s.low) || !isfinite(s.high))
            continue;
        p->min = s.low < p->min ? s.low : p->min;
        p->max = s.high > p->max ? s.high : p->max;
        p->blocks[n] = i;
        p->curve[n++] = s;
    }
    return n;
}

static double x_of(const struct plot *p, int32_t block)
{
    return PLOT_LEFT + (double)block * PLOT_WIDTH / (p->r->n_blocks > 1 ? p->r->n_blocks - 1 : 1);
}

static double y_of(const struct plot *p, float t)
{
    const double span = (double)p->max - (double)p->min;
    return PAD + PLOT_HEIGHT - ((double)t - (double)p->min) / (span > 0 ? span : 1) * PLOT_HEIGHT;
}

static void draw_curve(struct plot *p, int32_t level)
{
    static const char *const colours[] = {"#1f5fd0", "#d05a1f", "#2f9a48", "#8a3fb0",
                                          "#b0902a", "#3aa0a8", "#c23b70", "#606060"};
    const char *colour = colours[level % 8];
    const int32_t n = make_curve(p, level);
    if (n == 0)
        return;
    (void)fprintf(p->to, "<polygon fill=\"%s\" fill-opacity=\"0.08\" points=\"", colour);
    for (int32_t i = 0; i < n; i++)
        (void)fprintf(p->to, "%.1f,%.1f ", x_of(p, p->blocks[i]), y_of(p, p->curve[i].low));
    for (int32_t i = n; i-- > 0;)
        (void)fprintf(p->to, "%.1f,%.1f ", x_of(p, p->blocks[i]), y_of(p, p->curve[i].high));
    (void)fprintf(p->to, "\"/>\n<polyline fill=\"none\" stroke=\"%s\" points=\"", colour);
    for (int32_t i = 0; i < n; i++)
        (void)fprintf(p->to, "%.1f,%.1f ", x_of(p, p->blocks[i]), y_of(p, p->curve[i].middle));
    (void)fprintf(p->to, "\"/>\n<text x=\"%d\" y=\"%.1f\" fill=\"%s\">k=%d</text>\n",
                  PLOT_LEFT + PLOT_WIDTH + 4, y_of(p, p->curve[n - 1].middle), colour,
                  p->r->levels[level].k);
}

static void draw_axes(const struct plot *p)
{
    const int bottom = PAD + PLOT_HEIGHT;
    (void)fprintf(p->to,
                  "<path d=\"M%d %dV%dH%d\" fill=\"none\" stroke=\"#404040\"/>\n"
                  "<text x=\"4\" y=\"%d\">%.4g</text>\n<text x=\"4\" y=\"%d\">%.4g</text>\n"
                  "<text x=\"%d\" y=\"%d\">0</text>\n"
                  "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%d tokens</text>\n"
                  "<text x=\"%d\" y=\"%d\">thresholds along position: median of the heads, 10%% "
                  "to 90%%</text>\n",
                  PLOT_LEFT, PAD, bottom, PLOT_LEFT + PLOT_WIDTH, bottom, (double)p->min, PAD + 8,
                  (double)p->max, PLOT_LEFT, bottom + 16, PLOT_LEFT + PLOT_WIDTH, bottom + 16,
                  p->r->n_blocks * KV_BLOCK_TOKENS, PLOT_LEFT + 40, bottom + 16);
}

static void draw_thresholds(const struct calibrate_report *r, FILE *to)
{
    struct plot p = {.r = r, .to = to, .min = INFINITY, .max = -INFINITY};
    p.heads = mem_zalloc((size_t)r->n_layers * (size_t)r->n_heads, sizeof *p.heads);
    p.curve = mem_zalloc(PLOT_POINTS, sizeof *p.curve);
    p.blocks = mem_zalloc(PLOT_POINTS, sizeof *p.blocks);
    for (int32_t i = 0; i < r->n_levels; i++)
        (void)make_curve(&p, i); /* for the bounds */
    begin_svg(to, PLOT_LEFT + PLOT_WIDTH + 72, PLOT_HEIGHT + PAD + 32);
    if (p.min <= p.max) {
        draw_axes(&p);
        for (int32_t i = 0; i < r->n_levels; i++)
            draw_curve(&p, i);
    }
    end_svg(to);
    mem_free(p.heads);
    mem_free(p.curve);
    mem_free(p.blocks);
}

/* ---- text ---- */

static void list_heads(const struct calibrate_report *r, int32_t level, FILE *to)
{
    for (int32_t i = 0; i < r->n_layers * r->n_heads; i++) {
        if (is_off(r, level, i))
            (void)fprintf(to, "| %d | %d | %d | %.3f | %.3f |\n", r->levels[level].k,
                          i / r->n_heads, i % r->n_heads, calibrate_head_predicted(r, level, i),
                          calibrate_head_density(r, level, i));
    }
}

static void write_text(const struct calibrate_report *r, FILE *to)
{
    (void)fprintf(to, "# Thresholds of %s (%s)\n\n```\n", r->model, r->how);
    calibrate_report_text(r, to);
    (void)fprintf(to, "```\n\n![thresholds](thresholds.svg)\n");
    if (r->meta->head_k)
        (void)fprintf(to, "\n![pages kept](k.svg)\n");
    if (!r->heads || r->levels[0].n == 0)
        return;
    (void)fprintf(to, "\n![density](density.svg)\n\n## Held-out samples\n\n| task | tokens |");
    for (int32_t i = 0; i < r->n_levels; i++)
        (void)fprintf(to, " k=%d |", r->levels[i].k);
    (void)fprintf(to, "\n|---|---:|");
    for (int32_t i = 0; i < r->n_levels; i++)
        (void)fprintf(to, "---:|");
    for (int32_t j = 0; j < r->n_held_out; j++) {
        const struct calibrate_held_out *h = &r->held_out[j];
        (void)fprintf(to, "\n| %s (line %d) | %d |", h->task, h->line, h->n_tokens);
        for (int32_t i = 0; i < r->n_levels; i++)
            (void)fprintf(to, " %.3f |", h->density[i]);
    }
    (void)fprintf(to,
                  "\n\n## Heads more than %.2f from the prediction\n\n"
                  "| k | layer | head | predicted | measured |\n|---:|---:|---:|---:|---:|\n",
                  CALIBRATE_TOLERANCE);
    for (int32_t i = 0; i < r->n_levels; i++)
        list_heads(r, i, to);
}

static int write_one(const struct calibrate_report *r, const char *dir, const char *name,
                     void (*fn)(const struct calibrate_report *r, FILE *to), struct err_msg *why)
{
    char path[PATH_MAX];
    int n = snprintf(path, sizeof path, "%s/%s", dir, name);
    if (n < 0 || (size_t)n >= sizeof path)
        return err_set(why, -ENAMETOOLONG, "%.200s...: path too long", dir);
    FILE *to = fopen(path, "w");
    int err = to ? 0 : -errno;
    if (to) {
        fn(r, to);
        err = ferror(to) ? -EIO : 0;
        if (fclose(to) != 0 && err == 0)
            err = -errno;
    }
    return err < 0 ? err_set(why, err, "%s: cannot write: %s", path, err_str(err)) : 0;
}

int calibrate_report_dir(const struct calibrate_report *r, const char *dir, struct err_msg *why)
{
    if (mkdir(dir, 0755) < 0 && errno != EEXIST) {
        const int err = -errno;
        return err_set(why, err, "%s: cannot make the folder: %s", dir, err_str(err));
    }
    if (r->heads && r->levels[0].n)
        TRY(write_one(r, dir, "density.svg", draw_density, why));
    if (r->meta->head_k)
        TRY(write_one(r, dir, "k.svg", draw_k, why));
    TRY(write_one(r, dir, "thresholds.svg", draw_thresholds, why));
    return write_one(r, dir, "report.md", write_text, why);
}
