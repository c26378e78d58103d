#include "cmd/cli_eval_report.h"

#include "cmd/cli_report.h"
#include "core/mem.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <string.h>

/* Tasks that are also told together: those that thresholds are calibrated on, and the others. */
static const uint32_t niah = (1u << RULER_N_NIAH) - 1;

struct group {
    const char *name;
    uint32_t tasks;
};
enum { MAX_GROUPS = RULER_N_TASKS + 3 };

/* Each task of the plan, then the groups that hold more than one. */
static int groups_of(struct group out[MAX_GROUPS], const struct eval_plan *p)
{
    const struct group sums[] = {{"all niah", p->tasks & niah}, {"all other", p->tasks & ~niah}};
    int n = 0;
    for (int t = 0; t < RULER_N_TASKS; t++) {
        if (p->tasks >> t & 1)
            out[n++] = (struct group){ruler_task_name((enum ruler_task)t), 1u << t};
    }
    for (int i = 0; i < 2; i++) {
        if (sums[i].tasks & (sums[i].tasks - 1))
            out[n++] = sums[i];
    }
    if (sums[0].tasks && sums[1].tasks)
        out[n++] = (struct group){"all", p->tasks};
    return n;
}

/* Values of a row's prompts, each [capacity]. */
struct columns {
    double *score, *exact, *density, *ttft, *paired, *base, *decode, *token, *lost;
    int32_t n, n_pairs;
};

static void gather(struct columns *c, struct eval_row *row, const struct eval *e, int length,
                   int task, int policy)
{
    const struct eval_cell *cell = eval_cell(e, length, task, policy);
    const struct eval_cell *first = eval_cell(e, length, task, 0);
    for (int32_t i = 0; i < e->plan.n_samples && i < cell->n_asked; i++) {
        const struct eval_answer *a = &cell->answers[i], *b = &first->answers[i];
        if (!a->ok) {
            row->failed++;
            continue;
        }
        c->score[c->n] = a->score;
        c->exact[c->n] = a->exact;
        c->density[c->n] = a->density;
        c->decode[c->n] = a->decode_density;
        c->token[c->n] = a->token_s * 1e3;
        c->lost[c->n] = a->lost_mass;
        c->ttft[c->n++] = a->ttft_s * 1e3;
        row->cached += a->cached;
        if (i < first->n_asked && b->ok) {
            c->paired[c->n_pairs] = a->score;
            c->base[c->n_pairs++] = b->score;
        }
    }
}

static double mean(const double *x, int32_t n)
{
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++)
        sum += x[i];
    return n ? sum / n : 0.0;
}

static double deviation(const double *x, int32_t n)
{
    double m = mean(x, n), sum = 0.0;
    for (int32_t i = 0; i < n; i++)
        sum += (x[i] - m) * (x[i] - m);
    return n > 1 ? sqrt(sum / (n - 1)) : 0.0;
}

void eval_row(struct eval_row *out, const struct eval *e, int length, uint32_t tasks, int policy)
{
    size_t cap = (size_t)e->plan.n_samples * RULER_N_TASKS;
    double *all = mem_zalloc(9 * cap, sizeof *all);
    struct columns c = {all,
                        all + cap,
                        all + 2 * cap,
                        all + 3 * cap,
                        all + 4 * cap,
                        all + 5 * cap,
                        all + 6 * cap,
                        all + 7 * cap,
                        all + 8 * cap,
                        0,
                        0};
    int64_t attention_us = 0, asked = 0;
    *out = (struct eval_row){0};
    for (int t = 0; t < RULER_N_TASKS; t++) {
        if (!(tasks >> t & 1))
            continue;
        const struct eval_cell *cell = eval_cell(e, length, t, policy);
        gather(&c, out, e, length, t, policy);
        attention_us += cell->attention_us;
        asked += cell->n_asked;
    }
    out->n = c.n;
    out->score = interval_mean(c.score, c.n);
    out->exact = interval_mean(c.exact, c.n);
    out->change = interval_difference(c.paired, c.base, c.n_pairs);
    out->density = mean(c.density, c.n);
    out->density_std = deviation(c.density, c.n);
    out->decode_density = mean(c.decode, c.n);
    out->token_ms = mean(c.token, c.n);
    out->lost_mass = mean(c.lost, c.n);
    out->ttft_ms = mean(c.ttft, c.n);
    out->ttft_median_ms = report_percentile(c.ttft, c.n, 50.0);
    out->attention_ms = asked ? (double)attention_us / 1e3 / (double)asked : 0.0;
    mem_free(all);
}

/* "1.38x", or nothing where one of the two was not measured. */
static void print_ratio(FILE *to, double base, double value)
{
    if (base > 0.0 && value > 0.0)
        (void)fprintf(to, " %6.2fx", base / value);
    else
        (void)fprintf(to, " %7s", "");
}

/* width: of the longest policy's name. */
static void print_row(const struct eval_plan *p, int policy, int width, const struct eval_row *r,
                      const struct eval_row *first, FILE *to)
{
    const char *name = p->policies[policy].name;
    (void)fprintf(to, "  %-*s %5d %6.3f [%5.3f %5.3f] %6.3f", width, name, r->n, r->score.mean,
                  r->score.low, r->score.high, r->exact.mean);
    if (policy == 0)
        (void)fprintf(to, " %22s", "");
    else
        (void)fprintf(to, " %+6.3f [%+6.3f %+6.3f]", r->change.mean, r->change.low, r->change.high);
    (void)fprintf(to, " %7.3f %7.3f %9.1f", r->density, r->decode_density, r->ttft_ms);
    print_ratio(to, first->ttft_ms, r->ttft_ms);
    (void)fprintf(to, " %9.1f", r->attention_ms);
    print_ratio(to, first->attention_ms, r->attention_ms);
    if (p->lost_mass)
        (void)fprintf(to, " %9.5f", r->lost_mass);
    if (r->failed)
        (void)fprintf(to, "  %d FAILED", r->failed);
    (void)fputc('\n', to);
}

