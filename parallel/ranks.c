/* See ranks.h. A uv_process_t must not be closed before its child was reaped (libuv would forget
 * the child and leave a zombie), so every end goes: exit callback, close the handle, and the last
 * closed handle frees. */
#define LOG_MODULE "ranks"
#include "parallel/ranks.h"

#include "core/log.h"
#include "core/mem.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>

struct follower {
    uv_process_t process; /* first: the exit callback gets its address */
    struct ranks *owner;
    int rank;
    bool running;
};

struct ranks {
    uv_timer_t timer; /* the grace time of ranks_stop */
    void (*on_exit)(void *ctx, int rank, int status, int signal);
    void *ctx;
    int n_running; /* started and not reaped */
    int n_handles; /* not closed yet, the timer included */
    bool ending;   /* exits are expected */
    bool stopped;  /* ranks_stop was called: free when the last handle has closed */
    int n_followers;
    struct follower followers[];
};

static void on_closed(uv_handle_t *h)
{
    struct ranks *r = h->data;
    if (--r->n_handles == 0)
        mem_free(r);
}

/* The timer stays open until ranks_stop, so r lives at least as long. */
static void close_timer_when_done(struct ranks *r)
{
    if (r->stopped && r->n_running == 0 && !uv_is_closing((uv_handle_t *)&r->timer))
        uv_close((uv_handle_t *)&r->timer, on_closed);
}

static void on_process_exit(uv_process_t *p, int64_t status, int signal_number)
{
    struct follower *f = (struct follower *)p;
    struct ranks *r = f->owner;

    f->running = false;
    r->n_running--;
    uv_close((uv_handle_t *)p, on_closed);
    log_debug("rank=%d pid=%d exit status=%" PRId64 " signal=%d", f->rank, uv_process_get_pid(p),
              status, signal_number);
    if (!r->ending && r->on_exit)
        r->on_exit(r->ctx, f->rank, (int)status, signal_number);
    close_timer_when_done(r);
}

/* argv of a follower: the leader's, then its rank and the memory's name. Texts after argc are
 * allocated. */
static char **follower_argv(const struct ranks_config *cfg, int rank)
{
    char option[PATH_MAX];
    char **argv = mem_zalloc((size_t)cfg->argc + 3, sizeof *argv);
    for (int i = 0; i < cfg->argc; i++)
        argv[i] = cfg->argv[i];
    (void)snprintf(option, sizeof option, "--rank=%d", rank);
    argv[cfg->argc] = mem_strdup(option);
    (void)snprintf(option, sizeof option, "--shm=%s", cfg->shm);
    argv[cfg->argc + 1] = mem_strdup(option);
    return argv;
}

static int spawn(struct ranks *r, const struct ranks_config *cfg, const char *exe, int rank)
{
    struct follower *f = &r->followers[rank - 1];
    uv_stdio_container_t stdio[3] = {
        {.flags = UV_IGNORE},
        {.flags = UV_INHERIT_FD, .data.fd = STDOUT_FILENO},
        {.flags = UV_INHERIT_FD, .data.fd = STDERR_FILENO},
    };
    char **argv = follower_argv(cfg, rank);
    const uv_process_options_t options = {
        .exit_cb = on_process_exit,
        .file = exe,
        .args = argv,
        .stdio_count = 3,
        .stdio = stdio,
    };

    f->owner = r;
    f->rank = rank;
    int err = uv_spawn(cfg->loop, &f->process, &options);
    f->process.data = r;
    r->n_handles++; /* libuv initialises the handle even when it fails: it must be closed */
    if (err == 0) {
        f->running = true;
        r->n_running++;
        log_info("started rank=%d pid=%d", rank, uv_process_get_pid(&f->process));
    } else {
        uv_close((uv_handle_t *)&f->process, on_closed);
    }
    mem_free(argv[cfg->argc]);
    mem_free(argv[cfg->argc + 1]);
    mem_free(argv);
    return err;
}

int ranks_start(struct ranks **out, const struct ranks_config *cfg, struct err_msg *why)
{
    char exe[PATH_MAX];
    size_t len = sizeof exe;

    *out = NULL;
    if (cfg->n_ranks < 1 || !cfg->shm || cfg->argc < 1)
        return err_set(why, ERR_INVALID, "ranks: n_ranks %d, argc %d", cfg->n_ranks, cfg->argc);
    if (!cfg->exe)
        TRY(uv_exepath(exe, &len));
    const char *program = cfg->exe ? cfg->exe : exe;
    int n = cfg->n_ranks - 1;
    struct ranks *r = mem_zalloc(1, sizeof *r + (size_t)n * sizeof r->followers[0]);
    r->on_exit = cfg->on_exit;
    r->ctx = cfg->ctx;
    r->n_followers = n;
    (void)uv_timer_init(cfg->loop, &r->timer);
    r->timer.data = r;
    r->n_handles = 1;
    for (int rank = 1; rank <= n; rank++) {
        int err = spawn(r, cfg, program, rank);
        if (err < 0) {
            ranks_kill(r);
            ranks_stop(r, 0);
            return err_set(why, err, "cannot start rank %d (%s): %s", rank, program, err_str(err));
        }
    }
    *out = r;
    return 0;
}

bool ranks_alive(void *ranks)
{
    const struct ranks *r = ranks;
    for (int i = 0; i < r->n_followers; i++) {
        siginfo_t info = {0};
        int pid = uv_process_get_pid(&r->followers[i].process);
        int err = waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT);
        if ((err < 0 && errno != EINTR) || (err == 0 && info.si_pid != 0))
            return false;
    }
    return true;
}

int ranks_pid(const struct ranks *r, int rank)
{
    if (rank < 1 || rank > r->n_followers || !r->followers[rank - 1].running)
        return 0;
    return uv_process_get_pid(&r->followers[rank - 1].process);
}

void ranks_kill(struct ranks *r)
{
    if (!r)
        return;
    r->ending = true;
    for (int i = 0; i < r->n_followers; i++) {
        if (r->followers[i].running)
            (void)uv_process_kill(&r->followers[i].process, SIGKILL);
    }
}

static void on_grace_over(uv_timer_t *t)
{
    struct ranks *r = t->data;
    log_warn("ranks=%d did not leave in time; killing them", r->n_running);
    ranks_kill(r);
}

void ranks_stop(struct ranks *r, int64_t grace_ms)
{
    if (!r || r->stopped)
        return;
    r->ending = true;
    r->stopped = true;
    if (r->n_running > 0)
        (void)uv_timer_start(&r->timer, on_grace_over, grace_ms > 0 ? (uint64_t)grace_ms : 0, 0);
    close_timer_when_done(r);
}

int ranks_follower_init(struct err_msg *why)
{
    static const int group_signals[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};
    /* When the leader died before this line, comm_shm_create finds nobody and fails in time. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        return err_set(why, -errno, "prctl(PR_SET_PDEATHSIG): %s", err_str(-errno));
    for (size_t i = 0; i < sizeof group_signals / sizeof *group_signals; i++)
        (void)signal(group_signals[i], SIG_IGN);
    return 0;
}
