/* Messages: everything that is packed is read back equal; nothing malformed gets through; errors
 * name the field; the bytes are those of PROTOCOL.md. */
#include "tests/test.h"

#include "ipc/frame.h"
#include "ipc/message.h"
#include "ipc/schema.h"

#include <msgpack.h>

static const int all_types[] = {
    IPC_HELLO,     IPC_SUBMIT,   IPC_CANCEL,   IPC_STATS,
    IPC_HEALTH,    IPC_DRAIN,    IPC_SHUTDOWN, IPC_RESET_PREFIX_CACHE,
    IPC_PING,      IPC_HELLO_OK, IPC_ACCEPTED, IPC_PROGRESS,
    IPC_TOKENS,    IPC_DONE,     IPC_ERROR,    IPC_STATS_OK,
    IPC_HEALTH_OK, IPC_GOAWAY,   IPC_OK,       IPC_PONG,
};
enum { N_TYPES = sizeof all_types / sizeof all_types[0], MAX_LIST = 40 };

/* --- random messages --- */

struct store {
    int32_t tokens[MAX_LIST];
    struct ipc_logprob logprobs[MAX_LIST];
    struct ipc_stat stats[MAX_LIST];
    const char *ids[MAX_LIST];
    char texts[MAX_LIST][24];
};

static void put_i32(char *at, int32_t v)
{
    memcpy(at, &v, sizeof v);
}

static void random_text(struct rng *r, char *to, size_t room)
{
    static const char *const pieces[] = {
        "a", "Z", "9", " ", "\"", "\xc3\xa4", "\xe2\x82\xac", "\xf0\x9f\x98\x80"};
    size_t len = 0, want = (size_t)rng_range(r, 1, (int32_t)room);
    for (;;) {
        const char *p = pieces[rng_range(r, 0, 7)];
        if (len + strlen(p) > want)
            break;
        memcpy(to + len, p, strlen(p));
        len += strlen(p);
    }
    if (len == 0)
        to[len++] = 'x';
    to[len] = '\0';
}

static void random_logprobs(struct rng *r, struct store *st)
{
    for (int32_t i = 0; i < MAX_LIST; i++) {
        struct ipc_logprob *l = &st->logprobs[i];
        *l = (struct ipc_logprob){.token = rng_range(r, 0, INT32_MAX)};
        l->logprob = -(float)rng_unit(r) * 30;
        l->n_top = rng_range(r, 0, IPC_MAX_LOGPROBS);
        for (int32_t j = 0; j < l->n_top; j++) {
            l->top_ids[j] = rng_range(r, 0, INT32_MAX);
            l->top_logprobs[j] = -(float)rng_unit(r);
        }
    }
}

static void random_list(struct rng *r, const struct ipc_field *f, char *body, struct store *st)
{
    int32_t n = rng_range(r, f->required, f->room && f->room < MAX_LIST ? f->room : MAX_LIST);
    char *at = body + f->offset;
    const void *p = NULL;
    for (int32_t i = 0; i < MAX_LIST; i++)
        random_text(r, st->texts[i], 16);
    switch (f->kind) {
    case IPC_KIND_STR_LIST:
        for (int32_t i = 0; i < n; i++)
            random_text(r, at + i * (IPC_CAP_BYTES + 1), IPC_CAP_BYTES);
        break;
    case IPC_KIND_SALT:
        for (int32_t i = 0; i < n; i++)
            at[i] = (char)rng_u64(r);
        break;
    case IPC_KIND_I32_LIST:
        for (int32_t i = 0; i < n; i++)
            put_i32(at + i * 4, rng_range(r, 0, INT32_MAX));
        break;
    case IPC_KIND_TOKENS:
        for (int32_t i = 0; i < n; i++)
            st->tokens[i] = rng_range(r, 0, INT32_MAX);
        p = st->tokens;
        break;
    case IPC_KIND_IDS:
        for (int32_t i = 0; i < n; i++)
            st->ids[i] = st->texts[i];
        p = st->ids;
        break;
    case IPC_KIND_STATS:
        for (int32_t i = 0; i < n; i++) {
            st->stats[i] = (struct ipc_stat){st->texts[i], rng_range(r, 0, 1), 0, rng_normal(r)};
            if (st->stats[i].is_int) {
                st->stats[i].i = (int64_t)rng_u64(r);
                st->stats[i].d = (double)st->stats[i].i;
            }
        }
        p = st->stats;
        break;
    default: return; /* logprobs: with the tokens' count */
    }
    if (p)
        memcpy(at, &p, sizeof p);
    memcpy(body + f->count_offset, &n, sizeof n);
}

