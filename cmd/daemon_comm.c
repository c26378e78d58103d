#include "cmd/daemon_comm.h"

#include "cmd/secret.h"
#include "parallel/comm_tcp.h"
#include "parallel/ranks.h"

#ifdef WITH_CUDA
#    include "core/dev_cuda.h"
#    include "parallel/comm_nccl.h"
#endif

#include <string.h>

enum {
    PIECE_FLOATS = 1 << 18,
    LOAD_MS = 600000,       /* for ranks to load their weights; one that dies is noticed at once */
    NODES_JOIN_MS = 600000, /* hosts are started by hand, or wait for their files */
    MAX_RANKS = 64,
    LIMBS = 4, /* a 64-bit number as floats that hold 16 bits each */
};

int daemon_comm_local_ranks(const struct daemon_options *o)
{
    return (int)(o->tp / o->nnodes);
}

int daemon_comm_local_rank(const struct daemon_options *o)
{
    return (int)(o->rank % daemon_comm_local_ranks(o));
}

/* Ranks may load at different speeds, or wait for the same disk. */
static int64_t load_timeout(const struct daemon_options *o)
{
    return o->comm_timeout > LOAD_MS ? o->comm_timeout : LOAD_MS;
}

static int open_shm(struct comm **out, const struct daemon_options *o,
                    const struct daemon_peers *peers, size_t max_msg, struct err_msg *why)
{
    const struct comm_shm_config cfg = {
        .name = peers->shm,
        .rank = (int)o->rank,
        .n_ranks = (int)o->tp,
        .max_floats = PIECE_FLOATS,
        .max_msg = max_msg,
        .timeout_ms = load_timeout(o),
        .join_ms = o->comm_timeout,
        .peers_alive = peers->ranks ? ranks_alive : NULL,
        .peers_arg = peers->ranks,
    };
    return comm_shm_create(out, &cfg, why);
}

static int open_tcp(struct comm **out, const struct daemon_options *o,
                    const struct daemon_peers *peers, size_t max_msg, struct err_msg *why)
{
    char token[COMM_TCP_TOKEN + 1];
    TRY(secret_read(token, sizeof token, "leader-token-file", o->leader_token_file, why));
    const struct comm_tcp_config cfg = {
        .leader = o->leader,
        .token = token,
        .rank = (int)o->rank,
        .n_ranks = (int)o->tp,
        .max_floats = PIECE_FLOATS,
        .max_msg = max_msg,
        .timeout_ms = load_timeout(o),
        .join_ms = NODES_JOIN_MS,
        .peers_alive = peers->ranks ? ranks_alive : NULL,
        .peers_arg = peers->ranks,
        .on_fail = peers->on_fail,
        .fail_arg = peers->fail_arg,
    };
    return comm_tcp_create(out, &cfg, why);
}

/* Of the ranks, all or none must have a GPU: --device auto decides on each by itself. */
static int count_gpus(struct comm *host, bool mine, bool *all, struct err_msg *why)
{
    float n = mine ? 1.0f : 0.0f;
    TRY(comm_all_reduce(host, &n, 1));
    *all = n > (float)host->n_ranks - 0.5f;
    if (n > 0.5f && !*all)
        return err_set(why, ERR_CONFIG,
                       "--tp: only %.0f of the %d ranks have a GPU; give --device cpu, or fewer "
                       "ranks",
                       (double)n, host->n_ranks);
    return 0;
}

#ifdef WITH_CUDA
static int add_nccl(struct comm **out, const struct daemon_options *o, const struct dev *dev,
                    struct err_msg *why)
{
    const struct comm_nccl_config cfg = {
        .host = *out,
        .device = dev_cuda_index(dev),
        .timeout_ms = load_timeout(o),
        .join_ms = NODES_JOIN_MS,
        .one_host = o->nnodes == 1,
    };
    return comm_nccl_create(out, &cfg, why);
}
#else
static int add_nccl(struct comm **out, const struct daemon_options *o, const struct dev *dev,
                    struct err_msg *why)
{
    (void)out;
    (void)o;
    (void)dev;
    return err_set(why, ERR_UNSUPPORTED, "this build has no NCCL");
}
#endif

int daemon_comm_open(struct comm **out, const struct daemon_options *o,
                     const struct daemon_peers *peers, const struct dev *dev, size_t max_msg,
                     struct err_msg *why)
{
    struct comm *host = NULL;
    bool gpus = false;

    *out = NULL;
    if (o->tp == 1)
        return comm_self_create(out);
    TRY(o->nnodes > 1 ? open_tcp(&host, o, peers, max_msg, why)
                      : open_shm(&host, o, peers, max_msg, why));
    *out = host;
    int err = count_gpus(host, dev->ops != &dev_cpu, &gpus, why);
    if (err == 0 && gpus)
        err = add_nccl(out, o, dev, why);
    if (err < 0) {
        comm_close(host);
        *out = NULL;
    }
    return err;
}

/* Everybody's number, in rank order. */
static int gather_numbers(struct comm *c, uint64_t value, uint64_t *all)
{
    float mine[LIMBS], limbs[LIMBS * MAX_RANKS];
    ASSERT(c->n_ranks <= MAX_RANKS);
    for (int k = 0; k < LIMBS; k++)
        mine[k] = (float)(value >> (16 * k) & 0xffff);
    TRY(comm_all_gather(c, limbs, mine, LIMBS));
    for (int r = 0; r < c->n_ranks; r++) {
        all[r] = 0;
        for (int k = 0; k < LIMBS; k++)
            all[r] |= (uint64_t)limbs[r * LIMBS + k] << (16 * k);
    }
    return 0;
}

int daemon_comm_same(struct comm *c, uint64_t value, const char *what, struct err_msg *why)
{
    uint64_t all[MAX_RANKS];
    int err = gather_numbers(c, value, all);
    if (err < 0)
        return err_set(why, err, "a rank failed while the ranks compared their %s", what);
    for (int r = 1; r < c->n_ranks; r++) {
        if (all[r] != all[0])
            return err_set(why, ERR_MISMATCH, "rank %d and rank 0 differ in their %s", r, what);
    }
    return 0;
}

int daemon_comm_least(struct comm *c, int32_t *n)
{
    uint64_t all[MAX_RANKS];
    TRY(gather_numbers(c, (uint64_t)*n, all));
    for (int r = 0; r < c->n_ranks; r++)
        *n = all[r] < (uint64_t)*n ? (int32_t)all[r] : *n;
    return 0;
}
