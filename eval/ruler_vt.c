/* Variable tracking: ASSIGN value IS name END, then name after name, in noise; all names that a
 * value reached. Four chains, of which one is asked. */
#include "eval/ruler_internal.h"

enum { CHAINS = 4, HOPS = 4, NAMES = HOPS + 1, VALUE_LEN = 5 };

static void assign(struct ruler *r, double place, const int32_t *from, int32_t n_from,
                   const int32_t *to)
{
    fact_begin(r, place);
    ids_add(&r->pool, mark(r, MARK_ASSIGN));
    for (int32_t i = 0; i < n_from; i++)
        ids_add(&r->pool, from[i]);
    ids_add(&r->pool, mark(r, MARK_IS));
    for (int32_t i = 0; i < NAME_LEN; i++)
        ids_add(&r->pool, to[i]);
    ids_add(&r->pool, mark(r, MARK_END));
    fact_end(r);
}

static void add_chain(struct ruler *r, int32_t value[VALUE_LEN], int32_t names[NAMES][NAME_LEN])
{
    double places[NAMES];
    draw_ids(r, value, VALUE_LEN, &r->vocab.value);
    for (int i = 0; i < NAMES; i++)
        draw_ids(r, names[i], NAME_LEN, &r->vocab.key);
    draw_places(r, places, NAMES);
    assign(r, places[0], value, VALUE_LEN, names[0]);
    for (int i = 1; i < NAMES; i++)
        assign(r, places[i], names[i - 1], NAME_LEN, names[i]);
}

void make_vt(struct ruler *r, struct ruler_prompt *p, int32_t n)
{
    int32_t value[VALUE_LEN], names[NAMES][NAME_LEN];
    int32_t other[VALUE_LEN], others[NAMES][NAME_LEN];
    add_chain(r, value, names);
    for (int i = 1; i < CHAINS; i++)
        add_chain(r, other, others);
    put_context(r, p, n - 1 - (3 + 2 * VALUE_LEN), HAYSTACK_NOISE);
    put(p, mark(r, MARK_QVT));
    put_all(p, value, VALUE_LEN);
    put(p, mark(r, MARK_ANS));
    put_all(p, value, VALUE_LEN);
    put(p, mark(r, MARK_IS));
    for (int i = 0; i < NAMES; i++) {
        if (i > 0)
            answer(p, mark(r, MARK_IS));
        answer_ref(p, names[i], NAME_LEN);
    }
}
