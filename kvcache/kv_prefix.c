#include "kvcache/kv_prefix.h"

#include "core/hash.h"
#include "core/mem.h"

#include <errno.h>
#include <string.h>

static const size_t block_bytes = KV_BLOCK_TOKENS * sizeof(int32_t);

static uint64_t hash_default(uint64_t parent, const int32_t *tokens)
{
    return hash_bytes(tokens, KV_PAGE_TOKENS * sizeof *tokens, parent);
}

uint64_t kv_prefix_hash(const struct kv_prefix *p, uint64_t parent_hash, const int32_t *block)
{
    return p->hash(p->hash(parent_hash, block), block + KV_PAGE_TOKENS);
}

int kv_prefix_init(struct kv_prefix *p, int32_t n_pages, kv_hash_fn hash)
{
    size_t n = (size_t)n_pages, slots = 4;
    ASSERT(n_pages > 0);
    while (slots < 2 * n)
        slots *= 2;
    *p = (struct kv_prefix){.hash = hash ? hash : hash_default,
                            .nodes = mem_try_aligned(n, sizeof *p->nodes),
                            .tokens = mem_try_aligned(n, block_bytes),
                            .spare = mem_try_aligned(n, sizeof *p->spare),
                            .pages = mem_try_aligned(n, sizeof *p->pages),
                            .table = mem_try_aligned(slots, sizeof *p->table),
                            .mask = slots - 1,
                            .n_pages = n_pages};
    if (!p->nodes || !p->tokens || !p->spare || !p->pages || !p->table) {
        kv_prefix_deinit(p);
        return -ENOMEM;
    }
    for (int32_t i = 0; i < n_pages; i++) {
        p->spare[i] = n_pages - 1 - i;
        p->pages[i] = (struct kv_page_link){.node = KV_NODE_NONE, .next = i, .prev = i};
    }
    for (size_t i = 0; i < slots; i++)
        p->table[i] = KV_NODE_NONE;
    return 0;
}

void kv_prefix_deinit(struct kv_prefix *p)
{
    mem_free(p->nodes);
    mem_free(p->tokens);
    mem_free(p->spare);
    mem_free(p->pages);
    mem_free(p->table);
    memset(p, 0, sizeof *p);
}

static const int32_t *node_tokens(const struct kv_prefix *p, int32_t node)
{
    return p->tokens + (size_t)node * KV_BLOCK_TOKENS;
}

/* The table slot of the node with this hash, or the empty slot where it belongs. */
static uint64_t probe(const struct kv_prefix *p, uint64_t hash)
{
    uint64_t i = hash & p->mask;
    while (p->table[i] != KV_NODE_NONE && p->nodes[p->table[i]].hash != hash)
        i = (i + 1) & p->mask;
    return i;
}

int32_t kv_prefix_find(const struct kv_prefix *p, int32_t parent, uint64_t parent_hash,
                       uint64_t hash, const int32_t *block, bool *collision)
{
    int32_t node = p->table[probe(p, hash)];
    *collision = false;
    if (node == KV_NODE_NONE)
        return KV_NODE_NONE;
    const struct kv_node *n = &p->nodes[node];
    if (n->parent == parent && n->parent_hash == parent_hash &&
        memcmp(node_tokens(p, node), block, block_bytes) == 0)
        return node;
    *collision = true;
    return KV_NODE_NONE;
}

int32_t kv_prefix_insert(struct kv_prefix *p, int32_t parent, uint64_t parent_hash, uint64_t hash,
                         const int32_t *block, int32_t page)
{
    uint64_t slot = probe(p, hash);
    ASSERT(p->table[slot] == KV_NODE_NONE && p->pages[page].node == KV_NODE_NONE);
    ASSERT(p->n_nodes < p->n_pages);
    int32_t node = p->spare[p->n_pages - 1 - p->n_nodes++];
    p->nodes[node] =
        (struct kv_node){.hash = hash, .parent_hash = parent_hash, .parent = parent, .page = page};
    memcpy(p->tokens + (size_t)node * KV_BLOCK_TOKENS, block, block_bytes);
    p->table[slot] = node;
    p->pages[page] = (struct kv_page_link){.node = node, .next = page, .prev = page};
    if (parent != KV_NODE_NONE)
        p->nodes[parent].n_children++;
    return node;
}

void kv_prefix_join(struct kv_prefix *p, int32_t node, int32_t page)
{
    int32_t head = p->nodes[node].page, tail = p->pages[head].prev;
    ASSERT(p->pages[page].node == KV_NODE_NONE);
    p->pages[page] = (struct kv_page_link){.node = node, .next = head, .prev = tail};
    p->pages[tail].next = page;
    p->pages[head].prev = page;
}

