/* y = x w^T on tensor cores through cuBLASLt, or where that is faster for few rows by gemm_skinny.h
 * or gemm_decode.h, for many with SwiGLU behind it by gemm_swiglu.h: 16-bit x and w, f32
 * accumulation, y in 16 bits or f32. The library is loaded when a CUDA device is opened, not when
 * the program starts: a machine without it still runs on the CPU.
 *
 * The algorithm is chosen once, at start, for every shape of w and every bucket of row counts; a
 * step only looks it up. A row's last bits may therefore depend on the bucket that the step fell
 * in, unlike gemm.h's. The workspace is taken at start; nothing allocates in a step, and a product
 * may be captured in a graph. */
#ifndef MODEL_GEMM_CUBLAS_H
#define MODEL_GEMM_CUBLAS_H

#include "core/dev.h"
#include "core/dtype.h"
#include "core/err.h"

#include <stdbool.h>
#include <stdint.h>

struct gemm_cublas;
struct gemm_cublas_plan;
struct kv_append;

/* dtype of x and w: DTYPE_BF16 or DTYPE_F16. stream is a cudaStream_t. */
MUST_CHECK int gemm_cublas_open(struct gemm_cublas **out, struct dev *d, enum dtype dtype,
                                void *stream, struct err_msg *why);
void gemm_cublas_close(struct gemm_cublas *g); /* accepts NULL */

/* For w [n, k] and up to max_rows rows. k and n are multiples of 8; x, w and y are aligned to 256
 * bytes. y_dtype: DTYPE_F32 or the dtype of x. */
MUST_CHECK int gemm_cublas_plan(struct gemm_cublas *g, struct gemm_cublas_plan **out, int32_t n,
                                int32_t k, int32_t max_rows, enum dtype y_dtype,
                                struct err_msg *why);
void gemm_cublas_plan_free(struct gemm_cublas_plan *p); /* accepts NULL */
/* Device memory to time products on. */
struct gemm_trial {
    void *y;              /* [rows, n], overwritten */
    void *act;            /* [rows, n / 2], overwritten: SwiGLU follows on the product; or NULL */
    const void *x;        /* [rows, k] */
    const void *const *w; /* n_w matrices used in turn, so that no cache holds them */
    int n_w;
    int32_t rows; /* counts for all of its bucket, and the memory is as large */
};

/* Times the best few algorithms for the bucket of on->rows and keeps the fastest. With act, also
 * SwiGLU at the end of the product (gemm_swiglu.h) beside that and nn_cuda_swiglu; what is found is
 * taken for fewer rows as well, as long as they fill the device. */
MUST_CHECK int gemm_cublas_tune(struct gemm_cublas *g, struct gemm_cublas_plan *p,
                                const struct gemm_trial *on);
/* y [rows, n] = x [rows, k] w [n, k]^T, dense row-major. Enqueued on the stream. */
MUST_CHECK int gemm_cublas_run(struct gemm_cublas *g, const struct gemm_cublas_plan *p, void *y,
                               const void *x, const void *w, int32_t rows);
/* y += x w^T. An algorithm that divides k may round the product first. Not for rows that are made
 * by a kernel of our own. */
MUST_CHECK int gemm_cublas_add(struct gemm_cublas *g, const struct gemm_cublas_plan *p, void *y,
                               const void *x, const void *w, int32_t rows);
/* Whether so few rows are made by a kernel of our own: these alone have gemm_cublas_append, and
 * gemm_cublas_swiglu with a bias. */
bool gemm_cublas_is_ours(const struct gemm_cublas_plan *p, int32_t rows);
/* Whether so many rows have gemm_cublas_swiglu. */
bool gemm_cublas_has_swiglu(const struct gemm_cublas_plan *p, int32_t rows, bool biased);
/* As gemm_skinny_swiglu: y [rows, n / 2]; bias [n] or NULL. */
MUST_CHECK int gemm_cublas_swiglu(struct gemm_cublas *g, const struct gemm_cublas_plan *p, void *y,
                                  const void *x, const void *w, const void *bias, int32_t rows);
/* As gemm_skinny_append: a->n_rows rows. */
MUST_CHECK int gemm_cublas_append(struct gemm_cublas *g, const struct gemm_cublas_plan *p,
                                  const void *x, const void *w, const struct kv_append *a);
/* The row count that stands for `rows`: the smallest bucket that holds it. */
int32_t gemm_cublas_bucket(int32_t rows);

#endif
