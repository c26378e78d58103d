/* calibration/thresholds: round trip, every field's refusal, hostile bytes, identity checks, the
 * density formula beside the published figures. */
#include "tests/test.h"

#include "calibration/thresholds.h"
#include "model/batch.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <unistd.h>

enum { S = 3, L = 2, H = 4, NB = 5, N_T = S * L * H * NB };

static const int32_t ks[S] = {8, 16, 33};
static const int32_t head_ks[S * L * H] = {1,  2,  3,  4,  5,  6,  7,  40, 11, 12, 13, 14,
                                           15, 16, 17, 40, 31, 32, 33, 34, 35, 36, 37, 1073741824};
static const struct thresholds_meta meta0 = {
    .model = 0x0123456789abcdef,
    .set = 0xfedcba9876543210,
    .gate_rows = 128,
    .n_max = 640,
    .n_samples = 16,
    .softmax_scale = 0.088388347f,
    .rope = "llama3 theta=500000 factor=8",
    .auto_k = 16,
    .auto_min = 4096,
    .rel_64 = {1.5, 10, 0.875, 0.125, 0.75, {3, 4, 4.5, 5, 5.5, 6, 7, 8, 9}},
    .auto_rows = 64,
    .auto_density = 0.25,
    .head_k = head_ks};

/* Of generated rows, with levels and blocks of their own. */
enum { DS = 2, DNB = 7, N_DECODE = DS * L * H * DNB };
static const int32_t decode_ks[DS] = {4, 64};

static struct thresholds_meta with_decode(const float *t, const int32_t *k)
{
    struct thresholds_meta m = meta0;
    m.decode = (struct thresholds_decode){t, k, DS, DNB};
    return m;
}

/* Densities of REL's heads, by steps: the means of all layers but the last, 1, 0.75 and 0.25 for
 * either kind of rows. */
enum { RS = 3, N_REL = RS * L * H };

static struct thresholds_meta with_rel(float *t)
{
    static const float means[RS] = {1, 0.75f, 0.25f};
    struct thresholds_meta m = meta0;
    m.rel_128 = m.rel_64;
    m.rel_128_heads = m.rel_64_heads = (struct thresholds_rel_heads){t, RS};
    for (int i = 0; i < N_REL; i++) {
        const int step = i / (L * H),
                  off = i % H - 1; /* -1, 0, 1, 2 of a quarter of what is left */
        t[i] = means[step] + (step ? 0.125f * (float)(2 * off - 1) / 4 : 0);
    }
    for (int s = 0; s < RS; s++)
        t[(s * L + L - 1) * H] = 1; /* the last layer does not count */
    return m;
}

static void fill_decode(float *t)
{
    struct rng r = {77};
    for (int i = 0; i < N_DECODE; i++)
        t[i] = (float)rng_normal(&r);
    t[1] = -INFINITY;
}

static void values(float *t, uint64_t seed)
{
    struct rng r = {seed};
    for (int i = 0; i < N_T; i++)
        t[i] = (float)rng_normal(&r);
    t[0] = -INFINITY;
    t[N_T - 1] = INFINITY;
}

struct file {
    char dir[32], path[64];
};

static struct file temp(void)
{
    struct file f = {"/tmp/sluice-thr-XXXXXX", ""};
    assert_non_null(mkdtemp(f.dir));
    (void)snprintf(f.path, sizeof f.path, "%s/t.safetensors", f.dir);
    return f;
}

static void drop(const struct file *f)
{
    (void)unlink(f->path);
    assert_ok(rmdir(f->dir)); /* nothing else was left behind */
}

/* The bytes that thresholds_save writes; released with free. */
static char *saved(const struct thresholds_meta *m, const float *t, const int32_t *k, size_t *len)
{
    struct file f = temp();
    struct err_msg why = {""};
    if (thresholds_save(f.path, m, t, k, S, L, H, NB, &why) < 0)
        fail_msg("%s", why.text);
    FILE *in = fopen(f.path, "re");
    assert_non_null(in);
    char *data = calloc(1, 1 << 16);
    assert_non_null(data);
    *len = fread(data, 1, 1 << 16, in);
    (void)fclose(in);
    drop(&f);
    return data;
}

