/* The calibrator on the model that ships: what is calibrated on a prompt, then applied to the same
 * prompt, keeps exactly k pages in the first layer, where the gate has not changed the input yet;
 * chunks do not change a bit; thresholds survive the file. */
#include "tests/test.h"

#include "calibration/calib_run.h"
#include "calibration/thresholds.h"
#include "core/mem.h"

#include <unistd.h>

enum { N_TOKENS = 1100, FULL = N_TOKENS / 128, LEVELS = 2 };
static const int32_t levels[LEVELS] = {2, 5};

struct fixture {
    struct dev *dev;
    struct model *model;
    struct calib_run *run;
    int32_t tokens[N_TOKENS];
    size_t n; /* thresholds */
};

static void open_model(struct fixture *f, int32_t chunk)
{
    struct err_msg why = {""};
    struct rng r = {99};
    struct model_config cfg = {.dir = TEST_ROOT "/models/needle",
                               .kv_dtype = DTYPE_F32,
                               .max_seqs = 1,
                               .max_tokens = chunk,
                               .max_position = N_TOKENS};
    assert_ok(dev_open(&f->dev, &dev_cpu, 0, 2, &why));
    cfg.dev = f->dev;
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
    dev_close(f->dev);
}

/* Thresholds of the one prompt; released with mem_free. */
static float *calibrate(struct fixture *f, int32_t gate_rows)
{
    const struct model_info *info = model_info(f->model);
    struct err_msg why = {""};
    struct calib *c = NULL;
    struct calib_config cfg = {info->n_layers, info->n_heads, FULL,         gate_rows,
                               levels,         LEVELS,        f->dev->pool, NULL};
    float *t = mem_zalloc(f->n, sizeof *t);
    assert_ok(calib_create(&c, &cfg, &why));
    const struct batch_policy dense = {.gate = BATCH_DENSE, .gate_rows = (uint8_t)gate_rows};
    if (calib_run_sample(f->run, c, dense, f->tokens, N_TOKENS, &why) < 0)
        fail_msg("%s", why.text);
    assert_ok(calib_thresholds(c, t, &why));
    calib_destroy(c);
    return t;
}

static struct attn_policy policy_of(const struct fixture *f, const float *t)
{
    const struct model_info *info = model_info(f->model);
    int64_t layer = (int64_t)info->n_heads * FULL;
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
    struct fixture f;
    struct attn_counts before[64];
    open_model(&f, 256);
    const int32_t n_heads = model_info(f.model)->n_heads;
    float *t = calibrate(&f, 128);
    struct attn_policy policy = policy_of(&f, t);
    assert_ok(model_set_policy(f.model, &policy, NULL));
    for (int32_t level = 0; level < LEVELS; level++) {
        struct batch_policy choice = {.gate = BATCH_ABS, .gate_rows = 128, .level = (int16_t)level};
        struct batch_counts counts;
        double k_density = thresholds_predicted_density(levels[level], FULL * 128, 128);
        memcpy(before, model_head_counts(f.model), (size_t)n_heads * sizeof *before);
        /* Only full blocks: the cut one at the end has its own maxima. */
        assert_ok(calib_run_prompt(f.run, f.tokens, FULL * 128, choice, &counts));
        for (int32_t h = 0; h < n_heads; h++) {
            const struct attn_counts *now = &model_head_counts(f.model)[h];
            uint64_t kept = now->kept - before[h].kept;
            uint64_t reachable = now->reachable - before[h].reachable;
            assert_close((double)kept, k_density * (double)reachable, 1e-6, 0);
        }
        assert_true(counts.kept < counts.reachable && counts.visited == counts.reachable);
    }
    mem_free(t);
    close_model(&f);
}

