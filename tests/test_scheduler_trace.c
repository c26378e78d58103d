/* Scripted traces: what happens in, what the scheduler decides out, compared exactly. The files and
 * their language are in tests/data/sched (README.md). A file holds the commands and, after each,
 * the lines it must produce, marked with '>'; the test plays the commands, writes the same kind of
 * file and compares the two.
 *
 *   test_scheduler_trace            runs every trace
 *   test_scheduler_trace FILE       prints what FILE gives now, for writing a new one */
#include "tests/test.h"

#include "core/hash.h"
#include "core/mem.h"
#include "scheduler/scheduler.h"

#include <dirent.h>

enum { MAX_REQS = 64, MAX_FILE = 1 << 16, MAX_LINE = 512, EOS = 1 };

struct named {
    char name[16];
    struct request *req; /* NULL once finished */
    uint64_t id;
    int32_t n_preempted;
    bool nan, eos; /* at its next token */
};

struct trace {
    char out[MAX_FILE];
    size_t len;
    struct named reqs[MAX_REQS];
    int n_reqs;
    struct kv_cache *kv;
    struct sched *sched;
    struct sched_config cfg;
    const struct batch *plan;
    struct batch_token tokens[MAX_REQS];
    struct batch_counts counts[MAX_REQS];
    int64_t now_us;
    int32_t held; /* slot of the outsider, -1: none */
};

static void emit(struct trace *t, const char *fmt, ...) PRINTF_LIKE(2, 3);
static void emit(struct trace *t, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(t->out + t->len, sizeof t->out - t->len, fmt, ap);
    va_end(ap);
    assert_true(n >= 0 && t->len + (size_t)n < sizeof t->out);
    t->len += (size_t)n;
}

static struct named *by_name(struct trace *t, const char *name)
{
    for (int i = t->n_reqs - 1; i >= 0; i--)
        if (strcmp(t->reqs[i].name, name) == 0)
            return &t->reqs[i];
    fail_msg("no request '%s'", name);
    return NULL;
}

static struct named *by_id(struct trace *t, uint64_t id)
{
    for (int i = 0; i < t->n_reqs; i++)
        if (t->reqs[i].id == id)
            return &t->reqs[i];
    fail_msg("no request with id %llu", (unsigned long long)id);
    return NULL;
}

/* The value of key=VALUE in the line, or fallback. */
static int64_t number(const char *line, const char *key, int64_t fallback)
{
    char want[32];
    (void)snprintf(want, sizeof want, " %s=", key);
    const char *at = strstr(line, want);
    return at ? strtoll(at + strlen(want), NULL, 10) : fallback;
}

static void word(const char *line, const char *key, char *out, size_t size)
{
    char want[32];
    (void)snprintf(want, sizeof want, " %s=", key);
    const char *at = strstr(line, want);
    size_t n = at ? strcspn(at + strlen(want), " \n") : 0;
    assert_true(n < size);
    memset(out, 0, size);
    if (at)
        memcpy(out, at + strlen(want), n);
}

/* --- events --- */

static void on_progress(void *ctx, const struct request *r)
{
    (void)ctx;
    (void)r;
}

static void on_token(void *ctx, const struct request *r, const struct batch_token *k)
{
    (void)ctx;
    (void)r;
    (void)k;
}

static void on_finish(void *ctx, const struct request *r)
{
    struct trace *t = ctx;
    struct named *n = r->user;
    emit(t, "> finish %s %s", n->name, req_finish_name(r->finish));
    if (r->err)
        emit(t, " %s", err_name(r->err));
    emit(t, " after %d tokens\n", req_generated(r));
    n->req = NULL;
}

/* --- commands --- */

