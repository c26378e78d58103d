/* Calibration and evaluation prompts: a file of JSON lines, each an object with a `prompt` (or
 * `tokens`) array of token ids and, if it likes, a `task` name and an `expected` array, the tokens
 * of a good answer. Other fields are ignored. Every error names the file, the line and the field.
 */
#ifndef CALIBRATION_SAMPLES_H
#define CALIBRATION_SAMPLES_H

#include "core/err.h"

#include <stdint.h>
#include <stdio.h>

enum { SAMPLES_MAX_ANSWER = 64 }; /* what is longer is cut */

struct sample {
    char task[32]; /* "" when the line has none; long names are cut */
    int32_t line;  /* in the file, from 1 */
    int32_t n_tokens;
    int32_t n_answer; /* at most SAMPLES_MAX_ANSWER; 0: none, or of a prompt that was cut */
    int32_t *tokens;  /* [n_tokens + n_answer]: the prompt, then the answer */
};

struct samples {
    struct sample *items;
    int32_t n;
};

/* Reads all lines; ids must be in [0, vocab_size). Prompts are cut to max_len tokens (0: not). */
MUST_CHECK int samples_load(struct samples *out, const char *path, int32_t vocab_size,
                            int32_t max_len, struct err_msg *why);
/* The same from an open stream; `name` stands for the file in messages. */
MUST_CHECK int samples_read(struct samples *out, FILE *in, const char *name, int32_t vocab_size,
                            int32_t max_len, struct err_msg *why);
void samples_free(struct samples *s); /* accepts zeroed memory */
/* The bound on ids again, for when the vocabulary is known only after reading. */
MUST_CHECK int samples_check(const struct samples *s, const char *name, int32_t vocab_size,
                             struct err_msg *why);

/* Who calibrates and who is held out, as indices into the file's samples; both arrays have room for
 * all of them. */
struct samples_split {
    int32_t *calibrate, n_calibrate;
    int32_t *held_out, n_held_out;
};

/* With a task prefix, samples of those tasks calibrate and n_held_out of the others, evenly spread
 * over the file, are held out. Without one, the last n_held_out are held out and all before them
 * calibrate. At most `limit` calibrate (0: all), evenly spread. A sample is never in both. */
void samples_split(struct samples_split *out, const struct samples *s, const char *task_prefix,
                   int32_t limit, int32_t n_held_out);
void samples_split_free(struct samples_split *s);

/* Hash of the prompts of the chosen samples: a threshold file's `set`. */
uint64_t samples_hash(const struct samples *s, const int32_t *chosen, int32_t n);
uint64_t samples_hash_answers(const struct samples *s, const int32_t *chosen, int32_t n);
/* Tokens of the chosen samples: of the longest, of the longest with its answer, and of all. */
int32_t samples_longest(const struct samples *s, const int32_t *chosen, int32_t n);
int32_t samples_longest_answered(const struct samples *s, const int32_t *chosen, int32_t n);
int64_t samples_tokens(const struct samples *s, const int32_t *chosen, int32_t n);

#endif