static void round_trip(void **state)
{
    (void)state;
    struct file f = temp();
    struct err_msg why = {""};
    struct thresholds *t = NULL;
    struct stat st;
    float want[N_T];
    int32_t n;
    values(want, 1);
    assert_ok(thresholds_save(f.path, &meta0, want, ks, S, L, H, NB, &why));
    assert_ok(stat(f.path, &st));
    assert_ok(thresholds_load(&t, f.path, &why));
    const struct thresholds_meta *m = thresholds_meta(t);
    assert_true(m->model == meta0.model && m->set == meta0.set);
    assert_int_equal(m->gate_rows, 128);
    assert_int_equal(m->n_max, 640);
    assert_int_equal(m->n_samples, 16);
    assert_true(m->softmax_scale == meta0.softmax_scale); /* every bit */
    assert_string_equal(m->rope, meta0.rope);
    assert_memory_equal(&m->rel_64, &meta0.rel_64, sizeof m->rel_64);
    assert_true(m->rel_128.b == 0 && m->auto_rows == 64 && m->auto_density == 0.25);
    assert_int_equal(m->auto_k, 16);
    assert_int_equal(m->auto_min, 4096);
    assert_memory_equal(m->head_k, head_ks, sizeof head_ks);
    const struct attn_thresholds *v = thresholds_view(t);
    assert_true(v->n_levels == S && v->n_layers == L && v->n_heads == H && v->n_blocks == NB);
    for (int s = 0; s < S; s++) {
        for (int l = 0; l < L; l++) {
            for (int h = 0; h < H; h++) {
                assert_memory_equal(v->t + s * v->level_stride + l * v->layer_stride +
                                        h * v->head_stride,
                                    want + ((s * L + l) * H + h) * NB, NB * sizeof *want);
            }
        }
    }
    assert_memory_equal(thresholds_k(t, &n), ks, sizeof ks);
    assert_int_equal(n, S);
    assert_int_equal(thresholds_level(t, 33, &why), 2);
    assert_int_equal(thresholds_level(t, 9, &why), ERR_INVALID);
    assert_non_null(strstr(why.text, "k=9, only for 8, 16, 33"));
    thresholds_free(t);
    thresholds_free(NULL);
    drop(&f);
}

static uint64_t hash_of(const struct thresholds_meta *m, const float *v, const int32_t *k)
{
    size_t len;
    char *data = saved(m, v, k, &len);
    struct thresholds *t = NULL;
    assert_ok(thresholds_parse(&t, data, len, "t", NULL));
    uint64_t h = thresholds_hash(t);
    thresholds_free(t);
    free(data);
    return h;
}

/* `auto` at a lambda comes back; a file from before auto_rows means 64. */
static void auto_lambda(void **state)
{
    (void)state;
    struct thresholds_meta m = meta0;
    struct thresholds *t = NULL;
    float v[N_T];
    size_t len;
    values(v, 1);
    m.auto_density = 0;
    m.auto_ln_lambda = 1.25;
    m.auto_rows = 128;
    char *data = saved(&m, v, ks, &len);
    assert_ok(thresholds_parse(&t, data, len, "FILE", NULL));
    assert_true(thresholds_meta(t)->auto_rows == 128 && thresholds_meta(t)->auto_density == 0);
    assert_true(thresholds_meta(t)->auto_ln_lambda == 1.25);
    thresholds_free(t);
    char *rows = strstr(data + 8, "auto_rows");
    assert_non_null(rows);
    rows[0] = 'b'; /* a field that nobody knows */
    assert_ok(thresholds_parse(&t, data, len, "FILE", NULL));
    assert_int_equal(thresholds_meta(t)->auto_rows, 64);
    thresholds_free(t);
    free(data);
}

/* Equal for what decides gates, different for any change of it. */
static void hash_identity(void **state)
{
    (void)state;
    struct thresholds_meta m = meta0;
    float v[N_T];
    values(v, 1);
    uint64_t h = hash_of(&m, v, ks);
    m.auto_k = 0;
    m.n_samples = 3;
    assert_true(h == hash_of(&m, v, ks));
    m.gate_rows = 64;
    assert_true(h != hash_of(&m, v, ks));
    m = meta0;
    m.model++;
    assert_true(h != hash_of(&m, v, ks));
    m = meta0;
    m.auto_k = 0;
    int32_t other[S] = {8, 17, 33};
    assert_true(h != hash_of(&m, v, other));
    v[N_T / 2] = nextafterf(v[N_T / 2], 100);
    assert_true(h != hash_of(&m, v, ks));
}

/* The decode pair comes back as it was, and is part of the hash; without it the hash is as ever. */
static void decode_round_trip(void **state)
{
    (void)state;
    float v[N_T], d[N_DECODE];
    size_t len;
    struct thresholds *t = NULL;
    values(v, 1);
    fill_decode(d);
    struct thresholds_meta m = with_decode(d, decode_ks);
    char *data = saved(&m, v, ks, &len);
    assert_ok(thresholds_parse(&t, data, len, "t", NULL));
    free(data);
    const struct attn_thresholds *view = thresholds_decode_view(t);
    assert_true(view->n_levels == DS && view->n_layers == L && view->n_heads == H &&
                view->n_blocks == DNB && view->head_stride == DNB &&
                view->layer_stride == (int64_t)H * DNB &&
                view->level_stride == (int64_t)L * H * DNB);
    assert_memory_equal(view->t, d, sizeof d);
    assert_memory_equal(thresholds_view(t)->t, v, sizeof v);
    const struct thresholds_decode *back = &thresholds_meta(t)->decode;
    assert_true(back->n_levels == DS && back->n_blocks == DNB && back->t == view->t);
    assert_memory_equal(back->k, decode_ks, sizeof decode_ks);
    /* 640 tokens: 10 pages before a row's own */
    assert_close(thresholds_decode_density(t, 0, 640), 5.0 / 11, 1e-12, 0);
    assert_close(thresholds_decode_density(t, 1, 640), 1, 0, 0);
    assert_close(thresholds_row_density(4, 63), 1, 0, 0);
    thresholds_free(t);
    const uint64_t none = hash_of(&meta0, v, ks), h = hash_of(&m, v, ks);
    assert_true(h != none);
    d[N_DECODE - 1] = nextafterf(d[N_DECODE - 1], 9);
    assert_true(hash_of(&m, v, ks) != h);
    fill_decode(d);
    m.decode.k = (const int32_t[]){4, 65};
    assert_true(hash_of(&m, v, ks) != h);
    char *plain = saved(&meta0, v, ks, &len);
    assert_ok(thresholds_parse(&t, plain, len, "t", NULL));
    assert_null(thresholds_decode_view(t)->t);
    thresholds_free(t);
    free(plain);
}

