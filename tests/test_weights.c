/* Loading: which files fit a configuration, what each rank gets, and whose identity it is. Files
 * are built in memory; element e of tensor t holds 1000 t + e, so that every copy can be traced. */
#include "core/dtype.h"
#include "core/mem.h"
#include "model/fingerprint.h"
#include "model/weights.h"
#include "tests/test.h"

#include <inttypes.h>

enum { MAX_TENSORS = 40, HEADER_BYTES = 8192 };

struct built {
    char names[MAX_TENSORS][80];
    int64_t shape[MAX_TENSORS][2]; /* [1] == 0: a vector */
    const char *dtype[MAX_TENSORS];
    int n;
    unsigned char *bytes;
    size_t len;
    struct safetensors *st;
};

static const struct llama_config config = {.vocab_size = 5,
                                           .hidden_size = 4,
                                           .intermediate_size = 6,
                                           .n_layers = 2,
                                           .n_heads = 4,
                                           .n_kv_heads = 2,
                                           .head_dim = 2,
                                           .max_position = 16,
                                           .rms_eps = 1e-5,
                                           .rope = {.theta = 1e4},
                                           .bos_id = -1};

static void add(struct built *b, const char *name, int64_t rows, int64_t cols)
{
    assert_true(b->n < MAX_TENSORS);
    (void)snprintf(b->names[b->n], sizeof b->names[0], "%s", name);
    b->shape[b->n][0] = rows;
    b->shape[b->n][1] = cols;
    b->dtype[b->n++] = "F32";
}

static void add_layer(struct built *b, const struct llama_config *c, int layer)
{
    const int64_t d = c->head_dim, q = c->n_heads * d, kv = c->n_kv_heads * d;
    const struct {
        const char *name;
        int64_t rows, cols;
        bool wanted;
    } t[] = {
        {"input_layernorm.weight", c->hidden_size, 0, true},
        {"self_attn.q_proj.weight", q, c->hidden_size, true},
        {"self_attn.k_proj.weight", kv, c->hidden_size, true},
        {"self_attn.v_proj.weight", kv, c->hidden_size, true},
        {"self_attn.o_proj.weight", c->hidden_size, q, true},
        {"post_attention_layernorm.weight", c->hidden_size, 0, true},
        {"mlp.gate_proj.weight", c->intermediate_size, c->hidden_size, true},
        {"mlp.up_proj.weight", c->intermediate_size, c->hidden_size, true},
        {"mlp.down_proj.weight", c->hidden_size, c->intermediate_size, true},
        {"self_attn.q_proj.bias", q, 0, c->attention_bias},
        {"self_attn.k_proj.bias", kv, 0, c->attention_bias},
        {"self_attn.v_proj.bias", kv, 0, c->attention_bias},
        {"self_attn.o_proj.bias", c->hidden_size, 0, c->attention_bias},
    };
    for (size_t i = 0; i < sizeof t / sizeof *t; i++) {
        char name[80];
        (void)snprintf(name, sizeof name, "model.layers.%d.%s", layer, t[i].name);
        if (t[i].wanted)
            add(b, name, t[i].rows, t[i].cols);
    }
}

/* The tensors that a configuration calls for. */
static void describe(struct built *b, const struct llama_config *c)
{
    *b = (struct built){0};
    add(b, "model.embed_tokens.weight", c->vocab_size, c->hidden_size);
    for (int i = 0; i < c->n_layers; i++)
        add_layer(b, c, i);
    add(b, "model.norm.weight", c->hidden_size, 0);
    if (!c->tied)
        add(b, "lm_head.weight", c->vocab_size, c->hidden_size);
}

static int find(const struct built *b, const char *name)
{
    for (int i = 0; i < b->n; i++) {
        if (strcmp(b->names[i], name) == 0)
            return i;
    }
    fail_msg("no tensor %s", name);
    return -1;
}

