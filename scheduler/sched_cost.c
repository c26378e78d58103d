#include "scheduler/sched_cost.h"

#include <math.h>

/* A step weighs so much of the next one. */
#define KEEP 0.9

/* Steps that are all alike do not tell a from b: then all is taken for the cost of tokens. So it is
 * where the fit of both would make either negative, but for pairs that alone explain the times. */
static void fit(struct sched_cost *c)
{
    const double det = c->nn * c->pp - c->np * c->np;
    double a = c->n / c->nn, b = 0;
    if (det > 1e-6 * c->nn * c->pp) {
        a = (c->n * c->pp - c->p * c->np) / det;
        b = (c->p * c->nn - c->n * c->np) / det;
    }
    if (b < 0)
        a = c->n / c->nn, b = 0;
    if (a < 0)
        a = 0, b = c->p / c->pp;
    c->token_us = a;
    c->pair_us = b;
}

void sched_cost_learn(struct sched_cost *c, struct sched_work w, bool decodes, double us)
{
    if (w.tokens <= 0) {
        c->decode_us = c->decode_us > 0 ? KEEP * c->decode_us + (1 - KEEP) * us : us;
        return;
    }
    if (decodes && c->decode_us > us) /* one stalled once, or there were more of them */
        c->decode_us = us;
    const double t = decodes ? us - c->decode_us : us;
    if (t <= 0)
        return;
    c->nn = KEEP * c->nn + w.tokens * w.tokens / t;
    c->np = KEEP * c->np + w.tokens * w.pairs / t;
    c->pp = KEEP * c->pp + w.pairs * w.pairs / t;
    c->n = KEEP * c->n + w.tokens;
    c->p = KEEP * c->p + w.pairs;
    fit(c);
}

double sched_cost_us(const struct sched_cost *c, struct sched_work w)
{
    return c->token_us * w.tokens + c->pair_us * w.pairs;
}

/* The root of b n^2 / 2 + (a + b start) n = us, in the form that does not cancel. */
int32_t sched_cost_room(const struct sched_cost *c, int32_t start, int32_t most, double us)
{
    const double slope = c->token_us + c->pair_us * start;
    if (us <= 0)
        return 0;
    if (isinf(us) || (slope <= 0 && c->pair_us <= 0)) /* no limit, or nothing known */
        return most;
    const double n = 2 * us / (slope + sqrt(slope * slope + 2 * c->pair_us * us));
    return n < most ? (int32_t)n : most;
}
