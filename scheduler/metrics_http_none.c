/* Builds without libmicrohttpd: --metrics is refused. */
#include "scheduler/metrics_http.h"

int metrics_http_start(struct metrics_http **out, uv_loop_t *loop,
                       const struct metrics_http_config *cfg, struct err_msg *why)
{
    (void)out;
    (void)loop;
    return err_set(why, ERR_UNSUPPORTED,
                   "--metrics: %s: this build has no HTTP endpoint (SLUICE_METRICS=OFF)",
                   cfg->address);
}

void metrics_http_close(struct metrics_http *h)
{
    (void)h;
}
