/* Where the time of a step goes: events between its parts on the stream. Each costs the kernels
 * beside it their overlap, so of a deep model only some layers are timed, and stand for the rest.
 */
#define LOG_MODULE "model"
#include "model/llama_cuda_internal.h"

enum { DEEP = 8, EVERY = 4 /* layer that is timed, where there are DEEP or more */ };

int llama_cuda_mark(struct llama_cuda_state *m, enum cuda_part part)
{
    struct cuda_marks *k = &m->marks;
    if (!k->on || k->paused)
        return 0;
    ASSERT(k->n < k->max);
    k->parts[k->n] = (uint8_t)part;
    CUDA_TRY(cudaEventRecord(k->events[k->n++], m->stream));
    return 0;
}

/* Neither the first layer nor the last are among the timed: they do a sum less, or more. */
static bool is_timed(const struct llama_cuda_state *m, int layer)
{
    return m->c->n_layers < DEEP || layer % EVERY == EVERY / 2;
}

/* Layers that are alike: a narrow last one is not. */
static int alike(const struct llama_cuda_state *m)
{
    return m->c->n_layers - m->step.narrow;
}

int llama_cuda_mark_layer(struct llama_cuda_state *m, int layer)
{
    struct cuda_marks *k = &m->marks;
    const bool after = layer == alike(m);
    if (!k->on || layer > alike(m))
        return 0;
    if (layer == 0)
        k->n_timed = 0;
    if (!after && !is_timed(m, layer)) {
        TRY(llama_cuda_mark(m, PART_UNTIMED));
        k->paused = true;
        return 0;
    }
    k->paused = false;
    TRY(llama_cuda_mark(m, PART_OTHER));
    k->n_timed += !after;
    if (after)
        k->n_layer_marks = k->n - 1;
    return 0;
}

int llama_cuda_add_times(struct llama_cuda_state *m, struct llama_times *times)
{
    const struct cuda_marks *k = &m->marks;
    double ms[N_PARTS] = {0};
    for (int32_t i = 0; k->on && i + 1 < k->n; i++) {
        float part = 0.0f;
        CUDA_TRY(cudaEventElapsedTime(&part, k->events[i], k->events[i + 1]));
        const double layers = k->n_timed > 0 ? (double)alike(m) / k->n_timed : 1.0;
        ms[k->parts[i]] += (double)part * (i < k->n_layer_marks ? layers : 1.0);
    }
    times->attention_us = (int64_t)(ms[PART_ATTENTION] * 1000.0);
    times->gemm_us = (int64_t)(ms[PART_GEMM] * 1000.0);
    times->comm_us = (int64_t)(ms[PART_COMM] * 1000.0);
    return 0;
}
