#define LOG_MODULE "model"
#include "model/model.h"

#include "attention/attn_lost.h"
#include "core/clock.h"
#include "core/log.h"
#include "core/mem.h"
#include "kvcache/kv_store.h"
#include "model/config.h"
#include "model/count_rel.h"
#include "model/describe.h"
#include "model/fingerprint.h"
#include "model/llama.h"
#include "model/step_plan.h"
#include "parallel/comm.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

enum { N_COUNTERS = sizeof(struct attn_counts) / sizeof(uint64_t) /* of a sequence */ };

/* Page maxima of a layer, for the calibrator; fn, mass_fn and dev_fn NULL: off. */
struct probe {
    model_tile_fn fn;
    model_mass_fn mass_fn; /* instead of fn, with max.mass */
    model_tile_dev_fn dev_fn;
    void *arg;
    struct attn_tile_max max;
    struct attn_cuda_probe dev_max;
    float scale;
    size_t n_heads;
    const struct attn_seq *seq;
};

struct model {
    struct model_info info;
    struct llama_config config;
    struct llama_shard shard;
    struct llama_weights weights;
    struct dev *dev;
    struct comm *comm; /* NULL: this rank is the only one */
    struct llama *llama;
    struct kv_store *store;
    struct attn_head_policy *head_policy; /* this rank's slice; NULL: all pages */
    struct step_plan plan;
    void *message;
    size_t message_bytes;
    int32_t *output_of;              /* [max_seqs] index into the plan's outputs, -1: none */
    const struct batch *batch;       /* rank 0: of the step */
    struct batch_token *tokens;      /* rank 0: of its result */
    struct attn_counts *seq_counts;  /* [max_seqs] of the step */
    struct attn_counts *head_counts; /* [n_layers, n_heads] since open */
    float *limbs;                    /* counters on their way through an all-reduce */
    struct probe probe;
    struct count_rel rel_counts;
};

/* The number formats: what was asked for, where the device can. st NULL: random weights. */
static int choose_dtypes(struct model *m, const struct model_config *cfg,
                         const struct safetensors *st, struct err_msg *why)
{
    const bool half = llama_ops_of(m->dev)->half;
    enum dtype own = half ? (st ? weights_dtype16(st) : DTYPE_BF16) : DTYPE_F32;

    m->info.dtype = cfg->dtype == MODEL_DTYPE_AUTO ? own : (enum dtype)cfg->dtype;
    if (half == (m->info.dtype == DTYPE_F32))
        return err_set(why, ERR_UNSUPPORTED, "device %s computes in %s, not in %s",
                       m->dev->ops->name, half ? "bf16 and f16" : "f32", dtype_name(m->info.dtype));
    m->info.kv_dtype =
        cfg->kv_dtype == MODEL_DTYPE_AUTO ? m->info.dtype : (enum dtype)cfg->kv_dtype;
    if (half && m->info.kv_dtype != m->info.dtype)
        return err_set(why, ERR_UNSUPPORTED,
                       "device %s: a model in %s has a cache in %s, not in %s", m->dev->ops->name,
                       dtype_name(m->info.dtype), dtype_name(m->info.dtype),
                       dtype_name(m->info.kv_dtype));
    return 0;
}

/* This rank's weights; st NULL: random ones. */
static int load_weights(struct model *m, const struct model_config *cfg,
                        const struct safetensors *st, struct err_msg *why)
{
    m->info.fingerprint = model_fingerprint(&m->config, st);
    TRY(choose_dtypes(m, cfg, st, why));
    const struct weights_config weights = {.dev = m->dev,
                                           .dtype = m->info.dtype,
                                           .stage = llama_ops_of(m->dev)->stage,
                                           .st = st,
                                           .config = &m->config,
                                           .shard = &m->shard,
                                           .progress = {cfg->progress, cfg->progress_arg}};
    return weights_load(&m->weights, &weights, why);
}

/* Reads the folder: configuration, identity, this rank's weights. */
static int load(struct model *m, const struct model_config *cfg, struct err_msg *why)
{
    struct safetensors *st = NULL;
    const int rank = m->comm ? m->comm->rank : 0, n_ranks = m->comm ? m->comm->n_ranks : 1;

    TRY(llama_config_load(&m->config, cfg->dir, why));
    TRY(llama_shard_make(&m->shard, &m->config, rank, n_ranks, why));
    TRY(model_describe_config(&m->info, cfg->dir, &m->config, why));
    if (!cfg->random_weights)
        TRY(safetensors_open_dir(&st, cfg->dir, why));
    int err = load_weights(m, cfg, st, why);
    safetensors_close(st);
    return err;
}

