/* See harness.h. */
#include "bench/harness.h"

#include "core/err.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double bench_median(const double *x, int n)
{
    double y[BENCH_REPS];
    ASSERT(n >= 1 && n <= BENCH_REPS);
    memcpy(y, x, (size_t)n * sizeof *y);
    qsort(y, (size_t)n, sizeof *y, compare);
    return n % 2 ? y[n / 2] : (y[n / 2 - 1] + y[n / 2]) / 2;
}

static double now(enum bench_clock clock)
{
    struct timespec ts;
    (void)clock_gettime(clock == BENCH_CPU ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static double seconds(struct bench_variant *v, enum bench_clock clock)
{
    double start = now(clock);
    v->fn(v->arg);
    return now(clock) - start;
}

void bench_run(struct bench_variant *v, int n_variants, int reps, enum bench_clock clock)
{
    for (int i = 0; i < n_variants; i++)
        v[i].fn(v[i].arg);
    for (int r = 0; r < reps; r++) {
        for (int i = 0; i < n_variants; i++)
            v[i].s[r] = seconds(&v[i], clock);
    }
    for (int i = 0; i < n_variants; i++)
        v[i].median_s = bench_median(v[i].s, reps);
}

double bench_ratio(const struct bench_variant *a, const struct bench_variant *b, int reps)
{
    double x[BENCH_REPS];
    for (int r = 0; r < reps; r++)
        x[r] = a->s[r] / b->s[r];
    return bench_median(x, reps);
}

void bench_cpu_name(char *out, unsigned long len)
{
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "re");
    (void)snprintf(out, len, "unknown processor");
    while (f && fgets(line, sizeof line, f)) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !colon)
            continue;
        (void)snprintf(out, len, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
        break;
    }
    if (f)
        (void)fclose(f);
}

void bench_date(char *out, unsigned long len)
{
    struct tm tm;
    time_t today = time(NULL);
    if (!gmtime_r(&today, &tm) || !strftime(out, len, "%Y-%m-%d %H:%M UTC", &tm))
        (void)snprintf(out, len, "unknown date");
}
