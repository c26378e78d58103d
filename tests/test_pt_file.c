/* calibration/pt_file: what torch.save writes is read, and no archive or pickle beyond that. Every
 * genuine file here came out of torch (data/pt/README.md); every damaged one is made here. */
#include "tests/test.h"

#include "calibration/pt_file.h"
#include "calibration/pt_zip.h"
#include "tests/pt_case.h"

#include <stdbool.h>
#include <unistd.h>

static struct pt_bytes read_file(const char *name)
{
    char path[512];
    struct pt_bytes b = {0};
    unsigned char buf[4096];
    size_t n;
    (void)snprintf(path, sizeof path, "%s/pt/%s", TEST_DATA, name);
    FILE *in = fopen(path, "re");
    if (!in)
        fail_msg("%s cannot be read", path);
    while ((n = fread(buf, 1, sizeof buf, in)) > 0)
        pt_bytes_add(&b, buf, n);
    (void)fclose(in);
    return b;
}

/* 0, or the error, whose text must say all that it should. The parser gets an exact-size copy, so
 * that the sanitizer sees any read past the end. */
static int parse(const struct pt_bytes *b, const char *says)
{
    struct pt_file *f = NULL;
    struct err_msg why = {""};
    unsigned char *copy = malloc(b->len ? b->len : 1);
    assert_non_null(copy);
    if (b->len > 0)
        memcpy(copy, b->data, b->len);
    int err = pt_file_parse(&f, copy, b->len, "FILE", &why);
    pt_file_close(f);
    free(copy);
    if (err < 0 && (!strstr(why.text, "FILE") || !strstr(why.text, says)))
        fail_msg("'%s' does not say '%s'", why.text, says);
    return err;
}

static void refused(const struct pt_bytes *b, int err, const char *says)
{
    int got = parse(b, says);
    if (got != err)
        fail_msg("got %d, want %d '%s'", got, err, says);
}

/* ---- archives ------------------------------------------------------------------------------- */

static void genuine(void **state)
{
    (void)state;
    struct pt_bytes b = read_file("bf16_offset.pt");
    struct pt_file *f = NULL;
    struct pt_tensor t;
    struct err_msg why = {""};
    int64_t k[8], v;
    int32_t n;
    if (pt_file_parse(&f, b.data, b.len, "FILE", &why) < 0)
        fail_msg("%s", why.text);
    assert_ok(pt_file_tensor(f, "thresholds", &t, &why));
    assert_int_equal(t.dtype, PT_BF16);
    assert_int_equal(t.n_dims, 4);
    assert_int_equal(t.n, 3 * 3 * 4 * 8);
    assert_true(t.shape[0] == 3 && t.shape[1] == 3 && t.shape[2] == 4 && t.shape[3] == 8);
    assert_true(pt_tensor_f32(&t, 0) == -INFINITY);
    assert_true(pt_tensor_f32(&t, 2) == -15.75f); /* 16 - 2/8: the offset was heeded */
    assert_ok(pt_file_ints(f, "k_values", k, 8, &n, &why));
    assert_true(n == 3 && k[0] == 2 && k[1] == 5 && k[2] == 9);
    assert_ok(pt_file_int(f, "q_block_size", &v, &why));
    assert_int_equal(v, 128);
    assert_true(pt_file_has(f, "k_block_size"));
    assert_false(pt_file_has(f, "num_layers"));
    assert_true(pt_file_int(f, "num_layers", &v, &why) == ERR_FORMAT);
    assert_non_null(strstr(why.text, "num_layers is missing"));
    assert_true(pt_file_int(f, "k_values", &v, &why) == ERR_FORMAT);
    assert_non_null(strstr(why.text, "k_values is a tensor, must be a number"));
    assert_true(pt_file_ints(f, "k_values", k, 2, &n, &why) == ERR_FORMAT);
    assert_non_null(strstr(why.text, "k_values has 3 numbers, must have 1 to 2"));
    assert_true(pt_file_tensor(f, "q_block_size", &t, &why) == ERR_FORMAT);
    pt_file_close(f);
    pt_bytes_free(&b);
}