static void random_fields(struct rng *r, const struct ipc_schema *s, char *body, struct store *st)
{
    for (size_t i = 0; i < s->n_fields; i++) {
        const struct ipc_field *f = &s->fields[i];
        char *at = body + f->offset;
        double v = f->min + (f->max - f->min) * rng_unit(r);
        int64_t i64 = (int64_t)v;
        uint64_t u64 = rng_u64(r);
        const struct ipc_logprob *l = st->logprobs;
        if (!f->required && rng_range(r, 0, 3) == 0)
            continue;
        switch (f->kind) {
        case IPC_KIND_BOOL: *at = rng_range(r, 0, 1) != 0; break;
        case IPC_KIND_I32: put_i32(at, (int32_t)v); break;
        case IPC_KIND_I64: memcpy(at, &i64, sizeof i64); break;
        case IPC_KIND_F64: memcpy(at, &v, sizeof v); break;
        case IPC_KIND_SEED: body[f->count_offset] = true; /* fall through */
        case IPC_KIND_U64: memcpy(at, &u64, sizeof u64); break;
        case IPC_KIND_STR: random_text(r, at, f->room); break;
        case IPC_KIND_SPARSE: random_fields(r, ipc_schema_sparse(), at, st); break;
        case IPC_KIND_LOGPROBS: memcpy(at, &l, sizeof l); break;
        default: random_list(r, f, body, st); break;
        }
    }
}

/* Fields that depend on each other. */
static void make_consistent(struct ipc_msg *m)
{
    if (m->type != IPC_SUBMIT)
        return;
    struct ipc_submit *s = &m->u.submit;
    if (s->min_tokens > s->max_tokens)
        s->min_tokens = s->max_tokens;
    s->top_p += s->top_p > 0 ? 0 : 0.5;
    s->repetition_penalty += s->repetition_penalty > 0 ? 0 : 0.5;
    s->sparse.gate_rows = s->sparse.gate_rows / 64 * 64;
    s->sparse.k += s->sparse.k == 0;
    s->sparse.ln_lambda += fabs(s->sparse.ln_lambda) > 0 ? 0 : 1;
    if (s->sparse.density > 0 && s->sparse.mode < IPC_SPARSE_ABS)
        s->sparse.density = 0;
    if (s->sparse.density > 0) {
        s->sparse.k = 0;
        s->sparse.ln_lambda = 0;
    }
}

static void same_logprobs(const struct ipc_logprob *a, const struct ipc_logprob *b, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        size_t len = (size_t)a[i].n_top * 4;
        assert_int_equal(a[i].token, b[i].token);
        assert_true(a[i].logprob == b[i].logprob && a[i].n_top == b[i].n_top);
        assert_memory_equal(a[i].top_ids, b[i].top_ids, len);
        assert_memory_equal(a[i].top_logprobs, b[i].top_logprobs, len);
    }
}

