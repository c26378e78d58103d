#include "cmd/demo_stats.h"

#include <stddef.h>
#include <string.h>

static const struct {
    const char *name;
    size_t offset;
} names[] = {
#define XX(name) {#name, offsetof(struct demo_stats, name)},
    DEMO_STATS(XX)
#undef XX
};

int demo_stats_read(struct demo_stats *out, struct sluice_client *c, struct err_msg *why)
{
    const struct sluice_stat *stats;
    int n = sluice_get_stats(c, &stats, 10000);
    if (n < 0)
        return err_set(why, n, "STATS: %s", sluice_error(c));
    for (size_t k = 0; k < sizeof names / sizeof names[0]; k++) {
        int i = 0;
        while (i < n && strcmp(stats[i].name, names[k].name) != 0)
            i++;
        if (i == n)
            return err_set(why, ERR_PROTOCOL, "STATS has no '%s'", names[k].name);
        *(int64_t *)((char *)out + names[k].offset) =
            stats[i].is_int ? stats[i].i : (int64_t)stats[i].d;
    }
    return 0;
}
