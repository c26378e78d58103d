#include "tests/rank_script.h"

#include "tests/model_case.h"

enum { FIRST_DECODE = 3, QUIET_STEP = 4 /* samples all but sequence 1 */ };

static const int32_t prompts[SCRIPT_SEQS] = {200, 1, 90};

void rank_script_init(struct rank_script *s, int32_t vocab)
{
    *s = (struct rank_script){.vocab = vocab};
    for (int32_t i = 0; i < SCRIPT_SEQS; i++) {
        s->len[i] = prompts[i];
        for (int32_t k = 0; k < prompts[i]; k++)
            s->tokens[i][k] = (k * 7 + k / 5 + i * 3) % vocab;
        for (int32_t k = 0; k < SCRIPT_PAGES_PER_SEQ; k++) /* no two sequences' are alike */
            s->pages[i][k] = (k * SCRIPT_SEQS + i * 5) % SCRIPT_PAGES;
    }
}

static void add(struct rank_script *s, int32_t i, int32_t start, int32_t n, bool sample)
{
    struct batch_seq *q = &s->seqs[s->n_seqs++];
    *q = case_seq(s->tokens[i], start, n, prompts[i], s->pages[i], SCRIPT_PAGES_PER_SEQ);
    q->id = (uint64_t)i;
    q->sample = sample;
}

void rank_script_step(struct rank_script *s, int32_t step)
{
    s->n_seqs = 0;
    if (step == 0) {
        add(s, 0, 0, 128, false);
        add(s, 1, 0, 1, true);
        add(s, 2, 0, 64, false);
    } else if (step == 1) {
        add(s, 0, 128, 50, false);
    } else if (step == 2) {
        add(s, 2, 64, 26, true);
        add(s, 0, 178, 22, true);
    } else {
        for (int32_t i = 0; i < SCRIPT_SEQS; i++)
            add(s, i, prompts[i] + step - FIRST_DECODE, 1, i != 1 || step != QUIET_STEP);
    }
}

void rank_script_grow(struct rank_script *s, const struct batch_token *tokens)
{
    for (int32_t i = 0; i < s->n_seqs; i++) {
        const struct batch_seq *q = &s->seqs[i];
        if (q->start + q->n_tokens == s->len[q->id])
            s->tokens[q->id][s->len[q->id]++] = q->sample ? tokens[i].token : 3 % s->vocab;
    }
}