void eval_print(const struct eval *e, FILE *to)
{
    const struct eval_plan *p = &e->plan;
    struct group groups[MAX_GROUPS];
    int n = groups_of(groups, p), width = 0;
    for (int k = 0; k < p->n_policies; k++)
        width = (int)strlen(p->policies[k].name) > width ? (int)strlen(p->policies[k].name) : width;
    (void)fprintf(to,
                  "%d prompts a task and length, each asked under every policy by %d users; "
                  "seed %llu; 95%% intervals\n",
                  p->n_samples, p->n_users, (unsigned long long)p->seed);
    for (int l = 0; l < p->n_lengths; l++) {
        (void)fprintf(to, "\n%d tokens\n  %-*s %5s %6s %13s %6s %22s %7s %7s %9s %7s %9s%s\n",
                      p->lengths[l], width, "", "n", "score", "interval", "exact",
                      "- dense       interval", "density", "decode", "TTFT ms", "", "attn ms",
                      p->lost_mass ? "         lost mass" : "");
        for (int g = 0; g < n; g++) {
            struct eval_row first, row;
            (void)fprintf(to, "%s\n", groups[g].name);
            eval_row(&first, e, l, groups[g].tasks, 0);
            for (int k = 0; k < p->n_policies; k++) {
                eval_row(&row, e, l, groups[g].tasks, k);
                print_row(p, k, width, &row, &first, to);
            }
        }
    }
    if (e->limited)
        (void)fputs("\nEnded by --limit: fewer prompts were asked, of some tasks a round less.\n",
                    to);
    if (e->disturbed)
        (void)fputs("\nSomebody else used a daemon meanwhile: times are not of these requests "
                    "alone.\n",
                    to);
}

int32_t eval_failed(const struct eval *e)
{
    int32_t n = 0;
    for (int l = 0; l < e->plan.n_lengths; l++) {
        for (int k = 0; k < e->plan.n_policies; k++) {
            struct eval_row row;
            eval_row(&row, e, l, e->plan.tasks, k);
            n += row.failed;
        }
    }
    return n;
}

static json_t *row_json(const struct eval *e, int length, const struct group *g, int policy)
{
    struct eval_row r;
    eval_row(&r, e, length, g->tasks, policy);
    json_t *out = json_pack(
        "{s:i, s:s, s:b, s:s, s:i, s:i, s:f, s:[ff], s:f, s:[ff], s:f, s:[ff], s:f, s:f, s:f, s:f, "
        "s:f, s:I, s:f, s:f, s:f, s:f}",
        "length", e->plan.lengths[length], "task", g->name, "group",
        (int)((g->tasks & (g->tasks - 1)) != 0), "policy", e->plan.policies[policy].name, "n", r.n,
        "failed", r.failed, "score", r.score.mean, "score_interval", r.score.low, r.score.high,
        "exact", r.exact.mean, "exact_interval", r.exact.low, r.exact.high, "change", r.change.mean,
        "change_interval", r.change.low, r.change.high, "density", r.density, "density_std",
        r.density_std, "ttft_ms", r.ttft_ms, "ttft_median_ms", r.ttft_median_ms, "attention_ms",
        r.attention_ms, "cached_tokens", (json_int_t)r.cached, "density_asked",
        e->plan.policies[policy].request.density, "decode_density", r.decode_density,
        "decode_density_asked", e->plan.policies[policy].request.decode_density, "token_ms",
        r.token_ms);
    if (out && e->plan.lost_mass)
        (void)json_object_set_new(out, "lost_mass", json_real(r.lost_mass));
    return out;
}

int eval_write_json(const struct eval *e, const char *path, struct err_msg *why)
{
    const struct eval_plan *p = &e->plan;
    const struct sluice_info *info = sluice_get_info(p->policies[0].control);
    struct group groups[MAX_GROUPS];
    int n = groups_of(groups, p);
    json_t *rows = json_array(), *policies = json_array();
    for (int k = 0; k < p->n_policies; k++)
        (void)json_array_append_new(policies, json_string(p->policies[k].name));
    for (int l = 0; l < p->n_lengths; l++) {
        for (int g = 0; g < n; g++) {
            for (int k = 0; k < p->n_policies; k++)
                (void)json_array_append_new(rows, row_json(e, l, &groups[g], k));
        }
    }
    json_t *out = json_pack(
        "{s:s, s:s, s:s, s:I, s:s, s:i, s:i, s:i, s:o, s:b, s:b, s:o}", "version", info->version,
        "model", info->model, "device", info->device, "seed", (json_int_t)p->seed, "set",
        p->set == RULER_CALIBRATE ? "calibrate" : "evaluate", "samples", p->n_samples, "users",
        p->n_users, "round", p->n_round, "policies", policies, "disturbed", (int)e->disturbed,
        "limited", (int)e->limited, "rows", rows);
    int err = strcmp(path, "-") == 0 ? json_dumpf(out, stdout, JSON_INDENT(1))
                                     : json_dump_file(out, path, JSON_INDENT(1));
    json_decref(out);
    return err < 0 ? err_set(why, -errno, "cannot write %s: %s", path, err_str(-errno)) : 0;
}
