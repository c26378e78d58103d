/* Workers sleep on a condition variable and wake per pool_run; tasks come from one atomic counter.
 * A short spin before sleeping keeps back-to-back loops (one per layer and operation) from paying
 * two context switches each. The generation number makes a wake-up unambiguous. */
#include "core/pool.h"

#include "core/mem.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>

enum { POOL_SPIN = 2000 };

struct pool {
    int n_threads;
    pthread_t *threads;
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    atomic_uint generation; /* counts pool_run calls; written under lock */
    bool stop;
    pool_fn fn;
    void *arg;
    int n_tasks;
    atomic_int next;
    atomic_int busy; /* workers that have not finished this generation */
};

struct worker_arg {
    struct pool *pool;
    int index;
};

static void drain(struct pool *p, int worker)
{
    int task;
    while ((task = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed)) < p->n_tasks)
        p->fn(p->arg, task, worker);
}

/* Waits for a generation other than seen; returns false when the pool stops. */
static bool await_work(struct pool *p, unsigned *seen)
{
    for (int i = 0; i < POOL_SPIN; i++) {
        if (atomic_load_explicit(&p->generation, memory_order_acquire) != *seen)
            break;
        if (i % 64 == 63)
            (void)sched_yield();
    }
    (void)pthread_mutex_lock(&p->lock);
    while (!p->stop && atomic_load(&p->generation) == *seen)
        (void)pthread_cond_wait(&p->wake, &p->lock);
    bool go = !p->stop;
    *seen = atomic_load(&p->generation);
    (void)pthread_mutex_unlock(&p->lock);
    return go;
}

static void *worker_main(void *arg)
{
    struct worker_arg w = *(struct worker_arg *)arg;
    unsigned seen = 0;

    mem_free(arg);
    while (await_work(w.pool, &seen)) {
        drain(w.pool, w.index);
        if (atomic_fetch_sub(&w.pool->busy, 1) == 1) {
            (void)pthread_mutex_lock(&w.pool->lock);
            (void)pthread_cond_signal(&w.pool->done);
            (void)pthread_mutex_unlock(&w.pool->lock);
        }
    }
    return NULL;
}

static int available_processors(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        return CPU_COUNT(&set);
    return 1;
}

int pool_create(struct pool **out, int n_threads)
{
    if (n_threads <= 0)
        n_threads = available_processors();
    struct pool *p = mem_zalloc(1, sizeof *p);
    p->threads = mem_zalloc((size_t)n_threads, sizeof *p->threads);
    (void)pthread_mutex_init(&p->lock, NULL);
    (void)pthread_cond_init(&p->wake, NULL);
    (void)pthread_cond_init(&p->done, NULL);
    p->n_threads = 1;
    for (int i = 1; i < n_threads; i++) {
        struct worker_arg *w = mem_alloc(sizeof *w);
        *w = (struct worker_arg){p, i};
        int e = pthread_create(&p->threads[i], NULL, worker_main, w);
        if (e) {
            mem_free(w);
            pool_destroy(p);
            return -e;
        }
        p->n_threads++;
    }
    *out = p;
    return 0;
}

void pool_destroy(struct pool *p)
{
    if (!p)
        return;
    (void)pthread_mutex_lock(&p->lock);
    p->stop = true;
    (void)pthread_cond_broadcast(&p->wake);
    (void)pthread_mutex_unlock(&p->lock);
    for (int i = 1; i < p->n_threads; i++)
        (void)pthread_join(p->threads[i], NULL);
    (void)pthread_cond_destroy(&p->wake);
    (void)pthread_cond_destroy(&p->done);
    (void)pthread_mutex_destroy(&p->lock);
    mem_free(p->threads);
    mem_free(p);
}

int pool_size(const struct pool *p)
{
    return p->n_threads;
}

void pool_run(struct pool *p, pool_fn fn, void *arg, int n_tasks)
{
    if (p->n_threads == 1 || n_tasks <= 1) {
        for (int i = 0; i < n_tasks; i++)
            fn(arg, i, 0);
        return;
    }
    (void)pthread_mutex_lock(&p->lock);
    p->fn = fn;
    p->arg = arg;
    p->n_tasks = n_tasks;
    atomic_store(&p->next, 0);
    atomic_store(&p->busy, p->n_threads - 1);
    atomic_fetch_add_explicit(&p->generation, 1, memory_order_release);
    (void)pthread_cond_broadcast(&p->wake);
    (void)pthread_mutex_unlock(&p->lock);
    drain(p, 0);
    for (int i = 0; i < POOL_SPIN && atomic_load_explicit(&p->busy, memory_order_acquire) > 0;
         i++) {
        if (i % 64 == 63)
            (void)sched_yield();
    }
    (void)pthread_mutex_lock(&p->lock);
    while (atomic_load(&p->busy) > 0)
        (void)pthread_cond_wait(&p->done, &p->lock);
    (void)pthread_mutex_unlock(&p->lock);
}
