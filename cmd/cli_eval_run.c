#include "cmd/cli_eval_run.h"

#include "cmd/cli_bench_run.h"
#include "cmd/demo_stats.h"
#include "core/clock.h"
#include "core/hash.h"
#include "core/mem.h"

#include <inttypes.h>
#include <string.h>
#include <unistd.h>

enum { MAX_FAILURES_SHOWN = 3 /* of a policy */ };

/* The prompts of a round, and one policy's answers to them. */
struct turn {
    struct ruler_prompt *prompts; /* [n] */
    int32_t (*answers)[RULER_MAX_ANSWER];
    int32_t *n_answers; /* [n] */
    int32_t n;
};

struct runner {
    struct eval *e;
    uint64_t salt; /* of this run: nothing cached before is used */
    struct clock clock;
    int64_t start_us;
    int32_t n_rounds, round, pass, n_shown[EVAL_MAX_POLICIES];
    bool warm[EVAL_MAX_LENGTHS];
};

void eval_init(struct eval *e, const struct eval_plan *plan)
{
    *e = (struct eval){.plan = *plan};
    e->cells = mem_zalloc((size_t)plan->n_lengths * RULER_N_TASKS * (size_t)plan->n_policies,
                          sizeof *e->cells);
    for (int l = 0; l < plan->n_lengths; l++) {
        for (int t = 0; t < RULER_N_TASKS; t++) {
            for (int p = 0; p < plan->n_policies && plan->tasks >> t & 1; p++)
                eval_cell(e, l, t, p)->answers =
                    mem_zalloc((size_t)plan->n_samples, sizeof(struct eval_answer));
        }
    }
}

void eval_deinit(struct eval *e)
{
    for (int i = 0; i < e->plan.n_lengths * RULER_N_TASKS * e->plan.n_policies; i++)
        mem_free(e->cells[i].answers);
    mem_free(e->cells);
}

struct eval_cell *eval_cell(const struct eval *e, int length, int task, int policy)
{
    return &e->cells[(length * RULER_N_TASKS + task) * e->plan.n_policies + policy];
}

int eval_prompt(const struct eval_plan *p, struct ruler_prompt *out, enum ruler_task task,
                int32_t length, int32_t index, struct err_msg *why)
{
    ruler_seed(p->ruler, ruler_sample_seed(p->seed, p->set, task, length, index));
    return ruler_make(p->ruler, out, task, length, why);
}

static int check_daemon(const struct eval_plan *p, const struct eval_policy *policy)
{
    const struct sluice_info *info = sluice_get_info(policy->control);
    if (info->vocab != p->vocab.size)
        return cli_fail(CLI_USAGE, "eval: the model of %s has %d tokens, those of --tokens are %d",
                        policy->target.connect, info->vocab, p->vocab.size);
    for (int l = 0; l < p->n_lengths; l++) {
        if (info->max_servable_tokens && p->lengths[l] > info->max_servable_tokens)
            return cli_fail(CLI_USAGE, "eval: %s serves %d tokens, --lengths has %d",
                            policy->target.connect, info->max_servable_tokens, p->lengths[l]);
    }
    return CLI_OK;
}

int eval_connect(struct eval_plan *p)
{
    for (int i = 0; i < p->n_policies; i++) {
        int code = cli_connect(&p->policies[i].control, &p->policies[i].target);
        if (code == CLI_OK)
            code = check_daemon(p, &p->policies[i]);
        if (code != CLI_OK)
            return code;
    }
    return CLI_OK;
}

void eval_disconnect(struct eval_plan *p)
{
    for (int i = 0; i < p->n_policies; i++)
        sluice_close(p->policies[i].control);
}

static void give_prompt(void *ctx, int32_t i, struct sluice_request *r)
{
    const struct turn *t = ctx;
    r->tokens = t->prompts[i].tokens;
}

static void take_tokens(void *ctx, int32_t i, const int32_t *ids, int32_t n)
{
    struct turn *t = ctx;
    for (int32_t k = 0; k < n && t->n_answers[i] < RULER_MAX_ANSWER; k++)
        t->answers[i][t->n_answers[i]++] = ids[k];
}

static void turn_init(struct turn *t, int32_t n)
{
    *t = (struct turn){.n = n};
    t->prompts = mem_zalloc((size_t)n, sizeof *t->prompts);
    t->answers = mem_zalloc((size_t)n, sizeof *t->answers);
    t->n_answers = mem_zalloc((size_t)n, sizeof *t->n_answers);
}

static void turn_deinit(struct turn *t)
{
    for (int32_t i = 0; i < t->n; i++)
        ruler_prompt_deinit(&t->prompts[i]);
    mem_free(t->prompts);
    mem_free(t->answers);
    mem_free(t->n_answers);
}

