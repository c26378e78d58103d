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
