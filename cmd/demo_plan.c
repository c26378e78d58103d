#include "cmd/demo_plan.h"

#include "core/mem.h"
#include "eval/score.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct demo_user demo_users[DEMO_USERS] = {
    {"ada", -1, false, 0, "asks about some documents"},
    {"ben", 0, false, 0, "has the longest prompt"},
    {"cho", 1, false, 0, "asks four things at once"},
    {"dee", 2, false, 0, "follows a variable through four assignments"},
    {"eli", 3, false, 0.5, "disconnects in the middle of the prompt"},
    {"fay", 4, false, 0, "looks for one key among hundreds"},
    {"gus", 0, true, 0, "has another question about ada's documents"},
    {"hal", 6, false, 0, "comes last with a short prompt"},
};

static int read_ids(struct demo_ids *out, const json_t *list, const char *what, struct err_msg *why)
{
    size_t n = json_array_size(list);
    if (!json_is_array(list) || n == 0 || n > (1u << 20))
        return err_set(why, ERR_FORMAT, "\"%s\" is not a list of token ids", what);
    out->ids = mem_zalloc(n, sizeof *out->ids);
    for (; out->n < (int32_t)n; out->n++) {
        const json_t *id = json_array_get(list, (size_t)out->n);
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) > INT32_MAX)
            return err_set(why, ERR_FORMAT, "\"%s\" holds something else than token ids", what);
        out->ids[out->n] = (int32_t)json_integer_value(id);
    }
    return 0;
}

static int read_prompt(struct demo_prompt *p, const json_t *o, struct err_msg *why)
{
    const char *task = json_string_value(json_object_get(o, "task"));
    const json_t *refs = json_object_get(o, "refs");
    if (!task)
        return err_set(why, ERR_FORMAT, "\"task\" is missing");
    (void)snprintf(p->task, sizeof p->task, "%s", task);
    TRY(read_ids(&p->prompt, json_object_get(o, "prompt"), "prompt", why));
    TRY(read_ids(&p->expected, json_object_get(o, "expected"), "expected", why));
    if (p->expected.n > DEMO_MAX_ANSWER)
        return err_set(why, ERR_FORMAT, "\"expected\" is longer than %d", DEMO_MAX_ANSWER);
    size_t n = json_array_size(refs);
    if (n < 1 || n > DEMO_MAX_REFS)
        return err_set(why, ERR_FORMAT, "\"refs\" does not hold 1 to %d lists", DEMO_MAX_REFS);
    for (; p->n_refs < (int32_t)n; p->n_refs++)
        TRY(read_ids(&p->refs[p->n_refs], json_array_get(refs, (size_t)p->n_refs), "refs", why));
    return 0;
}

static int read_line(struct demo_prompt *p, FILE *f, struct err_msg *why)
{
    char *line = NULL;
    size_t cap = 0;
    json_error_t at;
    if (getline(&line, &cap, f) < 0) {
        free(line);
        return err_set(why, ERR_FORMAT, "there is no such line; the demo has %d users", DEMO_USERS);
    }
    json_t *o = json_loads(line, 0, &at);
    free(line);
    if (!o)
        return err_set(why, ERR_FORMAT, "%.150s", at.text);
    int err = read_prompt(p, o, why);
    json_decref(o);
    return err;
}

int demo_prompts_load(struct demo_prompt out[DEMO_USERS], const char *path, struct err_msg *why)
{
    FILE *f = fopen(path, "re");
    int err = 0;
    memset(out, 0, sizeof *out * DEMO_USERS);
    if (!f)
        return err_set(why, -errno, "cannot open %s: %s", path, err_str(-errno));
    for (int i = 0; i < DEMO_USERS && err == 0; i++) {
        struct err_msg inner = {""};
        err = read_line(&out[i], f, &inner);
        if (err < 0)
            (void)err_set(why, err, "%s:%d: %.250s", path, i + 1, inner.text);
    }
    (void)fclose(f);
    if (err < 0)
        demo_prompts_free(out);
    return err;
}

void demo_prompts_free(struct demo_prompt prompts[DEMO_USERS])
{
    for (int i = 0; i < DEMO_USERS; i++) {
        mem_free(prompts[i].prompt.ids);
        mem_free(prompts[i].expected.ids);
        for (int r = 0; r < DEMO_MAX_REFS; r++)
            mem_free(prompts[i].refs[r].ids);
    }
    memset(prompts, 0, sizeof *prompts * DEMO_USERS);
}

int32_t demo_shared_prefix(const struct demo_prompt *a, const struct demo_prompt *b)
{
    int32_t n = a->prompt.n < b->prompt.n ? a->prompt.n : b->prompt.n, i = 0;
    while (i < n && a->prompt.ids[i] == b->prompt.ids[i])
        i++;
    return i;
}

double demo_score(const struct demo_prompt *p, const int32_t *answer, int32_t n, bool *exact)
{
    struct score_key key = {.expected = {p->expected.ids, p->expected.n}, .n_refs = p->n_refs};
    for (int32_t i = 0; i < p->n_refs; i++)
        key.refs[i] = (struct score_ids){p->refs[i].ids, p->refs[i].n};
    *exact = score_exact(&key, answer, n);
    return score_ruler(&key, answer, n);
}
