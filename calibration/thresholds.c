/* Reading, checking and looking up threshold files. The container is model/safetensors.h, which
 * bounds the header and holds that tensors tile the file; here are the rules of this format. The
 * file is read whole into memory before it is parsed, so nothing depends on it afterwards. */
#include "calibration/thresholds.h"

#include "calibration/thresholds_file.h"
#include "core/hash.h"
#include "core/mem.h"
#include "kvcache/kv_view.h"
#include "model/safetensors.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_LEVELS = 64,
    MAX_LAYERS = 4096,
    MAX_HEADS = 4096,
    MAX_BLOCKS = 1 << 20, /* 128M tokens */
    MAX_COUNT = 1 << 30   /* of tokens and samples */
};

struct thresholds {
    char *name; /* of the file, for messages */
    struct thresholds_meta meta;
    struct attn_thresholds view;
    float *t;                     /* [n_levels, n_layers, n_heads, n_blocks] */
    int32_t *k;                   /* [n_levels] */
    int32_t *head_k;              /* [n_levels, n_layers, n_heads]; NULL: k */
    struct attn_thresholds pages; /* the same as numbers that heads are steered by */
    float *pages_t;
    /* of generated rows; decode_t NULL: none */
    struct attn_thresholds decode;
    float *decode_t;
    int32_t *decode_k;
    struct attn_thresholds rel[2]; /* of 128 rows, of 64; t NULL: none */
    float *rel_t[2];
    uint64_t hash;
};

/* ---- metadata ------------------------------------------------------------------------------- */

struct reader {
    const struct safetensors *st;
    const char *name;
    struct err_msg *why;
};

static int text_field(const struct reader *r, const char *field, const char **out)
{
    *out = safetensors_metadata(r->st, field);
    if (!*out)
        return err_set(r->why, ERR_FORMAT, "%s: metadata %s is missing", r->name, field);
    return 0;
}

static int fixed_field(const struct reader *r, const char *field, const char *want, int err)
{
    const char *text;
    TRY(text_field(r, field, &text));
    if (strcmp(text, want) != 0) {
        return err_set(r->why, err, "%s: metadata %s is '%.40s', must be '%s'", r->name, field,
                       text, want);
    }
    return 0;
}

static int int_field(const struct reader *r, const char *field, int32_t min, int32_t *out)
{
    const char *text;
    char *end;
    TRY(text_field(r, field, &text));
    errno = 0;
    long v = strtol(text, &end, 10);
    if (errno || end == text || *end || v < min || v > MAX_COUNT) {
        return err_set(r->why, ERR_FORMAT, "%s: metadata %s is '%.40s', not a number from %d to %d",
                       r->name, field, text, min, MAX_COUNT);
    }
    *out = (int32_t)v;
    return 0;
}

/* Exactly 16 lower-case hex digits. */
static int hex_field(const struct reader *r, const char *field, uint64_t *out)
{
    const char *text;
    TRY(text_field(r, field, &text));
    if (strlen(text) != 16 || strspn(text, "0123456789abcdef") != 16) {
        return err_set(r->why, ERR_FORMAT, "%s: metadata %s is '%.40s', not 16 hex digits", r->name,
                       field, text);
    }
    *out = strtoull(text, NULL, 16);
    return 0;
}

static int scale_field(const struct reader *r, float *out)
{
    const char *text;
    char *end;
    TRY(text_field(r, "softmax_scale", &text));
    *out = strtof(text, &end);
    if (end == text || *end || !isfinite(*out) || *out <= 0) {
        return err_set(r->why, ERR_FORMAT,
                       "%s: metadata softmax_scale is '%.40s', not a positive number", r->name,
                       text);
    }
    return 0;
}

/* `source` is optional: without it the file was calibrated. */
static int source_field(const struct reader *r, bool *imported)
{
    const char *text = safetensors_metadata(r->st, "source");
    *imported = text != NULL;
    return text ? fixed_field(r, "source", THRESHOLDS_IMPORTED, ERR_FORMAT) : 0;
}

