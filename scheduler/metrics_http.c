#include "scheduler/metrics_http.h"

#include "core/mem.h"

#include <arpa/inet.h>
#include <errno.h>
#include <microhttpd.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

enum { HTTP_MAX_CLIENTS = 16, HTTP_IDLE_SECONDS = 10 };

struct metrics_http {
    struct MHD_Daemon *daemon;
    uv_poll_t poll;
    uv_timer_t timer; /* when the library asks to run again */
    int open_handles;
    struct metrics_http_config cfg;
};

static enum MHD_Result reply(struct MHD_Connection *c, unsigned status, const char *type,
                             char *body, size_t len)
{
    struct MHD_Response *r = MHD_create_response_from_buffer(len, body, MHD_RESPMEM_MUST_FREE);
    if (!r) {
        free(body);
        return MHD_NO;
    }
    (void)MHD_add_response_header(r, MHD_HTTP_HEADER_CONTENT_TYPE, type);
    enum MHD_Result ok = MHD_queue_response(c, status, r);
    MHD_destroy_response(r);
    return ok;
}

/* The parameters are the library's. */
// NOLINTNEXTLINE(readability-function-size)
static enum MHD_Result answer(void *ctx, struct MHD_Connection *c, const char *url,
                              const char *method, const char *version, const char *data,
                              size_t *n_data, void **state)
{
    struct metrics_http *h = ctx;
    char *body = NULL;
    size_t len = 0;
    unsigned status = MHD_HTTP_OK;
    const char *type = "text/plain; version=0.0.4; charset=utf-8";
    (void)version;
    (void)data;
    (void)state;

    *n_data = 0; /* request bodies are read and ignored */
    FILE *to = open_memstream(&body, &len);
    if (!to)
        return MHD_NO;
    if (strcmp(method, "GET") != 0) {
        status = MHD_HTTP_METHOD_NOT_ALLOWED;
    } else if (strcmp(url, "/metrics") == 0) {
        h->cfg.metrics(h->cfg.ctx, to);
    } else if (strcmp(url, "/health") == 0) {
        type = "application/json";
        if (!h->cfg.healthy(h->cfg.ctx, to))
            status = MHD_HTTP_SERVICE_UNAVAILABLE;
    } else {
        status = MHD_HTTP_NOT_FOUND;
        (void)fputs("try /metrics or /health\n", to);
    }
    if (fclose(to) != 0) {
        free(body);
        return MHD_NO;
    }
    return reply(c, status, type, body, len);
}

static void on_timer(uv_timer_t *timer);

/* The descriptor is edge-triggered inside: the library says when it wants to run again without an
 * event. */
static void run(struct metrics_http *h)
{
    MHD_UNSIGNED_LONG_LONG ms;
    (void)MHD_run(h->daemon);
    if (MHD_get_timeout(h->daemon, &ms) == MHD_YES)
        (void)uv_timer_start(&h->timer, on_timer, ms, 0);
    else
        (void)uv_timer_stop(&h->timer);
}

static void on_readable(uv_poll_t *poll, int status, int events)
{
    (void)status;
    (void)events;
    run(poll->data);
}

static void on_timer(uv_timer_t *timer)
{
    run(timer->data);
}

static void on_closed(uv_handle_t *handle)
{
    struct metrics_http *h = handle->data;
    if (--h->open_handles > 0)
        return;
    MHD_stop_daemon(h->daemon);
    mem_free(h);
}

static int parse_address(const char *text, struct sockaddr_in *out, struct err_msg *why)
{
    char host[64];
    const char *colon = strrchr(text, ':');
    if (!colon || colon == text || (size_t)(colon - text) >= sizeof host)
        return err_set(why, ERR_CONFIG, "--metrics: '%s' is not HOST:PORT", text);
    memcpy(host, text, (size_t)(colon - text));
    host[colon - text] = '\0';
    char *end;
    long port = strtol(colon + 1, &end, 10);
    if (*end || end == colon + 1 || port < 1 || port > 65535)
        return err_set(why, ERR_CONFIG, "--metrics: '%s' is not a port", colon + 1);
    memset(out, 0, sizeof *out);
    out->sin_family = AF_INET;
    out->sin_port = htons((uint16_t)port);
    if (inet_pton(AF_INET, strcmp(host, "localhost") == 0 ? "127.0.0.1" : host, &out->sin_addr) !=
        1)
        return err_set(why, ERR_CONFIG, "--metrics: '%s' is not an IPv4 address or localhost",
                       host);
    return 0;
}

int metrics_http_start(struct metrics_http **out, uv_loop_t *loop,
                       const struct metrics_http_config *cfg, struct err_msg *why)
{
    struct sockaddr_in addr;
    TRY(parse_address(cfg->address, &addr, why));
    struct metrics_http *h = mem_zalloc(1, sizeof *h);
    h->cfg = *cfg;
    errno = 0;
    h->daemon = MHD_start_daemon(MHD_USE_EPOLL, 0, NULL, NULL, answer, h, MHD_OPTION_SOCK_ADDR,
                                 &addr, MHD_OPTION_CONNECTION_LIMIT, (unsigned)HTTP_MAX_CLIENTS,
                                 MHD_OPTION_CONNECTION_TIMEOUT, (unsigned)HTTP_IDLE_SECONDS,
                                 MHD_OPTION_END);
    if (!h->daemon) {
        int err = errno ? -errno : ERR_INTERNAL;
        mem_free(h);
        return err_set(why, err, "--metrics: cannot listen on %s: %s", cfg->address, err_str(err));
    }
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(h->daemon, MHD_DAEMON_INFO_EPOLL_FD);
    int err = info ? uv_poll_init(loop, &h->poll, info->epoll_fd) : ERR_INTERNAL;
    if (err < 0) {
        MHD_stop_daemon(h->daemon);
        mem_free(h);
        return err_set(why, err, "--metrics: %s", err_str(err));
    }
    (void)uv_timer_init(loop, &h->timer);
    h->poll.data = h->timer.data = h;
    h->open_handles = 2;
    (void)uv_poll_start(&h->poll, UV_READABLE, on_readable);
    *out = h;
    return 0;
}

void metrics_http_close(struct metrics_http *h)
{
    if (!h)
        return;
    uv_close((uv_handle_t *)&h->poll, on_closed);
    uv_close((uv_handle_t *)&h->timer, on_closed);
}
