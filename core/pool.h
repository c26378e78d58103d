/* Worker threads for data-parallel loops on the CPU.
 * pool_run splits [0, n_tasks) dynamically: which worker runs a task is not fixed, so a task's
 * result must not depend on it. The caller works too, as worker 0. One pool_run at a time per pool;
 * not reentrant. */
#ifndef CORE_POOL_H
#define CORE_POOL_H

#include "core/err.h"

struct pool;

typedef void (*pool_fn)(void *arg, int task, int worker);

/* n_threads >= 1 counts the caller; 0 means one per available processor. */
MUST_CHECK int pool_create(struct pool **out, int n_threads);
void pool_destroy(struct pool *p); /* accepts NULL */
int pool_size(const struct pool *p);
/* Returns when every task has finished; tasks are handed out in increasing order. */
void pool_run(struct pool *p, pool_fn fn, void *arg, int n_tasks);

#endif
