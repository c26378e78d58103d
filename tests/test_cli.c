/* The parts of `sluice` that need no daemon: words of the command line, loads, figures. The figures
 * are checked against values worked out by hand or by numpy. */
#include "tests/test.h"

#include "cmd/cli_generate.h"
#include "cmd/cli_load.h"
#include "cmd/cli_parse.h"
#include "cmd/cli_report.h"
#include "core/mem.h"

#include <jansson.h>
#include <unistd.h>

/* A file with the given text; remove it with unlink. */
static void temp_file(char *path, size_t cap, const char *text)
{
    (void)snprintf(path, cap, "/tmp/sluice-test-XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    (void)close(fd);
}

static void tokens_are_read_in_every_form(void **state)
{
    (void)state;
    static const struct {
        const char *file; /* NULL: the text itself is given */
        const char *text;
        int64_t line;
    } good[] = {
        {NULL, "7,8,9", 1},
        {"7,8,9", NULL, 1},
        {"[7, 8,\n 9]\n", NULL, 1},
        {"7 8\t9\r\n", NULL, 1},
        {"{\"prompt\":[7,8,9]}\n", NULL, 1},
        {"{\"tokens\":[1]}\n{\"tokens\":[7,8,9],\"x\":0}\n", NULL, 2},
    };
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        char path[64] = "", word[80];
        struct cli_tokens t;
        struct err_msg why = {""};
        if (good[i].file)
            temp_file(path, sizeof path, good[i].file);
        (void)snprintf(word, sizeof word, "@%s", path);
        assert_ok(cli_parse_tokens(&t, good[i].file ? word : good[i].text, good[i].line, &why));
        assert_int_equal(t.n, 3);
        assert_int_equal(t.ids[0], 7);
        assert_int_equal(t.ids[2], 9);
        mem_free(t.ids);
        (void)unlink(path);
    }
}

