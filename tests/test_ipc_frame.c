/* The frame reader: any tearing gives the same frames, limits hold, memory follows what came. */
#include "tests/test.h"

#include "ipc/frame.h"

enum { MAX = 200000 };

static size_t put_frame(uint8_t *to, const uint8_t *payload, size_t n)
{
    to[0] = (uint8_t)(n >> 24);
    to[1] = (uint8_t)(n >> 16);
    to[2] = (uint8_t)(n >> 8);
    to[3] = (uint8_t)n;
    memcpy(to + 4, payload, n);
    return n + 4;
}

/* Gives the reader at most n bytes of src; returns how many it took. */
static size_t feed(struct ipc_frame_reader *r, const uint8_t *src, size_t n)
{
    uint8_t *room;
    size_t len;
    assert_ok(ipc_frame_reader_space(r, &room, &len));
    assert_true(len > 0);
    if (len > n)
        len = n;
    memcpy(room, src, len);
    ipc_frame_reader_commit(r, len);
    return len;
}

static void test_torn_everywhere(void **state)
{
    uint8_t stream[64], a[5] = {1, 2, 3, 4, 5}, b[20] = {9};
    size_t n = put_frame(stream, a, sizeof a);
    n += put_frame(stream + n, b, sizeof b);
    (void)state;
    for (size_t cut = 0; cut <= n; cut++) {
        struct ipc_frame_reader r;
        const uint8_t *p;
        size_t len, frames = 0, at = 0;
        ipc_frame_reader_init(&r, 100);
        for (int part = 0; part < 2; part++) {
            size_t end = part ? n : cut;
            while (at < end)
                at += feed(&r, stream + at, end - at);
            int rc;
            while ((rc = ipc_frame_reader_next(&r, &p, &len, NULL)) == 1) {
                assert_int_equal(len, frames ? sizeof b : sizeof a);
                assert_memory_equal(p, frames ? b : a, len);
                frames++;
            }
            assert_int_equal(rc, 0);
        }
        assert_int_equal(frames, 2);
        ipc_frame_reader_deinit(&r);
    }
}

static void test_random_streams(void **state)
{
    struct rng rng = test_rng("frames", 1);
    uint8_t *payload = malloc(MAX), *stream = malloc(20 * (MAX + 4));
    (void)state;
    for (size_t i = 0; i < MAX; i++)
        payload[i] = (uint8_t)rng_u64(&rng);
    for (int round = 0; round < 30; round++) {
        struct ipc_frame_reader r;
        size_t sizes[20], n = 0, at = 0, frames = 0, len;
        const uint8_t *p;
        for (int i = 0; i < 20; i++) {
            sizes[i] = (size_t)rng_range(&rng, 1, rng_range(&rng, 0, 3) ? 300 : MAX);
            n += put_frame(stream + n, payload, sizes[i]);
        }
        ipc_frame_reader_init(&r, MAX);
        while (at < n) {
            size_t want = (size_t)rng_range(&rng, 1, rng_range(&rng, 0, 1) ? 50 : 100000);
            at += feed(&r, stream + at, want < n - at ? want : n - at);
            if (rng_range(&rng, 0, 3) == 0)
                continue; /* a caller that is late taking frames out */
            while (ipc_frame_reader_next(&r, &p, &len, NULL) == 1) {
                assert_int_equal(len, sizes[frames++]);
                assert_memory_equal(p, payload, len);
            }
        }
        while (ipc_frame_reader_next(&r, &p, &len, NULL) == 1)
            assert_int_equal(len, sizes[frames++]);
        assert_int_equal(frames, 20);
        ipc_frame_reader_deinit(&r);
    }
    free(payload);
    free(stream);
}

static void expect_refusal(uint32_t announced, size_t limit)
{
    struct ipc_frame_reader r;
    struct err_msg why = {""};
    uint8_t header[4] = {(uint8_t)(announced >> 24), (uint8_t)(announced >> 16),
                         (uint8_t)(announced >> 8), (uint8_t)announced};
    const uint8_t *p;
    size_t len;
    ipc_frame_reader_init(&r, limit);
    (void)feed(&r, header, 4);
    assert_int_equal(ipc_frame_reader_next(&r, &p, &len, &why), ERR_PROTOCOL);
    assert_true(why.text[0] != '\0');
    ipc_frame_reader_deinit(&r);
}

static void test_absurd_lengths(void **state)
{
    (void)state;
    expect_refusal(0, 4096);
    expect_refusal(4097, 4096);
    expect_refusal(0xffffffff, IPC_FRAME_MAX);
    expect_refusal(0x80000000, IPC_FRAME_MAX);
    expect_refusal(IPC_FRAME_MAX + 1, IPC_FRAME_MAX);
}

/* A peer that announces 16 MiB and sends little holds little; and a large frame is let go of. */
static void test_memory_follows_bytes(void **state)
{
    static uint8_t zeros[1 << 20];
    struct ipc_frame_reader r;
    const uint8_t *p;
    size_t len, sent = 0, total = IPC_FRAME_MAX;
    uint8_t header[4] = {1, 0, 0, 0};
    (void)state;
    ipc_frame_reader_init(&r, IPC_FRAME_MAX);
    (void)feed(&r, header, 4);
    assert_int_equal(ipc_frame_reader_next(&r, &p, &len, NULL), 0);
    while (sent < total) {
        sent += feed(&r, zeros, sizeof zeros < total - sent ? sizeof zeros : total - sent);
        assert_true(r.cap <= 2 * (sent + 4) + (64 << 10) + 4);
        assert_true(r.cap <= total + 4);
        assert_int_equal(ipc_frame_reader_next(&r, &p, &len, NULL), sent == total);
    }
    assert_int_equal(len, total);
    (void)feed(&r, header, 1);
    assert_true(r.cap <= (64 << 10) + 4);
    ipc_frame_reader_deinit(&r);
}

/* The limit is raised after the handshake, and binds frames that are not judged yet. */
static void test_limit_changes(void **state)
{
    struct ipc_frame_reader r;
    const uint8_t *p;
    size_t len;
    uint8_t header[4] = {0, 0, 0x20, 0};
    (void)state;
    ipc_frame_reader_init(&r, 4096);
    ipc_frame_reader_set_limit(&r, 0x2000);
    (void)feed(&r, header, 4);
    assert_int_equal(ipc_frame_reader_next(&r, &p, &len, NULL), 0);
    ipc_frame_reader_deinit(&r);
    ipc_frame_reader_deinit(&(struct ipc_frame_reader){0});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_torn_everywhere), cmocka_unit_test(test_random_streams),
        cmocka_unit_test(test_absurd_lengths),  cmocka_unit_test(test_memory_follows_bytes),
        cmocka_unit_test(test_limit_changes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
