#include "kvcache/kv_blocks.h"

#include "core/mem.h"

#include <errno.h>

int kv_blocks_init(struct kv_blocks *b, int32_t n_pages)
{
    ASSERT(n_pages > 0);
    b->blocks = mem_try_aligned((size_t)n_pages, sizeof *b->blocks);
    if (!b->blocks)
        return -ENOMEM;
    b->n_pages = b->n_free = n_pages;
    list_init(&b->free);
    for (int32_t i = 0; i < n_pages; i++)
        list_push_back(&b->free, &b->blocks[i].link);
    return 0;
}

void kv_blocks_deinit(struct kv_blocks *b)
{
    mem_free(b->blocks);
    b->blocks = NULL;
}

int32_t kv_blocks_alloc(struct kv_blocks *b)
{
    if (b->n_free == 0)
        return -1;
    int32_t page = kv_blocks_id(b, b->free.next);
    kv_blocks_get(b, page);
    return page;
}

void kv_blocks_get(struct kv_blocks *b, int32_t page)
{
    struct kv_block *k = &b->blocks[page];
    if (k->refs++ == 0) {
        list_unlink(&k->link);
        b->n_free--;
    }
}

void kv_blocks_put(struct kv_blocks *b, int32_t page, bool keep)
{
    struct kv_block *k = &b->blocks[page];
    ASSERT(k->refs > 0);
    if (--k->refs > 0)
        return;
    if (keep)
        list_push_back(&b->free, &k->link);
    else
        list_push_front(&b->free, &k->link);
    b->n_free++;
}

void kv_blocks_demote(struct kv_blocks *b, int32_t page)
{
    struct kv_block *k = &b->blocks[page];
    ASSERT(k->refs == 0);
    list_unlink(&k->link);
    list_push_front(&b->free, &k->link);
}

int kv_blocks_check(const struct kv_blocks *b, int32_t *pos, struct err_msg *why)
{
    int32_t n = 0;
    for (int32_t i = 0; i < b->n_pages; i++)
        pos[i] = -1;
    LIST_FOREACH (l, &b->free) {
        int32_t page = kv_blocks_id(b, l);
        if (page < 0 || page >= b->n_pages || pos[page] >= 0) {
            return err_set(why, ERR_INTERNAL, "free list: entry %d is page %d, twice or outside", n,
                           page);
        }
        if (l->next->prev != l || l->prev->next != l)
            return err_set(why, ERR_INTERNAL, "free list: links of page %d disagree", page);
        if (b->blocks[page].refs != 0) {
            return err_set(why, ERR_INTERNAL, "page %d is free with %d references", page,
                           b->blocks[page].refs);
        }
        pos[page] = n++;
    }
    if (n != b->n_free)
        return err_set(why, ERR_INTERNAL, "free list has %d pages, count says %d", n, b->n_free);
    for (int32_t i = 0; i < b->n_pages; i++) {
        if ((b->blocks[i].refs == 0) != (pos[i] >= 0)) {
            return err_set(why, ERR_INTERNAL, "page %d: %d references, %sin the free list", i,
                           b->blocks[i].refs, pos[i] >= 0 ? "" : "not ");
        }
    }
    return 0;
}
