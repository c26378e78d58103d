/* The prompts of an evaluation as JSON lines: task, length, prompt, expected, refs as
 * models/needle/make_prompts.py writes them, and the seed that gives the prompt there too. */
#ifndef CMD_CLI_EVAL_PRINT_H
#define CMD_CLI_EVAL_PRINT_H

#include "cmd/cli_eval_run.h"

/* path -: standard output. Returns an exit code. */
int eval_print_prompts(const struct eval_plan *p, const char *path);

#endif
