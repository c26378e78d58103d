/* The demo's results as one JSON object, for scripts and for keeping. */
#include "cmd/demo_print.h"

#include <errno.h>
#include <jansson.h>

static const char *const states[] = {"away", "waiting", "answered", "left", "broken"};

static json_t *user_json(const struct demo_prompt *p, const struct demo_answer *a, int u)
{
    json_t *answer = json_array();
    for (int32_t i = 0; i < a->n_tokens; i++)
        (void)json_array_append_new(answer, json_integer(a->tokens[i]));
    return json_pack(
        "{s:s, s:s, s:s, s:i, s:i, s:f, s:o, s:b, s:f, s:f}", "user", demo_users[u].name, "task",
        p->task, "state", states[a->state], "prompt_tokens", p->prompt.n, "cached_tokens",
        a->cached, "ttft_ms", (double)a->ttft_us / 1e3, "answer", answer, "exact", (int)a->exact,
        "score", a->score, "density", a->reachable ? (double)a->kept / (double)a->reachable : 1.0);
}

/* Every counter that changed, as its change; gauges as they are at the end. */
static json_t *stats_json(const struct demo_round *r)
{
    json_t *out = json_object();
#define XX(name)                                                                                   \
    (void)json_object_set_new(out, #name, json_integer(r->after.name - r->before.name));
    DEMO_STATS(XX)
#undef XX
    (void)json_object_set_new(out, "kv_pages_total", json_integer(r->after.kv_pages_total));
    (void)json_object_set_new(out, "kv_pages_peak", json_integer(r->peak_pages));
    (void)json_object_set_new(out, "kv_pages_used", json_integer(r->after.kv_pages_used));
    (void)json_object_set_new(out, "kv_pages_free", json_integer(r->after.kv_pages_free));
    return out;
}

int demo_write_json(const char *path, const struct demo_prompt prompts[DEMO_USERS],
                    const struct demo_mode modes[DEMO_MODES],
                    const struct demo_round rounds[DEMO_MODES], struct err_msg *why)
{
    json_t *out = json_array();
    for (int m = 0; m < DEMO_MODES; m++) {
        json_t *users = json_array();
        for (int u = 0; u < DEMO_USERS; u++)
            (void)json_array_append_new(users, user_json(&prompts[u], &rounds[m].users[u], u));
        (void)json_array_append_new(
            out, json_pack("{s:s, s:f, s:b, s:o, s:o}", "mode", modes[m].name, "wall_ms",
                           (double)rounds[m].wall_us / 1e3, "leaked", (int)rounds[m].leaked,
                           "users", users, "stats", stats_json(&rounds[m])));
    }
    json_t *object = json_pack("{s:o}", "modes", out);
    int err = json_dump_file(object, path, JSON_INDENT(1));
    json_decref(object);
    return err < 0 ? err_set(why, -errno, "--json: cannot write %s: %s", path, err_str(-errno)) : 0;
}