static size_t elements(const struct built *b, int t)
{
    return (size_t)(b->shape[t][0] * (b->shape[t][1] ? b->shape[t][1] : 1));
}

static float value(int t, size_t e)
{
    return 1000.0f * (float)t + (float)e;
}

/* Writes the elements of all tensors, one after the other. */
static void fill(const struct built *b, unsigned char *to)
{
    for (int t = 0; t < b->n; t++) {
        const bool wide = strcmp(b->dtype[t], "F32") == 0;
        for (size_t e = 0; e < elements(b, t); e++, to += wide ? 4 : 2) {
            const float f = value(t, e);
            const uint16_t h = dtype_f32_bf16(f);
            memcpy(to, wide ? (const void *)&f : (const void *)&h, wide ? 4 : 2);
        }
    }
}

/* Writes the file's bytes and parses them. `odd` shifts the data to an odd address. */
static void build(struct built *b, bool odd)
{
    char header[HEADER_BYTES], shape[48];
    size_t at = 0, offset = 0;
    for (int t = 0; t < b->n; t++) {
        (void)st_shape_text(shape, sizeof shape, b->shape[t], b->shape[t][1] ? 2 : 1);
        size_t end = offset + elements(b, t) * (strcmp(b->dtype[t], "F32") == 0 ? 4 : 2);
        at += (size_t)snprintf(header + at, sizeof header - at,
                               "%c\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":"
                               "[%zu,%zu]}",
                               t ? ',' : '{', b->names[t], b->dtype[t], shape, offset, end);
        offset = end;
    }
    at += (size_t)snprintf(header + at, sizeof header - at, "}");
    assert_true(at < sizeof header - 2);
    if ((at % 2 == 0) == odd)
        header[at++] = ' ';
    b->len = 8 + at + offset;
    b->bytes = mem_zalloc(b->len, 1);
    for (int i = 0; i < 8; i++)
        b->bytes[i] = (unsigned char)((uint64_t)at >> (8 * i));
    memcpy(b->bytes + 8, header, at);
    fill(b, b->bytes + 8 + at);
    assert_ok(safetensors_parse(&b->st, b->bytes, b->len, "built", NULL));
}

static void drop(struct built *b)
{
    safetensors_close(b->st);
    mem_free(b->bytes);
}

static int load(struct llama_weights *w, const struct built *b, const struct llama_config *c,
                int rank, int n_ranks, struct dev *d, struct err_msg *why)
{
    struct llama_shard shard;
    assert_ok(llama_shard_make(&shard, c, rank, n_ranks, why));
    const struct weights_config cfg = {
        .dev = d, .dtype = DTYPE_F32, .st = b->st, .config = c, .shard = &shard};
    return weights_load(w, &cfg, why);
}

/* Matrix `got` [n_rows, n_cols] is the named tensor's part from (row, col). */
static void check_part(const void *memory, const struct built *b, const char *name, int64_t row,
                       int64_t n_rows, int64_t col, int64_t n_cols)
{
    const float *got = memory;
    const int t = find(b, name);
    const int64_t width = b->shape[t][1] ? b->shape[t][1] : 1;
    for (int64_t r = 0; r < n_rows; r++) {
        for (int64_t c = 0; c < n_cols; c++) {
            float want = value(t, (size_t)((row + r) * width + col + c));
            if (strcmp(b->dtype[t], "F32") != 0)
                want = dtype_bf16_f32(dtype_f32_bf16(want));
            if (got[r * n_cols + c] != want)
                fail_msg("%s [%d, %d]: %g, want %g", name, (int)(row + r), (int)(col + c),
                         (double)got[r * n_cols + c], (double)want);
        }
    }
}

static const void *after(const void *matrix, int64_t n)
{
    return (const float *)matrix + n;
}

