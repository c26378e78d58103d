/* sluice-demo: starts the daemon with the small model that ships, lets eight users with long
 * prompts ask at once, and shows what dense attention, the ABS gate (BSFA) and the REL gate
 * (BLASST) do to answers, times and pages. Exit codes: 0 all well, 1 a daemon error, a wrong dense
 * answer or leaked pages, 2 wrong usage. */
#include "calibration/thresholds.h"
#include "cmd/cli.h"
#include "cmd/demo_print.h"
#include "core/mem.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

struct demo_options {
    char *model, *thresholds, *prompts, *daemon, *device, *json;
    int64_t threads, stall_ms;
    double density, lambda;
};

#define O struct demo_options

static const struct conf_opt options[] = {
    CLI_TEXT(O, model, "model", "models/needle", "DIR", "the model"),
    CLI_TEXT(O, thresholds, "thresholds", NULL, "FILE",
             "its thresholds (default: thresholds.safetensors in the model's folder)"),
    CLI_TEXT(O, prompts, "prompts", NULL, "FILE",
             "the users' prompts (default: prompts.jsonl in the model's folder)"),
    CLI_TEXT(O, daemon, "daemon", NULL, "PROGRAM",
             "sluiced (default: the one beside this program)"),
    CLI_TEXT(O, device, "device", "auto", "DEVICE",
             "passed on to sluiced: auto, cpu, cuda or cuda:N"),
    CLI_OPT(O, density, "density", CONF_FLOAT, "0.35", 0, 1, "SHARE",
            "the ABS level is the one predicted closest to this density"),
    CLI_OPT(O, lambda, "lambda", CONF_FLOAT, "3", 0, 1000, "L", "of the REL gate, not 1"),
    CLI_INT(O, threads, "threads", "0", 0, 1024, "worker threads; 0 is one per processor"),
    CLI_TEXT(O, json, "json", NULL, "FILE", "write everything measured as one JSON object too"),
    CLI_MS(O, stall_ms, "stall", "120s", "give up after so long without a sign of life"),
};

static const struct conf_program program = {
    "sluice-demo [options]",
    "Runs eight users with long prompts against a daemon of its own: dense, then ABS, then REL.",
    options, sizeof options / sizeof options[0]};

struct demo {
    const struct demo_options *options;
    struct demo_prompt prompts[DEMO_USERS];
    struct demo_mode modes[DEMO_MODES];
    struct demo_round rounds[DEMO_MODES];
    struct demo_daemon daemon;
    struct demo_scene scene;
    int32_t page_tokens;
};

/* folder/name, unless given; release with mem_free. */
static char *path_or(const char *given, const char *folder, const char *name)
{
    if (given)
        return mem_strdup(given);
    size_t n = strlen(folder) + strlen(name) + 2;
    char *path = mem_alloc(n);
    (void)snprintf(path, n, "%s/%s", folder, name);
    return path;
}

static char *beside_me(const char *given, const char *name)
{
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(self, '/');
    if (slash)
        *slash = '\0';
    return path_or(given, slash ? self : ".", name);
}

/* SIGINT, SIGTERM and SIGHUP become readable, so that the daemon is always stopped and its folder
 * removed.
 */
