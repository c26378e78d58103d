#define LOG_MODULE "policy"
#include "cmd/daemon_policy.h"

#include "core/hash.h"
#include "core/log.h"
#include "core/mem.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int load_thresholds(struct daemon_policy *p, const struct daemon_options *o,
                           const struct model_info *info, struct err_msg *why)
{
    const struct thresholds_expect expect = {
        .model = info->fingerprint,
        .n_layers = info->n_layers,
        .n_heads = info->n_heads,
        .softmax_scale = info->softmax_scale,
        .rope = info->rope,
    };
    TRY(thresholds_load(&p->thresholds, o->thresholds, why));
    int err = thresholds_check(p->thresholds, &expect, why);
    const struct attn_thresholds *view = thresholds_view(p->thresholds);
    bool same_shape = view->n_layers == info->n_layers && view->n_heads == info->n_heads;
    if (err == ERR_MISMATCH && o->force_thresholds && same_shape) {
        log_warn("--force-thresholds: %s", err_why(why, err));
        err = 0;
    }
    if (err < 0)
        return err;
    p->attn.abs = *view;
    p->fingerprint = hash_pair(p->fingerprint, thresholds_hash(p->thresholds));
    return 0;
}

static int parse_window(const char *text, int32_t *sink, int32_t *local, struct err_msg *why)
{
    char *end;
    errno = 0;
    long a = strtol(text, &end, 10);
    if (end != text && *end == ':') {
        const char *second = end + 1;
        long b = strtol(second, &end, 10);
        if (!errno && end != second && !*end && a >= 0 && b >= 0 && a < (1 << 24) &&
            b < (1 << 24)) {
            *sink = (int32_t)a;
            *local = (int32_t)b;
            return 0;
        }
    }
    return err_set(why, ERR_CONFIG, "--window: '%s' is not SINK:LOCAL, two counts of pages", text);
}

/* One layer's line of numbers; n of them must be n_kv_heads or n_heads. */
static int parse_line(char *line, const struct model_info *info, struct attn_head_policy *row,
                      int number, struct err_msg *why)
{
    double values[1024] = {0};
    int n = 0;
    char *save = NULL;
    for (char *word = strtok_r(line, " \t,\r\n", &save); word;
         word = strtok_r(NULL, " \t,\r\n", &save)) {
        char *end;
        if (n == (int)(sizeof values / sizeof *values))
            return err_set(why, ERR_FORMAT, "--window-heads: line %d: too many numbers", number);
        values[n] = strtod(word, &end);
        if (*end || values[n] != values[n])
            return err_set(why, ERR_FORMAT, "--window-heads: line %d: '%s' is not a number", number,
                           word);
        n++;
    }
    if (n != info->n_heads && n != info->n_kv_heads)
        return err_set(
            why, ERR_FORMAT,
            "--window-heads: line %d: %d numbers, want %d (KV heads) or %d (query heads)", number,
            n, info->n_kv_heads, info->n_heads);
    for (int h = 0; h < info->n_heads; h++) {
        if (values[h * n / info->n_heads] >= 0.5)
            row[h] = (struct attn_head_policy){.visit = ATTN_VISIT_ALL};
    }
    return 0;
}

static int load_window_heads(struct daemon_policy *p, const char *path,
                             const struct model_info *info, struct err_msg *why)
{
    FILE *f = fopen(path, "re");
    if (!f)
        return err_set(why, -errno, "--window-heads: cannot open %s: %s", path, err_str(-errno));
    char *line = NULL;
    size_t cap = 0;
    int err = 0, layer = 0;
    while (err == 0 && getline(&line, &cap, f) >= 0) {
        if (line[strspn(line, " \t\r\n")] == '\0')
            continue;
        if (layer == info->n_layers)
            err = err_set(why, ERR_FORMAT, "--window-heads: more than %d lines", info->n_layers);
        else
            err = parse_line(line, info, p->heads + (size_t)layer * (size_t)info->n_heads,
                             layer + 1, why);
        layer++;
    }
    free(line);
    (void)fclose(f);
    if (err == 0 && layer != info->n_layers)
        err = err_set(why, ERR_FORMAT, "--window-heads: %d lines, the model has %d layers", layer,
                      info->n_layers);
    return err;
}

static int load_window(struct daemon_policy *p, const struct daemon_options *o,
                       const struct model_info *info, struct err_msg *why)
{
    struct attn_head_policy stream = {.visit = ATTN_VISIT_SINK_LOCAL};
    size_t n = (size_t)info->n_layers * (size_t)info->n_heads;
    TRY(parse_window(o->window, &stream.sink_pages, &stream.local_pages, why));
    p->heads = mem_zalloc(n, sizeof *p->heads);
    for (size_t i = 0; i < n; i++)
        p->heads[i] = stream;
    if (o->window_heads)
        TRY(load_window_heads(p, o->window_heads, info, why));
    for (size_t i = 0; i < n; i++) {
        const int32_t fields[] = {p->heads[i].visit, p->heads[i].sink_pages,
                                  p->heads[i].local_pages};
        p->fingerprint = hash_bytes(fields, sizeof fields, p->fingerprint);
    }
    p->attn.heads = p->heads;
    return 0;
}

/* What gates are steered to, where the file has it. */
static void load_steering(struct daemon_policy *p)
{
    if (!p->thresholds)
        return;
    p->attn.abs_pages = *thresholds_pages_view(p->thresholds);
    p->attn.rel_128 = *thresholds_rel_view(p->thresholds, 128);
    p->attn.rel_64 = *thresholds_rel_view(p->thresholds, 64);
}

/* The gate of generated tokens, where the file has it. */
static int load_decode(struct daemon_policy *p, const struct daemon_options *o, struct err_msg *why)
{
    if (!p->thresholds)
        p->no_decode = "the daemon has no threshold file (--thresholds)";
    else if (!thresholds_decode_view(p->thresholds)->t)
        p->no_decode = "the threshold file has none for generated tokens (sluice-calibrate "
                       "--decode-k)";
    else
        p->attn.decode = *thresholds_decode_view(p->thresholds);
    if (p->no_decode && o->decode_density > 0 && o->decode_density < 1)
        return err_set(why, ERR_CONFIG, "--decode-density: %s", p->no_decode);
    return 0;
}

int daemon_policy_load(struct daemon_policy *p, const struct daemon_options *o,
                       const struct model_info *info, struct err_msg *why)
{
    int err = 0;
    memset(p, 0, sizeof *p);
    p->attn.order = o->page_order == 1 ? ATTN_ORDER_L2R : ATTN_ORDER_DIAG_SINK_R2L;
    if (p->attn.order != ATTN_ORDER_DIAG_SINK_R2L)
        p->fingerprint = hash_pair(p->fingerprint, (uint64_t)p->attn.order);
    if (o->window)
        err = load_window(p, o, info, why);
    if (err == 0 && o->thresholds)
        err = load_thresholds(p, o, info, why);
    if (err == 0) {
        load_steering(p);
        err = load_decode(p, o, why);
    }
    if (err < 0)
        daemon_policy_free(p);
    return err;
}

void daemon_policy_free(struct daemon_policy *p)
{
    thresholds_free(p->thresholds);
    mem_free(p->heads);
    p->thresholds = NULL;
    p->heads = NULL;
}
