/* What the steps of the Hopper decode kernel share: the PTX instruction it alone uses, the
 * shared-memory layout, the rows of a piece, and the feed of pages. See attn_decode_sm90.cu. */
#ifndef ATTENTION_ATTN_DECODE_SM90_CUH
#define ATTENTION_ATTN_DECODE_SM90_CUH

#include "attention/attn_decode_sm90.h"
#include "attention/ptx.cuh"
#include "core/ring.cuh"

#define DEC_LOG2E 1.4426950408889634f
#define DEC_LN2   0.6931471805599453f
#define DEC_ALL   0xffffffffu

enum {
    DEC_PAGE = 64,
    DEC_THREADS = 32 * DEC_WARPS,
    DEC_MERGE = 20, /* parts of a task whose loads are in flight together */
    DEC_STEPS = 4   /* ring of the running maxima that warps show each other; two steps are open */
};

/* ---- instructions ---- */

/* ldsm_x4 with each matrix transposed. */
__device__ __forceinline__ void ldsm_trans_x4(uint32_t (&r)[4], uint32_t from)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}

/* ---- shared memory ---- */

/* Every warp has rings of its own; the accumulators of a piece are merged through the V rings. */
template <int D>
struct dec_layout {
    static constexpr int slots = D == 128 ? 1 : 2; /* of K and of V, a warp */
    static constexpr int tile_bytes = DEC_PAGE * D * 2;
    static constexpr int half_bytes = DEC_PAGE * 128;
    static constexpr int o_stride = D + 8; /* floats; the 8 keep rows off each other's banks */
    static constexpr int k = 0;
    static constexpr int v = k + DEC_WARPS * slots * tile_bytes;
    static constexpr int state = v + DEC_WARPS * slots * tile_bytes; /* float2 [warp][row] */
    static constexpr int k_full = state + DEC_WARPS * DEC_ROWS * 8;
    static constexpr int v_full = k_full + 8 * DEC_WARPS * slots;
    static constexpr int tops = v_full + 8 * DEC_WARPS * slots; /* float [step % 4][warp][row] */
    static constexpr int tops_full = tops + DEC_STEPS * DEC_WARPS * DEC_ROWS * 4;
    static constexpr int last = tops_full + 8 * DEC_STEPS; /* whether this block merges the parts */
    static constexpr int share = last + 4;                 /* the next one */
    static constexpr int bytes = share + 4;
};
static_assert(dec_layout<128>::o_stride * 4 * DEC_ROWS <= dec_layout<128>::tile_bytes, "");
static_assert(dec_layout<64>::o_stride * 4 * DEC_ROWS <= dec_layout<64>::tile_bytes, "");
static_assert(DEC_BLOCKS * (dec_layout<128>::bytes + 1024) <= 228 * 1024, "");
static_assert(DEC_BLOCKS * (dec_layout<64>::bytes + 1024) <= 228 * 1024, "");
static_assert(sizeof(struct dec_piece) == 64, "");

/* ---- pages ---- */

__device__ __forceinline__ int dec_page(int i, int last, int n_run, int sink)
{
    return i < n_run ? last - i : sink - 1 - (i - n_run);
}

/* Plan and page ids are read again by the next layer: they shall outlive the weights in between in
 * the L2 cache. */
__device__ __forceinline__ int load_kept(const int32_t *from)
{
    int x;
    asm volatile("ld.global.L2::cache_hint.b32 %0, [%1], %2;"
                 : "=r"(x)
                 : "l"(from), "l"(L2_EVICT_LAST));
    return x;
}

