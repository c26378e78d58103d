/* The daemon as a child process: started, watched, stopped, and never left behind. Its messages go
 * to a file, shown when something is wrong. */
#ifndef CMD_DEMO_DAEMON_H
#define CMD_DEMO_DAEMON_H

#include "core/err.h"

#include <stdio.h>
#include <sys/types.h>

struct demo_daemon {
    pid_t pid;        /* 0: not running */
    char folder[64];  /* temporary; holds socket and log */
    char address[96]; /* unix:... */
    char log[96];
};

struct demo_daemon_config {
    const char *program, *model, *thresholds;
    const char *device;
    int64_t threads; /* 0: the daemon's default */
};

/* Starts the program; it dies with the caller, however that ends. */
MUST_CHECK int demo_daemon_start(struct demo_daemon *d, const struct demo_daemon_config *cfg,
                                 struct err_msg *why);
/* -ECHILD and the reason in why when it has ended, else 0. */
MUST_CHECK int demo_daemon_check(struct demo_daemon *d, struct err_msg *why);
/* SIGTERM, then waits; SIGKILL after limit_ms. 0 when it ended by itself with exit code 0. */
MUST_CHECK int demo_daemon_stop(struct demo_daemon *d, int64_t limit_ms, struct err_msg *why);
/* The last lines of its log. */
void demo_daemon_print_log(const struct demo_daemon *d, FILE *to);
/* Kills what still runs and removes the folder. */
void demo_daemon_deinit(struct demo_daemon *d);

#endif