/* Thresholds of the text's last n_rows rows; released with mem_free. */
static float *calibrate_rows(struct fixture *f, int32_t n_tokens, int32_t n_rows)
{
    const struct model_info *info = model_info(f->model);
    struct err_msg why = {""};
    struct calib *c = NULL;
    struct calib_config cfg = {info->n_layers, info->n_heads, FULL,         1,
                               levels,         LEVELS,        f->dev->pool, NULL};
    float *t = mem_zalloc(f->n, sizeof *t);
    assert_ok(calib_create(&c, &cfg, &why));
    if (calib_run_rows(f->run, c, f->tokens, n_tokens, n_rows, &why) < 0)
        fail_msg("%s", why.text);
    assert_ok(calib_thresholds(c, t, &why));
    calib_destroy(c);
    return t;
}

/* A generated row at a block's end, under thresholds that were made of it, keeps k pages and its
 * own. */
static void a_row_keeps_k_in_layer_0(void **state)
{
    (void)state;
    enum { AVAILABLE = 2 * (FULL - 1) + 1 };
    struct fixture f;
    struct attn_counts before[64];
    struct batch_counts counts[LEVELS];
    open_model(&f, 256);
    const int32_t n_heads = model_info(f.model)->n_heads;
    float *t = calibrate_rows(&f, FULL * 128, 1);
    const struct attn_policy policy = {.decode = policy_of(&f, t).abs};
    assert_ok(model_set_policy(f.model, &policy, NULL));
    memcpy(before, model_head_counts(f.model), (size_t)n_heads * sizeof *before);
    assert_ok(calib_run_generated(f.run, f.tokens, FULL * 128, 1, LEVELS, counts));
    for (int32_t h = 0; h < n_heads; h++) {
        const struct attn_counts *now = &model_head_counts(f.model)[h];
        const uint64_t left = (now->reachable - before[h].reachable) - (now->kept - before[h].kept);
        assert_int_equal(left, 2 * AVAILABLE - levels[0] - levels[1]);
    }
    for (int32_t level = 0; level < LEVELS; level++) {
        const uint64_t heads = (uint64_t)(model_info(f.model)->n_layers * n_heads);
        assert_int_equal(counts[level].reachable, (AVAILABLE + 1) * heads);
        assert_true(counts[level].kept < counts[level].reachable);
    }
    assert_int_equal(calib_run_generated(f.run, f.tokens, FULL * 128, 257, LEVELS, counts),
                     ERR_TOO_LONG);
    mem_free(t);
    close_model(&f);
}

static void same_bits_in_any_chunk(void **state)
{
    (void)state;
    static const int32_t chunks[] = {128, 640, 2048}, rows[] = {128, 64, 1};
    for (size_t k = 0; k < sizeof rows / sizeof *rows; k++) {
        float *t[3];
        size_t n = 0;
        for (int i = 0; i < 3; i++) {
            struct fixture f;
            open_model(&f, chunks[i]);
            t[i] = rows[k] == 1 ? calibrate_rows(&f, N_TOKENS, 20) : calibrate(&f, rows[k]);
            n = f.n;
            close_model(&f);
        }
        assert_memory_equal(t[0], t[1], n * sizeof(float));
        assert_memory_equal(t[0], t[2], n * sizeof(float));
        for (int i = 0; i < 3; i++)
            mem_free(t[i]);
    }
}

static void file_fits_model(void **state)
{
    (void)state;
    struct fixture f;
    struct err_msg why = {""};
    struct thresholds *file = NULL;
    char path[] = "/tmp/sluice-cal-XXXXXX";
    open_model(&f, 512);
    const struct model_info *info = model_info(f.model);
    float *t = calibrate(&f, 64);
    struct thresholds_meta meta = {.model = info->fingerprint,
                                   .set = 1,
                                   .gate_rows = 64,
                                   .n_max = FULL * 128,
                                   .n_samples = 1,
                                   .softmax_scale = info->softmax_scale};
    memcpy(meta.rope, info->rope, sizeof meta.rope);
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    (void)close(fd);
    assert_ok(
        thresholds_save(path, &meta, t, levels, LEVELS, info->n_layers, info->n_heads, FULL, &why));
    if (thresholds_load(&file, path, &why) < 0)
        fail_msg("%s", why.text);
    struct thresholds_expect expect = {info->fingerprint, info->n_layers, info->n_heads,
                                       info->softmax_scale, info->rope};
    assert_ok(thresholds_check(file, &expect, &why));
    assert_memory_equal(thresholds_view(file)->t, t, f.n * sizeof *t);
    (void)unlink(path);
    thresholds_free(file);
    mem_free(t);
    close_model(&f);
}