/* In four loads of 16 bytes. */
__device__ __forceinline__ struct dec_piece piece_load(const struct dec_piece *from)
{
    struct dec_piece p;
#pragma unroll
    for (int i = 0; i < (int)(sizeof p / sizeof(int4)); i++) {
        int4 x;
        asm volatile("ld.global.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "l"((const int4 *)from + i), "l"(L2_EVICT_LAST));
        memcpy((char *)&p + i * sizeof x, &x, sizeof x);
    }
    return p;
}

__device__ __forceinline__ void prefetch_l2(const void *p)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/* The pages of a warp over all pieces of the share, in order: runs ahead of the computation.
 * Each lane holds one of the next 32 page ids. */
struct dec_feed {
    const struct dec_piece *next, *end;
    const int32_t *pages;
    int kv_head, last, n_run, sink;
    int at, stop; /* walk positions */
    int ids, used;
};

/* Where this lane's page id lies among the next 32 of the warp, or NULL behind the end. */
__device__ __forceinline__ const int32_t *feed_id(const int32_t *pages, int at, int stop, int last,
                                                  int n_run, int sink, int lane)
{
    const int i = at + lane * DEC_WARPS;
    return i < stop ? pages + dec_page(i, last, n_run, sink) : NULL;
}

__device__ __forceinline__ void feed_refill(struct dec_feed &f, int lane)
{
    const int32_t *from = feed_id(f.pages, f.at, f.stop, f.last, f.n_run, f.sink, lane);
    f.ids = from ? load_kept(from) : 0;
    f.used = 0;
}

/* Brings the ids of the next piece near: reading piece and ids in turn would cost two trips to
 * device memory between pieces. */
__device__ __forceinline__ void feed_prefetch(const struct dec_feed &f, int warp, int lane)
{
    if (f.next == f.end)
        return;
    const struct dec_piece p = piece_load(f.next);
    const int32_t *from = feed_id(p.pages, p.begin + warp, p.end, p.last, p.n_run, p.sink, lane);
    if (from)
        prefetch_l2(from);
}

/* The next (page, head) tile of the pool, or -1 after the last. */
__device__ __forceinline__ int feed_tile(struct dec_feed &f, int n_kv_heads, int warp, int lane)
{
    while (f.at >= f.stop) {
        if (f.next == f.end)
            return -1;
        const struct dec_piece p = piece_load(f.next++);
        f.pages = p.pages;
        f.kv_head = p.kv_head;
        f.last = p.last, f.n_run = p.n_run, f.sink = p.sink;
        f.at = p.begin + warp, f.stop = p.end;
        f.used = 32;
        if (f.next != f.end)
            prefetch_l2(f.next);
    }
    if (f.used == 32)
        feed_refill(f, lane);
    else if (f.used == 1)
        feed_prefetch(f, warp, lane);
    int id = __shfl_sync(DEC_ALL, f.ids, f.used++);
    f.at += DEC_WARPS;
    return id * n_kv_heads + f.kv_head;
}

/* ---- rows ---- */

/* What a lane knows about its rows g and g + 8 of a piece. */
struct dec_rows {
    int n;         /* rows of the piece */
    int first_pos; /* of the oldest and newest token */
    int last_pos;
    int q_row[2], head[2];
    int limit[2];     /* absolute position of the row's token; -1: no such row */
    int sink[2];      /* visits pages [0, sink) */
    int near[2];      /* and [near, ...) */
    float gate[2];    /* ABS: T; REL: ln(lambda) */
    unsigned seen[2]; /* pages visited and kept, for the counters */
    unsigned kept[2];
};

__device__ __forceinline__ bool row_visits(const struct dec_rows &r, int i, int page)
{
    return page * DEC_PAGE <= r.limit[i] && (page < r.sink[i] || page >= r.near[i]);
}

template <int GATE>
__device__ __forceinline__ struct dec_rows rows_make(const struct dec_args &a,
                                                     const struct dec_piece &p, int lane)
{
    struct dec_rows r;
    const int group = a.n_heads / a.n_kv_heads, first = p.tile * DEC_ROWS;
    r.n = min((int)DEC_ROWS, p.n_rows * group - first);
    r.first_pos = p.pos + first / group;
    r.last_pos = p.pos + (first + r.n - 1) / group;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane / 4 + 8 * i, token = (first + row) / group;
        const bool valid = row < r.n;
        r.head[i] = p.kv_head * group + (first + row) % group;
        r.q_row[i] = p.row + token;
        r.limit[i] = valid ? p.pos + token : -1;
        r.sink[i] = r.near[i] = 0;
        if (a.visit && valid && a.visit[r.head[i]].local >= 0) {
            r.sink[i] = a.visit[r.head[i]].sink;
            r.near[i] = max(0, (p.pos + token) / 128 * 2 - a.visit[r.head[i]].local);
        }
        r.gate[i] = -INFINITY;
        if (GATE == SM90_GATE_REL)
            r.gate[i] = a.seqs[p.seq].ln_lambda;
        if (GATE == SM90_GATE_ABS && valid && a.seqs[p.seq].t)
            r.gate[i] = a.seqs[p.seq].t[a.t_layer + r.head[i] * a.t_blocks +
                                        min((p.pos + token) / 128, a.t_blocks - 1)];
        r.seen[i] = r.kept[i] = 0;
    }
    return r;
}

#endif
