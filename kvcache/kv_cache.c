/* Slots, page tables and the rules that tie the page pool (kv_blocks) to the prefix index
 * (kv_prefix). The rules, on which both rely:
 *
 *   - When several pages list one content, all of them are in use. The one that loses its last
 *     reference is unlisted and goes to the front of the free list; content that is computed anew
 *     while a free page holds it takes that page's place. Cached content never takes two free
 * pages.
 *   - Parents outlive children. A sequence that uses a page uses a page of every node before it,
 * and closing releases the tail first, so in the free list a parent always stands behind its
 *     children and eviction from the head takes leaves first.
 *   - Pages without indexed content stand before all pages with it.
 *
 * Eviction is lazy: the index forgets a page when the pool hands it out again. */
#include "kvcache/kv_cache.h"

#include "core/hash.h"
#include "core/mem.h"
#include "kvcache/kv_blocks.h"
#include "kvcache/kv_prefix.h"

#include <errno.h>
#include <string.h>

enum {
    MAX_PAGES = 1 << 24, /* 2^30 tokens; about 350 bytes of bookkeeping each */
    MAX_SEQS = 1 << 16,
    BLOCK_PAGES = KV_BLOCK_TOKENS / KV_PAGE_TOKENS
};
static const uint64_t max_table_bytes = (uint64_t)4 << 30;

struct kv_slot {
    bool open;
    bool unindexable; /* a collision ended the chain: later pages have no parent to hang on */
    int32_t n_pages;
    int32_t n_published; /* leading pages that are in the index */
    int32_t node;        /* of the last published page */
    uint64_t hash;       /* of the chain up to there */
};

struct kv_cache {
    struct kv_cache_config cfg;
    struct kv_blocks blocks;
    struct kv_prefix prefix;
    struct kv_slot *slots; /* [max_seqs] */
    int32_t *tables;       /* [max_seqs, max_pages_per_seq] */
    int32_t *closed;       /* [max_seqs] stack of closed slots */
    int32_t n_cached;      /* free pages with indexed content */
    struct kv_cache_stats stats;
};

static int32_t *table_row(const struct kv_cache *kv, int32_t slot)
{
    return kv->tables + (size_t)slot * (size_t)kv->cfg.max_pages_per_seq;
}

static struct kv_slot *open_slot(const struct kv_cache *kv, int32_t slot)
{
    ASSERT(slot >= 0 && slot < kv->cfg.max_seqs && kv->slots[slot].open);
    return &kv->slots[slot];
}

static int check_config(const struct kv_cache_config *c, struct err_msg *why)
{
    if (c->n_pages < 1 || c->n_pages > MAX_PAGES) {
        return err_set(why, ERR_INVALID, "cache: n_pages %d is outside 1 to %d", c->n_pages,
                       MAX_PAGES);
    }
    if (c->max_seqs < 1 || c->max_seqs > MAX_SEQS) {
        return err_set(why, ERR_INVALID, "cache: max_seqs %d is outside 1 to %d", c->max_seqs,
                       MAX_SEQS);
    }
    if (c->max_pages_per_seq < 1 || c->max_pages_per_seq > MAX_PAGES) {
        return err_set(why, ERR_INVALID, "cache: max_pages_per_seq %d is outside 1 to %d",
                       c->max_pages_per_seq, MAX_PAGES);
    }
    uint64_t bytes = (uint64_t)c->max_seqs * (uint64_t)c->max_pages_per_seq * sizeof(int32_t);
    if (bytes > max_table_bytes) {
        return err_set(why, ERR_INVALID,
                       "cache: page tables of %d sequences x %d pages x 4 bytes = %.1f GiB, more "
                       "than %.0f GiB",
                       c->max_seqs, c->max_pages_per_seq, (double)bytes / 0x1p30,
                       (double)max_table_bytes / 0x1p30);
    }
    return 0;
}

