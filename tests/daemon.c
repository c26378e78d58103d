#include "tests/daemon.h"

#include "tests/test.h"

#include "ipc/client.h"

#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_ARGS = 40, START_SECONDS = 60 };

static void nap_ms(int ms)
{
    struct timespec ts = {ms / 1000, (long)(ms % 1000) * 1000000};
    (void)nanosleep(&ts, NULL);
}

static void run(const struct test_daemon *d, const char *const *extra)
{
    const char *argv[MAX_ARGS] = {"sluiced",  "--model",  TEST_ROOT "/models/needle",
                                  "--listen", d->address, "--log-level",
                                  "warn"};
    int n = 7;
    while (extra && *extra && n < MAX_ARGS - 1)
        argv[n++] = *extra++;
    argv[n] = NULL;
    (void)execv(TEST_BIN "/sluiced", (char *const *)(void *)argv);
    _exit(127);
}

void test_daemon_start(struct test_daemon *d, const char *const *extra)
{
    (void)snprintf(d->dir, sizeof d->dir, "/tmp/sluice-test-XXXXXX");
    assert_non_null(mkdtemp(d->dir));
    (void)snprintf(d->address, sizeof d->address, "unix:%s/s", d->dir);
    d->pid = fork();
    assert_true(d->pid >= 0);
    if (d->pid == 0)
        run(d, extra);
    for (int i = 0; i < START_SECONDS * 20; i++) {
        struct sluice_client *c = NULL;
        int status;
        if (sluice_connect(&c, d->address, NULL, NULL, 0) == 0) {
            sluice_close(c);
            return;
        }
        if (waitpid(d->pid, &status, WNOHANG) == d->pid)
            fail_msg("sluiced ended at start, status %d", status);
        nap_ms(50);
    }
    (void)kill(d->pid, SIGKILL);
    fail_msg("sluiced did not listen within %d s", START_SECONDS);
}

static int exit_code(int status)
{
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

int test_daemon_wait(struct test_daemon *d, int seconds)
{
    int status = 0;
    for (int i = 0; i < seconds * 50; i++) {
        if (waitpid(d->pid, &status, WNOHANG) == d->pid) {
            (void)rmdir(d->dir);
            return exit_code(status);
        }
        nap_ms(20);
    }
    (void)kill(d->pid, SIGKILL);
    (void)waitpid(d->pid, &status, 0);
    fail_msg("sluiced did not end within %d s", seconds);
    return -1;
}

int test_daemon_stop(struct test_daemon *d)
{
    (void)kill(d->pid, SIGTERM);
    return test_daemon_wait(d, 60);
}
