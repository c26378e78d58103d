/* The waiting order: (priority, preempted before fresh, tenant's virtual count, arrival).
 *
 * Fairness is the virtual token counter of Sheng et al., "Fairness in Serving Large Language
 * Models" (OSDI 2024), Algorithm 2: the tenant served least goes first; admission charges the
 * tokens to be computed, every generated token charges one; a tenant that had nothing waiting is
 * lifted to the smallest count among those that have (or to the last one that had), so that idling
 * saves nothing up. Preempted requests were chosen once already: they stand ahead of their
 * priority class and are not charged again.
 *
 * Every step here costs O(log n) in waiting requests and tenants. A tenant's count changes with
 * every token, so the heaps of tenants keep the count of the time of insertion. Counts only grow: a
 * stale key is too good, never too bad, and is repaired when it reaches the top. */
#include "scheduler/sched_internal.h"

#include "core/hash.h"
#include "core/mem.h"

#include <string.h>

static const struct sched_req *waiting_of(const struct heap_node *n)
{
    return LIST_ENTRY(n, struct sched_req, wait);
}

static struct sched_tenant_lane *lane_of(const struct heap_node *n)
{
    return LIST_ENTRY(n, struct sched_tenant_lane, node);
}

static struct sched_tenant *backlog_of(const struct heap_node *n)
{
    return LIST_ENTRY(n, struct sched_tenant, backlog);
}

static bool request_before(const struct heap_node *a, const struct heap_node *b)
{
    const struct request *x = &waiting_of(a)->pub, *y = &waiting_of(b)->pub;
    return x->priority != y->priority ? x->priority < y->priority : x->id < y->id;
}

static bool lane_before(const struct heap_node *a, const struct heap_node *b)
{
    const struct sched_tenant_lane *x = lane_of(a), *y = lane_of(b);
    const struct request *p = &waiting_of(x->waiting.root)->pub;
    const struct request *q = &waiting_of(y->waiting.root)->pub;
    if (p->priority != q->priority)
        return p->priority < q->priority;
    return x->key != y->key ? x->key < y->key : p->id < q->id;
}

static bool backlog_before(const struct heap_node *a, const struct heap_node *b)
{
    const struct sched_tenant *x = backlog_of(a), *y = backlog_of(b);
    return x->backlog_key != y->backlog_key ? x->backlog_key < y->backlog_key
                                            : strcmp(x->name, y->name) < 0;
}

void queue_init(struct wait_queue *q)
{
    *q = (struct wait_queue){.backlog = {.before = backlog_before}};
    for (int i = 0; i < SCHED_TENANT_BUCKETS; i++)
        list_init(&q->buckets[i]);
    list_init(&q->live);
    list_init(&q->idle);
    for (int i = 0; i < SCHED_LANES; i++) {
        q->tenants[i].before = lane_before;
        q->resumed[i].before = request_before;
    }
}

static void drop_tenant(struct sched_tenant *t)
{
    list_unlink(&t->bucket);
    list_unlink(&t->member);
    mem_free(t);
}

void queue_deinit(struct wait_queue *q)
{
    ASSERT(list_empty(&q->live));
    while (!list_empty(&q->idle))
        drop_tenant(LIST_ENTRY(q->idle.next, struct sched_tenant, member));
}

static size_t bucket_of(const char *name)
{
    return (size_t)(hash_bytes(name, strlen(name), 0) % SCHED_TENANT_BUCKETS);
}

struct sched_tenant *queue_find_tenant(const struct wait_queue *q, const char *name)
{
    LIST_FOREACH (l, &q->buckets[bucket_of(name)]) {
        struct sched_tenant *t = LIST_ENTRY(l, struct sched_tenant, bucket);
        if (strcmp(t->name, name) == 0)
            return t;
    }
    return NULL;
}

static struct sched_tenant *new_tenant(struct wait_queue *q, const char *name)
{
    struct sched_tenant *t = mem_zalloc(1, sizeof *t);
    memcpy(t->name, name, strlen(name));
    list_push_back(&q->live, &t->member);
    list_push_back(&q->buckets[bucket_of(name)], &t->bucket);
    for (int i = 0; i < SCHED_LANES; i++)
        t->lanes[i] =
            (struct sched_tenant_lane){.waiting = {.before = request_before}, .tenant = t};
    return t;
}

struct sched_tenant *queue_join_tenant(struct wait_queue *q, const char *name)
{
    struct sched_tenant *t = queue_find_tenant(q, name);
    if (!t) {
        t = new_tenant(q, name);
    } else if (t->n_live == 0) {
        list_unlink(&t->member);
        list_push_back(&q->live, &t->member);
        q->n_idle--;
    }
    t->n_live++;
    return t;
}

