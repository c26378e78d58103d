/* Logits of a model at the ends of given prompts, as raw numbers, for comparison with other
 * implementations (logits_peer.py). A prompt is a line of token ids; all but its last `steps` are
 * prefilled, in chunks, and these are then fed one by one, as generated tokens are. Written are
 * f32 [prompts, steps + 1, vocab_size]: after the prefill and after every step. */
#include "cmd/device.h"
#include "core/conf.h"
#include "core/log.h"
#include "core/mem.h"
#include "model/model.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TOKENS = 1 << 20 };

struct options {
    char *model, *device, *tokens, *out;
    int64_t steps, chunk, threads, max_len;
    int dtype;
};

#define AT(f) offsetof(struct options, f)

// clang-format off
static const struct conf_opt opts[] = {
    {"model", CONF_TEXT, AT(model), "models/needle", 0, 0, {0}, "DIR", "the model"},
    {"tokens", CONF_TEXT, AT(tokens), NULL, 0, 0, {0}, "FILE", "a prompt a line, ids separated by spaces"},
    {"out", CONF_TEXT, AT(out), NULL, 0, 0, {0}, "FILE", "where the logits go"},
    {"steps", CONF_INT, AT(steps), "8", 0, 1024, {0}, "N", "tokens of a prompt that are fed one by one"},
    {"chunk", CONF_INT, AT(chunk), "2048", 1, 1e6, {0}, "N", "tokens a step of prefill"},
    {"max-len", CONF_INT, AT(max_len), "16384", 1, MAX_TOKENS, {0}, "N", "longest prompt"},
    {"device", CONF_TEXT, AT(device), "auto", 0, 0, {0}, "DEVICE", DEVICE_HELP},
    {"dtype", CONF_ENUM, AT(dtype), "auto", 0, 0, DEVICE_DTYPES, NULL, "number format of weights, activations and cache"},
    {"threads", CONF_INT, AT(threads), "0", 0, 1024, {0}, "N", "0: one a processor"},
};
// clang-format on

static const struct conf_program program = {"model_logits --tokens FILE --out FILE [options]",
                                            "Writes a model's logits.", opts,
                                            sizeof opts / sizeof *opts};

static const struct batch_sampling greedy = {
    .top_p = 1.0f, .repetition_penalty = 1.0f, .ignore_eos = true};

struct run {
    const struct options *o;
    struct dev *dev;
    struct model *model;
    int32_t *tokens, *pages, n_tokens;
    struct batch_token token;
    struct batch_counts counts;
    FILE *in, *out;
};

/* Token ids of the next line, or 0 at the end of the file. */
static int read_line(struct run *r, struct err_msg *why)
{
    char *line = NULL, *at, *end;
    size_t room = 0;
    int err = 0;
    r->n_tokens = 0;
    if (getline(&line, &room, r->in) < 0) {
        free(line);
        return 0;
    }
    for (at = line; err == 0; at = end) {
        long id = strtol(at, &end, 10);
        if (end == at)
            break;
        if (id < 0 || id >= model_info(r->model)->vocab_size || r->n_tokens == r->o->max_len)
            err = err_set(why, ERR_CONFIG, "token %d of a prompt: %ld", r->n_tokens, id);
        else
            r->tokens[r->n_tokens++] = (int32_t)id;
    }
    free(line);
    if (err == 0 && r->n_tokens <= r->o->steps)
        err = err_set(why, ERR_CONFIG, "a prompt of %d tokens: too short", r->n_tokens);
    return err < 0 ? err : r->n_tokens;
}

