#include "cmd/calibrate_options.h"

#include "calibration/thresholds.h"
#include "cmd/device.h"
#include "kvcache/kv_view.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define AT(f) offsetof(struct calibrate_options, f)

static const struct conf_opt options[] = {
    {"model",
     CONF_TEXT,
     AT(model),
     NULL,
     0,
     0,
     {0},
     "DIR",
     "Hugging Face folder of a LlamaForCausalLM (required)"},
    {"samples",
     CONF_TEXT,
     AT(samples),
     NULL,
     0,
     0,
     {0},
     "FILE",
     "JSON lines with a `prompt` or `tokens` array of token ids and, optionally, a `task` "
     "(required, but with --import or --thresholds)"},
    {"out",
     CONF_TEXT,
     AT(out),
     NULL,
     0,
     0,
     {0},
     "FILE",
     "threshold file to write; without one, nothing is written"},
    {"import",
     CONF_TEXT,
     AT(import),
     NULL,
     0,
     0,
     {0},
     "FILE",
     "convert the reference implementation's .pt file for this model; nothing is run"},
    {"thresholds",
     CONF_TEXT,
     AT(thresholds),
     NULL,
     0,
     0,
     {0},
     "FILE",
     "read this threshold file instead of calibrating: to measure it on the last --samples, to "
     "--export it, or to write it to --out with what --rel or --decode-k finds"},
    {"export",
     CONF_TEXT,
     AT(export),
     NULL,
     0,
     0,
     {0},
     "FILE",
     "write the thresholds as the reference implementation's .pt file as well"},
    {"report",
     CONF_TEXT,
     AT(report),
     NULL,
     0,
     0,
     {0},
     "DIR",
     "write report.md, heat maps of density by layer and head, and thresholds along position, as "
     "SVG"},
    {"aggregate",
     CONF_ENUM,
     AT(aggregate),
     "mean",
     0,
     0,
     {"mean", "quantile"},
     NULL,
     "thresholds over samples: the mean of each sample's, or where all samples together keep the "
     "level's share of pages"},
    {"smooth",
     CONF_BOOL,
     AT(smooth),
     "false",
     0,
     0,
     {0},
     NULL,
     "make thresholds grow along position"},
    {"second-pass",
     CONF_BOOL,
     AT(second_pass),
     "false",
     0,
     0,
     {0},
     NULL,
     "calibrate each level once more on runs that the first pass's thresholds gate"},
    {"task",
     CONF_TEXT,
     AT(task),
     NULL,
     0,
     0,
     {0},
     "PREFIX",
     "calibrate on samples whose task begins so and hold out others (default: hold out the last)"},
    {"holdout",
     CONF_INT,
     AT(holdout),
     "4",
     0,
     1e6,
     {0},
     "N",
     "held-out samples on which the density is measured"},
    {"limit",
     CONF_INT,
     AT(limit),
     "16",
     0,
     1e6,
     {0},
     "N",
     "calibrate on at most N samples, evenly spread; 0 is all"},
    {"k",
     CONF_TEXT,
     AT(k),
     NULL,
     0,
     0,
     {0},
     "K,K,...",
     "levels: pages that a query block keeps besides its own (default: 16,32,64)"},
    {"density",
     CONF_TEXT,
     AT(density),
     NULL,
     0,
     0,
     {0},
     "D,D,...",
     "levels by predicted density at the longest sample, instead of --k"},
    {"budget",
     CONF_TEXT,
     AT(budget),
     NULL,
     0,
     0,
     {0},
     "D,D,...",
     "levels by predicted density as with --density, but each head keeps as many pages as loses "
     "the "
     "least softmax mass over all of them; on the CPU only"},
    {"decode-k",
     CONF_TEXT,
     AT(decode_k),
     NULL,
     0,
     0,
     {0},
     "K,K,...",
     "also calibrate the gate of generated tokens, each deciding alone: levels by the pages that "
     "one keeps besides its own; on the CPU only (default: no such gate)"},
    {"gate-rows",
     CONF_ENUM,
     AT(gate_rows),
     "128",
     0,
     0,
     {"128", "64"},
     NULL,
     "query rows that decide together"},
    {"max-len",
     CONF_INT,
     AT(max_len),
     "0",
     0,
     1e9,
     {0},
     "N",
     "cut samples to N tokens; 0 is not at all"},
    {"threads",
     CONF_INT,
     AT(threads),
     "0",
     0,
     1024,
     {0},
     "N",
     "worker threads; 0 is one per processor"},
    {"chunk",
     CONF_INT,
     AT(chunk),
     "0",
     0,
     65536,
     {0},
     "N",
     "tokens a step, a multiple of 128; 0 is 512 on the CPU and 8192 on a GPU. On the CPU any "
     "gives "
     "the same thresholds"},
    {"device", CONF_TEXT, AT(device), "auto", 0, 0, {0}, "DEVICE", DEVICE_HELP},
    {"dtype", CONF_ENUM, AT(dtype), "auto", 0, 0, DEVICE_DTYPES, NULL,
     "number format of weights and activations; auto is f32 on the CPU"},
    {"kv-dtype", CONF_ENUM, AT(kv_dtype), "auto", 0, 0, DEVICE_DTYPES, NULL,
     "number format of cache pages; auto is f32 on the CPU"},
    {"random-weights",
     CONF_BOOL,
     AT(random_weights),
     "false",
     0,
     0,
     {0},
     NULL,
     "read config.json only and draw the weights, for benches"},
    {"auto-k",
     CONF_INT,
     AT(auto_k),
     "-1",
     -1,
     1e9,
     {0},
     "K",
     "level that requests with `auto` get; 0 is dense, -1 the file's of --thresholds or else the "
     "one "
     "whose density is nearest to 0.5"},
    {"auto-min",
     CONF_INT,
     AT(auto_min),
     "-1",
     -1,
     1e9,
     {0},
     "N",
     "prompts of fewer tokens are dense under `auto`; -1 is as in the file of --thresholds, or "
     "else "
     "4096"},
    {"rel",
     CONF_INT,
     AT(rel),
     "0",
     0,
     1e6,
     {0},
     "N",
     "fit on N of the calibration samples which lambda gives the REL gate which density; 0 is not "
     "at "
     "all"},
    {"rel-density",
     CONF_TEXT,
     AT(rel_density),
     NULL,
     0,
     0,
     {0},
     "D,D,...",
     "densities that the REL gate is to reach on the held-out samples, by --rel or by the file of "
     "--thresholds (with --rel: 0.5,0.3,0.2)"},
    {"steer",
     CONF_FLOAT,
     AT(steer),
     "1",
     0,
     ATTN_STEER_MAX,
     {0},
     "X",
     "how firmly those runs are held to the density, as by sluiced --steer; 0 trusts lambda"},
    {"auto-density",
     CONF_FLOAT,
     AT(auto_density),
     "0",
     0,
     1,
     {0},
     "D",
     "requests with `auto` get the REL gate at this density; 0 is --auto-k"},
    {"auto-lambda",
     CONF_FLOAT,
     AT(auto_lambda),
     "0",
     0,
     1e13,
     {0},
     "LAMBDA",
     "requests with `auto` get the REL gate at this lambda, for prompts of any length; 0 is "
     "--auto-k"},
    {"auto-rows",
     CONF_ENUM,
     AT(auto_rows),
     "128",
     0,
     0,
     {"128", "64"},
     NULL,
     "rows that decide together under --auto-density and --auto-lambda"},
    {"json", CONF_BOOL, AT(json), "false", 0, 0, {0}, NULL, "print the result as one JSON object"},
};