static void same_lists(const struct ipc_field *f, const char *a, const char *b)
{
    int32_t n, m;
    memcpy(&n, a + f->count_offset, sizeof n);
    memcpy(&m, b + f->count_offset, sizeof m);
    assert_int_equal(n, m);
    const void *pa, *pb;
    memcpy(&pa, a + f->offset, sizeof pa);
    memcpy(&pb, b + f->offset, sizeof pb);
    if (f->kind == IPC_KIND_LOGPROBS) {
        assert_true((pa == NULL) == (pb == NULL));
        if (pa)
            same_logprobs(pa, pb, n);
    }
    if (f->kind == IPC_KIND_TOKENS)
        assert_memory_equal(pa, pb, (size_t)n * 4);
    if (f->kind == IPC_KIND_SALT)
        assert_memory_equal(a + f->offset, b + f->offset, (size_t)n);
    if (f->kind == IPC_KIND_I32_LIST)
        assert_memory_equal(a + f->offset, b + f->offset, (size_t)n * 4);
    for (int32_t i = 0; i < n && f->kind == IPC_KIND_STR_LIST; i++)
        assert_string_equal(a + f->offset + i * (IPC_CAP_BYTES + 1),
                            b + f->offset + i * (IPC_CAP_BYTES + 1));
    for (int32_t i = 0; i < n && f->kind == IPC_KIND_IDS; i++)
        assert_string_equal(((const char *const *)pa)[i], ((const char *const *)pb)[i]);
    for (int32_t i = 0; i < n && f->kind == IPC_KIND_STATS; i++) {
        const struct ipc_stat *x = (const struct ipc_stat *)pa + i;
        const struct ipc_stat *y = (const struct ipc_stat *)pb + i;
        assert_string_equal(x->name, y->name);
        assert_true(x->is_int == y->is_int && x->i == y->i && x->d == y->d);
    }
}

static void same_fields(const struct ipc_schema *s, const char *a, const char *b)
{
    for (size_t i = 0; i < s->n_fields; i++) {
        const struct ipc_field *f = &s->fields[i];
        const char *x = a + f->offset, *y = b + f->offset;
        switch (f->kind) {
        case IPC_KIND_BOOL: assert_int_equal(*x, *y); break;
        case IPC_KIND_I32: assert_memory_equal(x, y, 4); break;
        case IPC_KIND_I64:
        case IPC_KIND_F64:
        case IPC_KIND_SEED:
        case IPC_KIND_U64: assert_memory_equal(x, y, 8); break;
        case IPC_KIND_STR: assert_string_equal(x, y); break;
        case IPC_KIND_SPARSE: same_fields(ipc_schema_sparse(), x, y); break;
        default: same_lists(f, a, b); break;
        }
    }
}

static void random_message(struct rng *r, struct ipc_msg *m, int type, struct store *st)
{
    ipc_msg_init(m, (enum ipc_type)type);
    random_logprobs(r, st);
    random_fields(r, ipc_schema_of(type), (char *)&m->u, st);
    make_consistent(m);
}

static void test_round_trip(void **state)
{
    struct rng rng = test_rng("messages", 2);
    struct ipc_decoder *d;
    struct ipc_buf buf = {0};
    static struct store st;
    static struct ipc_msg m, back;
    (void)state;
    assert_ok(ipc_decoder_create(&d));
    for (int i = 0; i < 200 * N_TYPES; i++) {
        struct err_msg why = {""};
        random_message(&rng, &m, all_types[i % N_TYPES], &st);
        buf.len = 0;
        if (ipc_msg_pack(&buf, &m, &why) < 0)
            fail_msg("%s: %s", ipc_type_name(m.type), why.text);
        if (ipc_msg_unpack(d, &back, buf.data + 4, buf.len - 4, &why) < 0)
            fail_msg("%s: %s", ipc_type_name(m.type), why.text);
        assert_int_equal(back.type, m.type);
        same_fields(ipc_schema_of(m.type), (const char *)&m.u, (const char *)&back.u);
    }
    ipc_buf_free(&buf);
    ipc_decoder_destroy(d);
}

/* Every proper prefix is refused as malformed, and so is every message with a byte too many. */
static void test_cut_at_every_byte(void **state)
{
    struct rng rng = test_rng("cuts", 3);
    struct ipc_decoder *d;
    struct ipc_buf buf = {0};
    static struct store st;
    static struct ipc_msg m;
    (void)state;
    assert_ok(ipc_decoder_create(&d));
    for (int i = 0; i < N_TYPES; i++) {
        random_message(&rng, &m, all_types[i], &st);
        buf.len = 0;
        assert_ok(ipc_msg_pack(&buf, &m, NULL));
        for (size_t n = 0; n < buf.len - 4; n++) {
            uint8_t *exact = malloc(n + 1); /* its own block: a read past the end is seen */
            memcpy(exact, buf.data + 4, n);
            assert_int_equal(ipc_msg_unpack(d, &m, exact, n, NULL), ERR_PROTOCOL);
            free(exact);
        }
        uint8_t *longer = calloc(1, buf.len);
        memcpy(longer, buf.data + 4, buf.len - 4);
        assert_int_equal(ipc_msg_unpack(d, &m, longer, buf.len - 3, NULL), ERR_PROTOCOL);
        free(longer);
    }
    ipc_buf_free(&buf);
    ipc_decoder_destroy(d);
}

