/* Page bookkeeping for all sequences: reference-counted pages, the prefix index and the
 * per-sequence page tables. Metadata only: it never touches K/V memory. Owned by the loop thread;
 * no function blocks or allocates after create. The numbered rules every caller obeys are in
 * kvcache/README.md.
 *
 * A sequence occupies a slot in [0, max_seqs). Its page table is a row of int32 that only grows
 * while the slot is open, so a step in flight may read the row without a lock. */
#ifndef KVCACHE_KV_CACHE_H
#define KVCACHE_KV_CACHE_H

#include "core/err.h"
#include "kvcache/kv_view.h"

#include <stdbool.h>

struct kv_cache;

struct kv_cache_config {
    int32_t n_pages;
    int32_t max_seqs;
    int32_t max_pages_per_seq; /* longest servable sequence, in pages */
    bool prefix_cache;         /* false: every prompt is computed in full */
    /* NULL: XXH3. Hash of a chain ending with one page of tokens, given the hash before it; tests
     * pass a poor one, for hits compare content and survive any hash. */
    uint64_t (*hash)(uint64_t parent, const int32_t *tokens);
};

struct kv_cache_stats {
    int32_t n_pages;
    int32_t free_pages;   /* reference count 0, cached content or not */
    int32_t cached_pages; /* reference count 0 and findable by the prefix index */
    int32_t used_pages;   /* n_pages - free_pages */
    int32_t peak_used_pages;
    int32_t open_seqs;
    uint64_t query_tokens, hit_tokens; /* of kv_seq_attach, in tokens */
    uint64_t evictions;
    uint64_t collisions; /* equal hash, different tokens: treated as a miss */
};

MUST_CHECK int kv_cache_create(struct kv_cache **out, const struct kv_cache_config *cfg,
                               struct err_msg *why);
void kv_cache_destroy(struct kv_cache *kv); /* accepts NULL */

/* Longest sequence (prompt + generated) that the pool can ever hold for one request: the one
 * formula that sizing, admission and the handshake share. */
int32_t kv_max_servable_tokens(int32_t n_pages, int32_t max_pages_per_seq);

/* Start of a hash chain: K/V computed by different models, policies or tenants never meet.
 * salt may be NULL when len is 0. */
uint64_t kv_seed(uint64_t model_fingerprint, uint64_t policy_fingerprint, const void *salt,
                 size_t len);

/* Opens a slot with an empty table. ERR_NO_BLOCKS when every slot is taken. */
MUST_CHECK int kv_seq_open(struct kv_cache *kv, int32_t *slot);
/* What attach would find, without taking references: cached tokens (a multiple of KV_BLOCK_TOKENS,
 * less than n_tokens, so that at least one token is computed) and, of those pages, how many have
 * reference count 0 now (they would leave the free list). free_hits may be NULL. */
int32_t kv_prefix_peek(struct kv_cache *kv, uint64_t seed, const int32_t *tokens, int32_t n_tokens,
                       int32_t *free_hits);
/* Takes references to the cached prefix into an open, empty slot; returns the tokens attached (0:
 * none). */
int32_t kv_seq_attach(struct kv_cache *kv, int32_t slot, uint64_t seed, const int32_t *tokens,
                      int32_t n_tokens);
/* Makes the table cover n_tokens tokens. On ERR_NO_BLOCKS nothing has changed; ERR_TOO_LONG past
 * max_pages_per_seq. */
MUST_CHECK int kv_seq_reserve(struct kv_cache *kv, int32_t slot, int32_t n_tokens);
/* Tells that K/V of tokens[0, n_tokens) is computed: the pages of its whole query blocks become
 * findable. Call after the step that wrote them succeeded; cheap when nothing new is full (it
 * continues where the last call on this slot stopped). */
void kv_seq_publish(struct kv_cache *kv, int32_t slot, uint64_t seed, const int32_t *tokens,
                    int32_t n_tokens);
/* Drops all references, tail first, and closes the slot. */
void kv_seq_close(struct kv_cache *kv, int32_t slot);
/* The page table row; *n receives its length. Valid until the slot closes. */
const int32_t *kv_seq_pages(const struct kv_cache *kv, int32_t slot, int32_t *n);

/* Pages that could be allocated now. */
int32_t kv_free_pages(const struct kv_cache *kv);
/* Forgets all cached content that nobody references. */
void kv_prefix_reset(struct kv_cache *kv);
void kv_cache_get_stats(const struct kv_cache *kv, struct kv_cache_stats *out);
/* Walks every invariant (references = table entries, free + used = total, list links, index <->
 * page agreement, no page twice in one table). 0, or ERR_INTERNAL with the broken rule in why. */
MUST_CHECK int kv_check(const struct kv_cache *kv, struct err_msg *why);

#endif
