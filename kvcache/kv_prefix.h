/* The prefix index: finds pages by the tokens they hold and all tokens before them. Inside kvcache/
 * only.
 *
 * A node stands for one full page of content at the end of one chain: the tokens of its query
 * block, and the node of the page before it. The block's, because the rows of a block may share a
 * gate: then K and V of its first page depend on the tokens of its second. Nodes form a forest
 * whose roots carry the chain's seed. The hash of a node is that of its parent's hash, with the
 * seed as a root's parent hash, and its block (kv_prefix_hash), and a node is found through an
 * open-addressing table (linear probing, at most half full, deletion by shifting back, so there are
 * no tombstones). A hash only proposes: a hit is a node with the same 128 tokens, the same parent
 * node and the same parent hash, hence by induction the same seed and the same tokens from position
 * 0 on. Another content under an equal hash is a collision: counted, treated as a miss, never
 * indexed, so the table holds each 64-bit hash at most once and a probe never scans equal hashes.
 *
 * Two sequences that compute the same content at the same time end up with two pages for one node.
 * They are not merged (page tables only grow); the node lists both and hands out the first.
 *
 * A node lives while it has a page. kv_cache.c releases pages so that a parent outlives its
 * children; the index asserts it. */
#ifndef KVCACHE_KV_PREFIX_H
#define KVCACHE_KV_PREFIX_H

#include "core/err.h"
#include "kvcache/kv_view.h"

#include <stdbool.h>

enum { KV_NODE_NONE = -1 };

/* Hash of a chain that ends with tokens[0, KV_PAGE_TOKENS); parent is the hash of what is before.
 */
typedef uint64_t (*kv_hash_fn)(uint64_t parent, const int32_t *tokens);

struct kv_node {
    uint64_t hash, parent_hash;
    int32_t parent; /* node, or KV_NODE_NONE at a chain's start */
    int32_t page;   /* first of its pages */
    int32_t n_children;
};

struct kv_page_link {
    int32_t node;       /* KV_NODE_NONE: the page's content is not indexed */
    int32_t next, prev; /* ring of the node's pages */
};

/* All fields are private to kvcache/. */
struct kv_prefix {
    kv_hash_fn hash;
    struct kv_node *nodes;      /* [n_pages] */
    int32_t *tokens;            /* [n_pages, KV_BLOCK_TOKENS], per node */
    int32_t *spare;             /* [n_pages] stack of unused nodes */
    struct kv_page_link *pages; /* [n_pages] */
    int32_t *table;             /* [mask + 1] node or KV_NODE_NONE */
    uint64_t mask;
    int32_t n_pages, n_nodes;
};

/* hash NULL: XXH3. -ENOMEM leaves nothing to release. */
MUST_CHECK int kv_prefix_init(struct kv_prefix *p, int32_t n_pages, kv_hash_fn hash);
void kv_prefix_deinit(struct kv_prefix *p); /* accepts zeroed memory */

/* Of either page of a block of tokens [KV_BLOCK_TOKENS]; what is before them differs. */
uint64_t kv_prefix_hash(const struct kv_prefix *p, uint64_t parent_hash, const int32_t *block);
/* The node with this content, or KV_NODE_NONE; *collision tells that another content has the hash.
 * parent_hash is the chain's seed when parent is KV_NODE_NONE; hash is kv_prefix_hash of it and the
 * block. */
int32_t kv_prefix_find(const struct kv_prefix *p, int32_t parent, uint64_t parent_hash,
                       uint64_t hash, const int32_t *block, bool *collision);
/* Adds a node that kv_prefix_find did not find (and did not call a collision), with its first page;
 * the page has no node yet. */
int32_t kv_prefix_insert(struct kv_prefix *p, int32_t parent, uint64_t parent_hash, uint64_t hash,
                         const int32_t *block, int32_t page);
/* Lists one more page with the node's content. */
void kv_prefix_join(struct kv_prefix *p, int32_t node, int32_t page);
/* The page's content is no longer there; the node goes with its last page. */
void kv_prefix_leave(struct kv_prefix *p, int32_t page);

static inline int32_t kv_prefix_node(const struct kv_prefix *p, int32_t page)
{
    return p->pages[page].node;
}

/* Another page lists the same content. */
static inline bool kv_prefix_shared(const struct kv_prefix *p, int32_t page)
{
    return p->pages[page].next != page;
}

/* Table, nodes, parents and page rings agree. */
MUST_CHECK int kv_prefix_check(const struct kv_prefix *p, struct err_msg *why);

#endif