void queue_leave_tenant(struct wait_queue *q, struct sched_tenant *t)
{
    ASSERT(t->n_live > 0);
    if (--t->n_live > 0)
        return;
    list_unlink(&t->member);
    list_push_back(&q->idle, &t->member);
    if (++q->n_idle > SCHED_IDLE_TENANTS) { /* names are the clients': memory must be bounded */
        drop_tenant(LIST_ENTRY(q->idle.next, struct sched_tenant, member));
        q->n_idle--;
    }
}

static int64_t least_served(struct wait_queue *q)
{
    while (q->backlog.root) {
        struct sched_tenant *t = backlog_of(q->backlog.root);
        if (t->backlog_key == t->served)
            return t->served;
        heap_remove(&q->backlog, &t->backlog);
        t->backlog_key = t->served;
        heap_insert(&q->backlog, &t->backlog);
    }
    return q->last_left;
}

static void insert_lane(struct wait_queue *q, struct sched_tenant_lane *l, enum sched_lane lane)
{
    l->key = l->tenant->served;
    heap_insert(&q->tenants[lane], &l->node);
}

static void enter_lane(struct wait_queue *q, struct sched_req *r)
{
    struct sched_tenant_lane *l = &r->tenant->lanes[r->lane];
    if (heap_linked(&l->node)) /* its key depends on its best request */
        heap_remove(&q->tenants[r->lane], &l->node);
    heap_insert(&l->waiting, &r->wait);
    insert_lane(q, l, r->lane);
}

static void leave_lane(struct wait_queue *q, struct sched_req *r)
{
    struct sched_tenant_lane *l = &r->tenant->lanes[r->lane];
    heap_remove(&q->tenants[r->lane], &l->node);
    heap_remove(&l->waiting, &r->wait);
    if (l->waiting.root)
        insert_lane(q, l, r->lane);
}

static void push_fresh(struct wait_queue *q, struct sched_req *r)
{
    struct sched_tenant *t = r->tenant;
    if (t->n_waiting++ == 0) {
        int64_t least = least_served(q);
        if (t->served < least)
            t->served = least;
        t->backlog_key = t->served;
        heap_insert(&q->backlog, &t->backlog);
    }
    enter_lane(q, r);
    q->n_fresh++;
    q->fresh_tokens += r->pub.n_prompt;
}

static void remove_fresh(struct wait_queue *q, struct sched_req *r)
{
    struct sched_tenant *t = r->tenant;
    leave_lane(q, r);
    if (--t->n_waiting == 0) {
        heap_remove(&q->backlog, &t->backlog);
        q->last_left = t->served;
    }
    q->n_fresh--;
    q->fresh_tokens -= r->pub.n_prompt;
}

void queue_push(struct wait_queue *q, struct sched_req *r)
{
    if (!r->resumed) {
        push_fresh(q, r);
        return;
    }
    heap_insert(&q->resumed[r->lane], &r->wait);
    q->n_resumed++;
}

void queue_remove(struct wait_queue *q, struct sched_req *r)
{
    if (!r->resumed) {
        remove_fresh(q, r);
        return;
    }
    heap_remove(&q->resumed[r->lane], &r->wait);
    q->n_resumed--;
}

void queue_move(struct wait_queue *q, struct sched_req *r, enum sched_lane lane)
{
    if (r->resumed) {
        heap_remove(&q->resumed[r->lane], &r->wait);
        heap_insert(&q->resumed[lane], &r->wait);
    } else {
        leave_lane(q, r);
    }
    r->lane = lane;
    if (!r->resumed)
        enter_lane(q, r);
}

bool queue_before(const struct sched_req *a, const struct sched_req *b)
{
    if (a->pub.priority != b->pub.priority)
        return a->pub.priority < b->pub.priority;
    if (a->resumed != b->resumed)
        return a->resumed;
    if (!a->resumed && a->tenant->served != b->tenant->served)
        return a->tenant->served < b->tenant->served;
    return a->pub.id < b->pub.id;
}

static struct sched_req *lane_best(struct wait_queue *q, enum sched_lane lane)
{
    struct heap *h = &q->tenants[lane];
    while (h->root) {
        struct sched_tenant_lane *l = lane_of(h->root);
        if (l->key == l->tenant->served)
            return LIST_ENTRY(l->waiting.root, struct sched_req, wait);
        heap_remove(h, &l->node);
        insert_lane(q, l, lane);
    }
    return NULL;
}

struct sched_req *queue_best(struct wait_queue *q, bool with_long)
{
    struct sched_req *best = NULL;
    for (int lane = SCHED_SHORT; lane <= (with_long ? SCHED_LONG : SCHED_SHORT); lane++) {
        struct sched_req *r = lane_best(q, (enum sched_lane)lane);
        if (r && (!best || queue_before(r, best)))
            best = r;
        if (!q->resumed[lane].root)
            continue;
        r = LIST_ENTRY(q->resumed[lane].root, struct sched_req, wait);
        if (!best || queue_before(r, best))
            best = r;
    }
    return best;
}