static void not_contiguous(void **state)
{
    (void)state;
    struct pt_bytes b = read_file("transposed.pt");
    struct pt_file *f = NULL;
    struct pt_tensor t;
    struct err_msg why = {""};
    assert_ok(pt_file_parse(&f, b.data, b.len, "FILE", &why));
    assert_true(pt_file_tensor(f, "thresholds", &t, &why) == ERR_UNSUPPORTED);
    assert_non_null(strstr(why.text, "shape [3, 4, 3, 8] and strides [96, 8, 32, 1]"));
    pt_file_close(f);
    pt_bytes_free(&b);
}

static void cut_short(void **state)
{
    (void)state;
    struct pt_bytes b = read_file("reference.pt");
    const size_t len = b.len;
    for (b.len = 0; b.len < len; b.len++)
        refused(&b, ERR_FORMAT, "FILE");
    b.len = len;
    assert_ok(parse(&b, ""));
    pt_bytes_add(&b, "", 1);
    refused(&b, ERR_FORMAT, "has something after its end");
    pt_bytes_free(&b);
}

static struct pt_bytes archive(bool zip64)
{
    struct pt_bytes b = {0};
    const struct pt_case_member m[] = {
        {"a/data.pkl", "\x80\x02}.", 4}, {"a/byteorder", "little", 6}, {"a/data/0", "1234", 4}};
    pt_case_zip(&b, m, 3, zip64);
    return b;
}

/* Where a record begins, the i-th of its kind. */
static size_t record(const struct pt_bytes *b, uint32_t sig, int i)
{
    for (size_t at = 0; at + 4 <= b->len; at++) {
        if (memcmp(b->data + at, &sig, 4) == 0 && i-- == 0)
            return at;
    }
    fail_msg("no record %08x", sig);
    return 0;
}

enum {
    LOCAL = 0x04034b50,
    CENTRAL = 0x02014b50,
    END = 0x06054b50,
    END64 = 0x06064b50,
    LOCATOR = 0x07064b50
};

