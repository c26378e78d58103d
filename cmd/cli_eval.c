/* sluice eval: RULER tasks on a running daemon, under several attention policies at once. Accuracy
 * with intervals, differences to dense on the same prompts, density and times. With --print it
 * writes the prompts instead, for sluice-calibrate and others. */
#include "cmd/cli_eval_print.h"
#include "cmd/cli_eval_report.h"
#include "cmd/cli_parse.h"
#include "core/mem.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

struct eval_options {
    struct cli_target target;
    char *tokens, *tasks, *lengths, *policy, *json, *out, *print;
    int64_t samples, seed, concurrency, round, num_warmups, limit_ms;
    int set;
    bool lost_mass;
};

#define O struct eval_options

static const struct conf_opt options[] = {
    CLI_TARGET_OPTS(O),
    CLI_TEXT(O, tokens, "tokens", "models/needle/tokens.json", "FILE",
             "vocabulary of the tasks: that of the model"),
    CLI_TEXT(O, tasks, "tasks", "niah,vt,cwe,fwe,qa", "LIST",
             "tasks by their names in that file, or niah (all eight), qa (both), all"),
    CLI_TEXT(O, lengths, "lengths", "8192", "LIST",
             "lengths, 8192 or 8k; a prompt has 128 tokens less, which leaves room to answer"),
    CLI_INT(O, samples, "samples", "16", 1, 1e6, "prompts of every task and length"),
    CLI_INT(O, seed, "seed", "0", 0, 9e18, "of the prompts"),
    {"set",
     CONF_ENUM,
     offsetof(O, set),
     "evaluate",
     0,
     0,
     {"evaluate", "calibrate", NULL},
     "NAME",
     "evaluate or calibrate: no prompt of one set is in the other, whatever the seeds"},
    CLI_TEXT(O, policy, "policy", "dense,auto", "LIST",
             "attention policies: dense, auto, abs:K, rel:LN (logarithm of lambda), rel=LAMBDA, "
             "abs~D, rel~D (a density); "
             "/64 or /128 after one sets its gate rows, +decode~D after that the density of "
             "generated tokens, @ADDR asks another daemon; dense is always first"),
    CLI_INT(O, concurrency, "concurrency", "8", 1, 1024, "users, each with one open request"),
    CLI_INT(O, round, "round", "0", 0, 1e6,
            "prompts that a policy answers before the next one's turn; 0 is four a user"),
    CLI_INT(O, num_warmups, "num-warmups", "1", 0, 1e6,
            "prompts of each length and policy before the measured ones"),
    CLI_MS(O, limit_ms, "limit", "0",
           "begin no round after this time, and report what was asked; 0 is no limit"),
    CLI_BOOL(O, lost_mass, "lost-mass", "false",
             "measure on a sample of each prompt's rows the softmax mass of the pages not used"),
    CLI_TEXT(O, out, "out", NULL, "FILE", "write every answer and its figures, JSON lines"),
    CLI_TEXT(O, json, "json", NULL, "FILE",
             "write the figures as one JSON object; - is standard output, instead of the table"),
    CLI_TEXT(O, print, "print", NULL, "FILE",
             "write the prompts, JSON lines for sluice-calibrate --samples, and ask nothing; - is "
             "standard output"),
};

static const struct conf_program program = {
    "sluice eval --connect unix:PATH [options]",
    "Asks a daemon RULER tasks under several attention policies; prints accuracy, density and "
    "times side by side.",
    options, sizeof options / sizeof options[0]};

/* Adds the tasks that a word stands for; the file must define each. */
static int add_tasks(struct eval_plan *p, const char *word, struct err_msg *why)
{
    static const struct {
        const char *name;
        uint32_t tasks;
    } sums[] = {{"niah", (1u << RULER_N_NIAH) - 1},
                {"qa", 1u << RULER_QA_1 | 1u << RULER_QA_2},
                {"all", (1u << RULER_N_TASKS) - 1}};
    uint32_t tasks = 0;
    int one = ruler_task_find(word);
    for (int i = 0; i < 3; i++)
        tasks |= strcmp(word, sums[i].name) == 0 ? sums[i].tasks : 0;
    tasks |= one < 0 ? 0 : 1u << one;
    if (!tasks)
        return err_set(why, ERR_CONFIG, "--tasks: '%.60s' is not a task", word);
    for (int t = 0; t < RULER_N_TASKS; t++) {
        if ((tasks & ~p->vocab.tasks) >> t & 1)
            return err_set(why, ERR_CONFIG, "--tasks: --tokens defines no tasks.%s",
                           ruler_task_name((enum ruler_task)t));
    }
    p->tasks |= tasks;
    return 0;
}

static int parse_tasks(struct eval_plan *p, const char *text, struct err_msg *why)
{
    char *copy = mem_strdup(text), *save = NULL;
    int err = 0;
    for (char *w = strtok_r(copy, ", ", &save); w && err == 0; w = strtok_r(NULL, ", ", &save))
        err = add_tasks(p, w, why);
    if (err == 0 && !p->tasks)
        err = err_set(why, ERR_CONFIG, "--tasks names none");
    mem_free(copy);
    return err;
}