/* Layer 1 of a rank, by hand from the rules of weights.h. */
static void check_rank(const struct built *b, const struct llama_config *c,
                       const struct llama_weights *w, int rank, int n_ranks)
{
    const struct llama_layer *l = &w->layers[1];
    const int64_t h = c->hidden_size, d = c->head_dim;
    const int64_t nq = c->n_heads / n_ranks * d, ni = c->intermediate_size / n_ranks;
    const int64_t nkv = c->n_kv_heads < n_ranks ? d : c->n_kv_heads / n_ranks * d;
    const int64_t kv0 = rank * c->n_kv_heads / n_ranks * d;

    check_part(l->qkv, b, "model.layers.1.self_attn.q_proj.weight", rank * nq, nq, 0, h);
    check_part(after(l->qkv, nq * h), b, "model.layers.1.self_attn.k_proj.weight", kv0, nkv, 0, h);
    check_part(after(l->qkv, (nq + nkv) * h), b, "model.layers.1.self_attn.v_proj.weight", kv0, nkv,
               0, h);
    check_part(l->o, b, "model.layers.1.self_attn.o_proj.weight", 0, h, rank * nq, nq);
    check_part(l->gate_up, b, "model.layers.1.mlp.gate_proj.weight", rank * ni, ni, 0, h);
    check_part(after(l->gate_up, ni * h), b, "model.layers.1.mlp.up_proj.weight", rank * ni, ni, 0,
               h);
    check_part(l->down, b, "model.layers.1.mlp.down_proj.weight", 0, h, rank * ni, ni);
    check_part(l->attn_norm, b, "model.layers.1.input_layernorm.weight", 0, h, 0, 1);
    check_part(l->mlp_norm, b, "model.layers.1.post_attention_layernorm.weight", 0, h, 0, 1);
    if (c->attention_bias) {
        check_part(l->qkv_bias, b, "model.layers.1.self_attn.q_proj.bias", rank * nq, nq, 0, 1);
        check_part(after(l->qkv_bias, nq), b, "model.layers.1.self_attn.k_proj.bias", kv0, nkv, 0,
                   1);
        check_part(l->o_bias, b, "model.layers.1.self_attn.o_proj.bias", 0, h, 0, 1);
    }
    check_part(w->embed, b, "model.embed_tokens.weight", 0, c->vocab_size, 0, h);
    check_part(w->norm, b, "model.norm.weight", 0, h, 0, 1);
}

static void check_ranks(const struct built *b, const struct llama_config *c, int n_ranks,
                        struct dev *d)
{
    for (int rank = 0; rank < n_ranks; rank++) {
        struct llama_weights w;
        assert_ok(load(&w, b, c, rank, n_ranks, d, NULL));
        check_rank(b, c, &w, rank, n_ranks);
        weights_release(&w);
    }
}

static void test_shares(void **state)
{
    struct dev *d;
    (void)state;
    assert_ok(dev_open(&d, &dev_cpu, 0, 2, NULL));
    for (int variant = 0; variant < 8; variant++) {
        struct llama_config c = config;
        struct built b;
        c.tied = variant & 1;
        c.attention_bias = variant & 2;
        c.n_heads = 4;
        c.intermediate_size = 8;
        describe(&b, &c);
        for (int t = 0; t < b.n && (variant & 4); t++)
            b.dtype[t] = "BF16"; /* data at an odd address: files may do that */
        build(&b, variant & 4);
        for (int n_ranks = 1; n_ranks <= 4; n_ranks *= 2)
            check_ranks(&b, &c, n_ranks, d);
        drop(&b);
    }
    dev_close(d);
}

/* This rank's slice of the output projection: rows of the tensor, then zeros, all of it inside the
 * memory that was taken. Counts the rows in `seen`. */
