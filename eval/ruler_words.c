/* Counting words, which are single key tokens here: the three most frequent of words drawn by
 * Zipf's law (fwe), and the ten that occur ten times as often as all others (cwe). */
#include "core/mem.h"
#include "eval/ruler_internal.h"

enum { FREQUENT = 3 };

/* Answers with the k most counted words, ties to the lower id; counts [vocab.key.n] is spent. */
static void answer_top(struct ruler *r, struct ruler_prompt *p, int32_t *counts, int32_t k)
{
    for (int32_t i = 0; i < k; i++) {
        int32_t best = 0;
        for (int32_t w = 1; w < r->vocab.key.n; w++)
            best = counts[w] > counts[best] ? w : best;
        int32_t id = r->vocab.key.first + best;
        answer_ref(p, &id, 1);
        counts[best] = -1;
    }
}

void make_fwe(struct ruler *r, struct ruler_prompt *p, int32_t n)
{
    int32_t n_words = r->vocab.key.n, first = r->vocab.key.first;
    int32_t *words = mem_zalloc((size_t)n_words, sizeof *words);
    int32_t *counts = mem_zalloc((size_t)n_words, sizeof *counts);
    draw_order(r, words, n_words);
    for (int32_t i = 0; i < n - 3; i++) {
        int32_t w = words[draw_rank(r, r->word_cdf, n_words)];
        put(p, first + w);
        counts[w]++;
    }
    put(p, mark(r, MARK_QFWE));
    put(p, mark(r, MARK_ANS));
    answer_top(r, p, counts, FREQUENT);
    mem_free(words);
    mem_free(counts);
}

/* The common words stand first in `words`. Each of them comes CWE_TIMES * times, every other
 * word `times` times; what is left of the context goes to the others, one each in their order. */
static void cwe_words(int32_t *out, int32_t size, const int32_t *words, int32_t n_words)
{
    int32_t times = size / (CWE_COMMON * CWE_TIMES + n_words - CWE_COMMON), n = 0;
    for (int32_t w = 0; w < n_words; w++) {
        for (int32_t i = 0; i < (w < CWE_COMMON ? CWE_TIMES * times : times); i++)
            out[n++] = words[w];
    }
    for (int32_t w = CWE_COMMON; n < size; w = w + 1 < n_words ? w + 1 : CWE_COMMON)
        out[n++] = words[w];
}

void make_cwe(struct ruler *r, struct ruler_prompt *p, int32_t n)
{
    int32_t n_words = r->vocab.key.n, size = n - 4;
    int32_t *words = mem_zalloc((size_t)n_words, sizeof *words);
    int32_t *counts = mem_zalloc((size_t)n_words, sizeof *counts);
    int32_t *bag = mem_alloc((size_t)size * sizeof *bag);
    int32_t *order = mem_alloc((size_t)size * sizeof *order);
    draw_order(r, words, n_words);
    cwe_words(bag, size, words, n_words);
    draw_order(r, order, size);
    for (int32_t i = 0; i < size; i++)
        put(p, r->vocab.key.first + bag[order[i]]);
    put(p, mark(r, MARK_QFWE));
    put(p, mark(r, MARK_SEP));
    put(p, mark(r, MARK_ANS));
    for (int32_t i = 0; i < CWE_COMMON; i++)
        counts[words[i]] = 1;
    answer_top(r, p, counts, CWE_COMMON);
    mem_free(words);
    mem_free(counts);
    mem_free(bag);
    mem_free(order);
}