/* Random damage may make another valid message, but never anything worse than an error. */
static void test_random_damage(void **state)
{
    struct rng rng = test_rng("damage", 4);
    struct ipc_decoder *d;
    struct ipc_buf buf = {0};
    static struct store st;
    static struct ipc_msg m;
    (void)state;
    assert_ok(ipc_decoder_create(&d));
    for (int i = 0; i < 20000; i++) {
        if (i % 50 == 0) {
            random_message(&rng, &m, all_types[i / 50 % N_TYPES], &st);
            buf.len = 0;
            assert_ok(ipc_msg_pack(&buf, &m, NULL));
        }
        uint8_t *p = buf.data + 4 + rng_range(&rng, 0, (int32_t)buf.len - 5);
        *p = (uint8_t)rng_u64(&rng);
        int err = ipc_msg_unpack(d, &m, buf.data + 4, buf.len - 4, NULL);
        assert_true(err == 0 || err == ERR_PROTOCOL || err == ERR_INVALID ||
                    err == ERR_UNSUPPORTED);
    }
    ipc_buf_free(&buf);
    ipc_decoder_destroy(d);
}

/* --- bytes --- */

static void golden(const struct ipc_msg *m, const char *hex)
{
    struct ipc_buf buf = {0};
    char got[512];
    assert_ok(ipc_msg_pack(&buf, m, NULL));
    assert_true(2 * buf.len < sizeof got);
    for (size_t i = 0; i < buf.len; i++)
        (void)snprintf(got + 2 * i, 3, "%02x", buf.data[i]);
    assert_string_equal(got, hex);
    ipc_buf_free(&buf);
}

static void test_golden_bytes(void **state)
{
    static const int32_t ids[] = {1, 2, 300};
    struct ipc_msg m;
    (void)state;
    ipc_msg_init(&m, IPC_HELLO);
    m.u.hello.proto_major = 1;
    memcpy(m.u.hello.client, "me", 3);
    golden(&m, "00000009"
               "9201"
               "82"
               "0001"
               "02a26d65");
    ipc_msg_init(&m, IPC_SUBMIT);
    memcpy(m.u.submit.id, "a", 2);
    m.u.submit.tokens = ids;
    m.u.submit.n_tokens = 3;
    m.u.submit.max_tokens = 8;
    m.u.submit.temperature = 0;
    golden(&m, "00000021"
               "92"
               "02"
               "84"
               "00a161"
               "01c40c01000000020000002c010000"
               "0208"
               "04cb0000000000000000");
    ipc_msg_init(&m, IPC_TOKENS);
    memcpy(m.u.tokens.id, "a", 2);
    m.u.tokens.tokens = ids;
    m.u.tokens.n_tokens = 1;
    golden(&m, "0000000d"
               "9244"
               "82"
               "00a161"
               "02c40401000000");
    ipc_msg_init(&m, IPC_DONE);
    memcpy(m.u.done.id, "a", 2);
    m.u.done.prompt_tokens = 3;
    m.u.done.completion_tokens = 1;
    m.u.done.reason = IPC_REASON_LENGTH;
    golden(&m, "0000000c"
               "9245"
               "84"
               "00a161"
               "0101"
               "0303"
               "0501");
}

/* --- hostile and wrong input --- */

static int read_bytes(const void *bytes, size_t len, struct ipc_msg *m, struct err_msg *why)
{
    struct ipc_decoder *d;
    assert_ok(ipc_decoder_create(&d));
    uint8_t *exact = malloc(len ? len : 1);
    memcpy(exact, bytes, len);
    int err = ipc_msg_unpack(d, m, exact, len, why);
    free(exact);
    ipc_decoder_destroy(d);
    return err;
}

