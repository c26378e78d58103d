/* What torch.save pickles for a dict of tensors, numbers, texts and lists of them, and nothing
 * more. A pickle is a program; this reads those instructions of protocol 2 that such a dict needs,
 * and calls nothing: the only globals it knows are the tensor constructor, the typed storages and
 * an empty OrderedDict, which become values. Any other instruction or global is refused with its
 * offset. One pass, no recursion, memory bounded by the pickle's length. Inside calibration/ only.
 * Source: Python's pickletools; torch/_utils.py, _rebuild_tensor_v2. */
#ifndef CALIBRATION_PT_PICKLE_H
#define CALIBRATION_PT_PICKLE_H

#include "core/err.h"

#include <stddef.h>
#include <stdint.h>

enum { PT_PICKLE_MAX_BYTES = 64 * 1024, PT_MAX_DIMS = 8, PT_KEY_BYTES = 12 };

enum pt_kind {
    PT_INT,
    PT_BOOL,
    PT_TEXT,
    PT_TUPLE,
    PT_LIST,
    PT_DICT,
    PT_GLOBAL,
    PT_STORAGE,
    PT_TENSOR
};

enum pt_dtype { PT_F64, PT_F32, PT_F16, PT_BF16, PT_I64, PT_I32 };

struct pt_pickle;

/* A tensor as the pickle describes it: strides and offset in elements of its storage, whose bytes
 * are the archive's member data/KEY. Nothing of it is checked against those bytes here. */
struct pt_strided {
    enum pt_dtype dtype;
    char key[PT_KEY_BYTES]; /* decimal digits */
    int64_t n_storage, offset;
    int n_dims;
    int64_t shape[PT_MAX_DIMS], stride[PT_MAX_DIMS];
};

/* Borrows data until pt_pickle_free; its value is a dict. Offsets in messages are of data. */
MUST_CHECK int pt_pickle_parse(struct pt_pickle **out, const void *data, size_t len,
                               const char *name, struct err_msg *why);
void pt_pickle_free(struct pt_pickle *p); /* accepts NULL */

/* Values are named by an index. The dict's value under `key`; -1: none; -2: several. */
int32_t pt_pickle_find(const struct pt_pickle *p, const char *key);
enum pt_kind pt_pickle_kind(const struct pt_pickle *p, int32_t value);
const char *pt_kind_name(enum pt_kind kind);
int64_t pt_pickle_int(const struct pt_pickle *p, int32_t value); /* PT_INT */
/* Items of a PT_TUPLE or PT_LIST: how many there are; the first `max` of them go to `items`. */
int32_t pt_pickle_items(const struct pt_pickle *p, int32_t value, int32_t *items, int32_t max);
struct pt_strided pt_pickle_tensor(const struct pt_pickle *p, int32_t value); /* PT_TENSOR */

#endif
