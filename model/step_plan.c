#include "model/step_plan.h"

#include "core/mem.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

struct plan_head {
    uint64_t step_id;
    int32_t n_seqs, n_rows, n_outputs, all_rows;
};

struct plan_seq {
    int32_t n_rows, pos, prompt_end, n_pages;
    struct attn_choice choice;
};

void step_plan_init(struct step_plan *p, const struct plan_limits *limits)
{
    *p = (struct step_plan){.limits = *limits};
    p->ids = mem_zalloc((size_t)limits->max_tokens, sizeof *p->ids);
    p->positions = mem_zalloc((size_t)limits->max_tokens, sizeof *p->positions);
    p->seqs = mem_zalloc((size_t)limits->max_seqs, sizeof *p->seqs);
    p->outputs = mem_zalloc((size_t)limits->max_seqs, sizeof *p->outputs);
}

void step_plan_deinit(struct step_plan *p)
{
    mem_free(p->ids);
    mem_free(p->positions);
    mem_free(p->seqs);
    mem_free(p->outputs);
    *p = (struct step_plan){0};
}

static int wrong(const struct batch_seq *s, const char *what, int64_t value, struct err_msg *why)
{
    return err_set(why, ERR_INVALID, "sequence %" PRIu64 ": %s (%" PRId64 ")", s->id, what, value);
}

static int check_extent(const struct plan_limits *l, const struct batch_seq *s, struct err_msg *why)
{
    if (s->start < 0 || s->n_tokens < 1)
        return wrong(s, "start or n_tokens out of range", s->n_tokens, why);
    const int64_t end = (int64_t)s->start + s->n_tokens;
    if (end > l->max_position)
        return wrong(s, "longer than max_position", end, why);
    if (s->prompt_len < 0)
        return wrong(s, "prompt_len out of range", s->prompt_len, why);
    const int32_t n_pages = kv_pages_for(end);
    if (s->n_pages < n_pages)
        return wrong(s, "too few pages for its tokens", s->n_pages, why);
    for (int32_t i = 0; i < n_pages; i++) {
        if (s->pages[i] < 0 || s->pages[i] >= l->n_pages)
            return wrong(s, "page id out of range", s->pages[i], why);
    }
    if (s->sample && !s->sampling)
        return wrong(s, "sample without sampling", 0, why);
    return 0;
}

static int check_rel(const struct plan_limits *l, const struct batch_seq *s, struct err_msg *why)
{
    const struct batch_policy *p = &s->policy;
    const int32_t n_steps = l->n_rel_steps[p->gate_rows == 64];
    if (!(p->ln_lambda <= (float)ATTN_REL_LN_MAX))
        return wrong(s, "ln_lambda is above 30 or NaN", 0, why);
    if (p->steer > 0.0f && (p->level < 0 || p->level >= n_steps - 1))
        return wrong(s, "no steps to steer between at this level", p->level, why);
    if (p->steer > 0.0f && !(p->blend >= 0.0f && p->blend <= 1.0f))
        return wrong(s, "blend is not from 0 to 1", 0, why);
    return 0;
}

static int check_abs(const struct plan_limits *l, const struct batch_seq *s, struct err_msg *why)
{
    const struct batch_policy *p = &s->policy;
    if (p->level < 0 || p->level >= l->n_levels)
        return wrong(s, "no thresholds of this level", p->level, why);
    if (p->steer > 0.0f && p->level >= l->n_page_levels)
        return wrong(s, "no pages to steer to at this level", p->level, why);
    if (p->steer > 0.0f && !(p->blend >= 0.0f && isfinite(p->blend)))
        return wrong(s, "blend is not 0 or more", 0, why);
    return 0;
}

static int check_policy(const struct plan_limits *l, const struct batch_seq *s, struct err_msg *why)
{
    const struct batch_policy *p = &s->policy;
    const int32_t end = s->start + s->n_tokens;

    if (p->decode_gate != BATCH_DENSE && p->decode_gate != BATCH_ABS)
        return wrong(s, "decode_gate is not dense or ABS", p->decode_gate, why);
    if (p->decode_gate == BATCH_ABS &&
        (p->decode_level < 0 || p->decode_level >= l->n_decode_levels))
        return wrong(s, "no decode thresholds of this level", p->decode_level, why);
    if (p->gate > BATCH_REL)
        return wrong(s, "unknown gate", p->gate, why);
    if (p->gate == BATCH_DENSE)
        return 0;
    if (p->gate_rows != 128 && p->gate_rows != 64)
        return wrong(s, "gate_rows is not 128 or 64", p->gate_rows, why);
    if (!(p->steer >= 0.0f && p->steer <= (float)ATTN_STEER_MAX))
        return wrong(s, "steer is not from 0 to 100", 0, why);
    TRY(p->gate == BATCH_ABS ? check_abs(l, s, why) : check_rel(l, s, why));
    if (s->start < s->prompt_len && s->start % KV_BLOCK_TOKENS != 0)
        return wrong(s, "a gated chunk starts inside a block", s->start, why);
    if (end < s->prompt_len && end % KV_BLOCK_TOKENS != 0)
        return wrong(s, "a gated chunk ends inside a block", end, why);
    return 0;
}

