#define LOG_MODULE "model"
#include "cmd/daemon_model.h"

#include "cmd/device.h"
#include "core/clock.h"
#include "core/log.h"
#include "model/config.h"
#include "model/weights.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

struct load_progress {
    int64_t last_us;
    bool terminal;
};

/* At most ten lines a second on a terminal; nothing in a pipe. */
static void show_progress(void *arg, uint64_t done, uint64_t total)
{
    struct load_progress *p = arg;
    int64_t now = clock_monotonic_us(NULL);
    if (!p->terminal || (now - p->last_us < 100000 && done < total))
        return;
    p->last_us = now;
    (void)fprintf(stderr, "\rloading weights %3.0f%% of %.1f MiB%s",
                  total ? 100.0 * (double)done / (double)total : 100.0, (double)total / 1048576.0,
                  done >= total ? "\n" : "");
}

/* Tokens of a step where --token-budget does not say: what one chunk wants to be fast. */
static int32_t choose_budget(const struct daemon_options *o, const struct dev *dev)
{
    enum { CPU = 2048, GPU = 8192, MOST = 32768 };
    const int64_t on_gpus = GPU * o->tp < MOST ? GPU * o->tp : MOST;
    const int64_t wanted = dev->ops == &dev_cpu ? CPU : on_gpus, least = o->max_running + 128;
    if (o->token_budget > 0)
        return (int32_t)o->token_budget;
    return (int32_t)(wanted > least ? wanted : least);
}

/* The plan of a step: every input token, page table and a header a sequence. */
static size_t plan_bytes(const struct daemon_options *o, int32_t token_budget, int64_t max_len)
{
    size_t pages = (size_t)kv_pages_for(max_len);
    return (size_t)token_budget * 4 + (size_t)o->max_running * (pages * 4 + 256) + 4096;
}

static int threads_per_rank(const struct daemon_options *o)
{
    int64_t n = o->threads ? o->threads : sysconf(_SC_NPROCESSORS_ONLN);
    n /= daemon_comm_local_ranks(o);
    return n < 1 ? 1 : (int)n;
}

/* What the pages may take of the free memory: a GPU is this rank's own. */
static size_t page_memory(const struct daemon_model *d, const struct daemon_options *o,
                          size_t free_bytes)
{
    if (d->dev->ops != &dev_cpu)
        return free_bytes / 10 * 9;
    return free_bytes / 2 / (size_t)daemon_comm_local_ranks(o);
}

/* Pages for this rank: as told, else a share of the free memory, never more than useful. */
static int size_pages(struct daemon_model *d, const struct daemon_options *o, struct err_msg *why)
{
    size_t page = model_page_bytes(d->model);
    int64_t useful = (int64_t)kv_pages_for(d->max_model_len) * o->max_running;
    int64_t n = o->kv_pages;
    if (n == 0 && o->kv_memory > 0)
        n = o->kv_memory / (int64_t)page;
    if (o->kv_pages == 0 && o->kv_memory == 0) {
        size_t free_bytes, total_bytes;
        int err = dev_mem_info(d->dev, &free_bytes, &total_bytes);
        if (err < 0)
            return err_set(why, err, "cannot read the free memory: %s; set --kv-memory",
                           err_str(err));
        n = (int64_t)(page_memory(d, o, free_bytes) / page);
        n = n < useful ? n : useful;
    }
    int64_t least = kv_pages_for(KV_BLOCK_TOKENS) + 1;
    if (n < least)
        return err_set(why, ERR_CONFIG,
                       "--kv-memory: %" PRId64 " pages of %.1f KiB are too few, %" PRId64
                       " is the least",
                       n, (double)page / 1024.0, least);
    if (n > INT32_MAX - 1)
        return err_set(why, ERR_CONFIG, "--kv-pages: %" PRId64 " is more than a page id can name",
                       n);
    d->n_pages = (int32_t)n;
    struct err_msg inner = {""};
    int err = daemon_comm_least(d->comm, &d->n_pages); /* page ids are the same on all ranks */
    if (err < 0)
        return err_set(why, err, "a rank failed before it had pages");
    err = model_take_pages(d->model, d->n_pages, &inner);
    if (err < 0)
        return err_set(why, err,
                       "no memory for %" PRId64
                       " cache pages of %.1f KiB: %.200s (set --kv-memory lower)",
                       n, (double)page / 1024.0, err_why(&inner, err));
    return 0;
}

static int open_parts(struct daemon_model *d, const struct daemon_options *o,
                      const struct daemon_peers *peers, struct err_msg *why)
{
    struct load_progress progress = {.terminal = o->rank == 0 && isatty(STDERR_FILENO) == 1};
    struct model_config cfg = {
        .dir = o->model,
        .random_weights = o->random_weights,
        .dtype = device_dtype(o->dtype),
        .kv_dtype = device_dtype(o->kv_dtype),
        .max_seqs = (int32_t)o->max_running,
        .max_position = o->max_model_len,
        .progress = show_progress,
        .progress_arg = &progress,
    };
    struct llama_config file;
    struct llama_shard shard;
    TRY(llama_config_load(&file, o->model, why));
    TRY(llama_shard_make(&shard, &file, (int)o->rank, (int)o->tp, why)); /* before any device */
    d->max_model_len = (int32_t)(o->max_model_len ? o->max_model_len : file.max_position);
    cfg.max_position = d->max_model_len;
    TRY(device_open(&d->dev, o->device, daemon_comm_local_rank(o), threads_per_rank(o), why));
    d->token_budget = cfg.max_tokens = choose_budget(o, d->dev);
    const size_t plan = plan_bytes(o, d->token_budget, d->max_model_len);
    TRY(daemon_comm_open(&d->comm, o, peers, d->dev, plan, why));
    cfg.dev = d->dev;
    cfg.comm = d->comm;
    TRY(model_open(&d->model, &cfg, why));
    TRY(daemon_policy_load(&d->policy, o, model_info(d->model), why));
    TRY(daemon_comm_same(d->comm, model_info(d->model)->fingerprint, "model", why));
    TRY(daemon_comm_same(d->comm, d->policy.fingerprint, "thresholds or policy", why));
    TRY(model_set_policy(d->model, &d->policy.attn, why));
    TRY(size_pages(d, o, why));
    comm_set_timeout(d->comm, o->comm_timeout);
    return 0;
}

int daemon_model_open(struct daemon_model *d, const struct daemon_options *o,
                      const struct daemon_peers *peers, struct err_msg *why)
{
    memset(d, 0, sizeof *d);
    int err = open_parts(d, o, peers, why);
    if (err < 0)
        daemon_model_close(d);
    return err;
}

void daemon_model_close(struct daemon_model *d)
{
    model_close(d->model);
    daemon_policy_free(&d->policy);
    comm_close(d->comm);
    dev_close(d->dev);
    memset(d, 0, sizeof *d);
}