static void do_config(struct trace *t, const char *line)
{
    const struct sched_events ev = {on_progress, on_token, on_finish, t};
    struct err_msg why = {""};
    t->cfg = (struct sched_config){
        .max_running = (int32_t)number(line, "running", 8),
        .token_budget = (int32_t)number(line, "budget", 512),
        .max_partial_prefills = (int32_t)number(line, "partial", 4),
        .max_long_partial = (int32_t)number(line, "long", 1),
        .long_prefill_tokens = (int32_t)number(line, "long_tokens", 1024),
        .watermark_pages = (int32_t)number(line, "watermark", 0),
        .max_queued = (int32_t)number(line, "queued", 64),
        .max_queued_tokens = number(line, "queued_tokens", 1 << 20),
        .max_tenant_requests = (int32_t)number(line, "tenant_requests", 0),
        .max_model_len = (int32_t)number(line, "len", 1 << 16),
        .share_generated = number(line, "share", 0) != 0,
        .n_eos = 1,
        .eos_ids = {EOS},
    };
    struct kv_cache_config kv = {.n_pages = (int32_t)number(line, "pages", 1024),
                                 .max_seqs = t->cfg.max_running + 1, /* one for `hold` */
                                 .max_pages_per_seq = kv_pages_for(t->cfg.max_model_len),
                                 .prefix_cache = number(line, "prefix", 1) != 0};
    if (kv_cache_create(&t->kv, &kv, &why) < 0 ||
        sched_create(&t->sched, &t->cfg, t->kv, &ev, &why) < 0)
        fail_msg("%s", why.text);
    t->held = -1;
}

/* Tokens: the first `common` of the stream named by `prefix`, the rest the request's own. */
static void fill_prompt(int32_t *prompt, int32_t n, const char *name, const char *prefix)
{
    const char *colon = strchr(prefix, ':');
    int32_t common = colon ? (int32_t)strtol(colon + 1, NULL, 10) : 0;
    uint64_t own = hash_bytes(name, strlen(name), 1);
    uint64_t shared = colon ? hash_bytes(prefix, (size_t)(colon - prefix), 2) : 0;
    for (int32_t i = 0; i < n; i++)
        prompt[i] = 2 + (int32_t)(hash_pair(i < common ? shared : own, (uint64_t)i) % 30000);
}

static void do_submit(struct trace *t, const char *line)
{
    struct named *n = &t->reqs[t->n_reqs++];
    char prefix[32];
    int32_t n_prompt = (int32_t)number(line, "prompt", 1);
    int32_t *prompt = mem_zalloc((size_t)n_prompt, sizeof *prompt);
    struct err_msg why = {""};
    assert_true(t->n_reqs <= MAX_REQS);
    *n = (struct named){.nan = false};
    assert_int_equal(sscanf(line, "submit %15s", n->name), 1);
    word(line, "prefix", prefix, sizeof prefix);
    fill_prompt(prompt, n_prompt, n->name, prefix);
    struct req_params p = {
        .prompt = prompt,
        .n_prompt = n_prompt,
        .max_tokens = (int32_t)number(line, "max", 1),
        .policy_fingerprint = (uint64_t)number(line, "policy", 0),
        .priority = (int32_t)number(line, "priority", 0),
        .deadline_us = number(line, "deadline_ms", 0) * 1000,
        .queue_timeout_us = number(line, "queue_ms", 0) * 1000,
        .user = n,
    };
    word(line, "tenant", p.tenant, sizeof p.tenant);
    word(line, "salt", (char *)p.salt, sizeof p.salt);
    p.n_salt = strlen((char *)p.salt);
    int err = sched_submit(t->sched, &p, t->now_us, &n->req, &why);
    if (err < 0)
        emit(t, "> refuse %s %s: %s\n", n->name, err_name(err), why.text);
    else
        n->id = n->req->id;
    mem_free(prompt);
}

static void show_preemptions(struct trace *t)
{
    for (int i = 0; i < t->n_reqs; i++) {
        struct named *n = &t->reqs[i];
        if (n->req && n->req->n_preempted > n->n_preempted) {
            n->n_preempted = n->req->n_preempted;
            emit(t, "> preempt %s\n", n->name);
        }
    }
}

