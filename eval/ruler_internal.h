/* What the tasks share: the generator's state, its scratch, and how they write prompts. */
#ifndef EVAL_RULER_INTERNAL_H
#define EVAL_RULER_INTERNAL_H

#include "eval/mt.h"
#include "eval/ruler.h"

enum {
    ESSAY_SUCCESSORS = 32,                              /* of one filler token */
    NAME_LEN = 3,                                       /* key tokens in a name, an entity */
    CWE_COMMON = 10,                                    /* common words */
    CWE_TIMES = 10,                                     /* as frequent as the others */
    CWE_LEAST = CWE_COMMON * CWE_TIMES - CWE_COMMON + 4 /* tokens, besides one a word */
};

enum haystack { HAYSTACK_NOISE, HAYSTACK_ESSAY, HAYSTACK_PACK };

/* Token ids, growing. */
struct ids {
    int32_t *at;
    int32_t n, cap;
};

/* n tokens from `at` of the pool, and the place in the haystack, a share of it. */
struct fact {
    double place;
    int32_t at, n;
    int32_t order; /* as made: equal places keep it */
};

struct ruler {
    struct ruler_vocab vocab;
    struct mt random;
    double essay_cdf[ESSAY_SUCCESSORS];
    double *word_cdf; /* [vocab.key.n] of fwe */
    /* Of the prompt at hand. */
    struct ids pool; /* tokens of the facts, as made */
    struct fact *facts;
    int32_t n_facts, cap_facts;
    struct ids filler, starts; /* starts[i]: first index of the sentence that filler i is in */
};

static inline int32_t mark(const struct ruler *r, enum ruler_mark m)
{
    return r->vocab.marks[m];
}

void ids_add(struct ids *x, int32_t id);

/* n ids drawn from a range. */
void draw_ids(struct ruler *r, int32_t *out, int32_t n, const struct ruler_range *from);
/* Index i with probability cdf[i] - cdf[i - 1]. */
int32_t draw_rank(struct ruler *r, const double *cdf, int32_t n);
/* The numbers 0 .. n - 1 in random order. */
void draw_order(struct ruler *r, int32_t *out, int32_t n);
/* n places, ascending. */
void draw_places(struct ruler *r, double *out, int32_t n);

/* cdf[i] of probabilities proportional to 1 / (i + 1)^exponent. */
void zipf_cdf(double *cdf, int32_t n, double exponent);

/* A fact whose tokens are then added to the pool by ids_add. */
void fact_begin(struct ruler *r, double place);
void fact_end(struct ruler *r);

/* Appends `size` tokens to the prompt: the facts made so far within filler. */
void put_context(struct ruler *r, struct ruler_prompt *p, int32_t size, enum haystack haystack);
void put(struct ruler_prompt *p, int32_t id);
void put_all(struct ruler_prompt *p, const int32_t *ids, int32_t n);
/* The same to the expected answer; a reference is part of it. */
void answer(struct ruler_prompt *p, int32_t id);
void answer_all(struct ruler_prompt *p, const int32_t *ids, int32_t n);
void answer_ref(struct ruler_prompt *p, const int32_t *ids, int32_t n);

/* The tasks: n is the prompt's length. Each fills tokens, expected and refs. */
void make_niah(struct ruler *r, struct ruler_prompt *p, int32_t n);
void make_vt(struct ruler *r, struct ruler_prompt *p, int32_t n);
void make_qa(struct ruler *r, struct ruler_prompt *p, int32_t n);
void make_fwe(struct ruler *r, struct ruler_prompt *p, int32_t n);
void make_cwe(struct ruler *r, struct ruler_prompt *p, int32_t n);

#endif
