/* calibration/import: the reference implementation's thresholds come through unchanged, from files
 * that torch wrote; a field that does not fit is refused by its name. */
#include "tests/test.h"

#include "calibration/export.h"
#include "calibration/import.h"
#include "calibration/thresholds.h"
#include "tests/pt_case.h"

#include <errno.h>
#include <stdbool.h>
#include <unistd.h>

/* As gen/make_pt.py has it. */
static float value(int s, int l, int h, int i, int k)
{
    return 2 * i <= k ? -INFINITY : -16 + (float)((s * 97 + l * 31 + h * 7 + i) % 256) / 8;
}

static void load(struct thresholds_import *t, const char *file, int layers, int heads)
{
    char path[512];
    struct err_msg why = {""};
    (void)snprintf(path, sizeof path, "%s/pt/%s", TEST_DATA, file);
    if (thresholds_import(t, path, layers, heads, &why) < 0)
        fail_msg("%s", why.text);
}

static void check(const char *file, const int *k, int n_levels, int layers, int n_blocks)
{
    struct thresholds_import t;
    size_t at = 0;
    load(&t, file, layers, 4);
    assert_int_equal(t.n_levels, n_levels);
    assert_int_equal(t.n_layers, layers);
    assert_int_equal(t.n_heads, 4);
    assert_int_equal(t.n_blocks, n_blocks);
    assert_true(t.n_dense == 0 && t.n_limited == 0);
    for (int s = 0; s < n_levels; s++) {
        assert_int_equal(t.k[s], k[s]);
        for (int l = 0; l < layers; l++) {
            for (int h = 0; h < 4; h++) {
                for (int i = 0; i < n_blocks; i++) {
                    if (t.t[at] != value(s, l, h, i, k[s]))
                        fail_msg("%s [%d, %d, %d, %d] = %g", file, s, l, h, i, (double)t.t[at]);
                    at++;
                }
            }
        }
    }
    thresholds_import_free(&t);
}

static void genuine(void **state)
{
    (void)state;
    const int k[] = {2, 5, 9}, one[] = {300};
    check("reference.pt", k, 3, 3, 8);
    check("torch_2_4.pt", k, 3, 3, 8);
    check("bf16_offset.pt", k, 3, 3, 8);
    check("f64_tuple.pt", k, 3, 3, 8);
    check("f16_one.pt", one, 1, 2, 160);
    struct thresholds_import a, b;
    load(&a, "reference.pt", 3, 4);
    load(&b, "f64_tuple.pt", 3, 4);
    assert_true(a.set == b.set); /* of the values, whatever the format */
    thresholds_import_free(&a);
    thresholds_import_free(&b);
}

/* Whatever byte of a file changes: it is refused, or says the same. */
static void flipped(void **state)
{
    (void)state;
    unsigned char data[8192], *copy;
    struct thresholds_import t, want;
    char path[512];
    int refused = 0;
    (void)snprintf(path, sizeof path, "%s/pt/reference.pt", TEST_DATA);
    FILE *in = fopen(path, "re");
    assert_non_null(in);
    const size_t len = fread(data, 1, sizeof data, in);
    (void)fclose(in);
    load(&want, "reference.pt", 3, 4);
    copy = malloc(len);
    assert_non_null(copy);
    for (size_t i = 0; i < len; i++) {
        for (int bit = 0; bit < 8; bit++) {
            memcpy(copy, data, len);
            copy[i] = (unsigned char)(copy[i] ^ (1 << bit));
            if (thresholds_import_parse(&t, copy, len, "FILE", 3, 4, NULL) < 0) {
                refused++;
                continue;
            }
            assert_true(t.set == want.set && t.n_levels == 3);
            assert_memory_equal(t.k, want.k, sizeof t.k);
            thresholds_import_free(&t);
        }
    }
    assert_true(refused > 8 * 1800); /* of 8 * 2999: padding and times mean nothing */
    free(copy);
    thresholds_import_free(&want);
}

/* ---- fields --------------------------------------------------------------------------------- */

enum { S = 2, L = 1, H = 2, NB = 4, N = S * L * H * NB };

