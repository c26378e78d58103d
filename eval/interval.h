/* 95% confidence intervals of scores and of what a policy changes in them.
 *
 * A score is between 0 and 1. Where it is 0 or 1 the interval of the mean is Wilson's; a score that
 * also takes values between has a smaller variance than that of a coin with the same mean, so that
 * the interval is then wider than it need be, never narrower.
 *
 * What a policy changes is judged by the pairs that differ alone: the mean of what prompts gained
 * and the mean of what they lost are between 0 and 1, have Wilson's intervals, and are joined by
 * recovering the variances (MOVER), with the correlation that shares of one whole have. Unlike an
 * interval from the standard deviation of the differences it does not shrink to nothing when no
 * pair differs: n such pairs leave room for 3.84 / (n + 3.84).
 * Sources: Wilson, JASA 22 (1927); Zou and Donner, Statistics in Medicine 27, 1693 (2008). */
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
