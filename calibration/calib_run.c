#include "calibration/calib_run.h"

#include "core/mem.h"

#include <errno.h>
#include <string.h>

struct calib_run {
    struct model *model;
    int32_t chunk, n_pages;
    int32_t *pages; /* page i of the prompt is page i of the pool */
    struct batch_token token;
    struct batch_counts counts;
    void (*on_chunk)(void *arg, int32_t n_tokens);
    void *on_chunk_arg;
    uint64_t step_id;
    /* NULL: off. With a trial below 0 the run is dense and counted, else gated. */
    struct calib_rel *rel;
    int32_t rel_trial, rel_rows;
    struct attn_counts *heads[2]; /* [n_layers, n_heads] before a gated run and of it */
};

static size_t n_heads(const struct calib_run *r)
{
    return (size_t)model_info(r->model)->n_layers * (size_t)model_info(r->model)->n_heads;
}

int calib_run_create(struct calib_run **out, struct model *m, int32_t max_tokens, int32_t chunk,
                     struct err_msg *why)
{
    if (chunk < KV_BLOCK_TOKENS || chunk % KV_BLOCK_TOKENS) {
        return err_set(why, ERR_INVALID, "chunk %d is not a multiple of %d", chunk,
                       KV_BLOCK_TOKENS);
    }
    struct calib_run *r = mem_zalloc(1, sizeof *r);
    r->model = m;
    r->chunk = chunk;
    r->n_pages = kv_pages_for(max_tokens);
    r->pages = mem_zalloc((size_t)r->n_pages, sizeof *r->pages);
    for (int32_t i = 0; i < r->n_pages; i++)
        r->pages[i] = i;
    for (int i = 0; i < 2; i++)
        r->heads[i] = mem_zalloc(n_heads(r), sizeof *r->heads[i]);
    int err = model_take_pages(m, r->n_pages, why);
    if (err < 0) {
        calib_run_destroy(r);
        return err;
    }
    *out = r;
    return 0;
}

void calib_run_destroy(struct calib_run *r)
{
    if (!r)
        return;
    mem_free(r->pages);
    mem_free(r->heads[0]);
    mem_free(r->heads[1]);
    mem_free(r);
}

void calib_run_on_chunk(struct calib_run *r, void (*fn)(void *arg, int32_t n_tokens), void *arg)
{
    r->on_chunk = fn;
    r->on_chunk_arg = arg;
}

/* Tells the REL gate's law how far the prompt is. */
static void report_rel(struct calib_run *r, const struct batch_seq *seq,
                       const struct batch_counts *counts)
{
    const int32_t end = seq->start + seq->n_tokens;
    const bool last = end == seq->prompt_len;
    if (r->rel_trial < 0)
        calib_rel_reached(r->rel, end, last);
    else
        calib_rel_gated(r->rel, r->rel_rows, r->rel_trial,
                        (double)counts->kept / (double)counts->reachable, end, last);
}

static int run_chunk(struct calib_run *r, struct batch_seq *seq, struct batch_counts *counts)
{
    struct batch_result result = {.tokens = &r->token, .counts = &r->counts};
    struct batch batch = {.step_id = ++r->step_id,
                          .n_seqs = 1,
                          .n_tokens = seq->n_tokens,
                          .seqs = seq,
                          /* ABS: maps of all layers; REL: densities as served */
                          .all_rows =
                              seq->policy.gate != BATCH_REL || model_info(r->model)->n_layers == 1};
    TRY(model_step(r->model, &batch, &result));
    if (counts) {
        counts->reachable += r->counts.reachable;
        counts->visited += r->counts.visited;
        counts->kept += r->counts.kept;
        if (r->rel)
            report_rel(r, seq, counts);
    }
    if (r->on_chunk)
        r->on_chunk(r->on_chunk_arg, seq->n_tokens);
    return 0;
}

