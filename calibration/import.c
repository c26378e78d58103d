#include "calibration/import.h"

#include "calibration/pt_file.h"
#include "calibration/thresholds_file.h"
#include "core/hash.h"
#include "core/mem.h"
#include "kvcache/kv_view.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdbool.h>

enum { MAX_BLOCKS = 1 << 20, MAX_K = 1 << 24 };

struct source {
    const struct pt_file *file;
    const char *name;
    struct err_msg *why;
};

static int must_be(const struct source *s, const char *field, int64_t want, const char *because)
{
    int64_t v;
    TRY(pt_file_int(s->file, field, &v, s->why));
    if (v != want) {
        return err_set(s->why, ERR_MISMATCH, "%s: %s is %" PRId64 ", must be %" PRId64 "%s",
                       s->name, field, v, want, because);
    }
    return 0;
}

static int must_be_if_there(const struct source *s, const char *field, int64_t want,
                            const char *because)
{
    return pt_file_has(s->file, field) ? must_be(s, field, want, because) : 0;
}

static int read_levels(const struct source *s, struct thresholds_import *out)
{
    int64_t k[IMPORT_MAX_LEVELS];
    TRY(pt_file_ints(s->file, "k_values", k, IMPORT_MAX_LEVELS, &out->n_levels, s->why));
    for (int32_t i = 0; i < out->n_levels; i++) {
        if (k[i] < 1 || k[i] > MAX_K || (i > 0 && k[i] <= k[i - 1])) {
            return err_set(s->why, ERR_FORMAT,
                           "%s: k_values[%d] = %" PRId64 ": not increasing, from 1 to %d", s->name,
                           i, k[i], MAX_K);
        }
        out->k[i] = (int32_t)k[i];
    }
    return 0;
}

/* [levels, layers, heads, blocks], the model's layers and query heads among them. */
static int check_shape(const struct source *s, const struct pt_tensor *t, int32_t n_layers,
                       int32_t n_heads, struct thresholds_import *out)
{
    if (t->dtype == PT_I64 || t->dtype == PT_I32) {
        return err_set(s->why, ERR_FORMAT, "%s: thresholds is in %s, must be a floating-point type",
                       s->name, pt_dtype_name(t->dtype));
    }
    if (t->n_dims != 4) {
        return err_set(
            s->why, ERR_FORMAT,
            "%s: thresholds has %d dimensions, must be [k_values, layers, heads, blocks]", s->name,
            t->n_dims);
    }
    if (t->shape[0] != out->n_levels) {
        return err_set(s->why, ERR_FORMAT, "%s: thresholds has %" PRId64 " levels, k_values %d",
                       s->name, t->shape[0], out->n_levels);
    }
    if (t->shape[1] != n_layers || t->shape[2] != n_heads) {
        return err_set(s->why, ERR_MISMATCH,
                       "%s: thresholds is for %" PRId64 " layers of %" PRId64
                       " heads, the model has %d of %d",
                       s->name, t->shape[1], t->shape[2], n_layers, n_heads);
    }
    if (t->shape[3] > MAX_BLOCKS) {
        return err_set(s->why, ERR_FORMAT, "%s: thresholds has %" PRId64 " blocks, at most %d",
                       s->name, t->shape[3], MAX_BLOCKS);
    }
    out->n_layers = n_layers;
    out->n_heads = n_heads;
    out->n_blocks = (int32_t)t->shape[3];
    return 0;
}

/* The fields that say in which units the thresholds are, and those that only repeat the shape. */
static int check_fields(const struct source *s, const struct thresholds_import *t)
{
    TRY(must_be(s, "q_block_size", KV_BLOCK_TOKENS, ", the tokens of a query block here"));
    TRY(must_be(s, "k_block_size", KV_PAGE_TOKENS, ", the tokens of a page here"));
    TRY(must_be_if_there(s, "num_layers", t->n_layers, ", as thresholds has"));
    TRY(must_be_if_there(s, "num_heads", t->n_heads, ", as thresholds has"));
    return must_be_if_there(s, "max_num_blocks", t->n_blocks, ", as thresholds has");
}

/* One value of level k at query block i. NaN decides nothing, and +inf is an overflow of the half
 * precision in which the reference takes its maxima: it would drop every page. */
static int check_value(const struct source *s, struct thresholds_import *t, int64_t at)
{
    const int64_t i = at % t->n_blocks, row = at / t->n_blocks;
    const int32_t k = t->k[row / t->n_heads / t->n_layers];
    const float v = t->t[at];
    if (isnan(v) || v == INFINITY) {
        return err_set(s->why, ERR_FORMAT,
                       "%s: thresholds[%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 "] is %s",
                       s->name, row / t->n_heads / t->n_layers, row / t->n_heads % t->n_layers,
                       row % t->n_heads, i, isnan(v) ? "NaN" : "+inf");
    }
    const bool choice = i * (KV_BLOCK_TOKENS / KV_PAGE_TOKENS) > k;
    t->n_dense += choice && v == -INFINITY;
    t->n_limited += !choice && v != -INFINITY;
    return 0;
}

static int read_values(const struct source *s, const struct pt_tensor *t,
                       struct thresholds_import *out)
{
    out->t = mem_try_aligned((size_t)t->n, sizeof *out->t);
    if (!out->t) {
        return err_set(s->why, -ENOMEM, "%s: no memory for %" PRId64 " thresholds", s->name, t->n);
    }
    for (int64_t i = 0; i < t->n; i++) {
        out->t[i] = pt_tensor_f32(t, i);
        TRY(check_value(s, out, i));
    }
    out->set = hash_bytes(out->t, (size_t)t->n * sizeof *out->t, 0);
    return 0;
}

static int read_file(const struct source *s, int32_t n_layers, int32_t n_heads,
                     struct thresholds_import *out)
{
    struct pt_tensor t;
    TRY(read_levels(s, out));
    TRY(pt_file_tensor(s->file, "thresholds", &t, s->why));
    TRY(check_shape(s, &t, n_layers, n_heads, out));
    TRY(check_fields(s, out));
    return read_values(s, &t, out);
}

int thresholds_import_parse(struct thresholds_import *out, const void *data, size_t len,
                            const char *name, int32_t n_layers, int32_t n_heads,
                            struct err_msg *why)
{
    struct pt_file *file = NULL;
    *out = (struct thresholds_import){0};
    TRY(pt_file_parse(&file, data, len, name, why));
    const struct source s = {.file = file, .name = name, .why = why};
    int err = read_file(&s, n_layers, n_heads, out);
    pt_file_close(file);
    if (err < 0)
        thresholds_import_free(out);
    return err;
}

int thresholds_import(struct thresholds_import *out, const char *path, int32_t n_layers,
                      int32_t n_heads, struct err_msg *why)
{
    void *data = NULL;
    size_t len = 0;
    *out = (struct thresholds_import){0};
    TRY(thresholds_read_file(path, &data, &len, why));
    int err = thresholds_import_parse(out, data, len, path, n_layers, n_heads, why);
    mem_free(data);
    return err;
}

void thresholds_import_free(struct thresholds_import *t)
{
    mem_free(t->t);
    *t = (struct thresholds_import){0};
}