int kv_cache_create(struct kv_cache **out, const struct kv_cache_config *cfg, struct err_msg *why)
{
    TRY(check_config(cfg, why));
    struct kv_cache *kv = mem_zalloc(1, sizeof *kv);
    size_t n_seqs = (size_t)cfg->max_seqs;
    int err;
    kv->cfg = *cfg;
    kv->slots = mem_try_aligned(n_seqs, sizeof *kv->slots);
    kv->closed = mem_try_aligned(n_seqs, sizeof *kv->closed);
    kv->tables = mem_try_aligned(n_seqs * (size_t)cfg->max_pages_per_seq, sizeof *kv->tables);
    err = kv->slots && kv->closed && kv->tables ? 0 : -ENOMEM;
    if (err == 0)
        err = kv_blocks_init(&kv->blocks, cfg->n_pages);
    if (err == 0)
        err = kv_prefix_init(&kv->prefix, cfg->n_pages, cfg->hash);
    if (err < 0) {
        kv_cache_destroy(kv);
        return err_set(why, err, "cache: no memory for the bookkeeping of %d pages, %d x %d tables",
                       cfg->n_pages, cfg->max_seqs, cfg->max_pages_per_seq);
    }
    for (int32_t i = 0; i < cfg->max_seqs; i++)
        kv->closed[i] = cfg->max_seqs - 1 - i;
    *out = kv;
    return 0;
}

void kv_cache_destroy(struct kv_cache *kv)
{
    if (!kv)
        return;
    kv_prefix_deinit(&kv->prefix);
    kv_blocks_deinit(&kv->blocks);
    mem_free(kv->slots);
    mem_free(kv->closed);
    mem_free(kv->tables);
    mem_free(kv);
}

int32_t kv_max_servable_tokens(int32_t n_pages, int32_t max_pages_per_seq)
{
    int32_t pages = n_pages < max_pages_per_seq ? n_pages : max_pages_per_seq;
    if (pages < 0)
        return 0;
    return pages > INT32_MAX / KV_PAGE_TOKENS ? INT32_MAX : pages * KV_PAGE_TOKENS;
}

uint64_t kv_seed(uint64_t model_fingerprint, uint64_t policy_fingerprint, const void *salt,
                 size_t len)
{
    uint64_t who = hash_pair(model_fingerprint, policy_fingerprint);
    return hash_pair(who, len ? hash_bytes(salt, len, who) : 0);
}

int kv_seq_open(struct kv_cache *kv, int32_t *slot)
{
    if (kv->stats.open_seqs == kv->cfg.max_seqs)
        return ERR_NO_BLOCKS;
    *slot = kv->closed[kv->cfg.max_seqs - 1 - kv->stats.open_seqs++];
    kv->slots[*slot] = (struct kv_slot){.open = true, .node = KV_NODE_NONE};
    return 0;
}

/* Where a walk along a chain stands. */
struct walk {
    uint64_t hash;
    int32_t node;
};

static const int32_t *block_of(const int32_t *tokens, int32_t page)
{
    return tokens + (size_t)(page / BLOCK_PAGES) * KV_BLOCK_TOKENS;
}

/* Follows the chain over one more page, of this block of tokens, if it is indexed. */
static bool walk_page(struct kv_cache *kv, struct walk *w, const int32_t *block, bool *collision)
{
    uint64_t hash = kv_prefix_hash(&kv->prefix, w->hash, block);
    int32_t node = kv_prefix_find(&kv->prefix, w->node, w->hash, hash, block, collision);
    if (node == KV_NODE_NONE)
        return false;
    *w = (struct walk){.hash = hash, .node = node};
    return true;
}

/* Pages of a prompt that may be taken from the cache: whole blocks, and never its last token. */
static int32_t max_hit_pages(const struct kv_cache *kv, int32_t n_tokens)
{
    if (!kv->cfg.prefix_cache || n_tokens < 1)
        return 0;
    int32_t most = kv_max_servable_tokens(kv->cfg.n_pages, kv->cfg.max_pages_per_seq);
    int32_t usable = n_tokens - 1 < most ? n_tokens - 1 : most;
    return usable / KV_BLOCK_TOKENS * BLOCK_PAGES;
}