/* A file's fields; what a case leaves out is right. */
struct fields {
    const char *storage, *without, *twice;
    int64_t q, k, layers, n_storage, offset;
    int64_t levels[3], shape[5], stride[5];
    int n_levels, n_dims;
    int nan, inf, low; /* index of the threshold that is so; -1: none */
};

static struct fields right(void)
{
    return (struct fields){.storage = "FloatStorage",
                           .q = 128,
                           .k = 64,
                           .layers = L,
                           .n_storage = N,
                           .levels = {2, 4},
                           .n_levels = 2,
                           .shape = {S, L, H, NB},
                           .stride = {L * H * NB, H * NB, NB, 1},
                           .n_dims = 4,
                           .nan = -1,
                           .inf = -1,
                           .low = -1};
}

static void add_int(struct pt_bytes *p, const struct fields *f, const char *name, int64_t v)
{
    for (int i = 0; i < (f->twice && strcmp(f->twice, name) == 0 ? 2 : 1); i++) {
        if (f->without && strcmp(f->without, name) == 0)
            continue;
        pt_case_text(p, name);
        pt_case_int(p, v);
    }
}

static struct pt_bytes build(const struct fields *f)
{
    struct pt_bytes p = {0}, out = {0};
    float t[N];
    for (int i = 0; i < N; i++)
        t[i] = 2 * (i % NB) <= f->levels[i / (L * H * NB)] ? -INFINITY : (float)i;
    if (f->nan >= 0)
        t[f->nan] = NAN;
    if (f->inf >= 0)
        t[f->inf] = INFINITY;
    if (f->low >= 0)
        t[f->low] = t[f->low] < 0 ? -1 : -INFINITY; /* finite where it was not, and back */
    pt_case_begin(&p);
    if (!f->without || strcmp(f->without, "thresholds") != 0) {
        pt_case_text(&p, "thresholds");
        pt_case_tensor(&p, f->storage, "0", f->n_storage, f->offset, f->shape, f->stride,
                       f->n_dims);
    }
    if (!f->without || strcmp(f->without, "k_values") != 0) {
        pt_case_text(&p, "k_values");
        pt_case_ints(&p, f->levels, f->n_levels, false);
    }
    add_int(&p, f, "num_layers", f->layers);
    add_int(&p, f, "q_block_size", f->q);
    add_int(&p, f, "k_block_size", f->k);
    pt_case_end(&p);
    const struct pt_case_member m[] = {{"x/data.pkl", p.data, p.len}, {"x/data/0", t, sizeof t}};
    pt_case_zip(&out, m, 2, true);
    pt_bytes_free(&p);
    return out;
}

static void expect(const struct fields *f, int err, const char *says)
{
    struct pt_bytes b = build(f);
    struct thresholds_import t;
    struct err_msg why = {""};
    int got = thresholds_import_parse(&t, b.data, b.len, "FILE", L, H, &why);
    if (got != err || !strstr(why.text, says) || (err && !strstr(why.text, "FILE")))
        fail_msg("got %d '%s', want %d '%s'", got, why.text, err, says);
    if (err)
        assert_null(t.t);
    thresholds_import_free(&t);
    pt_bytes_free(&b);
}

#define WITH(err, says, ...)                                                                       \
    do {                                                                                           \
        struct fields f = right();                                                                 \
        __VA_ARGS__;                                                                               \
        expect(&f, err, says);                                                                     \
    } while (0)

static void bad_fields(void **state)
{
    (void)state;
    WITH(0, "", (void)f);
    WITH(0, "", f.without = "num_layers");
    WITH(ERR_MISMATCH, "q_block_size is 64, must be 128", f.q = 64);
    WITH(ERR_MISMATCH, "k_block_size is 128, must be 64", f.k = 128);
    WITH(ERR_MISMATCH, "num_layers is 2, must be 1", f.layers = 2);
    WITH(ERR_FORMAT, "q_block_size is missing", f.without = "q_block_size");
    WITH(ERR_FORMAT, "k_block_size is missing", f.without = "k_block_size");
    WITH(ERR_FORMAT, "k_values is missing", f.without = "k_values");
    WITH(ERR_FORMAT, "thresholds is missing", f.without = "thresholds");
    WITH(ERR_FORMAT, "q_block_size is there twice", f.twice = "q_block_size");
    WITH(ERR_FORMAT, "k_values[1] = 2: not increasing", f.levels[1] = 2);
    WITH(ERR_FORMAT, "k_values[0] = 0: not increasing, from 1", f.levels[0] = 0);
    WITH(ERR_FORMAT, "k_values[1] = 4611686018427387904: not", f.levels[1] = 1ll << 62);
    WITH(ERR_FORMAT, "k_values[0] = -4611686018427387904: not", f.levels[0] = -(1ll << 62));
    WITH(ERR_FORMAT, "k_values has 0 numbers", f.n_levels = 0);
    WITH(ERR_FORMAT, "thresholds has 2 levels, k_values 1", f.n_levels = 1);
}