int calib_run_prompt(struct calib_run *r, const int32_t *tokens, int32_t n_tokens,
                     struct batch_policy policy, struct batch_counts *counts)
{
    struct batch_seq seq = {
        .id = 1, .tokens = tokens, .prompt_len = n_tokens, .pages = r->pages, .policy = policy};
    if (n_tokens < 1 || kv_pages_for(n_tokens) > r->n_pages)
        return ERR_TOO_LONG;
    if (counts) {
        *counts = (struct batch_counts){0};
    }
    for (seq.start = 0; seq.start < n_tokens; seq.start += seq.n_tokens) {
        seq.n_tokens = n_tokens - seq.start < r->chunk ? n_tokens - seq.start : r->chunk;
        seq.n_pages = kv_pages_for(seq.start + seq.n_tokens);
        TRY(run_chunk(r, &seq, counts));
    }
    return 0;
}

/* The text's first n_tokens - n_rows tokens, densely; *seq is then its last n_rows. */
static int run_head(struct calib_run *r, const int32_t *tokens, int32_t n_tokens, int32_t n_rows,
                    struct batch_seq *seq)
{
    const struct batch_policy dense = {.gate = BATCH_DENSE, .gate_rows = KV_BLOCK_TOKENS};
    *seq = (struct batch_seq){.id = 1,
                              .tokens = tokens,
                              .start = n_tokens - n_rows,
                              .n_tokens = n_rows,
                              .prompt_len = n_tokens,
                              .pages = r->pages,
                              .n_pages = kv_pages_for(n_tokens),
                              .policy = dense};
    if (n_rows < 1 || n_rows > r->chunk || seq->n_pages > r->n_pages)
        return ERR_TOO_LONG;
    return calib_run_prompt(r, tokens, n_tokens - n_rows, dense, NULL);
}

int calib_run_generated(struct calib_run *r, const int32_t *tokens, int32_t n_tokens,
                        int32_t n_rows, int32_t n_levels, struct batch_counts *counts)
{
    struct batch_seq seq;
    TRY(run_head(r, tokens, n_tokens, n_rows, &seq));
    seq.prompt_len = seq.start;
    seq.policy.decode_gate = BATCH_ABS;
    for (int32_t level = 0; level < n_levels; level++) {
        counts[level] = (struct batch_counts){0};
        seq.policy.decode_level = (int16_t)level;
        TRY(run_chunk(r, &seq, &counts[level]));
    }
    return 0;
}

int calib_run_rows(struct calib_run *r, struct calib *c, const int32_t *tokens, int32_t n_tokens,
                   int32_t n_rows, struct err_msg *why)
{
    struct batch_seq seq;
    int err = run_head(r, tokens, n_tokens, n_rows, &seq), off;
    if (err == 0)
        err = model_probe_tiles(r->model, 1, calib_rows, c);
    if (err == 0)
        err = run_chunk(r, &seq, NULL);
    off = model_probe_tiles(r->model, 1, NULL, NULL);
    if (err < 0 || off < 0)
        return err_set(why, err < 0 ? err : off, "the run: %s", err_str(err < 0 ? err : off));
    return calib_end_sample(c, n_tokens, why);
}

/* Whether c, and so the model, has its maxima on a GPU decides which probe there is. */
static int probe(struct calib_run *r, struct calib *c, int32_t gate_rows, bool on)
{
    if (calib_on_device(c))
        return model_probe_tiles_dev(r->model, gate_rows, on ? calib_tiles_dev : NULL, c);
    return model_probe_tiles(r->model, gate_rows, on ? calib_tiles : NULL, c);
}

int calib_run_sample(struct calib_run *r, struct calib *c, struct batch_policy policy,
                     const int32_t *tokens, int32_t n_tokens, struct err_msg *why)
{
    int err = probe(r, c, policy.gate_rows, true);
    if (err == 0)
        err = calib_run_prompt(r, tokens, n_tokens, policy, NULL);
    int off = probe(r, c, policy.gate_rows, false);
    if (err < 0 || off < 0)
        return err_set(why, err < 0 ? err : off, "the run: %s", err_str(err < 0 ? err : off));
    return calib_end_sample(c, n_tokens, why);
}

