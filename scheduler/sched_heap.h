/* An intrusive leftist heap: insertion and removal of any node in O(log n) worst case, without an
 * array that could be full or would have to grow inside a step. A node's key may become worse than
 * the one it was inserted with only if the owner re-inserts it before it relies on the order.
 * Source: Crane, "Linear lists and priority queues as balanced binary trees", 1972; Knuth TAOCP 3,
 * 5.2.3. */
#ifndef SCHEDULER_SCHED_HEAP_H
#define SCHEDULER_SCHED_HEAP_H

#include <stdbool.h>
#include <stdint.h>

struct heap_node {
    struct heap_node *parent, *left, *right;
    int32_t rank; /* length of the right spine; 0: in no heap */
};

struct heap {
    struct heap_node *root;
    bool (*before)(const struct heap_node *a, const struct heap_node *b); /* a total order */
};

static inline bool heap_linked(const struct heap_node *n)
{
    return n->rank > 0;
}

void heap_insert(struct heap *h, struct heap_node *n);
/* Compares nothing with n itself, so n's key may already have changed. */
void heap_remove(struct heap *h, struct heap_node *n);
/* Walks every node, parents first: start with h->root, stop at NULL. */
struct heap_node *heap_next(const struct heap_node *n);
/* The number of nodes, or -1 when links, ranks or order are broken. */
int32_t heap_check(const struct heap *h);

#endif
