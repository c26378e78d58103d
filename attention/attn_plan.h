/* Cuts a batch into tasks and orders them longest first. Internal to attention/.
 *
 * A task is the rows of one sequence that lie in one absolute 128-token block and are all prompt
 * rows or all generated rows, for query heads that share one KV head. Nothing here changes a
 * result; it only decides who computes what when. */
#ifndef ATTENTION_ATTN_PLAN_H
#define ATTENTION_ATTN_PLAN_H

#include "attention/attention.h"

enum {
    ATTN_TASK_ROWS = 512,  /* rows times heads a task may have: bounds a worker's scratch */
    ATTN_PLAN_TASKS = 8192 /* tasks planned at a time; a larger batch takes several rounds */
};

struct attn_task {
    int32_t seq;
    int32_t row; /* in q and out */
    int32_t pos;
    int32_t n_rows;
    int32_t head; /* first query head */
    int32_t n_heads;
    uint32_t cost;
    bool generated;
};

struct attn_plan {
    struct attn_task tasks[ATTN_PLAN_TASKS];
    int32_t order[ATTN_PLAN_TASKS]; /* longest first */
    int32_t n_tasks;
    /* where the next round goes on */
    int32_t seq, done_rows, head;
};

void attn_plan_start(struct attn_plan *plan);
/* Fills tasks, order and n_tasks; false when the batch is used up. */
bool attn_plan_next(struct attn_plan *plan, const struct attn_problem *p, int32_t n_kv_heads);

#endif
