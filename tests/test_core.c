/* core/: error texts, option table, conversions, pool, lists. */
#include "tests/test.h"

#include "core/conf.h"
#include "core/dev.h"
#include "core/dtype.h"
#include "core/hash.h"
#include "core/list.h"
#include "core/log.h"
#include "core/mem.h"
#include "core/pool.h"

#include <errno.h>
#include <unistd.h>

static void err_texts(void **state)
{
    (void)state;
    struct err_msg why = {""};
    assert_string_equal(err_str(0), "success");
    assert_string_equal(err_name(ERR_NO_BLOCKS), "NO_BLOCKS");
    assert_string_equal(err_str(ERR_QUEUE_FULL), "queue is full");
    assert_string_equal(err_name(-EINVAL), "EINVAL");
    assert_string_equal(err_name(-4095), "EOF");
    assert_string_equal(err_str(-123456), "unknown error");
    assert_string_equal(err_why(&why, ERR_FORMAT), "malformed data");
    assert_int_equal(err_set(&why, ERR_FORMAT, "field %s", "x"), ERR_FORMAT);
    assert_string_equal(err_why(&why, ERR_FORMAT), "field x");
    assert_int_equal(err_set(NULL, -1, "ignored"), -1);
}

struct sample {
    bool flag, on;
    int64_t count, size, wait;
    double rate;
    char *path;
    int mode;
};

static const struct conf_opt sample_opts[] = {
    {"flag", CONF_BOOL, offsetof(struct sample, flag), "false", 0, 0, {0}, NULL, "a switch"},
    {"on", CONF_BOOL, offsetof(struct sample, on), "true", 0, 0, {0}, NULL, "another"},
    {"count", CONF_INT, offsetof(struct sample, count), "3", 1, 10, {0}, "N", "how many"},
    {"size", CONF_BYTES, offsetof(struct sample, size), "1k", 0, 0, {0}, "BYTES", "how big"},
    {"wait", CONF_MS, offsetof(struct sample, wait), "2s", 0, 0, {0}, "MS", "how long"},
    {"rate", CONF_FLOAT, offsetof(struct sample, rate), "0.5", 0, 1, {0}, "R", "how fast"},
    {"path", CONF_TEXT, offsetof(struct sample, path), NULL, 0, 0, {0}, "FILE", "where"},
    {"mode",
     CONF_ENUM,
     offsetof(struct sample, mode),
     "auto",
     0,
     0,
     {"auto", "cpu", "cuda"},
     NULL,
     "which"},
};
static const struct conf_program sample_prog = {"sample [options]", "A sample.", sample_opts,
                                                sizeof sample_opts / sizeof *sample_opts};

static void conf_sources(void **state)
{
    (void)state;
    struct sample s = {0};
    struct err_msg why = {""};
    char path[] = "/tmp/sluice-conf-XXXXXX";
    int fd = mkstemp(path);
    const char *text = "# comment\ncount = 7 # tail\n\n size=4M\nmode = cpu\n";
    assert_int_equal(write(fd, text, strlen(text)), (int)strlen(text));
    (void)close(fd);
    char *argv[] = {"p",       "--config", path, "word",      "--flag",
                    "--no-on", "--size",   "2g", "--path=/x", "--rate=1"};
    const char *rest[2];
    int n = 0;
    conf_defaults(&sample_prog, &s);
    assert_ok(conf_args(&sample_prog, &s, 10, argv, rest, 2, &n, &why));
    assert_int_equal(n, 1);
    assert_string_equal(rest[0], "word");
    assert_true(s.flag);
    assert_false(s.on);
    assert_int_equal(s.count, 7);
    assert_int_equal(s.size, 2LL << 30);
    assert_int_equal(s.wait, 2000);
    assert_int_equal(s.mode, 1);
    assert_string_equal(s.path, "/x");
    assert_close(s.rate, 1.0, 0, 0);
    conf_free(&sample_prog, &s);
    (void)unlink(path);
}

static void conf_bad(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"--count=x", "--count: 'x' is not a whole number"},
        {"--count=11", "--count: 11 is outside 1 to 10"},
        {"--size=4q", "--size: '4q' is not a size like 512M or 4G"},
        {"--size=9999999999999999g", "--size: '9999999999999999g' is not a size like 512M or 4G"},
        {"--rate=nan", "--rate: 'nan' is not a number"},
        {"--mode=tpu", "--mode: 'tpu' is not one of auto, cpu, cuda"},
        {"--what", "unknown option '--what' (see --help)"},
        {"--path", "--path needs a value"},
        {"extra", "unexpected word 'extra' (see --help)"},
        {"--config=/none/such", "--config: cannot open /none/such: No such file or directory"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct sample s = {0};
        struct err_msg why = {""};
        char *argv[] = {"p", (char *)cases[i][0]};
        conf_defaults(&sample_prog, &s);
        assert_true(conf_args(&sample_prog, &s, 2, argv, NULL, 0, NULL, &why) < 0);
        assert_string_equal(why.text, cases[i][1]);
        conf_free(&sample_prog, &s);
    }
}

