#include "eval/interval.h"

#include <math.h>

static const double z = 1.959963984540054; /* 97.5% of a normal distribution */

static struct interval wilson(double mean, int32_t n)
{
    double z2n = z * z / n, middle = (mean + z2n / 2.0) / (1.0 + z2n);
    double half = z / (1.0 + z2n) * sqrt(fmax(mean * (1.0 - mean), 0.0) / n + z2n / n / 4.0);
    return (struct interval){mean, fmax(middle - half, 0.0), fmin(middle + half, 1.0)};
}

static double mean_of(const double *x, int32_t n)
{
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++)
        sum += x[i];
    return sum / n;
}

struct interval interval_mean(const double *scores, int32_t n)
{
    return n > 0 ? wilson(mean_of(scores, n), n) : (struct interval){0.0, 0.0, 1.0};
}

/* Of two shares of one whole. */
static double correlation(double a, double b)
{
    double spread = a * (1.0 - a) * b * (1.0 - b);
    return spread > 0.0 ? -a * b / sqrt(spread) : 0.0;
}

/* The root of a variance that is put together from those of two estimates. */
static double joined(double a, double b, double r)
{
    return sqrt(fmax(a * a - 2.0 * r * a * b + b * b, 0.0));
}

struct interval interval_difference(const double *scores, const double *base, int32_t n)
{
    double gain = 0.0, loss = 0.0;
    if (n < 1)
        return (struct interval){0.0, -1.0, 1.0};
    for (int32_t i = 0; i < n; i++) {
        gain += fmax(scores[i] - base[i], 0.0) / n;
        loss += fmax(base[i] - scores[i], 0.0) / n;
    }
    struct interval up = wilson(gain, n), down = wilson(loss, n);
    double r = correlation(gain, loss), d = gain - loss;
    return (struct interval){d, fmax(d - joined(gain - up.low, down.high - loss, r), -1.0),
                             fmin(d + joined(up.high - gain, loss - down.low, r), 1.0)};
}
