/* The figures of `sluice eval`: for each length, task and policy, and for groups of tasks. */
#ifndef CMD_CLI_EVAL_REPORT_H
#define CMD_CLI_EVAL_REPORT_H

#include "cmd/cli_eval_run.h"
#include "eval/interval.h"

#include <stdio.h>

/* Answered prompts of some tasks at one length under one policy. Scores of a group of tasks are the
 * mean over its prompts. */
struct eval_row {
    int32_t n, failed;
    struct interval score, exact;
    struct interval change; /* of the score, against the first policy on the same prompts */
    double density, density_std, decode_density;
    double lost_mass;
    double token_ms; /* from one token to the next */
    double ttft_ms, ttft_median_ms;
    double attention_ms; /* a prompt, decode included */
    int64_t cached;
};

void eval_row(struct eval_row *out, const struct eval *e, int length, uint32_t tasks, int policy);
void eval_print(const struct eval *e, FILE *to);
/* path -: standard output. */
MUST_CHECK int eval_write_json(const struct eval *e, const char *path, struct err_msg *why);
/* Requests without an answer. */
int32_t eval_failed(const struct eval *e);

#endif
