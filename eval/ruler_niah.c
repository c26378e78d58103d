/* Needles in a haystack: NEEDLE key IS value END, and which value a key has. */
#include "eval/ruler_internal.h"

enum { MAX_KEY = 6, MAX_VALUE = 7, MAX_VALUES = 4, ASKED_AT_ONCE = 4, NEEDLE_MARKS = 3 };

static const struct niah {
    enum haystack haystack;
    int32_t n_keys;   /* 0: as many as fit */
    int32_t n_values; /* of one key */
    int32_t key_len, value_len;
} kinds[RULER_N_NIAH] = {
    [RULER_SINGLE_1] = {HAYSTACK_NOISE, 1, 1, 3, 5},
    [RULER_SINGLE_2] = {HAYSTACK_ESSAY, 1, 1, 3, 5},
    [RULER_SINGLE_3] = {HAYSTACK_ESSAY, 1, 1, 3, 7},
    [RULER_MULTIKEY_1] = {HAYSTACK_ESSAY, 4, 1, 3, 5},
    [RULER_MULTIKEY_2] = {HAYSTACK_PACK, 0, 1, 3, 5},
    [RULER_MULTIKEY_3] = {HAYSTACK_PACK, 0, 1, 6, 7},
    [RULER_MULTIVALUE] = {HAYSTACK_ESSAY, 1, 4, 3, 5},
    [RULER_MULTIQUERY] = {HAYSTACK_ESSAY, 4, 1, 3, 5},
};

static void add_key(struct ruler *r, const struct niah *k)
{
    int32_t key[MAX_KEY] = {0}, values[MAX_VALUES][MAX_VALUE] = {{0}};
    double places[MAX_VALUES] = {0};
    draw_ids(r, key, k->key_len, &r->vocab.key);
    for (int32_t v = 0; v < k->n_values; v++)
        draw_ids(r, values[v], k->value_len, &r->vocab.value);
    draw_places(r, places, k->n_values);
    for (int32_t v = 0; v < k->n_values; v++) {
        fact_begin(r, places[v]);
        ids_add(&r->pool, mark(r, MARK_NEEDLE));
        for (int32_t i = 0; i < k->key_len; i++)
            ids_add(&r->pool, key[i]);
        ids_add(&r->pool, mark(r, MARK_IS));
        for (int32_t i = 0; i < k->value_len; i++)
            ids_add(&r->pool, values[v][i]);
        ids_add(&r->pool, mark(r, MARK_END));
        fact_end(r);
    }
}

/* The pool keeps the needles as they were made, all equally wide. */
static const int32_t *key_of(const struct ruler *r, const struct niah *k, int32_t needle)
{
    return r->pool.at + (int64_t)needle * (NEEDLE_MARKS + k->key_len + k->value_len) + 1;
}

static const int32_t *value_of(const struct ruler *r, const struct niah *k, int32_t needle)
{
    return key_of(r, k, needle) + k->key_len + 1;
}

static void ask_all(struct ruler *r, struct ruler_prompt *p, const struct niah *k)
{
    int32_t order[ASKED_AT_ONCE];
    draw_order(r, order, ASKED_AT_ONCE);
    for (int32_t i = 0; i < ASKED_AT_ONCE; i++) {
        put(p, mark(r, i ? MARK_SEP : MARK_QUERY));
        put_all(p, key_of(r, k, order[i]), k->key_len);
        answer_all(p, key_of(r, k, order[i]), k->key_len);
        answer(p, mark(r, MARK_IS));
        answer_ref(p, value_of(r, k, order[i]), k->value_len);
        answer(p, mark(r, MARK_END));
    }
    put(p, mark(r, MARK_ANS));
}

static void ask_one(struct ruler *r, struct ruler_prompt *p, const struct niah *k, int32_t n_keys)
{
    int32_t first = mt_below(&r->random, n_keys) * k->n_values;
    const int32_t *key = key_of(r, k, first);
    put(p, mark(r, MARK_QUERY));
    put_all(p, key, k->key_len);
    put(p, mark(r, MARK_ANS));
    put_all(p, key, k->key_len);
    put(p, mark(r, MARK_IS));
    for (int32_t v = 0; v < k->n_values; v++) {
        if (v > 0) {
            answer_all(p, key, k->key_len);
            answer(p, mark(r, MARK_IS));
        }
        answer_ref(p, value_of(r, k, first + v), k->value_len);
        answer(p, mark(r, MARK_END));
    }
}

void make_niah(struct ruler *r, struct ruler_prompt *p, int32_t n)
{
    const struct niah *k = &kinds[p->task];
    bool all = p->task == RULER_MULTIQUERY;
    int32_t tail = all ? 1 + ASKED_AT_ONCE * (k->key_len + 1) : 3 + 2 * k->key_len;
    int32_t size = n - 1 - tail;
    int32_t n_keys = k->n_keys ? k->n_keys : size / (NEEDLE_MARKS + k->key_len + k->value_len);
    for (int32_t i = 0; i < n_keys; i++)
        add_key(r, k);
    put_context(r, p, size, k->haystack);
    if (all)
        ask_all(r, p, k);
    else
        ask_one(r, p, k, n_keys);
}
