/* Time to a prompt's first token over ranks: every prompt length dense and under the gates asked
 * for, on one number of ranks after the other, as sluiced opens them. A line a case: median time,
 * tokens a second, speed-up over one rank in the same run, and the shares of attention, GEMMs and
 * sums over the ranks (rank 0's, with its waiting for the others).
 * The first pass of a case is not timed. Its logits must be those of the first number of ranks but
 * for rounding, and the greedy token the same where rounding cannot change it. */
#include "bench/harness.h"
#include "bench/prefill_ranks.h"
#include "core/clock.h"
#include "core/log.h"
#include "core/mem.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct batch_sampling greedy = {
    .top_p = 1.0f, .repetition_penalty = 1.0f, .ignore_eos = true};

/* What later numbers of ranks are compared with. */
struct reference {
    float *logits; /* [vocab] of the first number of ranks; NULL: not run yet */
    int32_t token;
    double one_rank_us; /* 0: not measured */
};

/* One pass over a prompt; shares are summed over its steps. */
struct pass {
    int64_t total_us, attention_us, gemm_us, comm_us;
    uint64_t reachable, kept;
    int32_t token;
};

struct bench {
    const struct prefill_options *o;
    struct prefill_ranks ranks;
    int32_t tp, vocab;
    int32_t *tokens, *pages;
    struct batch_result r;
    struct batch_token token;
    struct batch_counts counts;
    struct reference refs[PREFILL_MAX_PROMPTS][PREFILL_MAX_MODES];
    bool terminal;
    int64_t shown_us;
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

/* ---- passes ---- */

struct progress {
    const char *mode;
    int32_t prompt;
    int64_t pass;
};

static void show(struct bench *b, const struct progress *p, int32_t at)
{
    int64_t now = clock_monotonic_us(NULL);
    if (!b->terminal || now - b->shown_us < 100000)
        return;
    b->shown_us = now;
    (void)fprintf(stderr, "\rtp %d, %d tokens, %s, pass %lld of %lld: %3.0f%%\033[K", b->tp,
                  p->prompt, p->mode, (long long)p->pass, (long long)b->o->reps + 1,
                  100.0 * at / p->prompt);
}

static void clear_line(const struct bench *b)
{
    if (b->terminal)
        (void)fputs("\r\033[K", stderr);
}

static struct batch_policy policy_of(const struct bench *b, const struct prefill_mode *mode)
{
    struct batch_policy p = {
        .gate = (uint8_t)mode->gate, .gate_rows = 128, .ln_lambda = mode->ln_lambda};
    struct err_msg why = {""};
    if (mode->gate != BATCH_ABS)
        return p;
    const struct thresholds *t = b->ranks.parts.policy.thresholds;
    int level = thresholds_level(t, mode->k, &why);
    must(level, &why);
    p.level = (int16_t)level;
    p.gate_rows = (uint8_t)thresholds_meta(t)->gate_rows;
    return p;
}

static void add_step(struct pass *out, const struct batch_result *r)
{
    out->attention_us += r->attention_us;
    out->gemm_us += r->gemm_us;
    out->comm_us += r->comm_us;
    out->reachable += r->counts->reachable;
    out->kept += r->counts->kept;
}

static void run_pass(struct bench *b, struct pass *out, const struct prefill_mode *mode,
                     const struct progress *p)
{
    struct batch_seq s = {.tokens = b->tokens,
                          .prompt_len = p->prompt,
                          .pages = b->pages,
                          .n_pages = kv_pages_for(p->prompt),
                          .policy = policy_of(b, mode),
                          .sampling = &greedy};
    *out = (struct pass){0};
    const int64_t start = clock_monotonic_us(NULL);
    for (; s.start < p->prompt; s.start += s.n_tokens) {
        const int32_t left = p->prompt - s.start, chunk = (int32_t)b->o->chunk;
        s.n_tokens = left < chunk ? left : chunk;
        s.sample = s.n_tokens == left;
        const struct batch batch = {.n_seqs = 1, .n_tokens = s.n_tokens, .seqs = &s};
        show(b, p, s.start);
        must(model_step(b->ranks.parts.model, &batch, &b->r), NULL);
        add_step(out, &b->r);
    }
    out->total_us = clock_monotonic_us(NULL) - start;
    out->token = b->token.token;
    if (out->token < 0)
        give_up(ERR_NUMERIC, NULL);
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

/* Ranks add in another order, so logits differ by rounding: of f32 sums, or of 16-bit activations
 * through all layers. A gate near its threshold may fall otherwise then. */
static void check(struct bench *b, struct reference *ref, const struct pass *pass,
                  const struct prefill_mode *mode)
{
    const float *logits = model_last_logits(b->ranks.parts.model, 0);
    const size_t bytes = (size_t)b->vocab * sizeof *logits;
    const bool f32 = model_info(b->ranks.parts.model)->dtype == DTYPE_F32;
    struct err_msg why = {""};
    double spread;

    if (!ref->logits) {
        ref->logits = memcpy(mem_alloc(bytes), logits, bytes);
        ref->token = pass->token;
        return;
    }
    const double off = distance(ref->logits, logits, b->vocab, &spread);
    const double margin = (double)ref->logits[ref->token] - (double)ref->logits[pass->token];
    const double bound = (f32 ? 1e-3 : 0.05) * (mode->gate == BATCH_DENSE ? 1 : 4);
    if (off > bound) {
        (void)err_set(&why, ERR_MISMATCH, "tp %d, %s: logits are off by %.2g of their length",
                      b->tp, mode->name, off);
        give_up(ERR_MISMATCH, &why);
    }
    if (pass->token != ref->token && margin > 2 * bound * spread) {
        (void)err_set(&why, ERR_MISMATCH,
                      "tp %d, %s: token %d, not %d, by %.3g (logits spread over %.3g)", b->tp,
                      mode->name, pass->token, ref->token, margin, spread);
        give_up(ERR_MISMATCH, &why);
    }
}

/* ---- output ---- */

/* A line of numbers, and what JSON wants around each. */
static void print_case(const struct bench *b, const struct progress *p, const struct reference *ref,
                       const struct pass *sum, double median_us)
{
    static const char *const keys[] = {"ms",         "tokens_per_s", "speedup", "attention_share",
                                       "gemm_share", "comm_share",   "density"};
    enum { N = sizeof keys / sizeof *keys };
    const double total = (double)sum->total_us, reachable = (double)sum->reachable;
    const double values[N] = {median_us / 1e3,
                              p->prompt * 1e6 / median_us,
                              ref->one_rank_us > 0 ? ref->one_rank_us / median_us
                                                   : HUGE_VAL, /* no such run */
                              (double)sum->attention_us / total,
                              (double)sum->gemm_us / total,
                              (double)sum->comm_us / total,
                              sum->reachable ? (double)sum->kept / reachable : 1.0};
    const bool json = b->o->json;

    printf(json ? "{\"tp\": %d, \"prompt\": %d, \"mode\": \"%s\"" : "%d,%d,%s", b->tp, p->prompt,
           p->mode);
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
    const struct model_info *info = model_info(b->ranks.parts.model);
    if (b->o->json)
        return;
    bench_cpu_name(cpu, sizeof cpu);
    bench_date(date, sizeof date);
    printf("# %s, %s, device %s, %s%s, %s, cache %s, chunk %lld, %lld passes\n", date, cpu,
           b->ranks.parts.dev->ops->name, info->name,
           b->o->random_weights ? " (random weights)" : "", dtype_name(info->dtype),
           dtype_name(info->kv_dtype), (long long)b->o->chunk, (long long)b->o->reps);
    printf("tp,prompt,mode,ms,tokens_per_s,speedup,attention_share,gemm_share,comm_share,density,"
           "token\n");
}

/* ---- the bench ---- */

static void run_case(struct bench *b, int prompt, int mode)
{
    const struct prefill_mode *m = &b->o->modes[mode];
    struct reference *ref = &b->refs[prompt][mode];
    struct progress p = {.mode = m->name, .prompt = b->o->prompts[prompt], .pass = 1};
    double us[BENCH_REPS];
    struct pass pass, sum = {0};

    run_pass(b, &pass, m, &p);
    check(b, ref, &pass, m);
    for (int64_t i = 0; i < b->o->reps; i++) {
        p.pass++;
        run_pass(b, &pass, m, &p);
        us[i] = (double)pass.total_us;
        sum.total_us += pass.total_us;
        sum.attention_us += pass.attention_us;
        sum.gemm_us += pass.gemm_us;
        sum.comm_us += pass.comm_us;
        sum.reachable += pass.reachable;
        sum.kept += pass.kept;
        sum.token = pass.token;
    }
    const double median = bench_median(us, (int)b->o->reps);
    if (b->tp == 1)
        ref->one_rank_us = median;
    clear_line(b);
    print_case(b, &p, ref, &sum, median);
}

static void run_tp(struct bench *b, int index, int argc, char **argv)
{
    struct err_msg why = {""};
    b->tp = b->o->tps[index];
    must(prefill_ranks_open(&b->ranks, b->o, b->tp, argc, argv, &why), &why);
    b->vocab = model_info(b->ranks.parts.model)->vocab_size;
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

static void run(const struct prefill_options *o, int argc, char **argv)
{
    struct bench *b = mem_zalloc(1, sizeof *b);
    const int32_t n_pages = kv_pages_for(o->longest);
    b->o = o;
    b->terminal = isatty(STDERR_FILENO) == 1;
    b->tokens = mem_zalloc((size_t)o->longest, sizeof *b->tokens);
    b->pages = mem_zalloc((size_t)n_pages, sizeof *b->pages);
    for (int32_t i = 0; i < n_pages; i++)
        b->pages[i] = i;
    b->r = (struct batch_result){.tokens = &b->token, .counts = &b->counts};
    for (int i = 0; i < o->n_tps; i++)
        run_tp(b, i, argc, argv);
    for (int i = 0; i < PREFILL_MAX_PROMPTS * PREFILL_MAX_MODES; i++)
        mem_free(b->refs[i / PREFILL_MAX_MODES][i % PREFILL_MAX_MODES].logits);
    mem_free(b->tokens);
    mem_free(b->pages);
    mem_free(b);
}

int main(int argc, char **argv)
{
    struct prefill_options o = {0};
    struct err_msg why = {""};
    int err = prefill_options_read(&o, argc, argv, &why);
    log_set_level(o.verbose ? LOG_INFO : LOG_WARN);
    if (err < 0)
        (void)fprintf(stderr, "bench_prefill: %s\n", err_why(&why, err));
    if (err == 0 && o.rank > 0)
        must(prefill_ranks_follow(&o, &why), &why);
    else if (err == 0)
        run(&o, argc, argv);
    prefill_options_free(&o);
    return err < 0 ? 2 : 0;
}
