/* The bytes of a threshold file: names shared by reader and writer. Inside calibration/ only. */
#ifndef CALIBRATION_THRESHOLDS_FILE_H
#define CALIBRATION_THRESHOLDS_FILE_H

#include "core/err.h"

#include <stddef.h>

#define THRESHOLDS_FORMAT   "sluice-thresholds"
#define THRESHOLDS_VERSION  "1"
#define THRESHOLDS_PAGE     "64"
#define THRESHOLDS_IMPORTED "imported"

/* A whole file in memory, released with mem_free. */
MUST_CHECK int thresholds_read_file(const char *path, void **data, size_t *len,
                                    struct err_msg *why);

#endif
