#include "tests/model_case.h"

#include "tests/test.h"

const struct batch_sampling case_greedy = {
    .top_p = 1.0f, .repetition_penalty = 1.0f, .ignore_eos = true};

void model_case_open(struct model_case *c, const char *dir, int n_threads, int32_t max_tokens,
                     int64_t max_position, int32_t n_pages, enum dtype kv_dtype)
{
    struct err_msg why = {{0}};
    *c = (struct model_case){0};
    assert_ok(dev_open(&c->dev, &dev_cpu, 0, n_threads, &why));
    const struct model_config cfg = {.dir = dir,
                                     .dev = c->dev,
                                     .kv_dtype = kv_dtype,
                                     .max_seqs = CASE_MAX_SEQS,
                                     .max_tokens = max_tokens,
                                     .max_position = max_position};
    int err = model_open(&c->model, &cfg, &why);
    if (err < 0)
        fail_msg("%s: %s", dir, err_why(&why, err));
    assert_ok(model_take_pages(c->model, n_pages, &why));
    c->result = (struct batch_result){.tokens = c->tokens, .counts = c->counts};
}

void model_case_close(struct model_case *c)
{
    model_close(c->model);
    dev_close(c->dev);
}

struct batch_seq case_seq(const int32_t *tokens, int32_t start, int32_t n, int32_t prompt_len,
                          const int32_t *pages, int32_t n_pages)
{
    return (struct batch_seq){.id = 1,
                              .tokens = tokens,
                              .start = start,
                              .n_tokens = n,
                              .prompt_len = prompt_len,
                              .pages = pages,
                              .n_pages = n_pages,
                              .policy = {.gate = BATCH_DENSE, .gate_rows = 128},
                              .sample = true,
                              .sampling = &case_greedy};
}

int case_step(struct model_case *c, const struct batch_seq *seqs, int32_t n_seqs)
{
    struct batch b = {.step_id = 1, .n_seqs = n_seqs, .seqs = seqs, .all_rows = c->all_rows};
    for (int32_t i = 0; i < n_seqs; i++)
        b.n_tokens += seqs[i].n_tokens;
    return model_step(c->model, &b, &c->result);
}