static void expect_error(const char *data, size_t len, int err, const char *says)
{
    struct thresholds *t = NULL;
    struct err_msg why = {""};
    /* An exact-size copy, so that the sanitizer sees any read past the end. */
    char *copy = malloc(len ? len : 1);
    assert_non_null(copy);
    memcpy(copy, data, len);
    int got = thresholds_parse(&t, copy, len, "FILE", &why);
    free(copy);
    if (got != err || !strstr(why.text, says) || !strstr(why.text, "FILE"))
        fail_msg("got %d '%s', want %d '%s'", got, why.text, err, says);
    assert_null(t);
}

static void truncated(void **state)
{
    (void)state;
    float v[N_T];
    size_t len;
    float d[N_DECODE];
    fill_decode(d);
    const struct thresholds_meta m = with_decode(d, decode_ks);
    values(v, 1);
    char *data = saved(&m, v, ks, &len);
    for (size_t n = 0; n < len; n++)
        expect_error(data, n, ERR_FORMAT, "");
    data[len] = 0;
    expect_error(data, len + 1, ERR_FORMAT, "1 bytes after the last tensor");
    free(data);
}

/* Every single-byte change either is refused or gives a file that is still sound. */
static void flipped(void **state)
{
    (void)state;
    float v[N_T];
    size_t len;
    int refused = 0;
    float d[N_DECODE];
    fill_decode(d);
    const struct thresholds_meta m = with_decode(d, decode_ks);
    values(v, 1);
    char *data = saved(&m, v, ks, &len);
    for (size_t i = 0; i < len; i++) {
        struct thresholds *t = NULL;
        char old = data[i];
        data[i] = (char)(old ^ 0x24);
        refused += thresholds_parse(&t, data, len, "FILE", NULL) < 0;
        thresholds_free(t);
        data[i] = old;
    }
    assert_true(refused > 200);
    free(data);
}

/* One text in the header of a file with m replaced by another of any length. */
static void replaced_in(const struct thresholds_meta *m, const char *from, const char *to, int err,
                        const char *says)
{
    float v[N_T];
    size_t len;
    values(v, 1);
    char *data = saved(m, v, ks, &len), *out = calloc(1, len + 4096);
    assert_non_null(out);
    uint64_t header;
    memcpy(&header, data, 8);
    char *at = memmem(data + 8, header, from, strlen(from));
    if (!at)
        fail_msg("the header has no '%s'", from);
    size_t before = (size_t)(at - data), after = before + strlen(from);
    memcpy(out, data, before);
    memcpy(out + before, to, strlen(to));
    memcpy(out + before + strlen(to), data + after, len - after);
    header += strlen(to) - strlen(from);
    memcpy(out, &header, 8);
    expect_error(out, len + strlen(to) - strlen(from), err, says);
    free(out);
    free(data);
}

static void replaced(const char *from, const char *to, int err, const char *says)
{
    replaced_in(&meta0, from, to, err, says);
}

/* REL's densities come back, with a hash that knows them; and where a mean lies among them. */
static void rel_heads_round_trip(void **state)
{
    (void)state;
    float v[N_T], d[N_REL];
    size_t len;
    struct thresholds *t = NULL;
    values(v, 1);
    const struct thresholds_meta m = with_rel(d);
    char *data = saved(&m, v, ks, &len);
    assert_ok(thresholds_parse(&t, data, len, "t", NULL));
    free(data);
    for (int rows = 64; rows <= 128; rows += 64) {
        static const double cases[][3] = {/* density, level, blend; of so long a prompt that its
                                             diagonals are few */
                                          {1, 0, 0},      {0.875, 0, 0.5}, {0.5, 1, 0.5},
                                          {0.35, 1, 0.8}, {0.25, 1, 1},    {0.01, 1, 1}};
        const struct attn_thresholds *view = thresholds_rel_view(t, rows);
        assert_true(view->n_levels == RS && view->n_layers == L && view->n_heads == H);
        assert_memory_equal(view->t, d, sizeof d);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            struct batch_policy p = {.gate_rows = (uint8_t)rows, .ln_lambda = -2, .steer = 3};
            assert_true(thresholds_rel_steer(view, cases[i][0], 10000000, &p));
            assert_int_equal(p.level, (int32_t)cases[i][1]);
            assert_close(p.blend, cases[i][2], 2e-3, 0);
            assert_true(p.ln_lambda == -0.5f); /* half a page ahead */
        }
    }
    assert_ptr_equal(thresholds_meta(t)->rel_64_heads.t, thresholds_rel_view(t, 64)->t);
    thresholds_free(t);
    const uint64_t h = hash_of(&m, v, ks);
    assert_true(h != hash_of(&meta0, v, ks));
    d[N_REL - 1] -= 0.01f;
    assert_true(h != hash_of(&m, v, ks));
    assert_false(thresholds_rel_steer(&(struct attn_thresholds){0}, 0.5, 1000, NULL));
}

