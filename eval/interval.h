/* 95% confidence intervals of scores and of what a policy changes in them.
 *
 * A score is between 0 and 1. Where it is 0 or 1 the interval of the mean is Wilson's; a score that
 * also takes values between has a smaller variance than that of a coin with the same mean, so that
 * the interval is then wider than it need be, never narrower.
 *
 * The difference of two means over the same prompts is Newcombe's method 10: Wilson's intervals of
 * both, joined with the correlation of the paired scores. Unlike an interval from the standard
 * deviation of the differences it does not shrink to nothing when all pairs agree.
 * Sources: Wilson, JASA 22 (1927); Newcombe, Statistics in Medicine 17, 2635 (1998). */
#ifndef EVAL_INTERVAL_H
#define EVAL_INTERVAL_H

#include <stdint.h>

struct interval {
    double mean, low, high;
};

/* n = 0: anything, 0 to 1. */
struct interval interval_mean(const double *scores, int32_t n);
/* Of scores - base [n], pair by pair; n = 0: -1 to 1. */
struct interval interval_difference(const double *scores, const double *base, int32_t n);

#endif
