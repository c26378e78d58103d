/* Ranks of one host over a POSIX shared memory object: who creates it, who joins, who has died.
 * The collectives themselves are in shm_area.c.
 *
 * The object has a name only while the ranks gather. Rank 0 creates it (exclusively, mode 0600),
 * the others wait for it, all wait for all, then rank 0 unlinks the name: from there on the memory
 * belongs to the processes that map it and no crash can leave it behind. A follower that sees
 * rank 0 die while gathering unlinks the name in its place.
 *
 * Death is read from pidfds, which become readable when a process ends (also when it stays a
 * zombie) and cannot be fooled by a reused pid. Where the kernel has none, kill(pid, 0) does. */
#define LOG_MODULE "comm"
#include "core/clock.h"
#include "core/log.h"
#include "core/mem.h"
#include "parallel/comm.h"
#include "parallel/shm_area.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { NAME_MAX_LEN = 128, JOIN_SLICE_US = 50000, APPEAR_NAP_US = 2000 };

struct comm_shm {
    struct comm base;
    struct shm_area area;
    void *mem;
    size_t bytes;
    char name[NAME_MAX_LEN + 1];
    bool named;                /* rank 0: the name still exists */
    int pidfds[SHM_MAX_RANKS]; /* -1: none; only touched by the thread that runs collectives */
    bool (*peers_alive)(void *arg);
    void *peers_arg;
};

static struct comm_shm *self(struct comm *c)
{
    return (struct comm_shm *)c;
}

/* ---- liveness ---- */

static bool process_gone(int pid, int *fd)
{
    if (*fd < 0)
        *fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (*fd < 0)
        return errno == ESRCH || (kill(pid, 0) < 0 && errno == ESRCH);
    struct pollfd p = {*fd, POLLIN, 0};
    return poll(&p, 1, 0) == 1;
}

static int dead_rank(void *arg)
{
    struct comm_shm *s = arg;
    for (int r = 0; r < s->area.n_ranks; r++) {
        int pid = atomic_load(&s->area.head->ranks[r].pid);
        if (r != s->area.rank && pid > 0 && process_gone(pid, &s->pidfds[r]))
            return r;
    }
    return -1;
}

/* ---- the object ---- */

static int check_config(const struct comm_shm_config *cfg, struct err_msg *why)
{
    const char *n = cfg->name;
    size_t len = n ? strlen(n) : 0;
    if (len < 2 || len > NAME_MAX_LEN || n[0] != '/')
        return err_set(why, ERR_INVALID,
                       "shared memory name '%.64s' must be '/' and 1 to %d "
                       "characters",
                       n ? n : "", NAME_MAX_LEN - 1);
    for (size_t i = 1; i < len; i++) {
        if (!isalnum((unsigned char)n[i]) && !strchr("-_.", n[i]))
            return err_set(why, ERR_INVALID,
                           "shared memory name '%.64s': only letters, digits and "
                           "-_. may follow the '/'",
                           n);
    }
    if (cfg->timeout_ms < 1)
        return err_set(why, ERR_INVALID, "timeout_ms is %" PRId64 ", must be positive",
                       cfg->timeout_ms);
    if (cfg->rank < 0 || cfg->rank >= cfg->n_ranks)
        return err_set(why, ERR_INVALID, "rank %d is not in [0, %d)", cfg->rank, cfg->n_ranks);
    if (!shm_area_bytes(cfg->n_ranks, cfg->max_floats, cfg->max_msg))
        return err_set(why, ERR_INVALID, "n_ranks %d, max_floats %zu or max_msg %zu out of range",
                       cfg->n_ranks, cfg->max_floats, cfg->max_msg);
    return 0;
}