static void test_malformed(void **state)
{
    static const struct {
        const char *what;
        size_t len;
        const char *bytes;
    } cases[] = {
        {"empty", 0, ""},
        {"nil", 1, "\xc0"},
        {"reserved byte", 1, "\xc1"},
        {"map alone", 1, "\x80"},
        {"one element", 2, "\x91\x01"},
        {"three elements", 4, "\x93\x01\x80\x80"},
        {"text type", 4, "\x92\xa1x\x80"},
        {"negative type", 3, "\x92\xff\x80"},
        {"body is an array", 3, "\x92\x01\x90"},
        {"text key", 6, "\x92\x01\x81\xa1x\x01"},
        {"negative key", 5, "\x92\x01\x81\xff\x01"},
        {"key twice", 7, "\x92\x09\x82\x00\x01\x00\x01"},
        {"array of 4 billion", 5, "\xdd\xff\xff\xff\xff"},
        {"map of 4 billion", 7, "\x92\x01\xdf\xff\xff\xff\xff"},
        {"map of 2 billion pairs", 7, "\x92\x01\xdf\x80\x00\x00\x00"},
        {"string of 4 GiB", 9, "\x92\x01\x81\x02\xdb\xff\xff\xff\xff"},
        {"binary of 4 GiB", 9, "\x92\x02\x81\x01\xc6\xff\xff\xff\xff"},
        {"ext 8", 7, "\x92\x09\x81\x1f\xc7\x00\x01"},
        {"fixext", 7, "\x92\x09\x81\x1f\xd4\x01\x01"},
        {"overlong UTF-8", 7, "\x92\x01\x81\x02\xa2\xc0\x80"},
        {"surrogate", 8, "\x92\x01\x81\x02\xa3\xed\xa0\x80"},
        {"cut UTF-8", 6, "\x92\x01\x81\x02\xa1\xc3"},
        {"stray continuation", 6, "\x92\x01\x81\x02\xa1\x80"},
        {"above U+10FFFF", 9, "\x92\x01\x81\x02\xa4\xf4\x90\x80\x80"},
        {"trailing byte", 4, "\x92\x09\x80\x00"},
    };
    struct ipc_msg m;
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct err_msg why = {""};
        int err = read_bytes(cases[i].bytes, cases[i].len, &m, &why);
        if (err != ERR_PROTOCOL || why.text[0] == '\0')
            fail_msg("%s: %d (%s)", cases[i].what, err, why.text);
    }
}

/* PING {31: [[...]]} with n arrays inside each other. */
static int nested(size_t n)
{
    uint8_t bytes[64] = {0x92, 0x09, 0x81, 0x1f};
    struct ipc_msg m;
    memset(bytes + 4, 0x91, n);
    bytes[4 + n] = 0x01;
    return read_bytes(bytes, 5 + n, &m, NULL);
}

static void test_nesting(void **state)
{
    (void)state;
    assert_int_equal(nested(IPC_MAX_DEPTH - 2), 0);
    assert_int_equal(nested(IPC_MAX_DEPTH - 1), ERR_PROTOCOL);
    assert_int_equal(nested(50), ERR_PROTOCOL);
}

/* A large array that is really there, of one-byte values: refused by count. */
static void test_too_many_values(void **state)
{
    size_t n = IPC_MAX_VALUES, len = 9 + n;
    uint8_t *bytes = calloc(1, len);
    struct ipc_msg m;
    (void)state;
    memcpy(bytes, "\x92\x09\x81\x1f\xdd\x00\x10\x00\x00", 9);
    assert_int_equal(read_bytes(bytes, len, &m, NULL), ERR_PROTOCOL);
    bytes[6] = 0x0f;
    assert_int_equal(read_bytes(bytes, 9 + 0x0f0000, &m, NULL), 0);
    free(bytes);
}

static void test_unknown(void **state)
{
    struct ipc_msg m;
    (void)state;
    assert_int_equal(read_bytes("\x92\x63\x80", 3, &m, NULL), ERR_UNSUPPORTED);
    assert_int_equal(read_bytes("\x92\xcd\xff\xff\x80", 5, &m, NULL), ERR_UNSUPPORTED);
    /* Keys of a later version, small and large, and an absent value. */
    assert_ok(read_bytes("\x92\x09\x84\x00\x07\x1e\xa1x\xcd\x01\x00\x90\x05\xc0", 14, &m, NULL));
    assert_int_equal(m.type, IPC_PING);
    assert_int_equal(m.u.control.tag, 7);
}

