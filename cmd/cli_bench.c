/* sluice bench: load on a running daemon, and the figures of `vllm bench serve` under the same
 * names. */
#include "cmd/cli.h"
#include "cmd/cli_bench_run.h"
#include "cmd/cli_parse.h"
#include "core/mem.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct bench_options {
    struct cli_target target;
    char *trace, *mix, *sparse, *goodput, *percentiles, *json, *tenant;
    double trace_speed, request_rate, burstiness, range_ratio, shared_prefix, temperature;
    int64_t num_prompts, input_len, output_len, num_prefixes, max_concurrency, connections;
    int64_t num_warmups, seed, gate_rows;
    bool ignore_eos;
};

#define O struct bench_options

static const struct conf_opt options[] = {
    CLI_TARGET_OPTS(O),
    CLI_INT(O, num_prompts, "num-prompts", "100", 0, 1e8,
            "requests to send; of a trace at most so many, 0 is all"),
    CLI_INT(O, input_len, "input-len", "1024", 1, 1 << 24, "prompt tokens of a request"),
    CLI_INT(O, output_len, "output-len", "128", 1, 1 << 24, "generated tokens of a request"),
    CLI_OPT(O, range_ratio, "range-ratio", CONF_FLOAT, "0", 0, 1, "R",
            "lengths are drawn from length * (1 - R) to length * (1 + R)"),
    CLI_OPT(O, shared_prefix, "shared-prefix", CONF_FLOAT, "0", 0, 1, "SHARE",
            "share of input-len that requests of a group have in common"),
    CLI_INT(O, num_prefixes, "num-prefixes", "1", 1, 1e6, "such groups"),
    CLI_TEXT(O, mix, "mix", NULL, "LIST",
             "send several kinds of requests instead, PROMPT:OUTPUT:COUNT each, in an order drawn "
             "from the seed: 131072:128:4,1024:128:60; each kind's figures are printed too"),
    CLI_TEXT(O, trace, "trace", NULL, "FILE",
             "replay a Mooncake trace instead: timestamp, input_length, output_length, hash_ids "
             "(blocks of 512 tokens, equal ids are equal tokens)"),
    CLI_REAL(O, trace_speed, "trace-speed", "1", "replay so many times faster"),
    CLI_REAL(O, request_rate, "request-rate", "inf", "requests a second; inf sends all at once"),
    CLI_REAL(O, burstiness, "burstiness", "1",
             "shape of the gamma-distributed gaps: 1 is Poisson, less is burstier"),
    CLI_INT(O, max_concurrency, "max-concurrency", "0", 0, 1e6,
            "open requests at once; 0 is no limit"),
    CLI_INT(O, connections, "connections", "8", 1, 1024, "connections to spread them over"),
    CLI_INT(O, num_warmups, "num-warmups", "0", 0, 1e6, "requests before the measured ones"),
    CLI_INT(O, seed, "seed", "0", 0, 9e18, "of lengths, tokens and arrivals"),
    CLI_REAL(O, temperature, "temperature", "0", "0 is greedy"),
    CLI_BOOL(O, ignore_eos, "ignore-eos", "true", "generate output-len tokens, whatever comes"),
    CLI_TEXT(O, sparse, "sparse", "auto", "MODE",
             "attention of the prompts: dense, k=K, rel=LAMBDA, abs~D, rel~D, or auto; +decode~D "
             "after one: of generated tokens"),
    CLI_INT(O, gate_rows, "gate-rows", "0", 0, 128, "under rel: 64, 128, or 0 for the default"),
    CLI_TEXT(O, tenant, "tenant", NULL, "NAME", "whom the requests count for"),
    CLI_TEXT(O, goodput, "goodput", NULL, "SLOS",
             "count requests that meet all of ttft:MS,tpot:MS,e2el:MS"),
    CLI_TEXT(O, percentiles, "metric-percentiles", "99", "LIST", "percentiles to print"),
    CLI_TEXT(O, json, "json", NULL, "FILE",
             "write every figure under vLLM's keys; - is standard output, instead of the table"),
};

static const struct conf_program program = {
    "sluice bench --connect unix:PATH [options]",
    "Sends load to a daemon and prints the figures of `vllm bench serve`.", options,
    sizeof options / sizeof options[0]};

static int make_load(struct load *out, const struct bench_options *o,
                     const struct report_options *report, struct err_msg *why)
{
    if (o->trace)
        return load_trace(out, o->trace, o->trace_speed, (int32_t)o->num_prompts, why);
    struct load_shape shape = {.n_requests = (int32_t)o->num_prompts,
                               .input_len = (int32_t)o->input_len,
                               .output_len = (int32_t)o->output_len,
                               .range_ratio = o->range_ratio,
                               .shared_prefix = o->shared_prefix,
                               .n_prefixes = (int32_t)o->num_prefixes,
                               .seed = (uint64_t)o->seed};
    if (o->mix)
        load_mix(out, report->classes, report->n_classes, (uint64_t)o->seed);
    else
        load_synthetic(out, &shape);
    load_arrivals(out, o->request_rate, o->burstiness, (uint64_t)o->seed);
    return 0;
}