static void bad_records(void **state)
{
    (void)state;
    static const struct {
        bool zip64;
        uint32_t sig;
        int i;
        size_t field;
        int bytes;
        uint64_t v;
        int err;
        const char *says;
    } cases[] = {
        {false, CENTRAL, 0, 10, 2, 8, ERR_UNSUPPORTED, "member a/data.pkl: compressed"},
        {false, CENTRAL, 2, 20, 4, 3, ERR_UNSUPPORTED, "member a/data/0: compressed"},
        {false, CENTRAL, 1, 8, 2, 1, ERR_UNSUPPORTED, "member a/byteorder: encrypted"},
        {false, CENTRAL, 1, 8, 2, 0x40, ERR_UNSUPPORTED, "unknown flags"},
        {false, CENTRAL, 1, 34, 2, 1, ERR_UNSUPPORTED, "unknown flags"},
        {false, CENTRAL, 1, 16, 4, 7, ERR_FORMAT, "a/byteorder: CRC-32 is"},
        {false, CENTRAL, 1, 42, 4, 0, ERR_FORMAT, "overlaps another"},
        {false, CENTRAL, 1, 42, 4, 0xfffffff0, ERR_FORMAT, "overlaps another"},
        {false, CENTRAL, 1, 42, 4, 45, ERR_FORMAT, "disagrees with the directory"},
        {false, CENTRAL, 0, 28, 2, 0xffff, ERR_FORMAT, "damaged central directory"},
        {false, CENTRAL, 0, 30, 2, 0xffff, ERR_FORMAT, "damaged central directory"},
        {false, CENTRAL, 2, 32, 2, 1, ERR_FORMAT, "damaged central directory"},
        {false, CENTRAL, 2, 0, 4, 0, ERR_FORMAT, "damaged central directory"},
        {false, LOCAL, 0, 0, 4, 0, ERR_FORMAT, "disagrees with the directory"},
        {false, LOCAL, 0, 8, 2, 8, ERR_FORMAT, "disagrees with the directory"},
        {false, LOCAL, 0, 28, 2, 0xffff, ERR_FORMAT, "disagrees with the directory"},
        {false, LOCAL, 1, 30, 1, 'b', ERR_FORMAT, "disagrees with the directory"},
        {false, END, 0, 20, 2, 1, ERR_FORMAT, "has a comment"},
        {false, END, 0, 4, 2, 1, ERR_FORMAT, "several disks"},
        {false, END, 0, 8, 2, 2, ERR_FORMAT, "several disks"},
        {false, END, 0, 8, 4, 0x00020002, ERR_FORMAT, "damaged central directory"},
        {false, END, 0, 8, 4, 0, ERR_FORMAT, "0 members"},
        {false, END, 0, 8, 4, 0x01010101, ERR_FORMAT, "257 members, must be 1 to 256"},
        {false, END, 0, 12, 4, 0xffffffff, ERR_FORMAT, "does not end at the end record"},
        {false, END, 0, 16, 4, 0xffffffff, ERR_FORMAT, "does not end at the end record"},
        {true, END64, 0, 48, 8, UINT64_MAX, ERR_FORMAT, "does not end at the end record"},
        {true, END64, 0, 40, 8, UINT64_MAX, ERR_FORMAT, "does not end at the end record"},
        {true, END64, 0, 24, 8, 2, ERR_FORMAT, "several disks"},
        {true, END64, 0, 16, 4, 1, ERR_FORMAT, "several disks"},
        {true, END64, 0, 4, 8, 45, ERR_FORMAT, "damaged zip64 end record"},
        {true, LOCATOR, 0, 8, 8, 0, ERR_FORMAT, "not before its locator"},
        {true, LOCATOR, 0, 8, 8, UINT64_MAX, ERR_FORMAT, "not before its locator"},
        {true, LOCATOR, 0, 16, 4, 2, ERR_FORMAT, "several disks"},
        {true, CENTRAL, 2, 58, 8, 1ull << 62, ERR_UNSUPPORTED, "compressed"},
        {true, CENTRAL, 2, 56, 2, 23, ERR_FORMAT, "a/data/0: damaged zip64 field"},
        {true, CENTRAL, 2, 56, 2, 25, ERR_FORMAT, "a/data/0: damaged extra field"},
        {true, CENTRAL, 2, 74, 8, 1ull << 63, ERR_FORMAT, "overlaps another"},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct pt_bytes b = archive(cases[c].zip64);
        const size_t at = record(&b, cases[c].sig, cases[c].i) + cases[c].field;
        assert_ok(parse(&b, ""));
        memcpy(b.data + at, &cases[c].v, (size_t)cases[c].bytes);
        refused(&b, cases[c].err, cases[c].says);
        pt_bytes_free(&b);
    }
}

/* A member whose both sizes say more than there is. */
static void absurd_sizes(void **state)
{
    (void)state;
    for (uint64_t size = 30; size < UINT32_MAX - 7; size = size * 8 + 3) {
        struct pt_bytes b = archive(false);
        const size_t at = record(&b, CENTRAL, 2);
        memcpy(b.data + at + 20, &size, 4);
        memcpy(b.data + at + 24, &size, 4);
        refused(&b, ERR_FORMAT, "a/data/0: reaches into the directory");
        pt_bytes_free(&b);
    }
    for (uint64_t size = 30; size < UINT64_MAX / 16; size = size * 8 + 3) {
        struct pt_bytes b = archive(true);
        const size_t at = record(&b, CENTRAL, 2) + 46 + 8 + 4;
        memcpy(b.data + at, &size, 8);
        memcpy(b.data + at + 8, &size, 8);
        refused(&b, ERR_FORMAT, "a/data/0: reaches into the directory");
        pt_bytes_free(&b);
    }
}