static void check_slice(const struct built *b, const struct llama_config *c,
                        const struct llama_weights *w, const struct llama_shard *s, int *seen)
{
    const int64_t h = c->hidden_size;
    const float *slice = w->lm_head;

    check_part(slice, b, c->tied ? "model.embed_tokens.weight" : "lm_head.weight", s->vocab,
               s->n_vocab, 0, h);
    for (int64_t i = s->n_vocab * h; i < s->vocab_width * h; i++)
        assert_true(slice[i] == 0.0f);
    assert_true((const char *)(slice + s->vocab_width * h) <= (const char *)w->memory + w->bytes);
    if (c->tied)
        assert_ptr_equal(slice, after(w->embed, s->vocab * h));
    for (int32_t i = 0; i < s->n_vocab; i++)
        seen[s->vocab + i]++;
}

static void check_slices(const struct built *b, const struct llama_config *c, int n_ranks,
                         struct dev *d)
{
    int seen[128] = {0};
    int32_t width = 0;
    for (int rank = 0; rank < n_ranks; rank++) {
        struct llama_weights w;
        struct llama_shard s;
        assert_ok(llama_shard_make(&s, c, rank, n_ranks, NULL));
        assert_ok(load(&w, b, c, rank, n_ranks, d, NULL));
        width = rank == 0 ? s.vocab_width : width;
        assert_int_equal(s.vocab_width, width);
        assert_int_equal(s.vocab, rank * width);
        for (int r = 0; r < n_ranks; r++) {
            struct llama_shard other;
            assert_ok(llama_shard_make(&other, c, r, n_ranks, NULL));
            assert_int_equal(llama_shard_vocab_rows(&s, c, r), other.n_vocab);
        }
        check_slice(b, c, &w, &s, seen);
        weights_release(&w);
    }
    for (int32_t i = 0; i < c->vocab_size; i++)
        assert_int_equal(seen[i], 1);
    if (n_ranks == 1) /* nothing is added */
        assert_int_equal(width, c->vocab_size);
    else
        assert_true(width % 8 == 0 && width < c->vocab_size / n_ranks + 17);
}

/* Every row of the output projection is on one rank, whatever the vocabulary; some ranks may hold
 * none. */
static void test_vocab_slices(void **state)
{
    static const int32_t sizes[] = {1, 5, 16, 17, 32, 33, 63, 64, 101};
    struct dev *d;
    (void)state;
    assert_ok(dev_open(&d, &dev_cpu, 0, 2, NULL));
    for (size_t i = 0; i < 2 * (sizeof sizes / sizeof *sizes); i++) {
        struct llama_config c = config;
        struct built b;
        c.vocab_size = sizes[i / 2];
        c.tied = i % 2;
        c.n_heads = c.n_kv_heads = c.intermediate_size = 12;
        describe(&b, &c);
        build(&b, false);
        for (int n_ranks = 1; n_ranks <= 4; n_ranks++)
            check_slices(&b, &c, n_ranks, d);
        drop(&b);
    }
    dev_close(d);
}

static void test_shard_refusals(void **state)
{
    struct llama_config c = config;
    struct llama_shard s;
    struct err_msg why = {{0}};
    (void)state;
    assert_int_equal(llama_shard_make(&s, &c, 0, 3, &why), ERR_CONFIG);
    assert_non_null(strstr(why.text, "num_attention_heads 4"));
    c.n_heads = 12;
    c.n_kv_heads = 4;
    assert_int_equal(llama_shard_make(&s, &c, 0, 6, &why), ERR_CONFIG);
    assert_non_null(strstr(why.text, "num_key_value_heads 4"));
    c.intermediate_size = 7;
    assert_int_equal(llama_shard_make(&s, &c, 0, 2, &why), ERR_CONFIG);
    assert_non_null(strstr(why.text, "intermediate_size 7"));
}