/* Steered to a mean density, a prompt keeps it, wherever lambda begins, and its heads are where the
 * steps have them; within a page of the ten that its blocks reach. */
static void steered_runs_keep_their_density(const struct fixture *f, const struct calib_rel *rel)
{
    const struct model_info *info = model_info(f->model);
    const size_t n = (size_t)info->n_layers * (size_t)info->n_heads;
    struct attn_counts before[64];
    float *steps = mem_alloc(CALIB_REL_STEPS * n * sizeof *steps);
    const struct thresholds_rel_heads heads = {steps, calib_rel_steps(rel, 128, steps)};
    struct attn_policy policy = {.order = ATTN_ORDER_DIAG_SINK_R2L};
    policy.rel_128 = thresholds_rel_heads_view(&heads, info->n_layers, info->n_heads);
    assert_true(n <= sizeof before / sizeof *before && heads.n_steps > 4);
    assert_ok(model_set_policy(f->model, &policy, NULL));
    for (int i = 0; i < 2; i++) {
        struct batch_policy steered = {
            .gate = BATCH_REL, .gate_rows = 128, .ln_lambda = i ? 0 : -2, .steer = 3};
        struct batch_counts counts;
        assert_true(thresholds_rel_steer(&policy.rel_128, 0.6, N_TOKENS, &steered));
        const size_t level = (size_t)steered.level;
        memcpy(before, model_head_counts(f->model), n * sizeof *before);
        assert_ok(calib_run_prompt(f->run, f->tokens, N_TOKENS, steered, &counts));
        printf("# from %g: kept %.3f\n", (double)steered.ln_lambda,
               (double)counts.kept / (double)counts.reachable);
        assert_close((double)counts.kept / (double)counts.reachable, 0.6, 0.08, 0);
        for (size_t h = 0; h + (size_t)info->n_heads < n; h++) {
            const struct attn_counts *now = &model_head_counts(f->model)[h];
            const double kept = (double)(now->kept - before[h].kept);
            const double want = (1 - (double)steered.blend) * (double)steps[level * n + h] +
                                (double)steered.blend * (double)steps[(level + 1) * n + h];
            assert_close(kept / (double)(now->reachable - before[h].reachable), want, 0.15, 0);
        }
    }
    mem_free(steps);
}

/* What a dense run counts for the REL gate is what the gate does in the first layer. */
static void rel_counts_in_layer_0_and_steps(void **state)
{
    (void)state;
    struct fixture f;
    struct attn_counts before[64];
    struct calib_rel *rel = NULL;
    uint64_t skipped = 0;
    open_model(&f, 256);
    const struct model_info *info = model_info(f.model);
    calib_rel_create(&rel, info->n_layers, info->n_heads);
    assert_ok(calib_run_rel(f.run, rel, f.tokens, N_TOKENS, NULL));
    for (int32_t trial = 3; trial < CALIB_REL_BELOW_1; trial += 8) {
        const struct batch_policy gated = {
            .gate = BATCH_REL, .gate_rows = 64, .ln_lambda = calib_rel_trials()[trial]};
        memcpy(before, model_head_counts(f.model), (size_t)info->n_heads * sizeof *before);
        assert_ok(calib_run_prompt(f.run, f.tokens, N_TOKENS, gated, NULL));
        for (int32_t h = 0; h < info->n_heads; h++) {
            const struct attn_counts *now = &model_head_counts(f.model)[h];
            const uint64_t left = (now->visited - before[h].visited) - (now->kept - before[h].kept);
            const double off =
                2.0 * FULL * (FULL - 1) + 2.0 * FULL; /* and a cut block of 2 groups */
            assert_close((double)left, calib_rel_skipped(rel, 64, trial, 0, h) * (off + 2.0 * FULL),
                         1e-6, 1e-9);
            skipped += left;
        }
    }
    assert_true(skipped > 0);
    steered_runs_keep_their_density(&f, rel);
    calib_rel_destroy(rel);
    close_model(&f);
}