/* n finite numbers with blanks between them. */
static bool parse_numbers(const char *text, double *out, int n)
{
    for (int i = 0; i < n; i++) {
        char *end;
        if (*text == ' ' && i == 0)
            return false;
        out[i] = strtod(text, &end);
        if (end == text || !isfinite(out[i]) || *end != (i < n - 1 ? ' ' : '\0'))
            return false;
        text = end + 1;
    }
    return true;
}

static int rel_field(const struct reader *r, const char *field, struct thresholds_rel *out)
{
    const char *text = safetensors_metadata(r->st, field);
    enum { LAW = 5, N = LAW + THRESHOLDS_REL_KNOTS, ALL = N + 1 + THRESHOLDS_REL_KNOTS };
    double v[ALL] = {0};
    *out = (struct thresholds_rel){0};
    if (!text)
        return 0;
    const bool all = parse_numbers(text, v, ALL) && v[N] > 0;
    bool good = (all || parse_numbers(text, v, N)) && v[1] > 0;
    for (int i = 0; good && i < ALL; i++)
        good = fabs(v[i]) <= (i < N ? 1e6 : 100);
    for (int i = LAW + 1; good && i < N; i++)
        good = v[i] > v[i - 1];
    if (!good)
        return err_set(r->why, ERR_FORMAT,
                       "%s: metadata %s is '%.120s', not a fit: ln a, b > 0, r2, least and most S, "
                       "9 increasing knots; or these, ln tokens > 0, 9 slopes",
                       r->name, field, text);
    *out = (struct thresholds_rel){.ln_a = v[0], .b = v[1], .r2 = v[2], .min = v[3], .max = v[4]};
    memcpy(out->knots, v + LAW, sizeof out->knots);
    if (all) {
        out->ln_tokens = v[N];
        memcpy(out->slopes, v + N + 1, sizeof out->slopes);
    }
    return 0;
}

static int auto_density_field(const struct reader *r, const char *text, struct thresholds_meta *m)
{
    const int32_t rows = m->auto_rows;
    if (!parse_numbers(text, &m->auto_density, 1) || !(m->auto_density > 0) || m->auto_density > 1)
        return err_set(r->why, ERR_FORMAT,
                       "%s: metadata auto_density is '%.40s', not a number above 0, at most 1",
                       r->name, text);
    if ((rows == 64 ? &m->rel_64 : &m->rel_128)->b == 0)
        return err_set(r->why, ERR_FORMAT, "%s: metadata auto_density without rel_%d", r->name,
                       rows);
    return 0;
}

/* What `auto` means where it is the REL gate. Files from before auto_rows mean 64. */
static int auto_rel_fields(const struct reader *r, struct thresholds_meta *m)
{
    const char *density = safetensors_metadata(r->st, "auto_density");
    const char *lambda = safetensors_metadata(r->st, "auto_ln_lambda");
    m->auto_rows = 0;
    m->auto_density = m->auto_ln_lambda = 0;
    if (!density && !lambda)
        return 0;
    if (density && lambda)
        return err_set(r->why, ERR_FORMAT, "%s: metadata auto_density and auto_ln_lambda", r->name);
    m->auto_rows = 64;
    if (safetensors_metadata(r->st, "auto_rows"))
        TRY(int_field(r, "auto_rows", 1, &m->auto_rows));
    if (m->auto_rows != 128 && m->auto_rows != 64)
        return err_set(r->why, ERR_FORMAT, "%s: metadata auto_rows is %d, must be 128 or 64",
                       r->name, m->auto_rows);
    if (density)
        return auto_density_field(r, density, m);
    if (!parse_numbers(lambda, &m->auto_ln_lambda, 1) || m->auto_ln_lambda < -1000 ||
        m->auto_ln_lambda > ATTN_REL_LN_MAX)
        return err_set(r->why, ERR_FORMAT,
                       "%s: metadata auto_ln_lambda is '%.40s', not a number from -1000 to %d",
                       r->name, lambda, ATTN_REL_LN_MAX);
    return 0;
}