static void bad_tensors(void **state)
{
    (void)state;
    WITH(ERR_FORMAT, "thresholds is in i32", f.storage = "IntStorage");
    WITH(ERR_FORMAT, "data/0 has 64 bytes, must have 16 numbers of 8", f.storage = "DoubleStorage");
    WITH(ERR_FORMAT, "data/0 has 64 bytes, must have 17 numbers of 4", f.n_storage = 17);
    WITH(ERR_FORMAT, "must have 4611686018427387904 numbers", f.n_storage = 1ll << 62);
    WITH(ERR_FORMAT, "16 numbers from 1 on are not in a storage of 16", f.offset = 1);
    WITH(ERR_FORMAT, "from 9223372036854775807 on", f.offset = INT64_MAX);
    WITH(ERR_MISMATCH, "is for 2 layers of 1 heads, the model has 1 of 2", f.shape[1] = 2,
         f.shape[2] = 1, f.stride[1] = NB);
    WITH(ERR_FORMAT, "thresholds has shape [2, 1, 2, 0]", f.shape[3] = 0);
    WITH(ERR_FORMAT, "has shape [4611686018427387904, 4, 2, 4]", f.shape[0] = 1ll << 62,
         f.shape[1] = 4);
    WITH(ERR_UNSUPPORTED, "strides [8, 8, 1, 2]: not contiguous", f.stride[2] = 1, f.stride[3] = 2);
    WITH(0, "", f.stride[1] = 77); /* of one layer: no step is ever taken */
    WITH(ERR_FORMAT, "thresholds has 3 dimensions", f.n_dims = 3, f.shape[2] = 8, f.stride[2] = 1,
         f.stride[1] = 8);
    WITH(ERR_FORMAT, "thresholds has 5 dimensions", f.n_dims = 5, f.shape[4] = 1);
    WITH(ERR_FORMAT, "thresholds has 0 dimensions", f.n_dims = 0);
    WITH(ERR_FORMAT, "thresholds[1, 0, 1, 3] is NaN", f.nan = 15);
    WITH(ERR_FORMAT, "thresholds[0, 0, 1, 2] is +inf", f.inf = 6);
}

/* Values that no sound calibration gives are counted, for a warning. */
static void odd_values(void **state)
{
    (void)state;
    for (int i = 0; i < N; i++) {
        struct fields f = right();
        struct thresholds_import t;
        struct err_msg why = {""};
        const bool choice = 2 * (i % NB) > f.levels[i / (L * H * NB)];
        f.low = i;
        struct pt_bytes b = build(&f);
        if (thresholds_import_parse(&t, b.data, b.len, "FILE", L, H, &why) < 0)
            fail_msg("%s", why.text);
        assert_true(t.n_dense == (choice ? 1 : 0) && t.n_limited == (choice ? 0 : 1));
        thresholds_import_free(&t);
        pt_bytes_free(&b);
    }
}

