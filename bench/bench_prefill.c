/* Time to a prompt's first token over ranks: every prompt length dense and under the gates asked
 * for, on one number of ranks after the other, as sluiced opens them. A line a case: median time,
 * tokens a second, speed-up over one rank in the same run, and the shares of attention, GEMMs and
 * sums over the ranks (rank 0's, with its waiting for the others; of sums that run beside products
 * only what the products waited for).
 * The first pass of a case is not timed (but see --quick). Its logits must be those of the first
 * number of ranks but for rounding, and the greedy token the same where rounding cannot change it.
 */
#include "bench/harness.h"
#include "bench/prefill_pass.h"
#include "bench/prefill_ranks.h"
#include "core/log.h"
#include "core/mem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { QUICK_US = 2000000 };

/* What later numbers of ranks are compared with. */
struct reference {
    float *logits; /* [vocab] of the first number of ranks; NULL: not run yet */
    int32_t token;
    double one_rank_us; /* 0: not measured */
    int level;          /* of a mode that is found by its density */
    double off;         /* of the present number's logits from these, by their length */
};

struct bench {
    const struct prefill_options *o;
    struct prefill_ranks ranks;
    struct prefill_runner runner;
    int32_t tp, vocab;
    int32_t *tokens, *pages;
    bool failed;
    struct reference refs[PREFILL_MAX_PROMPTS][PREFILL_MAX_MODES];
};

/* Without freeing: kernels may wait for a lost rank. The copies end with this process. */
static _Noreturn void give_up(int err, const struct err_msg *why)
{
    (void)fprintf(stderr, "bench_prefill: %s\n", err_why(why, err));
    _exit(1);
}

static void must(int err, const struct err_msg *why)
{
    if (err < 0)
        give_up(err, why);
}

/* ---- checks ---- */

/* |a - b| / |a|, and in *spread the standard deviation of a. */
static double distance(const float *a, const float *b, int32_t n, double *spread)
{
    double diff = 0, square = 0, sum = 0;
    for (int32_t i = 0; i < n; i++) {
        diff += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        square += (double)a[i] * (double)a[i];
        sum += (double)a[i];
    }
    *spread = sqrt(fmax(square / n - sum / n * (sum / n), 0));
    return sqrt(diff / fmax(square, 1e-30));
}

/* Told on stderr at once; the run goes on, and fails at its end. */
static void mismatch(struct bench *b, const char *mode, const char *what, double off)
{
    b->failed = true;
    (void)fprintf(stderr, "bench_prefill: tp %d, %s: %s, off by %.3g\n", b->tp, mode, what, off);
}

/* Ranks add in another order, so logits differ by rounding: of f32 sums, or of 16-bit activations
 * through all layers. A gate near its threshold may fall otherwise then. */
static void check(struct bench *b, struct reference *ref, const struct prefill_pass *pass,
                  const struct prefill_mode *mode)
{
    const float *logits = model_last_logits(b->runner.model, 0);
    const size_t bytes = (size_t)b->vocab * sizeof *logits;
    const bool f32 = model_info(b->runner.model)->dtype == DTYPE_F32;
    double spread;

    if (!ref->logits) {
        ref->logits = memcpy(mem_alloc(bytes), logits, bytes);
        ref->token = pass->token;
        return;
    }
    const double off = distance(ref->logits, logits, b->vocab, &spread);
    const double margin = (double)ref->logits[ref->token] - (double)ref->logits[pass->token];
    /* bf16 through 32 layers of random weights: 0.04 to 0.055 over 2 and 4 GPUs. */
    const double bound = (f32 ? 1e-3 : 0.1) * (mode->gate == BATCH_DENSE ? 1 : 2);
    ref->off = off;
    if (!(off <= bound))
        mismatch(b, mode->name, "logits, by their length", off);
    if (pass->token != ref->token && margin > 2 * bound * spread)
        mismatch(b, mode->name, "another token, by the lead of the first", margin);
}

/* ---- output ---- */