static int take_scratch(struct model *m, const struct model_config *cfg, struct err_msg *why)
{
    const size_t max_seqs = (size_t)cfg->max_seqs;
    const struct llama_setup setup = {.dev = m->dev,
                                      .comm = m->comm,
                                      .config = &m->config,
                                      .shard = &m->shard,
                                      .weights = &m->weights,
                                      .max_tokens = cfg->max_tokens,
                                      .max_outputs = cfg->max_seqs,
                                      .max_position = m->plan.limits.max_position};
    TRY(llama_create(&m->llama, &setup, why));
    m->output_of = mem_zalloc(max_seqs, sizeof *m->output_of);
    m->seq_counts = mem_zalloc(max_seqs, sizeof *m->seq_counts);
    m->head_counts =
        mem_zalloc((size_t)m->config.n_layers * (size_t)m->config.n_heads, sizeof *m->head_counts);
    if (m->shard.n_ranks > 1) {
        m->message_bytes =
            step_plan_max_message(cfg->max_seqs, cfg->max_tokens, m->plan.limits.max_position);
        m->message = mem_try_aligned(1, m->message_bytes);
        m->limbs = mem_zalloc(max_seqs * N_COUNTERS * 4, sizeof *m->limbs);
        if (!m->message)
            return err_set(why, -ENOMEM, "no memory for the plan of a step");
    }
    return 0;
}

int model_open(struct model **out, const struct model_config *cfg, struct err_msg *why)
{
    ASSERT(cfg->max_seqs > 0 && cfg->max_tokens > 0);
    struct model *m = mem_zalloc(1, sizeof *m);
    m->dev = cfg->dev;
    m->comm = cfg->comm;
    int err = load(m, cfg, why);
    if (err < 0)
        goto fail;
    const struct plan_limits limits = {
        .max_seqs = cfg->max_seqs,
        .max_tokens = cfg->max_tokens,
        .max_position = cfg->max_position > 0 ? cfg->max_position : m->config.max_position,
        .vocab_size = m->config.vocab_size,
    };
    step_plan_init(&m->plan, &limits);
    TRY_GOTO(err, take_scratch(m, cfg, why), fail);
    *out = m;
    return 0;
fail:
    model_close(m);
    return err;
}

/* Entries of one layer's maxima. */
static size_t probe_entries(const struct attn_cuda_probe *p, size_t n_heads)
{
    return n_heads * (size_t)p->max_groups * (size_t)p->max_pages;
}

static void drop_probe(struct model *m)
{
    struct probe *p = &m->probe;
    mem_free(p->max.max);
    mem_free(p->max.mass);
    if (p->dev_max.max)
        dev_release(m->dev, p->dev_max.max,
                    probe_entries(&p->dev_max, p->n_heads) * sizeof *p->dev_max.max);
    *p = (struct probe){0};
}

void model_close(struct model *m)
{
    if (!m)
        return;
    llama_destroy(m->llama);
    kv_store_destroy(m->store);
    weights_release(&m->weights);
    step_plan_deinit(&m->plan);
    mem_free(m->message);
    mem_free(m->output_of);
    mem_free(m->seq_counts);
    mem_free(m->head_counts);
    mem_free(m->limbs);
    mem_free(m->head_policy);
    drop_probe(m);
    count_rel_off(&m->rel_counts, m->dev);
    mem_free(m);
}

size_t model_plan_bytes(int32_t max_seqs, int32_t max_tokens, int64_t max_position)
{
    return step_plan_max_message(max_seqs, max_tokens, max_position);
}

const struct model_info *model_info(const struct model *m)
{
    return &m->info;
}

static struct kv_store_config store_config(const struct model *m, int32_t n_pages)
{
    return (struct kv_store_config){.dtype = m->info.kv_dtype,
                                    .n_layers = m->config.n_layers,
                                    .n_pages = n_pages,
                                    .n_kv_heads = m->shard.n_kv_heads,
                                    .head_dim = m->config.head_dim};
}

size_t model_page_bytes(const struct model *m)
{
    const struct kv_store_config cfg = store_config(m, 1);
    return kv_store_page_bytes(&cfg);
}

