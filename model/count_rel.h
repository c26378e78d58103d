/* The counts of model_count_rel on their way to the caller. On the CPU a step adds to the caller's
 * bins; a GPU adds to bins of its own, which are added to the caller's after every step. */
#ifndef MODEL_COUNT_REL_H
#define MODEL_COUNT_REL_H

#include "attention/attention.h"
#include "core/dev.h"

struct count_rel {
    struct attn_rel_counts caller; /* bins NULL: off */
    struct attn_rel_counts dev;    /* of the device's memory; bins NULL: a step has the caller's */
    void *memory;                  /* theirs, the bins first */
    uint64_t *step;                /* what comes back from there */
    size_t n_bins;
};

/* Turns on counting that is off. on_device: the bins, n_bins of them, lie on d. */
MUST_CHECK int count_rel_on(struct count_rel *c, const struct attn_rel_counts *counts,
                            size_t n_bins, struct dev *d, bool on_device);
/* Accepts what is off, or zeroed. */
void count_rel_off(struct count_rel *c, struct dev *d);
/* For a step; NULL while off. */
const struct attn_rel_counts *count_rel_of(const struct count_rel *c);
/* After a step. */
MUST_CHECK int count_rel_collect(struct count_rel *c, struct dev *d);

#endif
