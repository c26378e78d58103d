/* Injectable monotonic time, in microseconds. Tests pass a fake; only cmd/ and the engine create
 * the real one. */
#ifndef CORE_CLOCK_H
#define CORE_CLOCK_H

#include <stdint.h>
#include <time.h>

struct clock {
    int64_t (*now_us)(void *arg);
    void *arg;
};

static inline int64_t clock_monotonic_us(void *arg)
{
    struct timespec ts;
    (void)arg;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static inline struct clock clock_real(void)
{
    return (struct clock){clock_monotonic_us, NULL};
}

static inline int64_t clock_now_us(const struct clock *c)
{
    return c->now_us(c->arg);
}

#endif