int model_take_pages(struct model *m, int32_t n_pages, struct err_msg *why)
{
    const struct kv_store_config cfg = store_config(m, n_pages);
    ASSERT(!m->store);
    TRY(kv_store_create(&m->store, m->dev, &cfg, why));
    m->plan.limits.n_pages = n_pages;
    return llama_bind_cache(m->llama, kv_store_view(m->store), why);
}

/* The rank's heads of thresholds that cover the model's; returns how many levels they have. */
static int32_t slice_thresholds(const struct model *m, struct attn_thresholds *t)
{
    if (!t->t)
        return 0;
    ASSERT(t->n_layers == m->config.n_layers && t->n_heads == m->config.n_heads);
    t->t += m->shard.head * t->head_stride;
    t->n_heads = m->shard.n_heads;
    return t->n_levels;
}

/* The rank's heads of a policy that covers the model's. */
int model_set_policy(struct model *m, const struct attn_policy *policy, struct err_msg *why)
{
    const struct llama_shard *s = &m->shard;
    const size_t n_layers = (size_t)m->config.n_layers, n = (size_t)s->n_heads;
    struct attn_policy mine = *policy;

    mem_free(m->head_policy);
    m->head_policy = NULL;
    if (policy->heads) {
        m->head_policy = mem_zalloc(n_layers * n, sizeof *m->head_policy);
        for (size_t l = 0; l < n_layers; l++)
            memcpy(m->head_policy + l * n,
                   policy->heads + l * (size_t)m->config.n_heads + (size_t)s->head,
                   n * sizeof *m->head_policy);
    }
    mine.heads = m->head_policy;
    m->plan.limits.n_levels = slice_thresholds(m, &mine.abs);
    m->plan.limits.n_decode_levels = slice_thresholds(m, &mine.decode);
    m->plan.limits.n_page_levels = slice_thresholds(m, &mine.abs_pages);
    m->plan.limits.n_rel_steps[0] = slice_thresholds(m, &mine.rel_128);
    m->plan.limits.n_rel_steps[1] = slice_thresholds(m, &mine.rel_64);
    return llama_set_policy(m->llama, &mine, why);
}

static void clear_tiles(struct probe *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        p->max.max[i] = -INFINITY;
    if (p->max.mass)
        memset(p->max.mass, 0, n * sizeof *p->max.mass);
}

static int report_tiles(void *arg, int layer)
{
    struct probe *p = arg;
    const struct attn_tile_max *t = &p->max;
    const struct attn_seq *s = p->seq;
    if (p->fn) {
        p->fn(p->arg, layer, s->pos, s->n_rows, t->max, t->n_groups, t->n_pages);
    } else {
        const struct model_mass tiles = {.layer = layer,
                                         .pos = s->pos,
                                         .n_tokens = s->n_rows,
                                         .max = t->max,
                                         .mass = t->mass,
                                         .n_groups = t->n_groups,
                                         .n_pages = t->n_pages};
        p->mass_fn(p->arg, &tiles);
    }
    clear_tiles(p, p->n_heads * (size_t)t->n_groups * (size_t)t->n_pages);
    return 0;
}

static int report_tiles_dev(void *arg, int layer)
{
    const struct probe *p = arg;
    const struct model_tiles tiles = {.layer = layer,
                                      .pos = p->seq->pos,
                                      .n_tokens = p->seq->n_rows,
                                      .max = p->dev_max.max,
                                      .max_groups = p->dev_max.max_groups,
                                      .max_pages = p->dev_max.max_pages,
                                      .scale = p->scale};
    return p->dev_fn(p->arg, &tiles);
}

/* on_device: of the kind of probe that is asked for. */
static int check_probe(const struct model *m, int32_t gate_rows, bool on_device)
{
    if (m->shard.n_ranks > 1 || llama_ops_of(m->dev)->half != on_device)
        return ERR_UNSUPPORTED;
    return gate_rows == 128 || gate_rows == 64 || (gate_rows == 1 && !on_device) ? 0 : ERR_INVALID;
}

