/* The vocabulary that the tasks are written in: a file like models/needle/tokens.json. Of that file
 * `vocab_size`, `special`, `ranges` and the names under `tasks` are read; the rest of it says in
 * words what ruler.h makes of them. Errors name the file and the field. */
#ifndef EVAL_VOCAB_H
#define EVAL_VOCAB_H

#include "core/err.h"

#include <stdint.h>

/* Tokens with one meaning each, by their names in the file. */
#define RULER_MARKS(XX)                                                                            \
    XX(BOS)                                                                                        \
    XX(EOS)                                                                                        \
    XX(NEEDLE)                                                                                     \
    XX(IS)                                                                                         \
    XX(END)                                                                                        \
    XX(QUERY)                                                                                      \
    XX(ANS)                                                                                        \
    XX(ASSIGN)                                                                                     \
    XX(SEP)                                                                                        \
    XX(DOC)                                                                                        \
    XX(QVT)                                                                                        \
    XX(QQA)                                                                                        \
    XX(QQA2)                                                                                       \
    XX(QFWE)                                                                                       \
    XX(STOP)

enum ruler_mark {
#define XX(name) MARK_##name,
    RULER_MARKS(XX)
#undef XX
        N_MARKS
};

/* name, its key under `tasks`: in the order that tables are printed in */
#define RULER_TASKS(XX)                                                                            \
    XX(SINGLE_1, "niah_single_1")                                                                  \
    XX(SINGLE_2, "niah_single_2")                                                                  \
    XX(SINGLE_3, "niah_single_3")                                                                  \
    XX(MULTIKEY_1, "niah_multikey_1")                                                              \
    XX(MULTIKEY_2, "niah_multikey_2")                                                              \
    XX(MULTIKEY_3, "niah_multikey_3")                                                              \
    XX(MULTIVALUE, "niah_multivalue")                                                              \
    XX(MULTIQUERY, "niah_multiquery")                                                              \
    XX(VT, "vt")                                                                                   \
    XX(CWE, "cwe")                                                                                 \
    XX(FWE, "fwe")                                                                                 \
    XX(QA_1, "qa_1")                                                                               \
    XX(QA_2, "qa_2")

enum ruler_task {
#define XX(name, key) RULER_##name,
    RULER_TASKS(XX)
#undef XX
        RULER_N_TASKS,
    RULER_N_NIAH = RULER_VT /* the tasks before it */
};

/* Ids first .. first + n - 1. */
struct ruler_range {
    int32_t first, n;
};

struct ruler_vocab {
    int32_t size;
    int32_t marks[N_MARKS];
    struct ruler_range relation, filler, key, value;
    uint32_t tasks; /* bit t: the file defines task t */
};

/* why names the file and the field. */
MUST_CHECK int ruler_vocab_load(struct ruler_vocab *out, const char *path, struct err_msg *why);
/* The same from text; errors name the field only. */
MUST_CHECK int ruler_vocab_parse(struct ruler_vocab *out, const char *text, struct err_msg *why);

const char *ruler_task_name(enum ruler_task task);
/* A task by its name; -1: there is none. */
int ruler_task_find(const char *name);

#endif
