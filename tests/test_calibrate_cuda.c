/* Calibrating on a GPU, with the model that ships: thresholds of a prompt keep exactly k pages of
 * each block in the first layer, where the gate has not changed the input yet, and are those of the
 * CPU but for the number format. What a dense run counts for the REL gate is what the gate does
 * there, and what the CPU counts, likewise. Exit status 77: no device. */
#include "tests/cuda_case.h"

#include "calibration/calib_run.h"
#include "calibration/thresholds.h"
#include "core/mem.h"

enum { N_TOKENS = 1900, FULL = N_TOKENS / 128, LEVELS = 3 };
static const int32_t levels[LEVELS] = {2, 5, 14};

struct fixture {
    struct model *model;
    struct calib_run *run;
    int32_t tokens[N_TOKENS];
    size_t n; /* thresholds */
};

static void open_model(struct fixture *f, struct dev *on, int32_t chunk)
{
    struct err_msg why = {""};
    struct rng r = {99};
    const struct model_config cfg = {.dir = TEST_ROOT "/models/needle",
                                     .dev = on,
                                     .dtype = MODEL_DTYPE_AUTO,
                                     .kv_dtype = MODEL_DTYPE_AUTO,
                                     .max_seqs = 1,
                                     .max_tokens = chunk,
                                     .max_position = N_TOKENS};
    if (model_open(&f->model, &cfg, &why) < 0 ||
        calib_run_create(&f->run, f->model, N_TOKENS, chunk, &why) < 0)
        fail_msg("%s", why.text);
    for (int32_t i = 0; i < N_TOKENS; i++)
        f->tokens[i] = rng_range(&r, 16, 511);
    const struct model_info *info = model_info(f->model);
    f->n = (size_t)LEVELS * (size_t)info->n_layers * (size_t)info->n_heads * FULL;
}

static void close_model(struct fixture *f)
{
    calib_run_destroy(f->run);
    model_close(f->model);
}

static float *calibrate(struct fixture *f, struct dev *on, int32_t gate_rows)
{
    const struct model_info *info = model_info(f->model);
    const struct batch_policy dense = {.gate = BATCH_DENSE, .gate_rows = (uint8_t)gate_rows};
    const struct calib_config cfg = {.n_layers = info->n_layers,
                                     .n_heads = info->n_heads,
                                     .n_blocks = FULL,
                                     .gate_rows = gate_rows,
                                     .k = levels,
                                     .n_levels = LEVELS,
                                     .pool = on->pool,
                                     .dev = on == dev ? on : NULL};
    struct err_msg why = {""};
    struct calib *c = NULL;
    float *t = mem_zalloc(f->n, sizeof *t);
    assert_ok(calib_create(&c, &cfg, &why));
    if (calib_run_sample(f->run, c, dense, f->tokens, N_TOKENS, &why) < 0)
        fail_msg("%s", why.text);
    assert_ok(calib_thresholds(c, t, &why));
    calib_destroy(c);
    return t;
}

static struct attn_policy policy_of(const struct fixture *f, const float *t)
{
    const struct model_info *info = model_info(f->model);
    const int64_t layer = (int64_t)info->n_heads * FULL;
    return (struct attn_policy){.abs = {.t = t,
                                        .n_levels = LEVELS,
                                        .n_layers = info->n_layers,
                                        .n_heads = info->n_heads,
                                        .n_blocks = FULL,
                                        .level_stride = info->n_layers * layer,
                                        .layer_stride = layer,
                                        .head_stride = FULL}};
}

