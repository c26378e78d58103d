/* The daemon's counters that the demo reads, by name. A missing name is an error: the demo would
 * report zeros as measurements. */
#ifndef CMD_DEMO_STATS_H
#define CMD_DEMO_STATS_H

#include "core/err.h"
#include "ipc/client.h"

#include <stdint.h>

#define DEMO_STATS(XX)                                                                             \
    XX(kv_pages_total)                                                                             \
    XX(kv_pages_used)                                                                              \
    XX(kv_pages_peak)                                                                              \
    XX(kv_pages_free)                                                                              \
    XX(attention_us)                                                                               \
    XX(gemm_us)                                                                                    \
    XX(step_us)                                                                                    \
    XX(steps)                                                                                      \
    XX(requests_running)                                                                           \
    XX(requests_waiting)                                                                           \
    XX(prompt_tokens)                                                                              \
    XX(cached_tokens)                                                                              \
    XX(generated_tokens)                                                                           \
    XX(pages_reachable)                                                                            \
    XX(pages_visited)                                                                              \
    XX(pages_kept)                                                                                 \
    XX(errors)

struct demo_stats {
#define XX(name) int64_t name;
    DEMO_STATS(XX)
#undef XX
};

/* Asks over c. why names what is missing. */
MUST_CHECK int demo_stats_read(struct demo_stats *out, struct sluice_client *c,
                               struct err_msg *why);

#endif