/* Feeds tokens [start, start + n). */
static int feed(struct run *r, int32_t start, int32_t n, int32_t prompt_len, bool sample)
{
    const struct batch_seq s = {.tokens = r->tokens,
                                .start = start,
                                .n_tokens = n,
                                .prompt_len = prompt_len,
                                .pages = r->pages,
                                .n_pages = kv_pages_for(r->n_tokens),
                                .policy = {.gate = BATCH_DENSE, .gate_rows = 128},
                                .sample = sample,
                                .sampling = &greedy};
    const struct batch batch = {.n_seqs = 1, .n_tokens = n, .seqs = &s};
    struct batch_result result = {.tokens = &r->token, .counts = &r->counts};
    TRY(model_step(r->model, &batch, &result));
    if (!sample)
        return 0;
    const size_t vocab = (size_t)model_info(r->model)->vocab_size;
    return fwrite(model_last_logits(r->model, 0), sizeof(float), vocab, r->out) == vocab ? 0 : -EIO;
}

static int do_prompt(struct run *r)
{
    const int32_t n_prompt = r->n_tokens - (int32_t)r->o->steps, chunk = (int32_t)r->o->chunk;
    for (int32_t at = 0; at < n_prompt; at += chunk) {
        const int32_t n = n_prompt - at < chunk ? n_prompt - at : chunk;
        TRY(feed(r, at, n, n_prompt, at + n == n_prompt));
    }
    for (int32_t at = n_prompt; at < r->n_tokens; at++)
        TRY(feed(r, at, 1, n_prompt, true));
    return 0;
}

static int open_model(struct run *r, struct err_msg *why)
{
    const struct options *o = r->o;
    const int32_t n_pages = kv_pages_for((int32_t)o->max_len);
    TRY(device_open(&r->dev, o->device, 0, (int)o->threads, why));
    const struct model_config cfg = {.dir = o->model,
                                     .dev = r->dev,
                                     .dtype = device_dtype(o->dtype),
                                     .kv_dtype = MODEL_DTYPE_AUTO,
                                     .max_seqs = 1,
                                     .max_tokens = (int32_t)o->chunk,
                                     .max_position = o->max_len};
    TRY(model_open(&r->model, &cfg, why));
    TRY(model_take_pages(r->model, n_pages, why));
    r->tokens = mem_zalloc((size_t)o->max_len, sizeof *r->tokens);
    r->pages = mem_zalloc((size_t)n_pages, sizeof *r->pages);
    for (int32_t i = 0; i < n_pages; i++)
        r->pages[i] = i;
    return 0;
}

static int open_files(struct run *r, struct err_msg *why)
{
    if (!r->o->tokens || !r->o->out)
        return err_set(why, ERR_CONFIG, "--tokens and --out are needed");
    r->in = fopen(r->o->tokens, "re");
    if (!r->in)
        return err_set(why, -errno, "%s: %s", r->o->tokens, err_str(-errno));
    r->out = fopen(r->o->out, "wbe");
    return r->out ? 0 : err_set(why, -errno, "%s: %s", r->o->out, err_str(-errno));
}

static int run(struct run *r, struct err_msg *why)
{
    int n;
    TRY(open_files(r, why));
    TRY(open_model(r, why));
    while ((n = read_line(r, why)) > 0)
        TRY(do_prompt(r));
    TRY(n);
    return fflush(r->out) == 0 ? 0 : err_set(why, -EIO, "%s: cannot write", r->o->out);
}

static void finish(struct run *r)
{
    if (r->in)
        (void)fclose(r->in);
    if (r->out)
        (void)fclose(r->out);
    model_close(r->model);
    dev_close(r->dev);
    mem_free(r->tokens);
    mem_free(r->pages);
}

int main(int argc, char **argv)
{
    struct options o = {0};
    struct err_msg why = {{0}};
    struct run r = {.o = &o};
    conf_defaults(&program, &o);
    if (conf_wants_help(argc, argv)) {
        conf_help(&program, stdout);
        return 0;
    }
    log_set_level(LOG_WARN);
    int err = conf_args(&program, &o, argc, argv, NULL, 0, NULL, &why);
    if (err == 0)
        err = run(&r, &why);
    if (err < 0)
        (void)fprintf(stderr, "model_logits: %s\n", err_why(&why, err));
    finish(&r);
    conf_free(&program, &o);
    return err < 0;
}
