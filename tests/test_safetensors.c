/* The reader against a hostile world: every truncation, every kind of wrong header, shards. */
#include "core/mem.h"
#include "model/safetensors.h"
#include "tests/test.h"

#include <errno.h>
#include <limits.h>
#include <unistd.h>

struct file {
    unsigned char bytes[4096];
    size_t len;
};

/* Header length, header, and n_data bytes 0, 1, 2... */
static struct file make_file(const char *header, size_t n_data)
{
    struct file f = {.len = 8 + strlen(header) + n_data};
    const uint64_t n = strlen(header);
    assert_true(f.len <= sizeof f.bytes);
    for (int i = 0; i < 8; i++)
        f.bytes[i] = (unsigned char)(n >> (8 * i));
    memcpy(f.bytes + 8, header, n);
    for (size_t i = 0; i < n_data; i++)
        f.bytes[8 + n + i] = (unsigned char)i;
    return f;
}

static const char good_header[] =
    "{\"__metadata__\":{\"format\":\"pt\"},"
    "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[24,30]},"
    "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
    "\"empty\":{\"dtype\":\"F32\",\"shape\":[0,9],\"data_offsets\":[24,24]},"
    "\"scalar\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[30,31]}}";

static void test_good(void **state)
{
    struct file f = make_file(good_header, 31);
    struct safetensors *s;
    (void)state;

    assert_ok(safetensors_parse(&s, f.bytes, f.len, "good", NULL));
    assert_int_equal(safetensors_count(s), 4);
    const struct st_tensor *a = safetensors_find(s, "a"), *b = safetensors_find(s, "b");
    assert_non_null(a);
    assert_non_null(b);
    assert_int_equal(a->dtype, ST_F32);
    assert_int_equal(a->n_dims, 2);
    assert_int_equal(a->shape[0], 2);
    assert_int_equal(a->shape[1], 3);
    assert_int_equal(a->bytes, 24);
    assert_ptr_equal(b->data, (const char *)a->data + 24);
    assert_int_equal(*(const unsigned char *)b->data, 24);
    assert_int_equal(safetensors_find(s, "empty")->bytes, 0);
    assert_int_equal(safetensors_find(s, "scalar")->n_dims, 0);
    assert_null(safetensors_find(s, "c"));
    assert_string_equal(safetensors_metadata(s, "format"), "pt");
    assert_null(safetensors_metadata(s, "version"));
    safetensors_close(s);
    safetensors_close(NULL);
}

/* Each prefix is copied to memory of exactly its length, so that ASan sees any read behind it. */
static void test_truncation(void **state)
{
    struct file f = make_file(good_header, 31);
    struct safetensors *s;
    (void)state;
    for (size_t len = 0; len < f.len; len++) {
        struct err_msg why = {{0}};
        unsigned char *part = mem_alloc(len + (len == 0));
        memcpy(part, f.bytes, len);
        assert_int_equal(safetensors_parse(&s, part, len, "cut.safetensors", &why), ERR_FORMAT);
        assert_non_null(strstr(why.text, "cut.safetensors"));
        mem_free(part);
    }
    f.bytes[f.len] = 0;
    assert_int_equal(safetensors_parse(&s, f.bytes, f.len + 1, "long", NULL), ERR_FORMAT);
}

/* Any single byte of the file may be anything: an error or a sound result, never a crash. */
static void test_flipped_bytes(void **state)
{
    struct rng rng = test_rng("flipped bytes", 21);
    (void)state;
    for (int i = 0; i < 20000; i++) {
        struct file f = make_file(good_header, 31);
        struct safetensors *s;
        for (int k = rng_range(&rng, 1, 3); k > 0; k--)
            f.bytes[rng_range(&rng, 0, (int32_t)f.len - 1)] = (unsigned char)rng_u64(&rng);
        if (safetensors_parse(&s, f.bytes, f.len, "flipped", NULL) < 0)
            continue;
        for (size_t t = 0; t < safetensors_count(s); t++) {
            const struct st_tensor *x = safetensors_at(s, t);
            assert_true((const unsigned char *)x->data + x->bytes <= f.bytes + f.len);
        }
        safetensors_close(s);
    }
}

static void test_hostile_headers(void **state)
{
    static const struct {
        const char *header;
        int code;
        const char *says;
    } cases[] = {
        {"", ERR_FORMAT, "line"},
        {"[]", ERR_FORMAT, "not a JSON object"},
        {"{\"a\":1}", ERR_FORMAT, "'a': dtype"},
        {"{\"a\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}}", ERR_UNSUPPORTED,
         "dtype 'F33'"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":1,\"data_offsets\":[0,4]}}", ERR_FORMAT, "shape"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", ERR_FORMAT,
         "shape[0]"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}}", ERR_FORMAT,
         "shape[0]"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}",
         ERR_FORMAT, "at most 8"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387905],\"data_offsets\":[0,4]}}",
         ERR_FORMAT, "overflows"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4294967296,4294967296,4294967296],"
         "\"data_offsets\":[0,0]}}",
         ERR_FORMAT, "overflows"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", ERR_FORMAT, "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", ERR_FORMAT,
         "data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", ERR_FORMAT, "outside"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", ERR_FORMAT,
         "outside"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,12]}}", ERR_FORMAT,
         "outside"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,8]}}", ERR_FORMAT, "span 8"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", ERR_FORMAT, "hole"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", ERR_FORMAT,
         "after the last"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
         ERR_FORMAT, "overlaps"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
         "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}",
         ERR_FORMAT, "duplicate"},
        {"{\"__metadata__\":[]}", ERR_FORMAT, "__metadata__"},
        {"{\"__metadata__\":{\"k\":1}}", ERR_FORMAT, "__metadata__.k"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct file f = make_file(cases[i].header, 8);
        struct safetensors *s;
        struct err_msg why = {{0}};
        int err = safetensors_parse(&s, f.bytes, f.len, "hostile", &why);
        if (err != cases[i].code || !strstr(why.text, cases[i].says) ||
            !strstr(why.text, "hostile"))
            fail_msg("%s: %d '%s', want '%s'", cases[i].header, err, why.text, cases[i].says);
    }
}

