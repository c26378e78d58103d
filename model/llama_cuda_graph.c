/* Steps of generated tokens as CUDA graphs: one a bucket of row counts, captured at start, and
 * where the policy has thresholds for generated tokens another for steps in which some are gated. A
 * step of fewer rows is padded; padding reads token 0 at position 0, is written to no page and is
 * in no attention plan. */
#define LOG_MODULE "model"
#include "core/clock.h"
#include "core/log.h"
#include "model/llama_cuda_internal.h"

#include <inttypes.h>

const struct cuda_graph *llama_cuda_find_graph(const struct llama_cuda_state *m, int32_t rows,
                                               bool gated)
{
    for (int i = 0; i < m->n_graphs; i++) {
        if (m->graphs[i].rows >= rows && m->graphs[i].gated == gated)
            return &m->graphs[i];
    }
    return NULL;
}

void llama_cuda_drop_graphs(struct llama_cuda_state *m)
{
    for (int i = 0; i < m->n_graphs; i++)
        (void)cudaGraphExecDestroy(m->graphs[i].exec);
    m->n_graphs = 0;
}

/* Everything runs once before it is captured: kernels are loaded at their first launch. */
static int capture(struct llama_cuda_state *m, int32_t rows, bool gated)
{
    struct cuda_graph *to = &m->graphs[m->n_graphs];
    cudaGraph_t graph = NULL;
    ASSERT(m->n_graphs < MAX_GRAPHS);
    m->marks.on = false;
    llama_cuda_pack(m, NULL, rows, true);
    if (gated)
        attn_cuda_use_decode_gate(m->attn);
    TRY(llama_cuda_send(m));
    TRY(llama_cuda_layers(m));
    TRY(llama_cuda_wait(m));
    CUDA_TRY(cudaStreamBeginCapture(m->stream, cudaStreamCaptureModeThreadLocal));
    int err = llama_cuda_layers(m);
    cudaError_t ended = cudaStreamEndCapture(m->stream, &graph);
    if (err == 0)
        err = dev_cuda_check((int)ended, "cudaStreamEndCapture", __FILE__, __LINE__);
    if (err == 0)
        err = dev_cuda_check((int)cudaGraphInstantiate(&to->exec, graph, 0), "cudaGraphInstantiate",
                             __FILE__, __LINE__);
    if (graph)
        (void)cudaGraphDestroy(graph);
    if (err < 0)
        return err;
    to->rows = rows;
    to->gated = gated;
    m->n_graphs++;
    return 0;
}

int llama_cuda_capture(struct llama_cuda_state *m, struct err_msg *why)
{
    const int64_t start = clock_monotonic_us(NULL);
    int32_t most = m->out_rows < m->rows ? m->out_rows : m->rows;
    most = most < GRAPH_MAX_ROWS ? most : GRAPH_MAX_ROWS;
    llama_cuda_drop_graphs(m);
    for (int32_t rows = 1; rows <= most; rows = gemm_cublas_bucket(rows) + 1) {
        int err = capture(m, gemm_cublas_bucket(rows), false);
        if (err == 0 && m->policy.decode.t)
            err = capture(m, gemm_cublas_bucket(rows), true);
        if (err < 0)
            return err_set(why, err, "cannot capture a step of %d rows: %s", rows, err_str(err));
    }
    log_info("captured decode steps graphs=%d rows=%d ms=%" PRId64, m->n_graphs, most,
             (clock_monotonic_us(NULL) - start) / 1000);
    return 0;
}