/* SUBMIT {0: "r1", 1: tokens, key: value}, the value given as msgpack. */
static int submit_with(uint8_t key, const char *value, size_t len, struct ipc_msg *m,
                       struct err_msg *why)
{
    uint8_t bytes[256] = "\x92\x02\x83\x00\xa2r1\x01\xc4\x04\x05\x00\x00\x00";
    size_t n = 14;
    bytes[n++] = key;
    memcpy(bytes + n, value, len);
    return read_bytes(bytes, n + len, m, why);
}

#define RAW(s) (s), sizeof(s) - 1

static void test_field_errors(void **state)
{
    static const struct {
        const char *field;
        uint8_t key;
        const char *value;
        size_t len;
    } cases[] = {
        {"max_tokens", 2, RAW("\x00")},
        {"max_tokens", 2, RAW("\xff")},
        {"max_tokens", 2, RAW("\xa1x")},
        {"max_tokens", 2, RAW("\xcb\x40\x20\x00\x00\x00\x00\x00\x00")},
        {"max_tokens", 2, RAW("\xce\x80\x00\x00\x00")},
        {"min_tokens", 3, RAW("\x11")},
        {"temperature", 4, RAW("\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00")},
        {"temperature", 4, RAW("\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00")},
        {"temperature", 4, RAW("\xff")},
        {"temperature", 4, RAW("\xc3")},
        {"top_k", 5, RAW("\xfe")},
        {"top_p", 6, RAW("\x00")},
        {"top_p", 6, RAW("\x02")},
        {"min_p", 7, RAW("\xff")},
        {"repetition_penalty", 8, RAW("\x00")},
        {"presence_penalty", 9, RAW("\x03")},
        {"frequency_penalty", 10, RAW("\xca\x7f\xc0\x00\x00")},
        {"seed", 11, RAW("\xff")},
        {"stop_token_ids", 12, RAW("\xdc\x00\x11\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0")},
        {"stop_token_ids", 12, RAW("\x91\xff")},
        {"ignore_eos", 13, RAW("\x01")},
        {"logprobs", 14, RAW("\x15")},
        {"priority", 15, RAW("\xce\x80\x00\x00\x00")},
        {"tenant", 16, RAW("\xa2x\x00")},
        {"cache_salt", 17, RAW("\xa1x")},
        {"deadline_ms", 18, RAW("\xff")},
        {"queue_timeout_ms", 19, RAW("\xff")},
        {"stream", 20, RAW("\x01")},
        {"sparse", 21, RAW("\x01")},
        {"sparse.mode", 21, RAW("\x81\x00\x04")},
        {"sparse.k", 21, RAW("\x81\x00\x02")},
        {"sparse.ln_lambda", 21, RAW("\x81\x00\x03")},
        {"sparse.ln_lambda", 21, RAW("\x82\x00\x03\x02\x1f")},
        {"sparse.gate_rows", 21, RAW("\x81\x03\x20")},
        {"sparse.density", 21, RAW("\x82\x00\x02\x04\x02")},
        {"sparse.density", 21, RAW("\x82\x00\x02\x04\xff")},
        {"sparse.decode_density", 21, RAW("\x82\x00\x01\x05\x02")},
        {"sparse.decode_density", 21, RAW("\x82\x00\x01\x05\xff")},
        {"sparse.lost_mass", 21, RAW("\x82\x00\x01\x06\x01")},
        {"sparse.density", 21, RAW("\x82\x00\x01\x04\x01")},         /* dense */
        {"sparse.density", 21, RAW("\x83\x00\x02\x01\x05\x04\x01")}, /* and k */
        {"sparse.density", 21, RAW("\x83\x00\x03\x02\xff\x04\x01")}, /* and ln_lambda */
    };
    struct ipc_msg m;
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct err_msg why = {""};
        int err = submit_with(cases[i].key, cases[i].value, cases[i].len, &m, &why);
        size_t n = strlen(cases[i].field);
        if (err != ERR_INVALID || strncmp(why.text, cases[i].field, n) || why.text[n] != ':')
            fail_msg("case %zu, %s: %d (%s)", i, cases[i].field, err, why.text);
        assert_int_equal(m.type, IPC_SUBMIT);
        assert_string_equal(m.u.submit.id, "r1");
    }
    assert_ok(submit_with(4, RAW("\xca\x3f\x00\x00\x00"), &m, NULL));
    assert_true(m.u.submit.temperature == 0.5 && m.u.submit.max_tokens == 16 && m.u.submit.stream);
    assert_ok(submit_with(5, RAW("\xff"), &m, NULL)); /* top_k -1 is off too */
    assert_int_equal(m.u.submit.top_k, 0);
}