/* All users ask the round's prompts under one policy. */
static int ask(struct runner *r, struct turn *t, int policy, struct bench_sample *samples,
               double *wall_s)
{
    const struct eval_plan *p = &r->e->plan;
    const struct eval_policy *how = &p->policies[policy];
    uint64_t salt = hash_pair(r->salt, (uint64_t)policy);
    char label[160];
    struct load load = {mem_zalloc((size_t)t->n, sizeof *load.requests), t->n};
    struct bench_plan b = {.target = &how->target,
                           .load = &load,
                           .request = how->request,
                           .n_connections = p->n_users < t->n ? p->n_users : t->n,
                           .progress = p->progress,
                           .label = label,
                           .hooks = {t, give_prompt, take_tokens}};
    b.max_concurrency = b.n_connections;
    b.request.temperature = 0.0;
    b.request.cache_salt = (const uint8_t *)&salt;
    b.request.n_salt = sizeof salt;
    b.request.lost_mass = p->lost_mass;
    for (int32_t i = 0; i < t->n; i++) {
        load.requests[i].input_len = t->prompts[i].n_tokens;
        load.requests[i].output_len = t->prompts[i].n_expected;
        t->n_answers[i] = 0;
    }
    (void)snprintf(label, sizeof label, "round %d of %d: %s at %d, %s: ", r->round + 1, r->n_rounds,
                   ruler_task_name(t->prompts[0].task), t->prompts[0].length, how->name);
    int code = bench_run(&b, samples, wall_s);
    load_deinit(&load);
    return code;
}

static void write_answer(struct runner *r, const struct turn *t, int32_t i, int32_t index,
                         int policy, const struct eval_answer *a)
{
    const struct eval_plan *p = &r->e->plan;
    const struct ruler_prompt *q = &t->prompts[i];
    uint64_t seed = ruler_sample_seed(p->seed, p->set, q->task, q->length, index);
    if (!p->out)
        return;
    (void)fprintf(p->out,
                  "{\"task\":\"%s\",\"length\":%d,\"index\":%d,\"seed\":%" PRIu64
                  ",\"policy\":\"%s\",\"ok\":%s,\"score\":%.6g,\"exact\":%s,\"density\":%.6g,"
                  "\"decode_density\":%.6g,\"ttft_ms\":%.6g,\"cached_tokens\":%d,",
                  ruler_task_name(q->task), q->length, index, seed, p->policies[policy].name,
                  a->ok ? "true" : "false", a->score, a->exact ? "true" : "false", a->density,
                  a->decode_density, a->ttft_s * 1e3, a->cached);
    if (p->lost_mass)
        (void)fprintf(p->out, "\"lost_mass\":%.6g,", a->lost_mass);
    (void)fputs("\"answer\":[", p->out);
    for (int32_t k = 0; k < t->n_answers[i]; k++)
        (void)fprintf(p->out, "%s%d", k ? "," : "", t->answers[i][k]);
    (void)fputs("]}\n", p->out);
}

static void judge(struct runner *r, const struct turn *t, int32_t i, int policy,
                  const struct bench_sample *s, struct eval_answer *a)
{
    struct score_key key;
    ruler_score_key(&key, &t->prompts[i]);
    *a = (struct eval_answer){.ok = s->ok,
                              .ttft_s = s->ttft_s,
                              .cached = s->cached,
                              .density = 1.0,
                              .decode_density = 1.0,
                              .lost_mass = s->lost_mass,
                              .score = score_ruler(&key, t->answers[i], t->n_answers[i]),
                              .exact = score_exact(&key, t->answers[i], t->n_answers[i])};
    if (s->reachable)
        a->density = (double)s->kept / (double)s->reachable;
    if (s->decode_reachable)
        a->decode_density = (double)s->decode_kept / (double)s->decode_reachable;
    if (s->output_len > 1)
        a->token_s = s->decode_s / (s->output_len - 1);
    if (!s->ok && r->n_shown[policy]++ < MAX_FAILURES_SHOWN)
        (void)cli_fail(0, "eval: %s: %s at %d: %s", r->e->plan.policies[policy].name,
                       ruler_task_name(t->prompts[i].task), t->prompts[i].length, s->error);
}

/* Whether the daemon admitted other prompts than this turn's. */
static bool disturbed(const struct turn *t, const struct bench_sample *samples,
                      const struct demo_stats *before, const struct demo_stats *after)
{
    int64_t n = after->prompt_tokens - before->prompt_tokens;
    bool sure = true; /* set back, a prompt may count twice; refused, not at all */
    for (int32_t i = 0; i < t->n; i++) {
        n -= t->prompts[i].n_tokens;
        sure &= samples[i].ok && samples[i].preemptions == 0;
    }
    return sure && n != 0;
}