/* One thing about the files is wrong; the message says which tensor and what about it. */
static void check_refused(struct built *b, const struct llama_config *c, int code,
                          const char *tensor, const char *what)
{
    struct dev *d;
    struct llama_weights w;
    struct err_msg why = {{0}};
    assert_ok(dev_open(&d, &dev_cpu, 0, 1, NULL));
    build(b, false);
    int err = load(&w, b, c, 0, 1, d, &why);
    if (err != code || !strstr(why.text, tensor) || !strstr(why.text, what))
        fail_msg("%d '%s', want %d '%s' '%s'", err, why.text, code, tensor, what);
    drop(b);
    dev_close(d);
}

static void test_mismatches(void **state)
{
    struct llama_config c = config;
    struct built b;
    (void)state;

    describe(&b, &c);
    b.shape[find(&b, "model.layers.1.mlp.up_proj.weight")][0] = 5;
    check_refused(&b, &c, ERR_MISMATCH, "model.layers.1.mlp.up_proj.weight", "[5, 4]");
    describe(&b, &c);
    b.shape[find(&b, "model.layers.1.mlp.up_proj.weight")][0] = 5;
    check_refused(&b, &c, ERR_MISMATCH, "model.layers.1.mlp.up_proj.weight", "[6, 4]");
    describe(&b, &c);
    b.shape[find(&b, "model.norm.weight")][1] = 1;
    check_refused(&b, &c, ERR_MISMATCH, "model.norm.weight", "[4, 1]");
    describe(&b, &c);
    (void)strcpy(b.names[find(&b, "lm_head.weight")], "model.layers.0.mlp.gate_proj.bias");
    check_refused(&b, &c, ERR_MISMATCH, "gate_proj.bias", "no place");
    describe(&b, &c);
    b.n--; /* lm_head */
    check_refused(&b, &c, ERR_MISMATCH, "lm_head.weight", "missing");
    describe(&b, &c);
    b.dtype[find(&b, "lm_head.weight")] = "I16";
    check_refused(&b, &c, ERR_UNSUPPORTED, "lm_head.weight", "I16");
    describe(&b, &c);
    c.n_layers = 1;
    check_refused(&b, &c, ERR_MISMATCH, "model.layers.1.", "no place");
    c.n_layers = 3;
    describe(&b, &config);
    check_refused(&b, &c, ERR_MISMATCH, "model.layers.2.", "missing");
}

static void note_progress(void *arg, uint64_t done, uint64_t total)
{
    uint64_t *last = arg;
    assert_true(done > last[0] && done <= total);
    last[0] = done;
    last[1] = total;
}

static void test_progress(void **state)
{
    struct dev *d;
    struct built b;
    struct llama_weights w;
    struct llama_shard shard;
    uint64_t last[2] = {0};
    size_t bytes = 0;
    (void)state;
    describe(&b, &config);
    build(&b, false);
    for (int t = 0; t < b.n; t++)
        bytes += elements(&b, t) * 4;
    assert_ok(dev_open(&d, &dev_cpu, 0, 1, NULL));
    assert_ok(llama_shard_make(&shard, &config, 0, 1, NULL));
    const struct weights_config cfg = {.dev = d,
                                       .dtype = DTYPE_F32,
                                       .st = b.st,
                                       .config = &config,
                                       .shard = &shard,
                                       .progress = {note_progress, last}};
    assert_ok(weights_load(&w, &cfg, NULL));
    assert_int_equal(last[0], bytes);
    assert_int_equal(last[1], bytes);
    weights_release(&w);
    drop(&b);
    dev_close(d);
}

