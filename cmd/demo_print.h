/* The demo's tables, its results as JSON, and its verdict. */
#ifndef CMD_DEMO_PRINT_H
#define CMD_DEMO_PRINT_H

#include "cmd/demo_run.h"

#include <stdio.h>

enum { DEMO_MODES = 3 };

void demo_print_cast(const struct demo_prompt prompts[DEMO_USERS], FILE *to);
/* One line a user. */
void demo_print_round(const struct demo_prompt prompts[DEMO_USERS], const struct demo_mode *mode,
                      const struct demo_round *round, FILE *to);
/* The modes side by side. page_tokens: what one page holds. */
void demo_print_totals(const struct demo_mode modes[DEMO_MODES],
                       const struct demo_round rounds[DEMO_MODES], int32_t page_tokens, FILE *to);
/* What went wrong in a round, one line each; wrong answers count only where must_be_right. Returns
 * their number. */
int demo_problems(const struct demo_mode *mode, const struct demo_round *round, bool must_be_right,
                  FILE *to);

/* demo_json.c: everything measured, into a file. */
MUST_CHECK int demo_write_json(const char *path, const struct demo_prompt prompts[DEMO_USERS],
                               const struct demo_mode modes[DEMO_MODES],
                               const struct demo_round rounds[DEMO_MODES], struct err_msg *why);

#endif