/* Empties the slot and moves later entries of the run back, so that every node stays reachable from
 * the slot its hash names. */
static void table_remove(struct kv_prefix *p, uint64_t hole)
{
    p->table[hole] = KV_NODE_NONE;
    for (uint64_t i = (hole + 1) & p->mask; p->table[i] != KV_NODE_NONE; i = (i + 1) & p->mask) {
        uint64_t home = p->nodes[p->table[i]].hash & p->mask;
        if (((i - home) & p->mask) < ((i - hole) & p->mask))
            continue; /* its home lies after the hole: it must not move before it */
        p->table[hole] = p->table[i];
        p->table[i] = KV_NODE_NONE;
        hole = i;
    }
}

static void node_remove(struct kv_prefix *p, int32_t node)
{
    struct kv_node *n = &p->nodes[node];
    ASSERT(n->n_children == 0);
    table_remove(p, probe(p, n->hash));
    if (n->parent != KV_NODE_NONE)
        p->nodes[n->parent].n_children--;
    p->spare[p->n_pages - 1 - --p->n_nodes] = node;
}

void kv_prefix_leave(struct kv_prefix *p, int32_t page)
{
    struct kv_page_link *l = &p->pages[page];
    ASSERT(l->node != KV_NODE_NONE);
    if (l->next == page) {
        node_remove(p, l->node);
    } else {
        if (p->nodes[l->node].page == page)
            p->nodes[l->node].page = l->next;
        p->pages[l->prev].next = l->next;
        p->pages[l->next].prev = l->prev;
    }
    *l = (struct kv_page_link){.node = KV_NODE_NONE, .next = page, .prev = page};
}

/* One node: reachable from its hash, its hash true, its parent alive, its pages its own. */
static int check_node(const struct kv_prefix *p, uint64_t slot, int32_t *children,
                      struct err_msg *why)
{
    int32_t node = p->table[slot], page;
    if (node < 0 || node >= p->n_pages) {
        return err_set(why, ERR_INTERNAL, "index slot %llu holds node %d", (unsigned long long)slot,
                       node);
    }
    const struct kv_node *n = &p->nodes[node];
    if (probe(p, n->hash) != slot)
        return err_set(why, ERR_INTERNAL, "index: node %d is not reachable from its hash", node);
    if (kv_prefix_hash(p, n->parent_hash, node_tokens(p, node)) != n->hash)
        return err_set(why, ERR_INTERNAL, "index: node %d has a wrong hash", node);
    if (n->parent != KV_NODE_NONE) {
        const struct kv_node *up = &p->nodes[n->parent];
        if (p->table[probe(p, up->hash)] != n->parent || up->hash != n->parent_hash)
            return err_set(why, ERR_INTERNAL, "index: node %d has lost its parent", node);
        children[n->parent]++;
    }
    page = n->page;
    do {
        const struct kv_page_link *l = &p->pages[page];
        if (l->node != node || p->pages[l->next].prev != page)
            return err_set(why, ERR_INTERNAL, "index: page %d and node %d disagree", page, node);
        page = l->next;
    } while (page != n->page);
    return 0;
}

static int check_counts(const struct kv_prefix *p, const int32_t *children, int32_t n_nodes,
                        struct err_msg *why)
{
    if (n_nodes != p->n_nodes)
        return err_set(why, ERR_INTERNAL, "index has %d nodes, count says %d", n_nodes, p->n_nodes);
    for (int32_t i = 0; i < p->n_pages; i++) {
        int32_t node = p->pages[i].node;
        if (node == KV_NODE_NONE)
            continue;
        if (p->table[probe(p, p->nodes[node].hash)] != node) {
            return err_set(why, ERR_INTERNAL, "page %d names node %d, which is not indexed", i,
                           node);
        }
        if (p->nodes[node].n_children != children[node]) {
            return err_set(why, ERR_INTERNAL, "node %d has %d children, count says %d", node,
                           children[node], p->nodes[node].n_children);
        }
    }
    return 0;
}

int kv_prefix_check(const struct kv_prefix *p, struct err_msg *why)
{
    int32_t *children = mem_zalloc((size_t)p->n_pages, sizeof *children), n_nodes = 0;
    int err = 0;
    for (uint64_t i = 0; i <= p->mask && err == 0; i++) {
        if (p->table[i] == KV_NODE_NONE)
            continue;
        n_nodes++;
        err = check_node(p, i, children, why);
    }
    if (err == 0)
        err = check_counts(p, children, n_nodes, why);
    mem_free(children);
    return err;
}