/* Norms of 1, the rest drawn: the same matrix however it is cut over ranks, in any dtype. */
static void test_random(void **state)
{
    struct dev *d;
    struct llama_weights whole, part, half;
    struct llama_shard shard;
    double sum = 0, squares = 0;
    struct llama_config c = config;
    struct weights_config cfg = {.dtype = DTYPE_F32, .config = &c, .shard = &shard};
    const int64_t h = config.hidden_size, ni = config.intermediate_size / 2;
    (void)state;
    assert_ok(dev_open(&d, &dev_cpu, 0, 2, NULL));
    cfg.dev = d;
    c.vocab_size = 40;
    assert_ok(llama_shard_make(&shard, &c, 0, 1, NULL));
    assert_ok(weights_load(&whole, &cfg, NULL));
    cfg.dtype = DTYPE_BF16;
    assert_ok(weights_load(&half, &cfg, NULL));
    cfg.dtype = DTYPE_F32;
    assert_ok(llama_shard_make(&shard, &c, 1, 2, NULL));
    assert_ok(weights_load(&part, &cfg, NULL));
    assert_int_equal(shard.n_vocab, 8);
    assert_memory_equal(part.lm_head, after(whole.lm_head, 32 * h), 8 * (size_t)h * sizeof(float));

    const float *down = whole.layers[1].down, *mine = part.layers[1].down;
    const uint16_t *rounded = half.layers[1].down;
    for (int64_t r = 0; r < h; r++) {
        for (int64_t k = 0; k < 2 * ni; k++) {
            float v = down[r * 2 * ni + k];
            sum += (double)v;
            squares += (double)v * (double)v;
            assert_int_equal(rounded[r * 2 * ni + k], dtype_f32_bf16(v));
            if (k >= ni)
                assert_true(mine[r * ni + k - ni] == v);
        }
    }
    const double n = (double)(h * 2 * ni), deviation = sqrt(squares / n);
    assert_true(fabs(sum / n) < 0.02 * 5 / sqrt(n));
    assert_true(fabs(deviation / 0.02 - 1) < 5 / sqrt(n));
    for (int64_t i = 0; i < h; i++)
        assert_true(((const float *)whole.norm)[i] == 1.0f);
    assert_memory_not_equal(whole.layers[0].down, down, (size_t)(h * 2 * ni) * sizeof *down);
    weights_release(&whole);
    weights_release(&half);
    weights_release(&part);
    dev_close(d);
}

static uint64_t fingerprint_of(const struct llama_config *c, struct built *b)
{
    build(b, false);
    uint64_t h = model_fingerprint(c, b->st);
    drop(b);
    return h;
}

static void test_fingerprint(void **state)
{
    struct llama_config c = config;
    struct built b, moved;
    (void)state;
    describe(&b, &c);
    const uint64_t h = fingerprint_of(&c, &b);
    c.n_eos = 1; /* what changes no arithmetic */
    c.max_position = 99;
    assert_true(fingerprint_of(&c, &b) == h);
    c = config;
    c.rope.theta = 5e5;
    assert_true(fingerprint_of(&c, &b) != h);
    c = config;
    c.rms_eps = 1e-6;
    assert_true(fingerprint_of(&c, &b) != h);
    describe(&moved, &config); /* one element of one tensor */
    build(&moved, false);
    moved.bytes[moved.len - 1] ^= 1;
    assert_true(model_fingerprint(&config, moved.st) != h);
    drop(&moved);
}

/* A tensor too large to hash whole: its ends and its middle pieces still count. */
static void test_fingerprint_sample(void **state)
{
    struct built b = {0};
    (void)state;
    add(&b, "model.embed_tokens.weight", 1000, 100);
    build(&b, false);
    const uint64_t h = model_fingerprint(&config, b.st);
    const size_t data = b.len - 400000;
    const size_t places[] = {data, data + 1023, b.len - 1, b.len - 1024};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        b.bytes[places[i]] ^= 1;
        assert_true(model_fingerprint(&config, b.st) != h);
        b.bytes[places[i]] ^= 1;
    }
    assert_true(model_fingerprint(&config, b.st) == h);
    drop(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shares),         cmocka_unit_test(test_vocab_slices),
        cmocka_unit_test(test_shard_refusals), cmocka_unit_test(test_mismatches),
        cmocka_unit_test(test_progress),       cmocka_unit_test(test_random),
        cmocka_unit_test(test_fingerprint),    cmocka_unit_test(test_fingerprint_sample),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