struct sinks {
    struct calib *calib;
    struct calib_mass *mass;
};

static void feed_both(void *arg, const struct model_mass *t)
{
    const struct sinks *to = arg;
    calib_tiles(to->calib, t->layer, t->pos, t->n_tokens, t->max, t->n_groups, t->n_pages);
    calib_mass_tiles(to->mass, t);
}

int calib_run_mass(struct calib_run *r, struct calib *c, struct calib_mass *mass, int32_t gate_rows,
                   const int32_t *tokens, int32_t n_tokens, struct err_msg *why)
{
    const struct batch_policy dense = {.gate = BATCH_DENSE, .gate_rows = (uint8_t)gate_rows};
    struct sinks to = {c, mass};
    int err = model_probe_mass(r->model, gate_rows, feed_both, &to);
    if (err == 0)
        err = calib_run_prompt(r, tokens, n_tokens, dense, NULL);
    int off = model_probe_mass(r->model, gate_rows, NULL, NULL);
    if (err < 0 || off < 0)
        return err_set(why, err < 0 ? err : off, "the run: %s", err_str(err < 0 ? err : off));
    return calib_end_sample(c, n_tokens, why);
}

/* The counters of heads as they are. */
static int read_heads(struct calib_run *r, struct attn_counts *to)
{
    const struct attn_counts *now = model_head_counts(r->model);
    if (!now)
        return ERR_INVALID;
    memcpy(to, now, n_heads(r) * sizeof *to);
    return 0;
}

/* A prompt under a trial's gate; its chunks are reported as they come, its heads at the end. */
static int run_trial(struct calib_run *r, const int32_t *tokens, int32_t n_tokens)
{
    const struct batch_policy gated = {.gate = BATCH_REL,
                                       .gate_rows = (uint8_t)r->rel_rows,
                                       .ln_lambda = calib_rel_trials()[r->rel_trial]};
    struct batch_counts counts;
    struct attn_counts *before = r->heads[0], *run = r->heads[1];
    TRY(read_heads(r, before));
    TRY(calib_run_prompt(r, tokens, n_tokens, gated, &counts));
    TRY(read_heads(r, run));
    for (size_t i = 0; i < n_heads(r); i++) {
        run[i].reachable -= before[i].reachable;
        run[i].kept -= before[i].kept;
    }
    calib_rel_heads(r->rel, r->rel_rows, r->rel_trial, run);
    return 0;
}

/* Those that no dense run counts. */
static int run_trials(struct calib_run *r, const int32_t *tokens, int32_t n_tokens)
{
    for (r->rel_rows = 64; r->rel_rows <= 128; r->rel_rows += 64) {
        for (r->rel_trial = CALIB_REL_BELOW_1; r->rel_trial < CALIB_REL_TRIALS; r->rel_trial++)
            TRY(run_trial(r, tokens, n_tokens));
    }
    return 0;
}

int calib_run_rel(struct calib_run *r, struct calib_rel *rel, const int32_t *tokens,
                  int32_t n_tokens, struct err_msg *why)
{
    const struct batch_policy dense = {.gate = BATCH_DENSE, .gate_rows = KV_BLOCK_TOKENS};
    struct batch_counts counts;
    int err = model_count_rel(r->model, calib_rel_counts(rel));
    r->rel = rel;
    r->rel_trial = -1;
    if (err == 0) {
        err = calib_run_prompt(r, tokens, n_tokens, dense, &counts);
        int off = model_count_rel(r->model, NULL);
        err = err < 0 ? err : off;
        if (err == 0)
            err = run_trials(r, tokens, n_tokens);
    }
    r->rel = NULL;
    return err < 0 ? err_set(why, err, "the run: %s", err_str(err)) : 0;
}

int32_t calib_run_rel_runs(void)
{
    return 1 + 2 * (CALIB_REL_TRIALS - CALIB_REL_BELOW_1);
}
