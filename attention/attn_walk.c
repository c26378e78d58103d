/* Page walks. See attn_walk.h. */
#include "attention/attn_walk.h"

static void add_span(struct attn_walk *w, int32_t first, int32_t last)
{
    w->spans[w->n_spans++] = (struct attn_span){first, last};
}

/* Right to left from diag - 1 to page 1, without the gap [sink, near) that nobody visits. */
static void add_leftward(struct attn_walk *w, int32_t diag, int32_t sink, int32_t near)
{
    if (near < 1)
        near = 1;
    if (sink >= near) {
        if (diag - 1 >= 1)
            add_span(w, diag - 1, 1);
        return;
    }
    if (diag - 1 >= near)
        add_span(w, diag - 1, near);
    if (sink - 1 >= 1)
        add_span(w, sink - 1, 1);
}

static void add_rightward(struct attn_walk *w, int32_t diag, int32_t sink, int32_t near)
{
    if (sink >= near) {
        if (diag > 0)
            add_span(w, 0, diag - 1);
        return;
    }
    if (sink > 0)
        add_span(w, 0, sink - 1);
    if (diag - 1 >= near)
        add_span(w, near, diag - 1);
}

void attn_walk_init(struct attn_walk *w, enum attn_order order, int32_t diag, int32_t last_page,
                    const struct attn_head_policy *heads, int32_t n_heads)
{
    int32_t sink = 0, near = diag;
    for (int32_t h = 0; h < n_heads && near > 0; h++) {
        bool all = !heads || heads[h].visit == ATTN_VISIT_ALL;
        int32_t local = all ? diag : heads[h].local_pages;
        int32_t first = local < diag ? diag - local : 0;
        near = first < near ? first : near;
        if (!all && heads[h].sink_pages > sink)
            sink = heads[h].sink_pages;
    }
    if (sink > diag)
        sink = diag;
    w->n_spans = 0;
    if (order == ATTN_ORDER_L2R) {
        add_rightward(w, diag, sink, near);
        add_span(w, diag, last_page);
        return;
    }
    add_span(w, diag, last_page);
    if (diag > 0 && (sink > 0 || near == 0))
        add_span(w, 0, 0);
    add_leftward(w, diag, sink, near);
}