static void keeps_k_in_layer_0(void **state)
{
    (void)state;
    for (int32_t chunk = 256; chunk <= 2048; chunk *= 8) {
        struct fixture f;
        struct attn_counts before[64];
        open_model(&f, dev, chunk);
        const int32_t n_heads = model_info(f.model)->n_heads;
        float *t = calibrate(&f, dev, 128);
        struct attn_policy policy = policy_of(&f, t);
        assert_ok(model_set_policy(f.model, &policy, NULL));
        for (int32_t level = 0; level < LEVELS; level++) {
            const struct batch_policy gated = {
                .gate = BATCH_ABS, .gate_rows = 128, .level = (int16_t)level};
            const double want = thresholds_predicted_density(levels[level], FULL * 128, 128);
            memcpy(before, model_head_counts(f.model), (size_t)n_heads * sizeof *before);
            assert_ok(calib_run_prompt(f.run, f.tokens, FULL * 128, gated, NULL));
            for (int32_t h = 0; h < n_heads; h++) {
                const struct attn_counts *now = &model_head_counts(f.model)[h];
                const double reachable = (double)(now->reachable - before[h].reachable);
                assert_close((double)(now->kept - before[h].kept), want * reachable, 1e-6, 0);
            }
        }
        mem_free(t);
        close_model(&f);
    }
}

static void like_the_cpu(void **state)
{
    (void)state;
    struct dev *cpu = NULL;
    assert_ok(dev_open(&cpu, &dev_cpu, 0, 4, NULL));
    for (int32_t gate_rows = 64; gate_rows <= 128; gate_rows += 64) {
        struct fixture a, b;
        double worst = 0, sum = 0;
        long n = 0;
        open_model(&a, cpu, 512);
        open_model(&b, dev, 640);
        float *want = calibrate(&a, cpu, gate_rows), *got = calibrate(&b, dev, gate_rows);
        for (size_t i = 0; i < a.n; i++) {
            assert_int_equal(isinf(got[i]), isinf(want[i]));
            if (isinf(want[i]))
                continue;
            const double d = fabs((double)got[i] - (double)want[i]);
            worst = d > worst ? d : worst;
            sum += d;
            n++;
        }
        printf("gate rows %d: %ld thresholds, differences %.3f on average, %.3f at most\n",
               gate_rows, n, sum / (double)n, worst);
        assert_true(n > 1000 && sum / (double)n < 0.1);
        mem_free(want);
        mem_free(got);
        close_model(&a);
        close_model(&b);
    }
    dev_close(cpu);
}

/* Share of layer 0's decisions that a gated run skips, by counters before and after it. */
static double skipped_by_gate(struct fixture *f, int32_t gate_rows, int32_t trial)
{
    const int32_t n_heads = model_info(f->model)->n_heads;
    const struct batch_policy gated = {
        .gate = BATCH_REL, .gate_rows = (uint8_t)gate_rows, .ln_lambda = calib_rel_trials()[trial]};
    /* pages before full blocks, and before the cut one, of which there are more than 64 rows */
    const double off = (double)FULL * (FULL - 1) + 2.0 * FULL;
    struct attn_counts before[64];
    double skipped = 0;
    assert_true(n_heads <= 64);
    memcpy(before, model_head_counts(f->model), (size_t)n_heads * sizeof *before);
    assert_ok(calib_run_prompt(f->run, f->tokens, N_TOKENS, gated, NULL));
    for (int32_t h = 0; h < n_heads; h++) {
        const struct attn_counts *now = &model_head_counts(f->model)[h];
        skipped +=
            (double)(now->visited - before[h].visited) - (double)(now->kept - before[h].kept);
    }
    return skipped / (off * (gate_rows == 64 ? 2 : 1) * n_heads);
}

/* Mean over the heads of the first n layers. */
static double skipped_by_counts(const struct fixture *f, const struct calib_rel *rel,
                                int32_t gate_rows, int32_t trial, int32_t n_layers)
{
    const int32_t n_heads = model_info(f->model)->n_heads;
    double sum = 0;
    for (int32_t i = 0; i < n_layers * n_heads; i++)
        sum += calib_rel_skipped(rel, gate_rows, trial, i / n_heads, i % n_heads);
    return sum / (n_layers * n_heads);
}

