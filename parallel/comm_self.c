/* The communicator of a model that runs in one process: every collective is the identity, a post
 * has no reader, and only an abort can fail it. */
#include "parallel/comm.h"

#include "core/mem.h"

#include <stdatomic.h>
#include <string.h>

struct comm_self {
    struct comm base;
    atomic_bool aborted; /* comm_abort may come from another thread */
};

static int self_check(struct comm *c)
{
    struct comm_self *s = (struct comm_self *)c;
    return atomic_load(&s->aborted) ? ERR_PEER : 0;
}

static void self_close(struct comm *c)
{
    mem_free(c);
}

static int self_all_reduce(struct comm *c, float *buf, size_t n)
{
    (void)buf;
    (void)n;
    return self_check(c);
}

static int self_all_gather(struct comm *c, float *out, const float *in, size_t n)
{
    if (out != in && n)
        memcpy(out, in, n * sizeof *out);
    return self_check(c);
}

static int self_barrier(struct comm *c)
{
    return self_check(c);
}

static int self_post(struct comm *c, const void *msg, size_t len)
{
    (void)msg;
    (void)len;
    return self_check(c);
}

/* Only followers wait, and there are none. */
static int self_wait(struct comm *c, void *buf, size_t cap, size_t *len)
{
    (void)c;
    (void)buf;
    (void)cap;
    (void)len;
    return ERR_INVALID;
}

static void self_abort(struct comm *c)
{
    struct comm_self *s = (struct comm_self *)c;
    atomic_store(&s->aborted, true);
}

static int self_all_reduce_dev(struct comm *c, void *buf, size_t n, enum dtype dt, void *stream)
{
    (void)buf;
    (void)n;
    (void)dt;
    (void)stream;
    return self_check(c);
}

// cppcheck-suppress constParameter ; the table fixes the signature
static int self_all_gather_dev(struct comm *c, void *out, const void *in, size_t n, enum dtype dt,
                               void *stream)
{
    (void)dt;
    (void)stream;
    return n && out != in ? ERR_UNSUPPORTED : self_check(c);
}

static const struct comm_ops comm_self_ops = {
    .name = "self",
    .close = self_close,
    .all_reduce = self_all_reduce,
    .all_gather = self_all_gather,
    .barrier = self_barrier,
    .post = self_post,
    .wait = self_wait,
    .abort = self_abort,
    .all_reduce_dev = self_all_reduce_dev,
    .all_gather_dev = self_all_gather_dev,
    .poll = self_check,
};

int comm_self_create(struct comm **out)
{
    struct comm_self *s = mem_zalloc(1, sizeof *s);
    s->base = (struct comm){&comm_self_ops, 0, 1};
    *out = &s->base;
    return 0;
}
