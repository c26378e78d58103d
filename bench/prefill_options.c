#include "bench/prefill_options.h"

#include "cmd/device.h"
#include "core/conf.h"
#include "core/mem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define AT(f) offsetof(struct prefill_options, f)

// clang-format off
static const struct conf_opt opts[] = {
    {"model", CONF_TEXT, AT(model), "models/needle", 0, 0, {0}, "DIR", "the model"},
    {"random-weights", CONF_BOOL, AT(random_weights), "false", 0, 0, {0}, NULL,
     "read config.json only"},
    {"device", CONF_TEXT, AT(device), "auto", 0, 0, {0}, "DEVICE", DEVICE_HELP},
    {"tp", CONF_TEXT, AT(tp), "1", 0, 0, {0}, "LIST", "numbers of ranks, one after the other"},
    {"prompt", CONF_TEXT, AT(prompt), "8192,32768,131072", 0, 0, {0}, "LIST", "prompts, tokens"},
    {"chunk", CONF_INT, AT(chunk), "8192", 0, 1e6, {0}, "N", "tokens a step; 0: 8192 for each rank"},
    {"thresholds", CONF_TEXT, AT(thresholds), NULL, 0, 0, {0}, "FILE",
     "for --k and --density"},
    {"force-thresholds", CONF_BOOL, AT(force_thresholds), "false", 0, 0, {0}, NULL,
     "though made for another model"},
    {"k", CONF_TEXT, AT(k), NULL, 0, 0, {0}, "LIST", "levels of the file to run beside dense"},
    {"density", CONF_TEXT, AT(density), NULL, 0, 0, {0}, "LIST",
     "likewise, levels found by the share of pages they keep, for every prompt"},
    {"steer", CONF_FLOAT, AT(steer), "0", 0, 100, {0}, "X",
     "how firmly these are held to their pages, levels of a density as sluiced --steer chooses them (default there: 1); 0: thresholds alone"},
    {"lambda", CONF_TEXT, AT(lambda), NULL, 0, 0, {0}, "LIST", "REL gates to run beside dense"},
    {"lost-mass", CONF_BOOL, AT(lost_mass), "false", 0, 0, {0}, NULL,
     "every gate once more with its lost softmax mass measured"},
    {"all-rows", CONF_BOOL, AT(all_rows), "false", 0, 0, {0}, NULL,
     "everything once more with the last layer computed of all rows, not only of those that the token needs"},
    {"sums", CONF_TEXT, AT(sums), "copy", 0, 0, {0}, "WAY",
     "over GPUs: copy or nccl, beside the products, or serial"},
    {"reps", CONF_INT, AT(reps), "3", 1, 64, {0}, "N", "timed passes, after one that is checked"},
    {"quick", CONF_BOOL, AT(quick), "false", 0, 0, {0}, NULL,
     "prompts after the first: its levels, the checked pass is timed, none after 2 s"},
    {"threads", CONF_INT, AT(threads), "0", 0, 1024, {0}, "N",
     "on the CPU, of all ranks together; 0: one a processor"},
    {"json", CONF_BOOL, AT(json), "false", 0, 0, {0}, NULL, "JSON lines instead of CSV"},
    {"verbose", CONF_BOOL, AT(verbose), "false", 0, 0, {0}, NULL, "log what is opened"},
    {"rank", CONF_INT, AT(rank), "0", 0, 63, {0}, "N", "internal: this process's rank"},
    {"shm", CONF_TEXT, AT(shm), NULL, 0, 0, {0}, "NAME", "internal: shared memory of the ranks"},
};
// clang-format on

static const struct conf_program program = {
    "bench_prefill [options]", "Times whole prompts over numbers of ranks, dense and gated.", opts,
    sizeof opts / sizeof *opts};

/* Numbers of a list, each in [lo, hi]; returns how many. */
static int numbers_of(double *out, int max, const char *name, const char *text, double lo,
                      double hi, struct err_msg *why)
{
    char *copy = mem_strdup(text ? text : ""), *save = NULL;
    int n = 0, err = 0;
    for (char *w = strtok_r(copy, ", ", &save); w && err == 0; w = strtok_r(NULL, ", ", &save)) {
        char *end;
        double v = strtod(w, &end);
        if (*end || !(v >= lo && v <= hi))
            err = err_set(why, ERR_CONFIG, "--%s: '%.40s' is not a number from %g to %g", name, w,
                          lo, hi);
        else if (n == max)
            err = err_set(why, ERR_CONFIG, "--%s: at most %d", name, max);
        else
            out[n++] = v;
    }
    mem_free(copy);
    return err < 0 ? err : n;
}

/* Likewise of counts, at least one. */
static int counts_of(int32_t *out, int max, const char *name, const char *text, struct err_msg *why)
{
    double v[PREFILL_MAX_PROMPTS];
    int n = numbers_of(v, max, name, text, 1, 1e7, why);
    TRY(n);
    for (int i = 0; i < n; i++)
        out[i] = (int32_t)v[i];
    return n > 0 ? n : err_set(why, ERR_CONFIG, "--%s: no number", name);
}

