/* The optional Prometheus endpoint: GET /metrics and GET /health over HTTP/1.1 (libmicrohttpd),
 * served on the libuv loop through the library's epoll descriptor, so that no second thread ever
 * sees the engine. */
#ifndef SCHEDULER_METRICS_HTTP_H
#define SCHEDULER_METRICS_HTTP_H

#include "core/err.h"

#include <stdbool.h>
#include <stdio.h>
#include <uv.h>

struct metrics_http;

struct metrics_http_config {
    const char *address; /* HOST:PORT; HOST is an IPv4 address or "localhost" */
    void (*metrics)(void *ctx, FILE *to);
    bool (*healthy)(void *ctx, FILE *to); /* writes a one-line JSON body; false: 503 */
    void *ctx;
};

/* ERR_UNSUPPORTED where the build has no libmicrohttpd (SLUICE_METRICS=OFF). */
MUST_CHECK int metrics_http_start(struct metrics_http **out, uv_loop_t *loop,
                                  const struct metrics_http_config *cfg, struct err_msg *why);
/* Stops listening; memory goes once the loop has closed the handles. Accepts NULL. */
void metrics_http_close(struct metrics_http *h);

#endif