/* A line of numbers, and what JSON wants around each. */
static void print_case(const struct bench *b, int prompt, int mode, const struct prefill_pass *sum,
                       double median_us)
{
    static const char *const keys[] = {"ms",         "tokens_per_s", "speedup", "attention_share",
                                       "gemm_share", "comm_share",   "density", "logits_off",
                                       "lost_mass"};
    enum { N = sizeof keys / sizeof *keys };
    const int32_t n_prompt = b->o->prompts[prompt];
    const double total = (double)sum->total_us, one = b->refs[prompt][mode].one_rank_us;
    const double values[N] = {median_us / 1e3,
                              n_prompt * 1e6 / median_us,
                              one > 0 ? one / median_us : HUGE_VAL, /* no such run */
                              (double)sum->attention_us / total,
                              (double)sum->gemm_us / total,
                              (double)sum->comm_us / total,
                              prefill_density(sum),
                              b->refs[prompt][mode].off,
                              sum->sampled ? sum->lost / (double)sum->sampled : HUGE_VAL};
    const bool json = b->o->json;

    printf(json ? "{\"tp\": %d, \"prompt\": %d, \"mode\": \"%s\"" : "%d,%d,%s", b->tp, n_prompt,
           b->o->modes[mode].name);
    for (int i = 0; i < N; i++) {
        char text[32] = "";
        if (isfinite(values[i]))
            (void)snprintf(text, sizeof text, "%.*f", i == 1 ? 0 : 4, values[i]);
        if (json)
            printf(", \"%s\": %s", keys[i], text[0] ? text : "null");
        else
            printf(",%s", text);
    }
    printf(json ? ", \"token\": %d}\n" : ",%d\n", sum->token);
    (void)fflush(stdout);
}

static void print_head(const struct bench *b)
{
    char cpu[128], date[64];
    const struct model_info *info = model_info(b->runner.model);
    const bool gpu = b->ranks.parts.dev->ops != &dev_cpu;
    if (b->o->json)
        return;
    bench_cpu_name(cpu, sizeof cpu);
    bench_date(date, sizeof date);
    char steer[32] = "";
    if (b->o->steer > 0)
        (void)snprintf(steer, sizeof steer, ", steer %g", b->o->steer);
    printf("# %s, %s, device %s, %s%s, %s, cache %s, chunk %d%s, %lld passes%s%s%s\n", date, cpu,
           b->ranks.parts.dev->ops->name, info->name,
           b->o->random_weights ? " (random weights)" : "", dtype_name(info->dtype),
           dtype_name(info->kv_dtype), prefill_chunk(b->o, 1), b->o->chunk ? "" : " a rank",
           (long long)b->o->reps, gpu ? ", sums " : "", gpu ? b->o->sums : "", steer);
    printf("tp,prompt,mode,ms,tokens_per_s,speedup,attention_share,gemm_share,comm_share,density,"
           "logits_off,lost_mass,token\n");
}

/* ---- the bench ---- */

static void add_pass(struct prefill_pass *sum, const struct prefill_pass *p)
{
    sum->total_us += p->total_us;
    sum->attention_us += p->attention_us;
    sum->gemm_us += p->gemm_us;
    sum->comm_us += p->comm_us;
    sum->reachable += p->reachable;
    sum->kept += p->kept;
    sum->sampled += p->sampled;
    sum->lost += p->lost;
    sum->token = p->token;
}

/* Names what the next passes are, for the line on a terminal. */
static void set_title(struct bench *b, int prompt, int mode, const char *what, int64_t pass)
{
    (void)snprintf(b->runner.title, sizeof b->runner.title, "tp %d, %d tokens, %s, %s %lld of %lld",
                   b->tp, b->o->prompts[prompt], b->o->modes[mode].name, what, (long long)pass,
                   (long long)b->o->reps);
}

/* All ranks after the first use the level that the first found. */
static struct batch_policy choose_policy(struct bench *b, int prompt, int mode)
{
    const struct prefill_mode *m = &b->o->modes[mode];
    struct reference *ref = &b->refs[prompt][mode];
    struct batch_policy policy;
    struct err_msg why = {""};
    b->runner.all_rows = m->all_rows;
    if (m->density > 0 && b->o->steer > 0) {
        ref->level = thresholds_level_for(b->runner.thresholds, m->density, b->o->prompts[prompt]);
    } else if (m->density > 0 && b->o->quick && prompt > 0) {
        ref->level = b->refs[0][mode].level;
    } else if (m->density > 0 && !ref->logits) {
        set_title(b, prompt, mode, "looking for the level", 0);
        must(prefill_find_level(&b->runner, &ref->level, m->density, b->o->prompts[prompt]), NULL);
    }
    must(prefill_policy(&b->runner, &policy, m, ref->level, b->o->prompts[prompt], &why), &why);
    return policy;
}