static void bad_tokens_are_named(void **state)
{
    (void)state;
    static const struct {
        const char *text, *names;
    } bad[] = {
        {"1,x,3", "number 2"},
        {"1,2.5", "number 2"},
        {"1,99999999999", "token id 2"},
        {"@/nonexistent/file", "/nonexistent/file"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct cli_tokens t;
        struct err_msg why = {""};
        assert_true(cli_parse_tokens(&t, bad[i].text, 1, &why) < 0);
        assert_non_null(strstr(why.text, bad[i].names));
        assert_null(t.ids);
    }
    static const char *const bad_json[] = {"{\"prompt\":5}", "{\"prompt\":[1,\"a\"]}",
                                           "{\"prompt\":", "{}"};
    for (size_t i = 0; i < sizeof bad_json / sizeof bad_json[0]; i++) {
        char path[64], word[80];
        struct cli_tokens t;
        struct err_msg why = {""};
        temp_file(path, sizeof path, bad_json[i]);
        (void)snprintf(word, sizeof word, "@%s", path);
        assert_true(cli_parse_tokens(&t, word, 1, &why) < 0);
        assert_true(why.text[0] != '\0');
        assert_true(cli_parse_tokens(&t, word, 3, &why) < 0);
        assert_non_null(strstr(why.text, "no line 3"));
        (void)unlink(path);
    }
}

static void sparse_modes(void **state)
{
    (void)state;
    struct sluice_request r;
    sluice_request_init(&r);
    assert_ok(cli_parse_sparse(&r, "dense", NULL));
    assert_int_equal(r.sparse, SLUICE_DENSE);
    assert_ok(cli_parse_sparse(&r, "k=35", NULL));
    assert_int_equal(r.sparse, SLUICE_ABS);
    assert_int_equal(r.k, 35);
    assert_ok(cli_parse_sparse(&r, "rel=0.5", NULL));
    assert_int_equal(r.sparse, SLUICE_REL);
    assert_close(r.ln_lambda, -0.6931471805599453, 1e-15, 0);
    assert_ok(cli_parse_sparse(&r, "auto", NULL));
    assert_int_equal(r.sparse, SLUICE_AUTO);
    assert_ok(cli_parse_sparse(&r, "abs:35", NULL));
    assert_int_equal(r.sparse, SLUICE_ABS);
    assert_int_equal(r.k, 35);
    assert_ok(cli_parse_sparse(&r, "rel:-0.001", NULL));
    assert_int_equal(r.sparse, SLUICE_REL);
    assert_close(r.ln_lambda, -0.001, 1e-15, 0);
    assert_ok(cli_parse_sparse(&r, "abs~0.25", NULL));
    assert_true(r.sparse == SLUICE_ABS && r.density == 0.25 && r.ln_lambda == 0);
    assert_ok(cli_parse_sparse(&r, "rel~1", NULL));
    assert_true(r.sparse == SLUICE_REL && r.density == 1);
    static const char *const tildes[] = {"abs~",    "abs~0",     "rel~1.1",
                                         "rel~nan", "dense~0.5", "k~0.5"};
    for (size_t i = 0; i < sizeof tildes / sizeof tildes[0]; i++)
        assert_true(cli_parse_sparse(&r, tildes[i], NULL) < 0);
    assert_ok(cli_parse_sparse(&r, "dense", NULL));
    assert_true(r.density == 0);
    assert_true(r.decode_density == 0);
    assert_ok(cli_parse_sparse(&r, "rel~0.2+decode~0.5", NULL));
    assert_true(r.sparse == SLUICE_REL && r.density == 0.2 && r.decode_density == 0.5);
    assert_ok(cli_parse_sparse(&r, "dense", NULL));
    assert_true(r.decode_density == 0);
    static const char *const tails[] = {"dense+decode",     "dense+decode~0",    "dense+decode~1.1",
                                        "dense+decode~nan", "dense+decode~0.5x", "k=3+decode:0.5"};
    for (size_t i = 0; i < sizeof tails / sizeof tails[0]; i++) {
        struct err_msg why = {""};
        assert_true(cli_parse_sparse(&r, tails[i], &why) < 0);
        assert_non_null(strstr(why.text, "+decode~D"));
    }
    static const char *const bad[] = {"",       "dens",     "k=",       "k=0",     "k=-1",
                                      "k=1.5",  "k=1e99",   "rel=0",    "rel=1",   "rel=nan",
                                      "rel=-1", "rel=0.5x", "abs:",     "abs:0",   "abs:1.5",
                                      "rel:0",  "rel:31",   "rel:-inf", "rel:-1x", "dense/64"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct err_msg why = {""};
        assert_true(cli_parse_sparse(&r, bad[i], &why) < 0);
        assert_non_null(strstr(why.text, "LAMBDA"));
    }
}

static void policies(void **state)
{
    (void)state;
    struct sluice_request r;
    const char *address = "";
    sluice_request_init(&r);
    assert_ok(cli_parse_policy(&r, &address, "rel:-0.5/64@tcp:[::1]:7", NULL));
    assert_int_equal(r.sparse, SLUICE_REL);
    assert_int_equal(r.gate_rows, 64);
    assert_string_equal(address, "tcp:[::1]:7");
    assert_true(r.decode_density == 0);
    assert_ok(cli_parse_policy(&r, &address, "rel:-0.5/64+decode~0.25@tcp:[::1]:8", NULL));
    assert_true(r.sparse == SLUICE_REL && r.gate_rows == 64 && r.decode_density == 0.25);
    assert_string_equal(address, "tcp:[::1]:8");
    assert_ok(cli_parse_policy(&r, &address, "abs:8/128", NULL));
    assert_int_equal(r.gate_rows, 128);
    assert_null(address);
    assert_ok(cli_parse_policy(&r, &address, "dense@unix:/a/64", NULL));
    assert_int_equal(r.sparse, SLUICE_DENSE);
    assert_int_equal(r.gate_rows, 0);
    assert_string_equal(address, "unix:/a/64");
    static const char *const bad[] = {"dense@", "abs:8/32", "abs:8/", "/64", "@unix:/a", "rel/64"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct err_msg why = {""};
        assert_true(cli_parse_policy(&r, &address, bad[i], &why) < 0);
        assert_true(why.text[0]);
    }
}

static void lengths(void **state)
{
    (void)state;
    int32_t n[3];
    assert_int_equal(cli_parse_lengths(n, 3, "8192, 16k,32K", NULL), 3);
    assert_int_equal(n[0], 8192);
    assert_int_equal(n[1], 16384);
    assert_int_equal(n[2], 32768);
    assert_int_equal(cli_parse_lengths(n, 3, "", NULL), 0);
    static const char *const bad[] = {"1,2,3,4", "0",        "-5",   "8x",         "k",
                                      "8kk",     "4000000k", "1.5k", "99999999999"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        assert_true(cli_parse_lengths(n, 3, bad[i], NULL) < 0);
}

static void lists(void **state)
{
    (void)state;
    int32_t ids[2];
    double p[3];
    struct report_slo slo;
    assert_int_equal(cli_parse_ids(ids, 2, NULL, NULL), 0);
    assert_int_equal(cli_parse_ids(ids, 2, "5,6", NULL), 2);
    assert_int_equal(ids[1], 6);
    assert_true(cli_parse_ids(ids, 2, "5,6,7", NULL) < 0);
    assert_int_equal(cli_parse_percentiles(p, 3, "50,99.9", NULL), 2);
    assert_close(p[1], 99.9, 0, 0);
    assert_true(cli_parse_percentiles(p, 3, "1,2,3,4", NULL) < 0);
    assert_true(cli_parse_percentiles(p, 3, "101", NULL) < 0);
    assert_ok(cli_parse_goodput(&slo, NULL, NULL));
    assert_false(slo.any);
    assert_ok(cli_parse_goodput(&slo, "ttft:500,e2el:2000", NULL));
    assert_true(slo.any && isinf(slo.tpot_ms));
    assert_close(slo.e2el_ms, 2000, 0, 0);
    assert_true(cli_parse_goodput(&slo, "itl:5", NULL) < 0);
    assert_true(cli_parse_goodput(&slo, "ttft:-1", NULL) < 0);
}

static void mixes(void **state)
{
    (void)state;
    struct load_class c[2];
    assert_int_equal(cli_parse_mix(c, 2, "131072:128:4,1024:64:60", NULL), 2);
    assert_int_equal(c[0].input_len, 131072);
    assert_int_equal(c[0].output_len, 128);
    assert_int_equal(c[0].count, 4);
    assert_int_equal(c[1].output_len, 64);
    assert_int_equal(c[1].count, 60);
    static const struct {
        const char *text, *names;
    } bad[] = {
        {"", "no requests"},
        {"1:2", "'1:2'"},
        {"1:2:3:4", "'1:2:3:4'"},
        {"0:2:3", "'0:2:3'"},
        {"1:2:x", "'1:2:x'"},
        {"1:-2:3", "'1:-2:3'"},
        {"1::3", "'1::3'"},
        {"99999999:1:1", "999999"},
        {"1:1:1,1:1:1,1:1:1", "at most 2"},
        {"1:1:9999999999", "'"},
        {"1:1:16777216,1:1:1", "too many"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct err_msg why = {""};
        assert_true(cli_parse_mix(c, 2, bad[i].text, &why) < 0);
        if (!strstr(why.text, bad[i].names))
            fail_msg("case %zu: '%s' does not name %s", i, why.text, bad[i].names);
    }
}

/* Every request of every class is there, none twice, in an order that the seed decides. */
static void mixed_load(void **state)
{
    (void)state;
    static const struct load_class classes[] = {{3000, 7, 10}, {20, 9, 90}};
    struct load a, b, other;
    int32_t n[2] = {0, 0}, moved = 0, early = 0;
    load_mix(&a, classes, 2, 5);
    load_mix(&b, classes, 2, 5);
    load_mix(&other, classes, 2, 6);
    assert_int_equal(a.n_requests, 100);
    for (int32_t i = 0; i < 100; i++) {
        const struct load_request *r = &a.requests[i];
        assert_in_range(r->class, 0, 1);
        assert_int_equal(r->input_len, classes[r->class].input_len);
        assert_int_equal(r->output_len, classes[r->class].output_len);
        assert_int_equal(r->class, b.requests[i].class);
        assert_true(r->streams[0].name == b.requests[i].streams[0].name);
        for (int32_t j = 0; j < i; j++)
            assert_true(r->streams[0].name != a.requests[j].streams[0].name);
        n[r->class]++;
        moved += r->class != other.requests[i].class;
        early += i < 50 && r->class == 0;
    }
    assert_int_equal(n[0], 10);
    assert_int_equal(n[1], 90);
    assert_true(moved > 0);
    assert_in_range(early, 1, 9);
    load_deinit(&a);
    load_deinit(&b);
    load_deinit(&other);
}

static void synthetic_load(void **state)
{
    (void)state;
    struct load_shape shape = {.n_requests = 200,
                               .input_len = 100,
                               .output_len = 10,
                               .range_ratio = 0.5,
                               .shared_prefix = 0.4,
                               .n_prefixes = 2,
                               .seed = 3};
    struct load a, b;
    int32_t x[150], y[150], groups[2] = {0, 0};
    load_synthetic(&a, &shape);
    load_synthetic(&b, &shape);
    load_tokens(&a.requests[0], 512, x);
    for (int32_t i = 0; i < a.n_requests; i++) {
        const struct load_request *r = &a.requests[i];
        assert_in_range(r->input_len, 50, 150);
        assert_in_range(r->output_len, 5, 15);
        assert_int_equal(r->input_len, b.requests[i].input_len);
        load_tokens(r, 512, y);
        int32_t same = 0;
        while (same < 50 && x[same] == y[same])
            same++;
        groups[same >= 40]++; /* of the first one's group, or of the other */
        assert_true(i == 0 || same >= 40 || same < 5);
        for (int32_t t = 0; t < r->input_len; t++)
            assert_in_range(y[t], 0, 511);
        load_tokens(&b.requests[i], 512, x);
        assert_memory_equal(x, y, (size_t)r->input_len * sizeof *x);
        load_tokens(&a.requests[0], 512, x);
    }
    assert_true(groups[0] > 60 && groups[1] > 60);
    load_deinit(&a);
    load_deinit(&b);
}

/* Mean and spread of the gaps are those of the gamma distribution, and the last arrival is at
 * n / rate. */
static void arrivals(void **state)
{
    (void)state;
    static const double shapes[] = {0.25, 1.0, 4.0};
    for (int k = 0; k < 3; k++) {
        struct load l;
        load_synthetic(&l,
                       &(struct load_shape){
                           .n_requests = 20000, .input_len = 1, .output_len = 1, .n_prefixes = 1});
        load_arrivals(&l, 50.0, shapes[k], 11);
        double mean = (double)l.requests[19999].at_us / 20000 / 1e6, square = 0;
        assert_close(mean, 0.02, 1e-7, 0);
        for (int i = 1; i < 20000; i++) {
            double gap = (double)(l.requests[i].at_us - l.requests[i - 1].at_us) / 1e6;
            assert_true(gap >= 0);
            square += (gap - mean) * (gap - mean);
        }
        /* The coefficient of variation is 1 / sqrt(shape). */
        assert_close(sqrt(square / 19999) / mean, 1 / sqrt(shapes[k]), 0, 0.06);
        load_arrivals(&l, HUGE_VAL, 1, 11);
        assert_int_equal(l.requests[19999].at_us, 0);
        load_deinit(&l);
    }
}

static void trace_load(void **state)
{
    (void)state;
    char path[64];
    struct load l;
    struct err_msg why = {""};
    temp_file(
        path, sizeof path,
        "{\"timestamp\":2000,\"input_length\":1100,\"output_length\":7,\"hash_ids\":[4,5,6]}\n"
        "{\"timestamp\":1000,\"input_length\":700,\"output_length\":0,\"hash_ids\":[4,9]}\n\n"
        "{\"timestamp\":1500,\"input_length\":600,\"output_length\":3}\n");
    assert_ok(load_trace(&l, path, 2.0, 0, &why));
    assert_int_equal(l.n_requests, 3);
    assert_int_equal(l.requests[0].input_len, 700); /* in the order of arrival */
    assert_int_equal(l.requests[0].output_len, 1);
    assert_int_equal(l.requests[1].at_us, 250000);
    assert_int_equal(l.requests[2].at_us, 500000);
    int32_t a[1100], b[1100];
    load_tokens(&l.requests[0], 1000, a);
    load_tokens(&l.requests[2], 1000, b);
    assert_memory_equal(a, b, 512 * sizeof *a); /* block 4 is block 4 */
    assert_memory_not_equal(a + 512, b + 512, 64 * sizeof *a);
    load_tokens(&l.requests[1], 1000, b);
    assert_memory_not_equal(a, b, 64 * sizeof *a);
    load_deinit(&l);
    assert_ok(load_trace(&l, path, 1.0, 2, &why));
    assert_int_equal(l.n_requests, 2);
    load_deinit(&l);
    (void)unlink(path);
}

static void bad_traces_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *text, *names;
    } bad[] = {
        {"", "no requests"},
        {"{\"timestamp\":0,\"input_length\":1,\"output_length\":1}\n{", "line 2"},
        {"{\"timestamp\":-1,\"input_length\":1,\"output_length\":1}", "timestamp"},
        {"{\"timestamp\":0,\"input_length\":0,\"output_length\":1}", "input_length"},
        {"{\"timestamp\":0,\"input_length\":1e99,\"output_length\":1}", "input_length"},
        {"{\"timestamp\":0,\"input_length\":1,\"output_length\":\"x\"}", "output_length"},
        {"{\"timestamp\":0,\"input_length\":1,\"output_length\":1,\"hash_ids\":3}", "hash_ids"},
        {"{\"timestamp\":0,\"input_length\":1,\"output_length\":1,\"hash_ids\":[null]}",
         "hash_ids"},
        {"[]", "timestamp"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char path[64];
        struct load l;
        struct err_msg why = {""};
        temp_file(path, sizeof path, bad[i].text);
        assert_true(load_trace(&l, path, 1.0, 0, &why) < 0);
        if (!strstr(why.text, bad[i].names))
            fail_msg("case %zu: '%s' does not name %s", i, why.text, bad[i].names);
        assert_null(l.requests);
        (void)unlink(path);
    }
}

static void percentiles_are_numpys(void **state)
{
    (void)state;
    double v[] = {9, 1, 4, 7, 2}; /* numpy.percentile(v, p) */
    assert_close(report_percentile(v, 5, 0), 1, 0, 0);
    assert_close(report_percentile(v, 5, 50), 4, 0, 0);
    assert_close(report_percentile(v, 5, 90), 8.2, 1e-12, 0);
    assert_close(report_percentile(v, 5, 99), 8.92, 1e-12, 0);
    assert_close(report_percentile(v, 5, 100), 9, 0, 0);
    assert_close(report_percentile(v, 1, 30), 1, 0, 0);
    assert_close(report_percentile(v, 0, 30), 0, 0, 0);
}

/* Three requests in a run of 10 s: one of 3 tokens, one of a single token, one failed. */
static void example(struct bench_sample s[3])
{
    static double itls[] = {0.5, 1.5};
    memset(s, 0, 3 * sizeof *s);
    s[0] = (struct bench_sample){.ok = true,
                                 .input_len = 100,
                                 .output_len = 3,
                                 .cached = 64,
                                 .start_s = 0,
                                 .ttft_s = 1,
                                 .latency_s = 3,
                                 .itls = itls,
                                 .n_itls = 2,
                                 .reachable = 100,
                                 .kept = 40,
                                 .preemptions = 1};
    s[1] = (struct bench_sample){.ok = true,
                                 .input_len = 50,
                                 .output_len = 1,
                                 .start_s = 3,
                                 .ttft_s = 2,
                                 .latency_s = 2,
                                 .queue_s = 0.25,
                                 .reachable = 100,
                                 .kept = 100};
    s[2] = (struct bench_sample){.input_len = 999, .start_s = 1, .error = "QUEUE_FULL: no"};
}

static void figures(void **state)
{
    (void)state;
    struct bench_sample s[3];
    struct report r;
    struct report_options o = {.duration_s = 10,
                               .request_rate = HUGE_VAL,
                               .max_concurrency = 2,
                               .slo = {true, 1500, 1100, HUGE_VAL},
                               .percentiles = {50, 99},
                               .n_percentiles = 2};
    example(s);
    report_compute(&r, s, 3, &o);
    assert_int_equal(r.completed, 2);
    assert_int_equal(r.failed, 1);
    assert_int_equal(r.total_input, 150);
    assert_int_equal(r.total_output, 4);
    assert_close(r.request_throughput, 0.2, 1e-12, 0);
    assert_close(r.request_goodput, 0.1, 1e-12, 0); /* the second misses its TTFT */
    assert_close(r.output_throughput, 0.4, 1e-12, 0);
    assert_close(r.total_token_throughput, 15.4, 1e-12, 0);
    assert_close(r.series[REPORT_TTFT].mean, 1500, 1e-9, 0);
    assert_close(r.series[REPORT_TTFT].std, 500, 1e-9, 0);
    assert_close(r.series[REPORT_TPOT].mean, 1000, 1e-9,
                 0); /* (3 - 1) / 2; the other is left out */
    assert_close(r.series[REPORT_ITL].median, 1000, 1e-9, 0);
    assert_close(r.series[REPORT_ITL].percentiles[1], 1490, 1e-9, 0);
    assert_close(r.series[REPORT_E2EL].mean, 2500, 1e-9, 0);
    assert_close(r.series[REPORT_QUEUE].mean, 125, 1e-9, 0);
    assert_int_equal(r.peak_concurrent, 1);  /* one ends as the other starts */
    assert_close(r.peak_output, 2, 1e-9, 0); /* at 1.0 and 1.5 */
    assert_close(r.density, 0.7, 1e-12, 0);
    assert_int_equal(r.total_cached, 64);
    report_compute(&r, s + 2, 1, &o); /* nothing succeeded: zeros, no NaN */
    assert_close(r.series[REPORT_TTFT].mean, 0, 0, 0);
    assert_close(r.peak_output, 0, 0, 0);
}

/* A long request and a short one beside it: the figures of each kind are its own. */
static void figures_of_a_mix(void **state)
{
    (void)state;
    static const struct load_class classes[] = {{100, 3, 1}, {50, 1, 2}};
    struct bench_sample s[3];
    struct report r;
    struct report_options o = {.duration_s = 10,
                               .request_rate = HUGE_VAL,
                               .percentiles = {99},
                               .n_percentiles = 1,
                               .classes = classes,
                               .n_classes = 2};
    char *text = NULL, path[64];
    size_t len = 0;
    example(s);
    s[1].class = s[2].class = 1;
    report_compute(&r, s, 3, &o);
    assert_int_equal(r.completed, 2);
    assert_int_equal(r.classes[0].completed, 1);
    assert_int_equal(r.classes[0].failed, 0);
    assert_close(r.classes[0].series[REPORT_TTFT].median, 1000, 1e-9, 0);
    assert_close(r.classes[0].series[REPORT_TPOT].mean, 1000, 1e-9, 0);
    assert_close(r.classes[0].series[REPORT_ITL].percentiles[0], 1490, 1e-9, 0);
    assert_close(r.classes[0].density, 0.4, 1e-12, 0);
    assert_int_equal(r.classes[1].completed, 1);
    assert_int_equal(r.classes[1].failed, 1);
    assert_close(r.classes[1].series[REPORT_TTFT].percentiles[0], 2000, 1e-9, 0);
    assert_close(r.classes[1].series[REPORT_ITL].mean, 0, 0, 0);
    assert_close(r.classes[1].density, 1, 0, 0);

    FILE *f = open_memstream(&text, &len);
    report_print(&r, &o, f);
    (void)fclose(f);
    const char *long_part = strstr(text, " Prompts of 100, 3 generated "),
               *short_part = strstr(text, " Prompts of 50, 1 generated ");
    assert_true(long_part && short_part && long_part < short_part);
    const char *line = strstr(short_part, "P99 TTFT (ms):");
    assert_true(line && strtod(line + strlen("P99 TTFT (ms):"), NULL) > 1999.9);
    free(text);

    temp_file(path, sizeof path, "");
    assert_ok(report_write_json(&r, &o, s, 3, path, NULL));
    json_t *j = json_load_file(path, 0, NULL);
    int input, completed, failed;
    double ttft;
    assert_int_equal(json_unpack(j, "{s:[{}, {s:i, s:i, s:i, s:F}]}", "classes", "input_len",
                                 &input, "completed", &completed, "failed", &failed, "p99_ttft_ms",
                                 &ttft),
                     0);
    assert_int_equal(input, 50);
    assert_int_equal(completed + failed, 2);
    assert_close(ttft, 2000, 1e-9, 0);
    assert_int_equal(json_array_size(json_object_get(j, "classes")), 2);
    json_decref(j);
    (void)unlink(path);
}

/* What vLLM's benchmark prints, and its keys. */
static const char *const labels[] = {"============ Serving Benchmark Result ============",
                                     "Successful requests:",
                                     "Failed requests:",
                                     "Maximum request concurrency:",
                                     "Request rate configured (RPS):",
                                     "Benchmark duration (s):",
                                     "Total input tokens:",
                                     "Total generated tokens:",
                                     "Request throughput (req/s):",
                                     "Request goodput (req/s):",
                                     "Output token throughput (tok/s):",
                                     "Peak output token throughput (tok/s):",
                                     "Peak concurrent requests:",
                                     "Total token throughput (tok/s):",
                                     "---------------Time to First Token----------------",
                                     "Mean TTFT (ms):",
                                     "P99 TTFT (ms):",
                                     "-----Time per Output Token (excl. 1st token)------",
                                     "Median TPOT (ms):",
                                     "---------------Inter-token Latency----------------",
                                     "P99.9 ITL (ms):",
                                     "----------------End-to-end Latency----------------",
                                     "Mean E2EL (ms):",
                                     "Measured density:",
                                     "Prefix cache hit rate (%):"};
static const char *const keys[] = {"duration",
                                   "completed",
                                   "failed",
                                   "total_input_tokens",
                                   "total_output_tokens",
                                   "request_throughput",
                                   "request_goodput",
                                   "output_throughput",
                                   "total_token_throughput",
                                   "mean_ttft_ms",
                                   "median_tpot_ms",
                                   "std_itl_ms",
                                   "p99_e2el_ms",
                                   "p99.9_ttft_ms",
                                   "input_lens",
                                   "output_lens",
                                   "ttfts",
                                   "itls",
                                   "start_times",
                                   "errors",
                                   "density",
                                   "cached_tokens"};

static void results_have_vllms_names(void **state)
{
    (void)state;
    struct bench_sample s[3];
    struct report r;
    struct report_options o = {.duration_s = 10,
                               .request_rate = 5,
                               .max_concurrency = 2,
                               .slo = {true, 1500, 1100, 9000},
                               .percentiles = {99, 99.9},
                               .n_percentiles = 2};
    char *text = NULL, path[64];
    size_t len = 0;
    example(s);
    report_compute(&r, s, 3, &o);
    FILE *f = open_memstream(&text, &len);
    report_print(&r, &o, f);
    (void)fclose(f);
    for (size_t i = 0; i < sizeof labels / sizeof labels[0]; i++) {
        if (!strstr(text, labels[i]))
            fail_msg("no line '%s' in\n%s", labels[i], text);
    }
    free(text);
    temp_file(path, sizeof path, "");
    assert_ok(report_write_json(&r, &o, s, 3, path, NULL));
    json_t *j = json_load_file(path, 0, NULL);
    assert_non_null(j);
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        if (!json_object_get(j, keys[i]))
            fail_msg("no key %s", keys[i]);
    }
    assert_int_equal(json_array_size(json_array_get(json_object_get(j, "itls"), 0)), 2);
    assert_string_equal(json_string_value(json_array_get(json_object_get(j, "errors"), 2)),
                        "QUEUE_FULL: no");
    json_decref(j);
    (void)unlink(path);
    struct err_msg why = {""};
    assert_true(report_write_json(&r, &o, s, 3, "/nonexistent/x", &why) < 0);
    assert_non_null(strstr(why.text, "/nonexistent/x"));
}

/* The object that scripts read: the keys and types the documentation promises. */
static void generate_json(void **state)
{
    (void)state;
    int32_t ids[] = {5, 6};
    struct sluice_logprob lp[2] = {
        {.token = 5, .logprob = -0.5f, .n_top = 2, .top_ids = {5, 9}, .top_logprobs = {-0.5f, -1}},
        {.token = 6, .logprob = -2, .n_top = 0}};
    struct sluice_event e = {.type = SLUICE_TOKENS, .id = "1"};
    struct generate_result r = {.start_us = 1000, .end_us = 3500};
    e.u.tokens.n = 1;
    e.u.tokens.ids = ids;
    e.u.tokens.logprobs = lp;
    generate_result_add(&r, &e);
    e.u.tokens.first = 1;
    e.u.tokens.ids = ids + 1;
    e.u.tokens.logprobs = lp + 1;
    generate_result_add(&r, &e);
    e = (struct sluice_event){.type = SLUICE_DONE, .id = "1"};
    e.u.done.reason = SLUICE_STOP;
    e.u.done.stop_token = 2;
    e.u.done.prompt_tokens = 10;
    e.u.done.ttft_us = 1500;
    e.u.done.reachable = 8;
    e.u.done.kept = 2;
    e.u.done.decode_reachable = 10;
    e.u.done.decode_kept = 1;
    e.u.done.lost_mass_samples = 32;
    e.u.done.lost_mass = 0.125;
    generate_result_add(&r, &e);

    char *text = NULL;
    size_t len = 0;
    FILE *f = open_memstream(&text, &len);
    assert_ok(generate_result_json(&r, f));
    (void)fclose(f);
    assert_true(len > 0 && strchr(text, '\n') == text + len - 1); /* one line */
    json_t *j = json_loads(text, 0, NULL);
    double logprob, top, density, decode, lost, ttft, client;
    const char *reason;
    int tokens[2], top_id, stop, prompt, completion;
    assert_int_equal(json_unpack(j,
                                 "{s:[ii], s:[{s:i, s:F, s:[[iF],[iF]]}, {}], s:s, s:i, s:{s:i, "
                                 "s:i}, s:{s:F, s:F}, s:F, s:F, s:F}",
                                 "tokens", &tokens[0], &tokens[1], "logprobs", "token", &top_id,
                                 "logprob", &logprob, "top", &top_id, &top, &top_id, &top,
                                 "finish_reason", &reason, "stop_token", &stop, "usage",
                                 "prompt_tokens", &prompt, "completion_tokens", &completion,
                                 "timing_ms", "ttft", &ttft, "client", &client, "density", &density,
                                 "decode_density", &decode, "lost_mass", &lost),
                     0);
    assert_int_equal(tokens[1], 6);
    assert_int_equal(top_id, 9);
    assert_close(logprob, -0.5, 0, 0);
    assert_close(top, -1, 0, 0);
    assert_string_equal(reason, "stop");
    assert_int_equal(completion, 2);
    assert_close(ttft, 1.5, 1e-12, 0);
    assert_close(client, 2.5, 1e-12, 0);
    assert_close(density, 0.25, 1e-12, 0);
    assert_close(decode, 0.1, 1e-12, 0);
    assert_close(lost, 0.125, 0, 0);
    json_decref(j);
    free(text);
    generate_result_deinit(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tokens_are_read_in_every_form),
        cmocka_unit_test(bad_tokens_are_named),
        cmocka_unit_test(sparse_modes),
        cmocka_unit_test(policies),
        cmocka_unit_test(lengths),
        cmocka_unit_test(lists),
        cmocka_unit_test(mixes),
        cmocka_unit_test(mixed_load),
        cmocka_unit_test(synthetic_load),
        cmocka_unit_test(arrivals),
        cmocka_unit_test(trace_load),
        cmocka_unit_test(bad_traces_are_refused),
        cmocka_unit_test(percentiles_are_numpys),
        cmocka_unit_test(figures),
        cmocka_unit_test(figures_of_a_mix),
        cmocka_unit_test(results_have_vllms_names),
        cmocka_unit_test(generate_json),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