static void bad_names(void **state)
{
    (void)state;
    static const struct {
        const char *second;
        const char *says;
    } cases[] = {
        {"a/../../etc/passwd", "not a name that torch.save gives"},
        {"/a/data/0", "not a name that torch.save gives"},
        {"a\\data\\0", "not a name that torch.save gives"},
        {"data", "not a name that torch.save gives"},
        {"", "not a name that torch.save gives"},
        {"b/data/0", "not in the folder of the others"},
        {"a/", "not in the folder of the others"},
        {"a/data.pkl", "is there twice"},
        {"a/\x1b[2J", NULL},
    };
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct pt_bytes b = {0};
        const struct pt_case_member m[] = {{"a/data.pkl", "\x80\x02}.", 4},
                                           {cases[c].second, "x", 1}};
        pt_case_zip(&b, m, 2, false);
        if (cases[c].says)
            refused(&b, ERR_FORMAT, cases[c].says);
        else
            assert_ok(parse(&b, ""));
        pt_bytes_free(&b);
    }
    struct pt_bytes b = {0};
    const struct pt_case_member none = {"a/data.pk", "\x80\x02}.", 4};
    pt_case_zip(&b, &none, 1, false);
    refused(&b, ERR_FORMAT, "there is no data.pkl in it");
    pt_bytes_free(&b);
    const struct pt_case_member big[] = {{"a/data.pkl", "\x80\x02}.", 4},
                                         {"a/byteorder", "big", 3}};
    pt_case_zip(&b, big, 2, false);
    refused(&b, ERR_UNSUPPORTED, "byteorder is not little");
    pt_bytes_free(&b);
}

/* ---- pickles -------------------------------------------------------------------------------- */

static void pickle_refused(const void *pickle, size_t len, int err, const char *says)
{
    struct pt_bytes b = {0};
    const struct pt_case_member m = {"a/data.pkl", pickle, len};
    pt_case_zip(&b, &m, 1, false);
    refused(&b, err, says);
    pt_bytes_free(&b);
}

/* What a pickle can do to a reader that runs it. */
static void nothing_runs(void **state)
{
    (void)state;
    static const char marker[] = "/tmp/sluice-pt-ran";
    struct pt_bytes p = {0};
    char command[64];
    (void)unlink(marker);
    (void)snprintf(command, sizeof command, "touch %s", marker);
    pt_bytes_add(&p,
                 "\x80\x02"
                 "cos\nsystem\nq\0",
                 15);
    pt_case_text(&p, command);
    pt_bytes_add(&p, "\x85q\x01R.", 5);
    pickle_refused(p.data, p.len, ERR_UNSUPPORTED,
                   "GLOBAL at offset 2: os.system is nothing that a threshold file needs");
    pt_bytes_free(&p);
    assert_int_equal(access(marker, F_OK), -1);
    static const char *const others[] = {"posix\nsystem",          "builtins\neval",
                                         "builtins\ngetattr",      "torch\nload",
                                         "torch\nUntypedStorage",  "torch._utils\n_rebuild_tensor",
                                         "torch\nFloatStorage2",   "torch.\nFloatStorage",
                                         "collections\nOrdered\n", "\n",
                                         "\x1b[2J\n\x07"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        pt_bytes_add(&p, "\x80\x02}c", 4);
        pt_bytes_add(&p, others[i], strlen(others[i]));
        pt_bytes_add(&p, "\n.", 2);
        pickle_refused(p.data, p.len, ERR_UNSUPPORTED, "GLOBAL at offset 3: ");
        pt_bytes_free(&p);
    }
}

/* Whatever is not one of the instructions that torch.save needs. */
static void unknown_instructions(void **state)
{
    (void)state;
    static const char known[] = "(}])t\x85\x86\x87"
                                "aesuXKMJ\x8a\x88\x89"
                                "qrhjcQR.";
    for (int code = 0; code < 256; code++) {
        char says[64];
        const unsigned char p[] = {0x80, 2, '}', (unsigned char)code, '.'};
        if ((code && strchr(known, code)) || code == 0x80)
            continue;
        (void)snprintf(says, sizeof says, "instruction 0x%02x at offset 3", (unsigned)code);
        pickle_refused(p, sizeof p, ERR_UNSUPPORTED, says);
    }
}

#define P(text) text, sizeof(text) - 1
#define STORAGE                                                                                    \
    "((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0"                                            \
    "0X\3\0\0\0cpuK\1tQ"

