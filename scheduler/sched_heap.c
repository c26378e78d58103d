#include "scheduler/sched_heap.h"

#include "core/err.h"

#include <stddef.h>

static int32_t rank_of(const struct heap_node *n)
{
    return n ? n->rank : 0;
}

/* Restores "left at least as deep as right" at n and tells whether its rank has changed. */
static bool settle(struct heap_node *n)
{
    int32_t before = n->rank;
    if (rank_of(n->left) < rank_of(n->right)) {
        struct heap_node *t = n->left;
        n->left = n->right;
        n->right = t;
    }
    n->rank = rank_of(n->right) + 1;
    return n->rank != before;
}

/* Zips the right spines of both trees, best first, then settles the new spine from its end up. Only
 * right spines are walked, and they are at most log2(n + 1) long. */
static struct heap_node *merge(const struct heap *h, struct heap_node *a, struct heap_node *b)
{
    struct heap_node *root = NULL, **at = &root, *last = NULL;
    while (a && b) {
        bool second = h->before(b, a);
        struct heap_node *best = second ? b : a;
        *at = best;
        best->parent = last;
        last = best;
        at = &best->right;
        if (second)
            b = best->right;
        else
            a = best->right;
    }
    *at = a ? a : b;
    if (*at)
        (*at)->parent = last;
    for (; last; last = last->parent)
        (void)settle(last);
    return root;
}

void heap_insert(struct heap *h, struct heap_node *n)
{
    ASSERT(!heap_linked(n));
    *n = (struct heap_node){.rank = 1};
    h->root = merge(h, h->root, n);
}

void heap_remove(struct heap *h, struct heap_node *n)
{
    struct heap_node *up = n->parent;
    ASSERT(heap_linked(n));
    struct heap_node *rest = merge(h, n->left, n->right);
    if (rest)
        rest->parent = up;
    if (!up)
        h->root = rest;
    else if (up->left == n)
        up->left = rest;
    else
        up->right = rest;
    while (up && settle(up))
        up = up->parent;
    *n = (struct heap_node){.rank = 0};
}

struct heap_node *heap_next(const struct heap_node *n)
{
    if (n->left) /* the right child never exists without the left one */
        return n->left;
    for (const struct heap_node *up = n->parent; up; n = up, up = up->parent)
        if (n != up->right && up->right)
            return up->right;
    return NULL;
}

int32_t heap_check(const struct heap *h)
{
    int32_t n_nodes = 0;
    if (h->root && h->root->parent)
        return -1;
    for (const struct heap_node *n = h->root; n; n = heap_next(n)) {
        const struct heap_node *child[2] = {n->left, n->right};
        if (n->rank != rank_of(n->right) + 1 || rank_of(n->left) < rank_of(n->right))
            return -1;
        for (int i = 0; i < 2; i++)
            if (child[i] && (child[i]->parent != n || h->before(child[i], n)))
                return -1;
        n_nodes++;
    }
    return n_nodes;
}