const struct conf_program calibrate_program = {
    "sluice-calibrate --model DIR (--samples FILE | --import FILE | --thresholds FILE) [--out "
    "FILE] [options]",
    "Runs prompts densely, derives page thresholds for the ABS gate, and compares predicted with "
    "measured density on prompts it has not seen. A run with --out that was cut off goes on where "
    "it "
    "was. Or converts thresholds from and to the reference implementation's files.",
    options, sizeof options / sizeof *options};

/* Whether there is something to add to a file that there is. */
static bool adds(const struct calibrate_options *o)
{
    return o->rel || o->decode_k || o->auto_lambda > 0;
}

/* What would go unheard where nothing is calibrated. */
static int check_given(const struct calibrate_options *o, const char *source, struct err_msg *why)
{
    const char *other = o->k                                  ? "k"
                        : o->density                          ? "density"
                        : o->budget                           ? "budget"
                        : o->aggregate != CALIBRATE_MEAN      ? "aggregate"
                        : o->smooth                           ? "smooth"
                        : o->second_pass                      ? "second-pass"
                        : o->import && o->rel                 ? "rel"
                        : o->import && o->decode_k            ? "decode-k"
                        : o->import && o->thresholds          ? "thresholds"
                        : o->import && o->samples             ? "samples"
                        : o->import && o->task                ? "task"
                        : o->import && o->report              ? "report"
                        : o->thresholds && o->out && !adds(o) ? "out"
                                                              : NULL;
    if (other)
        return err_set(why, ERR_CONFIG, "--%s and --%s exclude each other", source, other);
    if (o->import && calibrate_gate_rows(o) != KV_BLOCK_TOKENS) {
        return err_set(why, ERR_CONFIG, "--gate-rows: imported thresholds are for %d",
                       KV_BLOCK_TOKENS);
    }
    return 0;
}