/* A probe of the host; both fn NULL: off. */
static int set_probe(struct model *m, int32_t gate_rows, model_tile_fn fn, model_mass_fn mass_fn,
                     void *arg)
{
    struct probe *p = &m->probe;
    const struct plan_limits *l = &m->plan.limits;

    TRY(check_probe(m, gate_rows, false));
    if (mass_fn && gate_rows == 1)
        return ERR_INVALID;
    drop_probe(m);
    *p = (struct probe){
        .arg = arg, .max.gate_rows = gate_rows, .n_heads = (size_t)m->config.n_heads};
    if (!fn && !mass_fn)
        return 0;
    const size_t groups = gate_rows == 1 ? (size_t)MODEL_PROBE_ROWS
                                         : (size_t)((l->max_tokens + gate_rows - 1) / gate_rows);
    const size_t n = p->n_heads * groups * (size_t)kv_pages_for(l->max_position);
    p->max.max = mem_try_aligned(n, sizeof *p->max.max);
    if (mass_fn)
        p->max.mass = mem_try_aligned(n, sizeof *p->max.mass);
    if (!p->max.max || (mass_fn && !p->max.mass))
        return -ENOMEM;
    clear_tiles(p, n);
    p->fn = fn;
    p->mass_fn = mass_fn;
    return 0;
}

int model_probe_tiles(struct model *m, int32_t gate_rows, model_tile_fn fn, void *arg)
{
    return set_probe(m, gate_rows, fn, NULL, arg);
}

int model_probe_mass(struct model *m, int32_t gate_rows, model_mass_fn fn, void *arg)
{
    return set_probe(m, gate_rows, NULL, fn, arg);
}

int model_probe_tiles_dev(struct model *m, int32_t gate_rows, model_tile_dev_fn fn, void *arg)
{
    struct probe *p = &m->probe;
    const struct plan_limits *l = &m->plan.limits;
    void *memory = NULL;

    TRY(check_probe(m, gate_rows, true));
    drop_probe(m);
    if (!fn)
        return 0;
    *p = (struct probe){.arg = arg,
                        .dev_max = {.max_groups = (l->max_tokens + gate_rows - 1) / gate_rows,
                                    .max_pages = kv_pages_for(l->max_position),
                                    .gate_rows = gate_rows},
                        .scale = m->info.softmax_scale,
                        .n_heads = (size_t)m->config.n_heads};
    TRY(dev_alloc(m->dev, &memory, probe_entries(&p->dev_max, p->n_heads) * sizeof(int32_t), NULL));
    p->dev_max.max = memory;
    p->dev_fn = fn;
    return 0;
}

int model_count_rel(struct model *m, const struct attn_rel_counts *counts)
{
    const bool on_device = llama_ops_of(m->dev)->half;
    if (m->shard.n_ranks > 1)
        return ERR_UNSUPPORTED;
    if (counts && on_device && (counts->n_edges < 1 || counts->n_edges > ATTN_CUDA_REL_EDGES))
        return ERR_INVALID;
    count_rel_off(&m->rel_counts, m->dev);
    if (!counts)
        return 0;
    const size_t n_bins =
        (size_t)m->config.n_layers * 2 * (size_t)m->config.n_heads * ((size_t)counts->n_edges + 1);
    return count_rel_on(&m->rel_counts, counts, n_bins, m->dev, on_device);
}

/* Shapes the probe's memory for the one sequence of the step. */
static int aim_probe(struct model *m)
{
    struct probe *p = &m->probe;
    const struct attn_seq *s = &m->plan.seqs[0];
    if (m->plan.n_seqs != 1)
        return ERR_INVALID;
    p->seq = s;
    if (p->dev_fn)
        return s->pos % KV_BLOCK_TOKENS ? ERR_INVALID : 0;
    if (p->max.gate_rows == 1 && s->n_rows > MODEL_PROBE_ROWS)
        return ERR_INVALID;
    p->max.n_groups = (s->n_rows + p->max.gate_rows - 1) / p->max.gate_rows;
    p->max.n_pages = kv_pages_for((int64_t)s->pos + s->n_rows);
    return 0;
}

/* Probes and counters are of all rows. */
static bool is_probed(const struct model *m)
{
    const struct probe *p = &m->probe;
    return count_rel_of(&m->rel_counts) || p->fn || p->mass_fn || p->dev_fn;
}

/* Runs the plan that m->plan holds; the same on every rank. */
static int run_plan(struct model *m, struct llama_times *times)
{
    struct llama_input in = {
        .n_rows = m->plan.n_rows,
        .n_seqs = m->plan.n_seqs,
        .ids = m->plan.ids,
        .positions = m->plan.positions,
        .seqs = m->plan.seqs,
        .outputs = m->plan.outputs,
        .n_outputs = m->plan.n_outputs,
        .all_rows = m->plan.all_rows || is_probed(m),
        .output_of = m->output_of,
        .tokens = m->tokens,
        .draws = m->batch ? m->batch->seqs : NULL,
        .seq_counts = m->seq_counts,
        .rel_counts = count_rel_of(&m->rel_counts),
    };
    if (!m->store)
        return ERR_INVALID;
    if (m->probe.fn || m->probe.mass_fn || m->probe.dev_fn) {
        const bool on_device = m->probe.dev_fn != NULL;
        TRY(aim_probe(m));
        in.tile_max = on_device ? NULL : &m->probe.max;
        in.dev_max = on_device ? &m->probe.dev_max : NULL;
        in.on_tiles = on_device ? report_tiles_dev : report_tiles;
        in.on_tiles_arg = &m->probe;
    }
    TRY(llama_run(m->llama, &in, times));
    return count_rel_collect(&m->rel_counts, m->dev);
}

