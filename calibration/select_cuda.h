/* Thresholds of one layer and chunk from the page maxima that the Hopper prefill kernel left on the
 * device: per query head and full 128-token block the midpoints that calibrate.h describes, for all
 * levels from one reading of the maxima. Asynchronous on `stream` (a cudaStream_t), allocates
 * nothing, returns a cudaError_t as int. */
#ifndef CALIBRATION_SELECT_CUDA_H
#define CALIBRATION_SELECT_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    SELECT_CUDA_MAX_LEVELS = 64,
    SELECT_CUDA_MAX_PAGES = 16384,      /* before a block: what shared memory holds */
    SELECT_CUDA_EMPTY = (int)0x80808080 /* an entry that no tile has reached: all bytes 0x80 */
};

struct select_cuda {
    /* device [n_heads, max_groups, max_pages]: raw scores as integers in the order of the floats
     * (attn_sm90.h, page_max); group 0 begins with the first block */
    const int32_t *max;
    int32_t max_groups, max_pages;
    int32_t n_heads;
    int32_t first_block, n_blocks; /* full ones, absolute */
    int32_t gate_rows;             /* 128 or 64 */
    int32_t n_levels;
    int32_t k[SELECT_CUDA_MAX_LEVELS]; /* positive and increasing */
    float scale;                       /* of the softmax, > 0 */
    /* device: level s, head h, absolute block i at t[s * level_stride + h * head_stride + i].
     * -inf where 2i <= k; NaN, at all levels of the block, where one of its maxima is NaN,
     * infinite or missing. */
    double *t;
    int64_t level_stride, head_stride;
};

/* cudaErrorInvalidValue where a size is out of bounds. */
int select_cuda_launch(const struct select_cuda *s, void *stream);

#ifdef __cplusplus
}
#endif
#endif
