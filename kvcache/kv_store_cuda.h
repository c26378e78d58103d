/* Writing and copying pages on a CUDA device: the launchers of kv_store_cuda.cu, all asynchronous
 * on `stream` (a cudaStream_t) and capturable in a graph. They return a cudaError_t as int. dtype:
 * 0 bf16, 1 f16. Every pointer is device memory unless it says host. */
#ifndef KVCACHE_KV_STORE_CUDA_H
#define KVCACHE_KV_STORE_CUDA_H

#include "kvcache/kv_view.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The rows of one step in one layer. slots and tails are the same for all its layers.
 *
 * q is rotated where it stands: attention reads it with the row stride of qkv, so a second buffer
 * would only add traffic. K and V go to their pages alone; their columns of qkv stay as they are.
 *
 * Attention multiplies probability 0 by the V of rows that a page has beyond its sequence, so those
 * must be finite although an earlier owner may have left NaN there. The rule: a page is clean from
 * the step on that first enters it. In that step the last row that the sequence writes into the
 * page has tails[row] = 63 - token in page, and the append sets the tails[row] rows after its
 * own to zero, in K and V; nobody else writes those rows in this step. Every other row has tail 0:
 * full pages have no tail, and a page entered by an earlier step was cleaned then. kv_append_rows
 * does this. (After copying a page whose end is not the new owner's, clean it too: any last row
 * may.) */
struct kv_append {
    void *qkv;                /* [n_rows, stride]: heads of q, then k, then v */
    const void *bias;         /* [(n_heads + 2 n_kv_heads) * head_dim], added first; or NULL */
    const float *cos_sin;     /* [n_positions, 2, head_dim / 2], model/rope.h */
    const int32_t *positions; /* [n_rows] */
    const int32_t *slots;     /* [n_rows] page * 64 + token in page; -1: the row is left alone */
    const int32_t *tails;     /* [n_rows] */
    void *k, *v;              /* the layer's pools */
    int64_t stride;           /* elements between rows */
    int32_t n_rows, n_heads, n_kv_heads, head_dim;
};

/* Adds the bias, rotates q and k (element i pairs with i + head_dim / 2), stores k and v. In f32,
 * rounded once. head_dim is even; 16-byte accesses where it divides by 16 and stride by 8. Begins
 * while a kernel before it ends (core/early.cuh). */
int kv_append_cuda(const struct kv_append *a, int dtype, void *stream);

/* Copies whole pages over all layers, K and V. pairs [n_pairs, 2]: dst, src; no page is written
 * twice, none is both written and read. */
int kv_copy_pages_cuda(const struct kv_view *kv, const int32_t *pairs, int32_t n_pairs,
                       void *stream);

/* Slots and tails (host) of n consecutive tokens of one sequence from position pos. pages (host) is
 * the sequence's page table; page ids stay below 2^25. */
static inline void kv_append_rows(int32_t *slots, int32_t *tails, const int32_t *pages, int32_t pos,
                                  int32_t n)
{
    const int32_t end = pos + n, last_page = (end - 1) / KV_PAGE_TOKENS * KV_PAGE_TOKENS;
    for (int32_t i = 0; i < n; i++) {
        slots[i] = pages[(pos + i) / KV_PAGE_TOKENS] * KV_PAGE_TOKENS + (pos + i) % KV_PAGE_TOKENS;
        tails[i] = 0;
    }
    if (n > 0 && last_page >= pos)
        tails[n - 1] = last_page + KV_PAGE_TOKENS - end;
}

#ifdef __cplusplus
}
#endif
#endif