static void expect_submit(const char *bytes, size_t len, int err, const char *start)
{
    struct err_msg why = {""};
    struct ipc_msg m;
    assert_int_equal(read_bytes(bytes, len, &m, &why), err);
    if (strncmp(why.text, start, strlen(start)))
        fail_msg("'%s' does not start with '%s'", why.text, start);
}

static void test_prompts(void **state)
{
    struct ipc_msg m;
    struct err_msg why;
    (void)state;
    expect_submit(RAW("\x92\x02\x80"), ERR_INVALID, "id: missing");
    expect_submit(RAW("\x92\x02\x81\x00\xa0"), ERR_INVALID, "tokens: missing");
    expect_submit(RAW("\x92\x02\x82\x00\xa0\x01\x91\x05"), ERR_INVALID, "id: empty");
    expect_submit(RAW("\x92\x02\x82\x00\xa1x\x01\x90"), ERR_INVALID, "tokens: empty");
    expect_submit(RAW("\x92\x02\x82\x00\xa1x\x01\xc4\x00"), ERR_INVALID, "tokens: empty");
    expect_submit(RAW("\x92\x02\x82\x00\xa1x\x01\xc4\x03\x00\x00\x00"), ERR_INVALID, "tokens:");
    expect_submit(RAW("\x92\x02\x82\x00\xa1x\x01\xc4\x04\x00\x00\x00\x80"), ERR_INVALID,
                  "tokens[0]: 2147483648");
    expect_submit(RAW("\x92\x02\x82\x00\xa1x\x01\x91\xff"), ERR_INVALID, "tokens: -1");
    expect_submit(RAW("\x92\x02\x82\x00\xa1x\x01\x91\xa1y"), ERR_INVALID, "tokens:");
    /* Integers in an array mean the same as binary. */
    assert_ok(read_bytes(RAW("\x92\x02\x82\x00\xa1x\x01\x92\x05\xcd\x01\x00"), &m, NULL));
    assert_int_equal(m.u.submit.n_tokens, 2);
    static const int32_t ids[] = {3, 99};
    ipc_msg_init(&m, IPC_SUBMIT);
    memcpy(m.u.submit.id, "x", 2);
    m.u.submit.tokens = ids;
    m.u.submit.n_tokens = 2;
    assert_ok(ipc_submit_check(&m.u.submit, 100, &why));
    assert_int_equal(ipc_submit_check(&m.u.submit, 99, &why), ERR_INVALID);
    assert_non_null(strstr(why.text, "tokens[1]: 99"));
    m.u.submit.n_stop = 1;
    m.u.submit.stop_token_ids[0] = 100;
    assert_int_equal(ipc_submit_check(&m.u.submit, 100, &why), ERR_INVALID);
    assert_non_null(strstr(why.text, "stop_token_ids[0]"));
}

/* What may not be sent is refused before it reaches the buffer. */
static void test_pack_refuses(void **state)
{
    struct ipc_buf buf = {0};
    struct ipc_msg m;
    struct err_msg why;
    (void)state;
    ipc_msg_init(&m, IPC_DRAIN);
    m.u.drain.timeout_ms = -1;
    assert_int_equal(ipc_msg_pack(&buf, &m, &why), ERR_INVALID);
    assert_non_null(strstr(why.text, "timeout_ms"));
    assert_int_equal(buf.len, 0);
    ipc_msg_init(&m, IPC_SUBMIT);
    m.u.submit.temperature = NAN;
    assert_int_equal(ipc_msg_pack(&buf, &m, &why), ERR_INVALID);
    assert_non_null(strstr(why.text, "temperature"));
    ipc_msg_init(&m, IPC_ACCEPTED);
    memset(m.u.accepted.id, 'x', sizeof m.u.accepted.id);
    assert_int_equal(ipc_msg_pack(&buf, &m, &why), ERR_INVALID);
    assert_int_equal(buf.len, 0);
    ipc_buf_free(&buf);
}

