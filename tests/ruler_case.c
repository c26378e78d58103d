#include "tests/ruler_case.h"

#include "tests/test.h"

enum { MAX_FACTS = 1 << 15 };

struct piece {
    int32_t at, n; /* a fact, its opening token and END included */
};

struct parsed {
    const struct ruler_case *c;
    struct piece facts[MAX_FACTS];
    int32_t n_facts;
    int32_t tail; /* where the question begins */
    int32_t n_filler;
};

#define CHECK(p, cond, at)                                                                         \
    do {                                                                                           \
        if (!(cond))                                                                               \
            fail_msg("%s, %d tokens, at %d: %s", (p)->c->task, (p)->c->n, (int)(at), #cond);       \
    } while (0)

static bool is(const struct ruler_case *c, const char *name)
{
    return strcmp(c->task, name) == 0;
}

static bool in(int32_t t, int32_t low, int32_t high)
{
    return t >= low && t < high;
}

static bool opens(int32_t t)
{
    return t == T_NEEDLE || t == T_ASSIGN || t == T_DOC;
}

static bool filler(int32_t t)
{
    return in(t, T_FILLER, T_KEY) || t == T_STOP;
}

static bool all_in(const int32_t *t, int32_t n, int32_t low, int32_t high)
{
    for (int32_t i = 0; i < n; i++) {
        if (!in(t[i], low, high))
            return false;
    }
    return true;
}

static bool same(const int32_t *a, const int32_t *b, int32_t n)
{
    return memcmp(a, b, (size_t)n * sizeof *a) == 0;
}

/* Cuts the context into facts and filler; a fact in a haystack stands before a sentence. */
static void parse(struct parsed *p, const struct ruler_case *c, bool words)
{
    const int32_t *t = c->tokens;
    p->c = c;
    p->n_facts = p->n_filler = 0;
    p->tail = c->n - 1;
    CHECK(p, t[0] == T_BOS, 0);
    while (p->tail > 0 && !(t[p->tail] == T_QUERY || in(t[p->tail], T_QVT, T_STOP)))
        p->tail--;
    CHECK(p, p->tail > 0, p->tail);
    for (int32_t i = 1; i < p->tail; i++) {
        if (words) {
            CHECK(p, in(t[i], T_KEY, T_VALUE), i);
        } else if (opens(t[i])) {
            int32_t end = i;
            CHECK(p, i == 1 || t[i - 1] == T_END || t[i - 1] == T_STOP, i);
            while (end < p->tail && t[end] != T_END)
                end++;
            CHECK(p, end < p->tail && p->n_facts < MAX_FACTS, end);
            p->facts[p->n_facts++] = (struct piece){i, end + 1 - i};
            i = end;
        } else {
            CHECK(p, filler(t[i]), i);
            p->n_filler++;
        }
    }
}

/* Filler alone, in order. */
static int32_t *only_filler(const struct parsed *p)
{
    int32_t *out = malloc((size_t)(p->n_filler + 1) * sizeof *out), n = 0;
    for (int32_t i = 1, f = 0; i < p->tail; i++) {
        if (f < p->n_facts && p->facts[f].at == i)
            i += p->facts[f++].n - 1;
        else
            out[n++] = p->c->tokens[i];
    }
    assert_int_equal(n, p->n_filler);
    return out;
}

static void check_noise(const struct parsed *p)
{
    int32_t *f = only_filler(p);
    for (int32_t i = 0; i < p->n_filler; i++) {
        CHECK(p, (i % 24 == 23) == (f[i] == T_STOP), i);
        CHECK(p, i < 24 || f[i] == f[i - 24], i);
    }
    free(f);
}

/* The table of successors, as the notation gives it. */
static bool follows(int32_t a, int32_t b)
{
    for (uint32_t r = 0; r < 32; r++) {
        uint32_t h = (uint32_t)(a - T_FILLER) * 2654435761u + r * 40503u + 12345u;
        h = (h ^ h >> 15) * 0x2c1b3c6du;
        h = (h ^ h >> 12) * 0x297a2d39u;
        if (T_FILLER + (int32_t)((h ^ h >> 15) % 224) == b)
            return true;
    }
    return false;
}

static void check_essay(const struct parsed *p)
{
    int32_t *f = only_filler(p), length = 0;
    for (int32_t i = 0; i < p->n_filler; i++) {
        length++;
        CHECK(p, length <= 30, i);
        CHECK(p, f[i] != T_STOP || length >= 12, i);
        CHECK(p, length == 1 || f[i] == T_STOP || follows(f[i - 1], f[i]), i);
        if (f[i] == T_STOP)
            length = 0;
    }
    free(f);
}

/* As many facts of this width as fit, back to back, then filler. */
static void check_pack(const struct parsed *p, int32_t width, int32_t together)
{
    int32_t context = p->tail - 1, want = context / (width * together) * together;
    CHECK(p, p->n_facts == want, p->n_facts);
    for (int32_t i = 0; i < p->n_facts; i++)
        CHECK(p, p->facts[i].at == 1 + i * width && p->facts[i].n == width, i);
}

static void say(struct ruler_found *out, const int32_t *t, int32_t n)
{
    memcpy(out->answer + out->n_answer, t, (size_t)n * sizeof *t);
    out->n_answer += n;
}

static void say_one(struct ruler_found *out, int32_t t)
{
    say(out, &t, 1);
}

static void say_ref(struct ruler_found *out, const int32_t *t, int32_t n)
{
    memcpy(out->refs[out->n_refs], t, (size_t)n * sizeof *t);
    out->ref_len[out->n_refs++] = n;
    say(out, t, n);
}

/* "key IS value END" of every needle with this key; the first without its beginning where the
 * prompt holds it. */
static int32_t say_values(struct ruler_found *out, const struct parsed *p, const int32_t *key,
                          int32_t k, int32_t v, bool begun)
{
    int32_t hits = 0;
    for (int32_t i = 0; i < p->n_facts; i++) {
        const int32_t *f = p->c->tokens + p->facts[i].at;
        CHECK(p, p->facts[i].n == 3 + k + v && f[0] == T_NEEDLE && f[1 + k] == T_IS, i);
        CHECK(p, all_in(f + 1, k, T_KEY, T_VALUE) && all_in(f + 2 + k, v, T_VALUE, T_ALL), i);
        if (!same(f + 1, key, k))
            continue;
        if (hits > 0 || !begun) {
            say(out, key, k);
            say_one(out, T_IS);
        }
        say_ref(out, f + 2 + k, v);
        say_one(out, T_END);
        hits++;
    }
    return hits;
}

static void solve_niah(struct ruler_found *out, const struct parsed *p)
{
    const struct ruler_case *c = p->c;
    const int32_t *q = c->tokens + p->tail;
    bool wide = is(c, "niah_multikey_3"), queries = is(c, "niah_multiquery");
    bool values = is(c, "niah_multivalue");
    bool pack = wide || is(c, "niah_multikey_2");
    int32_t k = wide ? 6 : 3, v = wide || is(c, "niah_single_3") ? 7 : 5;
    int32_t left = c->n - p->tail, want = queries || values || is(c, "niah_multikey_1") ? 4 : 1;
    if (pack)
        check_pack(p, 3 + k + v, 1);
    else
        CHECK(p, p->n_facts == want, p->n_facts);
    if (is(c, "niah_single_1"))
        check_noise(p);
    else
        check_essay(p);
    if (!queries) {
        CHECK(p, left == 3 + 2 * k && q[0] == T_QUERY && q[1 + k] == T_ANS, p->tail);
        CHECK(p, same(q + 1, q + 2 + k, k) && q[left - 1] == T_IS, p->tail);
        CHECK(p, say_values(out, p, q + 1, k, v, true) == (values ? 4 : 1), p->tail);
        return;
    }
    CHECK(p, left == 1 + 4 * (k + 1) && q[left - 1] == T_ANS, p->tail);
    for (int32_t i = 0; i < 4; i++) {
        CHECK(p, q[i * (k + 1)] == (i ? T_SEP : T_QUERY), p->tail);
        CHECK(p, say_values(out, p, q + i * (k + 1) + 1, k, v, false) == 1, p->tail);
    }
}

/* The name that a value or a name is assigned to, after fact *from; NULL: none. */
static const int32_t *assigned(const struct parsed *p, const int32_t *what, int32_t n,
                               int32_t *from)
{
    for (int32_t i = *from; i < p->n_facts; i++) {
        const int32_t *f = p->c->tokens + p->facts[i].at;
        if (p->facts[i].n == n + 6 && same(f + 1, what, n)) {
            *from = i + 1;
            return f + 2 + n;
        }
    }
    return NULL;
}

static void solve_vt(struct ruler_found *out, const struct parsed *p)
{
    const int32_t *q = p->c->tokens + p->tail, *at = q + 1;
    int32_t n = 5, from = 0;
    check_noise(p);
    CHECK(p, p->n_facts == 20 && p->c->n - p->tail == 13, p->tail);
    CHECK(p, q[0] == T_QVT && q[6] == T_ANS && q[12] == T_IS && same(q + 1, q + 7, 5), p->tail);
    for (int32_t i = 0; i < p->n_facts; i++) {
        const int32_t *f = p->c->tokens + p->facts[i].at;
        bool first = p->facts[i].n == 11;
        CHECK(p, f[0] == T_ASSIGN && (first || p->facts[i].n == 9), i);
        CHECK(p, all_in(f + 1, first ? 5 : 3, first ? T_VALUE : T_KEY, first ? T_ALL : T_VALUE), i);
        CHECK(p, f[first ? 6 : 4] == T_IS && all_in(f + (first ? 7 : 5), 3, T_KEY, T_VALUE), i);
    }
    for (int hop = 0; hop < 5; hop++) {
        at = assigned(p, at, n, &from);
        CHECK(p, at != NULL, hop);
        if (hop > 0)
            say_one(out, T_IS);
        say_ref(out, at, 3);
        n = 3;
    }
}

/* The object of (subject, relation): the four tokens at `what`. */
static const int32_t *object(const struct parsed *p, const int32_t *what)
{
    const int32_t *found = NULL;
    for (int32_t i = 0; i < p->n_facts; i++) {
        const int32_t *f = p->c->tokens + p->facts[i].at;
        CHECK(p, f[0] == T_DOC && all_in(f + 1, 3, T_KEY, T_VALUE), i);
        CHECK(p, in(f[4], T_RELATION, T_FILLER) && all_in(f + 5, 3, T_KEY, T_VALUE), i);
        if (same(f + 1, what, 4)) {
            CHECK(p, !found, i);
            found = f + 5;
        }
    }
    CHECK(p, found, p->tail);
    return found;
}

static void solve_qa(struct ruler_found *out, const struct parsed *p, bool two)
{
    const int32_t *q = p->c->tokens + p->tail, *o = object(p, q + 1);
    check_pack(p, 9, 4);
    check_essay(p);
    CHECK(p, p->c->n - p->tail == (two ? 11 : 10) && q[0] == (two ? T_QQA2 : T_QQA), p->tail);
    CHECK(p, q[two ? 6 : 5] == T_ANS && same(q + 1, q + (two ? 7 : 6), 4), p->tail);
    if (!two) {
        say_ref(out, o, 3);
        return;
    }
    int32_t next[4] = {o[0], o[1], o[2], q[5]};
    say(out, next, 4);
    say_ref(out, object(p, next), 3);
}

static void solve_words(struct ruler_found *out, const struct parsed *p, bool common)
{
    const int32_t *q = p->c->tokens + p->tail;
    int32_t counts[128] = {0}, n = common ? 10 : 3, size = p->tail - 1, times = size / 218;
    int32_t least = INT32_MAX;
    CHECK(p, p->c->n - p->tail == (common ? 3 : 2), p->tail);
    CHECK(p, q[0] == T_QFWE && q[common ? 2 : 1] == T_ANS && (!common || q[1] == T_SEP), p->tail);
    for (int32_t i = 1; i < p->tail; i++)
        counts[p->c->tokens[i] - T_KEY]++;
    for (int32_t i = 0; i < n; i++) {
        int32_t best = 0;
        for (int32_t w = 1; w < 128; w++)
            best = counts[w] > counts[best] ||
                           (common && counts[best] != 10 * times && counts[w] == 10 * times)
                       ? w
                       : best;
        CHECK(p, !common || counts[best] == 10 * times, best);
        int32_t id = T_KEY + best;
        say_ref(out, &id, 1);
        counts[best] = -1;
    }
    for (int32_t w = 0; w < 128; w++) {
        if (counts[w] >= 0 && counts[w] < least)
            least = counts[w];
    }
    for (int32_t w = 0; common && w < 128; w++) /* the rest is spread evenly */
        CHECK(p, least >= times && (counts[w] < 0 || counts[w] <= least + 1), w);
}

void ruler_case_solve(struct ruler_found *out, const struct ruler_case *c)
{
    struct parsed *p = malloc(sizeof *p);
    *out = (struct ruler_found){0};
    parse(p, c, is(c, "fwe") || is(c, "cwe"));
    for (int32_t i = p->tail; i < c->n; i++)
        CHECK(p, in(c->tokens[i], T_IS, T_ALL) && !filler(c->tokens[i]), i);
    if (strncmp(c->task, "niah_", 5) == 0)
        solve_niah(out, p);
    else if (is(c, "vt"))
        solve_vt(out, p);
    else if (is(c, "qa_1") || is(c, "qa_2"))
        solve_qa(out, p, is(c, "qa_2"));
    else
        solve_words(out, p, is(c, "cwe"));
    say_one(out, T_EOS);
    out->first_fact = p->n_facts ? p->facts[0].at : -1;
    free(p);
}
