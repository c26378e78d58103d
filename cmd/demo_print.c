#include "cmd/demo_print.h"

#include <inttypes.h>
#include <string.h>

static double seconds(int64_t us)
{
    return (double)us / 1e6;
}

static double density(uint64_t kept, uint64_t reachable)
{
    return reachable ? (double)kept / (double)reachable : 1.0;
}

void demo_print_cast(const struct demo_prompt prompts[DEMO_USERS], FILE *to)
{
    for (int u = 0; u < DEMO_USERS; u++)
        (void)fprintf(to, "  %s  %6d tokens  %-16s %s\n", demo_users[u].name, prompts[u].prompt.n,
                      prompts[u].task, demo_users[u].describe);
}

/* The part of an answer that was looked for, as ids; cut to fit its column. */
static void answer_text(const struct demo_answer *a, char *out, size_t cap)
{
    size_t n = 0;
    out[0] = '\0';
    for (int32_t i = 0; i < a->n_tokens && n < cap; i++)
        n += (size_t)snprintf(out + n, cap - n, "%s%d", i ? " " : "", a->tokens[i]);
    if (n >= cap)
        memcpy(out + cap - 4, "...", 4);
}

static void print_user(const struct demo_prompt *p, const struct demo_answer *a, int u, FILE *to)
{
    char answer[33];
    (void)fprintf(to, "  %s   %-16s %6d %7d ", demo_users[u].name, p->task, p->prompt.n, a->cached);
    switch (a->state) {
    case DEMO_ANSWERED:
        answer_text(a, answer, sizeof answer);
        (void)fprintf(to, "%7.2f s  %-32s  %-5s %8.3f\n", seconds(a->ttft_us), answer,
                      a->exact ? "right" : "wrong", density(a->kept, a->reachable));
        break;
    case DEMO_LEFT:
        (void)fprintf(to, "%9s  disconnected after %d tokens\n", "-", a->computed);
        break;
    case DEMO_AWAY:
    case DEMO_WAITING:
    case DEMO_BROKEN: (void)fprintf(to, "%9s  %s\n", "-", a->problem); break;
    }
}

void demo_print_round(const struct demo_prompt prompts[DEMO_USERS], const struct demo_mode *mode,
                      const struct demo_round *round, FILE *to)
{
    (void)fprintf(to, "\n%s\n  %-5s %-16s %6s %7s %9s  %-32s  %-5s %8s\n", mode->name, "user",
                  "task", "prompt", "cached", "TTFT", "answer", "", "density");
    for (int u = 0; u < DEMO_USERS; u++)
        print_user(&prompts[u], &round->users[u], u, to);
}

enum { N_FIGURES = 8 };

struct figure {
    const char *name;
    char text[DEMO_MODES][24];
};

static void put_counts(struct figure f[N_FIGURES], int m, const struct demo_round *r)
{
    int right = 0, asked = 0;
    double score = 0, ttft = 0;
    for (int u = 0; u < DEMO_USERS; u++) {
        const struct demo_answer *a = &r->users[u];
        if (a->state == DEMO_LEFT)
            continue;
        asked++;
        right += a->exact;
        score += a->score;
        ttft += seconds(a->ttft_us);
    }
    if (asked == 0)
        return;
    (void)snprintf(f[0].text[m], sizeof f[0].text[m], "%d of %d", right, asked);
    (void)snprintf(f[1].text[m], sizeof f[1].text[m], "%.3f", score / asked);
    (void)snprintf(f[2].text[m], sizeof f[2].text[m], "%.2f s", ttft / asked);
}

static void put_stats(struct figure f[N_FIGURES], int m, const struct demo_round *r)
{
    const struct demo_stats *a = &r->before, *b = &r->after;
    int64_t kept = b->pages_kept - a->pages_kept, all = b->pages_reachable - a->pages_reachable;
    (void)snprintf(f[3].text[m], sizeof f[3].text[m], "%.2f s", seconds(r->wall_us));
    (void)snprintf(f[4].text[m], sizeof f[4].text[m], "%.2f s",
                   seconds(b->attention_us - a->attention_us));
    (void)snprintf(f[5].text[m], sizeof f[5].text[m], "%.2f s", seconds(b->gemm_us - a->gemm_us));
    (void)snprintf(f[6].text[m], sizeof f[6].text[m], "%.3f",
                   density((uint64_t)kept, (uint64_t)all));
    (void)snprintf(f[7].text[m], sizeof f[7].text[m], "%" PRId64 " of %" PRId64, r->peak_pages,
                   b->kv_pages_total);
}

void demo_print_totals(const struct demo_mode modes[DEMO_MODES],
                       const struct demo_round rounds[DEMO_MODES], int32_t page_tokens, FILE *to)
{
    static const char *const names[N_FIGURES] = {"right answers",
                                                 "RULER score",
                                                 "mean time to first token",
                                                 "until all were answered",
                                                 "attention time",
                                                 "matrix multiplication time",
                                                 "measured density",
                                                 "most cache pages in use"};
    struct figure f[N_FIGURES] = {0};
    for (int i = 0; i < N_FIGURES; i++)
        f[i].name = names[i];
    for (int m = 0; m < DEMO_MODES; m++) {
        put_counts(f, m, &rounds[m]);
        put_stats(f, m, &rounds[m]);
    }
    (void)fprintf(to, "\n%-28s", "totals");
    for (int m = 0; m < DEMO_MODES; m++)
        (void)fprintf(to, "%18s", modes[m].name);
    for (int i = 0; i < N_FIGURES; i++) {
        (void)fprintf(to, "\n  %-26s", f[i].name);
        for (int m = 0; m < DEMO_MODES; m++)
            (void)fprintf(to, "%18s", f[i].text[m]);
    }
    (void)fprintf(to, "\n  (a page holds %d tokens of all layers)\n", page_tokens);
}

int demo_problems(const struct demo_mode *mode, const struct demo_round *round, bool must_be_right,
                  FILE *to)
{
    int n = 0;
    for (int u = 0; u < DEMO_USERS; u++) {
        const struct demo_answer *a = &round->users[u];
        bool should_leave = demo_users[u].leaves_at > 0;
        const char *problem = a->state == DEMO_BROKEN                 ? a->problem
                              : should_leave && a->state != DEMO_LEFT ? "was to leave but did not"
                              : must_be_right && a->state == DEMO_ANSWERED && !a->exact
                                  ? "got a wrong answer"
                                  : NULL;
        if (problem) {
            (void)fprintf(to, "%s: %s %s\n", mode->name, demo_users[u].name, problem);
            n++;
        }
    }
    if (round->leaked) {
        (void)fprintf(to,
                      "%s: %" PRId64 " cache pages in use, %" PRId64
                      " requests running and %" PRId64 " waiting after everybody was gone\n",
                      mode->name, round->after.kv_pages_used, round->after.requests_running,
                      round->after.requests_waiting);
        n++;
    }
    if (round->after.errors > round->before.errors) {
        (void)fprintf(to, "%s: the daemon counted %" PRId64 " errors\n", mode->name,
                      round->after.errors - round->before.errors);
        n++;
    }
    return n;
}
