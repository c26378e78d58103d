/* What `sluice eval` asks, and what came back. Every prompt is asked once under every policy. A
 * round is some prompts of one length and task: all users ask them under one policy, then the same
 * under the next, and the policy that begins changes from round to round. So the policies have
 * equal prompts and equal load, drift of the machine hits all of them, and what the daemon counts
 * during a turn (attention time) belongs to one policy. Rounds go over all lengths and tasks before
 * the second round of any, so that a run that its limit ends has asked all of them alike. */
#ifndef CMD_CLI_EVAL_RUN_H
#define CMD_CLI_EVAL_RUN_H

#include "cmd/cli.h"
#include "eval/ruler.h"

#include <stdio.h>

enum { EVAL_MAX_POLICIES = 24, EVAL_MAX_LENGTHS = 16 };

struct eval_policy {
    const char *name;
    struct sluice_request request; /* sparse, k, ln_lambda, gate_rows */
    struct cli_target target;      /* its daemon */
    struct sluice_client *control; /* for the daemon's counters; owned by eval_connect */
};

struct eval_plan {
    struct ruler *ruler;
    struct ruler_vocab vocab;
    struct eval_policy policies[EVAL_MAX_POLICIES]; /* the first is what others are compared with */
    int32_t n_policies;
    int32_t lengths[EVAL_MAX_LENGTHS], n_lengths;
    uint32_t tasks; /* bit t: task t */
    int32_t n_samples, n_round, n_users, n_warmups;
    int64_t limit_ms; /* no round begins after this; 0: none */
    uint64_t seed;
    enum ruler_set set;
    bool progress;
    bool lost_mass; /* requests ask for it */
    FILE *out;      /* a JSON line for every answer; NULL: none */
};

struct eval_answer {
    bool ok, exact;
    double score, density, decode_density, lost_mass, ttft_s;
    double token_s; /* from one token to the next; 0 where there are less than two */
    int32_t cached; /* prompt tokens that were not computed */
};

/* Of one length, task and policy. */
struct eval_cell {
    struct eval_answer *answers; /* [n_samples]; NULL where the task is not asked */
    int32_t n_asked;
    int64_t attention_us; /* of the daemon, while these were asked */
    double wall_s;
};

struct eval {
    struct eval_plan plan;
    struct eval_cell *cells; /* [n_lengths][RULER_N_TASKS][n_policies] */
    bool disturbed;          /* somebody else used a daemon during a turn */
    bool limited;            /* the limit ended it */
};

void eval_init(struct eval *e, const struct eval_plan *plan);
void eval_deinit(struct eval *e);
struct eval_cell *eval_cell(const struct eval *e, int length, int task, int policy);

/* Prompt `index` of a cell; release with ruler_prompt_deinit. */
MUST_CHECK int eval_prompt(const struct eval_plan *p, struct ruler_prompt *out,
                           enum ruler_task task, int32_t length, int32_t index,
                           struct err_msg *why);
/* Connects to every policy's daemon and checks that it can serve the plan. Returns an exit code;
 * connections are closed by eval_disconnect, also after a failure. */
int eval_connect(struct eval_plan *p);
void eval_disconnect(struct eval_plan *p);
/* Asks everything; returns an exit code. Failed requests are failures in the answers; when a daemon
 * is lost, the cells hold what was asked until then. */
int eval_run(struct eval *e);

#endif
