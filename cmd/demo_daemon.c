#include "cmd/demo_daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* In the child: only async-signal-safe calls from here to exec. */
_Noreturn static void child(const struct demo_daemon *d, char *const argv[], pid_t parent)
{
    sigset_t none;
    int log = open(d->log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    int null = open("/dev/null", O_RDWR);
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent || log < 0 || null < 0)
        _exit(127);
    (void)setpgid(0, 0); /* a Ctrl-C is for the demo, which then stops the daemon itself */
    (void)dup2(null, STDIN_FILENO);
    (void)dup2(log, STDOUT_FILENO);
    (void)dup2(log, STDERR_FILENO);
    (void)sigemptyset(&none);
    (void)pthread_sigmask(SIG_SETMASK, &none, NULL);
    execv(argv[0], argv);
    static const char text[] = "the program cannot be started\n";
    (void)!write(STDERR_FILENO, text, sizeof text - 1);
    _exit(127);
}

int demo_daemon_start(struct demo_daemon *d, const struct demo_daemon_config *cfg,
                      struct err_msg *why)
{
    char threads[24];
    memset(d, 0, sizeof *d);
    (void)snprintf(d->folder, sizeof d->folder, "/tmp/sluice-demo-XXXXXX");
    if (!mkdtemp(d->folder)) {
        d->folder[0] = '\0';
        return err_set(why, -errno, "cannot make a folder in /tmp: %s", err_str(-errno));
    }
    (void)snprintf(d->address, sizeof d->address, "unix:%s/sluice.sock", d->folder);
    (void)snprintf(d->log, sizeof d->log, "%s/sluiced.log", d->folder);
    (void)snprintf(threads, sizeof threads, "%" PRId64, cfg->threads);
    const char *const args[] = {cfg->program,    "--model",  cfg->model,  "--thresholds",
                                cfg->thresholds, "--listen", d->address,  "--threads",
                                threads,         "--device", cfg->device, NULL};
    if (access(cfg->program, X_OK) < 0)
        return err_set(why, -errno, "cannot run %s: %s", cfg->program, err_str(-errno));
    pid_t parent = getpid();
    d->pid = fork();
    if (d->pid == 0)
        child(d, (char *const *)args, parent);
    if (d->pid < 0) {
        d->pid = 0;
        return err_set(why, -errno, "cannot start a process: %s", err_str(-errno));
    }
    return 0;
}

static int ended(struct demo_daemon *d, int status, struct err_msg *why)
{
    d->pid = 0;
    if (WIFEXITED(status))
        return err_set(why, -ECHILD, "sluiced ended with exit code %d", WEXITSTATUS(status));
    return err_set(why, -ECHILD, "sluiced was ended by signal %d", WTERMSIG(status));
}

int demo_daemon_check(struct demo_daemon *d, struct err_msg *why)
{
    int status;
    if (d->pid && waitpid(d->pid, &status, WNOHANG) == d->pid)
        return ended(d, status, why);
    return d->pid ? 0 : err_set(why, -ECHILD, "sluiced does not run");
}

static void sleep_ms(int64_t ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    (void)nanosleep(&t, NULL);
}

int demo_daemon_stop(struct demo_daemon *d, int64_t limit_ms, struct err_msg *why)
{
    int status = 0;
    TRY(demo_daemon_check(d, why));
    (void)kill(d->pid, SIGTERM);
    for (int64_t waited = 0; waited < limit_ms; waited += 20) {
        if (waitpid(d->pid, &status, WNOHANG) == d->pid) {
            (void)ended(d, status, why);
            return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : -ECHILD;
        }
        sleep_ms(20);
    }
    (void)kill(d->pid, SIGKILL);
    (void)waitpid(d->pid, &status, 0);
    d->pid = 0;
    return err_set(why, -ETIMEDOUT, "sluiced did not end within %" PRId64 " ms of SIGTERM",
                   limit_ms);
}

void demo_daemon_print_log(const struct demo_daemon *d, FILE *to)
{
    char buf[2048];
    FILE *f = fopen(d->log, "re");
    if (!f)
        return;
    (void)fseek(f, 0, SEEK_END);
    long size = ftell(f);
    (void)fseek(f, size > (long)sizeof buf - 1 ? size - (long)sizeof buf + 1 : 0, SEEK_SET);
    size_t n = fread(buf, 1, sizeof buf - 1, f);
    (void)fclose(f);
    buf[n] = '\0';
    (void)fprintf(to, "the end of sluiced's log:\n%s", buf);
}

void demo_daemon_deinit(struct demo_daemon *d)
{
    if (d->pid) {
        (void)kill(d->pid, SIGKILL);
        (void)waitpid(d->pid, NULL, 0);
        d->pid = 0;
    }
    if (!d->folder[0])
        return;
    (void)unlink(d->log);
    (void)unlink(d->address + strlen("unix:"));
    (void)rmdir(d->folder);
    d->folder[0] = '\0';
}
