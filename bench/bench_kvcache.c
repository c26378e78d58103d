/* Cost of the cache's bookkeeping on one core: pages taken and given back, and what a 128K-token
 * prefix costs to publish, to look up and to attach. Metadata only; no device.
 *
 *   bench_kvcache [repetitions]      prints ns per page (median over repetitions) */
#include "core/mem.h"
#include "kvcache/kv_cache.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { PREFIX = 128 * 1024, PREFIX_PAGES = PREFIX / KV_PAGE_TOKENS, POOL = 4 * PREFIX_PAGES };

enum figure { ALLOC, FREE, PUBLISH, PEEK, ATTACH, FREE_CACHED, EVICT, N_FIGURES };
static const char *const names[N_FIGURES] = {"reserve, free page",
                                             "close, page without content",
                                             "publish",
                                             "peek",
                                             "attach",
                                             "close, cached page",
                                             "reserve, evicting"};

static int64_t now_ns(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000000 + ts.tv_nsec;
}

static void must(int err)
{
    if (err < 0) {
        (void)fprintf(stderr, "bench_kvcache: %s\n", err_str(err));
        exit(1); // NOLINT(concurrency-mt-unsafe): one thread
    }
}

/* The time since *t goes to one figure, per page, and a new lap begins. */
static void lap(int64_t *t, double *ns, int32_t n_pages)
{
    int64_t now = now_ns();
    *ns = (double)(now - *t) / n_pages;
    *t = now_ns();
}

static void measure(struct kv_cache *kv, const int32_t *tokens, double ns[N_FIGURES])
{
    int32_t slot, other;
    int64_t t;
    must(kv_seq_open(kv, &slot));
    t = now_ns();
    must(kv_seq_reserve(kv, slot, PREFIX));
    lap(&t, &ns[ALLOC], PREFIX_PAGES);
    kv_seq_close(kv, slot);
    lap(&t, &ns[FREE], PREFIX_PAGES);
    must(kv_seq_open(kv, &slot));
    must(kv_seq_reserve(kv, slot, PREFIX));
    t = now_ns();
    kv_seq_publish(kv, slot, 1, tokens, PREFIX);
    lap(&t, &ns[PUBLISH], PREFIX_PAGES);
    kv_seq_close(kv, slot);
    lap(&t, &ns[FREE_CACHED], PREFIX_PAGES);
    (void)kv_prefix_peek(kv, 1, tokens, PREFIX + 1, NULL);
    lap(&t, &ns[PEEK], PREFIX_PAGES);
    must(kv_seq_open(kv, &slot));
    t = now_ns();
    if (kv_seq_attach(kv, slot, 1, tokens, PREFIX + 1) != PREFIX)
        must(ERR_INTERNAL);
    lap(&t, &ns[ATTACH], PREFIX_PAGES);
    kv_seq_close(kv, slot);
    must(kv_seq_open(kv, &slot));
    must(kv_seq_open(kv, &other));
    must(kv_seq_reserve(kv, slot, (POOL - PREFIX_PAGES) * KV_PAGE_TOKENS));
    t = now_ns();
    must(kv_seq_reserve(kv, other, PREFIX));
    lap(&t, &ns[EVICT], PREFIX_PAGES);
    kv_seq_close(kv, other);
    kv_seq_close(kv, slot);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    enum { MAX_REPS = 1000 };
    static double ns[N_FIGURES][MAX_REPS];
    long reps = argc > 1 ? strtol(argv[1], NULL, 10) : 30;
    struct kv_cache *kv = NULL;
    struct kv_cache_config cfg = {
        .n_pages = POOL, .max_seqs = 256, .max_pages_per_seq = POOL, .prefix_cache = true};
    int32_t *tokens = mem_alloc((PREFIX + 1) * sizeof *tokens);
    if (reps < 1 || reps > MAX_REPS)
        reps = 30;
    for (int32_t i = 0; i <= PREFIX; i++)
        tokens[i] = i * 7 % 32000;
    must(kv_cache_create(&kv, &cfg, NULL));
    for (long r = -2; r < reps; r++) { /* two rounds warm up */
        double one[N_FIGURES];
        measure(kv, tokens, one);
        for (int f = 0; f < N_FIGURES; f++)
            ns[f][r < 0 ? 0 : r] = one[f];
    }
    must(kv_check(kv, NULL));
    printf("operation,ns_per_page_median,us_per_128k_tokens\n");
    for (int f = 0; f < N_FIGURES; f++) {
        qsort(ns[f], (size_t)reps, sizeof ns[f][0], by_value);
        double mid = ns[f][reps / 2];
        printf("\"%s\",%.1f,%.0f\n", names[f], mid, mid * PREFIX_PAGES / 1e3);
    }
    kv_cache_destroy(kv);
    mem_free(tokens);
    return 0;
}
