/* Calls through the table of whichever communicator it is. */
#include "parallel/comm.h"

void comm_close(struct comm *c)
{
    if (c)
        c->ops->close(c);
}

int comm_all_reduce(struct comm *c, float *buf, size_t n)
{
    return c->ops->all_reduce(c, buf, n);
}

int comm_all_gather(struct comm *c, float *out, const float *in, size_t n)
{
    return c->ops->all_gather(c, out, in, n);
}

int comm_barrier(struct comm *c)
{
    return c->ops->barrier(c);
}

int comm_post(struct comm *c, const void *msg, size_t len)
{
    return c->ops->post(c, msg, len);
}

int comm_wait(struct comm *c, void *buf, size_t cap, size_t *len)
{
    return c->ops->wait(c, buf, cap, len);
}

void comm_abort(struct comm *c)
{
    c->ops->abort(c);
}

void comm_set_timeout(struct comm *c, int64_t timeout_ms)
{
    if (c->ops->set_timeout)
        c->ops->set_timeout(c, timeout_ms);
}

int comm_all_reduce_dev(struct comm *c, void *buf, size_t n, enum dtype dt, void *stream)
{
    return c->ops->all_reduce_dev ? c->ops->all_reduce_dev(c, buf, n, dt, stream) : ERR_UNSUPPORTED;
}

int comm_all_gather_dev(struct comm *c, void *out, const void *in, size_t n, enum dtype dt,
                        void *stream)
{
    return c->ops->all_gather_dev ? c->ops->all_gather_dev(c, out, in, n, dt, stream)
                                  : ERR_UNSUPPORTED;
}

int comm_reserve_sums(struct comm *c, size_t max_bytes, struct err_msg *why)
{
    return c->ops->reserve_sums ? c->ops->reserve_sums(c, max_bytes, why) : 0;
}

int comm_sum_begin(struct comm *c, void *buf, size_t n, enum dtype dt, void *stream)
{
    return c->ops->sum_begin ? c->ops->sum_begin(c, buf, n, dt, stream) : ERR_UNSUPPORTED;
}

int comm_sum_end(struct comm *c, void *stream, const void **more)
{
    return c->ops->sum_end ? c->ops->sum_end(c, stream, more) : ERR_UNSUPPORTED;
}

bool comm_overlaps(const struct comm *c)
{
    return c->ops->overlaps && c->ops->overlaps(c);
}

void comm_set_overlap(struct comm *c, enum comm_overlap way)
{
    if (c->ops->set_overlap)
        c->ops->set_overlap(c, way);
}

int comm_poll(struct comm *c)
{
    return c->ops->poll ? c->ops->poll(c) : 0;
}

int comm_wait_stream(struct comm *c, void *stream, int64_t timeout_ms)
{
    return c->ops->wait_stream ? c->ops->wait_stream(c, stream, timeout_ms) : ERR_UNSUPPORTED;
}