static int read_meta(const struct reader *r, struct thresholds_meta *m)
{
    const char *rope;
    TRY(fixed_field(r, "format", THRESHOLDS_FORMAT, ERR_FORMAT));
    TRY(fixed_field(r, "version", THRESHOLDS_VERSION, ERR_VERSION));
    TRY(fixed_field(r, "page", THRESHOLDS_PAGE, ERR_UNSUPPORTED));
    TRY(hex_field(r, "model", &m->model));
    TRY(hex_field(r, "set", &m->set));
    TRY(int_field(r, "gate_rows", 1, &m->gate_rows));
    if (m->gate_rows != 128 && m->gate_rows != 64) {
        return err_set(r->why, ERR_UNSUPPORTED, "%s: metadata gate_rows is %d, must be 128 or 64",
                       r->name, m->gate_rows);
    }
    TRY(int_field(r, "n_max", 1, &m->n_max));
    TRY(source_field(r, &m->imported));
    TRY(int_field(r, "samples", m->imported ? 0 : 1, &m->n_samples));
    TRY(int_field(r, "auto_k", 0, &m->auto_k));
    TRY(int_field(r, "auto_min", 0, &m->auto_min));
    TRY(scale_field(r, &m->softmax_scale));
    TRY(rel_field(r, "rel_128", &m->rel_128));
    TRY(rel_field(r, "rel_64", &m->rel_64));
    TRY(auto_rel_fields(r, m));
    TRY(text_field(r, "rope", &rope));
    if (!*rope || strlen(rope) >= sizeof m->rope) {
        return err_set(r->why, ERR_FORMAT, "%s: metadata rope is empty or longer than %zu bytes",
                       r->name, sizeof m->rope - 1);
    }
    memcpy(m->rope, rope, strlen(rope) + 1);
    return 0;
}

/* ---- tensors -------------------------------------------------------------------------------- */

/* NULL with the reason told; every reason is ERR_FORMAT. */
static const struct st_tensor *find_tensor(const struct reader *r, const char *name,
                                           enum st_dtype dtype, int n_dims)
{
    const struct st_tensor *t = safetensors_find(r->st, name);
    if (!t) {
        (void)err_set(r->why, ERR_FORMAT, "%s: tensor %s is missing", r->name, name);
        return NULL;
    }
    if (t->dtype != dtype) {
        (void)err_set(r->why, ERR_FORMAT, "%s: tensor %s is %s, must be %s", r->name, name,
                      st_dtype_name(t->dtype), st_dtype_name(dtype));
        return NULL;
    }
    if (t->n_dims != n_dims) {
        char shape[128];
        (void)err_set(r->why, ERR_FORMAT, "%s: tensor %s has shape %s, must have %d dimensions",
                      r->name, name, st_shape_text(shape, sizeof shape, t->shape, t->n_dims),
                      n_dims);
        return NULL;
    }
    return t;
}

/* Names of a pair: thresholds and their k. */
struct pair {
    const char *t, *k;
};

static int check_shape(const struct reader *r, const struct st_tensor *t, const struct st_tensor *k,
                       struct pair names)
{
    char shape[128];
    const int64_t *s = t->shape;
    st_shape_text(shape, sizeof shape, s, t->n_dims);
    if (s[0] < 1 || s[0] > MAX_LEVELS || s[1] < 1 || s[1] > MAX_LAYERS || s[2] < 1 ||
        s[2] > MAX_HEADS || s[3] < 1 || s[3] > MAX_BLOCKS) {
        return err_set(r->why, ERR_FORMAT,
                       "%s: tensor %s has shape %s, outside 1 to [%d, %d, %d, %d]", r->name,
                       names.t, shape, MAX_LEVELS, MAX_LAYERS, MAX_HEADS, MAX_BLOCKS);
    }
    if (k->shape[0] != s[0]) {
        return err_set(r->why, ERR_FORMAT, "%s: tensor %s has %" PRId64 " levels, %s has shape %s",
                       r->name, names.k, k->shape[0], names.t, shape);
    }
    return 0;
}

