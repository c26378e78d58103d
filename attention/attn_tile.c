/* Which tables of tile functions this processor can run. Asked of the processor each time: it costs
 * a few loads and needs no state. */
#include "attention/attn_tile.h"

void attn_tile_list(const struct attn_tile_ops *out[ATTN_TILE_TABLES + 1])
{
    int n = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"))
        out[n++] = &attn_tile_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        out[n++] = &attn_tile_avx2;
#endif
    out[n++] = &attn_tile_c;
    out[n] = NULL;
}

const struct attn_tile_ops *attn_tile_best(void)
{
    const struct attn_tile_ops *all[ATTN_TILE_TABLES + 1];
    attn_tile_list(all);
    return all[0];
}
