/* A judge of RULER prompts that shares nothing with the generator: it knows the notation of
 * models/needle/tokens.json, takes a prompt apart, checks that it has the form of its task, and
 * answers the question itself. */
#ifndef TESTS_RULER_CASE_H
#define TESTS_RULER_CASE_H

#include <stdbool.h>
#include <stdint.h>

/* The tokens, by the numbers of models/needle/tokens.json. */
enum {
    T_PAD,
    T_BOS,
    T_EOS,
    T_NEEDLE,
    T_IS,
    T_END,
    T_QUERY,
    T_ANS,
    T_ASSIGN,
    T_SEP,
    T_DOC,
    T_QVT,
    T_QQA,
    T_QQA2,
    T_QFWE,
    T_STOP,
    T_RELATION = 16,
    T_FILLER = 32,
    T_KEY = 256,
    T_VALUE = 384,
    T_ALL = 512
};

enum { CASE_MAX_ANSWER = 64, CASE_MAX_REFS = 10, CASE_MAX_REF = 8 };

struct ruler_case {
    const char *task;
    const int32_t *tokens;
    int32_t n;
};

struct ruler_found {
    int32_t answer[CASE_MAX_ANSWER], n_answer; /* ends in EOS */
    int32_t refs[CASE_MAX_REFS][CASE_MAX_REF], ref_len[CASE_MAX_REFS], n_refs;
    int32_t first_fact; /* its place in the context; -1: none */
};

/* Fails the running test, naming the task and the place, unless the prompt has its task's form. */
void ruler_case_solve(struct ruler_found *out, const struct ruler_case *c);

#endif