/* The mass that reaches the calibrator is softmax mass: with all pages before the block lost, no
 * row loses more than it has, and probing leaves the thresholds' bits alone. In the first layer,
 * where the gate has not changed the input yet, each head keeps the k that was chosen for it. */
static void each_head_keeps_its_own_k(void **state)
{
    (void)state;
    struct fixture f;
    struct err_msg why = {""};
    struct attn_counts before[64];
    struct calib *c = NULL;
    struct calib_mass *mass = NULL;
    int32_t k[CALIB_MAX_LEVELS], head_k[64 * 64];
    open_model(&f, 256);
    const struct model_info *info = model_info(f.model);
    const int32_t n_heads = info->n_heads, rows = info->n_layers * n_heads;
    struct calib_config cfg = {info->n_layers, n_heads, FULL, 128, k, 0, f.dev->pool, NULL};
    cfg.n_levels = calib_mass_candidates(k, FULL);
    float *all = mem_zalloc((size_t)cfg.n_levels * (size_t)rows * FULL, sizeof *all);
    float *t = mem_zalloc(f.n, sizeof *t);
    assert_ok(calib_create(&c, &cfg, &why));
    calib_mass_create(&mass, &cfg);
    if (calib_run_mass(f.run, c, mass, 128, f.tokens, N_TOKENS, &why) < 0)
        fail_msg("%s", why.text);
    assert_ok(calib_mass_end_sample(mass, N_TOKENS, &why));
    assert_ok(calib_thresholds(c, all, &why));
    calib_mass_choose(mass, 0.6, FULL * 128, head_k);
    int32_t least = head_k[0], most = head_k[0];
    for (int32_t i = 0; i < rows; i++) {
        const double lost = calib_mass_lost(mass, i, 1);
        assert_true(lost > 0 && lost < 1 && calib_mass_lost(mass, i, k[cfg.n_levels - 1]) < lost);
        for (int32_t s = 0; s < cfg.n_levels; s++) {
            if (k[s] == head_k[i])
                memcpy(t + (size_t)i * FULL, all + ((size_t)s * (size_t)rows + (size_t)i) * FULL,
                       FULL * sizeof *t);
        }
        least = head_k[i] < least ? head_k[i] : least;
        most = head_k[i] > most ? head_k[i] : most;
    }
    assert_true(most > least + 1);
    struct attn_policy policy = policy_of(&f, t);
    assert_ok(model_set_policy(f.model, &policy, NULL));
    const struct batch_policy choice = {.gate = BATCH_ABS, .gate_rows = 128};
    memcpy(before, model_head_counts(f.model), (size_t)n_heads * sizeof *before);
    assert_ok(calib_run_prompt(f.run, f.tokens, FULL * 128, choice, NULL));
    for (int32_t h = 0; h < n_heads; h++) {
        const struct attn_counts *now = &model_head_counts(f.model)[h];
        const double reachable = (double)(now->reachable - before[h].reachable);
        assert_close((double)(now->kept - before[h].kept),
                     thresholds_predicted_density(head_k[h], FULL * 128, 128) * reachable, 1e-6, 0);
    }
    calib_mass_destroy(mass);
    calib_destroy(c);
    mem_free(all);
    mem_free(t);
    close_model(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keeps_k_in_layer_0),
        cmocka_unit_test(a_row_keeps_k_in_layer_0),
        cmocka_unit_test(same_bits_in_any_chunk),
        cmocka_unit_test(file_fits_model),
        cmocka_unit_test(rel_counts_in_layer_0_and_steps),
        cmocka_unit_test(each_head_keeps_its_own_k),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
