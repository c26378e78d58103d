/* 64 client processes with mixed prompts, policies, cancels and rude departures, and a parent that
 * kills them at random, for SOAK_SECONDS (10; 20 in CI under ASan). Afterwards: every request has
 * had its terminal message, no page is lost, the daemon ends with 0 (under ASan: without a leak).
 */
#include "tests/test.h"

#include "ipc/client.h"
#include "tests/daemon.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { N_CLIENTS = 64, MAX_OPEN = 3, MAX_PROMPT = 1500, CHILD_BROKEN = 3 };

static int64_t now_ms(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static _Noreturn void broken(const char *what, const char *detail)
{
    (void)fprintf(stderr, "client: %s: %s\n", what, detail);
    _exit(CHILD_BROKEN);
}

struct open_request {
    char id[16];
    bool open;
    int64_t n_tokens;
};

static void submit_one(struct sluice_client *c, struct rng *r, struct open_request *q, int index)
{
    static int32_t prompt[MAX_PROMPT];
    struct sluice_request m;
    sluice_request_init(&m);
    int n = rng_unit(r) < 0.1 ? rng_range(r, 600, MAX_PROMPT) : rng_range(r, 1, 300);
    uint64_t family = rng_u64(r) % 4; /* prompts of one family share their prefix */
    struct rng t = {family};
    for (int i = 0; i < n; i++)
        prompt[i] = rng_range(&t, 3, 511);
    (void)snprintf(q->id, sizeof q->id, "r%d", index);
    m.id = q->id;
    m.tokens = prompt;
    m.n_tokens = n;
    m.max_tokens = rng_range(r, 1, 12);
    m.temperature = 0;
    m.stream = rng_unit(r) < 0.7;
    m.logprobs = rng_unit(r) < 0.2 ? 3 : 0;
    m.priority = rng_range(r, 0, 2);
    m.tenant = rng_unit(r) < 0.5 ? "a" : "b";
    m.deadline_ms = rng_unit(r) < 0.05 ? 20 : 0;
    m.sparse = rng_unit(r) < 0.3 ? SLUICE_REL : SLUICE_DENSE;
    m.ln_lambda = -1;
    int err = sluice_submit(c, &m);
    if (err < 0)
        broken("submit", sluice_strerror(err));
    q->open = true;
    q->n_tokens = 0;
}

static struct open_request *find(struct open_request *q, int n, const char *id)
{
    for (int i = 0; i < n; i++) {
        if (q[i].open && strcmp(q[i].id, id) == 0)
            return &q[i];
    }
    return NULL;
}

static void on_event(struct open_request *q, int n, const struct sluice_event *e)
{
    struct open_request *r = find(q, n, e->id);
    if (e->type == SLUICE_REFUSED)
        broken("refused", e->u.error.message);
    if (e->type == SLUICE_GOING_AWAY)
        return;
    if (!r)
        broken("event for a request that has ended or never was", e->id);
    if (e->type == SLUICE_TOKENS) {
        if (e->u.tokens.first != r->n_tokens)
            broken("gap in the tokens", e->id);
        r->n_tokens += e->u.tokens.n;
    }
    if (e->type == SLUICE_DONE && e->u.done.completion_tokens != r->n_tokens)
        broken("tokens missing at DONE", e->id);
    if (e->type == SLUICE_FAILED && e->u.error.code != SLUICE_CODE_QUEUE_FULL)
        broken("failed", e->u.error.message);
    if (sluice_event_is_last(e))
        r->open = false;
}

/* One connection's life: some requests, then patience, a cancel, or a rude departure. */
static void session(const char *address, struct rng *r)
{
    struct sluice_client *c = NULL;
    struct open_request q[MAX_OPEN] = {0};
    char why[200];
    int n = rng_range(r, 1, MAX_OPEN);
    if (sluice_connect(&c, address, NULL, why, sizeof why) < 0)
        broken("connect", why);
    for (int i = 0; i < n; i++)
        submit_one(c, r, &q[i], i);
    bool rude = rng_unit(r) < 0.15;
    if (rng_unit(r) < 0.2)
        (void)sluice_cancel(c, q[0].id);
    for (int events = 0;; events++) {
        struct sluice_event e;
        int left = 0;
        for (int i = 0; i < n; i++)
            left += q[i].open;
        if (left == 0 || (rude && events > 3))
            break;
        int got = sluice_next(c, &e, 120000);
        if (got < 0)
            broken("connection", sluice_error(c));
        if (got == 0)
            broken("no event for two minutes", q[0].id);
        on_event(q, n, &e);
    }
    sluice_close(c);
}

static pid_t start_client(const char *address, uint64_t seed, int64_t end_ms)
{
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    struct rng r = {seed};
    while (now_ms() < end_ms)
        session(address, &r);
    _exit(0);
}

static int64_t stat_of(struct sluice_client *c, const char *name)
{
    const struct sluice_stat *s = NULL;
    int n = sluice_get_stats(c, &s, 10000);
    for (int i = 0; i < n; i++) {
        if (strcmp(s[i].name, name) == 0)
            return s[i].i;
    }
    fail_msg("no stat %s", name);
    return -1;
}

static void check_at_rest(const char *address)
{
    struct sluice_client *c = NULL;
    assert_int_equal(sluice_connect(&c, address, NULL, NULL, 0), 0);
    for (int i = 0; i < 200 && stat_of(c, "connections") > 1;
         i++) /* the last goodbyes are still being read */
        (void)usleep(20000);
    assert_int_equal(stat_of(c, "requests_running"), 0);
    assert_int_equal(stat_of(c, "requests_waiting"), 0);
    assert_int_equal(stat_of(c, "kv_pages_used"), 0);
    assert_int_equal(stat_of(c, "kv_pages_free"), stat_of(c, "kv_pages_total"));
    int64_t ended = stat_of(c, "finished_stop") + stat_of(c, "finished_length") +
                    stat_of(c, "finished_cancelled") + stat_of(c, "finished_deadline") +
                    stat_of(c, "finished_capacity") + stat_of(c, "finished_error");
    int64_t submitted = stat_of(c, "requests_submitted");
    printf("# %lld requests, %lld steps, %lld preemptions, %lld cancelled\n", (long long)submitted,
           (long long)stat_of(c, "steps"), (long long)stat_of(c, "preemptions"),
           (long long)stat_of(c, "finished_cancelled"));
    assert_int_equal(ended, submitted);
    assert_int_equal(stat_of(c, "finished_error"), 0);
    assert_true(submitted > N_CLIENTS);
    sluice_close(c);
}

static void soak(void **state)
{
    const char *env = getenv("SOAK_SECONDS"); // NOLINT(concurrency-mt-unsafe)
    const char *const extra[] = {
        "--kv-pages", "96", "--token-budget", "512", "--max-running", "16", "--max-model-len",
        "2048",       NULL};
    struct test_daemon d;
    struct rng r = test_rng("soak", 21);
    pid_t pids[N_CLIENTS];
    int64_t end = now_ms() + 1000LL * (env ? atoi(env) : 10); // NOLINT(cert-err34-c)
    int killed = 0;
    (void)state;
    test_daemon_start(&d, extra);
    for (int i = 0; i < N_CLIENTS; i++)
        pids[i] = start_client(d.address, rng_u64(&r), end);
    while (now_ms() < end) {
        int i = rng_range(&r, 0, N_CLIENTS - 1), status = 0;
        (void)usleep(50000);
        (void)kill(pids[i], SIGKILL);
        (void)waitpid(pids[i], &status, 0);
        if (WIFEXITED(status) && WEXITSTATUS(status) != 0)
            fail_msg("client %d ended with %d", i, WEXITSTATUS(status));
        pids[i] = start_client(d.address, rng_u64(&r), end);
        killed++;
    }
    for (int i = 0; i < N_CLIENTS; i++) {
        int status = 0;
        (void)waitpid(pids[i], &status, 0);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            fail_msg("client %d ended with status %d", i, status);
    }
    printf("# %d clients killed\n", killed);
    check_at_rest(d.address);
    assert_int_equal(test_daemon_stop(&d), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(soak)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
