#include "bench/prefill_ranks.h"

#include "core/mem.h"
#include "parallel/comm.h"
#include "parallel/ranks.h"

#include <stdio.h>
#include <string.h>

enum { CLOSE_GRACE_MS = 60000 };

/* The options that sluiced would have had. */
static int daemon_options_for(struct daemon_options *d, const struct prefill_options *o, int32_t tp,
                              struct err_msg *why)
{
    memset(d, 0, sizeof *d);
    conf_defaults(&daemon_program, d);
    TRY(conf_set(&daemon_program, d, "model", o->model, why));
    TRY(conf_set(&daemon_program, d, "device", o->device, why));
    if (o->thresholds)
        TRY(conf_set(&daemon_program, d, "thresholds", o->thresholds, why));
    d->force_thresholds = o->force_thresholds;
    d->random_weights = o->random_weights;
    d->tp = tp;
    d->rank = o->rank;
    d->threads = o->threads;
    d->token_budget = prefill_chunk(o, tp);
    d->max_running = 1;
    d->max_model_len = o->longest;
    d->kv_pages = kv_pages_for(o->longest) + kv_pages_for(KV_BLOCK_TOKENS); /* sluiced's least */
    return 0;
}

static int start_copies(struct prefill_ranks *p, int32_t tp, int argc, char **argv,
                        struct err_msg *why)
{
    char option[32];
    char **with_tp = mem_zalloc((size_t)argc + 2, sizeof *with_tp);
    for (int i = 0; i < argc; i++)
        with_tp[i] = argv[i];
    (void)snprintf(option, sizeof option, "--tp=%d", tp);
    with_tp[argc] = option;
    const struct ranks_config cfg = {
        .loop = &p->loop, .n_ranks = tp, .argc = argc + 1, .argv = with_tp, .shm = p->shm};
    int err = comm_shm_name(p->shm, sizeof p->shm);
    if (err == 0)
        err = ranks_start(&p->ranks, &cfg, why);
    mem_free(with_tp);
    return err;
}

int prefill_ranks_open(struct prefill_ranks *p, const struct prefill_options *o, int32_t tp,
                       int argc, char **argv, struct err_msg *why)
{
    memset(p, 0, sizeof *p);
    TRY(daemon_options_for(&p->opt, o, tp, why));
    TRY(uv_loop_init(&p->loop));
    if (tp > 1)
        TRY(start_copies(p, tp, argc, argv, why));
    const struct daemon_peers peers = {.shm = p->shm, .ranks = p->ranks};
    TRY(daemon_model_open(&p->parts, &p->opt, &peers, why));
    comm_set_overlap(p->parts.comm, o->overlap);
    return 0;
}

void prefill_ranks_close(struct prefill_ranks *p)
{
    model_stop_followers(p->parts.model);
    uv_update_time(&p->loop); /* it has not run for as long as the bench measured */
    ranks_stop(p->ranks, CLOSE_GRACE_MS);
    daemon_model_close(&p->parts);
    (void)uv_run(&p->loop, UV_RUN_DEFAULT);
    (void)uv_loop_close(&p->loop);
    conf_free(&daemon_program, &p->opt);
}

int prefill_ranks_follow(const struct prefill_options *o, struct err_msg *why)
{
    struct daemon_options d;
    struct daemon_model parts;
    const struct daemon_peers peers = {.shm = o->shm};
    TRY(ranks_follower_init(why));
    TRY(daemon_options_for(&d, o, o->tps[0], why));
    TRY(daemon_model_open(&parts, &d, &peers, why));
    comm_set_overlap(parts.comm, o->overlap);
    TRY(model_follow(parts.model));
    daemon_model_close(&parts);
    conf_free(&daemon_program, &d);
    return 0;
}
