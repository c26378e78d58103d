/* See shm_area.h. Memory order: the owner writes its share, then raises its word (release); a
 * reader sees the raised word (acquire), then reads the share. `value` and `sleepers` are accessed
 * sequentially consistently, as in Dekker's algorithm: either the writer sees the sleeper, or the
 * sleeper sees the new value before it sleeps. */
#define LOG_MODULE "comm"
#include "parallel/shm_area.h"

#include "core/clock.h"
#include "core/log.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    SHM_MAGIC = 0x53434d31, /* "SCM1": changes with the layout */
    WORD_STEP = 2,
    WORD_FAILED = 1,
    SPIN_POLLS = 4000,
    SLICE_US = 100000,       /* between looks at the peers' processes in an exchange */
    IDLE_SLICE_US = 1000000, /* the same while a follower has nothing to do */
    SUM_BLOCK = 2048,        /* floats summed at a time; stays in the first-level cache */
};

enum tag_kind { TAG_REDUCE = 1, TAG_GATHER, TAG_BARRIER };

/* ---- layout ---- */

static size_t round_up(size_t n)
{
    return (n + SHM_LINE - 1) / SHM_LINE * SHM_LINE;
}

/* Floats from one rank's share to the next. */
static size_t share_stride(size_t max_floats)
{
    return round_up(max_floats * sizeof(float)) / sizeof(float);
}

size_t shm_area_bytes(int n_ranks, size_t max_floats, size_t max_msg)
{
    const size_t limit = (size_t)1 << 40; /* sizes below it cannot overflow the sum */
    if (n_ranks < 1 || n_ranks > SHM_MAX_RANKS || max_floats < 1 || max_floats > limit / 1024 ||
        max_msg > limit)
        return 0;
    return round_up(sizeof(struct shm_head)) + round_up(max_msg) +
           2 * (size_t)n_ranks * share_stride(max_floats) * sizeof(float);
}

void shm_area_format(void *mem, int n_ranks, size_t max_floats, size_t max_msg)
{
    struct shm_head *h = mem;
    h->n_ranks = (uint32_t)n_ranks;
    h->max_floats = max_floats;
    h->max_msg = max_msg;
    h->bytes = shm_area_bytes(n_ranks, max_floats, max_msg);
    atomic_store_explicit(&h->magic, SHM_MAGIC, memory_order_release);
}

bool shm_area_ready(const void *mem)
{
    const struct shm_head *h = mem;
    return atomic_load_explicit(&h->magic, memory_order_acquire) != 0;
}

static float *share(const struct shm_area *a, unsigned half, int rank)
{
    size_t index = (size_t)half * (size_t)a->n_ranks + (size_t)rank;
    return a->shares + index * share_stride(a->max_floats);
}

/* ---- words ---- */

