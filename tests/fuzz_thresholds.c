/* Any bytes give an error or a sound threshold file. The first byte chooses what the rest is: the
 * file itself, or header text up to a NUL and then tensor bytes, which spares the fuzzer the work
 * of keeping the header's length right. */
#include "calibration/thresholds.h"
#include "model/batch.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void demand(int condition)
{
    if (!condition)
        abort();
}

static void check_values(const struct attn_thresholds *v)
{
    size_t count = (size_t)v->n_levels * (size_t)v->level_stride;
    for (size_t i = 0; i < count; i++)
        demand(!isnan(v->t[i]));
}

/* Those of generated rows fit the others' layers and heads. */
static void check_decode(const struct thresholds *t)
{
    const struct attn_thresholds *v = thresholds_view(t), *d = thresholds_decode_view(t);
    const struct thresholds_decode *m = &thresholds_meta(t)->decode;
    demand((d->t != NULL) == (m->t != NULL));
    if (!d->t)
        return;
    demand(d->n_layers == v->n_layers && d->n_heads == v->n_heads);
    demand(d->n_levels == m->n_levels && d->n_levels >= 1 && d->n_blocks >= 1);
    for (int32_t i = 0; i < d->n_levels; i++) {
        const double density = thresholds_decode_density(t, i, 1000);
        demand(m->k[i] > (i ? m->k[i - 1] : 0) && density > 0 && density <= 1);
    }
    check_values(d);
}

/* Densities of heads fit too, and any mean lies among them. */
static void check_rel(const struct thresholds *t, int rows)
{
    const struct attn_thresholds *v = thresholds_view(t), *d = thresholds_rel_view(t, rows);
    struct batch_policy p = {.gate_rows = (uint8_t)rows, .steer = 1, .level = -1, .blend = -1};
    demand((d->t != NULL) == (thresholds_meta(t)->rel_128_heads.t != NULL));
    demand(thresholds_rel_steer(d, 0.3, 4000, &p) == (d->t != NULL));
    if (!d->t)
        return;
    demand(d->n_layers == v->n_layers && d->n_heads == v->n_heads && d->n_blocks == 1);
    demand(p.level >= 0 && p.level < d->n_levels - 1 && p.blend >= 0 && p.blend <= 1);
    for (int64_t i = 0; i < d->n_levels * d->level_stride; i++)
        demand(d->t[i] >= 0 && d->t[i] <= 1);
}

/* What the rest of the engine relies on once a file is accepted. */
static void check(const struct thresholds *t)
{
    const struct attn_thresholds *v = thresholds_view(t);
    const struct thresholds_meta *m = thresholds_meta(t);
    int32_t n;
    const int32_t *k = thresholds_k(t, &n);
    demand(n == v->n_levels && n >= 1 && v->n_blocks >= 1 && v->n_layers >= 1 && v->n_heads >= 1);
    demand(m->gate_rows == 128 || m->gate_rows == 64);
    demand(m->auto_k == 0 || thresholds_level(t, m->auto_k, NULL) >= 0);
    demand(m->auto_density >= 0 && m->auto_density <= 1);
    demand(m->auto_rows == 0 || m->auto_rows == 64 || m->auto_rows == 128);
    demand(m->auto_density == 0 || m->auto_rows > 0);
    demand(m->auto_density == 0 || (m->auto_rows == 64 ? m->rel_64 : m->rel_128).b > 0);
    demand(m->auto_ln_lambda >= -1000 && m->auto_ln_lambda <= ATTN_REL_LN_MAX);
    demand(m->rel_64.b >= 0 && m->rel_128.b >= 0 && isfinite(m->rel_64.ln_a + m->rel_64.b));
    demand(memchr(m->rope, 0, sizeof m->rope) != NULL);
    for (int32_t i = 0; i < n; i++)
        demand(k[i] > (i ? k[i - 1] : 0) && thresholds_level(t, k[i], NULL) == i);
    for (int32_t i = 0, heads = v->n_layers * v->n_heads; m->head_k && i < n * heads; i++)
        demand(m->head_k[i] >= (i < heads ? 1 : m->head_k[i - heads]));
    for (int32_t i = 0; i < n; i++) {
        const double density = thresholds_level_density(t, i, m->n_max);
        demand(density > 0 && density <= 1 + 1e-9);
        demand(i == 0 || density >= thresholds_level_density(t, i - 1, m->n_max) - 1e-9);
    }
    check_values(v);
    check_decode(t);
    struct batch_policy abs = {.gate = BATCH_ABS, .blend = -1};
    thresholds_abs_steer(t, 0.3, 4000, &abs);
    demand(abs.blend > 0 && isfinite(abs.blend));
    for (int32_t i = 0; i < n * v->n_layers * v->n_heads; i++)
        demand(thresholds_pages_view(t)->t[i] >= 1);
    check_rel(t, 128);
    check_rel(t, 64);
}

static void parse(const uint8_t *data, size_t size)
{
    struct thresholds *t = NULL, *again = NULL;
    struct err_msg why = {""};
    if (thresholds_parse(&t, data, size, "input", &why) < 0) {
        demand(strstr(why.text, "input") != NULL);
        return;
    }
    check(t);
    demand(thresholds_parse(&again, data, size, "input", NULL) == 0);
    demand(thresholds_hash(t) == thresholds_hash(again));
    thresholds_free(t);
    thresholds_free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1)
        return 0;
    if (data[0] & 1) {
        parse(data + 1, size - 1);
        return 0;
    }
    const uint8_t *end = memchr(data + 1, 0, size - 1);
    size_t header = end ? (size_t)(end - data) - 1 : size - 1;
    size_t rest = end ? size - 2 - header : 0;
    uint8_t *file = malloc(8 + header + rest);
    if (!file)
        return 0;
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)((uint64_t)header >> (8 * i));
    memcpy(file + 8, data + 1, header);
    if (rest > 0)
        memcpy(file + 8 + header, end + 1, rest);
    parse(file, 8 + header + rest);
    free(file);
    return 0;
}
