/* Haystacks, and facts laid into them. Filler is never dropped: a context is the merge of its
 * filler tokens and its facts. */
#include "core/mem.h"
#include "eval/ruler_internal.h"

#include <stdlib.h>

enum {
    NOISE_LOOP = 24, /* tokens in one turn of the noise */
    SENTENCE_LEAST = 12,
    SENTENCE_KINDS = 19 /* lengths of a sentence: 12 .. 30 */
};

/* The filler token that follows token a (both counted from the first) at this rank: a hash, so that
 * the language has a table that nobody needs to store. */
static int32_t successor(uint32_t a, uint32_t rank, int32_t n_filler)
{
    uint32_t h = a * 2654435761u + rank * 40503u + 12345u;
    h ^= h >> 15;
    h *= 0x2c1b3c6du;
    h ^= h >> 12;
    h *= 0x297a2d39u;
    h ^= h >> 15;
    return (int32_t)(h % (uint32_t)n_filler);
}

/* More than n tokens of sentences. */
static void essay(struct ruler *r, int32_t n)
{
    const struct ruler_range *filler = &r->vocab.filler;
    while (r->filler.n <= n) {
        int32_t start = r->filler.n;
        int32_t length = SENTENCE_LEAST + mt_below(&r->random, SENTENCE_KINDS);
        int32_t a = mt_below(&r->random, filler->n);
        for (int32_t i = 0; i < length - 1; i++) {
            ids_add(&r->filler, filler->first + a);
            int32_t rank = draw_rank(r, r->essay_cdf, ESSAY_SUCCESSORS);
            a = successor((uint32_t)a, (uint32_t)rank, filler->n);
        }
        ids_add(&r->filler, mark(r, MARK_STOP));
        for (int32_t i = 0; i < length; i++)
            ids_add(&r->starts, start);
    }
}

static void noise(struct ruler *r, int32_t n)
{
    int32_t loop[NOISE_LOOP];
    draw_ids(r, loop, NOISE_LOOP - 1, &r->vocab.filler);
    loop[NOISE_LOOP - 1] = mark(r, MARK_STOP);
    for (int32_t i = 0; i <= n; i++) {
        ids_add(&r->filler, loop[i % NOISE_LOOP]);
        ids_add(&r->starts, i / NOISE_LOOP * NOISE_LOOP);
    }
}

void fact_begin(struct ruler *r, double place)
{
    if (r->n_facts == r->cap_facts) {
        r->cap_facts = r->cap_facts ? r->cap_facts * 2 : 256;
        r->facts = mem_realloc(r->facts, (size_t)r->cap_facts * sizeof *r->facts);
    }
    r->facts[r->n_facts] = (struct fact){place, r->pool.n, 0, r->n_facts};
    r->n_facts++;
}

void fact_end(struct ruler *r)
{
    struct fact *f = &r->facts[r->n_facts - 1];
    f->n = r->pool.n - f->at;
}

static int by_place(const void *a, const void *b)
{
    const struct fact *x = a, *y = b;
    if (x->place < y->place || x->place > y->place)
        return x->place < y->place ? -1 : 1;
    return x->order - y->order;
}

void put_context(struct ruler *r, struct ruler_prompt *p, int32_t size, enum haystack haystack)
{
    int32_t free_tokens = size - r->pool.n, used = 0;
    ASSERT(free_tokens >= 0);
    qsort(r->facts, (size_t)r->n_facts, sizeof *r->facts, by_place);
    r->filler.n = r->starts.n = 0;
    if (haystack == HAYSTACK_NOISE)
        noise(r, free_tokens);
    else
        essay(r, free_tokens);
    for (int32_t i = 0; i < r->n_facts; i++) {
        const struct fact *f = &r->facts[i];
        int32_t at = 0;
        if (haystack != HAYSTACK_PACK)
            at = r->starts.at[(int32_t)(f->place * (free_tokens + 1))];
        if (at > used) {
            put_all(p, r->filler.at + used, at - used);
            used = at;
        }
        put_all(p, r->pool.at + f->at, f->n);
    }
    put_all(p, r->filler.at + used, free_tokens - used);
}