/* What breaks the rules of the instructions, and what is told of it. */
static const struct {
    const char *p;
    size_t len;
    const char *says;
} broken[] = {
    {P(""), "data.pkl has 0 bytes"},
    {P("}."), "EMPTY_DICT at offset 0: a pickle begins with PROTO"},
    {P("\x80\x02\x80\x02}."), "PROTO at offset 2: a pickle begins with PROTO"},
    {P("\x80\x04}."), "PROTO at offset 0: the protocol is not 2"},
    {P("\x80"), "PROTO at offset 0: the pickle ends within"},
    {P("\x80\x02}"), "ends without STOP"},
    {P("\x80\x02}.."), "STOP at offset 3: something is left over"},
    {P("\x80\x02}}."), "STOP at offset 4: something is left over"},
    {P("\x80\x02(}."), "STOP at offset 4: something is left over"},
    {P("\x80\x02."), "STOP at offset 2: there is nothing"},
    {P("\x80\x02(."), "STOP at offset 3: there is nothing"},
    {P("\x80\x02]."), "STOP at offset 3: the value is no dict"},
    {P("\x80\x02}(K\1K\2u."), "SETITEMS at offset 8: a key is no text"},
    {P("\x80\x02}(X\0\0\0\0u."), "SETITEMS at offset 9: a key has no value"},
    {P("\x80\x02](X\0\0\0\0K\1u."), "SETITEMS at offset 11: there is no dict"},
    {P("\x80\x02}K\1u."), "SETITEMS at offset 5: there is no dict"},
    {P("\x80\x02u."), "SETITEMS at offset 2: there is no dict"},
    {P("\x80\x02}K\1s."), "SETITEM at offset 5: there is no"},
    {P("\x80\x02}(s."), "SETITEM at offset 4: there is nothing"},
    {P("\x80\x02}(K\1e."), "APPENDS at offset 6: there is no list"},
    {P("\x80\x02K\1a."), "APPEND at offset 4: there is no list"},
    {P("\x80\x02"
       "a."),
     "APPEND at offset 2: there is nothing"},
    {P("\x80\x02("
       "a."),
     "APPEND at offset 3: there is nothing"},
    {P("\x80\x02t."), "TUPLE at offset 2: there is no mark"},
    {P("\x80\x02K\1\x86."), "TUPLE2 at offset 4: there is nothing"},
    {P("\x80\x02K\1(K\1\x87."), "TUPLE3 at offset 7: there is nothing"},
    {P("\x80\x02h\0."), "BINGET at offset 2: nothing was put there"},
    {P("\x80\x02j\xff\xff\xff\xff."), "LONG_BINGET at offset 2: nothing was put there"},
    {P("\x80\x02}r\xff\xff\xff\x7f."), "LONG_BINPUT at offset 3: an absurd memo"},
    {P("\x80\x02}q\x40."), "BINPUT at offset 3: an absurd memo"},
    {P("\x80\x02(q\0."), "BINPUT at offset 3: there is nothing"},
    {P("\x80\x02X\xff\xff\xff\xff"
       "abc."),
     "BINUNICODE at offset 2: the pickle ends within"},
    {P("\x80\x02X\5\0\0\0abc."), "BINUNICODE at offset 2: the pickle ends within"},
    {P("\x80\x02J\1\2."), "BININT at offset 2: the pickle ends within"},
    {P("\x80\x02\x8a\x09"
       "123456789."),
     "LONG1 at offset 2: a number of more than 64 bits"},
    {P("\x80\x02\x8a\x08"
       "1234."),
     "LONG1 at offset 2: the pickle ends within"},
    {P("\x80\x02"
       "ctorch."),
     "GLOBAL at offset 2: the pickle ends within"},
    {P("\x80\x02"
       "ctorch\nFloat."),
     "GLOBAL at offset 2: the pickle ends within"},
    {P("\x80\x02K\1Q."), "BINPERSID at offset 4: not the storage"},
    {P("\x80\x02)Q."), "BINPERSID at offset 3: not the storage"},
    {P("\x80\x02(X\7\0\0\0storagectorch\nFloatStorage\nX\0\0\0\0X\3\0\0\0cpuK\1tQ."),
     "the storage's key is no number"},
    {P("\x80\x02(X\7\0\0\0storagectorch\nFloatStorage\nX\4\0\0\0../0X\3\0\0\0cpuK\1tQ."),
     "the storage's key is no number"},
    {P("\x80\x02(X\7\0\0\0storagectorch\nFloatStorage\nX\x0d\0\0\0"
       "0000000000000X\3\0\0\0cpuK\1tQ."),
     "the storage's key is no number"},
    {P("\x80\x02(X\7\0\0\0storageccollections\nOrderedDict\nX\1\0\0\0"
       "0X\3\0\0\0cpuK\1tQ."),
     "not the storage of a tensor"},
    {P("\x80\x02K\1K\1R."), "REDUCE at offset 6: not a call"},
    {P("\x80\x02"
       "ctorch\nFloatStorage\n)R."),
     "not a call of a plain tensor"},
    {P("\x80\x02"
       "ccollections\nOrderedDict\nK\1\x85R."),
     "not a call of a plain tensor"},
    {P("\x80\x02"
       "ctorch._utils\n_rebuild_tensor_v2\n)R."),
     "not a call of a plain tensor"},
    {P("\x80\x02"
       "ctorch._utils\n_rebuild_tensor_v2\n" STORAGE "K\0K\1\x85K\1K\1\x86\x89}tR."),
     "not a call of a plain tensor"},
    {P("\x80\x02"
       "ctorch._utils\n_rebuild_tensor_v2\n" STORAGE "J\xff\xff\xff\xffK\1\x85K\1\x85\x89}tR."),
     "not a call of a plain tensor"},
    {P("\x80\x02"
       "ctorch._utils\n_rebuild_tensor_v2\n" STORAGE "K\0(KKKKKKKKKKKKKKKKKKt)\x89}tR."),
     "not a call of a plain tensor"},
    {P("\x80\x02"
       "ctorch._utils\n_rebuild_tensor_v2\n" STORAGE "K\0X\0\0\0\0\x85K\1\x85\x89}tR."),
     "not a call of a plain tensor"},
};

