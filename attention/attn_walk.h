/* Which pages a query block walks, in which order. Internal to attention/.
 *
 * A walk is a function of the ABSOLUTE query block, the last reachable page and the head policies:
 * never of chunks, of the batch, or of whether a row is a prompt row or a generated one. */
#ifndef ATTENTION_ATTN_WALK_H
#define ATTENTION_ATTN_WALK_H

#include "attention/policy.h"
#include "kvcache/kv_view.h"

enum { ATTN_PAGES_PER_BLOCK = KV_BLOCK_TOKENS / KV_PAGE_TOKENS };

/* First diagonal page of the block that holds position pos. */
static inline int32_t attn_diag_page(int64_t pos)
{
    return (int32_t)(pos / KV_BLOCK_TOKENS) * ATTN_PAGES_PER_BLOCK;
}

/* The Visit set of a head; diag is the block's first diagonal page. */
static inline bool attn_visits(const struct attn_head_policy *head, int32_t page, int32_t diag)
{
    return head->visit == ATTN_VISIT_ALL || page >= diag || page < head->sink_pages ||
           page >= diag - head->local_pages;
}

enum { ATTN_WALK_SPANS = 4 };

/* Spans of pages, each walked from first to last in either direction. */
struct attn_walk {
    struct attn_span {
        int32_t first, last;
    } spans[ATTN_WALK_SPANS];
    int n_spans;
};

/* The walk that covers every page some head of heads[0 .. n_heads) visits; heads == NULL: all
 * pages. Pages no head visits are left out where a whole run of them is; ask attn_visits for the
 * rest. */
void attn_walk_init(struct attn_walk *w, enum attn_order order, int32_t diag, int32_t last_page,
                    const struct attn_head_policy *heads, int32_t n_heads);

#endif
