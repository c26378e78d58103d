/* Intrusive doubly linked list with a sentinel. A node belongs to at most one list; an unlinked
 * node points to itself. */
#ifndef CORE_LIST_H
#define CORE_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct list {
    struct list *prev, *next;
};

#define LIST_ENTRY(node, type, member) ((type *)(void *)((char *)(node)-offsetof(type, member)))
// NOLINTBEGIN(bugprone-macro-parentheses): `node` is declared here and cannot be parenthesised
#define LIST_FOREACH(node, head)                                                                   \
    for (struct list *node = (head)->next; (node) != (head); (node) = (node)->next)
/* The body may unlink the current node. */
#define LIST_FOREACH_SAFE(node, tmp, head)                                                         \
    for (struct list *node = (head)->next, *tmp = (node)->next; (node) != (head);                  \
         (node) = (tmp), (tmp) = (tmp)->next)
// NOLINTEND(bugprone-macro-parentheses)

static inline void list_init(struct list *l)
{
    l->prev = l->next = l;
}

static inline bool list_empty(const struct list *l)
{
    return l->next == l;
}

static inline void list_insert_after(struct list *at, struct list *n)
{
    n->prev = at;
    n->next = at->next;
    at->next->prev = n;
    at->next = n;
}

static inline void list_push_front(struct list *head, struct list *n)
{
    list_insert_after(head, n);
}

static inline void list_push_back(struct list *head, struct list *n)
{
    list_insert_after(head->prev, n);
}

static inline void list_unlink(struct list *n)
{
    n->prev->next = n->next;
    n->next->prev = n->prev;
    n->prev = n->next = n;
}

#endif