static void do_plan(struct trace *t)
{
    t->plan = sched_plan(t->sched, t->now_us);
    show_preemptions(t);
    if (!t->plan) {
        emit(t, "> nothing to run\n");
        return;
    }
    emit(t, "> step %llu:", (unsigned long long)t->plan->step_id);
    for (int32_t i = 0; i < t->plan->n_seqs; i++) {
        const struct batch_seq *q = &t->plan->seqs[i];
        emit(t, "%s %s %d..%d%s", i ? "," : "", by_id(t, q->id)->name, q->start,
             q->start + q->n_tokens, q->sample ? "*" : "");
    }
    emit(t, "\n");
}

static void do_run(struct trace *t, int status)
{
    struct batch_result result = {.tokens = t->tokens, .counts = t->counts};
    if (!t->plan)
        return;
    for (int32_t i = 0; i < t->plan->n_seqs; i++) {
        const struct batch_seq *q = &t->plan->seqs[i];
        struct named *n = by_id(t, q->id);
        int32_t last = q->tokens[q->start + q->n_tokens - 1];
        t->tokens[i] = (struct batch_token){.token = -1};
        if (!q->sample)
            continue;
        t->tokens[i].numeric = n->nan;
        if (!n->nan)
            t->tokens[i].token =
                n->eos ? EOS : 2 + (int32_t)(hash_pair(q->id, (uint64_t)last) % 30000);
        n->nan = n->eos = false;
    }
    sched_update(t->sched, status, status < 0 ? NULL : &result, t->now_us);
    t->plan = NULL;
}

static void do_hold(struct trace *t, const char *line)
{
    int32_t n_pages = (int32_t)strtol(line + strlen("hold"), NULL, 10);
    assert_ok(kv_seq_open(t->kv, &t->held));
    assert_ok(kv_seq_reserve(t->kv, t->held, n_pages * KV_PAGE_TOKENS));
}

static void drop_held(struct trace *t)
{
    if (t->held >= 0)
        kv_seq_close(t->kv, t->held);
    t->held = -1;
}

static void do_pages(struct trace *t)
{
    struct kv_cache_stats st;
    kv_cache_get_stats(t->kv, &st);
    emit(t, "> pages: %d free, %d of them cached\n", st.free_pages, st.cached_pages);
}

static void do_stats(struct trace *t)
{
    struct sched_stats st;
    sched_get_stats(t->sched, &st);
    emit(t, "> running %d, waiting %d (%lld tokens), cached %llu of %llu prompt tokens\n",
         st.n_running, st.n_waiting, (long long)st.waiting_tokens,
         (unsigned long long)st.cached_tokens, (unsigned long long)st.prompt_tokens);
}

/* Commands that change something outside the plan; false: not one of them. */
static bool play_event(struct trace *t, const char *line, const char *verb, const char *name)
{
    if (strcmp(verb, "submit") == 0)
        do_submit(t, line);
    else if (strcmp(verb, "cancel") == 0)
        sched_cancel(t->sched, by_name(t, name)->req, REQ_FINISH_CANCELLED, 0);
    else if (strcmp(verb, "nan") == 0)
        by_name(t, name)->nan = true;
    else if (strcmp(verb, "eos") == 0)
        by_name(t, name)->eos = true;
    else if (strcmp(verb, "at") == 0) {
        t->now_us = strtoll(name, NULL, 10) * 1000;
        sched_expire(t->sched, t->now_us);
    } else if (strcmp(verb, "hold") == 0)
        do_hold(t, line);
    else if (strcmp(verb, "drop") == 0)
        drop_held(t);
    else if (strcmp(verb, "drain") == 0)
        sched_drain(t->sched);
    else
        return false;
    return true;
}

static void play_step(struct trace *t, int n)
{
    for (int i = 0; i < n; i++) {
        do_plan(t);
        do_run(t, 0);
    }
}

/* Steps without a word but for what ends and what is preempted. */
static void play_quietly(struct trace *t, int n)
{
    for (int i = 0; i < n; i++) {
        t->plan = sched_plan(t->sched, t->now_us);
        show_preemptions(t);
        do_run(t, 0);
    }
}

