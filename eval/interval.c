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

/* With Newcombe's correction for continuity; 0 where one of the two does not vary. */
static double correlation(const double *x, const double *y, double mx, double my, int32_t n)
{
    double xx = 0.0, yy = 0.0, xy = 0.0;
    for (int32_t i = 0; i < n; i++) {
        xx += (x[i] - mx) * (x[i] - mx);
        yy += (y[i] - my) * (y[i] - my);
        xy += (x[i] - mx) * (y[i] - my);
    }
    if (xy > 0.0)
        xy = fmax(xy - 0.5, 0.0);
    return xx > 1e-12 && yy > 1e-12 ? xy / sqrt(xx * yy) : 0.0;
}

struct interval interval_difference(const double *scores, const double *base, int32_t n)
{
    if (n < 1)
        return (struct interval){0.0, -1.0, 1.0};
    struct interval a = interval_mean(scores, n), b = interval_mean(base, n);
    double r = correlation(scores, base, a.mean, b.mean, n), d = a.mean - b.mean;
    double down_a = a.mean - a.low, up_a = a.high - a.mean;
    double down_b = b.mean - b.low, up_b = b.high - b.mean;
    double down = down_a * down_a - 2.0 * r * down_a * up_b + up_b * up_b;
    double up = up_a * up_a - 2.0 * r * up_a * down_b + down_b * down_b;
    return (struct interval){d, d - sqrt(fmax(down, 0.0)), d + sqrt(fmax(up, 0.0))};
}
