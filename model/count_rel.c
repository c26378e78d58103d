#include "model/count_rel.h"

#include "core/mem.h"

#include <string.h>

static size_t edges_bytes(const struct count_rel *c)
{
    return (size_t)c->caller.n_edges * sizeof *c->caller.edges;
}

static size_t bins_bytes(const struct count_rel *c)
{
    return c->n_bins * sizeof *c->step;
}

static int take(struct count_rel *c, struct dev *d)
{
    TRY(dev_alloc(d, &c->memory, bins_bytes(c) + edges_bytes(c), NULL));
    void *edges = (char *)c->memory + bins_bytes(c);
    c->dev = (struct attn_rel_counts){edges, c->caller.n_edges, c->memory};
    c->step = mem_zalloc(c->n_bins, sizeof *c->step);
    return dev_upload(d, edges, c->caller.edges, edges_bytes(c));
}

int count_rel_on(struct count_rel *c, const struct attn_rel_counts *counts, size_t n_bins,
                 struct dev *d, bool on_device)
{
    ASSERT(!c->caller.bins);
    *c = (struct count_rel){.caller = *counts, .n_bins = n_bins};
    int err = on_device ? take(c, d) : 0;
    if (err < 0)
        count_rel_off(c, d);
    return err;
}

void count_rel_off(struct count_rel *c, struct dev *d)
{
    dev_release(d, c->memory, bins_bytes(c) + edges_bytes(c));
    mem_free(c->step);
    *c = (struct count_rel){0};
}

const struct attn_rel_counts *count_rel_of(const struct count_rel *c)
{
    if (!c->caller.bins)
        return NULL;
    return c->dev.bins ? &c->dev : &c->caller;
}

int count_rel_collect(struct count_rel *c, struct dev *d)
{
    if (!c->dev.bins)
        return 0;
    TRY(dev_download(d, c->step, c->dev.bins, bins_bytes(c)));
    for (size_t i = 0; i < c->n_bins; i++)
        c->caller.bins[i] += c->step[i];
    memset(c->step, 0, bins_bytes(c));
    return dev_upload(d, c->dev.bins, c->step, bins_bytes(c));
}