/* What `auto` is to mean. */
static int check_auto(const struct calibrate_options *o, struct err_msg *why)
{
    const bool density = o->auto_density > 0, lambda = o->auto_lambda > 0;
    if (density && o->rel == 0)
        return err_set(why, ERR_CONFIG, "--auto-density needs --rel");
    if (density && lambda)
        return err_set(why, ERR_CONFIG, "--auto-density and --auto-lambda exclude each other");
    if ((density || lambda) && !o->out)
        return err_set(why, ERR_CONFIG, "--auto-%s needs --out", density ? "density" : "lambda");
    if (o->auto_rows != 0 && !density && !lambda)
        return err_set(why, ERR_CONFIG, "--auto-rows needs --auto-density or --auto-lambda");
    return 0;
}

int calibrate_options_check(const struct calibrate_options *o, struct err_msg *why)
{
    if (!o->model)
        return err_set(why, ERR_CONFIG, "--model is required (see --help)");
    if (o->import || o->thresholds)
        TRY(check_given(o, o->import ? "import" : "thresholds", why));
    if (!o->samples && !o->import && (!o->thresholds || o->rel || o->decode_k))
        return err_set(why, ERR_CONFIG, "--samples is required (see --help)");
    if (o->budget && strncmp(o->device, "cuda", 4) == 0)
        return err_set(why, ERR_CONFIG, BUDGET_NEEDS_CPU);
    if (o->decode_k && strncmp(o->device, "cuda", 4) == 0)
        return err_set(why, ERR_CONFIG, DECODE_NEEDS_CPU);
    TRY(device_check(o->device, why));
    if (o->k && o->density)
        return err_set(why, ERR_CONFIG, "--k and --density exclude each other");
    if (o->budget && (o->k || o->density || o->second_pass))
        return err_set(why, ERR_CONFIG, "--budget and --%s exclude each other",
                       o->k         ? "k"
                       : o->density ? "density"
                                    : "second-pass");
    TRY(check_auto(o, why));
    if (o->chunk % KV_BLOCK_TOKENS) {
        return err_set(why, ERR_CONFIG, "--chunk: %lld is not a multiple of %d",
                       (long long)o->chunk, KV_BLOCK_TOKENS);
    }
    return 0;
}

