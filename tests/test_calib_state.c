/* calibration/calib_state: what was appended comes back, up to the last whole record, wherever the
 * file is cut or damaged; another calibration's file and other files are refused. */
#include "tests/test.h"

#include "calibration/calib_state.h"

#include <stdbool.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LEVELS = 2, LAYERS = 2, HEADS = 3, NB = 4, N = LEVELS * LAYERS * HEADS * NB, RECORDS = 3 };
enum { HEADER = 16 + sizeof(struct calib_state_id), RECORD = 16 + N * sizeof(double) };

static struct calib_state_id make_id(void)
{
    struct calib_state_id id;
    memset(&id, 0, sizeof id);
    id.model = 7;
    id.set = 9;
    (void)snprintf(id.numbers, sizeof id.numbers, "cpu f32 f32");
    id.gate_rows = 128;
    id.n_layers = LAYERS;
    id.n_heads = HEADS;
    id.n_blocks = NB;
    id.n_levels = LEVELS;
    id.k[0] = 3;
    id.k[1] = 5;
    return id;
}

static double value(int record, int i)
{
    return record * 1000 + i + 0.125;
}

static struct calib_state *open_ok(const char *path)
{
    const struct calib_state_id id = make_id();
    struct calib_state *s = NULL;
    struct err_msg why = {""};
    if (calib_state_open(&s, path, &id, &why) < 0)
        fail_msg("%s", why.text);
    return s;
}

/* Reads what is there, and checks it. */
static int read_all(struct calib_state *s)
{
    double v[N];
    int32_t n_tokens;
    for (int n = 0;; n++) {
        int err = calib_state_next(s, v, &n_tokens, NULL);
        assert_true(err >= 0);
        if (err == 0)
            return n;
        assert_int_equal(n_tokens, 100 + n);
        for (int i = 0; i < N; i++)
            assert_true(v[i] == value(n, i));
    }
}

static void append(struct calib_state *s, int record)
{
    double v[N];
    for (int i = 0; i < N; i++)
        v[i] = value(record, i);
    assert_ok(calib_state_append(s, v, 100 + record, NULL));
}

static void make_path(char *path)
{
    strcpy(path, "/tmp/sluice-state-XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)close(fd);
}

static void make_file(const char *path)
{
    struct calib_state *s = open_ok(path);
    assert_int_equal(read_all(s), 0);
    for (int i = 0; i < RECORDS; i++)
        append(s, i);
    calib_state_close(s);
}

static void comes_back(void **state)
{
    (void)state;
    char path[32];
    struct stat st;
    make_path(path);
    make_file(path);
    struct calib_state *s = open_ok(path);
    assert_int_equal(read_all(s), RECORDS);
    append(s, RECORDS);
    calib_state_close(s);
    s = open_ok(path);
    assert_int_equal(read_all(s), RECORDS + 1);
    calib_state_close(s);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_size, HEADER + (RECORDS + 1) * RECORD);
    calib_state_close(NULL);
    (void)unlink(path);
}

/* Cut at any byte; then what is appended follows the records that are left. */
static void cut(void **state)
{
    (void)state;
    char path[32];
    for (off_t at = 0; at <= HEADER + RECORDS * RECORD; at += at < HEADER ? 5 : 53) {
        make_path(path);
        make_file(path);
        assert_int_equal(truncate(path, at), 0);
        struct calib_state *s = open_ok(path);
        const int left = at < HEADER ? 0 : (int)((at - HEADER) / RECORD);
        assert_int_equal(read_all(s), left);
        append(s, left);
        calib_state_close(s);
        s = open_ok(path);
        assert_int_equal(read_all(s), left + 1);
        calib_state_close(s);
        (void)unlink(path);
    }
}

static void flip(const char *path, long at)
{
    FILE *f = fopen(path, "r+");
    assert_non_null(f);
    assert_int_equal(fseek(f, at, SEEK_SET), 0);
    const int c = fgetc(f);
    assert_int_equal(fseek(f, at, SEEK_SET), 0);
    assert_int_equal(fputc(c ^ 4, f), c ^ 4);
    assert_int_equal(fclose(f), 0);
}

static void damaged(void **state)
{
    (void)state;
    char path[32];
    for (long at = HEADER; at < HEADER + RECORDS * (long)RECORD; at += 31) {
        make_path(path);
        make_file(path);
        flip(path, at);
        struct calib_state *s = open_ok(path);
        assert_int_equal(read_all(s), (at - HEADER) / (long)RECORD);
        calib_state_close(s);
        (void)unlink(path);
    }
}

static void refused(void **state)
{
    (void)state;
    static const char *const says[] = {"model",     "samples", "pass",   "number format",
                                       "gate rows", "heads",   "length", "levels"};
    struct err_msg why = {""};
    struct calib_state *s = NULL;
    char path[32];
    make_path(path);
    make_file(path);
    for (int i = 0; i < (int)(sizeof says / sizeof *says); i++) {
        struct calib_state_id id = make_id();
        id.model += i == 0;
        id.set += i == 1;
        id.policy += i == 2;
        id.numbers[0] ^= i == 3;
        id.gate_rows -= i == 4 ? 64 : 0;
        id.n_heads += i == 5;
        id.n_blocks += i == 6;
        id.k[1] += i == 7;
        assert_int_equal(calib_state_open(&s, path, &id, &why), ERR_MISMATCH);
        if (!strstr(why.text, says[i]) || !strstr(why.text, path))
            fail_msg("'%s' lacks '%s'", why.text, says[i]);
    }
    const struct calib_state_id id = make_id();
    struct calib_state *first = open_ok(path);
    assert_int_equal(calib_state_open(&s, path, &id, &why), ERR_MISMATCH); /* locked */
    assert_non_null(strstr(why.text, "another calibration is writing it"));
    calib_state_close(first);
    flip(path, 3);
    assert_int_equal(calib_state_open(&s, path, &id, &why), ERR_FORMAT);
    assert_int_equal(truncate(path, 8), 0);
    assert_int_equal(calib_state_open(&s, path, &id, &why), ERR_FORMAT);
    assert_true(calib_state_open(&s, "/none/x", &id, &why) < 0);
    (void)unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(comes_back),
        cmocka_unit_test(cut),
        cmocka_unit_test(damaged),
        cmocka_unit_test(refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