static void bad_rel_heads(void **state)
{
    (void)state;
    static const struct {
        const char *from, *to, *says;
    } cases[] = {
        {"\"rel_64_heads\":", "\"rel_65_heads\":", "tensor rel_64_heads is missing"},
        {"\"rel_128_heads\":", "\"rel_129_heads\":", "tensor rel_128_heads is missing"},
        {"\"F32\",\"shape\":[3,2,4]", "\"I32\",\"shape\":[3,2,4]",
         "tensor rel_128_heads is I32, must be F32"},
        {"[3,2,4]", "[3,8]", "rel_128_heads has shape [3, 8], must have 3 dimensions"},
        {"[3,2,4]", "[3,4,2]", "shape [3, 4, 2], not 2 to 64 steps of 2 layers of 4 heads"},
        {"[3,2,4]", "[1,6,4]", "shape [1, 6, 4], not 2 to 64 steps"},
        {"\"rel_128\":", "\"rel_129\":", "tensor rel_128_heads without metadata rel_128"},
    };
    float v[N_T], d[N_REL];
    size_t len;
    struct thresholds_meta m = with_rel(d);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        replaced_in(&m, cases[i].from, cases[i].to, ERR_FORMAT, cases[i].says);
    values(v, 1);
    static const struct {
        int at;
        float value;
        const char *says;
    } wrong[] = {{(1 * L + 1) * H + 2, NAN, "rel_128_heads[1, 1, 2] is nan"},
                 {5, 1.5f, "rel_128_heads[0, 1, 1] is 1.5, not from 0 to 1"},
                 {(2 * L + 0) * H + 3, -0.1f, "rel_128_heads[2, 0, 3] is -0.1"},
                 {(1 * L + 0) * H + 3, 0.25f, "the mean of step 2 is not below step 1's"}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        m = with_rel(d);
        d[wrong[i].at] = wrong[i].value;
        if (i == 3)
            d[L * H] = d[L * H + 1] = d[L * H + 2] = 0;
        char *data = saved(&m, v, ks, &len);
        expect_error(data, len, ERR_FORMAT, wrong[i].says);
        free(data);
    }
}

static void bad_decode(void **state)
{
    (void)state;
    static const struct {
        const char *from, *to, *says;
    } cases[] = {
        {"\"decode\":", "\"encode\":", "tensor decode is missing"},
        {"\"decode_k\":", "\"decode_l\":", "tensor decode_k is missing"},
        {"\"F32\",\"shape\":[2,2,4,7]", "\"I32\",\"shape\":[2,2,4,7]",
         "tensor decode is I32, must be F32"},
        {"[2,2,4,7]", "[2,2,28]", "decode has shape [2, 2, 28], must have 4 dimensions"},
        {"[2,2,4,7]", "[4,2,2,7]", "decode_k has 2 levels, decode has shape [4, 2, 2, 7]"},
        {"[2,2,4,7]", "[2,4,2,7]", "decode is for 4 layers of 2 heads, thresholds for 2 of 4"},
        {"[2,2,4,7]", "[2,2,4,8]", "type and shape need"},
        {"[2,2,4,7]", "[2,2,0,7]", "type and shape need 0"},
        {"\"k\":", "\"extra\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},\"k\":",
         "5 tensors, must be"},
    };
    float v[N_T], d[N_DECODE];
    size_t len;
    fill_decode(d);
    struct thresholds_meta m = with_decode(d, decode_ks);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        replaced_in(&m, cases[i].from, cases[i].to, ERR_FORMAT, cases[i].says);
    values(v, 1);
    m.decode.k = (const int32_t[]){64, 4};
    char *data = saved(&m, v, ks, &len);
    expect_error(data, len, ERR_FORMAT, "decode_k[1] = 4: not positive and increasing");
    free(data);
    m = with_decode(d, decode_ks);
    d[((1 * L + 1) * H + 2) * DNB + 3] = NAN;
    data = saved(&m, v, ks, &len);
    expect_error(data, len, ERR_FORMAT, "decode[1, 1, 2, 3] is NaN");
    free(data);
}

