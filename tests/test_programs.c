/* `sluice` and `sluice-demo` as processes, against a daemon without a model (fake_daemon.c):
 * output, exit codes, and that the demo notices everything that can go wrong. */
#include "tests/test.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SLUICE TEST_BIN "/sluice"
#define DEMO   TEST_BIN "/sluice-demo"
#define FAKE   TEST_BIN "/fake_daemon"

enum { MAX_ARGS = 48 };

struct result {
    int code; /* exit code, or -signal */
    char out[65536], err[16384];
};

struct daemon {
    pid_t pid;
    char folder[64], address[96];
};

static void read_file(int fd, char *out, size_t cap)
{
    (void)lseek(fd, 0, SEEK_SET);
    ssize_t n = read(fd, out, cap - 1);
    out[n > 0 ? n : 0] = '\0';
    (void)close(fd);
}

static int temp_fd(void)
{
    char path[] = "/tmp/sluice-test-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)unlink(path);
    return fd;
}

/* Runs a program to its end; words are separated by blanks, %s is the daemon's address. */
static struct result *run(const struct daemon *d, const char *program, const char *words)
{
    static struct result r;
    char text[1024], *save = NULL, *argv[MAX_ARGS] = {(char *)program};
    int out = temp_fd(), err = temp_fd(), status, n = 1;
    (void)snprintf(text, sizeof text, "%s", words);
    for (char *w = strtok_r(text, " ", &save); w && n < MAX_ARGS - 1;
         w = strtok_r(NULL, " ", &save))
        argv[n++] = d && strcmp(w, "%s") == 0 ? (char *)d->address : w;
    pid_t pid = fork();
    if (pid == 0) {
        (void)dup2(out, STDOUT_FILENO);
        (void)dup2(err, STDERR_FILENO);
        execv(program, argv);
        _exit(126);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    r.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    read_file(out, r.out, sizeof r.out);
    read_file(err, r.err, sizeof r.err);
    return &r;
}

static void expect(const struct result *r, int code, const char *in_out, const char *in_err)
{
    if (r->code != code || (in_out && !strstr(r->out, in_out)) ||
        (in_err && !strstr(r->err, in_err)))
        fail_msg("exit %d, want %d with '%s' and '%s'\nstdout: %s\nstderr: %s", r->code, code,
                 in_out ? in_out : "", in_err ? in_err : "", r->out, r->err);
}

static void daemon_start(struct daemon *d, const char *fault)
{
    struct stat st;
    memset(d, 0, sizeof *d);
    (void)snprintf(d->folder, sizeof d->folder, "/tmp/sluice-test-XXXXXX");
    assert_non_null(mkdtemp(d->folder));
    (void)snprintf(d->address, sizeof d->address, "unix:%s/s", d->folder);
    d->pid = fork();
    if (d->pid == 0) {
        int quiet = open("/dev/null", O_WRONLY);
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* a failing test leaves none behind */
        (void)dup2(quiet, STDERR_FILENO);
        if (fault)
            (void)setenv("FAKE_FAULT", fault, 1); // NOLINT(concurrency-mt-unsafe)
        execl(FAKE, FAKE, "--listen", d->address, (char *)NULL);
        _exit(126);
    }
    for (int i = 0; i < 500 && stat(d->address + 5, &st) < 0; i++)
        (void)nanosleep(&(struct timespec){0, 10000000}, NULL);
}

/* Waits for its end and returns its exit code. */
static int daemon_wait(struct daemon *d)
{
    int status = 0;
    assert_int_equal(waitpid(d->pid, &status, 0), d->pid);
    (void)unlink(d->address + 5);
    (void)rmdir(d->folder);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int daemon_stop(struct daemon *d)
{
    (void)kill(d->pid, SIGTERM);
    return daemon_wait(d);
}

static json_t *json_of(const struct result *r)
{
    json_error_t at;
    json_t *j = json_loads(r->out, 0, &at);
    if (!j)
        fail_msg("not one JSON object: %s\n%s\n%s", at.text, r->out, r->err);
    return j;
}

static void generate_prints_what_came(void **state)
{
    (void)state;
    struct daemon d;
    daemon_start(&d, NULL);
    struct result *r = run(&d, SLUICE,
                           "generate --connect %s --tokens 7,8,9 --max-tokens 5 --temperature 0 "
                           "--seed 1 --ignore-eos --logprobs 2 --sparse dense --json");
    expect(r, 0, NULL, NULL);
    json_t *j = json_of(r);
    int t[5], top[2], prompt;
    double lp, v[2], density;
    const char *reason;
    assert_int_equal(
        json_unpack(j, "{s:[iiiii], s:[{s:F, s:[[iF],[iF]]},{},{},{},{}], s:s, s:{s:i}, s:F}",
                    "tokens", &t[0], &t[1], &t[2], &t[3], &t[4], "logprobs", "logprob", &lp, "top",
                    &top[0], &v[0], &top[1], &v[1], "finish_reason", &reason, "usage",
                    "prompt_tokens", &prompt, "density", &density),
        0);
    assert_int_equal(t[4], 8);
    assert_int_equal(top[1], 8);
    assert_close(v[1], -1.25, 1e-6, 0);
    assert_string_equal(reason, "length");
    assert_int_equal(prompt, 3);
    assert_close(density, 1, 0, 0);
    json_decref(j);
    expect(run(&d, SLUICE, "generate --connect %s --tokens 7,8,9 --max-tokens 5 --sparse k=32"), 0,
           "7 8 9 7 8\n", "density 0.");
    assert_int_equal(daemon_stop(&d), 0);
}

static void generate_tells_what_is_wrong(void **state)
{
    (void)state;
    static const struct {
        int code;
        const char *words, *out, *err;
    } cases[] = {
        {2, "generate --connect %s", NULL, "--tokens"},
        {2, "generate --connect %s --tokens 1,b", NULL, "number 2"},
        {2, "generate --connect %s --tokens 1 --sparse k=0", NULL, "'k=0'"},
        {2, "generate --connect %s --tokens 1 --temperature nan", NULL, "temperature"},
        {2, "generate --connect %s --tokens 1 --nosuch 2", NULL, "--nosuch"},
        {2, "generate --connect %s --tokens 1 --max-tokens 9999999999", NULL, "max-tokens"},
        {2, "generate --connect %s --tokens @/nonexistent", NULL, "/nonexistent"},
        {2, "nosuch", NULL, "nosuch"},
        {1, "generate --connect %s --tokens 1 --max-tokens -1", NULL, "max_tokens"},
        {1, "generate --connect %s --tokens 1 --temperature -1", NULL, "temperature"},
        {1, "generate --connect %s --tokens 1 --top-p 2", NULL, "top_p"},
        {1, "generate --connect %s --tokens 1 --min-p -0.5", NULL, "min_p"},
        {1, "generate --connect %s --tokens 1 --logprobs 99", NULL, "logprobs"},
        {1, "generate --connect %s --tokens 1,-5", NULL, "token"},
        {1, "generate --connect %s --tokens 1,512", NULL, "token"},
        {3, "generate --connect unix:/nonexistent/s --tokens 1", NULL, "/nonexistent/s"},
        {3, "stats --connect tcp:127.0.0.1:1", NULL, "127.0.0.1"},
    };
    struct daemon d;
    daemon_start(&d, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        expect(run(&d, SLUICE, cases[i].words), cases[i].code, cases[i].out, cases[i].err);
    expect(run(&d, SLUICE, "health --connect %s"), 0, "serving", NULL);
    assert_int_equal(daemon_stop(&d), 0);
}

static void expect_error(struct result *r, const char *code)
{
    const char *got;
    expect(r, 1, NULL, code);
    json_t *j = json_of(r);
    assert_int_equal(json_unpack(j, "{s:{s:s}}", "error", "code", &got), 0);
    assert_string_equal(got, code);
    json_decref(j);
}

static void failures_are_json_too(void **state)
{
    (void)state;
    struct daemon d;
    daemon_start(&d, "numeric");
    expect_error(run(&d, SLUICE, "generate --connect %s --tokens 7 --json"), "NUMERIC");
    expect_error(run(&d, SLUICE, "generate --connect %s --tokens 7 --top-p 2 --json"),
                 "INVALID_ARGUMENT");
    expect_error(run(&d, SLUICE, "generate --connect %s --tokens 512 --json"), "INVALID_ARGUMENT");
    assert_int_equal(daemon_stop(&d), 0);
}

static void admin_commands(void **state)
{
    (void)state;
    struct daemon d;
    int64_t total;
    int ready;
    daemon_start(&d, NULL);
    expect(run(&d, SLUICE, "stats --connect %s"), 0, "kv_pages_total               4096", NULL);
    struct result *r = run(&d, SLUICE, "stats --connect %s --json");
    json_t *j = json_of(r);
    json_int_t value;
    assert_int_equal(json_unpack(j, "{s:I}", "kv_pages_total", &value), 0);
    total = value;
    assert_int_equal(total, 4096);
    json_decref(j);
    j = json_of(run(&d, SLUICE, "health --connect %s --json"));
    assert_int_equal(json_unpack(j, "{s:b}", "ready", &ready), 0);
    assert_true(ready);
    json_decref(j);
    expect(run(&d, SLUICE, "reset-prefix-cache --connect %s"), 0, "emptied", NULL);
    expect(run(&d, SLUICE, "drain --connect %s --wait"), 0, "drained", NULL);
    assert_int_equal(daemon_wait(&d), 0);
    expect(run(&d, SLUICE, "health --connect %s"), 3, NULL, d.address);
    expect(run(&d, SLUICE, "--help"), 0, "bench", NULL);
    expect(run(&d, SLUICE, "--help-markdown"), 0, "| `--request-rate X` | inf |", NULL);
    expect(run(&d, SLUICE, "--version"), 0, "sluice ", NULL);
}

static void bench_measures(void **state)
{
    (void)state;
    struct daemon d;
    int completed, failed, input, output;
    daemon_start(&d, NULL);
    struct result *r = run(&d, SLUICE,
                           "bench --connect %s --num-prompts 30 --input-len 300 --output-len 6 "
                           "--range-ratio 0.5 --request-rate 300 --burstiness 0.5 "
                           "--max-concurrency 7 --connections 3 --num-warmups 2 --sparse rel=0.9 "
                           "--goodput ttft:10000 --json -");
    expect(r, 0, NULL, NULL);
    json_t *j = json_of(r);
    double ttft, goodput, density, rate;
    assert_int_equal(json_unpack(j, "{s:i, s:i, s:i, s:i, s:F, s:F, s:F, s:F}", "completed",
                                 &completed, "failed", &failed, "total_input_tokens", &input,
                                 "total_output_tokens", &output, "mean_ttft_ms", &ttft,
                                 "request_goodput", &goodput, "density", &density,
                                 "request_throughput", &rate),
                     0);
    assert_int_equal(completed, 30);
    assert_int_equal(failed, 0);
    assert_true(input > 30 * 150 && input < 30 * 450 && output >= 30 * 3 && output <= 30 * 9);
    assert_true(ttft > 1 && goodput > 0);
    assert_close(goodput, rate, 1e-9, 0);
    assert_close(density, 0.4, 0.05, 0);
    assert_true(json_integer_value(json_object_get(j, "max_concurrent_requests")) <= 7);
    json_decref(j);
    expect(run(&d, SLUICE, "bench --connect %s --num-prompts 3 --input-len 10 --output-len 2"), 0,
           "Successful requests:                     3", NULL);
    /* A request the daemon refuses is a failed one, and the run's exit code says so. */
    expect(run(&d, SLUICE, "bench --connect %s --num-prompts 3 --input-len 30000 --output-len 2"),
           1, "Failed requests:                         3", "PROMPT_TOO_LONG");
    expect(run(&d, SLUICE, "bench --connect %s --request-rate 0"), 2, NULL, "request-rate");
    assert_int_equal(daemon_stop(&d), 0);
}

static void bench_survives_a_dying_daemon(void **state)
{
    (void)state;
    struct daemon d;
    daemon_start(&d, "die");
    expect(run(&d, SLUICE,
               "bench --connect %s --num-prompts 9 --input-len 9000 --output-len 2 "
               "--max-concurrency 2 --connections 2"),
           1, "Failed requests:                         9", "connection");
    (void)daemon_stop(&d);
}

static void bench_replays_a_trace(void **state)
{
    (void)state;
    char path[] = "/tmp/sluice-test-XXXXXX", words[256];
    static const char text[] =
        "{\"timestamp\":0,\"input_length\":600,\"output_length\":2,\"hash_ids\":[1,2]}\n"
        "{\"timestamp\":30,\"input_length\":700,\"output_length\":3,\"hash_ids\":[1,3]}\n";
    int fd = mkstemp(path);
    assert_int_equal(write(fd, text, sizeof text - 1), (ssize_t)(sizeof text - 1));
    (void)close(fd);
    struct daemon d;
    daemon_start(&d, NULL);
    (void)snprintf(words, sizeof words, "bench --connect %%s --trace %s", path);
    expect(run(&d, SLUICE, words), 0, "Total input tokens:                      1300", NULL);
    assert_int_equal(daemon_stop(&d), 0);
    (void)unlink(path);
}

/* Six prompts: fake_daemon has the seventh it knows in its cache. */
#define EVAL                                                                                       \
    "--seed 3 --tasks vt --lengths 512 --samples 6 --tokens " TEST_ROOT "/models/needle/"          \
    "tokens.json"

/* The row of a policy in what `eval --json -` printed. */
static json_t *eval_row(const json_t *report, const char *policy)
{
    json_t *row, *found = NULL;
    size_t i;
    json_array_foreach(json_object_get(report, "rows"), i, row)
    {
        if (strcmp(json_string_value(json_object_get(row, "policy")), policy) == 0)
            found = row;
    }
    assert_non_null(found);
    return found;
}

static void expect_row(const json_t *report, const char *policy, double score, double change,
                       double density)
{
    double got[3], low, high, attention, ttft;
    int n, failed, cached;
    json_t *row = eval_row(report, policy);
    assert_int_equal(json_unpack(row, "{s:F, s:F, s:F, s:[FF], s:i, s:i, s:i, s:F, s:F}", "score",
                                 &got[0], "change", &got[1], "density", &got[2], "change_interval",
                                 &low, &high, "n", &n, "failed", &failed, "cached_tokens", &cached,
                                 "attention_ms", &attention, "ttft_ms", &ttft),
                     0);
    assert_close(got[0], score, 1e-9, 0);
    assert_close(got[1], change, 1e-9, 0);
    assert_close(got[2], density, 0.02, 0);
    assert_true(low <= change && change <= high && low >= -1 && high <= 1);
    assert_int_equal(n, 6);
    assert_int_equal(failed, 0);
    assert_int_equal(cached, 0);
    assert_true(attention > 0 && ttft > 1);
}

/* A daemon that knows the prompts' answers gives all of them, or under a gate none. */
static void eval_compares_policies(void **state)
{
    (void)state;
    static const char words[] = "eval --connect %s " EVAL " --policy auto,abs:32,rel:-0.1/64 "
                                "--concurrency 3 --round 5 --json -";
    char path[] = "/tmp/sluice-test-XXXXXX", print[512];
    struct daemon d;
    (void)close(mkstemp(path));
    (void)snprintf(print, sizeof print, "eval " EVAL " --samples 8 --print %s", path);
    expect(run(NULL, SLUICE, print), 0, NULL, NULL);
    (void)setenv("FAKE_PROMPTS", path, 1); // NOLINT(concurrency-mt-unsafe)
    for (int wrong = 0; wrong < 2; wrong++) {
        daemon_start(&d, wrong ? "sparse" : NULL);
        struct result *r = run(&d, SLUICE, words);
        expect(r, 0, "\"disturbed\": false", NULL);
        assert_null(strchr(r->err, '\r')); /* quiet in a pipe */
        json_t *j = json_of(r);
        expect_row(j, "dense", 1, 0, 1);
        expect_row(j, "auto", !wrong, -wrong, 1.0 / 3);
        expect_row(j, "abs:32", !wrong, -wrong, 1.0 / 3);
        expect_row(j, "rel:-0.1/64", !wrong, -wrong, 1.0 / 3);
        json_decref(j);
        assert_int_equal(daemon_stop(&d), 0);
    }
    (void)unlink(path);
    // NOLINTNEXTLINE(concurrency-mt-unsafe)
    (void)setenv("FAKE_PROMPTS", TEST_ROOT "/models/needle/prompts.jsonl", 1);
}

static void eval_writes_answers_and_a_table(void **state)
{
    (void)state;
    char path[] = "/tmp/sluice-test-XXXXXX", words[512], line[4096];
    struct daemon d;
    int lines = 0;
    daemon_start(&d, NULL);
    (void)close(mkstemp(path));
    (void)snprintf(words, sizeof words,
                   "eval --connect %%s " EVAL " --tasks niah_single_1,cwe --samples 3 --out %s",
                   path);
    struct result *r = run(&d, SLUICE, words);
    static const char *const parts[] = {
        "512 tokens", "niah_single_1\n  dense", "cwe\n  dense", "  auto ", "all\n", "1.00x"};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        expect(r, 0, parts[i], NULL);
    FILE *f = fopen(path, "re");
    assert_non_null(f);
    for (; fgets(line, sizeof line, f); lines++) {
        json_t *o = json_loads(line, 0, NULL);
        assert_true(json_array_size(json_object_get(o, "answer")) > 0);
        json_decref(o);
    }
    (void)fclose(f);
    (void)unlink(path);
    assert_int_equal(lines, 2 * 3 * 2);
    expect(run(&d, SLUICE, "eval --connect %s " EVAL " --round 1 --limit 1ms"), 0,
           "Ended by --limit", NULL);
    assert_int_equal(daemon_stop(&d), 0);
}

static void eval_tells_what_is_wrong(void **state)
{
    (void)state;
    static const struct {
        int code;
        const char *words, *err;
    } cases[] = {
        {2, "--tasks vt,nosuch", "'nosuch' is not a task"},
        {2, "--tasks ,", "--tasks"},
        {2, "--lengths 511", "511"},
        {2, "--lengths 2048k", "2097152"},
        {2, "--lengths x", "'x' is not a length"},
        {2, "--lengths ,", "--lengths"},
        {2, "--policy abs:0", "--policy: 'abs:0'"},
        {2, "--policy abs:8,abs:8", "comes twice"},
        {2, "--set train", "--set"},
        {2, "--samples 0", "--samples"},
        {2, "--tokens /nonexistent/t.json", "/nonexistent/t.json"},
        {2, "--tokens " TEST_ROOT "/models/needle/config.json", "special is not an object"},
        {2, "--lengths 32k", "serves 20001 tokens"},
        {2, "--out /nonexistent/o", "/nonexistent/o"},
        {2, "--print /nonexistent/p", "/nonexistent/p"},
        {1, "--json /nonexistent/j", "/nonexistent/j"},
        {3, "--policy auto@unix:/nonexistent/s", "/nonexistent/s"},
    };
    struct daemon d;
    char words[512];
    daemon_start(&d, NULL);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        (void)snprintf(words, sizeof words, "eval --connect %%s " EVAL " --samples 1 %s",
                       cases[i].words);
        expect(run(&d, SLUICE, words), cases[i].code, NULL, cases[i].err);
    }
    assert_int_equal(daemon_stop(&d), 0);
    daemon_start(&d, "numeric"); /* failed requests are told and counted */
    expect(run(&d, SLUICE, "eval --connect %s " EVAL), 1, "6 FAILED", "NUMERIC");
    assert_int_equal(daemon_stop(&d), 0);
    daemon_start(&d, "die");
    expect(run(&d, SLUICE, "eval --connect %s " EVAL " --lengths 8k --num-warmups 0"), 3, "FAILED",
           "connection");
    (void)daemon_stop(&d);
}

static struct result *demo(const char *fault, const char *json)
{
    char words[512];
    (void)snprintf(words, sizeof words, "--daemon %s --model %s --stall 1s --json %s", FAKE,
                   TEST_ROOT "/models/needle", json);
    if (fault)
        (void)setenv("FAKE_FAULT", fault, 1); // NOLINT(concurrency-mt-unsafe)
    struct result *r = run(NULL, DEMO, words);
    (void)unsetenv("FAKE_FAULT"); // NOLINT(concurrency-mt-unsafe)
    return r;
}

static void demo_shows_three_modes(void **state)
{
    (void)state;
    char path[] = "/tmp/sluice-test-XXXXXX";
    int fd = mkstemp(path), exact;
    double ttft;
    const char *mode;
    const struct result *r = demo(NULL, path);
    expect(r, 0, "7 of 7", NULL);
    static const char *const parts[] = {"ada",
                                        "gus",
                                        "7936",
                                        "disconnected after",
                                        "dense",
                                        "ABS k=",
                                        "REL 3",
                                        "mean time to first token",
                                        "measured density",
                                        "0.400",
                                        "most cache pages in use"};
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        expect(r, 0, parts[i], NULL);
    assert_null(strchr(r->err, '\r')); /* quiet in a pipe */
    json_t *j = json_loadfd(fd, 0, NULL);
    assert_int_equal(json_unpack(j, "{s:[{s:s, s:[{s:b, s:F},{},{},{},{},{},{},{}]},{},{}]}",
                                 "modes", "mode", &mode, "users", "exact", &exact, "ttft_ms",
                                 &ttft),
                     0);
    assert_string_equal(mode, "dense");
    assert_true(exact && ttft > 0);
    json_decref(j);
    (void)close(fd);
    (void)unlink(path);
}

static void demo_notices(void **state)
{
    (void)state;
    static const struct {
        const char *fault, *err;
    } cases[] = {
        {"wrong", "ada got a wrong answer"},
        {"leak", "cache pages in use"},
        {"numeric", "NUMERIC"},
        {"stat", "pages_kept"},
        {"die", "exit code 9"},
        {"exit", "exit code 3"},
        {"stall", "nothing was heard"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        expect(demo(cases[i].fault, "/dev/null"), 1, "FAILED", cases[i].err);
    expect(demo(NULL, "/nonexistent/x"), 1, "FAILED", "/nonexistent/x");
    expect(run(NULL, DEMO, "--model /nonexistent"), 2, NULL, "/nonexistent/prompts.jsonl");
    expect(run(NULL, DEMO, "--daemon /nonexistent --model " TEST_ROOT "/models/needle"), 1,
           "FAILED", "/nonexistent");
}

/* Whoever kills the demo, the daemon it started goes too. */
static void demo_leaves_no_daemon_behind(void **state)
{
    (void)state;
    static const int signals[] = {SIGTERM, SIGKILL};
    for (int i = 0; i < 2; i++) {
        int out = temp_fd(), status, fds[2];
        char byte;
        assert_int_equal(pipe(fds), 0); /* its last writer is the daemon */
        pid_t pid = fork();
        if (pid == 0) {
            (void)dup2(out, STDOUT_FILENO);
            (void)dup2(out, STDERR_FILENO);
            (void)setenv("FAKE_FAULT", "stall", 1); // NOLINT(concurrency-mt-unsafe)
            execl(DEMO, DEMO, "--daemon", FAKE, "--model", TEST_ROOT "/models/needle",
                  (char *)NULL);
            _exit(126);
        }
        (void)close(fds[1]);
        char text[4096] = "";
        for (int tries = 0; tries < 500 && !strstr(text, "hal"); tries++) {
            (void)nanosleep(&(struct timespec){0, 10000000}, NULL);
            ssize_t n = pread(out, text, sizeof text - 1, 0);
            text[n > 0 ? n : 0] = '\0';
        }
        (void)nanosleep(&(struct timespec){0, 300000000}, NULL);
        (void)kill(pid, signals[i]);
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_int_equal(read(fds[0], &byte, 1), 0); /* end of file: no process holds it */
        (void)close(fds[0]);
        (void)close(out);
        if (signals[i] == SIGTERM)
            assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 1);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(generate_prints_what_came),
        cmocka_unit_test(generate_tells_what_is_wrong),
        cmocka_unit_test(failures_are_json_too),
        cmocka_unit_test(admin_commands),
        cmocka_unit_test(bench_measures),
        cmocka_unit_test(bench_survives_a_dying_daemon),
        cmocka_unit_test(bench_replays_a_trace),
        cmocka_unit_test(eval_compares_policies),
        cmocka_unit_test(eval_writes_answers_and_a_table),
        cmocka_unit_test(eval_tells_what_is_wrong),
        cmocka_unit_test(demo_shows_three_modes),
        cmocka_unit_test(demo_notices),
        cmocka_unit_test(demo_leaves_no_daemon_behind),
    };
    // NOLINTNEXTLINE(concurrency-mt-unsafe)
    (void)setenv("FAKE_PROMPTS", TEST_ROOT "/models/needle/prompts.jsonl", 1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