static void run_case(struct bench *b, int prompt, int mode)
{
    const int32_t n_prompt = b->o->prompts[prompt];
    const struct batch_policy policy = choose_policy(b, prompt, mode);
    struct reference *ref = &b->refs[prompt][mode];
    double us[BENCH_REPS + 1];
    struct prefill_pass pass, sum = {0};
    int n = 0;

    set_title(b, prompt, mode, "checked pass", 0);
    must(prefill_run(&b->runner, &pass, n_prompt, &policy), NULL);
    check(b, ref, &pass, &b->o->modes[mode]);
    if (b->o->quick && prompt > 0) {
        us[n++] = (double)pass.total_us;
        add_pass(&sum, &pass);
    }
    for (int64_t i = 0; i < b->o->reps && !(b->o->quick && sum.total_us > QUICK_US); i++) {
        set_title(b, prompt, mode, "pass", i + 1);
        must(prefill_run(&b->runner, &pass, n_prompt, &policy), NULL);
        us[n++] = (double)pass.total_us;
        add_pass(&sum, &pass);
    }
    const double median = bench_median(us, n);
    if (b->tp == 1)
        ref->one_rank_us = median;
    prefill_clear(&b->runner);
    print_case(b, prompt, mode, &sum, median);
}

static void run_tp(struct bench *b, int index, int argc, char **argv)
{
    struct err_msg why = {""};
    b->tp = b->o->tps[index];
    must(prefill_ranks_open(&b->ranks, b->o, b->tp, argc, argv, &why), &why);
    b->runner = (struct prefill_runner){.model = b->ranks.parts.model,
                                        .thresholds = b->ranks.parts.policy.thresholds,
                                        .tokens = b->tokens,
                                        .pages = b->pages,
                                        .chunk = prefill_chunk(b->o, b->tp),
                                        .steer = b->o->steer,
                                        .terminal = isatty(STDERR_FILENO) == 1};
    b->vocab = model_info(b->runner.model)->vocab_size;
    for (int32_t i = 0; i < b->o->longest; i++)
        b->tokens[i] = (int32_t)(((uint32_t)i * 2654435761u >> 8) % (uint32_t)b->vocab);
    if (index == 0)
        print_head(b);
    for (int prompt = 0; prompt < b->o->n_prompts; prompt++) {
        for (int mode = 0; mode < b->o->n_modes; mode++)
            run_case(b, prompt, mode);
    }
    prefill_ranks_close(&b->ranks);
}

/* False when a check has failed. */
static bool run(const struct prefill_options *o, int argc, char **argv)
{
    struct bench *b = mem_zalloc(1, sizeof *b);
    const int32_t n_pages = kv_pages_for(o->longest);
    b->o = o;
    b->tokens = mem_zalloc((size_t)o->longest, sizeof *b->tokens);
    b->pages = mem_zalloc((size_t)n_pages, sizeof *b->pages);
    for (int32_t i = 0; i < n_pages; i++)
        b->pages[i] = i;
    for (int i = 0; i < o->n_tps; i++)
        run_tp(b, i, argc, argv);
    for (int i = 0; i < PREFILL_MAX_PROMPTS * PREFILL_MAX_MODES; i++)
        mem_free(b->refs[i / PREFILL_MAX_MODES][i % PREFILL_MAX_MODES].logits);
    mem_free(b->tokens);
    mem_free(b->pages);
    const bool fine = !b->failed;
    mem_free(b);
    return fine;
}

int main(int argc, char **argv)
{
    struct prefill_options o = {0};
    struct err_msg why = {""};
    bool fine = true;
    int err = prefill_options_read(&o, argc, argv, &why);
    log_set_level(o.verbose ? LOG_INFO : LOG_WARN);
    if (err < 0)
        (void)fprintf(stderr, "bench_prefill: %s\n", err_why(&why, err));
    if (err == 0 && o.rank > 0)
        must(prefill_ranks_follow(&o, &why), &why);
    else if (err == 0)
        fine = run(&o, argc, argv);
    prefill_options_free(&o);
    return err < 0 ? 2 : !fine;
}