static struct attn_choice make_choice(const struct batch_policy *p)
{
    _Static_assert((int)BATCH_DENSE == (int)ATTN_GATE_NONE &&
                       (int)BATCH_ABS == (int)ATTN_GATE_ABS && (int)BATCH_REL == (int)ATTN_GATE_REL,
                   "gates of the batch and of the kernel");
    return (struct attn_choice){.gate = p->gate,
                                .gate_rows = p->gate_rows ? p->gate_rows : KV_BLOCK_TOKENS,
                                .level = p->level,
                                .ln_lambda = p->ln_lambda,
                                .steer = p->steer,
                                .blend = p->blend,
                                .decode_gate = p->decode_gate,
                                .decode_level = p->decode_level,
                                .lost_mass = p->lost_mass};
}

/* Appends the rows of a checked sequence. */
static int add_rows(struct step_plan *p, const struct batch_seq *s, struct err_msg *why)
{
    p->seqs[p->n_seqs++] = (struct attn_seq){.row = p->n_rows,
                                             .n_rows = s->n_tokens,
                                             .pos = s->start,
                                             .prompt_end = s->prompt_len,
                                             .pages = s->pages,
                                             .choice = make_choice(&s->policy)};
    for (int32_t i = 0; i < s->n_tokens; i++, p->n_rows++) {
        int32_t id = s->tokens[s->start + i];
        if (id < 0 || id >= p->limits.vocab_size)
            return wrong(s, "token id out of range", id, why);
        p->ids[p->n_rows] = id;
        p->positions[p->n_rows] = s->start + i;
    }
    if (s->sample)
        p->outputs[p->n_outputs++] = p->n_rows - 1;
    return 0;
}

int step_plan_from_batch(struct step_plan *p, const struct batch *b, struct err_msg *why)
{
    if (b->n_seqs < 1 || b->n_seqs > p->limits.max_seqs)
        return err_set(why, ERR_INVALID, "a batch of %d sequences, not 1 to %d", b->n_seqs,
                       p->limits.max_seqs);
    p->step_id = b->step_id;
    p->n_rows = p->n_seqs = p->n_outputs = 0;
    p->all_rows = b->all_rows;
    for (int32_t i = 0; i < b->n_seqs; i++) {
        const struct batch_seq *s = &b->seqs[i];
        TRY(check_extent(&p->limits, s, why));
        TRY(check_policy(&p->limits, s, why));
        if (s->n_tokens > p->limits.max_tokens - p->n_rows)
            return err_set(why, ERR_INVALID, "a batch of more than %d tokens",
                           p->limits.max_tokens);
        TRY(add_rows(p, s, why));
    }
    if (p->n_rows != b->n_tokens)
        return err_set(why, ERR_INVALID, "a batch of %d tokens that says %d", p->n_rows,
                       b->n_tokens);
    return 0;
}

size_t step_plan_max_message(int32_t max_seqs, int32_t max_tokens, int64_t max_position)
{
    size_t pages = (size_t)kv_pages_for(max_position);
    return sizeof(struct plan_head) +
           (size_t)max_seqs * (sizeof(struct plan_seq) + (pages + 1) * sizeof(int32_t)) +
           (size_t)max_tokens * sizeof(int32_t);
}

static char *put(char *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
    return to + bytes;
}

size_t step_plan_encode_stop(void *buf)
{
    const struct plan_head head = {0};
    return (size_t)(put(buf, &head, sizeof head) - (char *)buf);
}

size_t step_plan_encode(const struct step_plan *p, void *buf)
{
    const struct plan_head head = {p->step_id, p->n_seqs, p->n_rows, p->n_outputs, p->all_rows};
    char *at = put(buf, &head, sizeof head);

    for (int32_t i = 0; i < p->n_seqs; i++) {
        const struct attn_seq *s = &p->seqs[i];
        struct plan_seq h = {.n_rows = s->n_rows,
                             .pos = s->pos,
                             .prompt_end = s->prompt_end,
                             .n_pages = kv_pages_for((int64_t)s->pos + s->n_rows)};
        h.choice = s->choice;
        at = put(at, &h, sizeof h);
    }
    at = put(at, p->ids, (size_t)p->n_rows * sizeof *p->ids);
    at = put(at, p->outputs, (size_t)p->n_outputs * sizeof *p->outputs);
    for (int32_t i = 0; i < p->n_seqs; i++) {
        const struct attn_seq *s = &p->seqs[i];
        size_t n_pages = (size_t)kv_pages_for((int64_t)s->pos + s->n_rows);
        at = put(at, s->pages, n_pages * sizeof *s->pages);
    }
    return (size_t)(at - (char *)buf);
}