static void futex_wake_all(atomic_uint *w)
{
    (void)syscall(SYS_futex, w, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void word_raise(struct shm_word *w)
{
    (void)atomic_fetch_add(&w->value, WORD_STEP);
    if (atomic_load(&w->sleepers) > 0)
        futex_wake_all(&w->value);
}

static void word_fail(struct shm_word *w)
{
    if (!(atomic_fetch_or(&w->value, WORD_FAILED) & WORD_FAILED))
        futex_wake_all(&w->value);
}

/* The count of a word wraps around; a reader is never 2^30 events behind. */
static bool reached(unsigned value, unsigned target)
{
    return (int)((value & ~(unsigned)WORD_FAILED) - target) >= 0;
}

/* One sleep of at most `us` on a word that still held `seen`. */
static void word_sleep(struct shm_word *w, unsigned seen, int64_t us)
{
    const struct timespec ts = {us / 1000000, us % 1000000 * 1000};
    (void)atomic_fetch_add(&w->sleepers, 1);
    (void)syscall(SYS_futex, &w->value, FUTEX_WAIT, seen, &ts, NULL, 0);
    (void)atomic_fetch_sub(&w->sleepers, 1);
}

static bool word_spin(const struct shm_area *a, struct shm_word *w, unsigned target)
{
    for (int i = 0; i < a->spin; i++) {
        unsigned v = atomic_load_explicit(&w->value, memory_order_acquire);
        if ((v & WORD_FAILED) || reached(v, target))
            return true;
        if (i % 256 == 255)
            (void)sched_yield();
    }
    return false;
}

/* Waits for count * 2 on w. wait_us < 0: no deadline. Returns 0, -ETIMEDOUT, or ERR_PEER when the
 * communicator has failed or a process is gone. */
static int word_await(struct shm_area *a, struct shm_word *w, uint32_t count, int64_t wait_us)
{
    const unsigned target = count * WORD_STEP;
    const int64_t slice = wait_us < 0 ? IDLE_SLICE_US : SLICE_US;
    int64_t deadline = -1;

    (void)word_spin(a, w, target);
    for (;;) {
        unsigned v = atomic_load(&w->value);
        if (reached(v, target)) /* counts even if somebody has failed since */
            return 0;
        if (v & WORD_FAILED)
            return ERR_PEER;
        int64_t now = clock_monotonic_us(NULL), nap = slice;
        if (wait_us >= 0) {
            if (deadline < 0)
                deadline = now + wait_us;
            if (now >= deadline)
                return -ETIMEDOUT;
            nap = deadline - now < slice ? deadline - now : slice;
        }
        word_sleep(w, v, nap);
        if (!a->dead_rank || atomic_load(&w->value) != v)
            continue;
        int dead = a->dead_rank(a->dead_arg);
        if (dead < 0 || atomic_load(&w->value) != v)
            continue; /* a peer that did its part and then left is no failure */
        log_error("rank=%d peer=%d the peer's process is gone", a->rank, dead);
        return ERR_PEER;
    }
}

void shm_area_fail(struct shm_area *a)
{
    word_fail(&a->head->joined);
    word_fail(&a->head->posted);
    for (int r = 0; r < a->n_ranks; r++) {
        word_fail(&a->head->ranks[r].arrived);
        word_fail(&a->head->ranks[r].taken);
    }
}

/* Asked on entry to every call: a failed communicator starts nothing new. */
bool shm_area_failed(const struct shm_area *a)
{
    return atomic_load(&a->head->ranks[a->rank].arrived.value) & WORD_FAILED;
}

/* Waits within the timeout; any failure fails the communicator for all. */
static int await_rank(struct shm_area *a, struct shm_word *w, uint32_t count, int peer,
                      const char *what)
{
    int err = word_await(a, w, count, a->timeout_us);
    if (err == 0)
        return 0;
    if (err == -ETIMEDOUT)
        log_error("rank=%d peer=%d the peer did not %s within %" PRId64 " ms", a->rank, peer, what,
                  a->timeout_us / 1000);
    shm_area_fail(a);
    return ERR_PEER;
}

/* ---- joining ---- */

static int check_head(const struct shm_head *h, int n_ranks, size_t max_floats, size_t max_msg,
                      struct err_msg *why)
{
    if (atomic_load_explicit(&h->magic, memory_order_acquire) != SHM_MAGIC)
        return err_set(why, ERR_VERSION,
                       "the ranks' shared memory has another layout: all ranks "
                       "must run the same program");
    if (h->n_ranks != (uint32_t)n_ranks)
        return err_set(why, ERR_CONFIG, "n_ranks is %d here and %" PRIu32 " on rank 0", n_ranks,
                       h->n_ranks);
    if (h->max_floats != max_floats)
        return err_set(why, ERR_CONFIG, "max_floats is %zu here and %" PRIu64 " on rank 0",
                       max_floats, h->max_floats);
    if (h->max_msg != max_msg)
        return err_set(why, ERR_CONFIG, "max_msg is %zu here and %" PRIu64 " on rank 0", max_msg,
                       h->max_msg);
    return 0;
}

/* Spinning pays only while every rank has a processor of its own. */
static int spin_polls(int n_ranks)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0 || CPU_COUNT(&set) < n_ranks)
        return 0;
    return SPIN_POLLS;
}

int shm_area_attach(struct shm_area *a, void *mem, int rank, int n_ranks, size_t max_floats,
                    size_t max_msg, struct err_msg *why)
{
    struct shm_head *h = mem;
    int nobody = 0;

    if (rank < 0 || rank >= n_ranks)
        return err_set(why, ERR_INVALID, "rank %d is not in [0, %d)", rank, n_ranks);
    TRY(check_head(h, n_ranks, max_floats, max_msg, why));
    if (!atomic_compare_exchange_strong(&h->ranks[rank].pid, &nobody, (int)getpid()))
        return err_set(why, -EEXIST, "rank %d has already joined, as process %d", rank, nobody);
    *a = (struct shm_area){
        .head = h,
        .msg = (unsigned char *)mem + round_up(sizeof *h),
        .shares = (float *)(void *)((char *)mem + round_up(sizeof *h) + round_up(max_msg)),
        .rank = rank,
        .n_ranks = n_ranks,
        .max_floats = max_floats,
        .max_msg = max_msg,
        .spin = spin_polls(n_ranks),
    };
    word_raise(&h->joined);
    return 0;
}

