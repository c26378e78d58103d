/* y = x w^T with one promise more than BLAS gives: a row of y has the same bits whichever rows are
 * computed with it, wherever it stands among them, and whatever the number of threads.
 *
 * BLAS picks its kernel by the problem's size and by the place within it, so the last bits of a row
 * change with the number of rows. Here every product is cut the same way: columns into panels that
 * depend on the shape of w alone, rows into tiles of a few fixed sizes, each (tile, panel) one
 * single-threaded call. Which tiles can be trusted is not assumed but measured: gemm_plan takes the
 * largest size whose rows keep their bits at every place of the tile, and those smaller ones that
 * give the same bits. It tries both ways to hand the product to BLAS, rows of x as rows or as
 * columns, for a kernel may be even along one side only. Where nothing holds, rows go one by one,
 * which is slow and trivially right.
 *
 * gemm_open sets OpenBLAS to one thread for the whole process: the worker pool is the parallelism.
 */
#ifndef MODEL_GEMM_H
#define MODEL_GEMM_H

#include "core/dev.h"
#include "core/err.h"

#include <stdbool.h>
#include <stdint.h>

enum { GEMM_MAX_TILE = 256 };

/* How products with one shape of w are cut. */
struct gemm_plan {
    int32_t n, k;    /* w [n, k] */
    int32_t panel;   /* columns of y per task; the last panel is narrower */
    uint32_t tiles;  /* bit b set: tiles of 1 << b rows may be used */
    int32_t granule; /* the smallest of them */
    bool transposed; /* BLAS computes y^T */
};

struct gemm;

MUST_CHECK int gemm_open(struct gemm **out, struct dev *d);
void gemm_close(struct gemm *g); /* accepts NULL */
/* Self-check included: some 1300 rows of work, a few times that where the first way fails. -ENOMEM
 * when there is no room for it. */
MUST_CHECK int gemm_plan(const struct gemm *g, struct gemm_plan *plan, int32_t n, int32_t k,
                         struct err_msg *why);
/* Rows that x and y must have room for when `rows` are computed: the rest of the last tile is read
 * and written too, its values are without meaning. */
int32_t gemm_padded_rows(const struct gemm_plan *plan, int32_t rows);
/* y [rows, n] = x [rows, k] w[n, k]^T, all dense row-major; y must not overlap x or w. */
void gemm_run(const struct gemm *g, const struct gemm_plan *plan, float *y, const float *x,
              const float *w, int32_t rows);
/* The library and the kernels it chose, for logs. */
const char *gemm_backend(void);

#endif
