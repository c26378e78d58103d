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

int comm_reduce_scatter_dev(struct comm *c, void *buf, size_t n, enum dtype dt, void *stream)
{
    return c->ops->reduce_scatter_dev ? c->ops->reduce_scatter_dev(c, buf, n, dt, stream)
                                      : ERR_UNSUPPORTED;
}

int comm_reserve_rows(struct comm *c, const struct comm_rows *rows, struct err_msg *why)
{
    return c->ops->reserve_rows ? c->ops->reserve_rows(c, rows, why) : 0;
}

int comm_scatter_begin(struct comm *c, void *buf, int32_t n, void *stream)
{
    return c->ops->scatter_begin ? c->ops->scatter_begin(c, buf, n, stream) : ERR_UNSUPPORTED;
}

int comm_scatter_end(struct comm *c, void *stream, struct comm_shares *out)
{
    return c->ops->scatter_end ? c->ops->scatter_end(c, stream, out) : ERR_UNSUPPORTED;
}

void *comm_gather_rows(struct comm *c)
{
    return c->ops->gather_rows ? c->ops->gather_rows(c) : NULL;
}

int comm_gather_begin(struct comm *c, int32_t n, void *stream)
{
    return c->ops->gather_begin ? c->ops->gather_begin(c, n, stream) : ERR_UNSUPPORTED;
}

int comm_gather_end(struct comm *c, void *stream)
{
    return c->ops->gather_end ? c->ops->gather_end(c, stream) : ERR_UNSUPPORTED;
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
