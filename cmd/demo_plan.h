/* The demo's cast: eight users, what each asks, when each comes and goes, and how an answer is
 * judged. Prompts come from models/needle/prompts.jsonl, one line a user, in this order. */
#ifndef CMD_DEMO_PLAN_H
#define CMD_DEMO_PLAN_H

#include "core/err.h"

#include <stdbool.h>
#include <stdint.h>

enum { DEMO_USERS = 8, DEMO_MAX_ANSWER = 64, DEMO_MAX_REFS = 8 };

/* Arrivals follow events, not a clock, so that every run has the same order. */
struct demo_user {
    const char *name;
    int after;            /* comes when this user was accepted; -1: at once */
    bool after_prefix;    /* ... when the prefix they have in common has been computed */
    double leaves_at;     /* disconnects when this share of the prompt is computed; 0: stays */
    const char *describe; /* shown beside the name */
};

extern const struct demo_user demo_users[DEMO_USERS];

struct demo_ids {
    int32_t *ids; /* owned */
    int32_t n;
};

struct demo_prompt {
    char task[32];
    struct demo_ids prompt, expected; /* expected ends in EOS */
    struct demo_ids refs[DEMO_MAX_REFS];
    int32_t n_refs;
};

/* Reads the users' prompts; why names file, line and field. */
MUST_CHECK int demo_prompts_load(struct demo_prompt out[DEMO_USERS], const char *path,
                                 struct err_msg *why);
void demo_prompts_free(struct demo_prompt prompts[DEMO_USERS]);
/* Tokens that two prompts have in common at their start. */
int32_t demo_shared_prefix(const struct demo_prompt *a, const struct demo_prompt *b);
/* exact: the answer equals the expected one up to but without its EOS. Returns the RULER score: the
 * share of refs found in the answer as contiguous tokens (models/needle/tokens.json). */
double demo_score(const struct demo_prompt *p, const int32_t *answer, int32_t n, bool *exact);

#endif
