/* What a benchmark sends and when: a list of requests, made from a seed (synthetic) or from a trace
 * file. Prompts are not stored: a request is a list of token streams, each named by a number, and
 * load_tokens writes them out when the request is sent. Two requests that start with the same
 * streams start with the same tokens, which is how a shared prefix is expressed in both kinds of
 * load. */
#ifndef CMD_CLI_LOAD_H
#define CMD_CLI_LOAD_H

#include "core/err.h"

#include <stdint.h>

enum {
    LOAD_TRACE_BLOCK = 512, /* tokens that one hash id of a Mooncake trace stands for */
    LOAD_MAX_CLASSES = 8
};

struct load_stream {
    uint64_t name;
    int32_t n_tokens;
};

struct load_request {
    int64_t at_us; /* arrival after the start of the run */
    int32_t input_len, output_len;
    int32_t class; /* of a mix; 0 */
    int32_t n_streams;
    struct load_stream *streams;
};

struct load {
    struct load_request *requests;
    int32_t n_requests;
};

struct load_shape {
    int32_t n_requests;
    int32_t input_len, output_len;
    double range_ratio;   /* lengths are uniform in len * (1 +- range_ratio) */
    double shared_prefix; /* share of the input that is common to a group */
    int32_t n_prefixes;   /* groups */
    uint64_t seed;
};

/* Requests of one shape in a mix of several. */
struct load_class {
    int32_t input_len, output_len, count;
};

void load_synthetic(struct load *out, const struct load_shape *shape);
/* All classes' requests with tokens of their own, in an order drawn from the seed. */
void load_mix(struct load *out, const struct load_class *classes, int32_t n_classes, uint64_t seed);
/* Mooncake format, JSON lines: {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids":
 * [...]}. Arrivals are the timestamps divided by speedup, from the first one on; at most
 * max_requests (0: all) are read. */
MUST_CHECK int load_trace(struct load *out, const char *path, double speedup, int32_t max_requests,
                          struct err_msg *why);
/* Replaces the arrivals: gamma-distributed gaps of mean 1 / rate and shape burstiness (1 is a
 * Poisson process), rescaled so that the last request comes at n / rate, as vLLM's benchmark does.
 * An infinite rate sends everything at once. */
void load_arrivals(struct load *l, double rate, double burstiness, uint64_t seed);
/* Writes the prompt, input_len ids in [0, vocab_size). */
void load_tokens(const struct load_request *r, int32_t vocab_size, int32_t *out);
void load_deinit(struct load *l);

#endif