static void test_names(void **state)
{
    (void)state;
    assert_string_equal(ipc_type_name(IPC_SUBMIT), "SUBMIT");
    assert_string_equal(ipc_type_name(200), "?");
    assert_string_equal(ipc_reason_name(IPC_REASON_CAPACITY), "capacity");
    assert_string_equal(ipc_reason_name(-1), "?");
    assert_string_equal(ipc_sparse_mode_name(IPC_SPARSE_REL), "rel");
    assert_string_equal(ipc_code_name(IPC_CODE_QUEUE_FULL), "QUEUE_FULL");
    assert_int_equal(ipc_code_of(ERR_NO_BLOCKS), IPC_CODE_KV_EXHAUSTED);
    assert_int_equal(ipc_code_of(-EPIPE), IPC_CODE_INTERNAL);
    assert_int_equal(ipc_code_err(IPC_CODE_AUTH), ERR_AUTH);
    assert_int_equal(ipc_code_err(999), ERR_INTERNAL);
    assert_true(ipc_code_retryable(IPC_CODE_QUEUE_FULL));
    assert_false(ipc_code_retryable(IPC_CODE_PROTOCOL));
}

/* --- the document --- */

static char *read_text_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f)
        return NULL;
    char *text = calloc(1, 1 << 18);
    size_t n = fread(text, 1, (1 << 18) - 1, f);
    (void)fclose(f);
    text[n] = '\0';
    return text;
}

static void expect_line(const char *where, const char *line)
{
    const char *end = strstr(where + 1, "\n### ");
    const char *hit = strstr(where, line);
    if (!hit || (end && hit > end))
        fail_msg("PROTOCOL.md lacks '%s' under '%.40s'", line, where + 1);
}

static void check_section(const char *text, const struct ipc_schema *s)
{
    char line[160];
    (void)snprintf(line, sizeof line, s->type ? "\n### %s (%d)\n" : "\n### %s\n", s->name, s->type);
    const char *section = strstr(text, line);
    if (!section)
        fail_msg("PROTOCOL.md lacks '%s'", line + 1);
    for (size_t i = 0; i < s->n_fields; i++) {
        (void)snprintf(line, sizeof line, "\n| %d | `%s` |", s->fields[i].key, s->fields[i].name);
        expect_line(section, line);
    }
}

static void test_document(void **state)
{
    char line[160];
    char *text = read_text_file(TEST_ROOT "/ipc/PROTOCOL.md");
    (void)state;
    assert_non_null(text);
    for (int i = 0; i < N_TYPES; i++)
        check_section(text, ipc_schema_of(all_types[i]));
    check_section(text, ipc_schema_sparse());
    for (int code = 1; strcmp(ipc_code_name(code), "?") != 0; code++) {
        (void)snprintf(line, sizeof line, "\n| %d | `%s` | %s |", code, ipc_code_name(code),
                       ipc_code_retryable(code) ? "yes" : "no");
        if (!strstr(text, line))
            fail_msg("PROTOCOL.md lacks '%s'", line + 1);
    }
    for (int r = 0; r <= IPC_REASON_SHUTDOWN; r++) {
        (void)snprintf(line, sizeof line, "\n| %d | `%s` |", r, ipc_reason_name(r));
        assert_non_null(strstr(text, line));
    }
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),      cmocka_unit_test(test_cut_at_every_byte),
        cmocka_unit_test(test_random_damage),   cmocka_unit_test(test_golden_bytes),
        cmocka_unit_test(test_malformed),       cmocka_unit_test(test_nesting),
        cmocka_unit_test(test_too_many_values), cmocka_unit_test(test_unknown),
        cmocka_unit_test(test_field_errors),    cmocka_unit_test(test_prompts),
        cmocka_unit_test(test_pack_refuses),    cmocka_unit_test(test_names),
        cmocka_unit_test(test_document),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