/* Replacements in a file's text, each of which makes it wrong. */
static const struct bad_field {
    const char *from, *to;
    int err;
    const char *says;
} bad_field[] = {
    {"\"sluice-thresholds\"", "\"other\"", ERR_FORMAT, "metadata format is 'other'"},
    {"\"version\":\"1\"", "\"version\":\"2\"", ERR_VERSION, "metadata version is '2'"},
    {"\"page\":\"64\"", "\"page\":\"128\"", ERR_UNSUPPORTED, "metadata page is '128'"},
    {"\"page\":\"64\",", "", ERR_FORMAT, "metadata page is missing"},
    {"\"set\":\"fedcba9876543210\",", "", ERR_FORMAT, "metadata set is missing"},
    {"0123456789abcdef", "0123456789abcdeg", ERR_FORMAT, "metadata model is '0123456789abcdeg'"},
    {"0123456789abcdef", "123", ERR_FORMAT, "metadata model is '123', not 16 hex digits"},
    {"\"gate_rows\":\"128\"", "\"gate_rows\":\"96\"", ERR_UNSUPPORTED, "gate_rows is 96"},
    {"\"gate_rows\":\"128\"", "\"gate_rows\":128", ERR_FORMAT, "gate_rows is not a string"},
    {"\"n_max\":\"640\"", "\"n_max\":\"641\"", ERR_FORMAT, "n_max 641 disagrees with 5 blocks"},
    {"\"n_max\":\"640\"", "\"n_max\":\"0\"", ERR_FORMAT, "metadata n_max is '0'"},
    {"\"n_max\":\"640\"", "\"n_max\":\"6x\"", ERR_FORMAT, "metadata n_max is '6x'"},
    {"\"n_max\":\"640\"", "\"n_max\":\"99999999999999999999\"", ERR_FORMAT, "n_max is '999"},
    {"\"set\":", "\"source\":\"other\",\"set\":", ERR_FORMAT,
     "source is 'other', must be 'imported'"},
    {"\"samples\":\"16\"", "\"samples\":\"0\"", ERR_FORMAT, "metadata samples is '0'"},
    {"\"samples\":\"16\"", "\"samples\":\"-1\"", ERR_FORMAT, "metadata samples is '-1'"},
    {"\"auto_k\":\"16\"", "\"auto_k\":\"17\"", ERR_FORMAT, "auto_k is 17, which is not in k"},
    {"\"auto_min\":\"4096\"", "\"auto_min\":\"\"", ERR_FORMAT, "metadata auto_min is ''"},
    {"\"rel_64\":", "\"rel_65\":", ERR_FORMAT, "metadata auto_density without rel_64"},
    {"1.5 10 0.875", "1.5 -10 0.875", ERR_FORMAT, "rel_64 is '1.5 -10 0.875 0.125 0.75 3 4"},
    {"1.5 10 0.875", "1.5 nan 0.875", ERR_FORMAT, "rel_64 is '1.5 nan"},
    {"1.5 10 0.875", "1e99 10 0.875", ERR_FORMAT, "rel_64 is '1e99 "},
    {"1.5 10 0.875", "1.5 10", ERR_FORMAT,
     "rel_64 is '1.5 10 0.125 0.75 3 4 4.5 5 5.5 6 7 8 9', not a fit"},
    {"0.125 0.75", "0.125 0.75 1", ERR_FORMAT, "not a fit"},
    {" 4 4.5", " 4.5 4", ERR_FORMAT, "not a fit"},
    {" 8 9", " 8 8", ERR_FORMAT, "not a fit"},
    {" 8 9", " 8 9 9.7", ERR_FORMAT, "not a fit"},
    {" 8 9", " 8 9 9.7 0 0 0 0 0 0 0 0", ERR_FORMAT, "not a fit"},
    {" 8 9", " 8 9 -9.7 0 0 0 0 0 0 0 0 0", ERR_FORMAT, "not a fit"},
    {" 8 9", " 8 9 9.7 0 0 0 0 0 0 0 0 101", ERR_FORMAT, "not a fit"},
    {"\"rel_64\":\"1.5 ", "\"rel_64\":\" 1.5 ", ERR_FORMAT, "rel_64 is ' 1.5"},
    {"\"rel_64\":", "\"rel_128\":\"x\",\"rel_64\":", ERR_FORMAT, "rel_128 is 'x', not a fit"},
    {"\"head_k\":\"1 2 ", "\"head_k\":\"1 ", ERR_FORMAT, "head_k is '1 3 4"},
    {"\"head_k\":\"1 2 ", "\"head_k\":\"1 1 2 ", ERR_FORMAT, "not 24 whole numbers"},
    {"\"head_k\":\"1 2 ", "\"head_k\":\"0 2 ", ERR_FORMAT, "head_k is '0 2"},
    {"\"head_k\":\"1 2 ", "\"head_k\":\"1 -2 ", ERR_FORMAT, "head_k is '1 -2"},
    {"\"head_k\":\"1 2 ", "\"head_k\":\" 1 2 ", ERR_FORMAT, "head_k is ' 1 2"},
    {"\"head_k\":\"1 2 ", "\"head_k\":\"1.5 2 ", ERR_FORMAT, "head_k is '1.5 2"},
    {"\"head_k\":\"1 2 ", "\"head_k\":\"12 2 ", ERR_FORMAT, "falls from level to level"},
    {" 1073741824\"", " 1073741825\"", ERR_FORMAT, "head_k is '1 2"},
    {" 1073741824\"", " 99999999999999999999\"", ERR_FORMAT, "head_k is '1 2"},
    {"\"auto_density\":\"0.25\"", "\"auto_density\":\"0\"", ERR_FORMAT, "auto_density is '0'"},
    {"\"auto_density\":\"0.25\"", "\"auto_density\":\"1.5\"", ERR_FORMAT, "auto_density is '1.5'"},
    {"\"auto_rows\":\"64\"", "\"auto_rows\":\"96\"", ERR_FORMAT,
     "auto_rows is 96, must be 128 or 64"},
    {"\"auto_rows\":\"64\"", "\"auto_rows\":\"128\"", ERR_FORMAT, "auto_density without rel_128"},
    {"\"auto_density\":", "\"auto_ln_lambda\":\"1\",\"auto_density\":", ERR_FORMAT,
     "auto_density and auto_ln_lambda"},
    {"\"auto_density\":\"0.25\"", "\"auto_ln_lambda\":\"31\"", ERR_FORMAT,
     "auto_ln_lambda is '31', not a number from -1000 to 30"},
    {"\"auto_density\":\"0.25\"", "\"auto_ln_lambda\":\"nan\"", ERR_FORMAT,
     "auto_ln_lambda is 'nan'"},
    {"0.0883883461", "nan", ERR_FORMAT, "metadata softmax_scale is 'nan'"},
    {"0.0883883461", "-1", ERR_FORMAT, "metadata softmax_scale is '-1'"},
    {"llama3 theta=500000 factor=8", "", ERR_FORMAT, "metadata rope is empty"},
    {"\"F32\"", "\"I32\"", ERR_FORMAT, "tensor thresholds is I32, must be F32"},
    {"\"I32\"", "\"F32\"", ERR_FORMAT, "tensor k is F32, must be I32"},
    {"\"F32\"", "\"F33\"", ERR_UNSUPPORTED, "dtype 'F33' is unknown"},
    {"\"F32\"", "\"F64\"", ERR_FORMAT, "type and shape need 960"},
    {"[3,2,4,5]", "[3,2,20]", ERR_FORMAT, "has shape [3, 2, 20], must have 4 dimensions"},
    {"[3,2,4,5]", "[2,3,4,5]", ERR_FORMAT, "k has 3 levels, thresholds has shape [2, 3, 4, 5]"},
    {"[3,2,4,5]", "[3,2,5,4]", ERR_FORMAT, "n_max 640 disagrees with 4 blocks"},
    {"[3,2,4,5]", "[3,2,4,6]", ERR_FORMAT, "type and shape need 576"},
    {"[3,2,4,5]", "[4294967296,4294967296,4294967296,5]", ERR_FORMAT, "shape overflows"},
    {"[3,2,4,5]", "[3,-2,4,5]", ERR_FORMAT, "shape[1] is not a size"},
    {"[3,2,4,5]", "[3,0,4,5]", ERR_FORMAT, "type and shape need 0"},
    {"[480,492]", "[0,12]", ERR_FORMAT, "at byte"},
    {"[480,492]", "[480,496]", ERR_FORMAT, "outside the file's 492 bytes"},
    {"[480,492]", "[484,496]", ERR_FORMAT, "outside the file's 492 bytes"},
    {"[480,492]", "[-12,0]", ERR_FORMAT, "data_offsets"},
    {"\"k\":", "\"q\":", ERR_FORMAT, "tensor k is missing"},
    {"\"thresholds\":", "\"t\":", ERR_FORMAT, "tensor thresholds is missing"},
    {"\"k\":", "\"extra\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},\"k\":",
     ERR_FORMAT, "3 tensors, must be thresholds and k"},
    {"\"k\":", "\"thresholds\":", ERR_FORMAT, "duplicate"},
    {"\"__metadata__\"", "\"metadata\"", ERR_FORMAT, ""},
    {"{", "[", ERR_FORMAT, ""},
    {"}", "", ERR_FORMAT, ""},
};

