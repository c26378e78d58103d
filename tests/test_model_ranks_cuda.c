/* A model over several GPUs beside the CPU's in f32: whole and captured steps, generated rows with
 * a gate and without, logits put together from the ranks' slices of vocabularies that do not
 * divide; and one GPU's greedy tokens beside several's, with prompts long enough that their steps
 * are split. One process a GPU: every rank is a forked child whose exit status reports; only
 * children touch CUDA. */
#include "tests/test.h"

#include "core/dev_cuda.h"
#include "parallel/comm_nccl.h"
#include "tests/model_case.h"
#include "tests/rank_script.h"
#include "tests/tiny_model.h"

#include <jansson.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_RANKS = 4, MAX_POSITION = 512, TIMEOUT_MS = 30000, LIFE_S = 150, STATUS_OK = 7 };

/* In a child: prints and ends the rank's function. */
#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            (void)fprintf(stderr, "%s:%d: rank failed: %s\n", __FILE__, __LINE__, #cond);          \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

struct told;

struct job {
    char shm[64];
    const struct tiny_model *tiny; /* for run_steps; NULL: told */
    const char *dir;
    struct told *told; /* memory shared with the parent */
    int n_ranks;
    int32_t max_tokens, max_position, n_pages;
};

static int n_devices(void)
{
    int status;
    (void)fflush(NULL);
    pid_t pid = fork();
    if (pid == 0)
        _exit(dev_cuda_count());
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

static int open_comm(struct comm **out, const struct job *j, int rank, struct err_msg *why)
{
    struct comm *host = NULL;
    const struct comm_shm_config shm = {
        .name = j->shm,
        .rank = rank,
        .n_ranks = j->n_ranks,
        .max_floats = 4096,
        .max_msg = model_plan_bytes(CASE_MAX_SEQS, j->max_tokens, j->max_position),
        .timeout_ms = TIMEOUT_MS};
    TRY(comm_shm_create(&host, &shm, why));
    const struct comm_nccl_config cfg = {
        .host = host, .device = rank, .timeout_ms = TIMEOUT_MS, .one_host = true};
    int err = comm_nccl_create(out, &cfg, why);
    if (err < 0)
        comm_close(host);
    return err;
}

static int open_model(struct model_case *c, struct comm *comm, const struct job *j,
                      struct err_msg *why)
{
    const struct model_config cfg = {.dir = j->dir,
                                     .dev = c->dev,
                                     .comm = comm,
                                     .dtype = MODEL_DTYPE_AUTO,
                                     .kv_dtype = MODEL_DTYPE_AUTO,
                                     .max_seqs = CASE_MAX_SEQS,
                                     .max_tokens = j->max_tokens,
                                     .max_position = j->max_position};
    TRY(model_open(&c->model, &cfg, why));
    TRY(model_take_pages(c->model, j->n_pages, why));
    c->result = (struct batch_result){.tokens = c->tokens, .counts = c->counts};
    return 0;
}

/* Thresholds of generated rows, -inf or +inf by head, each rank's others. */
static int set_decode(struct model *m, struct err_msg *why)
{
    enum { HEADS = 8, MAX_LAYERS = 4, PATTERN = 0xb2 };
    static float t[MAX_LAYERS * HEADS];
    const struct model_info *info = model_info(m);
    const int32_t n = info->n_layers * HEADS;
    CHECK(info->n_heads == HEADS && info->n_layers <= MAX_LAYERS);
    for (int32_t i = 0; i < n; i++)
        t[i] = ((PATTERN >> i % HEADS) + i / HEADS) & 1 ? INFINITY : -INFINITY;
    const struct attn_policy policy = {.decode = {.t = t,
                                                  .n_levels = 1,
                                                  .n_layers = info->n_layers,
                                                  .n_heads = HEADS,
                                                  .n_blocks = 1,
                                                  .level_stride = n,
                                                  .layer_stride = HEADS,
                                                  .head_stride = 1}};
    return model_set_policy(m, &policy, why);
}

/* The largest logit's place, and its lead over the next. */
static int32_t best_of(const float *x, int32_t n, double *lead)
{
    int32_t best = 0;
    *lead = INFINITY;
    for (int32_t i = 1; i < n; i++)
        best = x[i] > x[best] ? i : best;
    for (int32_t i = 0; i < n; i++)
        *lead = i == best ? *lead : fmin(*lead, (double)x[best] - (double)x[i]);
    return best;
}

/* Logits within `bound` of the largest; the token is the likeliest, and the CPU's where the lead
 * is beyond the error. */
static int check_sequence(const struct model_case *gpu, const struct model_case *cpu, int32_t i,
                          int32_t vocab, double bound)
{
    const float *got = model_last_logits(gpu->model, i), *want = model_last_logits(cpu->model, i);
    double most = 0.0, worst = 0.0, lead, cpu_lead;

    CHECK(!got == !want);
    CHECK(memcmp(&gpu->counts[i], &cpu->counts[i], sizeof cpu->counts[i]) == 0);
    if (!want)
        return 0;
    for (int32_t k = 0; k < vocab; k++) {
        CHECK(isfinite(got[k]));
        most = fmax(most, fabs((double)want[k]));
        worst = fmax(worst, fabs((double)got[k] - (double)want[k]));
    }
    CHECK(worst <= bound * most);
    CHECK(gpu->tokens[i].token == best_of(got, vocab, &lead));
    const int32_t best = best_of(want, vocab, &cpu_lead);
    CHECK(cpu_lead <= 2.0 * worst || gpu->tokens[i].token == best);
    return 0;
}

static int run_steps(struct model_case *gpu, struct model_case *cpu, const struct tiny_model *tiny)
{
    const double bound = tiny->dtype == DTYPE_F16 ? 0.01 : 0.05;
    struct rank_script s;

    for (int round = 0; round < 2; round++) { /* nothing of the first is left in the second */
        rank_script_init(&s, tiny->vocab);
        for (int32_t step = 0; step < SCRIPT_STEPS; step++) {
            rank_script_step(&s, step);
            for (int32_t i = 0; i < s.n_seqs; i++) { /* all, some or none */
                const bool gated =
                    step % 3 == 1 ? (s.seqs[i].id + (uint64_t)round) % 2 : step % 3 == 0;
                s.seqs[i].policy.decode_gate = gated ? BATCH_ABS : BATCH_DENSE;
            }
            CHECK(case_step(gpu, s.seqs, s.n_seqs) == 0);
            CHECK(case_step(cpu, s.seqs, s.n_seqs) == 0);
            for (int32_t i = 0; i < s.n_seqs; i++)
                CHECK(check_sequence(gpu, cpu, i, tiny->vocab, bound) == 0);
            rank_script_grow(&s, cpu->tokens);
        }
    }
    return 0;
}

/* ---- one GPU's greedy tokens beside several's ---- */

enum {
    LONG_PROMPT = 3968,
    LONG_CHUNK = 2048,
    LONG_OUT = 24,
    MAX_VOCAB = 512,
    N_MODES = 3,
    NEEDLE_SAME = 19 /* an answer */
};

/* What one number of ranks made of a prompt: the logits that each token was chosen from. */
struct told_mode {
    int32_t tokens[LONG_OUT];
    float logits[LONG_OUT][MAX_VOCAB];
    struct batch_counts prompt; /* of its chunks */
};

enum { MIXED_PROMPT = 1536, MIXED_KNOWN = 100, MIXED_PAGES = LONG_PROMPT / 64 + 2 };

struct told {
    int32_t vocab;
    bool split; /* the steps ran in halves */
    struct told_mode modes[N_MODES];
    float mixed[N_MODES][2][MAX_VOCAB];
};

static const struct batch_policy long_policies[N_MODES] = {
    {.gate = BATCH_DENSE, .gate_rows = 128},
    {.gate = BATCH_REL, .gate_rows = 128, .ln_lambda = -4.0f, .lost_mass = true},
    {.gate = BATCH_REL, .gate_rows = 128, .ln_lambda = -4.0f},
};

/* The chain of variables among the folder's sample prompts, or random tokens where it has none. */
static int read_prompt(const char *dir, int32_t tokens[LONG_PROMPT], int32_t vocab)
{
    enum { SAMPLE = 8 };
    struct rng g = {11};
    char path[4128], *line = NULL;
    size_t room = 0;
    (void)snprintf(path, sizeof path, "%s/samples.jsonl", dir);
    FILE *f = fopen(path, "r");
    for (int32_t i = 0; i < LONG_PROMPT; i++)
        tokens[i] = 3 + (int32_t)(rng_u64(&g) % (uint64_t)(vocab - 3));
    if (!f)
        return 0;
    for (int i = 0; i <= SAMPLE; i++)
        CHECK(getline(&line, &room, f) > 0);
    json_t *sample = json_loads(line, 0, NULL);
    const json_t *prompt = json_object_get(sample, "prompt");
    CHECK(json_array_size(prompt) == LONG_PROMPT);
    for (size_t i = 0; i < LONG_PROMPT; i++)
        tokens[i] = (int32_t)json_integer_value(json_array_get(prompt, i));
    json_decref(sample);
    free(line);
    return fclose(f);
}

static int tell_mode(struct model_case *c, struct told_mode *out, const struct batch_policy *policy,
                     const char *dir, int32_t vocab)
{
    static int32_t tokens[LONG_PROMPT + LONG_OUT], pages[LONG_PROMPT / 64 + 2];
    const int32_t n_pages = (int32_t)(sizeof pages / sizeof *pages);

    CHECK(read_prompt(dir, tokens, vocab) == 0);
    for (int32_t i = 0; i < n_pages; i++)
        pages[i] = i * 7 % n_pages;
    for (int32_t at = 0, made = 0, n; made < LONG_OUT; at += n) {
        const int32_t left = LONG_PROMPT - at;
        n = left > LONG_CHUNK ? LONG_CHUNK : left > 0 ? left : 1;
        struct batch_seq s = case_seq(tokens, at, n, LONG_PROMPT, pages, n_pages);
        s.policy = *policy;
        s.sample = at + n >= LONG_PROMPT;
        CHECK(case_step(c, &s, 1) == 0);
        if (at < LONG_PROMPT) {
            out->prompt.reachable += c->counts[0].reachable;
            out->prompt.kept += c->counts[0].kept;
            out->prompt.sampled += c->counts[0].sampled;
            out->prompt.lost += c->counts[0].lost;
        }
        if (!s.sample)
            continue;
        memcpy(out->logits[made], model_last_logits(c->model, 0), (size_t)vocab * sizeof(float));
        tokens[at + n] = out->tokens[made] = c->tokens[0].token;
        made++;
    }
    return 0;
}

/* A generated row before a prompt's: halves then begin at an odd row, inside the prompt. */
static int tell_mixed(struct model_case *c, float out[2][MAX_VOCAB],
                      const struct batch_policy *policy, int32_t vocab)
{
    static int32_t known[MIXED_KNOWN + 1], prompt[MIXED_PROMPT], pages[MIXED_PAGES];
    const int32_t own = MIXED_KNOWN / 64 + 1;
    struct rng g = {12};
    for (int32_t i = 0; i < MIXED_PAGES; i++)
        pages[i] = (i * 5 + 3) % MIXED_PAGES;
    for (int32_t i = 0; i < MIXED_PROMPT; i++)
        prompt[i] = 3 + (int32_t)(rng_u64(&g) % (uint64_t)(vocab - 3));
    memcpy(known, prompt + 7, sizeof known);
    struct batch_seq first = case_seq(known, 0, MIXED_KNOWN, MIXED_KNOWN, pages, own);
    first.policy = *policy;
    CHECK(case_step(c, &first, 1) == 0);
    struct batch_seq both[2] = {
        case_seq(known, MIXED_KNOWN, 1, MIXED_KNOWN, pages, own),
        case_seq(prompt, 0, MIXED_PROMPT, MIXED_PROMPT, pages + own, MIXED_PAGES - own)};
    for (int i = 0; i < 2; i++) {
        both[i].id = (uint64_t)i + 1;
        both[i].policy = *policy;
        both[i].sample = true;
    }
    CHECK(case_step(c, both, 2) == 0);
    for (int i = 0; i < 2; i++)
        memcpy(out[i], model_last_logits(c->model, i), (size_t)vocab * sizeof(float));
    return 0;
}

static int tell(struct model_case *c, struct told *out, const char *dir, const struct comm *comm)
{
    out->vocab = model_info(c->model)->vocab_size;
    out->split = comm && comm_overlaps(comm);
    CHECK(out->vocab <= MAX_VOCAB);
    for (int i = 0; i < N_MODES; i++) {
        CHECK(tell_mode(c, &out->modes[i], &long_policies[i], dir, out->vocab) == 0);
        CHECK(tell_mixed(c, out->mixed[i], &long_policies[i], out->vocab) == 0);
    }
    return 0;
}

static void compare_mixed(const struct told *one, const struct told *many, int mode)
{
    for (int s = 0; s < 2; s++) {
        const float *a = one->mixed[mode][s], *b = many->mixed[mode][s];
        double worst = 0.0, most = 0.0;
        for (int32_t k = 0; k < one->vocab; k++) {
            assert_true(isfinite(a[k]) && isfinite(b[k]));
            most = fmax(most, fabs((double)a[k]));
            worst = fmax(worst, fabs((double)a[k] - (double)b[k]));
        }
        printf("# mixed, sequence %d: logits within %.2g of %.2g\n", s, worst, most);
        assert_true(most > 0.0 && worst <= 0.05 * most);
    }
}

/* At least so many tokens are the same; where the lead is within the error of 16-bit sums they may
 * part, and what follows is another text. */
static void compare_mode(const struct told *one, const struct told *many, int mode, const char *dir,
                         int32_t least)
{
    const struct told_mode *a = &one->modes[mode], *b = &many->modes[mode];
    int32_t i = 0;
    double worst = 0.0, most = 0.0, lead = 0.0;

    for (; i < LONG_OUT; i++) {
        for (int32_t k = 0; k < one->vocab; k++) {
            assert_true(isfinite(a->logits[i][k]) && isfinite(b->logits[i][k]));
            most = fmax(most, fabs((double)a->logits[i][k]));
            worst = fmax(worst, fabs((double)a->logits[i][k] - (double)b->logits[i][k]));
        }
        assert_true(worst <= 0.05 * most);
        assert_int_equal(a->tokens[i], best_of(a->logits[i], one->vocab, &lead));
        if (a->tokens[i] != b->tokens[i])
            break;
    }
    printf("# %s, %s: %d of %d tokens the same, logits within %.2g of %.2g\n", dir,
           mode == 0   ? "dense"
           : mode == 1 ? "REL, measured"
                       : "REL",
           i, LONG_OUT, worst, most);
    assert_true(i >= least);
    if (i < LONG_OUT && lead > 2.0 * worst)
        fail_msg("token %d: %d, not %d, by %g", i, b->tokens[i], a->tokens[i], lead);
    assert_true(a->prompt.reachable == b->prompt.reachable);
    const double kept = fabs((double)a->prompt.kept - (double)b->prompt.kept);
    assert_true(kept <= 0.02 * (double)a->prompt.reachable); /* a gate near its threshold */
    assert_true(a->prompt.sampled == b->prompt.sampled && (a->prompt.sampled > 0) == (mode == 1));
    assert_true(fabs(a->prompt.lost - b->prompt.lost) <= 0.01 * (double)a->prompt.sampled);
}

/* ---- ranks ---- */

static int open_all(const struct job *j, int rank, struct model_case *gpu, struct model_case *cpu,
                    struct comm **comm)
{
    struct err_msg why = {""};
    int err = dev_open(&gpu->dev, &dev_cuda, rank, 2, &why);
    if (err == 0 && j->n_ranks > 1)
        err = open_comm(comm, j, rank, &why);
    if (err == 0)
        err = open_model(gpu, *comm, j, &why);
    if (err == 0 && rank == 0 && j->tiny)
        err = dev_open(&cpu->dev, &dev_cpu, 0, 2, &why);
    if (err == 0 && rank == 0 && j->tiny)
        err = open_model(cpu, NULL, j, &why);
    if (err == 0 && j->tiny)
        err = set_decode(gpu->model, &why);
    if (err == 0 && cpu->model)
        err = set_decode(cpu->model, &why);
    if (err < 0)
        (void)fprintf(stderr, "rank %d: %s\n", rank, err_why(&why, err));
    return err;
}

static int live(const struct job *j, int rank)
{
    struct model_case gpu = {0}, cpu = {0};
    struct comm *comm = NULL;
    int status = 0;

    if (open_all(j, rank, &gpu, &cpu, &comm) < 0)
        return 2;
    if (rank > 0)
        CHECK(model_follow(gpu.model) == 0);
    else
        status = j->tiny ? run_steps(&gpu, &cpu, j->tiny) : tell(&gpu, j->told, j->dir, comm);
    model_stop_followers(gpu.model);
    model_case_close(&cpu);
    model_close(gpu.model);
    comm_close(comm);
    dev_close(gpu.dev);
    return status;
}

static void live_together(struct job j)
{
    pid_t pids[MAX_RANKS];
    assert_ok(comm_shm_name(j.shm, sizeof j.shm));
    for (int r = 0; r < j.n_ranks; r++) {
        (void)fflush(NULL);
        pids[r] = fork();
        assert_true(pids[r] >= 0);
        if (pids[r] == 0) {
            (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
            (void)alarm(LIFE_S);
            int status = live(&j, r);
            _exit(status ? status : STATUS_OK);
        }
    }
    for (int r = 0; r < j.n_ranks; r++) {
        int status;
        assert_int_equal(waitpid(pids[r], &status, 0), pids[r]);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != STATUS_OK)
            fail_msg("rank %d of %d: wait status %#x", r, j.n_ranks, status);
    }
}

/* least: tokens that are the same on all. */
static void compare_ranks(const char *dir, int32_t least)
{
    const size_t bytes = sizeof(struct told);
    struct told *told[2];
    for (int i = 0; i < 2; i++) {
        told[i] = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        assert_true(told[i] != MAP_FAILED);
    }
    struct job j = {.dir = dir,
                    .told = told[0],
                    .n_ranks = 1,
                    .max_tokens = LONG_CHUNK,
                    .max_position = LONG_PROMPT + LONG_OUT,
                    .n_pages = LONG_PROMPT / 64 + 2};
    live_together(j);
    j.told = told[1];
    for (j.n_ranks = 2; j.n_ranks <= n_devices() && j.n_ranks <= MAX_RANKS; j.n_ranks *= 2) {
        memset(told[1], 0, bytes);
        live_together(j);
        assert_true(told[1]->split && !told[0]->split);
        for (int mode = 0; mode < N_MODES; mode++) {
            compare_mode(told[0], told[1], mode, dir, least);
            compare_mixed(told[0], told[1], mode);
        }
    }
    for (int i = 0; i < 2; i++)
        (void)munmap(told[i], bytes);
}

static void test_same_tokens(void **state)
{
    const char *root = getenv("SLUICE_ROOT"); // NOLINT(concurrency-mt-unsafe): one thread
    char needle[4096];
    static struct tiny_model tiny = {
        512, 512, 1024, 4, 8, 4, 64, .llama3 = true, .dtype = DTYPE_BF16, .seed = 9};
    (void)state;
    tiny_model_write(&tiny);
    compare_ranks(tiny.dir, 0);
    tiny_model_remove(&tiny);
    (void)snprintf(needle, sizeof needle, "%s/models/needle", root ? root : TEST_ROOT);
    if (n_devices() < 4) /* it has two KV heads and six of queries */
        compare_ranks(needle, NEEDLE_SAME);
}

/* Slices that are full and ragged, of an output projection of its own and of the embedding; with
 * four ranks the last slice of 33 tokens is empty. */
static void test_ranks(void **state)
{
    static struct tiny_model tiny[] = {
        {512, 256, 512, 2, 8, 4, 64, .dtype = DTYPE_BF16, .seed = 1},
        {1001, 256, 512, 2, 8, 4, 64, .tied = true, .dtype = DTYPE_F16, .seed = 2},
        {509, 512, 512, 2, 8, 4, 128, .biases = true, .llama3 = true, .dtype = DTYPE_BF16,
         .seed = 3},
        {33, 256, 512, 1, 8, 4, 64, .tied = true, .dtype = DTYPE_BF16, .seed = 4},
    };
    const int n = n_devices();
    (void)state;
    for (size_t i = 0; i < sizeof tiny / sizeof *tiny; i++) {
        tiny_model_write(&tiny[i]);
        for (int n_ranks = 2; n_ranks <= n && n_ranks <= MAX_RANKS; n_ranks *= 2)
            live_together((struct job){.tiny = &tiny[i],
                                       .dir = tiny[i].dir,
                                       .n_ranks = n_ranks,
                                       .max_tokens = SCRIPT_MAX_TOKENS,
                                       .max_position = MAX_POSITION,
                                       .n_pages = SCRIPT_PAGES});
        tiny_model_remove(&tiny[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_ranks),
                                       cmocka_unit_test(test_same_tokens)};
    if (n_devices() < 2) {
        (void)printf("fewer than two GPUs\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
