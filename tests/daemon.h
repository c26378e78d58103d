/* Starts a real sluiced for end-to-end tests, on a Unix socket in a private folder. */
#ifndef TESTS_DAEMON_H
#define TESTS_DAEMON_H

#include <sys/types.h>

struct test_daemon {
    pid_t pid;
    char dir[64];
    char address[96]; /* unix:DIR/s */
};

/* extra: NULL-terminated further options. Waits until a client can connect (up to a minute); fails
 * the test otherwise. */
void test_daemon_start(struct test_daemon *d, const char *const *extra);
/* SIGTERM, then the exit code; -signal when it was killed. */
int test_daemon_stop(struct test_daemon *d);
/* Waits for an exit that the test caused; at most `seconds`, then SIGKILL and a failed test. */
int test_daemon_wait(struct test_daemon *d, int seconds);

#endif
