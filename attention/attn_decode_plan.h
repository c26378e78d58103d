/* The work plan of a decode step: plain C on plain data, shared by the host and the Hopper kernel.
 *
 * A task is 16 packed rows (query heads of one KV head times query tokens) of one sequence and the
 * pages they visit, newest first. The planner lays all tasks end to end and cuts them into
 * contiguous shares (stream-K). The first shares, one for each thread block of a grid of fixed
 * size, are large and equal; the rest of the work, DEC_SPARE_PERCENT of it, is in small ones that
 * thread blocks draw as they finish, because multiprocessors do not get equal parts of the memory's
 * rate. A share is a list of pieces; a piece is a task or a part of one. A task that is cut is
 * merged by the thread block that finishes last, in the order of its parts: who draws what changes
 * no bit.
 *
 * Everything lives in buffers of fixed capacity, so that a captured graph replays with new plans.
 */
#ifndef ATTENTION_ATTN_DECODE_PLAN_H
#define ATTENTION_ATTN_DECODE_PLAN_H

#include "attention/policy.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    DEC_ROWS = 16,      /* packed rows of a task */
    DEC_MAX_TOKENS = 8, /* query tokens of a sequence */
    DEC_PIECE_COST = 2, /* what a piece costs beside its pages, in pages */
    DEC_MIN_PAGES = 4   /* smallest part of a task that is cut */
};

/* Small shares: that many a thread block hold that part of the work, if there are so many pages a
 * thread block. Cuts cost more than they gain with less work, unless tasks are short: few are cut.
 */
enum {
    DEC_SPARE = 6,
    DEC_SPARE_PERCENT = 18,
    DEC_SPARE_LEAST = 400,
    DEC_SPARE_LEAST_SHORT = 100, /* where the mean task has at most DEC_SHORT_TASK pages */
    DEC_SHORT_TASK = 32
};

/* One sequence: rows [row, row + n_rows) of q are its tokens at positions pos.. */
struct dec_seq {
    int32_t row;
    int32_t n_rows; /* 1 to DEC_MAX_TOKENS */
    int32_t pos;
    float ln_lambda;      /* REL: -inf is dense */
    const int32_t *pages; /* device, covering pos + n_rows tokens */
    const float *t;       /* ABS: device [n_layers, n_heads, t_blocks], natural scaled-logit units;
                             NULL: dense */
};

/* Walk position i of a task is page last - i for i < n_run, then sink - 1 - (i - n_run). 64 bytes,
 * so that a thread reads one in four loads; row, pos and n_rows are those of its sequence. */
struct dec_piece {
    const int32_t *pages;
    int32_t row, pos;
    int32_t seq;
    uint16_t kv_head, tile; /* packed rows [16 tile, 16 tile + 16) */
    int32_t begin, end;     /* walk positions */
    int32_t last, n_run, sink;
    int32_t n_rows;
    int32_t slot;       /* in the workspace: 2 share, + 1 if not the share's first piece */
    int32_t first_slot; /* of the task's first part; its part p > 0 is in 2 (first_slot / 2 + p) */
    int32_t n_parts;    /* 1: the piece is a whole task and no slot is used */
    int32_t shares;     /* in the plan's first piece: shares that have pieces */
};

struct dec_shape {
    int32_t n_heads, n_kv_heads, head_dim;
    int dtype;        /* 0 bf16, 1 f16 */
    int32_t n_shares; /* 1 + DEC_SPARE for each thread block */
};

struct dec_plan {
    struct dec_piece *pieces; /* [dec_plan_max_pieces] */
    int32_t *first;           /* [n_shares + 1]: share s is pieces [first[s], first[s + 1]) */
};

/* Packed row r of a sequence is query token r / group of query head kv_head * group + r % group. */
static inline int32_t dec_group(const struct dec_shape *s)
{
    return s->n_heads / s->n_kv_heads;
}

/* Thread blocks of the grid for that many shares. */
static inline int32_t dec_blocks(int32_t n_shares)
{
    return n_shares / (1 + DEC_SPARE);
}

/* Pieces a plan can need for n_seqs sequences of at most n_rows query tokens. */
size_t dec_plan_max_pieces(const struct dec_shape *shape, int32_t n_seqs, int32_t n_rows);
/* Bytes of device memory for the parts of cut tasks; its contents do not matter. */
size_t dec_workspace_bytes(const struct dec_shape *shape);
/* Fills the plan and returns the number of pieces. heads: [n_heads] of the layers planned for, or
 * NULL: all pages. A generated row at position t sees the pages of block t / 128 as its diagonal.
 * Allocates nothing. */
int32_t dec_plan_make(struct dec_plan *plan, const struct dec_shape *shape,
                      const struct dec_seq *seqs, int32_t n_seqs,
                      const struct attn_head_policy *heads);

#ifdef __cplusplus
}
#endif
#endif