static void play(struct trace *t, const char *line)
{
    char verb[16] = "", name[16] = "";
    struct err_msg why = {""};
    if (line[0] == '#' || sscanf(line, "%15s %15s", verb, name) < 1)
        return;
    int count = name[0] ? (int)strtol(name, NULL, 10) : 1;
    if (strcmp(verb, "config") == 0)
        do_config(t, line);
    else if (strcmp(verb, "step") == 0)
        play_step(t, count);
    else if (strcmp(verb, "quietly") == 0)
        play_quietly(t, count);
    else if (strcmp(verb, "plan") == 0)
        do_plan(t);
    else if (strcmp(verb, "run") == 0)
        do_run(t, strcmp(name, "fails") == 0 ? ERR_CUDA : 0);
    else if (strcmp(verb, "pages") == 0)
        do_pages(t);
    else if (strcmp(verb, "stats") == 0)
        do_stats(t);
    else if (!play_event(t, line, verb, name))
        fail_msg("unknown command: %s", line);
    if (sched_check(t->sched, &why) < 0)
        fail_msg("after '%s': %s", line, why.text);
}

/* Plays the commands of `in` and leaves the transcript in t->out. */
static void play_all(struct trace *t, const char *in)
{
    char line[MAX_LINE];
    while (*in) {
        size_t n = strcspn(in, "\n");
        assert_true(n < sizeof line);
        memcpy(line, in, n);
        line[n] = 0;
        in += n + (in[n] == '\n');
        if (line[0] == '>')
            continue;
        emit(t, "%s\n", line);
        play(t, line);
    }
    size_t end = t->len; /* what ends with the trace is not part of it */
    if (t->plan)
        do_run(t, 0);
    drop_held(t);
    sched_destroy(t->sched);
    struct kv_cache_stats st;
    kv_cache_get_stats(t->kv, &st);
    assert_int_equal(st.used_pages, 0);
    kv_cache_destroy(t->kv);
    t->len = end;
    t->out[end] = 0;
}

static char *read_file(const char *path)
{
    char *text = mem_zalloc(MAX_FILE, 1);
    FILE *f = fopen(path, "r");
    if (!f)
        fail_msg("cannot open %s", path);
    size_t n = fread(text, 1, MAX_FILE - 1, f);
    (void)fclose(f);
    assert_true(n > 0);
    return text;
}

static void show_difference(const char *path, const char *want, const char *got)
{
    int line = 1;
    const char *w = want, *g = got;
    for (; *w && *w == *g; w++, g++)
        line += *w == '\n';
    while (w > want && w[-1] != '\n') {
        w--;
        g--;
    }
    fail_msg("%s:%d\n  want: %.*s\n  got:  %.*s", path, line, (int)strcspn(w, "\n"), w,
             (int)strcspn(g, "\n"), g);
}

static void run_trace(const char *path)
{
    char *want = read_file(path);
    struct trace *t = mem_zalloc(1, sizeof *t);
    printf("# %s\n", strrchr(path, '/') + 1);
    play_all(t, want);
    if (strcmp(want, t->out) != 0)
        show_difference(path, want, t->out);
    mem_free(t);
    mem_free(want);
}

static int is_trace(const struct dirent *d)
{
    const char *dot = strrchr(d->d_name, '.');
    return dot && strcmp(dot, ".trace") == 0;
}

static void every_trace(void **state)
{
    struct dirent **found;
    char path[1024];
    (void)state;
    int n = scandir(TEST_DATA "/sched", &found, is_trace, alphasort);
    assert_true(n > 0);
    for (int i = 0; i < n; i++) {
        (void)snprintf(path, sizeof path, "%s/sched/%s", TEST_DATA, found[i]->d_name);
        run_trace(path);
        free(found[i]);
    }
    free(found);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_trace)};
    if (argc == 2) {
        char *in = read_file(argv[1]);
        struct trace *t = mem_zalloc(1, sizeof *t);
        play_all(t, in);
        (void)fputs(t->out, stdout);
        mem_free(t);
        mem_free(in);
        return 0;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