static void dtype_round(void **state)
{
    (void)state;
    struct rng r = test_rng("dtype", 1);
    assert_int_equal(dtype_f32_bf16(1.0f), 0x3f80);
    assert_true(isnan((double)dtype_bf16_f32(dtype_f32_bf16((float)NAN))));
    assert_close((double)dtype_f16_f32(0x3c00), 1.0, 0, 0);
    assert_close((double)dtype_f16_f32(0x0001), 0x1p-24, 0, 0);
    assert_close((double)dtype_f16_f32(0xfbff), -65504.0, 0, 0);
    assert_true(isinf((double)dtype_f16_f32(0x7c00)));
    for (int i = 0; i < 10000; i++) {
        float f = (float)rng_normal(&r);
        float g = dtype_bf16_f32(dtype_f32_bf16(f));
        assert_close((double)g, (double)f, 0, 1.0 / 256);
        assert_int_equal(dtype_f32_bf16(g), dtype_f32_bf16(f));
    }
}

/* Every f16 comes back, and what lies halfway goes to the even neighbour. */
static void dtype_half(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x7c00; h++) {
        const float f = dtype_f16_f32((uint16_t)h), next = dtype_f16_f32((uint16_t)(h + 1));
        const float half = h == 0x7bff ? 65520.0f : 0.5f * (f + next);
        assert_int_equal(dtype_f32_f16(f), h);
        assert_int_equal(dtype_f32_f16(-f), h | 0x8000u);
        assert_int_equal(dtype_f32_f16(half), h + (h & 1));
        assert_int_equal(dtype_f32_f16(nextafterf(half, 0.0f)), h);
        assert_int_equal(dtype_f32_f16(nextafterf(half, INFINITY)), h + 1);
    }
    assert_int_equal(dtype_f32_f16(-INFINITY), 0xfc00);
    assert_int_equal(dtype_f32_f16(3e38f), 0x7c00);
    assert_true(isnan((double)dtype_f16_f32(dtype_f32_f16((float)NAN))));
}

static void mark(void *arg, int task, int worker)
{
    int *seen = arg;
    (void)worker;
    seen[task]++;
}

static void pool_all_once(void **state)
{
    (void)state;
    struct pool *p = NULL;
    assert_ok(pool_create(&p, 4));
    assert_int_equal(pool_size(p), 4);
    for (int round = 0; round < 500; round++) {
        int seen[97] = {0};
        pool_run(p, mark, seen, 97);
        for (int i = 0; i < 97; i++)
            assert_int_equal(seen[i], 1);
    }
    pool_run(p, mark, NULL, 0);
    pool_destroy(p);
}

struct item {
    int v;
    struct list link;
};

static void list_ops(void **state)
{
    (void)state;
    struct list head;
    struct item items[3] = {{.v = 0}, {.v = 1}, {.v = 2}};
    list_init(&head);
    assert_true(list_empty(&head));
    for (int i = 0; i < 3; i++)
        list_push_back(&head, &items[i].link);
    list_unlink(&items[1].link);
    list_push_front(&head, &items[1].link);
    int want[] = {1, 0, 2}, n = 0;
    LIST_FOREACH (node, &head)
        assert_int_equal(LIST_ENTRY(node, struct item, link)->v, want[n++]);
    assert_int_equal(n, 3);
}

static void dev_memory(void **state)
{
    (void)state;
    struct dev *d = NULL;
    struct err_msg why = {""};
    void *p = NULL;
    size_t free_bytes, total;
    assert_ok(dev_open(&d, &dev_cpu, 0, 2, &why));
    assert_ok(dev_mem_info(d, &free_bytes, &total));
    assert_true(free_bytes > 0 && free_bytes <= total);
    assert_ok(dev_alloc(d, &p, 1 << 20, &why));
    assert_int_equal(((char *)p)[12345], 0);
    dev_release(d, p, 1 << 20);
    assert_int_equal(dev_alloc(d, &p, (size_t)1 << 60, &why), -ENOMEM);
    assert_non_null(strstr(why.text, "MiB asked for"));
    dev_close(d);
    assert_int_equal(dev_open(&d, &dev_cpu, 1, 1, &why), ERR_INVALID);
}

static void hashes(void **state)
{
    (void)state;
    assert_true(hash_bytes("a", 1, 0) != hash_bytes("a", 1, 1));
    assert_true(hash_pair(1, 2) != hash_pair(2, 1));
    assert_int_equal(hash_bytes("", 0, 7), hash_bytes("", 0, 7));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(err_texts),  cmocka_unit_test(conf_sources),
        cmocka_unit_test(conf_bad),   cmocka_unit_test(dtype_round),
        cmocka_unit_test(dtype_half), cmocka_unit_test(pool_all_once),
        cmocka_unit_test(list_ops),   cmocka_unit_test(dev_memory),
        cmocka_unit_test(hashes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