static int check_length(const struct reader *r, const struct attn_thresholds *v,
                        const struct thresholds_meta *m)
{
    if (v->n_blocks != (m->n_max + (int64_t)KV_BLOCK_TOKENS - 1) / KV_BLOCK_TOKENS) {
        return err_set(r->why, ERR_FORMAT,
                       "%s: metadata n_max %d disagrees with %d blocks of %d tokens", r->name,
                       m->n_max, v->n_blocks, KV_BLOCK_TOKENS);
    }
    return 0;
}

static int check_k(const struct reader *r, const int32_t *k, int32_t n, const char *name)
{
    for (int32_t i = 0; i < n; i++) {
        if (k[i] < 1 || k[i] > MAX_COUNT || (i > 0 && k[i] <= k[i - 1])) {
            return err_set(r->why, ERR_FORMAT,
                           "%s: %s[%d] = %d: not positive and increasing, or above %d", r->name,
                           name, i, k[i], MAX_COUNT);
        }
    }
    return 0;
}

static int check_auto_k(const struct reader *r, const struct thresholds *t)
{
    const int32_t auto_k = t->meta.auto_k;
    for (int32_t i = 0; i < t->view.n_levels; i++) {
        if (t->k[i] == auto_k)
            return 0;
    }
    if (auto_k == 0)
        return 0;
    return err_set(r->why, ERR_FORMAT, "%s: metadata auto_k is %d, which is not in k", r->name,
                   auto_k);
}

/* n whole numbers with a blank between them. */
static bool parse_counts(const char *text, int32_t *out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        char *end;
        errno = 0;
        const long v = *text >= '0' && *text <= '9' ? strtol(text, &end, 10) : 0;
        if (v < 1 || v > MAX_COUNT || errno || *end != (i < n - 1 ? ' ' : '\0'))
            return false;
        out[i] = (int32_t)v;
        text = end + 1;
    }
    return true;
}

/* `head_k` is optional: without it all heads keep the level's k. */
static int read_head_k(const struct reader *r, struct thresholds *t)
{
    const struct attn_thresholds *v = &t->view;
    const char *text = safetensors_metadata(r->st, "head_k");
    const size_t heads = (size_t)v->n_layers * (size_t)v->n_heads;
    const size_t n = (size_t)v->n_levels * heads;
    if (!text)
        return 0;
    bool good = strlen(text) >= 2 * n - 1; /* before memory is taken */
    if (good) {
        t->head_k = mem_alloc(n * sizeof *t->head_k);
        good = parse_counts(text, t->head_k, n);
    }
    for (size_t i = heads; good && i < n; i++)
        good = t->head_k[i] >= t->head_k[i - heads];
    if (!good)
        return err_set(r->why, ERR_FORMAT,
                       "%s: metadata head_k is '%.40s', not %zu whole numbers of which no head's "
                       "falls from level to level",
                       r->name, text, n);
    t->meta.head_k = t->head_k;
    return 0;
}

/* What each head keeps at each level. */
static void fill_pages(struct thresholds *t)
{
    const struct thresholds_rel_heads shape = {NULL, t->view.n_levels};
    const size_t heads = (size_t)t->view.n_layers * (size_t)t->view.n_heads;
    const size_t n = (size_t)t->view.n_levels * heads;
    t->pages = thresholds_rel_heads_view(&shape, t->view.n_layers, t->view.n_heads);
    t->pages.t = t->pages_t = mem_alloc(n * sizeof *t->pages_t);
    for (size_t i = 0; i < n; i++)
        t->pages_t[i] = (float)(t->head_k ? t->head_k[i] : t->k[i / heads]);
}

static int check_values(const struct reader *r, const struct attn_thresholds *v, const char *name)
{
    size_t n = (size_t)v->n_levels * (size_t)v->level_stride;
    for (size_t i = 0; i < n; i++) {
        if (!isnan(v->t[i]))
            continue;
        return err_set(
            r->why, ERR_FORMAT, "%s: %s[%zu, %zu, %zu, %zu] is NaN", r->name, name,
            i / (size_t)v->level_stride, i % (size_t)v->level_stride / (size_t)v->layer_stride,
            i % (size_t)v->layer_stride / (size_t)v->head_stride, i % (size_t)v->head_stride);
    }
    return 0;
}

