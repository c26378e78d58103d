#include "eval/ruler.h"

#include "core/mem.h"
#include "eval/ruler_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

void zipf_cdf(double *cdf, int32_t n, double exponent)
{
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) {
        sum += 1.0 / pow(i + 1, exponent);
        cdf[i] = sum;
    }
    for (int32_t i = 0; i < n; i++)
        cdf[i] /= sum;
}

void ruler_create(struct ruler **out, const struct ruler_vocab *vocab)
{
    struct ruler *r = mem_zalloc(1, sizeof *r);
    r->vocab = *vocab;
    r->word_cdf = mem_zalloc((size_t)vocab->key.n, sizeof *r->word_cdf);
    zipf_cdf(r->essay_cdf, ESSAY_SUCCESSORS, 1.2);
    zipf_cdf(r->word_cdf, vocab->key.n, 2.0);
    mt_seed(&r->random, 0);
    *out = r;
}

void ruler_destroy(struct ruler *r)
{
    if (!r)
        return;
    mem_free(r->word_cdf);
    mem_free(r->pool.at);
    mem_free(r->facts);
    mem_free(r->filler.at);
    mem_free(r->starts.at);
    mem_free(r);
}

void ruler_seed(struct ruler *r, uint64_t seed)
{
    mt_seed(&r->random, seed);
}

void ids_add(struct ids *x, int32_t id)
{
    if (x->n == x->cap) {
        x->cap = x->cap ? x->cap * 2 : 1024;
        x->at = mem_realloc(x->at, (size_t)x->cap * sizeof *x->at);
    }
    x->at[x->n++] = id;
}

void draw_ids(struct ruler *r, int32_t *out, int32_t n, const struct ruler_range *from)
{
    for (int32_t i = 0; i < n; i++)
        out[i] = from->first + mt_below(&r->random, from->n);
}

int32_t draw_rank(struct ruler *r, const double *cdf, int32_t n)
{
    double u = mt_unit(&r->random);
    int32_t i = 0;
    while (i < n - 1 && u >= cdf[i])
        i++;
    return i;
}

struct drawn {
    double unit;
    int32_t i;
};

static int by_unit(const void *a, const void *b)
{
    const struct drawn *x = a, *y = b;
    if (x->unit < y->unit || x->unit > y->unit)
        return x->unit < y->unit ? -1 : 1;
    return x->i - y->i;
}

void draw_order(struct ruler *r, int32_t *out, int32_t n)
{
    struct drawn *order = mem_alloc((size_t)n * sizeof *order);
    for (int32_t i = 0; i < n; i++)
        order[i] = (struct drawn){mt_unit(&r->random), i};
    qsort(order, (size_t)n, sizeof *order, by_unit);
    for (int32_t i = 0; i < n; i++)
        out[i] = order[i].i;
    mem_free(order);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void draw_places(struct ruler *r, double *out, int32_t n)
{
    for (int32_t i = 0; i < n; i++)
        out[i] = mt_unit(&r->random);
    qsort(out, (size_t)n, sizeof *out, ascending);
}

void put(struct ruler_prompt *p, int32_t id)
{
    p->tokens[p->n_tokens++] = id;
}

void put_all(struct ruler_prompt *p, const int32_t *ids, int32_t n)
{
    memcpy(p->tokens + p->n_tokens, ids, (size_t)n * sizeof *ids);
    p->n_tokens += n;
}

void answer(struct ruler_prompt *p, int32_t id)
{
    ASSERT(p->n_expected < RULER_MAX_ANSWER);
    p->expected[p->n_expected++] = id;
}

void answer_all(struct ruler_prompt *p, const int32_t *ids, int32_t n)
{
    for (int32_t i = 0; i < n; i++)
        answer(p, ids[i]);
}

void answer_ref(struct ruler_prompt *p, const int32_t *ids, int32_t n)
{
    ASSERT(p->n_refs < SCORE_MAX_REFS);
    p->refs[p->n_refs++] = (struct ruler_span){p->n_expected, n};
    answer_all(p, ids, n);
}

static void (*maker(enum ruler_task task))(struct ruler *, struct ruler_prompt *, int32_t)
{
    switch (task) {
    case RULER_VT: return make_vt;
    case RULER_CWE: return make_cwe;
    case RULER_FWE: return make_fwe;
    case RULER_QA_1:
    case RULER_QA_2: return make_qa;
    default: return make_niah;
    }
}

int ruler_make(struct ruler *r, struct ruler_prompt *out, enum ruler_task task, int32_t length,
               struct err_msg *why)
{
    int32_t n = length - RULER_ANSWER_ROOM;
    *out = (struct ruler_prompt){.task = task, .length = length};
    if (length < RULER_MIN_LENGTH || length > RULER_MAX_LENGTH)
        return err_set(why, ERR_INVALID, "a length of %d is not between %d and %d", length,
                       RULER_MIN_LENGTH, RULER_MAX_LENGTH);
    if (!(r->vocab.tasks >> task & 1))
        return err_set(why, ERR_INVALID, "tasks.%s is missing in the vocabulary's file",
                       ruler_task_name(task));
    if (task == RULER_CWE && n < CWE_LEAST + r->vocab.key.n)
        return err_set(why, ERR_INVALID, "a length of %d is too short for cwe with %d words",
                       length, r->vocab.key.n);
    out->tokens = mem_alloc((size_t)n * sizeof *out->tokens);
    r->pool.n = 0;
    r->n_facts = 0;
    put(out, mark(r, MARK_BOS));
    maker(task)(r, out, n);
    answer(out, mark(r, MARK_EOS));
    ASSERT(out->n_tokens == n);
    return 0;
}

void ruler_prompt_deinit(struct ruler_prompt *p)
{
    mem_free(p->tokens);
    *p = (struct ruler_prompt){0};
}

/* SplitMix64's finaliser. */
static uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

uint64_t ruler_sample_seed(uint64_t seed, enum ruler_set set, enum ruler_task task, int32_t length,
                           int32_t index)
{
    uint64_t cell = (uint64_t)task << 32 | (uint32_t)length;
    uint64_t h = mix(mix(seed) ^ cell);
    /* The sets are the halves of all seeds: one bit tells them apart. */
    return mix(h ^ (uint64_t)(uint32_t)index) >> 12 << 1 | (set == RULER_CALIBRATE);
}

void ruler_score_key(struct score_key *out, const struct ruler_prompt *p)
{
    *out = (struct score_key){.expected = {p->expected, p->n_expected},
                              .n_refs = p->n_refs,
                              .any = p->task == RULER_QA_1 || p->task == RULER_QA_2};
    for (int32_t i = 0; i < p->n_refs; i++)
        out->refs[i] = (struct score_ids){p->expected + p->refs[i].at, p->refs[i].n};
}