/* Sums the sequences' counters over the ranks. They travel as 16-bit limbs, whose sums floats hold
 * exactly. */
static int sum_counts(struct model *m)
{
    const size_t n = (size_t)m->plan.n_seqs * N_COUNTERS;
    if (m->shard.n_ranks == 1)
        return 0;
    uint64_t *counts = (uint64_t *)m->seq_counts;
    for (size_t i = 0; i < n * 4; i++)
        m->limbs[i] = (float)(counts[i / 4] >> (i % 4 * 16) & 0xffff);
    TRY(comm_all_reduce(m->comm, m->limbs, n * 4));
    for (size_t i = 0; i < n; i++) {
        counts[i] = 0;
        for (size_t k = 0; k < 4; k++)
            counts[i] += (uint64_t)m->limbs[4 * i + k] << (k * 16);
    }
    return 0;
}

/* The plan's outputs are in the order of the sequences. */
static void number_outputs(struct model *m, const struct batch *b)
{
    int32_t n = 0;
    for (int32_t i = 0; i < b->n_seqs; i++)
        m->output_of[i] = b->seqs[i].sample ? n++ : -1;
}

int model_step(struct model *m, const struct batch *b, struct batch_result *r)
{
    struct err_msg why = {{0}};
    struct llama_times times = {0};
    const int64_t start = clock_monotonic_us(NULL);

    int err = step_plan_from_batch(&m->plan, b, &why);
    if (err < 0) {
        log_error("step %" PRIu64 " refused: %s", b->step_id, err_why(&why, err));
        return err;
    }
    number_outputs(m, b);
    m->batch = b;
    m->tokens = r->tokens;
    if (m->shard.n_ranks > 1)
        TRY(comm_post(m->comm, m->message, step_plan_encode(&m->plan, m->message)));
    TRY(run_plan(m, &times));
    TRY(sum_counts(m));
    for (int32_t i = 0; i < b->n_seqs; i++)
        r->counts[i] = (struct batch_counts){.reachable = m->seq_counts[i].reachable,
                                             .visited = m->seq_counts[i].visited,
                                             .kept = m->seq_counts[i].kept,
                                             .sampled = m->seq_counts[i].sampled,
                                             .lost = (double)m->seq_counts[i].lost / ATTN_LOST_ONE};
    r->attention_us = times.attention_us;
    r->gemm_us = times.gemm_us;
    r->comm_us = times.comm_us;
    r->total_us = clock_monotonic_us(NULL) - start;
    r->host_us = r->total_us - times.wait_us;
    return 0;
}

int model_follow(struct model *m)
{
    ASSERT(m->comm && m->shard.rank > 0);
    for (;;) {
        struct llama_times times = {0};
        size_t len = 0;
        bool stop;
        TRY(comm_wait(m->comm, m->message, m->message_bytes, &len));
        TRY(step_plan_decode(&m->plan, m->message, len, &stop));
        if (stop)
            return 0;
        TRY(run_plan(m, &times));
        TRY(sum_counts(m));
    }
}

void model_stop_followers(struct model *m)
{
    if (m->shard.n_ranks == 1 || m->shard.rank != 0)
        return;
    int err = comm_post(m->comm, m->message, step_plan_encode_stop(m->message));
    if (err < 0 && err != ERR_PEER)
        log_warn("cannot tell the followers to stop: %s", err_str(err));
}

const struct attn_counts *model_head_counts(struct model *m)
{
    if (llama_head_counts(m->llama, m->head_counts + m->shard.head, m->config.n_heads) < 0)
        log_warn("cannot read the counters of the heads");
    return m->head_counts;
}

const float *model_last_logits(const struct model *m, int32_t i)
{
    ASSERT(i >= 0 && i < m->plan.n_seqs);
    return m->output_of[i] < 0 ? NULL : llama_logits(m->llama, m->output_of[i]);
}