static uint64_t content_hash(const struct thresholds *t)
{
    const struct attn_thresholds *v = &t->view;
    const int32_t shape[] = {v->n_levels, v->n_layers, v->n_heads, v->n_blocks, t->meta.gate_rows};
    uint64_t h = hash_bytes(shape, sizeof shape, t->meta.model);
    h = hash_bytes(t->k, (size_t)v->n_levels * sizeof *t->k, h);
    if (t->meta.head_k) /* what heads keep; else it follows from k */
        h = hash_bytes(t->pages.t,
                       (size_t)v->n_levels * (size_t)t->pages.level_stride * sizeof *t->pages.t, h);
    h = hash_bytes(t->t, (size_t)v->n_levels * (size_t)v->level_stride * sizeof *t->t, h);
    for (int i = 0; i < 2 && t->rel[i].t; i++) {
        v = &t->rel[i];
        h = hash_bytes(&v->n_levels, sizeof v->n_levels, h);
        h = hash_bytes(v->t, (size_t)v->n_levels * (size_t)v->level_stride * sizeof *v->t, h);
    }
    v = &t->decode;
    if (!v->t) /* the same as before there were any */
        return h;
    const int32_t decode[] = {v->n_levels, v->n_blocks};
    h = hash_bytes(decode, sizeof decode, h);
    h = hash_bytes(t->decode_k, (size_t)v->n_levels * sizeof *t->decode_k, h);
    return hash_bytes(v->t, (size_t)v->n_levels * (size_t)v->level_stride * sizeof *v->t, h);
}

/* A tensor of thresholds and its k; *at and *k are released with the file, whatever comes back. */
static int read_pair(const struct reader *r, struct pair names, struct attn_thresholds *view,
                     float **at, int32_t **k)
{
    const struct st_tensor *t = find_tensor(r, names.t, ST_F32, 4);
    const struct st_tensor *levels = t ? find_tensor(r, names.k, ST_I32, 1) : NULL;
    if (!t || !levels)
        return ERR_FORMAT;
    TRY(check_shape(r, t, levels, names));
    *at = mem_try_aligned(t->bytes, 1);
    if (!*at)
        return err_set(r->why, -ENOMEM, "%s: no memory for %zu bytes", r->name, t->bytes);
    *k = mem_alloc(levels->bytes);
    memcpy(*at, t->data, t->bytes);
    memcpy(*k, levels->data, levels->bytes);
    int64_t per_layer = t->shape[2] * t->shape[3];
    *view = (struct attn_thresholds){.t = *at,
                                     .n_levels = (int32_t)t->shape[0],
                                     .n_layers = (int32_t)t->shape[1],
                                     .n_heads = (int32_t)t->shape[2],
                                     .n_blocks = (int32_t)t->shape[3],
                                     .level_stride = t->shape[1] * per_layer,
                                     .layer_stride = per_layer,
                                     .head_stride = t->shape[3]};
    TRY(check_k(r, *k, view->n_levels, names.k));
    return check_values(r, view, names.t);
}

/* Thresholds of generated rows are optional: both tensors or neither. */
static int read_decode(const struct reader *r, struct thresholds *out)
{
    const struct pair names = {"decode", "decode_k"};
    const struct attn_thresholds *v = &out->decode;
    if (!safetensors_find(r->st, names.t) && !safetensors_find(r->st, names.k))
        return 0;
    TRY(read_pair(r, names, &out->decode, &out->decode_t, &out->decode_k));
    if (v->n_layers != out->view.n_layers || v->n_heads != out->view.n_heads) {
        return err_set(r->why, ERR_FORMAT,
                       "%s: tensor decode is for %d layers of %d heads, thresholds for %d of %d",
                       r->name, v->n_layers, v->n_heads, out->view.n_layers, out->view.n_heads);
    }
    out->meta.decode =
        (struct thresholds_decode){out->decode_t, out->decode_k, v->n_levels, v->n_blocks};
    return 0;
}

