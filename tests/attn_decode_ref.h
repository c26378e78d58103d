/* Slow and simple decode attention that the tests and the bench compare with, a read of memory that
 * does nothing else, and their launchers. */
#ifndef TESTS_ATTN_DECODE_REF_H
#define TESTS_ATTN_DECODE_REF_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
struct dec_ref {
    const void *q, *k, *v; /* q [rows, heads, d]; pools of pages */
    int dtype, head_dim, n_heads, n_kv_heads;
    int row, n_rows, pos; /* one sequence */
    int n_pages;          /* of `pages` */
    const int32_t *pages; /* device */
    const uint8_t *keep;  /* device [n_rows, n_heads, n_pages] or NULL */
    float scale;
    double *scratch; /* device [n_rows, n_heads, n_pages * 64] */
};
/* out [rows, heads, d], lse [rows, heads] in double */
void dec_ref_f64(const struct dec_ref *p, double *out, double *lse);
/* the same in single precision with rounded probabilities and output */
void dec_ref_naive(const struct dec_ref *p, double *out, double *lse);
/* largest scaled score a row sees in a page, -inf if none: max [n_rows, n_heads, n_pages] */
void dec_ref_page_max(const struct dec_ref *p, float *max);
/* Reads n bytes (a multiple of 16) at each of two places in one launch and only adds them up. */
void dec_read(const void *p, const void *q, size_t n, int n_sms, unsigned *sum);
/* Lets the next launch begin, waits a while, and only then copies n bytes (a multiple of 16) from
 * src to dst and the listed pages of page_bytes each from the second pools to the first. */
struct dec_late {
    void *dst, *pool[2];
    const void *src, *from[2];
    size_t n, page_bytes;
    int n_pages, pages[16];
};
void dec_write_late(const struct dec_late *p);
#ifdef __cplusplus
}
#endif
#endif
