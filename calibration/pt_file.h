/* Reader of the .pt files in which torch.save keeps a dict of tensors, numbers, texts and lists of
 * numbers. Nothing of a file is run (pt_pickle.h), nothing of its names is opened (pt_zip.h), and
 * every error names the file and the field. A tensor must be contiguous and lie in its storage; its
 * storage must have the size that its type and count say. Files since torch 1.6, little-endian. */
#ifndef CALIBRATION_PT_FILE_H
#define CALIBRATION_PT_FILE_H

#include "calibration/pt_pickle.h"
#include "core/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pt_file;

struct pt_tensor {
    enum pt_dtype dtype;
    int n_dims;
    int64_t shape[PT_MAX_DIMS];
    int64_t n;                 /* elements */
    const unsigned char *data; /* row-major, into the file's bytes; no alignment */
};

/* Borrows data until pt_file_close; `name` stands for the file in messages. */
MUST_CHECK int pt_file_parse(struct pt_file **out, const void *data, size_t len, const char *name,
                             struct err_msg *why);
void pt_file_close(struct pt_file *f); /* accepts NULL */

bool pt_file_has(const struct pt_file *f, const char *field);
MUST_CHECK int pt_file_int(const struct pt_file *f, const char *field, int64_t *out,
                           struct err_msg *why);
/* A list, a tuple or a tensor of one dimension with 1 to `max` whole numbers. */
MUST_CHECK int pt_file_ints(const struct pt_file *f, const char *field, int64_t *out, int32_t max,
                            int32_t *n, struct err_msg *why);
MUST_CHECK int pt_file_tensor(const struct pt_file *f, const char *field, struct pt_tensor *out,
                              struct err_msg *why);
/* Element i of a tensor of any floating-point type, rounded to f32. */
float pt_tensor_f32(const struct pt_tensor *t, int64_t i);

const char *pt_dtype_name(enum pt_dtype t);

#endif