/* Reads one sequence's header; its rows must fit among those announced. */
static int decode_seq(struct step_plan *p, const struct plan_seq *h, int32_t n_rows)
{
    if (h->n_rows < 1 || h->n_rows > n_rows - p->n_rows || h->pos < 0 ||
        (int64_t)h->pos + h->n_rows > p->limits.max_position ||
        h->n_pages != kv_pages_for((int64_t)h->pos + h->n_rows))
        return ERR_PROTOCOL;
    p->seqs[p->n_seqs++] = (struct attn_seq){.row = p->n_rows,
                                             .n_rows = h->n_rows,
                                             .pos = h->pos,
                                             .prompt_end = h->prompt_end,
                                             .choice = h->choice};
    for (int32_t i = 0; i < h->n_rows; i++)
        p->positions[p->n_rows++] = h->pos + i;
    return 0;
}

/* What is left of a message. */
struct rest {
    const char *at;
    size_t left;
};

/* The next n numbers of the message, where they are; NULL when it ends before. */
static const int32_t *next(struct rest *r, int32_t n)
{
    const char *at = r->at;
    const size_t bytes = (size_t)n * sizeof(int32_t);
    if (r->left < bytes)
        return NULL;
    r->at += bytes;
    r->left -= bytes;
    return (const int32_t *)(const void *)at;
}

static int decode_ids(struct step_plan *p, struct rest *r)
{
    const int32_t *ids = next(r, p->n_rows);
    if (!ids)
        return ERR_PROTOCOL;
    for (int32_t i = 0; i < p->n_rows; i++) {
        if (ids[i] < 0 || ids[i] >= p->limits.vocab_size)
            return ERR_PROTOCOL;
        p->ids[i] = ids[i];
    }
    return 0;
}

/* At most one row of each sequence, so that as many fit as a step may have sequences. */
static int decode_outputs(struct step_plan *p, struct rest *r, int32_t n)
{
    if (n < 0 || n > p->n_seqs)
        return ERR_PROTOCOL;
    const int32_t *rows = next(r, n);
    if (!rows)
        return ERR_PROTOCOL;
    for (int32_t i = 0, seq = 0; i < n; i++, seq++) {
        while (seq < p->n_seqs && rows[i] >= p->seqs[seq].row + p->seqs[seq].n_rows)
            seq++;
        if (seq == p->n_seqs || rows[i] < p->seqs[seq].row)
            return ERR_PROTOCOL;
        p->outputs[p->n_outputs++] = rows[i];
    }
    return 0;
}

static int decode_pages(struct step_plan *p, struct rest *r)
{
    for (int32_t i = 0; i < p->n_seqs; i++) {
        struct attn_seq *s = &p->seqs[i];
        int32_t n_pages = kv_pages_for((int64_t)s->pos + s->n_rows);
        s->pages = next(r, n_pages);
        if (!s->pages)
            return ERR_PROTOCOL;
        for (int32_t k = 0; k < n_pages; k++) {
            if (s->pages[k] < 0 || s->pages[k] >= p->limits.n_pages)
                return ERR_PROTOCOL;
        }
    }
    return 0;
}

int step_plan_decode(struct step_plan *p, const void *buf, size_t len, bool *stop)
{
    struct plan_head head;
    const char *at = buf;

    p->n_rows = p->n_seqs = p->n_outputs = 0;
    if (len < sizeof head)
        return ERR_PROTOCOL;
    memcpy(&head, at, sizeof head);
    at += sizeof head;
    len -= sizeof head;
    *stop = head.n_seqs == 0;
    if (*stop)
        return 0;
    if (head.n_seqs < 0 || head.n_seqs > p->limits.max_seqs || head.n_rows < 1 ||
        head.n_rows > p->limits.max_tokens || head.all_rows < 0 || head.all_rows > 1 ||
        len / sizeof(struct plan_seq) < (size_t)head.n_seqs)
        return ERR_PROTOCOL;
    p->step_id = head.step_id;
    p->all_rows = head.all_rows;
    for (int32_t i = 0; i < head.n_seqs; i++) {
        struct plan_seq h;
        memcpy(&h, at, sizeof h);
        TRY(decode_seq(p, &h, head.n_rows));
        at += sizeof h;
        len -= sizeof h;
    }
    struct rest rest = {at, len};
    if (p->n_rows != head.n_rows)
        return ERR_PROTOCOL;
    TRY(decode_ids(p, &rest));
    TRY(decode_outputs(p, &rest, head.n_outputs));
    TRY(decode_pages(p, &rest));
    return rest.left == 0 ? 0 : ERR_PROTOCOL;
}
