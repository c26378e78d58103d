/* Calibrating on a GPU, with the model that ships: thresholds of a prompt keep exactly k pages of
 * each block in the first layer, where the gate has not changed the input yet, and are those of the
 * CPU but for the number format. Exit status 77: no device. */
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
        cmocka_unit_test(refusals),
    };
    if (!have_device())
        return 77;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
