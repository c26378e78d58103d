#include "cmd/cli_eval_print.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

static void print_ids(FILE *to, const int32_t *ids, int32_t n)
{
    (void)fputc('[', to);
    for (int32_t i = 0; i < n; i++)
        (void)fprintf(to, "%s%d", i ? "," : "", ids[i]);
    (void)fputc(']', to);
}

static void print_prompt(FILE *to, const struct ruler_prompt *q, uint64_t seed)
{
    (void)fprintf(to, "{\"task\":\"%s\",\"length\":%d,\"prompt\":", ruler_task_name(q->task),
                  q->length);
    print_ids(to, q->tokens, q->n_tokens);
    (void)fputs(",\"expected\":", to);
    print_ids(to, q->expected, q->n_expected);
    (void)fputs(",\"refs\":[", to);
    for (int32_t i = 0; i < q->n_refs; i++) {
        (void)fputs(i ? "," : "", to);
        print_ids(to, q->expected + q->refs[i].at, q->refs[i].n);
    }
    (void)fprintf(to, "],\"seed\":%" PRIu64 "}\n", seed);
}

/* All prompts of a length and task. */
static int print_cell(const struct eval_plan *p, FILE *to, enum ruler_task task, int32_t length,
                      struct err_msg *why)
{
    for (int32_t i = 0; i < p->n_samples; i++) {
        struct ruler_prompt q;
        TRY(eval_prompt(p, &q, task, length, i, why));
        print_prompt(to, &q, ruler_sample_seed(p->seed, p->set, task, length, i));
        ruler_prompt_deinit(&q);
    }
    return 0;
}

int eval_print_prompts(const struct eval_plan *p, const char *path)
{
    struct err_msg why = {""};
    FILE *to = strcmp(path, "-") == 0 ? stdout : fopen(path, "we");
    int err = 0;
    if (!to)
        return cli_fail(CLI_USAGE, "eval: cannot write %s: %s", path, err_str(-errno));
    for (int l = 0; l < p->n_lengths && err == 0; l++) {
        for (int t = 0; t < RULER_N_TASKS && err == 0; t++) {
            if (p->tasks >> t & 1)
                err = print_cell(p, to, (enum ruler_task)t, p->lengths[l], &why);
        }
    }
    if ((to == stdout ? fflush(to) : fclose(to)) != 0 && err == 0)
        err = err_set(&why, -errno, "cannot write %s: %s", path, err_str(-errno));
    return err < 0 ? cli_fail(CLI_FAILED, "eval: %s", why.text) : CLI_OK;
}
