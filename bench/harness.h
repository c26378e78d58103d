/* Timing shared by the benches: interleaved repetitions, medians, and the line that says on what
 * they ran. On a shared machine a slow moment hits one repetition of every variant, not all
 * repetitions of one, and the median of per-repetition ratios forgets it. */
#ifndef BENCH_HARNESS_H
#define BENCH_HARNESS_H

enum { BENCH_REPS = 64, BENCH_VARIANTS = 24 };

struct bench_variant {
    const char *name;
    void (*fn)(void *arg);
    void *arg;
    double s[BENCH_REPS]; /* seconds */
    double median_s;
};

/* CPU time of the process does not see other users of the machine, but counts every thread, waiting
 * ones too: use it with one thread. */
enum bench_clock { BENCH_WALL, BENCH_CPU };

/* One warm-up round, then reps rounds over all variants. */
void bench_run(struct bench_variant *v, int n_variants, int reps, enum bench_clock clock);
/* Median over repetitions of a's time over b's. */
double bench_ratio(const struct bench_variant *a, const struct bench_variant *b, int reps);
double bench_median(const double *x, int n);
/* Model name of the processor; date and time, UTC. */
void bench_cpu_name(char *out, unsigned long len);
void bench_date(char *out, unsigned long len);

#endif