static void bad_fields(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof bad_field / sizeof *bad_field; i++)
        replaced(bad_field[i].from, bad_field[i].to, bad_field[i].err, bad_field[i].says);
}

static void bad_values(void **state)
{
    (void)state;
    static const int32_t bad_k[][S] = {{8, 8, 9}, {9, 8, 33}, {0, 16, 33}, {-8, 16, 33}};
    struct thresholds_meta m = meta0;
    float v[N_T];
    size_t len;
    m.auto_k = 0;
    values(v, 1);
    for (size_t i = 0; i < sizeof bad_k / sizeof *bad_k; i++) {
        char *data = saved(&m, v, bad_k[i], &len);
        expect_error(data, len, ERR_FORMAT, "not positive and increasing");
        free(data);
    }
    v[((1 * L + 1) * H + 2) * NB + 3] = NAN;
    char *data = saved(&m, v, ks, &len);
    expect_error(data, len, ERR_FORMAT, "thresholds[1, 1, 2, 3] is NaN");
    free(data);
}

static void hostile_headers(void **state)
{
    (void)state;
    static const uint64_t lengths[] = {1, 1 << 20, 100u * 1000 * 1000 + 1, UINT64_MAX,
                                       (uint64_t)INT64_MAX + 1};
    char data[20008] = {0};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        memcpy(data, &lengths[i], 8);
        expect_error(data, 64, ERR_FORMAT, "");
    }
    uint64_t n = 20000;
    memcpy(data, &n, 8);
    memset(data + 8, '[', n); /* deep nesting */
    expect_error(data, sizeof data, ERR_FORMAT, "depth");
    memset(data + 8, 0, n);
    expect_error(data, sizeof data, ERR_FORMAT, "");
    memcpy(data + 8, "{\"__metadata__\":[]}", 19);
    memset(data + 27, ' ', n - 19);
    expect_error(data, sizeof data, ERR_FORMAT, "__metadata__ is not an object");
    memcpy(data + 8, "{\"a\":1}            ", 19);
    expect_error(data, sizeof data, ERR_FORMAT, "tensor 'a'");
}