static void rel_counts_are_the_gates_and_the_cpus(void **state)
{
    struct fixture f, c;
    struct calib_rel *got = NULL, *want = NULL;
    struct dev *cpu = NULL;
    double some = 0;
    (void)state;
    assert_ok(dev_open(&cpu, &dev_cpu, 0, 4, NULL));
    open_model(&f, dev, 640);
    open_model(&c, cpu, 512);
    const struct model_info *info = model_info(f.model);
    calib_rel_create(&got, info->n_layers, info->n_heads);
    calib_rel_create(&want, info->n_layers, info->n_heads);
    assert_ok(calib_run_rel(f.run, got, f.tokens, N_TOKENS, NULL));
    assert_ok(calib_run_rel(c.run, want, c.tokens, N_TOKENS, NULL));
    for (int32_t i = 0; i < 8; i++) {
        const int32_t gate_rows = i & 1 ? 128 : 64, trial = CALIB_REL_BELOW_1 - 1 - i / 2 * 3;
        const double counted = skipped_by_counts(&f, got, gate_rows, trial, 1);
        const double by_cpu = skipped_by_counts(&f, want, gate_rows, trial, info->n_layers);
        const double all = skipped_by_counts(&f, got, gate_rows, trial, info->n_layers);
        const double by_gate = skipped_by_gate(&f, gate_rows, trial);
        printf("# rows %d trial %d: layer 0 counted %.4f, gated %.4f; all %.4f, on the CPU %.4f\n",
               gate_rows, trial, counted, by_gate, all, by_cpu);
        assert_close(counted, by_gate, 0.002, 0);
        assert_close(all, by_cpu, 0.03, 0);
        some += counted;
    }
    assert_true(some > 0);
    calib_rel_destroy(got);
    calib_rel_destroy(want);
    close_model(&f);
    close_model(&c);
    dev_close(cpu);
}

/* Counts are of dense runs, with a bin a lane. */
static void rel_refusals(void **state)
{
    struct fixture f;
    float edges[32];
    const struct batch_policy gated = {.gate = BATCH_REL, .gate_rows = 128};
    (void)state;
    open_model(&f, dev, 256);
    const struct model_info *info = model_info(f.model);
    const size_t n = (size_t)info->n_layers * 2 * (size_t)info->n_heads * 33;
    uint64_t *bins = mem_zalloc(n, sizeof *bins);
    for (int i = 0; i < 32; i++)
        edges[i] = (float)(i - 32);
    struct attn_rel_counts counts = {edges, 32, bins};
    assert_int_equal(model_count_rel(f.model, &counts), ERR_INVALID);
    counts.n_edges = 31;
    assert_ok(model_count_rel(f.model, &counts));
    assert_int_equal(calib_run_prompt(f.run, f.tokens, 256, gated, NULL), ERR_UNSUPPORTED);
    assert_ok(model_count_rel(f.model, NULL));
    assert_ok(calib_run_prompt(f.run, f.tokens, 256, gated, NULL));
    for (size_t i = 0; i < n; i++)
        assert_true(bins[i] == 0);
    mem_free(bins);
    close_model(&f);
}

/* Each device refuses the other's probe. */
static void refusals(void **state)
{
    (void)state;
    struct fixture f;
    open_model(&f, dev, 256);
    assert_int_equal(model_probe_tiles(f.model, 128, calib_tiles, NULL), ERR_UNSUPPORTED);
    assert_int_equal(model_probe_tiles_dev(f.model, 32, calib_tiles_dev, NULL), ERR_INVALID);
    close_model(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keeps_k_in_layer_0),
        cmocka_unit_test(like_the_cpu),
        cmocka_unit_test(rel_counts_are_the_gates_and_the_cpus),
        cmocka_unit_test(rel_refusals),
        cmocka_unit_test(refusals),
    };
    if (!have_device())
        return 77;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