static void test_header_length(void **state)
{
    static const uint64_t lengths[] = {UINT64_MAX, (uint64_t)INT64_MAX, SAFETENSORS_MAX_HEADER + 1,
                                       SAFETENSORS_MAX_HEADER, 9};
    (void)state;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        struct file f = make_file("{}", 0);
        struct safetensors *s;
        for (int k = 0; k < 8; k++)
            f.bytes[k] = (unsigned char)(lengths[i] >> (8 * k));
        assert_int_equal(safetensors_parse(&s, f.bytes, f.len, "length", NULL), ERR_FORMAT);
    }
}

/* A folder for one test; removed by drop_dir. */
static void make_dir(char *dir)
{
    (void)strcpy(dir, "/tmp/sluice-test-XXXXXX");
    assert_non_null(mkdtemp(dir));
}

static void write_file(const char *dir, const char *name, const void *bytes, size_t len)
{
    char path[PATH_MAX];
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wbe");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, len, f), len);
    assert_int_equal(fclose(f), 0);
}

static void drop_dir(const char *dir)
{
    static const char *const names[] = {"model.safetensors", "model.safetensors.index.json",
                                        "one.safetensors", "two.safetensors"};
    char path[PATH_MAX];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        (void)snprintf(path, sizeof path, "%s/%s", dir, names[i]);
        (void)unlink(path);
    }
    assert_int_equal(rmdir(dir), 0);
}

static void test_shards(void **state)
{
    static const struct {
        const char *index, *says; /* says == NULL: opens */
    } cases[] = {
        {"{\"weight_map\":{\"x\":\"one.safetensors\",\"y\":\"two.safetensors\"}}", NULL},
        {"{\"weight_map\":{\"x\":\"one.safetensors\",\"z\":\"two.safetensors\"}}", "weight_map.z"},
        {"{\"weight_map\":{\"x\":\"three.safetensors\"}}", "three.safetensors"},
        {"{\"weight_map\":{\"x\":\"../one.safetensors\"}}", "not a file name"},
        {"{\"weight_map\":{\"x\":\"/etc/passwd\"}}", "not a file name"},
        {"{\"weight_map\":{\"x\":7}}", "not a file name"},
        {"{\"weight_map\":{}}", "weight_map"},
        {"{}", "weight_map"},
        {"{", "index.json"},
    };
    const struct file one =
        make_file("{\"x\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2);
    const struct file two =
        make_file("{\"y\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]}}", 3);
    char dir[32];
    (void)state;

    make_dir(dir);
    write_file(dir, "one.safetensors", one.bytes, one.len);
    write_file(dir, "two.safetensors", two.bytes, two.len);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct safetensors *s = NULL;
        struct err_msg why = {{0}};
        write_file(dir, "model.safetensors.index.json", cases[i].index, strlen(cases[i].index));
        int err = safetensors_open_dir(&s, dir, &why);
        if (cases[i].says) {
            assert_true(err < 0);
            assert_non_null(strstr(why.text, cases[i].says));
            continue;
        }
        assert_ok(err);
        assert_int_equal(safetensors_find(s, "y")->bytes, 3);
        safetensors_close(s);
    }
    /* the same tensor in two shards */
    write_file(dir, "two.safetensors", one.bytes, one.len);
    write_file(dir, "model.safetensors.index.json", cases[0].index, strlen(cases[0].index));
    struct safetensors *s;
    struct err_msg why = {{0}};
    assert_int_equal(safetensors_open_dir(&s, dir, &why), ERR_FORMAT);
    assert_non_null(strstr(why.text, "two shards"));
    drop_dir(dir);
}

static void test_files(void **state)
{
    char dir[32];
    const struct file f = make_file("{}", 0);
    struct safetensors *s;
    struct err_msg why = {{0}};
    (void)state;

    make_dir(dir);
    assert_int_equal(safetensors_open_dir(&s, dir, &why), -ENOENT);
    assert_non_null(strstr(why.text, "model.safetensors"));
    assert_true(safetensors_open(&s, dir, &why) < 0); /* a folder */
    write_file(dir, "model.safetensors", "", 0);
    assert_int_equal(safetensors_open_dir(&s, dir, &why), ERR_FORMAT);
    write_file(dir, "model.safetensors", f.bytes, f.len);
    assert_ok(safetensors_open_dir(&s, dir, &why));
    assert_int_equal(safetensors_count(s), 0);
    safetensors_close(s);
    drop_dir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_good),          cmocka_unit_test(test_truncation),
        cmocka_unit_test(test_flipped_bytes), cmocka_unit_test(test_hostile_headers),
        cmocka_unit_test(test_header_length), cmocka_unit_test(test_shards),
        cmocka_unit_test(test_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