/* One number of a list; *text moves past it and its comma. */
static int next_number(const char *option, const char **text, double min, double max, double *out,
                       struct err_msg *why)
{
    char *end;
    errno = 0;
    *out = strtod(*text, &end);
    if (errno || end == *text || (*end && *end != ',') || !(*out >= min && *out <= max)) {
        return err_set(why, ERR_CONFIG, "--%s: '%.40s' does not begin with a number from %g to %g",
                       option, *text, min, max);
    }
    *text = *end ? end + 1 : end;
    return 0;
}

static int increasing(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* One option's list of levels, which a prompt of n_tokens turns into pages where they are densities
 * (n_tokens 0: pages). */
static int parse_levels(const char *name, const char *text, int32_t n_tokens, int32_t gate_rows,
                        int32_t k[CALIBRATE_MAX_LEVELS], int32_t *n, struct err_msg *why)
{
    int32_t count = 0, unique = 0;
    while (*text) {
        double v;
        if (count == CALIBRATE_MAX_LEVELS)
            return err_set(why, ERR_CONFIG, "more than %d levels", CALIBRATE_MAX_LEVELS);
        TRY(next_number(name, &text, n_tokens ? 0.001 : 1, n_tokens ? 1 : 1 << 24, &v, why));
        if (!n_tokens && v != (double)(int32_t)v)
            return err_set(why, ERR_CONFIG, "--%s: %g is not a whole number", name, v);
        k[count++] = n_tokens ? thresholds_k_for_density(v, n_tokens, gate_rows) : (int32_t)v;
    }
    if (count == 0)
        return err_set(why, ERR_CONFIG, "--%s: the list is empty", name);
    qsort(k, (size_t)count, sizeof *k, increasing);
    for (int32_t i = 0; i < count; i++) {
        if (unique == 0 || k[i] != k[unique - 1])
            k[unique++] = k[i];
    }
    *n = unique;
    return 0;
}

int calibrate_levels(const struct calibrate_options *o, int32_t n_tokens,
                     int32_t k[CALIBRATE_MAX_LEVELS], int32_t *n, struct err_msg *why)
{
    const char *name = o->budget ? "budget" : o->density ? "density" : "k";
    const char *densities = o->budget ? o->budget : o->density;
    const char *text = densities ? densities : o->k ? o->k : "16,32,64";
    TRY(parse_levels(name, text, densities ? n_tokens : 0, calibrate_gate_rows(o), k, n, why));
    return calibrate_check_auto(o, k, *n, why);
}

int calibrate_decode_levels(const struct calibrate_options *o, int32_t k[CALIBRATE_MAX_LEVELS],
                            int32_t *n, struct err_msg *why)
{
    *n = 0;
    return o->decode_k ? parse_levels("decode-k", o->decode_k, 0, 0, k, n, why) : 0;
}

int calibrate_rel_targets(const struct calibrate_options *o, double targets[CALIBRATE_MAX_LEVELS],
                          int32_t *n, struct err_msg *why)
{
    const char *text = o->rel_density ? o->rel_density : o->rel > 0 ? "0.5,0.3,0.2" : "";
    for (*n = 0; *text;) {
        if (*n == CALIBRATE_MAX_LEVELS)
            return err_set(why, ERR_CONFIG, "more than %d densities", CALIBRATE_MAX_LEVELS);
        TRY(next_number("rel-density", &text, 0.001, 1, &targets[(*n)++], why));
    }
    return 0;
}

int calibrate_check_auto(const struct calibrate_options *o, const int32_t *k, int32_t n,
                         struct err_msg *why)
{
    for (int32_t i = 0; i < n; i++) {
        if (k[i] == o->auto_k)
            return 0;
    }
    if (o->auto_k > 0)
        return err_set(why, ERR_CONFIG, "--auto-k: %lld is not one of the levels",
                       (long long)o->auto_k);
    return 0;
}