/* The turn of one policy: asks, and keeps what came. first: index of the round's first prompt. */
static int play(struct runner *r, struct turn *t, int length, int policy, int32_t first)
{
    struct eval *e = r->e;
    struct eval_cell *cell = eval_cell(e, length, (int)t->prompts[0].task, policy);
    struct sluice_client *control = e->plan.policies[policy].control;
    struct demo_stats before, after;
    struct err_msg why = {""};
    double wall_s = 0.0;
    if (demo_stats_read(&before, control, &why) < 0)
        return cli_fail(CLI_UNREACHABLE, "eval: %s", why.text);
    struct bench_sample *samples = mem_zalloc((size_t)t->n, sizeof *samples);
    int code = ask(r, t, policy, samples, &wall_s);
    if (code == CLI_OK) {
        for (int32_t i = 0; i < t->n; i++) {
            struct eval_answer *a = &cell->answers[first + i];
            judge(r, t, i, policy, &samples[i], a);
            write_answer(r, t, i, first + i, policy, a);
        }
        cell->n_asked += t->n;
        cell->wall_s += wall_s;
        if (demo_stats_read(&after, control, &why) < 0) {
            code = cli_fail(CLI_UNREACHABLE, "eval: %s", why.text);
        } else {
            cell->attention_us += after.attention_us - before.attention_us;
            e->disturbed |= disturbed(t, samples, &before, &after);
        }
    }
    bench_samples_free(samples, t->n);
    return code;
}

/* Prompts first .. first + n - 1 of a length and task, under every policy, from `begins` on. */
static int play_round(struct runner *r, int length, enum ruler_task task, int32_t first, int32_t n,
                      int begins)
{
    const struct eval_plan *p = &r->e->plan;
    struct turn t;
    struct err_msg why = {""};
    int code = CLI_OK;
    turn_init(&t, n);
    for (int32_t i = 0; i < n && code == CLI_OK; i++) {
        if (eval_prompt(p, &t.prompts[i], task, p->lengths[length], first + i, &why) < 0)
            code = cli_fail(CLI_USAGE, "eval: %s", why.text);
    }
    for (int i = 0; i < p->n_policies && code == CLI_OK; i++)
        code = play(r, &t, length, (begins + i) % p->n_policies, first);
    turn_deinit(&t);
    r->round++;
    return code;
}

/* Prompts that are not counted, of the other set: the first steps of a length pay for what a daemon
 * sets up once. */
static int warm_up(struct runner *r, int length, enum ruler_task task)
{
    struct eval_plan other = r->e->plan;
    struct turn t;
    struct err_msg why = {""};
    double wall_s;
    int code = CLI_OK;
    if (other.n_warmups == 0)
        return CLI_OK;
    other.set = other.set == RULER_EVALUATE ? RULER_CALIBRATE : RULER_EVALUATE;
    turn_init(&t, other.n_warmups);
    for (int32_t i = 0; i < t.n && code == CLI_OK; i++) {
        if (eval_prompt(&other, &t.prompts[i], task, other.lengths[length], i, &why) < 0)
            code = cli_fail(CLI_USAGE, "eval: %s", why.text);
    }
    for (int i = 0; i < other.n_policies && code == CLI_OK; i++) {
        struct bench_sample *samples = mem_zalloc((size_t)t.n, sizeof *samples);
        code = ask(r, &t, i, samples, &wall_s);
        bench_samples_free(samples, t.n);
    }
    turn_deinit(&t);
    return code;
}

/* One round of every length and task, from prompt `first` on. */
static int run_pass(struct runner *r, int32_t first)
{
    struct eval *e = r->e;
    const struct eval_plan *p = &e->plan;
    int32_t left = p->n_samples - first, n = left < p->n_round ? left : p->n_round;
    int begins = r->pass++, code = CLI_OK;
    for (int i = 0; i < p->n_lengths * RULER_N_TASKS && code == CLI_OK && !e->limited; i++) {
        int length = i / RULER_N_TASKS, task = i % RULER_N_TASKS;
        if (!(p->tasks >> task & 1))
            continue;
        if (!r->warm[length])
            code = warm_up(r, length, (enum ruler_task)task);
        r->warm[length] = true;
        if (code == CLI_OK)
            code = play_round(r, length, (enum ruler_task)task, first, n, begins++);
        e->limited = p->limit_ms && clock_now_us(&r->clock) - r->start_us > p->limit_ms * 1000;
    }
    return code;
}

int eval_run(struct eval *e)
{
    const struct eval_plan *p = &e->plan;
    struct runner r = {.e = e, .clock = clock_real()};
    int code = CLI_OK;
    r.start_us = clock_now_us(&r.clock);
    r.salt = hash_pair((uint64_t)r.start_us, (uint64_t)getpid());
    for (int t = 0; t < RULER_N_TASKS; t++)
        r.n_rounds += p->tasks >> t & 1 ? (p->n_samples + p->n_round - 1) / p->n_round : 0;
    r.n_rounds *= p->n_lengths;
    for (int32_t i = 0; i < p->n_samples && code == CLI_OK && !e->limited; i += p->n_round)
        code = run_pass(&r, i);
    e->limited = e->limited && r.round < r.n_rounds;
    return code;
}