int32_t kv_prefix_peek(struct kv_cache *kv, uint64_t seed, const int32_t *tokens, int32_t n_tokens,
                       int32_t *free_hits)
{
    struct walk w = {.hash = seed, .node = KV_NODE_NONE};
    int32_t most = max_hit_pages(kv, n_tokens), n = 0, n_free = 0, block_free = 0;
    bool collision;
    while (n < most && walk_page(kv, &w, block_of(tokens, n), &collision)) {
        block_free += kv_blocks_refs(&kv->blocks, kv->prefix.nodes[w.node].page) == 0;
        if (++n % BLOCK_PAGES == 0) { /* only whole blocks count */
            n_free += block_free;
            block_free = 0;
        }
    }
    if (free_hits)
        *free_hits = n_free;
    return n / BLOCK_PAGES * KV_BLOCK_TOKENS;
}

static void note_peak(struct kv_cache *kv)
{
    int32_t used = kv->cfg.n_pages - kv->blocks.n_free;
    if (used > kv->stats.peak_used_pages)
        kv->stats.peak_used_pages = used;
}

int32_t kv_seq_attach(struct kv_cache *kv, int32_t slot, uint64_t seed, const int32_t *tokens,
                      int32_t n_tokens)
{
    struct kv_slot *s = open_slot(kv, slot);
    struct walk w = {.hash = seed, .node = KV_NODE_NONE}, aligned = w;
    int32_t *row = table_row(kv, slot), most = max_hit_pages(kv, n_tokens), n = 0;
    bool collision = false;
    ASSERT(s->n_pages == 0);
    while (n < most && walk_page(kv, &w, block_of(tokens, n), &collision)) {
        row[n++] = kv->prefix.nodes[w.node].page;
        if (n % BLOCK_PAGES == 0)
            aligned = w;
    }
    n -= n % BLOCK_PAGES;
    for (int32_t i = 0; i < n; i++) {
        kv->n_cached -= kv_blocks_refs(&kv->blocks, row[i]) == 0;
        kv_blocks_get(&kv->blocks, row[i]);
    }
    s->n_pages = s->n_published = n;
    s->node = aligned.node;
    s->hash = aligned.hash;
    kv->stats.collisions += collision;
    kv->stats.query_tokens += n_tokens > 0 ? (uint64_t)n_tokens : 0;
    kv->stats.hit_tokens += (uint64_t)n * KV_PAGE_TOKENS;
    note_peak(kv);
    return n * KV_PAGE_TOKENS;
}

int kv_seq_reserve(struct kv_cache *kv, int32_t slot, int32_t n_tokens)
{
    struct kv_slot *s = open_slot(kv, slot);
    int32_t want = kv_pages_for(n_tokens), *row = table_row(kv, slot);
    if (want > kv->cfg.max_pages_per_seq)
        return ERR_TOO_LONG;
    if (want - s->n_pages > kv->blocks.n_free)
        return ERR_NO_BLOCKS;
    while (s->n_pages < want) {
        int32_t page = kv_blocks_alloc(&kv->blocks);
        if (kv_prefix_node(&kv->prefix, page) != KV_NODE_NONE) {
            kv_prefix_leave(&kv->prefix, page);
            kv->n_cached--;
            kv->stats.evictions++;
        }
        row[s->n_pages++] = page;
    }
    note_peak(kv);
    return 0;
}

/* A free page's content is not worth keeping. */
static void forget_page(struct kv_cache *kv, int32_t page)
{
    kv_prefix_leave(&kv->prefix, page);
    kv_blocks_demote(&kv->blocks, page);
    kv->n_cached--;
}