/* ---- densities of heads --------------------------------------------------------------------- */

static int check_densities(const struct reader *r, const struct attn_thresholds *v,
                           const char *name)
{
    const size_t n = (size_t)v->n_levels * (size_t)v->level_stride;
    for (size_t i = 0; i < n; i++) {
        if (v->t[i] >= 0 && v->t[i] <= 1)
            continue;
        return err_set(r->why, ERR_FORMAT, "%s: %s[%zu, %zu, %zu] is %g, not from 0 to 1", r->name,
                       name, i / (size_t)v->level_stride,
                       i % (size_t)v->level_stride / (size_t)v->layer_stride,
                       i % (size_t)v->layer_stride, (double)v->t[i]);
    }
    for (int32_t i = 1; i < v->n_levels; i++) {
        if (!(thresholds_rel_mean(v, i) < thresholds_rel_mean(v, i - 1)))
            return err_set(r->why, ERR_FORMAT, "%s: %s: the mean of step %d is not below step %d's",
                           r->name, name, i, i - 1);
    }
    return 0;
}

static int read_rel_heads(const struct reader *r, const char *name, const struct thresholds *of,
                          struct attn_thresholds *view, float **at)
{
    const struct st_tensor *t = find_tensor(r, name, ST_F32, 3);
    if (!t)
        return ERR_FORMAT;
    if (t->shape[0] < 2 || t->shape[0] > MAX_LEVELS || t->shape[1] != of->view.n_layers ||
        t->shape[2] != of->view.n_heads) {
        char shape[128];
        return err_set(r->why, ERR_FORMAT,
                       "%s: tensor %s has shape %s, not 2 to %d steps of %d layers of %d heads",
                       r->name, name, st_shape_text(shape, sizeof shape, t->shape, t->n_dims),
                       MAX_LEVELS, of->view.n_layers, of->view.n_heads);
    }
    *at = mem_try_aligned(t->bytes, 1);
    if (!*at)
        return err_set(r->why, -ENOMEM, "%s: no memory for %zu bytes", r->name, t->bytes);
    memcpy(*at, t->data, t->bytes);
    const struct thresholds_rel_heads heads = {*at, (int32_t)t->shape[0]};
    *view = thresholds_rel_heads_view(&heads, of->view.n_layers, of->view.n_heads);
    return check_densities(r, view, name);
}

/* Optional: both tensors or neither, and only where lambda is known for a density. */
static int read_rel(const struct reader *r, struct thresholds *out)
{
    static const char *const names[] = {"rel_128_heads", "rel_64_heads"};
    const double known[] = {out->meta.rel_128.b, out->meta.rel_64.b};
    if (!safetensors_find(r->st, names[0]) && !safetensors_find(r->st, names[1]))
        return 0;
    for (int i = 0; i < 2; i++) {
        TRY(read_rel_heads(r, names[i], out, &out->rel[i], &out->rel_t[i]));
        if (!(known[i] > 0))
            return err_set(r->why, ERR_FORMAT, "%s: tensor %s without metadata rel_%d", r->name,
                           names[i], i == 0 ? 128 : 64);
    }
    out->meta.rel_128_heads = (struct thresholds_rel_heads){out->rel_t[0], out->rel[0].n_levels};
    out->meta.rel_64_heads = (struct thresholds_rel_heads){out->rel_t[1], out->rel[1].n_levels};
    return 0;
}

static int read_tensors(const struct reader *r, struct thresholds *out)
{
    const struct pair names = {"thresholds", "k"};
    TRY(read_pair(r, names, &out->view, &out->t, &out->k));
    TRY(read_decode(r, out));
    TRY(read_rel(r, out));
    if (safetensors_count(r->st) != 2u + (out->decode_t ? 2 : 0) + (out->rel_t[0] ? 2 : 0)) {
        return err_set(r->why, ERR_FORMAT,
                       "%s: %zu tensors, must be thresholds and k, or with them decode and "
                       "decode_k, or rel_128_heads and rel_64_heads",
                       r->name, safetensors_count(r->st));
    }
    TRY(check_length(r, &out->view, &out->meta));
    TRY(check_auto_k(r, out));
    TRY(read_head_k(r, out));
    fill_pages(out);
    out->hash = content_hash(out);
    return 0;
}

