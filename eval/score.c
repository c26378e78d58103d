#include "eval/score.h"

#include <string.h>

static bool occurs(const struct score_ids *ref, const int32_t *answer, int32_t n)
{
    for (int32_t i = 0; i + ref->n <= n; i++) {
        if (memcmp(answer + i, ref->ids, (size_t)ref->n * sizeof *answer) == 0)
            return true;
    }
    return false;
}

double score_ruler(const struct score_key *key, const int32_t *answer, int32_t n)
{
    const struct score_ids *want = &key->expected;
    int32_t end = want->ids[want->n - 1], cut = 0, found = 0;
    while (cut < n && cut < want->n && answer[cut] != end)
        cut++;
    for (int32_t i = 0; i < key->n_refs; i++)
        found += occurs(&key->refs[i], answer, cut);
    if (key->any)
        return found > 0;
    return (double)found / key->n_refs;
}

bool score_exact(const struct score_key *key, const int32_t *answer, int32_t n)
{
    int32_t want = key->expected.n - 1;
    return n >= want && memcmp(answer, key->expected.ids, (size_t)want * sizeof *answer) == 0;
}