static void bad_pickles(void **state)
{
    (void)state;
    for (size_t c = 0; c < sizeof broken / sizeof *broken; c++)
        pickle_refused(broken[c].p, broken[c].len, ERR_FORMAT, broken[c].says);
}

/* Odd, but what the instructions mean: a list in itself, a dict filled after its use, a pickle at
 * the limit of its length, and one beyond. */
static void odd_pickles(void **state)
{
    (void)state;
    struct pt_bytes b = {0}, p = {0};
    struct pt_file *f = NULL;
    int64_t k[4];
    int32_t n;
    static const char loop[] = "\x80\x02}X\1\0\0\0k]q\0h\0ah\0as.";
    const struct pt_case_member m = {"a/data.pkl", loop, sizeof loop - 1};
    struct err_msg why = {""};
    pt_case_zip(&b, &m, 1, false);
    if (pt_file_parse(&f, b.data, b.len, "FILE", &why) < 0)
        fail_msg("%s", why.text);
    assert_true(pt_file_ints(f, "k", k, 4, &n, &why) == ERR_FORMAT);
    assert_non_null(strstr(why.text, "k[0] is no number"));
    pt_file_close(f);
    pt_bytes_free(&b);
    pt_bytes_add(&p, "\x80\x02}", 3);
    while (p.len < PT_PICKLE_MAX_BYTES - 1)
        pt_bytes_add(&p, p.len % 2 ? "(" : "t", 1);
    pickle_refused(p.data, p.len, ERR_FORMAT, "ends without STOP");
    pt_bytes_add(&p, "..", 2);
    pickle_refused(p.data, p.len, ERR_FORMAT, "data.pkl has 65537 bytes");
    pt_bytes_free(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(genuine),      cmocka_unit_test(not_contiguous),
        cmocka_unit_test(cut_short),    cmocka_unit_test(bad_records),
        cmocka_unit_test(absurd_sizes), cmocka_unit_test(bad_names),
        cmocka_unit_test(nothing_runs), cmocka_unit_test(unknown_instructions),
        cmocka_unit_test(bad_pickles),  cmocka_unit_test(odd_pickles),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
