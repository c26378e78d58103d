/* Questions over documents, the surrogate of RULER's question answering: the documents are triples
 * (subject, relation, object) in groups that share entities,
 *   (s, r1, o) (o, r2, z) (s, r3, x) (o, r4, y)   with r3 != r1 and r4 != r2,
 * so that a question needs the relation as well as the subject. One hop asks any triple's object;
 * two hops ask for z by s, r1 and r2. */
#include "eval/ruler_internal.h"

enum {
    TRIPLE_LEN = 4 + 2 * NAME_LEN - 1, /* DOC s r o END */
    IN_GROUP = 4,
    GROUP_LEN = TRIPLE_LEN + 3 * TRIPLE_LEN
};

/* Within a triple of the pool. */
enum { SUBJECT = 1, RELATION = SUBJECT + NAME_LEN, OBJECT = RELATION + 1 };

static void add_triple(struct ruler *r, const int32_t *s, int32_t relation, const int32_t *o)
{
    fact_begin(r, mt_unit(&r->random));
    ids_add(&r->pool, mark(r, MARK_DOC));
    for (int32_t i = 0; i < NAME_LEN; i++)
        ids_add(&r->pool, s[i]);
    ids_add(&r->pool, r->vocab.relation.first + relation);
    for (int32_t i = 0; i < NAME_LEN; i++)
        ids_add(&r->pool, o[i]);
    ids_add(&r->pool, mark(r, MARK_END));
    fact_end(r);
}

static void add_group(struct ruler *r)
{
    enum { S, O, Z, X, Y, ENTITIES };
    int32_t e[ENTITIES][NAME_LEN], rel[IN_GROUP], n = r->vocab.relation.n;
    for (int i = 0; i < ENTITIES; i++)
        draw_ids(r, e[i], NAME_LEN, &r->vocab.key);
    rel[0] = mt_below(&r->random, n);
    rel[1] = mt_below(&r->random, n);
    rel[2] = (rel[0] + 1 + mt_below(&r->random, n - 1)) % n;
    rel[3] = (rel[1] + 1 + mt_below(&r->random, n - 1)) % n;
    add_triple(r, e[S], rel[0], e[O]);
    add_triple(r, e[O], rel[1], e[Z]);
    add_triple(r, e[S], rel[2], e[X]);
    add_triple(r, e[O], rel[3], e[Y]);
}

static void ask_one(struct ruler *r, struct ruler_prompt *p, int32_t n_groups)
{
    int32_t group = mt_below(&r->random, n_groups), which = mt_below(&r->random, IN_GROUP);
    const int32_t *t = r->pool.at + (int64_t)group * GROUP_LEN + (int64_t)which * TRIPLE_LEN;
    put(p, mark(r, MARK_QQA));
    put_all(p, t + SUBJECT, NAME_LEN + 1);
    put(p, mark(r, MARK_ANS));
    put_all(p, t + SUBJECT, NAME_LEN + 1);
    answer_ref(p, t + OBJECT, NAME_LEN);
}

static void ask_two(struct ruler *r, struct ruler_prompt *p, int32_t n_groups)
{
    const int32_t *first = r->pool.at + (int64_t)mt_below(&r->random, n_groups) * GROUP_LEN;
    const int32_t *second = first + TRIPLE_LEN;
    put(p, mark(r, MARK_QQA2));
    put_all(p, first + SUBJECT, NAME_LEN + 1);
    put(p, second[RELATION]);
    put(p, mark(r, MARK_ANS));
    put_all(p, first + SUBJECT, NAME_LEN + 1);
    answer_all(p, first + OBJECT, NAME_LEN);
    answer(p, second[RELATION]);
    answer_ref(p, second + OBJECT, NAME_LEN);
}

void make_qa(struct ruler *r, struct ruler_prompt *p, int32_t n)
{
    bool two = p->task == RULER_QA_2;
    int32_t size = n - 1 - (two ? 11 : 10), n_groups = size / GROUP_LEN;
    for (int32_t i = 0; i < n_groups; i++)
        add_group(r);
    put_context(r, p, size, HAYSTACK_PACK);
    if (two)
        ask_two(r, p, n_groups);
    else
        ask_one(r, p, n_groups);
}
