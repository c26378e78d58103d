/* Slow and simple kernels that the tests and benches compare with, and their launchers. */
#ifndef TESTS_ATTN_SM90_REF_H
#define TESTS_ATTN_SM90_REF_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
struct ref_problem {
    const void *q, *k, *v; /* q [rows, heads, d]; pools of pages */
    int dtype, head_dim, n_heads, n_kv_heads;
    int row, n_rows, pos; /* one sequence */
    int row_step;         /* only every row_step-th row is computed */
    const int32_t *pages; /* device */
    const uint8_t *keep;  /* [2 (row group of 64), n_heads, n_blocks, n_pages] or NULL, absolute */
    int n_blocks, n_pages;
    float scale;
};
void ref_fill_normal(void *p, int64_t n, uint64_t seed, float scale, int dtype);
/* out [rows, heads, d], lse [rows, heads] in double */
void ref_attn_f64(const struct ref_problem *p, double *out, double *lse);
/* the same in single precision with rounded probabilities and output */
void ref_attn_naive(const struct ref_problem *p, double *out, double *lse);
/* scaled page maxima [2, n_heads, n_blocks, n_pages] of the two row groups, off-diagonal only */
void ref_page_max(const struct ref_problem *p, float *max);
/* the same for 128 rows, tensor cores, whole sequences of 128 k tokens: [n_heads, n_blocks,
 * n_pages] */
void ref_page_max_fast(const struct ref_problem *p, float *max);
/* midpoint of the k-th and (k+1)-th largest of max[h, b, 0..2b), -inf where at most k exist: t
 * [n_heads, n_blocks] */
void ref_thresholds(const float *max, float *t, int n_heads, int n_blocks, int n_pages,
                    const int *k_of_head);
#ifdef __cplusplus
}
#endif
#endif