static int add_mode(struct prefill_options *o, const struct prefill_mode *mode, struct err_msg *why)
{
    if (o->n_modes == PREFILL_MAX_MODES)
        return err_set(why, ERR_CONFIG, "at most %d modes", PREFILL_MAX_MODES);
    o->modes[o->n_modes++] = *mode;
    return 0;
}

static int add_levels(struct prefill_options *o, struct err_msg *why)
{
    double k[PREFILL_MAX_MODES], density[PREFILL_MAX_MODES];
    int n = numbers_of(k, PREFILL_MAX_MODES, "k", o->k, 1, 1e7, why);
    TRY(n);
    int n_densities = numbers_of(density, PREFILL_MAX_MODES, "density", o->density, 1e-6, 1, why);
    TRY(n_densities);
    if (n + n_densities > 0 && !o->thresholds)
        return err_set(why, ERR_CONFIG, "--k and --density: need --thresholds FILE");
    for (int i = 0; i < n; i++) {
        struct prefill_mode mode = {.gate = BATCH_ABS, .k = (int32_t)k[i]};
        (void)snprintf(mode.name, sizeof mode.name, "k=%d", mode.k);
        TRY(add_mode(o, &mode, why));
    }
    for (int i = 0; i < n_densities; i++) {
        struct prefill_mode mode = {.gate = BATCH_ABS, .density = density[i]};
        (void)snprintf(mode.name, sizeof mode.name, "density=%g", density[i]);
        TRY(add_mode(o, &mode, why));
    }
    return 0;
}

static int add_lambdas(struct prefill_options *o, struct err_msg *why)
{
    double lambda[PREFILL_MAX_MODES];
    int n = numbers_of(lambda, PREFILL_MAX_MODES, "lambda", o->lambda, 1e-30, 1000, why);
    TRY(n);
    for (int i = 0; i < n; i++) {
        struct prefill_mode mode = {.gate = BATCH_REL, .ln_lambda = (float)log(lambda[i])};
        (void)snprintf(mode.name, sizeof mode.name, "rel=%g", lambda[i]);
        TRY(add_mode(o, &mode, why));
    }
    return 0;
}

/* The modes from `first` on once more: with their lost mass measured, or the whole last layer. */
static int add_again(struct prefill_options *o, int first, bool measured, struct err_msg *why)
{
    const int n = o->n_modes;
    for (int i = first; i < n; i++) {
        struct prefill_mode mode = o->modes[i];
        mode.lost_mass |= measured;
        mode.all_rows |= !measured;
        (void)snprintf(mode.name, sizeof mode.name, "%.26s%s", o->modes[i].name,
                       measured ? "+lost" : "+all");
        TRY(add_mode(o, &mode, why));
    }
    return 0;
}

static int read_sums(struct prefill_options *o, struct err_msg *why)
{
    static const char *const ways[] = {
        [COMM_OVERLAP_COPY] = "copy", [COMM_OVERLAP_SUMS] = "nccl", [COMM_OVERLAP_NONE] = "serial"};
    for (int i = COMM_OVERLAP_COPY; i <= COMM_OVERLAP_NONE; i++) {
        if (strcmp(o->sums, ways[i]) == 0) {
            o->overlap = (enum comm_overlap)i;
            return 0;
        }
    }
    return err_set(why, ERR_CONFIG, "--sums: '%.40s' is not copy, nccl or serial", o->sums);
}

static int read_lists(struct prefill_options *o, struct err_msg *why)
{
    const struct prefill_mode dense = {.name = "dense", .gate = BATCH_DENSE};
    o->n_tps = counts_of(o->tps, PREFILL_MAX_TPS, "tp", o->tp, why);
    TRY(o->n_tps);
    o->n_prompts = counts_of(o->prompts, PREFILL_MAX_PROMPTS, "prompt", o->prompt, why);
    TRY(o->n_prompts);
    for (int i = 0; i < o->n_prompts; i++)
        o->longest = o->prompts[i] > o->longest ? o->prompts[i] : o->longest;
    TRY(add_mode(o, &dense, why));
    TRY(add_levels(o, why));
    TRY(add_lambdas(o, why));
    if (o->lost_mass)
        TRY(add_again(o, 1, true, why));
    return o->all_rows ? add_again(o, 0, false, why) : 0;
}

int prefill_options_read(struct prefill_options *o, int argc, char **argv, struct err_msg *why)
{
    conf_defaults(&program, o);
    if (conf_wants_help(argc, argv)) {
        conf_help(&program, stdout);
        return 1;
    }
    TRY(conf_args(&program, o, argc, argv, NULL, 0, NULL, why));
    TRY(device_check(o->device, why));
    TRY(read_sums(o, why));
    return read_lists(o, why);
}

void prefill_options_free(struct prefill_options *o)
{
    conf_free(&program, o);
}
