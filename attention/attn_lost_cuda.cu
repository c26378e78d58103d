/* One warp a sampled row, its lanes over the heads. Sums are integers: their order is of no matter.
 */
#include "attention/attn_lost_cuda.h"

#include "attention/attn_lost.h"

#include <cuda_runtime.h>

__global__ void __launch_bounds__(32) attn_lost(const __grid_constant__ struct attn_lost_args a)
{
    const struct attn_lost_row r = a.rows[blockIdx.x];
    unsigned long long sum = 0;
    for (int h = threadIdx.x; h < a.n_heads; h += 32) {
        const int64_t at = (int64_t)r.row * a.n_heads + h;
        const float lost = -expm1f(a.kept[at] - a.dense[at]);
        if (lost > ATTN_LOST_ROUNDING) /* not NaN */
            sum += (unsigned long long)(lost * (float)ATTN_LOST_ONE + 0.5f);
    }
    if (sum > 0)
        atomicAdd(&a.counts[r.counts].lost, sum);
}

int attn_lost_launch(const struct attn_lost_args *args, void *stream)
{
    attn_lost<<<(unsigned)args->n_rows, 32, 0, (cudaStream_t)stream>>>(*args);
    return (int)cudaGetLastError();
}