static int check(const struct bench_options *o, struct err_msg *why)
{
    if (!(o->request_rate > 0))
        return err_set(why, ERR_CONFIG, "--request-rate must be above 0");
    if (!(o->burstiness > 0) || !isfinite(o->burstiness))
        return err_set(why, ERR_CONFIG, "--burstiness must be above 0");
    if (!(o->trace_speed > 0))
        return err_set(why, ERR_CONFIG, "--trace-speed must be above 0");
    if (!o->trace && !o->mix && o->num_prompts < 1)
        return err_set(why, ERR_CONFIG, "--num-prompts must be at least 1 without a trace");
    if (o->trace && o->mix)
        return err_set(why, ERR_CONFIG, "--mix and --trace cannot go together");
    return 0;
}

/* classes [LOAD_MAX_CLASSES]: the report's, of a mix. */
static int make_plan(struct bench_plan *plan, struct report_options *report,
                     struct load_class *classes, const struct bench_options *o, struct err_msg *why)
{
    TRY(check(o, why));
    struct sluice_request *r = &plan->request;
    sluice_request_init(r);
    TRY(cli_parse_sparse(r, o->sparse, why));
    r->temperature = o->temperature;
    r->ignore_eos = o->ignore_eos;
    r->gate_rows = (int32_t)o->gate_rows;
    r->tenant = o->tenant;
    r->has_seed = true;
    r->seed = (uint64_t)o->seed;
    plan->target = &o->target;
    plan->n_connections = (int32_t)o->connections;
    plan->max_concurrency = (int32_t)o->max_concurrency;
    plan->progress = isatty(STDERR_FILENO) == 1;
    TRY(cli_parse_goodput(&report->slo, o->goodput, why));
    int n = cli_parse_percentiles(report->percentiles, REPORT_MAX_PERCENTILES, o->percentiles, why);
    TRY(n);
    report->n_percentiles = n;
    if (o->mix) {
        n = cli_parse_mix(classes, LOAD_MAX_CLASSES, o->mix, why);
        TRY(n);
        report->classes = classes;
        report->n_classes = n;
    }
    report->max_concurrency = plan->max_concurrency;
    report->request_rate = o->trace ? HUGE_VAL : o->request_rate;
    return 0;
}

/* Warm-up requests are of the same shape with other tokens, and are not counted. */
static int warm_up(const struct bench_plan *plan, const struct bench_options *o)
{
    struct load load;
    double ignored;
    if (o->num_warmups == 0)
        return CLI_OK;
    load_synthetic(&load, &(struct load_shape){.n_requests = (int32_t)o->num_warmups,
                                               .input_len = (int32_t)o->input_len,
                                               .output_len = (int32_t)o->output_len,
                                               .n_prefixes = 1,
                                               .seed = ~(uint64_t)o->seed});
    struct bench_plan warm = *plan;
    struct bench_sample *samples = mem_zalloc((size_t)load.n_requests, sizeof *samples);
    warm.load = &load;
    int code = bench_run(&warm, samples, &ignored);
    bench_samples_free(samples, load.n_requests);
    load_deinit(&load);
    return code;
}

static void print_errors(const struct bench_sample *samples, int32_t n)
{
    for (int32_t i = 0, shown = 0; i < n && shown < 10; i++) {
        if (!samples[i].ok) {
            (void)cli_fail(0, "request %d failed: %s", i, samples[i].error);
            shown++;
        }
    }
}

static int measure(const struct bench_plan *plan, struct report_options *ro, const char *json)
{
    struct err_msg why = {""};
    struct report report;
    int32_t n = plan->load->n_requests;
    struct bench_sample *samples = mem_zalloc((size_t)n, sizeof *samples);
    int code = bench_run(plan, samples, &ro->duration_s);
    if (code == CLI_OK) {
        report_compute(&report, samples, n, ro);
        print_errors(samples, n);
        if (!json || strcmp(json, "-") != 0)
            report_print(&report, ro, stdout);
        if (json && report_write_json(&report, ro, samples, n, json, &why) < 0)
            code = cli_fail(CLI_FAILED, "bench: %s", why.text);
        else if (report.failed)
            code = CLI_FAILED;
    }
    bench_samples_free(samples, n);
    return code;
}

static int run(void *options_arg)
{
    const struct bench_options *o = options_arg;
    struct err_msg why = {""};
    struct bench_plan plan = {0};
    struct report_options report = {0};
    struct load_class classes[LOAD_MAX_CLASSES];
    struct load load = {NULL, 0};
    if (make_plan(&plan, &report, classes, o, &why) < 0 || make_load(&load, o, &report, &why) < 0)
        return cli_fail(CLI_USAGE, "bench: %s", why.text);
    plan.load = &load;
    int code = warm_up(&plan, o);
    if (code == CLI_OK)
        code = measure(&plan, &report, o->json);
    load_deinit(&load);
    return code;
}

const struct cli_command cli_bench = {"bench", &program, run, sizeof(struct bench_options)};