static int add_policy(struct eval_plan *p, char *word, const struct cli_target *target,
                      struct err_msg *why)
{
    struct err_msg inner = {""};
    const char *address;
    for (int i = 0; i < p->n_policies; i++) {
        if (strcmp(p->policies[i].name, word) == 0)
            return i == 0 ? 0 : err_set(why, ERR_CONFIG, "--policy: '%s' comes twice", word);
    }
    if (p->n_policies == EVAL_MAX_POLICIES)
        return err_set(why, ERR_CONFIG, "--policy: at most %d", EVAL_MAX_POLICIES);
    struct eval_policy *x = &p->policies[p->n_policies++];
    *x = (struct eval_policy){.name = word, .target = *target};
    sluice_request_init(&x->request);
    int err = cli_parse_policy(&x->request, &address, word, &inner);
    if (err < 0)
        return err_set(why, err, "--policy: %.300s", inner.text);
    if (address)
        x->target.connect = word + (address - word);
    return 0;
}

/* Words are cut out of `text`, which the plan then refers to. */
static int parse_policies(struct eval_plan *p, char *text, const struct cli_target *target,
                          struct err_msg *why)
{
    char *save = NULL;
    static char dense[] = "dense";
    TRY(add_policy(p, dense, target, why));
    for (char *w = strtok_r(text, ", ", &save); w; w = strtok_r(NULL, ", ", &save))
        TRY(add_policy(p, w, target, why));
    return 0;
}

static int make_plan(struct eval_plan *p, const struct eval_options *o, char *policies,
                     struct err_msg *why)
{
    struct err_msg inner = {""};
    *p = (struct eval_plan){.n_samples = (int32_t)o->samples,
                            .n_users = (int32_t)o->concurrency,
                            .n_warmups = (int32_t)o->num_warmups,
                            .limit_ms = o->limit_ms,
                            .seed = (uint64_t)o->seed,
                            .set = (enum ruler_set)o->set,
                            .lost_mass = o->lost_mass,
                            .progress = isatty(STDERR_FILENO) == 1};
    p->n_round = o->round ? (int32_t)o->round : 4 * p->n_users;
    int err = ruler_vocab_load(&p->vocab, o->tokens, &inner);
    if (err < 0)
        return err_set(why, err, "--tokens: %.300s", inner.text);
    TRY(parse_tasks(p, o->tasks, why));
    p->n_lengths = cli_parse_lengths(p->lengths, EVAL_MAX_LENGTHS, o->lengths, &inner);
    if (p->n_lengths < 1)
        return err_set(why, ERR_CONFIG, "--lengths: %.300s", inner.text[0] ? inner.text : "none");
    for (int i = 0; i < p->n_lengths; i++) {
        if (p->lengths[i] < RULER_MIN_LENGTH || p->lengths[i] > RULER_MAX_LENGTH)
            return err_set(why, ERR_CONFIG, "--lengths: %d is not between %d and %d", p->lengths[i],
                           RULER_MIN_LENGTH, RULER_MAX_LENGTH);
    }
    return parse_policies(p, policies, &o->target, why);
}

static int report(const struct eval *e, const char *json)
{
    struct err_msg why = {""};
    if (!json || strcmp(json, "-") != 0)
        eval_print(e, stdout);
    if (json && eval_write_json(e, json, &why) < 0)
        return cli_fail(CLI_FAILED, "eval: %s", why.text);
    return eval_failed(e) ? CLI_FAILED : CLI_OK;
}

static int measure(struct eval_plan *p, const char *json)
{
    struct eval e;
    int code = eval_connect(p);
    if (code == CLI_OK) {
        eval_init(&e, p);
        code = eval_run(&e);
        int told = report(&e, json); /* of a lost daemon, what there is */
        code = code == CLI_OK ? told : code;
        eval_deinit(&e);
    }
    eval_disconnect(p);
    return code;
}

static int measure_to(struct eval_plan *p, const struct eval_options *o)
{
    int code;
    if (o->out && !(p->out = fopen(o->out, "we")))
        return cli_fail(CLI_USAGE, "eval: cannot write %s: %s", o->out, err_str(-errno));
    if (p->out)
        (void)setvbuf(p->out, NULL, _IOLBF, 0); /* whatever ends the run, its answers are there */
    code = measure(p, o->json);
    if (p->out && fclose(p->out) != 0)
        return cli_fail(CLI_FAILED, "eval: cannot write %s: %s", o->out, err_str(-errno));
    return code;
}

static int run(void *options_arg)
{
    const struct eval_options *o = options_arg;
    struct err_msg why = {""};
    struct eval_plan p;
    char *policies = mem_strdup(o->policy);
    int code;
    if (make_plan(&p, o, policies, &why) < 0) {
        code = cli_fail(CLI_USAGE, "eval: %s", why.text);
    } else {
        ruler_create(&p.ruler, &p.vocab);
        code = o->print ? eval_print_prompts(&p, o->print) : measure_to(&p, o);
        ruler_destroy(p.ruler);
    }
    mem_free(policies);
    return code;
}

const struct cli_command cli_eval = {"eval", &program, run, sizeof(struct eval_options)};
