/* The bytes of files of thresholds: names that reader and writer share, reading and writing whole
 * files. Inside calibration/ only. */
#ifndef CALIBRATION_THRESHOLDS_FILE_H
#define CALIBRATION_THRESHOLDS_FILE_H

#include "calibration/thresholds.h"
#include "core/err.h"

#include <stddef.h>

#define THRESHOLDS_FORMAT   "sluice-thresholds"
#define THRESHOLDS_VERSION  "1"
#define THRESHOLDS_PAGE     "64"
#define THRESHOLDS_IMPORTED "imported"

/* Mean of a level of REL's densities, over the layers that a served prompt's density is of. */
double thresholds_rel_mean(const struct attn_thresholds *v, int32_t level);

/* A whole file in memory, released with mem_free. */
MUST_CHECK int thresholds_read_file(const char *path, void **data, size_t *len,
                                    struct err_msg *why);

struct file_part {
    const void *data;
    size_t len;
};
/* The parts, one after the other, beside the file's place; synced, then renamed. */
MUST_CHECK int thresholds_write_file(const char *path, const struct file_part *parts, int n_parts,
                                     struct err_msg *why);

#endif
