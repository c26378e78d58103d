/* Effective bandwidth of the kernels between the matrix products, on the Llama-3.1-8B shape, beside
 * a device copy in the same run. Medians of CUDA events. Before every run L2 is flushed by
 * reading, so that no dirty lines are written back at its cost. Bytes are the fewest that an
 * operation must move: what is read, once, and what is written, once. */
#include "core/dev_cuda.h"
#include "kvcache/kv_store.h"
#include "kvcache/kv_store_cuda.h"
#include "model/nn_cuda.h"
#include "model/sampler_cuda.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

enum {
    ROWS = 8192,
    HEADS = 32,
    KV_HEADS = 8,
    DIM = 128,
    HIDDEN = 4096,
    INTER = 14336,
    VOCAB = 128256,
    QKV = (HEADS + 2 * KV_HEADS) * DIM,
    LAYERS = 32,
    PAGES = 160,
    PAIRS = 64,
    SEQS = 64,
    REPS = 25,
    FLUSH_ROWS = 1024, /* of 2^17 16-bit numbers: 256 MiB */
    FLUSH_WIDTH = 1 << 17,
    COPY = 1 << 29
};

#define CK(e)                                                                                      \
    do {                                                                                           \
        int e_ = (int)(e);                                                                         \
        if (e_ != 0) {                                                                             \
            printf("error %d (%s) at line %d\n", e_, cudaGetErrorString((cudaError_t)e_),          \
                   __LINE__);                                                                      \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* Device memory of all operations. */
struct bench {
    struct dev *dev;
    void *stream, *copy[2];
    void *qkv, *x, *residual, *out, *weight, *gate_up, *act, *table;
    float *cos_sin;
    int32_t *positions, *slots, *tails, *pairs, *ids;
    struct kv_store *store;
    struct sampler_cuda sampler, flush;
    double copy_rate;
};

static void *take(struct bench *b, size_t bytes)
{
    struct err_msg why = {""};
    void *p = NULL;
    if (dev_alloc(b->dev, &p, bytes, &why) < 0) {
        printf("%s\n", why.text);
        exit(1);
    }
    return p;
}

static void *random16(struct bench *b, int64_t n, float std)
{
    const struct nn_cuda_fill f = {.out = take(b, (size_t)n * 2),
                                   .n_rows = 1,
                                   .n_cols = n,
                                   .pitch = n,
                                   .seed = (uint64_t)n,
                                   .std = std};
    CK(nn_cuda_fill_normal(&f, 0, b->stream));
    return f.out;
}

static void run_copy(struct bench *b)
{
    CK(cudaMemcpyAsync(b->copy[0], b->copy[1], COPY, cudaMemcpyDeviceToDevice, b->stream));
}

static void append(struct bench *b, int32_t rows)
{
    const struct kv_view *kv = kv_store_view(b->store);
    const struct kv_append a = {.qkv = b->qkv,
                                .cos_sin = b->cos_sin,
                                .positions = b->positions,
                                .slots = b->slots,
                                .tails = b->tails,
                                .k = kv->k[0],
                                .v = kv->v[0],
                                .stride = QKV,
                                .n_rows = rows,
                                .n_heads = HEADS,
                                .n_kv_heads = KV_HEADS,
                                .head_dim = DIM};
    CK(kv_append_cuda(&a, 0, b->stream));
}

static void run_append(struct bench *b)
{
    append(b, ROWS);
}

static void run_append_decode(struct bench *b)
{
    append(b, SEQS);
}

static void run_copy_pages(struct bench *b)
{
    CK(kv_copy_pages_cuda(kv_store_view(b->store), b->pairs, PAIRS, b->stream));
}

static void norm(struct bench *b, const void *x, int32_t rows)
{
    const struct nn_cuda_norm p = {.out = b->out,
                                   .residual = b->residual,
                                   .x = x,
                                   .weight = b->weight,
                                   .n = rows,
                                   .width = HIDDEN,
                                   .eps = 1e-5f};
    CK(nn_cuda_residual_norm(&p, 0, b->stream));
}

static void run_norm(struct bench *b)
{
    norm(b, b->x, ROWS);
}

static void run_first_norm(struct bench *b)
{
    norm(b, NULL, ROWS);
}

static void run_norm_decode(struct bench *b)
{
    norm(b, b->x, SEQS);
}

static void run_swiglu(struct bench *b)
{
    CK(nn_cuda_swiglu(b->act, b->gate_up, NULL, ROWS, INTER, 0, b->stream));
}

static void run_gather(struct bench *b)
{
    CK(nn_cuda_gather(b->out, b->table, b->ids, ROWS, HIDDEN, VOCAB / 4, 0, b->stream));
}

static void run_greedy(struct bench *b)
{
    CK(sampler_cuda_greedy(&b->sampler, b->stream));
}

static void run_draw(struct bench *b)
{
    CK(sampler_cuda_draw(&b->sampler, b->stream));
}

static int up(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void time_run(struct bench *b, const char *name, void (*fn)(struct bench *), double bytes)
{
    float ms[REPS];
    cudaEvent_t start, stop;
    CK(cudaEventCreate(&start));
    CK(cudaEventCreate(&stop));
    for (int i = -2; i < REPS; i++) {
        CK(sampler_cuda_greedy(&b->flush, b->stream)); /* reads, writes next to nothing */
        CK(cudaEventRecord(start, b->stream));
        fn(b);
        CK(cudaEventRecord(stop, b->stream));
        CK(cudaEventSynchronize(stop));
        if (i >= 0)
            CK(cudaEventElapsedTime(&ms[i], start, stop));
    }
    qsort(ms, REPS, sizeof *ms, up);
    const double us = (double)ms[REPS / 2] * 1e3, rate = bytes / us * 1e-3;
    if (fn == run_copy)
        b->copy_rate = rate;
    printf("%-44s %9.1f us  p10 %9.1f p90 %9.1f  %7.1f GB/s  %5.2f of copy\n", name, us,
           (double)ms[REPS / 10] * 1e3, (double)ms[REPS * 9 / 10] * 1e3, rate, rate / b->copy_rate);
    CK(cudaEventDestroy(start));
    CK(cudaEventDestroy(stop));
}

static void *put(struct bench *b, const void *src, size_t bytes)
{
    void *p = take(b, bytes);
    CK(dev_upload(b->dev, p, src, bytes));
    return p;
}

static void make_step(struct bench *b)
{
    static int32_t positions[ROWS], slots[ROWS], tails[ROWS], ids[ROWS], pages[PAGES];
    for (int i = 0; i < PAGES; i++)
        pages[i] = i * 37 % PAGES;
    kv_append_rows(slots, tails, pages, 0, ROWS);
    for (int i = 0; i < ROWS; i++) {
        positions[i] = i;
        ids[i] = (int32_t)((uint32_t)i * 2654435761u % (VOCAB / 4));
    }
    b->positions = put(b, positions, sizeof positions);
    b->slots = put(b, slots, sizeof slots);
    b->tails = put(b, tails, sizeof tails);
    b->ids = put(b, ids, sizeof ids);
    b->pairs = put(b, pages, 2 * PAIRS * sizeof *pages);
}

static void make_flush(struct bench *b)
{
    static struct sampler_cuda_seq seqs[FLUSH_ROWS];
    for (int i = 0; i < FLUSH_ROWS; i++)
        seqs[i].row = i;
    b->flush = (struct sampler_cuda){
        .logits = random16(b, (int64_t)FLUSH_ROWS * FLUSH_WIDTH, 1.0f),
        .ld = FLUSH_WIDTH,
        .logits_type = SAMPLER_BF16,
        .vocab = FLUSH_WIDTH,
        .n_seqs = FLUSH_ROWS,
        .seqs = put(b, seqs, sizeof seqs),
        .out = take(b, FLUSH_ROWS * sizeof(struct batch_token)),
    };
}

static void make_sampler(struct bench *b)
{
    struct sampler_cuda_seq seqs[SEQS];
    for (int i = 0; i < SEQS; i++)
        seqs[i] = (struct sampler_cuda_seq){.temperature = 1.0f,
                                            .top_p = 1.0f,
                                            .repetition_penalty = 1.0f,
                                            .seed = (uint64_t)i,
                                            .n_known = 100,
                                            .row = i};
    b->sampler = (struct sampler_cuda){
        .logits = random16(b, (int64_t)SEQS * VOCAB, 2.5f),
        .ld = VOCAB,
        .logits_type = SAMPLER_BF16,
        .vocab = VOCAB,
        .n_seqs = SEQS,
        .seqs = put(b, seqs, sizeof seqs),
        .workspace = take(b, sampler_cuda_workspace_bytes(VOCAB, SEQS)),
        .out = take(b, SEQS * sizeof(struct batch_token)),
    };
}

static void open_bench(struct bench *b)
{
    const struct kv_store_config cfg = {DTYPE_BF16, LAYERS, PAGES, KV_HEADS, DIM};
    make_flush(b);
    b->copy[0] = take(b, COPY), b->copy[1] = random16(b, COPY / 2, 1.0f);
    b->qkv = random16(b, (int64_t)ROWS * QKV, 1.0f);
    b->x = random16(b, (int64_t)ROWS * HIDDEN, 0.01f);
    b->residual = random16(b, (int64_t)ROWS * HIDDEN, 1.0f);
    b->out = take(b, (size_t)ROWS * HIDDEN * 2);
    b->weight = random16(b, HIDDEN, 1.0f);
    b->gate_up = random16(b, (int64_t)ROWS * 2 * INTER, 1.0f);
    b->act = take(b, (size_t)ROWS * INTER * 2);
    b->table = random16(b, (int64_t)(VOCAB / 4) * HIDDEN, 1.0f);
    b->cos_sin = take(b, (size_t)ROWS * DIM * sizeof(float)); /* angle 0 would do */
    CK(nn_cuda_to_f32(b->cos_sin, b->gate_up, (int64_t)ROWS * DIM, 0, b->stream));
    CK(kv_store_create(&b->store, b->dev, &cfg, NULL));
    make_step(b);
    make_sampler(b);
}

static void run_sampler(struct bench *b)
{
    static const struct {
        const char *name;
        float temperature, top_p, min_p;
        int32_t top_k, n_logprobs;
    } rules[] = {
        {"draw 64 x 128256: greedy, by the full kernel", 0, 1, 0, 0, 0},
        {"draw 64 x 128256: temperature", 1, 1, 0, 0, 0},
        {"draw 64 x 128256: top-p 0.9", 1, 0.9f, 0, 0, 0},
        {"draw 64 x 128256: top-k 50, top-p 0.9", 1, 0.9f, 0, 50, 0},
        {"draw 64 x 128256: the same, 20 logprobs", 1, 0.9f, 0, 50, 20},
    };
    struct sampler_cuda_seq seqs[SEQS];
    const double bytes = (double)SEQS * VOCAB * 2;
    time_run(b, "greedy 64 x 128256 bf16", run_greedy, bytes);
    CK(dev_download(b->dev, seqs, b->sampler.seqs, sizeof seqs));
    for (size_t r = 0; r < sizeof rules / sizeof *rules; r++) {
        for (int i = 0; i < SEQS; i++) {
            seqs[i].temperature = rules[r].temperature;
            seqs[i].top_p = rules[r].top_p;
            seqs[i].min_p = rules[r].min_p;
            seqs[i].top_k = rules[r].top_k;
            seqs[i].n_logprobs = rules[r].n_logprobs;
        }
        CK(dev_upload(b->dev, (struct sampler_cuda_seq *)b->sampler.seqs, seqs, sizeof seqs));
        time_run(b, rules[r].name, run_draw, bytes);
    }
    b->sampler.n_seqs = 1;
    time_run(b, "greedy 1 x 128256 bf16", run_greedy, bytes / SEQS);
}

int main(void)
{
    struct bench b = {0};
    struct err_msg why = {""};
    const double row = 2.0 * HIDDEN, kv_row = 2.0 * KV_HEADS * DIM * 2;
    if (dev_open(&b.dev, &dev_cuda, 0, 1, &why) < 0) {
        printf("%s\n", why.text);
        return 77;
    }
    b.stream = dev_cuda_stream(b.dev);
    open_bench(&b);
    time_run(&b, "device copy, 512 MiB", run_copy, 2.0 * COPY);
    time_run(&b, "append 8192 rows, 32/8 heads of 128", run_append,
             ROWS * (2.0 * QKV + 2.0 * HEADS * DIM + kv_row + 4.0 * DIM));
    time_run(&b, "append 64 rows (decode)", run_append_decode,
             SEQS * (2.0 * QKV + 2.0 * HEADS * DIM + kv_row + 4.0 * DIM));
    time_run(&b, "copy 64 pages of 32 layers", run_copy_pages,
             2.0 * PAIRS * LAYERS * KV_PAGE_TOKENS * kv_row);
    time_run(&b, "residual + norm 8192 x 4096", run_norm, ROWS * 4 * row);
    time_run(&b, "norm alone 8192 x 4096", run_first_norm, ROWS * 2 * row);
    time_run(&b, "residual + norm 64 x 4096 (decode)", run_norm_decode, SEQS * 4 * row);
    time_run(&b, "swiglu 8192 x 14336", run_swiglu, ROWS * 6.0 * INTER);
    time_run(&b, "gather 8192 x 4096", run_gather, ROWS * 2 * row);
    run_sampler(&b);
    CK(dev_sync(b.dev));
    kv_store_destroy(b.store);
    dev_close(b.dev);
    return 0;
}
