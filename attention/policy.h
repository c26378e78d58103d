/* The page policy: which pages a query block looks at.
 *
 *   O_i = softmax over the keys of the pages j with Visit(l, h, i, j) and Gate(l, h, i, j), and of
 *         the diagonal pages, which are always processed
 *   i     query block: KV_BLOCK_TOKENS consecutive ABSOLUTE positions (i = position / 128)
 *   j     page: KV_PAGE_TOKENS consecutive absolute positions
 *   l, h  layer and query head
 *
 * Visit is decided before QK and saves K too; Gate is decided after QK and saves exp, the V load
 * and PV. A skipped page touches nothing: neither row max, nor row sum, nor output. NaN keeps a
 * page.
 *
 * That is for prompt positions. A generated position visits the same pages, and has a gate of its
 * own, NONE or ABS with thresholds of its own: it decides alone, for each query head and each page
 * before the one that holds the position, which is always kept (the other page of its block, where
 * that lies before, is a candidate like any). What a row decides thus depends on that row alone.
 * Source: BSFA (arXiv 2512.07011) section 4; BLASST (arXiv 2512.12087). */
#ifndef ATTENTION_POLICY_H
#define ATTENTION_POLICY_H

#include <stdbool.h>
#include <stdint.h>

enum attn_visit {
    ATTN_VISIT_ALL,       /* every causally reachable page */
    ATTN_VISIT_SINK_LOCAL /* pages [0, sink_pages) and the local_pages pages before the diagonal,
                             plus the diagonal */
};

enum attn_gate {
    ATTN_GATE_NONE,
    /* BSFA: skip iff max over the rows' scaled scores < T[level][l][h][min(i, n_blocks - 1)] */
    ATTN_GATE_ABS,
    /* BLASST: skip iff in every row the page's maximum < the running maximum + ln(lambda) */
    ATTN_GATE_REL
};

/* Order in which a query block walks its pages. ABS that is not steered does not depend on it; all
 * else does. A function of the absolute block alone, never of chunks. The diagonal pages themselves
 * are walked left to right. */
enum attn_order {
    ATTN_ORDER_DIAG_SINK_R2L, /* diagonal, page 0, then right to left: the default */
    ATTN_ORDER_L2R            /* left to right, diagonal last: for comparison */
};

struct attn_head_policy {
    uint8_t visit; /* enum attn_visit */
    int32_t sink_pages, local_pages;
};

/* ABS thresholds, f32 [n_levels, n_layers, n_heads, n_blocks] in natural scaled-logit units (after
 * 1/sqrt(d)). n_layers and n_heads are this rank's. -inf is dense, +inf is diagonal only. */
struct attn_thresholds {
    const float *t;
    int32_t n_levels, n_layers, n_heads, n_blocks;
    /* in floats: a rank may look at a slice of the file's tensor */
    int64_t level_stride, layer_stride, head_stride;
};

/* Largest ln(lambda) of REL. Above 0 a page may be skipped though it would raise the maximum, by
 * less than that; pages kept alone raise it. And the largest steer. */
enum { ATTN_REL_LN_MAX = 30, ATTN_STEER_MAX = 100 };

/* What one sequence chose. level indexes thresholds (ABS); ln_lambda at most ATTN_REL_LN_MAX (REL);
 * gate_rows 128 (one decision for the query block, the paper) or 64 (one for each half of it).
 * decode_level indexes the thresholds of generated rows.
 *
 * Steered (steer > 0), each row group of each head begins at ln_lambda or its threshold and moves
 * its own by what it decides: see attn_steer.h. REL: toward the density of its head, which lies
 * between the steps level and level + 1 by blend. ABS: toward blend times the pages that its head
 * keeps at its level (1: the level itself); decisions then depend on the order of pages. In either
 * case on its own rows and their pages alone, never on chunks or the batch. */
struct attn_choice {
    uint8_t gate; /* enum attn_gate */
    uint8_t gate_rows;
    int16_t level;
    float ln_lambda;
    float steer;         /* how firmly: what a page kept without being due raises REL's gate by */
    float blend;         /* REL: 0 to 1; ABS: 0 or more */
    int16_t decode_gate; /* of generated rows: ATTN_GATE_NONE or ATTN_GATE_ABS */
    int16_t decode_level;
    int32_t lost_mass; /* not 0: measure what its prompt rows lose (attn_lost.h) */
};

/* What all sequences of a model share. */
struct attn_policy {
    enum attn_order order;
    const struct attn_head_policy *heads; /* [n_layers, n_heads]; NULL: all heads visit all pages */
    struct attn_thresholds abs;           /* t == NULL: no ABS level can be chosen */
    struct attn_thresholds abs_pages; /* [n_levels, n_layers, n_heads, 1] pages that heads keep at a
                                         level; t == NULL: no ABS sequence is steered */
    /* What REL is steered to, by row groups of 128 and of 64 rows: f32 [n_levels, n_layers,
     * n_heads, 1], the shares of their reachable pages that heads keep at steps of lambda, falling
     * from step to step on the mean. t == NULL: no REL sequence is steered. */
    struct attn_thresholds rel_128, rel_64;
    /* of generated rows, looked up as the others are: by the block that holds the position; t ==
     * NULL: they cannot be gated */
    struct attn_thresholds decode;
};

/* Decisions counted in (page, row group) units: a row group is gate_rows query rows (128 where
 * there is no gate), a generated row is a group of its own. Diagonal pages count in all three.
 * Density = kept / reachable. The last two are of sequences alone, and of those that ask. */
struct attn_counts {
    uint64_t reachable; /* causally reachable */
    uint64_t visited;   /* QK computed */
    uint64_t kept;      /* exp, V and PV done */
    uint64_t sampled;   /* rows and heads whose lost softmax mass is measured */
    uint64_t lost;      /* its sum over them, in units of 1 / ATTN_LOST_ONE (attn_lost.h) */
};

#endif