int thresholds_parse(struct thresholds **out, const void *data, size_t len, const char *name,
                     struct err_msg *why)
{
    struct safetensors *st = NULL;
    TRY(safetensors_parse(&st, data, len, name, why));
    struct reader r = {.st = st, .name = name, .why = why};
    struct thresholds *t = mem_zalloc(1, sizeof *t);
    t->name = mem_strdup(name);
    int err = read_meta(&r, &t->meta);
    if (err == 0)
        err = read_tensors(&r, t);
    safetensors_close(st);
    if (err < 0) {
        thresholds_free(t);
        return err;
    }
    *out = t;
    return 0;
}

int thresholds_load(struct thresholds **out, const char *path, struct err_msg *why)
{
    void *data = NULL;
    size_t len = 0;
    TRY(thresholds_read_file(path, &data, &len, why));
    int err = thresholds_parse(out, data, len, path, why);
    mem_free(data);
    return err;
}

void thresholds_free(struct thresholds *t)
{
    if (!t)
        return;
    mem_free(t->name);
    mem_free(t->t);
    mem_free(t->k);
    mem_free(t->head_k);
    mem_free(t->pages_t);
    mem_free(t->decode_t);
    mem_free(t->decode_k);
    mem_free(t->rel_t[0]);
    mem_free(t->rel_t[1]);
    mem_free(t);
}

const struct thresholds_meta *thresholds_meta(const struct thresholds *t)
{
    return &t->meta;
}

const struct attn_thresholds *thresholds_view(const struct thresholds *t)
{
    return &t->view;
}

const struct attn_thresholds *thresholds_decode_view(const struct thresholds *t)
{
    return &t->decode;
}

const struct attn_thresholds *thresholds_pages_view(const struct thresholds *t)
{
    return &t->pages;
}

const struct attn_thresholds *thresholds_rel_view(const struct thresholds *t, int32_t gate_rows)
{
    return &t->rel[gate_rows == 64];
}

const int32_t *thresholds_k(const struct thresholds *t, int32_t *n_levels)
{
    *n_levels = t->view.n_levels;
    return t->k;
}

int thresholds_level(const struct thresholds *t, int32_t k, struct err_msg *why)
{
    char list[256] = "";
    size_t at = 0;
    for (int32_t i = 0; i < t->view.n_levels; i++) {
        if (t->k[i] == k)
            return i;
        if (at < sizeof list)
            at += (size_t)snprintf(list + at, sizeof list - at, "%s%d", i ? ", " : "", t->k[i]);
    }
    return err_set(why, ERR_INVALID, "%s has no thresholds for k=%d, only for %s", t->name, k,
                   list);
}

uint64_t thresholds_hash(const struct thresholds *t)
{
    return t->hash;
}

int thresholds_check(const struct thresholds *t, const struct thresholds_expect *e,
                     struct err_msg *why)
{
    const struct thresholds_meta *m = &t->meta;
    if (t->view.n_layers != e->n_layers) {
        return err_set(why, ERR_MISMATCH, "%s: made for %d layers, the model has %d", t->name,
                       t->view.n_layers, e->n_layers);
    }
    if (t->view.n_heads != e->n_heads) {
        return err_set(why, ERR_MISMATCH, "%s: made for %d heads, the model has %d", t->name,
                       t->view.n_heads, e->n_heads);
    }
    if (fabsf(m->softmax_scale - e->softmax_scale) > 1e-6f * e->softmax_scale) {
        return err_set(why, ERR_MISMATCH, "%s: softmax_scale is %.9g, the model's is %.9g", t->name,
                       (double)m->softmax_scale, (double)e->softmax_scale);
    }
    if (strcmp(m->rope, e->rope) != 0) {
        return err_set(why, ERR_MISMATCH, "%s: rope is '%s', the model's is '%s'", t->name, m->rope,
                       e->rope);
    }
    if (m->model != e->model) {
        return err_set(why, ERR_MISMATCH,
                       "%s: model is %016" PRIx64 ", the loaded one is %016" PRIx64, t->name,
                       m->model, e->model);
    }
    return 0;
}