int shm_area_n_joined(const struct shm_area *a)
{
    return (int)(atomic_load(&a->head->joined.value) / WORD_STEP);
}

int shm_area_await_join(struct shm_area *a, int64_t wait_us)
{
    return word_await(a, &a->head->joined, (uint32_t)a->n_ranks, wait_us);
}

/* ---- exchange ---- */

static uint64_t make_tag(enum tag_kind kind, size_t n)
{
    return (uint64_t)kind << 56 | (uint64_t)n;
}

/* Publishes this rank's n floats (n <= max_floats) and waits for everybody's. Afterwards
 * share(a, *half, r) may be read until the next-but-one exchange. */
static int exchange(struct shm_area *a, uint64_t tag, const float *in, size_t n, unsigned *half)
{
    struct shm_rank *me = &a->head->ranks[a->rank];

    if (shm_area_failed(a))
        return ERR_PEER;
    *half = a->n_exchanges++ & 1;
    if (n)
        memcpy(share(a, *half, a->rank), in, n * sizeof *in);
    me->tag[*half] = tag;
    word_raise(&me->arrived);
    for (int r = 0; r < a->n_ranks; r++) {
        struct shm_rank *peer = &a->head->ranks[r];
        if (r == a->rank)
            continue;
        TRY(await_rank(a, &peer->arrived, a->n_exchanges, r, "take part in the collective"));
        if (peer->tag[*half] != tag) {
            log_error("rank=%d peer=%d the ranks have diverged: collective %" PRIx64
                      " here, %" PRIx64 " there",
                      a->rank, r, tag, peer->tag[*half]);
            shm_area_fail(a);
            return ERR_PEER;
        }
    }
    return 0;
}

/* buf = the sum of the shares in rank order: the same additions on every rank. */
static void sum_shares(const struct shm_area *a, unsigned half, float *buf, size_t n)
{
    for (size_t at = 0; at < n; at += SUM_BLOCK) {
        size_t len = n - at < SUM_BLOCK ? n - at : SUM_BLOCK;
        float *to = buf + at;
        memcpy(to, share(a, half, 0) + at, len * sizeof *to);
        for (int r = 1; r < a->n_ranks; r++) {
            const float *from = share(a, half, r) + at;
            for (size_t i = 0; i < len; i++)
                to[i] += from[i];
        }
    }
}

int shm_area_reduce(struct shm_area *a, float *buf, size_t n)
{
    unsigned half;
    for (size_t at = 0; at < n; at += a->max_floats) {
        size_t len = n - at < a->max_floats ? n - at : a->max_floats;
        TRY(exchange(a, make_tag(TAG_REDUCE, n), buf + at, len, &half));
        sum_shares(a, half, buf + at, len);
    }
    return 0;
}

int shm_area_gather(struct shm_area *a, float *out, const float *in, size_t n)
{
    unsigned half;
    for (size_t at = 0; at < n; at += a->max_floats) {
        size_t len = n - at < a->max_floats ? n - at : a->max_floats;
        TRY(exchange(a, make_tag(TAG_GATHER, n), in + at, len, &half));
        for (int r = 0; r < a->n_ranks; r++)
            memcpy(out + (size_t)r * n + at, share(a, half, r), len * sizeof *out);
    }
    return 0;
}

int shm_area_barrier(struct shm_area *a)
{
    unsigned half;
    return exchange(a, make_tag(TAG_BARRIER, 0), NULL, 0, &half);
}

/* ---- mailbox ---- */

int shm_area_post(struct shm_area *a, const void *msg, size_t len)
{
    if (a->rank != 0 || len > a->max_msg)
        return ERR_INVALID;
    for (int r = 1; r < a->n_ranks; r++)
        TRY(await_rank(a, &a->head->ranks[r].taken, a->n_posted, r, "take the last message"));
    if (shm_area_failed(a))
        return ERR_PEER;
    memcpy(a->msg, msg, len);
    a->head->msg_len = len;
    a->n_posted++;
    word_raise(&a->head->posted);
    return 0;
}

int shm_area_wait(struct shm_area *a, void *buf, size_t cap, size_t *len)
{
    if (a->rank == 0)
        return ERR_INVALID;
    if (shm_area_failed(a))
        return ERR_PEER;
    int err = word_await(a, &a->head->posted, a->n_posted + 1, -1);
    if (err < 0) {
        shm_area_fail(a);
        return err;
    }
    *len = (size_t)a->head->msg_len;
    if (*len > cap || *len > a->max_msg)
        return -EMSGSIZE; /* left in place */
    memcpy(buf, a->msg, *len);
    a->n_posted++;
    word_raise(&a->head->ranks[a->rank].taken);
    return 0;
}