/* Indexes the page under the chain at w; false when its hash belongs to another content. */
static bool publish_page(struct kv_cache *kv, struct walk *w, const int32_t *block, int32_t page)
{
    struct walk up = *w;
    bool collision = false;
    if (walk_page(kv, w, block, &collision)) {
        int32_t first = kv->prefix.nodes[w->node].page;
        kv_prefix_join(&kv->prefix, w->node, page);
        if (kv_blocks_refs(&kv->blocks, first) == 0)
            forget_page(kv, first);
        return true;
    }
    kv->stats.collisions += collision;
    if (collision)
        return false;
    w->hash = kv_prefix_hash(&kv->prefix, up.hash, block);
    w->node = kv_prefix_insert(&kv->prefix, up.node, up.hash, w->hash, block, page);
    return true;
}

void kv_seq_publish(struct kv_cache *kv, int32_t slot, uint64_t seed, const int32_t *tokens,
                    int32_t n_tokens)
{
    struct kv_slot *s = open_slot(kv, slot);
    const int32_t *row = table_row(kv, slot);
    int32_t full = n_tokens / KV_BLOCK_TOKENS * BLOCK_PAGES;
    struct walk w = {.hash = s->n_published ? s->hash : seed, .node = s->node};
    ASSERT(full <= s->n_pages);
    if (!kv->cfg.prefix_cache)
        return;
    while (s->n_published < full && !s->unindexable) {
        int32_t i = s->n_published;
        if (publish_page(kv, &w, block_of(tokens, i), row[i]))
            s->n_published++;
        else
            s->unindexable = true;
    }
    s->hash = w.hash;
    s->node = w.node;
}

/* One reference of a closing sequence; see the rules at the head of this file. */
static void release_page(struct kv_cache *kv, int32_t page)
{
    bool last = kv_blocks_refs(&kv->blocks, page) == 1;
    if (last && kv_prefix_shared(&kv->prefix, page))
        kv_prefix_leave(&kv->prefix, page);
    bool keep = kv_prefix_node(&kv->prefix, page) != KV_NODE_NONE;
    kv_blocks_put(&kv->blocks, page, keep);
    kv->n_cached += last && keep;
}

void kv_seq_close(struct kv_cache *kv, int32_t slot)
{
    struct kv_slot *s = open_slot(kv, slot);
    const int32_t *row = table_row(kv, slot);
    for (int32_t i = s->n_pages; i-- > 0;)
        release_page(kv, row[i]);
    *s = (struct kv_slot){.open = false};
    kv->closed[kv->cfg.max_seqs - kv->stats.open_seqs--] = slot;
}

const int32_t *kv_seq_pages(const struct kv_cache *kv, int32_t slot, int32_t *n)
{
    *n = open_slot(kv, slot)->n_pages;
    return table_row(kv, slot);
}

int32_t kv_free_pages(const struct kv_cache *kv)
{
    return kv->blocks.n_free;
}

void kv_prefix_reset(struct kv_cache *kv)
{
    /* Children stand before their parents; what moves to the front stays out of the walk. */
    LIST_FOREACH_SAFE(l, next, &kv->blocks.free)
    {
        int32_t page = kv_blocks_id(&kv->blocks, l);
        if (kv_prefix_node(&kv->prefix, page) != KV_NODE_NONE)
            forget_page(kv, page);
    }
}

void kv_cache_get_stats(const struct kv_cache *kv, struct kv_cache_stats *out)
{
    *out = kv->stats;
    out->n_pages = kv->cfg.n_pages;
    out->free_pages = kv->blocks.n_free;
    out->used_pages = kv->cfg.n_pages - kv->blocks.n_free;
    out->cached_pages = kv->n_cached;
}