static int map_object(struct comm_shm *s, int fd, struct err_msg *why)
{
    void *p = mmap(NULL, s->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return err_set(why, -errno, "cannot map %zu bytes of shared memory %s: %s", s->bytes,
                       s->name, err_str(-errno));
    s->mem = p;
    return 0;
}

/* Rank 0. The memory is reserved here: writing to a hole of a full file system would be SIGBUS. */
static int create_object(struct comm_shm *s, const struct comm_shm_config *cfg, struct err_msg *why)
{
    int fd = shm_open(s->name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return err_set(why, -errno, "cannot create shared memory %s: %s", s->name, err_str(-errno));
    s->named = true;
    int err = -posix_fallocate(fd, 0, (off_t)s->bytes);
    if (err < 0)
        err = err_set(why, err, "cannot take %zu bytes of shared memory (/dev/shm): %s", s->bytes,
                      err_str(err));
    else
        err = map_object(s, fd, why);
    (void)close(fd);
    if (err == 0)
        shm_area_format(s->mem, cfg->n_ranks, cfg->max_floats, cfg->max_msg);
    return err;
}

/* One try of a follower: 0 when mapped and formatted, -EAGAIN when rank 0 is not that far yet. */
static int open_object(struct comm_shm *s, struct err_msg *why)
{
    struct stat st;
    int err = -EAGAIN;
    int fd = shm_open(s->name, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0)
        return errno == ENOENT ? -EAGAIN
                               : err_set(why, -errno, "cannot open shared memory %s: %s", s->name,
                                         err_str(-errno));
    if (fstat(fd, &st) < 0)
        err = err_set(why, -errno, "cannot examine shared memory %s", s->name);
    else if (st.st_uid != geteuid())
        err = err_set(why, -EPERM, "shared memory %s belongs to another user", s->name);
    else if (st.st_size > 0 && (size_t)st.st_size != s->bytes)
        err = err_set(why, ERR_CONFIG,
                      "shared memory %s has %lld bytes, this rank expects %zu: "
                      "ranks, max_floats or max_msg differ",
                      s->name, (long long)st.st_size, s->bytes);
    else if (st.st_size > 0)
        err = s->mem ? 0 : map_object(s, fd, why);
    (void)close(fd);
    if (err == 0 && !shm_area_ready(s->mem))
        err = -EAGAIN;
    return err;
}

static void nap(int64_t us)
{
    const struct timespec ts = {us / 1000000, us % 1000000 * 1000};
    (void)nanosleep(&ts, NULL);
}

static int await_object(struct comm_shm *s, int64_t deadline_us, struct err_msg *why)
{
    for (;;) {
        int err = open_object(s, why);
        if (err != -EAGAIN)
            return err;
        if (clock_monotonic_us(NULL) >= deadline_us)
            return err_set(why, ERR_PEER, "rank 0 did not create shared memory %s in time",
                           s->name);
        nap(APPEAR_NAP_US);
    }
}

/* All wait for all. */
static int gather(struct comm_shm *s, int64_t deadline_us, struct err_msg *why)
{
    for (;;) {
        int64_t now = clock_monotonic_us(NULL), left = deadline_us > now ? deadline_us - now : 0;
        int err = shm_area_await_join(&s->area, left < JOIN_SLICE_US ? left : JOIN_SLICE_US);
        if (err != -ETIMEDOUT)
            return err < 0 ? err_set(why, err, "a rank failed while the ranks gathered") : 0;
        if (s->peers_alive && !s->peers_alive(s->peers_arg))
            return err_set(why, ERR_PEER, "a rank ended before it had joined; its log says why");
        if (left == 0)
            return err_set(why, ERR_PEER, "only %d of %d ranks joined in time",
                           shm_area_n_joined(&s->area), s->area.n_ranks);
    }
}

static void unlink_name(struct comm_shm *s)
{
    if (s->named)
        (void)shm_unlink(s->name);
    s->named = false;
}

static int join(struct comm_shm *s, const struct comm_shm_config *cfg, struct err_msg *why)
{
    int64_t wait_ms = cfg->join_ms > 0 ? cfg->join_ms : cfg->timeout_ms;
    int64_t deadline_us = clock_monotonic_us(NULL) + wait_ms * 1000;

    TRY(cfg->rank == 0 ? create_object(s, cfg, why) : await_object(s, deadline_us, why));
    TRY(shm_area_attach(&s->area, s->mem, cfg->rank, cfg->n_ranks, cfg->max_floats, cfg->max_msg,
                        why));
    s->area.timeout_us = cfg->timeout_ms * 1000;
    s->area.dead_rank = dead_rank;
    s->area.dead_arg = s;
    int err = gather(s, deadline_us, why);
    if (err < 0) {
        shm_area_fail(&s->area);
        int leader = atomic_load(&s->area.head->ranks[0].pid);
        if (cfg->rank > 0 && leader > 0 && process_gone(leader, &s->pidfds[0]))
            s->named = true; /* nobody else is left to unlink it */
    }
    unlink_name(s);
    return err;
}

/* ---- the table ---- */

static void shm_close(struct comm *c)
{
    struct comm_shm *s = self(c);
    unlink_name(s);
    if (s->mem)
        (void)munmap(s->mem, s->bytes);
    for (int r = 0; r < SHM_MAX_RANKS; r++) {
        if (s->pidfds[r] >= 0)
            (void)close(s->pidfds[r]);
    }
    mem_free(s);
}

static int shm_all_reduce(struct comm *c, float *buf, size_t n)
{
    return shm_area_reduce(&self(c)->area, buf, n);
}

static int shm_all_gather(struct comm *c, float *out, const float *in, size_t n)
{
    return shm_area_gather(&self(c)->area, out, in, n);
}

static int shm_barrier(struct comm *c)
{
    return shm_area_barrier(&self(c)->area);
}

static int shm_post(struct comm *c, const void *msg, size_t len)
{
    return shm_area_post(&self(c)->area, msg, len);
}

static int shm_wait(struct comm *c, void *buf, size_t cap, size_t *len)
{
    return shm_area_wait(&self(c)->area, buf, cap, len);
}

static void shm_abort(struct comm *c)
{
    shm_area_fail(&self(c)->area);
}

static void shm_set_timeout(struct comm *c, int64_t timeout_ms)
{
    self(c)->area.timeout_us = timeout_ms * 1000;
}

static int shm_poll(struct comm *c)
{
    struct comm_shm *s = self(c);
    if (shm_area_failed(&s->area))
        return ERR_PEER;
    int dead = dead_rank(s);
    if (dead < 0)
        return 0;
    log_error("rank=%d peer=%d the peer's process is gone", c->rank, dead);
    shm_area_fail(&s->area);
    return ERR_PEER;
}

static const struct comm_ops comm_shm_ops = {
    .name = "shm",
    .close = shm_close,
    .all_reduce = shm_all_reduce,
    .all_gather = shm_all_gather,
    .barrier = shm_barrier,
    .post = shm_post,
    .wait = shm_wait,
    .abort = shm_abort,
    .poll = shm_poll,
    .set_timeout = shm_set_timeout,
};

int comm_shm_create(struct comm **out, const struct comm_shm_config *cfg, struct err_msg *why)
{
    *out = NULL;
    TRY(check_config(cfg, why));
    struct comm_shm *s = mem_zalloc(1, sizeof *s);
    s->base = (struct comm){&comm_shm_ops, cfg->rank, cfg->n_ranks};
    s->bytes = shm_area_bytes(cfg->n_ranks, cfg->max_floats, cfg->max_msg);
    s->peers_alive = cfg->peers_alive;
    s->peers_arg = cfg->peers_arg;
    (void)snprintf(s->name, sizeof s->name, "%s", cfg->name);
    for (int r = 0; r < SHM_MAX_RANKS; r++)
        s->pidfds[r] = -1;
    int err = join(s, cfg, why);
    if (err < 0) {
        shm_close(&s->base);
        return err;
    }
    *out = &s->base;
    return 0;
}

int comm_shm_name(char *buf, size_t cap)
{
    uint64_t random = 0;
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random)
        return errno ? -errno : -EIO;
    int n = snprintf(buf, cap, "/sluice-%ld-%016" PRIx64, (long)getpid(), random);
    return n > 0 && (size_t)n < cap ? 0 : -ENAMETOOLONG;
}
