/* Where the time of a step goes: events between its parts on the stream. */
#define LOG_MODULE "model"
#include "model/llama_cuda_internal.h"

int llama_cuda_mark(struct llama_cuda_state *m, enum cuda_part part)
{
    struct cuda_marks *k = &m->marks;
    if (!k->on)
        return 0;
    ASSERT(k->n < k->max);
    k->parts[k->n] = (uint8_t)part;
    CUDA_TRY(cudaEventRecord(k->events[k->n++], m->stream));
    return 0;
}

int llama_cuda_add_times(struct llama_cuda_state *m, struct llama_times *times)
{
    const struct cuda_marks *k = &m->marks;
    float ms[N_PARTS] = {0};
    for (int32_t i = 0; k->on && i + 1 < k->n; i++) {
        float part = 0.0f;
        CUDA_TRY(cudaEventElapsedTime(&part, k->events[i], k->events[i + 1]));
        ms[k->parts[i]] += part;
    }
    times->attention_us = (int64_t)(ms[PART_ATTENTION] * 1000.0f);
    times->gemm_us = (int64_t)(ms[PART_GEMM] * 1000.0f);
    times->comm_us = (int64_t)(ms[PART_COMM] * 1000.0f);
    return 0;
}
