/* How the elements of a tensor's part reach the memory of a device: converted to the model's dtype,
 * straight into place where the host can write there, else piece by piece through a stage. */
#ifndef MODEL_WEIGHTS_FILL_H
#define MODEL_WEIGHTS_FILL_H

#include "core/dev.h"
#include "core/dtype.h"

#include <stdbool.h>
#include <stdint.h>

/* Rows [row, row + n_rows) and columns [col, col + n_cols) of a tensor of shape [*, width]; they
 * become a dense matrix. A vector is one row. src NULL: drawn, not read. */
struct weights_slice {
    const unsigned char *src;
    enum dtype dtype; /* of src */
    int64_t row, n_rows, col, n_cols, width;
    uint64_t seed; /* drawn: element (r, c) is mean + std * normal(seed, r * width + c) */
    float mean, std;
};

struct weights_stage;

/* Host memory that copies to the device start from: two halves, one filled while the other is on
 * its way. */
struct weights_stage_ops {
    int (*open)(struct weights_stage **out, struct dev *d, struct err_msg *why);
    /* A free half of *bytes bytes; waits for its last copy. */
    int (*next)(struct weights_stage *s, void **half, size_t *bytes);
    /* Starts the copy of the half that next gave. */
    int (*send)(struct weights_stage *s, void *dst, size_t bytes);
    /* Draws on the device. */
    int (*draw)(struct weights_stage *s, void *dst, enum dtype dtype,
                const struct weights_slice *slice);
    int (*close)(struct weights_stage *s); /* waits for all copies; accepts NULL */
};

struct weights_sink {
    struct dev *dev;
    enum dtype dtype;
    const struct weights_stage_ops *ops; /* NULL: the device's memory is the host's */
    struct weights_stage *stage;
    /* After each piece, with the bytes of the file that it took. */
    void (*done)(void *arg, uint64_t bytes);
    void *done_arg;
};

MUST_CHECK int weights_sink_open(struct weights_sink *s, struct err_msg *why);
/* dst is device memory. */
MUST_CHECK int weights_fill(struct weights_sink *k, void *dst, const struct weights_slice *slice);
MUST_CHECK int weights_sink_close(struct weights_sink *s); /* accepts one that did not open */

#endif