/* ---- predicted density ---------------------------------------------------------------------- */

/* Adds blocks [0, n) of `groups` decisions each: with A_i = 2i, sum of min(k, A_i) and of A_i. */
static void sum_blocks(int64_t k, int64_t n, double *kept, double *all)
{
    const int64_t per_block = KV_BLOCK_TOKENS / KV_PAGE_TOKENS;
    int64_t few = (k + per_block - 1) / per_block; /* blocks whose A_i does not reach k */
    if (few > n)
        few = n;
    *kept = (double)per_block * (double)few * (double)(few - 1) / 2 + (double)k * (double)(n - few);
    *all = (double)per_block * (double)n * (double)(n - 1) / 2;
}

double thresholds_predicted_density(int32_t k, int64_t n_tokens, int32_t gate_rows)
{
    const int64_t groups = KV_BLOCK_TOKENS / gate_rows;
    const int64_t full = n_tokens / KV_BLOCK_TOKENS, rest = n_tokens % KV_BLOCK_TOKENS;
    double kept, all;
    if (n_tokens < 1)
        return 1;
    sum_blocks(k, full, &kept, &all);
    /* A block's diagonal: 2 pages for its one decision, or 1 and 2 for its halves. */
    double diag = (double)full * (groups == 1 ? 2 : 3);
    kept = kept * (double)groups;
    all = all * (double)groups;
    if (rest > 0) {
        int64_t halves = (rest + 63) / 64, last_groups = groups == 1 ? 1 : halves;
        int64_t reach = full * KV_BLOCK_TOKENS / KV_PAGE_TOKENS;
        kept += (double)(last_groups * (k < reach ? k : reach));
        all += (double)(last_groups * reach);
        diag += groups == 1 ? (double)halves : (halves == 1 ? 1 : 3);
    }
    return (kept + diag) / (all + diag);
}

double thresholds_heads_density(const int32_t *k, int64_t n, int64_t n_tokens, int32_t gate_rows)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += thresholds_predicted_density(k[i], n_tokens, gate_rows);
    return sum / (double)n;
}

double thresholds_level_density(const struct thresholds *t, int32_t level, int64_t n_tokens)
{
    const int64_t heads = (int64_t)t->view.n_layers * t->view.n_heads;
    if (!t->head_k)
        return thresholds_predicted_density(t->k[level], n_tokens, t->meta.gate_rows);
    return thresholds_heads_density(t->head_k + level * heads, heads, n_tokens, t->meta.gate_rows);
}

int32_t thresholds_level_for(const struct thresholds *t, double density, int64_t n_tokens)
{
    int32_t i = 0, n = 0;
    (void)thresholds_k(t, &n);
    while (i < n - 1 && thresholds_level_density(t, i, n_tokens) < density)
        i++;
    return i;
}

double thresholds_row_density(int32_t k, int64_t n_tokens)
{
    const int64_t available = n_tokens / KV_PAGE_TOKENS;
    return (double)((k < available ? k : available) + 1) / (double)(available + 1);
}

double thresholds_decode_density(const struct thresholds *t, int32_t level, int64_t n_tokens)
{
    return thresholds_row_density(t->decode_k[level], n_tokens);
}

int32_t thresholds_k_for_density(double density, int64_t n_tokens, int32_t gate_rows)
{
    int32_t lo = 1, hi = kv_pages_for(n_tokens);
    while (lo < hi) { /* the density grows with k */
        int32_t mid = lo + (hi - lo) / 2;
        if (thresholds_predicted_density(mid, n_tokens, gate_rows) >= density)
            hi = mid;
        else
            lo = mid + 1;
    }
    return lo;
}
