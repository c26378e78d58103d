/* Bounded JSON files and typed, range-checked fields with errors that name the file and the field.
 * The parser is jansson; duplicate keys are errors. */
#ifndef MODEL_JSON_READ_H
#define MODEL_JSON_READ_H

#include "core/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

/* An object being read, and what to call it in messages. */
struct jread {
    const json_t *obj;
    const char *file;
    const char *prefix; /* "" or "rope_scaling." */
};

/* A file that must hold one JSON object of at most max_bytes; *out is released with json_decref.
 * -ENOENT when there is no such file. */
MUST_CHECK int jread_file(json_t **out, const char *path, size_t max_bytes, struct err_msg *why);
MUST_CHECK int jread_buffer(json_t **out, const char *data, size_t len, const char *name,
                            struct err_msg *why);

/* The field, or NULL when absent or null. */
const json_t *jread_get(const struct jread *j, const char *field);
/* Absent or null leaves *out as it is; required fields are checked with jread_require first. */
MUST_CHECK int jread_require(const struct jread *j, const char *field, struct err_msg *why);
MUST_CHECK int jread_int(const struct jread *j, const char *field, int64_t min, int64_t max,
                         int64_t *out, struct err_msg *why);
MUST_CHECK int jread_i32(const struct jread *j, const char *field, int32_t min, int32_t max,
                         int32_t *out, struct err_msg *why);
/* A finite number greater than `above`. */
MUST_CHECK int jread_double(const struct jread *j, const char *field, double above, double *out,
                            struct err_msg *why);
MUST_CHECK int jread_bool(const struct jread *j, const char *field, bool *out, struct err_msg *why);
/* The string's storage belongs to the object. */
MUST_CHECK int jread_string(const struct jread *j, const char *field, const char **out,
                            struct err_msg *why);

#endif