/* What import makes is a threshold file like any other, and says where it comes from. */
static void saved(void **state)
{
    (void)state;
    char dir[] = "/tmp/sluice-imp-XXXXXX", path[64];
    struct thresholds_import t;
    struct thresholds *back = NULL;
    struct err_msg why = {""};
    assert_non_null(mkdtemp(dir));
    (void)snprintf(path, sizeof path, "%s/t.safetensors", dir);
    load(&t, "reference.pt", 3, 4);
    struct thresholds_meta m = {.model = 1,
                                .set = t.set,
                                .gate_rows = 128,
                                .n_max = 128 * t.n_blocks,
                                .imported = true,
                                .softmax_scale = 0.125f,
                                .rope = "default theta=10000"};
    assert_ok(
        thresholds_save(path, &m, t.t, t.k, t.n_levels, t.n_layers, t.n_heads, t.n_blocks, &why));
    if (thresholds_load(&back, path, &why) < 0)
        fail_msg("%s", why.text);
    assert_true(thresholds_meta(back)->imported && thresholds_meta(back)->n_samples == 0);
    assert_memory_equal(thresholds_view(back)->t, t.t, 3 * 3 * 4 * 8 * sizeof *t.t);
    thresholds_free(back);
    m.imported = false; /* of no samples, then */
    assert_ok(
        thresholds_save(path, &m, t.t, t.k, t.n_levels, t.n_layers, t.n_heads, t.n_blocks, &why));
    assert_true(thresholds_load(&back, path, &why) == ERR_FORMAT);
    assert_non_null(strstr(why.text, "metadata samples is '0'"));
    thresholds_import_free(&t);
    assert_ok(unlink(path));
    assert_ok(rmdir(dir));
    assert_true(thresholds_import(&t, path, 3, 4, &why) == -ENOENT);
    assert_true(thresholds_import(&t, "/dev/null", 3, 4, &why) == ERR_FORMAT);
}

/* What is exported is imported bit for bit; its tensor is aligned as torch.save has it. */
static void exported(void **state)
{
    (void)state;
    static const int32_t shapes[][4] = {{1, 1, 1, 1}, {2, 3, 4, 5}, {IMPORT_MAX_LEVELS, 2, 2, 3}};
    struct rng r = test_rng("exported", 1);
    char path[] = "/tmp/sluice-pt-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)close(fd);
    for (size_t c = 0; c < sizeof shapes / sizeof *shapes; c++) {
        const int32_t *s = shapes[c];
        const size_t n = (size_t)s[0] * (size_t)s[1] * (size_t)s[2] * (size_t)s[3];
        const struct attn_thresholds view = {.t = malloc(n * sizeof(float)),
                                             .n_levels = s[0],
                                             .n_layers = s[1],
                                             .n_heads = s[2],
                                             .n_blocks = s[3],
                                             .level_stride = (int64_t)s[1] * s[2] * s[3],
                                             .layer_stride = (int64_t)s[2] * s[3],
                                             .head_stride = s[3]};
        struct thresholds_import t;
        struct err_msg why = {""};
        int32_t k[IMPORT_MAX_LEVELS];
        float *v = (float *)view.t;
        assert_non_null(v);
        for (size_t i = 0; i < n; i++)
            v[i] = i % 7 == 3 ? -INFINITY : (float)rng_normal(&r);
        for (int32_t i = 0; i < s[0]; i++)
            k[i] = (i ? k[i - 1] : 0) + rng_range(&r, 1, 100000);
        assert_int_equal(thresholds_export(path, &view, k, 64, &why), ERR_UNSUPPORTED);
        assert_non_null(strstr(why.text, "thresholds for 64 rows"));
        if (thresholds_export(path, &view, k, 128, &why) < 0 ||
            thresholds_import(&t, path, s[1], s[2], &why) < 0)
            fail_msg("%s", why.text);
        assert_int_equal(t.n_levels, s[0]);
        assert_int_equal(t.n_blocks, s[3]);
        assert_memory_equal(t.k, k, (size_t)s[0] * sizeof *k);
        assert_memory_equal(t.t, v, n * sizeof *v);
        thresholds_import_free(&t);
        free(v);
    }
    (void)unlink(path);
    const float one = 1;
    const int32_t k = 1;
    const struct attn_thresholds view = {&one, 1, 1, 1, 1, 1, 1, 1};
    assert_int_equal(thresholds_export("/none/x", &view, &k, 128, NULL), -ENOENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(genuine),     cmocka_unit_test(flipped),    cmocka_unit_test(bad_fields),
        cmocka_unit_test(bad_tensors), cmocka_unit_test(odd_values), cmocka_unit_test(saved),
        cmocka_unit_test(exported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
