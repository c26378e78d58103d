/* Task planning. See attn_plan.h. */
#include "attention/attn_plan.h"

void attn_plan_start(struct attn_plan *plan)
{
    plan->n_tasks = 0;
    plan->seq = 0;
    plan->done_rows = 0;
    plan->head = 0;
}

/* Rows of s from done on that one task may hold: the same block, the same side of the prompt's end.
 */
static int32_t rows_of_block(const struct attn_seq *s, int32_t done)
{
    int32_t pos = s->pos + done;
    int32_t end = s->pos + s->n_rows;
    int32_t block_end = (pos / KV_BLOCK_TOKENS + 1) * KV_BLOCK_TOKENS;
    if (block_end < end)
        end = block_end;
    if (pos < s->prompt_end && s->prompt_end < end)
        end = s->prompt_end;
    return end - pos;
}

/* Heads [head, ...) of one KV head's group that fit one task beside n_rows rows. */
static int32_t heads_of_task(int32_t head, int32_t group, int32_t n_rows)
{
    int32_t left = group - head % group;
    int32_t fit = ATTN_TASK_ROWS / n_rows;
    return left < fit ? left : fit;
}

/* Counting sort on 256 levels of cost: order within a level is of no importance. */
static void sort_longest_first(struct attn_plan *plan)
{
    int32_t start[256] = {0};
    uint32_t top = 1;
    for (int32_t i = 0; i < plan->n_tasks; i++)
        top = plan->tasks[i].cost > top ? plan->tasks[i].cost : top;
    for (int32_t i = 0; i < plan->n_tasks; i++) {
        plan->tasks[i].cost = (uint32_t)(255 - (uint64_t)plan->tasks[i].cost * 255 / top);
        start[plan->tasks[i].cost]++;
    }
    for (int32_t level = 0, at = 0; level < 256; level++) {
        int32_t n = start[level];
        start[level] = at;
        at += n;
    }
    for (int32_t i = 0; i < plan->n_tasks; i++)
        plan->order[start[plan->tasks[i].cost]++] = i;
}

bool attn_plan_next(struct attn_plan *plan, const struct attn_problem *p, int32_t n_kv_heads)
{
    plan->n_tasks = 0;
    while (plan->seq < p->n_seqs && plan->n_tasks < ATTN_PLAN_TASKS) {
        const struct attn_seq *s = &p->seqs[plan->seq];
        struct attn_task *t = &plan->tasks[plan->n_tasks++];
        t->seq = plan->seq;
        t->row = s->row + plan->done_rows;
        t->pos = s->pos + plan->done_rows;
        t->n_rows = rows_of_block(s, plan->done_rows);
        t->generated = t->pos >= s->prompt_end;
        t->head = plan->head;
        t->n_heads = heads_of_task(plan->head, p->n_heads / n_kv_heads, t->n_rows);
        /* packing a page costs about as much as 8 rows of it */
        t->cost = (uint32_t)(t->n_rows * t->n_heads + 8) *
                  (uint32_t)kv_pages_for((int64_t)t->pos + t->n_rows);
        plan->head += t->n_heads;
        if (plan->head < p->n_heads)
            continue;
        plan->head = 0;
        plan->done_rows += t->n_rows;
        if (plan->done_rows == s->n_rows) {
            plan->done_rows = 0;
            plan->seq++;
        }
    }
    sort_longest_first(plan);
    return plan->n_tasks > 0;
}