/* Counts the references of one slot's table into refs; seen[page] names the last slot using it. */
static int check_table(const struct kv_cache *kv, int32_t slot, int32_t *refs, int32_t *seen,
                       struct err_msg *why)
{
    const struct kv_slot *s = &kv->slots[slot];
    const int32_t *row = table_row(kv, slot);
    int32_t node = KV_NODE_NONE;
    if (s->n_pages > kv->cfg.max_pages_per_seq || s->n_published > s->n_pages) {
        return err_set(why, ERR_INTERNAL, "slot %d: %d pages, %d published", slot, s->n_pages,
                       s->n_published);
    }
    for (int32_t i = 0; i < s->n_pages; i++) {
        if (row[i] < 0 || row[i] >= kv->cfg.n_pages || seen[row[i]] == slot + 1) {
            return err_set(why, ERR_INTERNAL, "slot %d: entry %d is page %d, twice or outside",
                           slot, i, row[i]);
        }
        seen[row[i]] = slot + 1;
        refs[row[i]]++;
        int32_t up = node;
        node = kv_prefix_node(&kv->prefix, row[i]);
        if (i < s->n_published ? node == KV_NODE_NONE || kv->prefix.nodes[node].parent != up
                               : node != KV_NODE_NONE) {
            return err_set(why, ERR_INTERNAL, "slot %d: entry %d of %d published has node %d", slot,
                           i, s->n_published, node);
        }
    }
    return 0;
}

static int check_tables(const struct kv_cache *kv, int32_t *refs, int32_t *seen,
                        struct err_msg *why)
{
    int32_t n_open = 0;
    for (int32_t i = 0; i < kv->cfg.max_seqs; i++) {
        if (!kv->slots[i].open)
            continue;
        n_open++;
        TRY(check_table(kv, i, refs, seen, why));
    }
    if (n_open != kv->stats.open_seqs) {
        return err_set(why, ERR_INTERNAL, "%d slots are open, count says %d", n_open,
                       kv->stats.open_seqs);
    }
    for (int32_t i = 0; i < kv->cfg.n_pages; i++) {
        if (refs[i] != kv_blocks_refs(&kv->blocks, i)) {
            return err_set(why, ERR_INTERNAL, "page %d: %d references, %d table entries", i,
                           kv_blocks_refs(&kv->blocks, i), refs[i]);
        }
    }
    return 0;
}

/* The order of the free list: contentless pages first, children before parents. */
static int check_order(const struct kv_cache *kv, const int32_t *pos, struct err_msg *why)
{
    int32_t n_cached = 0;
    LIST_FOREACH (l, &kv->blocks.free) {
        int32_t page = kv_blocks_id(&kv->blocks, l), node = kv_prefix_node(&kv->prefix, page);
        if (node == KV_NODE_NONE) {
            if (n_cached > 0) {
                return err_set(why, ERR_INTERNAL,
                               "free list: page %d without content stands after "
                               "cached ones",
                               page);
            }
            continue;
        }
        n_cached++;
        if (kv_prefix_shared(&kv->prefix, page))
            return err_set(why, ERR_INTERNAL, "free page %d has a twin", page);
        int32_t parent = kv->prefix.nodes[node].parent;
        if (parent == KV_NODE_NONE)
            continue;
        int32_t up = kv->prefix.nodes[parent].page;
        if (pos[up] >= 0 && pos[up] < pos[page]) {
            return err_set(why, ERR_INTERNAL, "free list: page %d stands before its child %d", up,
                           page);
        }
    }
    if (n_cached != kv->n_cached)
        return err_set(why, ERR_INTERNAL, "%d cached pages, count says %d", n_cached, kv->n_cached);
    return 0;
}

int kv_check(const struct kv_cache *kv, struct err_msg *why)
{
    size_t n = (size_t)kv->cfg.n_pages;
    int32_t *scratch = mem_zalloc(3 * n, sizeof *scratch);
    int err = kv_blocks_check(&kv->blocks, scratch, why);
    if (err == 0)
        err = kv_prefix_check(&kv->prefix, why);
    if (err == 0)
        err = check_tables(kv, scratch + n, scratch + 2 * n, why);
    if (err == 0)
        err = check_order(kv, scratch, why);
    int32_t used = kv->cfg.n_pages - kv->blocks.n_free;
    if (err == 0 && kv->stats.peak_used_pages < used) {
        err = err_set(why, ERR_INTERNAL, "peak %d is under the %d pages in use",
                      kv->stats.peak_used_pages, used);
    }
    mem_free(scratch);
    return err;
}
