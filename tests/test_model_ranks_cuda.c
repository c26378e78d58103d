/* A model over several GPUs beside the CPU's in f32: whole and captured steps, logits put together
 * from the ranks' slices of vocabularies that do not divide. One process a GPU: every rank is a
 * forked child whose exit status reports; only children touch CUDA. */
#include "tests/test.h"

#include "core/dev_cuda.h"
#include "parallel/comm_nccl.h"
#include "tests/model_case.h"
#include "tests/rank_script.h"
#include "tests/tiny_model.h"

#include <signal.h>
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

struct job {
    char shm[64];
    const struct tiny_model *tiny;
    int n_ranks;
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
        .max_msg = model_plan_bytes(CASE_MAX_SEQS, SCRIPT_MAX_TOKENS, MAX_POSITION),
        .timeout_ms = TIMEOUT_MS};
    TRY(comm_shm_create(&host, &shm, why));
    const struct comm_nccl_config cfg = {
        .host = host, .device = rank, .timeout_ms = TIMEOUT_MS, .one_host = true};
    int err = comm_nccl_create(out, &cfg, why);
    if (err < 0)
        comm_close(host);
    return err;
}

static int open_model(struct model_case *c, struct comm *comm, const char *dir, struct err_msg *why)
{
    const struct model_config cfg = {.dir = dir,
                                     .dev = c->dev,
                                     .comm = comm,
                                     .dtype = MODEL_DTYPE_AUTO,
                                     .kv_dtype = MODEL_DTYPE_AUTO,
                                     .max_seqs = CASE_MAX_SEQS,
                                     .max_tokens = SCRIPT_MAX_TOKENS,
                                     .max_position = MAX_POSITION};
    TRY(model_open(&c->model, &cfg, why));
    TRY(model_take_pages(c->model, SCRIPT_PAGES, why));
    c->result = (struct batch_result){.tokens = c->tokens, .counts = c->counts};
    return 0;
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
            CHECK(case_step(gpu, s.seqs, s.n_seqs) == 0);
            CHECK(case_step(cpu, s.seqs, s.n_seqs) == 0);
            for (int32_t i = 0; i < s.n_seqs; i++)
                CHECK(check_sequence(gpu, cpu, i, tiny->vocab, bound) == 0);
            rank_script_grow(&s, cpu->tokens);
        }
    }
    return 0;
}

static int live(const struct job *j, int rank)
{
    struct model_case gpu = {0}, cpu = {0};
    struct err_msg why = {""};
    struct comm *comm = NULL;
    int status = 0;

    int err = dev_open(&gpu.dev, &dev_cuda, rank, 2, &why);
    if (err == 0)
        err = open_comm(&comm, j, rank, &why);
    if (err == 0)
        err = open_model(&gpu, comm, j->tiny->dir, &why);
    if (err == 0 && rank == 0)
        err = dev_open(&cpu.dev, &dev_cpu, 0, 2, &why);
    if (err == 0 && rank == 0)
        err = open_model(&cpu, NULL, j->tiny->dir, &why);
    if (err < 0) {
        (void)fprintf(stderr, "rank %d: %s\n", rank, err_why(&why, err));
        return 2;
    }
    if (rank == 0)
        status = run_steps(&gpu, &cpu, j->tiny);
    else
        CHECK(model_follow(gpu.model) == 0);
    model_stop_followers(gpu.model);
    model_case_close(&cpu);
    model_close(gpu.model);
    comm_close(comm);
    dev_close(gpu.dev);
    return status;
}

static void live_together(const struct tiny_model *tiny, int n_ranks)
{
    struct job j = {.tiny = tiny, .n_ranks = n_ranks};
    pid_t pids[MAX_RANKS];
    assert_ok(comm_shm_name(j.shm, sizeof j.shm));
    for (int r = 0; r < n_ranks; r++) {
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
    for (int r = 0; r < n_ranks; r++) {
        int status;
        assert_int_equal(waitpid(pids[r], &status, 0), pids[r]);
        if (!WIFEXITED(status) || WEXITSTATUS(status) != STATUS_OK)
            fail_msg("rank %d of %d: wait status %#x", r, n_ranks, status);
    }
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
            live_together(&tiny[i], n_ranks);
        tiny_model_remove(&tiny[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_ranks)};
    if (n_devices() < 2) {
        (void)printf("fewer than two GPUs\n");
        return 77;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
