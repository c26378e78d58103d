/* What prompts cost a step, learned from the steps that ran: a chunk of n tokens behind `start`
 * others takes a n + b n (start + n / 2) us, for its products and for its attention, beside what
 * the decodes of a step take. a and b are a least-squares fit in which a step counts by 1 / us,
 * since errors grow with it, and for less as it ages, because gates make attention cheaper and the
 * load changes.
 *
 * All zeros is a fit that knows nothing. No allocation, no clock: plain arithmetic on its
 * arguments. */
#ifndef SCHEDULER_SCHED_COST_H
#define SCHEDULER_SCHED_COST_H

#include <stdbool.h>
#include <stdint.h>

/* Of one step: prompt tokens, and the (query, key) pairs n (start + n / 2) of their chunks. */
struct sched_work {
    double tokens, pairs;
};

struct sched_cost {
    double decode_us;         /* a step of generated tokens alone */
    double nn, np, pp, n, p;  /* sums over steps: products of n tokens and p pairs by us; n; p */
    double token_us, pair_us; /* a, b */
};

static inline struct sched_work sched_work_of(int32_t start, int32_t n)
{
    return (struct sched_work){n, (double)n * ((double)start + (double)n / 2)};
}

/* A step with these prompt chunks, and with decodes or without, took so long. */
void sched_cost_learn(struct sched_cost *c, struct sched_work w, bool decodes, double us);
/* What chunks add to a step; 0 as long as nothing is known. */
double sched_cost_us(const struct sched_cost *c, struct sched_work w);
/* How many tokens of a prompt, up to `most`, whose first `start` are computed, take so long. */
int32_t sched_cost_room(const struct sched_cost *c, int32_t start, int32_t most, double us);

#endif
