#include "cmd/cli_load.h"

#include "core/mem.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* SplitMix64: the i-th output is a pure function of the seed, so a token needs no state. */
static uint64_t mix(uint64_t z)
{
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static uint64_t next(uint64_t *state)
{
    return mix((*state)++);
}

static double unit(uint64_t *state)
{
    return ((double)(next(state) >> 11) + 0.5) * 0x1p-53;
}

static double normal(uint64_t *state)
{
    double radius = sqrt(-2.0 * log(unit(state)));
    return radius * cos(6.283185307179586 * unit(state));
}

/* Gamma(shape, 1) after Marsaglia and Tsang (2000); shape below 1 by their boost. */
static double gamma_draw(uint64_t *state, double shape)
{
    double boost = 1.0;
    if (shape < 1.0) {
        boost = pow(unit(state), 1.0 / shape);
        shape += 1.0;
    }
    double d = shape - 1.0 / 3.0, c = 1.0 / sqrt(9.0 * d);
    for (;;) {
        double x = normal(state), v = 1.0 + c * x;
        if (v <= 0.0)
            continue;
        v = v * v * v;
        if (log(unit(state)) < 0.5 * x * x + d - d * v + d * log(v))
            return d * v * boost;
    }
}

static int32_t around(uint64_t *state, int32_t len, double ratio)
{
    double lo = ceil(len * (1.0 - ratio)), hi = floor(len * (1.0 + ratio));
    double x = lo + floor(unit(state) * (hi - lo + 1.0));
    return x < 1.0 ? 1 : (int32_t)x;
}

static void request_init(struct load_request *r, int32_t n_streams)
{
    r->n_streams = n_streams;
    r->streams = mem_zalloc((size_t)n_streams, sizeof *r->streams);
}

void load_synthetic(struct load *out, const struct load_shape *s)
{
    uint64_t state = mix(s->seed);
    out->n_requests = s->n_requests;
    out->requests = mem_zalloc((size_t)s->n_requests, sizeof *out->requests);
    for (int32_t i = 0; i < s->n_requests; i++) {
        struct load_request *r = &out->requests[i];
        r->input_len = around(&state, s->input_len, s->range_ratio);
        r->output_len = around(&state, s->output_len, s->range_ratio);
        request_init(r, 2);
        /* Groups share a prefix of one length, whatever the length of the whole. */
        int32_t shared = (int32_t)(s->input_len * s->shared_prefix);
        if (shared > r->input_len)
            shared = r->input_len;
        uint64_t group = next(&state) % (uint64_t)s->n_prefixes;
        r->streams[0] = (struct load_stream){mix(s->seed ^ (group << 1)), shared};
        r->streams[1] =
            (struct load_stream){mix(s->seed ^ ((uint64_t)i << 1 | 1)), r->input_len - shared};
    }
}

/* After Fisher and Yates. */
static void shuffle(struct load *l, uint64_t *state)
{
    for (int32_t i = l->n_requests - 1; i > 0; i--) {
        int32_t j = (int32_t)(next(state) % ((uint64_t)i + 1));
        struct load_request r = l->requests[i];
        l->requests[i] = l->requests[j];
        l->requests[j] = r;
    }
}

void load_mix(struct load *out, const struct load_class *classes, int32_t n_classes, uint64_t seed)
{
    uint64_t state = mix(seed ^ 0x317ull);
    *out = (struct load){NULL, 0};
    for (int32_t c = 0; c < n_classes; c++)
        out->n_requests += classes[c].count;
    out->requests = mem_zalloc((size_t)out->n_requests, sizeof *out->requests);
    for (int32_t c = 0, i = 0; c < n_classes; c++) {
        for (int32_t k = 0; k < classes[c].count; k++, i++) {
            struct load_request *r = &out->requests[i];
            r->input_len = classes[c].input_len;
            r->output_len = classes[c].output_len;
            r->class = c;
            request_init(r, 1);
            r->streams[0] = (struct load_stream){mix(seed ^ ((uint64_t)i << 1 | 1)), r->input_len};
        }
    }
    shuffle(out, &state);
}

/* One stream a hash id, and one of its own for tokens that no id covers. */
static int trace_streams(struct load_request *r, const json_t *ids, int32_t index,
                         struct err_msg *why)
{
    int32_t left = r->input_len;
    request_init(r, (int32_t)json_array_size(ids) + 1);
    for (int32_t i = 0; i < r->n_streams; i++) {
        bool own = i == r->n_streams - 1;
        const json_t *id = own ? NULL : json_array_get(ids, (size_t)i);
        if (!own && !json_is_integer(id))
            return err_set(why, ERR_FORMAT, "hash_ids must hold whole numbers");
        int32_t n = own || left < LOAD_TRACE_BLOCK ? left : LOAD_TRACE_BLOCK;
        uint64_t name = own ? (uint64_t)index << 1 | 1 : (uint64_t)json_integer_value(id) << 1;
        r->streams[i] = (struct load_stream){mix(name), n};
        left -= n;
    }
    return 0;
}

static int trace_line(struct load_request *r, const json_t *o, int32_t index, struct err_msg *why)
{
    static const double max_len = 1 << 24;
    const json_t *at = json_object_get(o, "timestamp"), *in = json_object_get(o, "input_length"),
                 *outlen = json_object_get(o, "output_length"),
                 *ids = json_object_get(o, "hash_ids");
    if (!json_is_number(at) || !(json_number_value(at) >= 0 && json_number_value(at) < 1e12))
        return err_set(why, ERR_FORMAT, "timestamp (milliseconds) is missing or negative");
    if (!json_is_integer(in) || json_integer_value(in) < 1 || json_number_value(in) > max_len)
        return err_set(why, ERR_FORMAT, "input_length is missing or out of range");
    if (!json_is_integer(outlen) || json_integer_value(outlen) < 0 ||
        json_number_value(outlen) > max_len)
        return err_set(why, ERR_FORMAT, "output_length is missing or out of range");
    if (ids && !json_is_array(ids))
        return err_set(why, ERR_FORMAT, "hash_ids is not an array");
    r->at_us = (int64_t)(json_number_value(at) * 1000.0);
    r->input_len = (int32_t)json_integer_value(in);
    r->output_len = json_integer_value(outlen) > 0 ? (int32_t)json_integer_value(outlen) : 1;
    return trace_streams(r, ids, index, why);
}

static int by_arrival(const void *a, const void *b)
{
    const struct load_request *x = a, *y = b;
    return (x->at_us > y->at_us) - (x->at_us < y->at_us);
}

static void trace_times(struct load *l, double speedup)
{
    qsort(l->requests, (size_t)l->n_requests, sizeof *l->requests, by_arrival);
    int64_t first = l->requests[0].at_us;
    for (int32_t i = 0; i < l->n_requests; i++)
        l->requests[i].at_us = (int64_t)((double)(l->requests[i].at_us - first) / speedup);
}

static int trace_read(struct load *l, FILE *f, int32_t max_requests, struct err_msg *why)
{
    char *line = NULL;
    size_t room = 0;
    int32_t cap = 0;
    int err = 0;
    for (int number = 1; err == 0 && getline(&line, &room, f) >= 0; number++) {
        if (line[strspn(line, " \t\r\n")] == '\0')
            continue;
        if (max_requests && l->n_requests >= max_requests)
            break;
        if (l->n_requests == cap) {
            cap = cap ? cap * 2 : 256;
            l->requests = mem_realloc(l->requests, (size_t)cap * sizeof *l->requests);
        }
        struct load_request *r = &l->requests[l->n_requests++];
        *r = (struct load_request){0};
        json_error_t at;
        struct err_msg inner = {""};
        json_t *o = json_loads(line, 0, &at);
        err = o ? trace_line(r, o, l->n_requests, &inner)
                : err_set(&inner, ERR_FORMAT, "%.150s", at.text);
        json_decref(o);
        if (err < 0)
            (void)err_set(why, err, "line %d: %.250s", number, inner.text);
    }
    free(line);
    return err;
}

int load_trace(struct load *out, const char *path, double speedup, int32_t max_requests,
               struct err_msg *why)
{
    FILE *f = fopen(path, "re");
    if (!f)
        return err_set(why, -errno, "cannot open %s: %s", path, err_str(-errno));
    struct err_msg inner = {""};
    *out = (struct load){NULL, 0};
    int err = trace_read(out, f, max_requests, &inner);
    (void)fclose(f);
    if (err == 0 && out->n_requests == 0)
        err = err_set(&inner, ERR_FORMAT, "no requests");
    if (err < 0) {
        load_deinit(out);
        return err_set(why, err, "%s: %.300s", path, inner.text);
    }
    trace_times(out, speedup);
    return 0;
}

void load_arrivals(struct load *l, double rate, double burstiness, uint64_t seed)
{
    uint64_t state = mix(seed ^ 0xa11ull);
    double at = 0.0, *times = mem_zalloc((size_t)l->n_requests, sizeof *times);
    for (int32_t i = 0; i < l->n_requests && isfinite(rate); i++)
        times[i] = at += gamma_draw(&state, burstiness);
    double scale = at > 0.0 ? l->n_requests / rate / at : 0.0;
    for (int32_t i = 0; i < l->n_requests; i++)
        l->requests[i].at_us = (int64_t)(times[i] * scale * 1e6);
    mem_free(times);
}

void load_tokens(const struct load_request *r, int32_t vocab_size, int32_t *out)
{
    for (int32_t s = 0; s < r->n_streams; s++) {
        for (int32_t i = 0; i < r->streams[s].n_tokens; i++)
            *out++ = (int32_t)(mix(r->streams[s].name + (uint64_t)i) % (uint64_t)vocab_size);
    }
}

void load_deinit(struct load *l)
{
    for (int32_t i = 0; i < l->n_requests; i++)
        mem_free(l->requests[i].streams);
    mem_free(l->requests);
    *l = (struct load){NULL, 0};
}
