#include "bench/prefill_pass.h"

#include "core/clock.h"

#include <math.h>
#include <stdio.h>

static const struct batch_sampling greedy = {
    .top_p = 1.0f, .repetition_penalty = 1.0f, .ignore_eos = true};

static struct batch_policy abs_policy(const struct prefill_runner *r, int level)
{
    return (struct batch_policy){.gate = BATCH_ABS,
                                 .gate_rows = (uint8_t)thresholds_meta(r->thresholds)->gate_rows,
                                 .level = (int16_t)level};
}

int prefill_policy(const struct prefill_runner *r, struct batch_policy *out,
                   const struct prefill_mode *mode, int level, int32_t n_prompt,
                   struct err_msg *why)
{
    if (mode->gate == BATCH_ABS) {
        if (mode->density == 0)
            level = thresholds_level(r->thresholds, mode->k, why);
        TRY(level);
        *out = abs_policy(r, level);
        out->steer = (float)r->steer;
        if (r->steer > 0)
            thresholds_abs_steer(r->thresholds, mode->density, n_prompt, out);
    } else {
        *out = (struct batch_policy){
            .gate = (uint8_t)mode->gate, .gate_rows = 128, .ln_lambda = mode->ln_lambda};
    }
    out->lost_mass = mode->lost_mass;
    return 0;
}

/* At most ten times a second. */
static void show(struct prefill_runner *r, int32_t at, int32_t n_prompt)
{
    int64_t now = clock_monotonic_us(NULL);
    if (!r->terminal || now - r->shown_us < 100000)
        return;
    r->shown_us = now;
    (void)fprintf(stderr, "\r%s: %3.0f%%\033[K", r->title, 100.0 * at / n_prompt);
}

void prefill_clear(const struct prefill_runner *r)
{
    if (r->terminal)
        (void)fputs("\r\033[K", stderr);
}

static void add_step(struct prefill_pass *out, const struct batch_result *r)
{
    out->attention_us += r->attention_us;
    out->gemm_us += r->gemm_us;
    out->comm_us += r->comm_us;
    out->reachable += r->counts->reachable;
    out->kept += r->counts->kept;
    out->sampled += r->counts->sampled;
    out->lost += r->counts->lost;
}

int prefill_run(struct prefill_runner *r, struct prefill_pass *out, int32_t n_prompt,
                const struct batch_policy *policy)
{
    struct batch_result result = {.tokens = &r->token, .counts = &r->counts};
    struct batch_seq s = {.tokens = r->tokens,
                          .prompt_len = n_prompt,
                          .pages = r->pages,
                          .n_pages = kv_pages_for(n_prompt),
                          .policy = *policy,
                          .sampling = &greedy};
    *out = (struct prefill_pass){0};
    const int64_t start = clock_monotonic_us(NULL);
    for (; s.start < n_prompt; s.start += s.n_tokens) {
        const int32_t left = n_prompt - s.start;
        s.n_tokens = left < r->chunk ? left : r->chunk;
        s.sample = s.n_tokens == left;
        const struct batch batch = {
            .n_seqs = 1, .n_tokens = s.n_tokens, .seqs = &s, .all_rows = r->all_rows};
        show(r, s.start, n_prompt);
        TRY(model_step(r->model, &batch, &result));
        add_step(out, &result);
    }
    out->total_us = clock_monotonic_us(NULL) - start;
    out->token = r->token.token;
    return out->token < 0 ? ERR_NUMERIC : 0;
}

double prefill_density(const struct prefill_pass *p)
{
    return p->reachable ? (double)p->kept / (double)p->reachable : 1.0;
}

int prefill_find_level(struct prefill_runner *r, int *level, double density, int32_t n_prompt)
{
    struct prefill_pass pass;
    double nearest = 2.0;
    int32_t low = 0, high;
    (void)thresholds_k(r->thresholds, &high);
    for (high--; low <= high;) {
        const int32_t middle = (low + high) / 2;
        const struct batch_policy policy = abs_policy(r, middle);
        TRY(prefill_run(r, &pass, n_prompt, &policy));
        const double off = prefill_density(&pass) - density;
        if (fabs(off) < nearest) {
            nearest = fabs(off);
            *level = middle;
        }
        if (off < 0)
            low = middle + 1;
        else
            high = middle - 1;
    }
    return 0;
}
