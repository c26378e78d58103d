/* A Llama-family model bound to a device, its cache memory and its ranks: runs batches.
 * Not thread-safe: one thread (the runner) calls model_step; model_info may be read from any. */
#ifndef MODEL_MODEL_H
#define MODEL_MODEL_H

#include "attention/attention.h"
#include "attention/policy.h"
#include "core/dev.h"
#include "core/err.h"
#include "kvcache/kv_view.h"
#include "model/batch.h"

#include <stdio.h>

struct comm;
struct model;

/* For model_config.dtype and kv_dtype: f32 on the CPU; on a GPU the weights' own 16-bit format and
 * the same for the cache. */
enum { MODEL_DTYPE_AUTO = -1 };

struct model_info {
    int32_t vocab_size, hidden_size, n_layers, n_heads, n_kv_heads, head_dim, intermediate_size;
    int32_t max_position;
    float rms_eps;
    float softmax_scale;
    enum dtype dtype, kv_dtype; /* of weights and activations; of the cache */
    uint64_t fingerprint; /* config and weights; the same for every rank count, device and dtype of
                             the cache */
    int32_t n_eos;
    int32_t eos_ids[BATCH_MAX_STOP];
    int32_t bos_id; /* -1: none */
    char name[64];  /* the folder's last component */
    char rope[64];  /* "default theta=1e+08", "llama3 theta=500000 factor=8": part of a threshold
                       file's identity */
};

struct model_config {
    const char *dir; /* HF folder: config.json and safetensors */
    struct dev *dev;
    struct comm *comm;    /* ranks; NULL: this process is the only one */
    bool random_weights;  /* config.json alone is read */
    int dtype, kv_dtype;  /* enum dtype or MODEL_DTYPE_AUTO */
    int32_t max_seqs;     /* largest batch */
    int32_t max_tokens;   /* largest sum of n_tokens in a batch */
    int64_t max_position; /* longest sequence served; sizes the rotary table */
    /* progress of loading, in bytes; may be NULL */
    void (*progress)(void *arg, uint64_t done, uint64_t total);
    void *progress_arg;
};

/* Loads weights (this rank's share) and takes all working memory except the pages. */
MUST_CHECK int model_open(struct model **out, const struct model_config *cfg, struct err_msg *why);
void model_close(struct model *m); /* accepts NULL */
const struct model_info *model_info(const struct model *m);
/* Largest message that rank 0 sends to the followers: what a communicator must be able to post. */
size_t model_plan_bytes(int32_t max_seqs, int32_t max_tokens, int64_t max_position);
/* Bytes one page takes on this rank. */
size_t model_page_bytes(const struct model *m);
/* Takes the memory for n_pages pages. Once, before the first step. */
MUST_CHECK int model_take_pages(struct model *m, int32_t n_pages, struct err_msg *why);
/* The policy all sequences share; thresholds cover all heads of the model, the rank takes its
 * slice. Copied shallowly: what it points to must outlive the model. Without a call every head
 * visits all pages and only DENSE and REL can be chosen. On a device it takes memory for the
 * thresholds: call it before the pages are sized. */
MUST_CHECK int model_set_policy(struct model *m, const struct attn_policy *policy,
                                struct err_msg *why);

/* Runs one step: with ranks, rank 0 first sends the batch to the followers. Nothing allocates. On
 * failure no token of the batch counts; ERR_PEER is final for the process. */
MUST_CHECK int model_step(struct model *m, const struct batch *b, struct batch_result *r);
/* A follower's life: waits for batches from rank 0 and replays them until rank 0 says stop (0) or
 * is gone (ERR_PEER). */
MUST_CHECK int model_follow(struct model *m);
/* Rank 0: tells the followers to leave model_follow. */
void model_stop_followers(struct model *m);

/* Reads page maxima during model_step: fn is called for every layer after its attention, with the
 * maxima of the one sequence of the batch (attention.h, struct attn_tile_max). fn == NULL turns it
 * off. gate_rows is 128, 64 or 1; then a step has at most MODEL_PROBE_ROWS rows. For the
 * calibrator. */
enum { MODEL_PROBE_ROWS = 64 };
typedef void (*model_tile_fn)(void *arg, int layer, int32_t pos, int32_t n_tokens, const float *max,
                              int32_t n_groups, int32_t n_pages);
MUST_CHECK int model_probe_tiles(struct model *m, int32_t gate_rows, model_tile_fn fn, void *arg);
/* The same with the softmax mass of the pages before each block; dense steps only. */
struct model_mass {
    int layer;
    int32_t pos, n_tokens;
    const float *max, *mass; /* [n_heads, n_groups, n_pages] */
    int32_t n_groups, n_pages;
};
typedef void (*model_mass_fn)(void *arg, const struct model_mass *tiles);
MUST_CHECK int model_probe_mass(struct model *m, int32_t gate_rows, model_mass_fn fn, void *arg);

/* The maxima of one layer, and of the rows [pos, pos + n_tokens), on the device: raw scores as
 * integers in the order of the floats, all bytes 0x80 where nothing was written, pages before each
 * block only (attn_sm90.h, page_max). */
struct model_tiles {
    int layer;
    int32_t pos, n_tokens;
    const int32_t *max; /* device [n_heads, max_groups, max_pages] */
    int32_t max_groups, max_pages;
    float scale; /* from raw scores to natural units */
};

/* Enqueues on the device's stream what reads the maxima; the next layer overwrites them. An error
 * fails the step. */
typedef int (*model_tile_dev_fn)(void *arg, const struct model_tiles *tiles);
/* model_probe_tiles on a GPU, which that refuses there, as this is refused on the CPU. Takes device
 * memory for one layer of one chunk. Dense and ABS steps only, on one rank. */
MUST_CHECK int model_probe_tiles_dev(struct model *m, int32_t gate_rows, model_tile_dev_fn fn,
                                     void *arg);
/* Counts in every later step what the REL gate would do (attention.h), with bins [n_layers, 2,
 * n_heads, n_edges + 1] that must outlive the steps and are up to date after each; NULL turns it
 * off. Copied shallowly. On one rank. On a GPU it takes device memory and computes QK of prompts
 * twice; there are at most ATTN_CUDA_REL_EDGES edges, and steps with a gated prompt are refused
 * (ERR_UNSUPPORTED). */
MUST_CHECK int model_count_rel(struct model *m, const struct attn_rel_counts *counts);
/* Counters per [n_layers, n_heads], summed since open; 0 for heads of other ranks. */
const struct attn_counts *model_head_counts(struct model *m);
/* Logits [vocab_size] f32 of sequence i of the last step (where sample was set); for tests and
 * tools. */
const float *model_last_logits(const struct model *m, int32_t i);

#endif
