/* The page pool: a reference count per page and an LRU list of the free ones. Inside kvcache/ only.
 *
 * A page with references is in no list. A page without any is in the free list, whose head is
 * allocated next: pages without reusable content are put in front, pages worth keeping at the back,
 * so cached content lives as long as anything else is free and leaves in the order of its last use.
 * Every operation is O(1) and touches no other page's data.
 *
 * The pool knows nothing of content: kv_cache.c says which end a page goes to, and forgets what the
 * page held when it is allocated again. */
#ifndef KVCACHE_KV_BLOCKS_H
#define KVCACHE_KV_BLOCKS_H

#include "core/err.h"
#include "core/list.h"

#include <stdbool.h>
#include <stdint.h>

struct kv_block {
    struct list link; /* in the free list while refs == 0, else linked to itself */
    int32_t refs;
};

/* All fields are private to kvcache/. */
struct kv_blocks {
    struct kv_block *blocks; /* [n_pages] */
    struct list free;        /* head: allocated next */
    int32_t n_pages, n_free;
};

/* All pages free, in order of their ids. -ENOMEM leaves nothing to release. */
MUST_CHECK int kv_blocks_init(struct kv_blocks *b, int32_t n_pages);
void kv_blocks_deinit(struct kv_blocks *b); /* accepts zeroed memory */

/* Takes the head of the free list, with one reference; -1 when none is free. */
int32_t kv_blocks_alloc(struct kv_blocks *b);
/* One more reference; a free page leaves the free list. */
void kv_blocks_get(struct kv_blocks *b, int32_t page);
/* One reference less. At zero the page goes to the back of the free list if keep, else in front. */
void kv_blocks_put(struct kv_blocks *b, int32_t page, bool keep);
/* Moves a free page to the front of the free list: its content is not worth keeping. */
void kv_blocks_demote(struct kv_blocks *b, int32_t page);

static inline int32_t kv_blocks_refs(const struct kv_blocks *b, int32_t page)
{
    return b->blocks[page].refs;
}

static inline int32_t kv_blocks_id(const struct kv_blocks *b, const struct list *link)
{
    return (int32_t)(LIST_ENTRY(link, struct kv_block, link) - b->blocks);
}

/* Walks the list: links agree in both directions, exactly the pages without references are in it,
 * n_free counts them. pos receives each free page's place from the head, -1 for used ones. */
MUST_CHECK int kv_blocks_check(const struct kv_blocks *b, int32_t *pos, struct err_msg *why);

#endif