static void files(void **state)
{
    (void)state;
    struct thresholds *t = NULL;
    struct err_msg why = {""};
    float v[N_T];
    values(v, 1);
    assert_int_equal(thresholds_load(&t, "/nonexistent/t", &why), -ENOENT);
    assert_non_null(strstr(why.text, "/nonexistent/t: "));
    assert_int_equal(thresholds_load(&t, "/tmp", &why), ERR_FORMAT);
    assert_int_equal(thresholds_save("/nonexistent/t", &meta0, v, ks, S, L, H, NB, &why), -ENOENT);
    assert_non_null(strstr(why.text, "/nonexistent/t: cannot write: "));
    /* A directory is in the way: the rename fails and the temporary file goes. */
    struct file f = temp();
    assert_ok(mkdir(f.path, 0700));
    assert_true(thresholds_save(f.path, &meta0, v, ks, S, L, H, NB, &why) < 0);
    assert_ok(rmdir(f.path));
    drop(&f);
}

static void identity(void **state)
{
    (void)state;
    static const struct {
        struct thresholds_expect e;
        const char *says;
    } cases[] = {
        {{1, L, H, 0.088388347f, "llama3 theta=500000 factor=8"},
         "model is 0123456789abcdef, the loaded one is 00000000000"},
        {{1, 9, H, 0.088388347f, "x"}, "made for 2 layers, the model has 9"},
        {{1, L, 9, 0.088388347f, "x"}, "made for 4 heads, the model has 9"},
        {{1, L, H, 0.125f, "x"}, "softmax_scale is 0.0883883461, the model's is 0.125"},
        {{1, L, H, 0.088388347f, "default theta=10000"}, "rope is 'llama3"},
    };
    struct thresholds *t = NULL;
    float v[N_T];
    size_t len;
    values(v, 1);
    char *data = saved(&meta0, v, ks, &len);
    assert_ok(thresholds_parse(&t, data, len, "FILE", NULL));
    free(data);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct err_msg why = {""};
        assert_int_equal(thresholds_check(t, &cases[i].e, &why), ERR_MISMATCH);
        if (!strstr(why.text, cases[i].says) || !strstr(why.text, "FILE"))
            fail_msg("'%s' lacks '%s'", why.text, cases[i].says);
    }
    struct thresholds_expect ok = {0x0123456789abcdef, L, H, 0.088388347f, meta0.rope};
    assert_ok(thresholds_check(t, &ok, NULL));
    thresholds_free(t);
}

/* The figures derived from the paper's formula for full lengths. */
/* Between knots, at them, and beyond them along the law; within lambda's bounds. */
static void rel_density(void **state)
{
    (void)state;
    const struct thresholds_rel *r = &meta0.rel_64;
    const double ln_l = log(5000);
    static const double cases[][2] = {{0.9, 3}, {0.8, 4},    {0.75, 4.25},
                                      {0.1, 9}, {0.25, 7.5}, {1.0, 2}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_close(thresholds_rel_ln_lambda(r, cases[i][0], 5000), cases[i][1] - ln_l, 1e-9, 0);
    }
    assert_close(thresholds_rel_ln_lambda(r, 0.05, 1000000), 9.5 - log(1e6), 1e-9, 0);
    assert_true(thresholds_rel_ln_lambda(r, 0.1, 16) == (double)THRESHOLDS_REL_LN_MAX);
    assert_true(thresholds_rel_ln_lambda(r, 1, INT64_MAX) == 2 - log((double)INT64_MAX));
    const struct thresholds_rel low = {.b = 1,
                                       .knots = {-99, -98, -97, -96, -95, -94, -93, -92, -91}};
    assert_true(thresholds_rel_ln_lambda(&low, 1, 10) == -60);
}