static int watch_signals(void)
{
    sigset_t set;
    (void)sigemptyset(&set);
    (void)sigaddset(&set, SIGINT);
    (void)sigaddset(&set, SIGTERM);
    (void)sigaddset(&set, SIGHUP);
    (void)pthread_sigmask(SIG_BLOCK, &set, NULL);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* Loading takes a moment: connect until it answers that it is ready. */
static int wait_ready(struct demo *d, struct err_msg *why)
{
    char text[256] = "";
    struct sluice_options o = {.name = "sluice-demo", .connect_ms = 1000};
    struct sluice_health h = {0};
    for (int tries = 0; tries < 1200; tries++) {
        struct timespec pause = {0, 50000000};
        TRY(demo_daemon_check(&d->daemon, why));
        if (!d->scene.control)
            (void)sluice_connect(&d->scene.control, d->daemon.address, &o, text, sizeof text);
        if (d->scene.control) {
            int err = sluice_get_health(d->scene.control, &h, 10000);
            if (err < 0)
                return err_set(why, err, "HEALTH: %s", sluice_error(d->scene.control));
            if (h.ready)
                return 0;
        }
        (void)nanosleep(&pause, NULL);
    }
    return err_set(why, -ETIMEDOUT, "sluiced was not ready within 60 s: %s", text);
}

/* Predicted density of level k over all prompts together. */
static double predicted(const struct demo *d, int32_t k, int32_t gate_rows)
{
    double kept = 0, all = 0;
    for (int u = 0; u < DEMO_USERS; u++) {
        double n = d->prompts[u].prompt.n, work = n * n;
        kept += work * thresholds_predicted_density(k, d->prompts[u].prompt.n, gate_rows);
        all += work;
    }
    return kept / all;
}

static int choose_modes(struct demo *d, struct err_msg *why)
{
    const struct sluice_info *info = sluice_get_info(d->scene.control);
    double target = d->options->density, best = HUGE_VAL;
    struct demo_mode *dense = &d->modes[0], *abs = &d->modes[1], *rel = &d->modes[2];
    if (!info->has_abs || info->n_levels < 1)
        return err_set(why, ERR_UNSUPPORTED, "the daemon offers no ABS levels");
    d->page_tokens = info->block_size;
    *dense = (struct demo_mode){.name = "dense", .sparse = SLUICE_DENSE};
    for (int32_t i = 0; i < info->n_levels; i++) {
        double off = fabs(predicted(d, info->k_levels[i], info->gate_rows) - target);
        if (off < best) {
            best = off;
            *abs = (struct demo_mode){.sparse = SLUICE_ABS, .k = info->k_levels[i]};
        }
    }
    (void)snprintf(abs->name, sizeof abs->name, "ABS k=%d", abs->k);
    *rel = (struct demo_mode){.sparse = SLUICE_REL, .gate_rows = 128};
    rel->ln_lambda = log(d->options->lambda);
    (void)snprintf(rel->name, sizeof rel->name, "REL %.4g", d->options->lambda);
    return 0;
}

static int play(struct demo *d, struct err_msg *why)
{
    TRY(wait_ready(d, why));
    TRY(choose_modes(d, why));
    for (int m = 0; m < DEMO_MODES; m++) {
        if (m > 0 && sluice_reset_prefix_cache(d->scene.control, 10000) < 0)
            return err_set(why, ERR_INTERNAL, "RESET_PREFIX_CACHE: %s",
                           sluice_error(d->scene.control));
        TRY(demo_run(&d->rounds[m], &d->scene, &d->modes[m], why));
        demo_print_round(d->prompts, &d->modes[m], &d->rounds[m], stdout);
        (void)fflush(stdout);
    }
    demo_print_totals(d->modes, d->rounds, d->page_tokens, stdout);
    return d->options->json
               ? demo_write_json(d->options->json, d->prompts, d->modes, d->rounds, why)
               : 0;
}

/* Verdict and exit code. err: what play returned. */
static int conclude(struct demo *d, int err, struct err_msg *why)
{
    struct err_msg stop = {""};
    int problems = err < 0;
    if (err < 0)
        (void)fprintf(stderr, "sluice-demo: %s\n", err_why(why, err));
    for (int m = 0; m < DEMO_MODES && err == 0; m++)
        problems += demo_problems(&d->modes[m], &d->rounds[m], m == 0, stderr);
    sluice_close(d->scene.control);
    if (d->daemon.pid && demo_daemon_stop(&d->daemon, 20000, &stop) < 0) {
        (void)fprintf(stderr, "sluice-demo: %s\n", stop.text);
        problems++;
    }
    if (problems)
        demo_daemon_print_log(&d->daemon, stderr);
    demo_daemon_deinit(&d->daemon);
    (void)puts(problems ? "\nThe demo FAILED."
                        : "\nAll dense answers are right, no page was lost, "
                          "the daemon ended cleanly.");
    return problems ? CLI_FAILED : CLI_OK;
}

static int run(struct demo *d, const struct demo_options *o)
{
    struct err_msg why = {""};
    char *prompts = path_or(o->prompts, o->model, "prompts.jsonl");
    char *thresholds = path_or(o->thresholds, o->model, "thresholds.safetensors");
    char *daemon = beside_me(o->daemon, "sluiced");
    struct demo_daemon_config cfg = {daemon, o->model, thresholds, o->device, o->threads};
    int code = CLI_USAGE;

    if (demo_prompts_load(d->prompts, prompts, &why) < 0) {
        (void)fprintf(stderr, "sluice-demo: %s\n", why.text);
    } else {
        d->options = o;
        d->scene = (struct demo_scene){.prompts = d->prompts,
                                       .daemon = &d->daemon,
                                       .signal_fd = watch_signals(),
                                       .progress = isatty(STDERR_FILENO) == 1,
                                       .stall_us = o->stall_ms * 1000};
        (void)puts("Eight users ask at once:");
        demo_print_cast(d->prompts, stdout);
        (void)fflush(stdout);
        int err = demo_daemon_start(&d->daemon, &cfg, &why);
        if (err == 0)
            err = play(d, &why);
        code = conclude(d, err, &why);
        (void)close(d->scene.signal_fd);
    }
    demo_prompts_free(d->prompts);
    mem_free(prompts);
    mem_free(thresholds);
    mem_free(daemon);
    return code;
}

int main(int argc, char **argv)
{
    struct demo_options o = {0};
    struct err_msg why = {""};
    int code = CLI_USAGE;
    if (conf_wants_help(argc, argv)) {
        conf_help(&program, stdout);
        return CLI_OK;
    }
    conf_defaults(&program, &o);
    struct demo *d = mem_zalloc(1, sizeof *d);
    if (argc == 2 && strcmp(argv[1], "--help-markdown") == 0) {
        conf_markdown(&program, stdout);
        code = CLI_OK;
    } else if (conf_args(&program, &o, argc, argv, NULL, 0, NULL, &why) < 0) {
        (void)fprintf(stderr, "sluice-demo: %s\n", why.text);
    } else {
        code = run(d, &o);
    }
    mem_free(d);
    conf_free(&program, &o);
    return code;
}