/* Knots that move with the length, through a file and back; lines that cross; lengths far off. */
static void rel_lengths(void **state)
{
    (void)state;
    struct thresholds_meta m = meta0;
    struct thresholds *t = NULL;
    struct err_msg why = {""};
    float values_t[N_T];
    size_t len;
    m.rel_128 = m.rel_64;
    m.rel_128.ln_tokens = 9.5;
    for (int i = 0; i < THRESHOLDS_REL_KNOTS; i++)
        m.rel_128.slopes[i] = i == 4 ? -0.5 : 0.25 * i;
    values(values_t, 1);
    char *data = saved(&m, values_t, ks, &len);
    assert_ok(thresholds_parse(&t, data, len, "FILE", &why));
    const struct thresholds_rel *r = &thresholds_meta(t)->rel_128;
    assert_memory_equal(r, &m.rel_128, sizeof *r);
    assert_memory_equal(&thresholds_meta(t)->rel_64, &meta0.rel_64, sizeof *r);
    const int64_t same = llround(exp(9.5)), longer = 4 * same, far = 256 * same;
    assert_close(thresholds_rel_ln_lambda(r, 0.8, same), 4 - 9.5, 1e-4, 0);
    assert_close(thresholds_rel_ln_lambda(r, 0.8, longer), 4 + 0.25 * log(4) - log(4) - 9.5, 1e-4,
                 0);
    /* knot 4 falls below knot 3, which then stands for both */
    assert_close(thresholds_rel_ln_lambda(r, 0.5, longer), 5 + 0.75 * log(4) - log(4) - 9.5, 1e-4,
                 0);
    assert_close(thresholds_rel_ln_lambda(r, 0.8, far), 4 + 0.25 * log(64) - log(256) - 9.5, 1e-4,
                 0);
    thresholds_free(t);
    free(data);
}

static void density_published(void **state)
{
    (void)state;
    static const struct {
        int32_t n, k;
        double density;
    } rows[] = {{32, 64, .241},   {32, 96, .346},   {32, 128, .443},  {32, 192, .613},
                {64, 32, .065},   {64, 192, .343},  {64, 256, .440},  {64, 384, .611},
                {128, 512, .439}, {128, 768, .610}, {128, 1024, .751}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        assert_close(thresholds_predicted_density(rows[i].k, rows[i].n * 1024, 128),
                     rows[i].density, 0.0005, 0);
    }
}

/* The closed form beside the sum it stands for, at every length. */
static void density_brute(void **state)
{
    (void)state;
    for (int32_t gate_rows = 64; gate_rows <= 128; gate_rows += 64) {
        for (int32_t k = 1; k < 24; k += 3) {
            for (int32_t n = 1; n < 2000; n += 7) {
                double kept = 0, all = 0;
                for (int32_t first = 0; first < n; first += gate_rows) {
                    int32_t last = first + gate_rows - 1 < n - 1 ? first + gate_rows - 1 : n - 1;
                    int32_t a = first / 128 * 2, diag = last / 64 - a + 1;
                    kept += (a < k ? a : k) + diag;
                    all += a + diag;
                }
                assert_close(thresholds_predicted_density(k, n, gate_rows), kept / all, 1e-12, 0);
            }
        }
    }
    assert_close(thresholds_predicted_density(5, 0, 128), 1, 0, 0);
    for (int32_t n = 100; n < 70000; n += 4999) {
        int32_t k = thresholds_k_for_density(0.4, n, 128);
        assert_true(thresholds_predicted_density(k, n, 128) >= 0.4);
        assert_true(k == 1 || thresholds_predicted_density(k - 1, n, 128) < 0.4);
    }
}

/* A level's density is the mean over its heads, by whatever k each has; without head_k, k's. */
static void density_of_heads(void **state)
{
    (void)state;
    for (int own = 0; own < 2; own++) {
        struct thresholds_meta m = meta0;
        struct thresholds *t = NULL;
        float v[N_T];
        size_t len;
        m.head_k = own ? head_ks : NULL;
        values(v, 1);
        char *data = saved(&m, v, ks, &len);
        assert_ok(thresholds_parse(&t, data, len, "t", NULL));
        assert_true((thresholds_meta(t)->head_k != NULL) == own);
        for (int32_t n = 100; n < 9000; n += 777) {
            for (int32_t s = 0; s < S; s++) {
                double sum = 0;
                for (int32_t h = 0; h < L * H; h++)
                    sum +=
                        thresholds_predicted_density(own ? head_ks[s * L * H + h] : ks[s], n, 128);
                assert_close(thresholds_level_density(t, s, n), sum / (L * H), 1e-12, 0);
            }
        }
        thresholds_free(t);
        free(data);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(round_trip),
        cmocka_unit_test(auto_lambda),
        cmocka_unit_test(hash_identity),
        cmocka_unit_test(truncated),
        cmocka_unit_test(flipped),
        cmocka_unit_test(bad_fields),
        cmocka_unit_test(bad_values),
        cmocka_unit_test(hostile_headers),
        cmocka_unit_test(files),
        cmocka_unit_test(identity),
        cmocka_unit_test(rel_density),
        cmocka_unit_test(rel_lengths),
        cmocka_unit_test(density_published),
        cmocka_unit_test(density_brute),
        cmocka_unit_test(density_of_heads),
        cmocka_unit_test(decode_round_trip),
        cmocka_unit_test(bad_decode),
        cmocka_unit_test(rel_heads_round_trip),
        cmocka_unit_test(bad_rel_heads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
