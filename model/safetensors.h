/* Reader of safetensors: one file, bytes in memory, or a Hugging Face folder of shards.
 * File: u64 little-endian header length, JSON header, tensor bytes. Nothing of a file is trusted:
 * the header length is bounded, types and shapes are known and their product is overflow-checked,
 * and the tensors' byte ranges tile the data exactly (no overlap, no hole, nothing past the end),
 * as the format demands. Every error names the file and the tensor or key.
 *
 * Files are mapped, not read: data points into the mapping and lives until safetensors_close.
 * A file that another process truncates while it is mapped ends this process (SIGBUS), so callers
 * copy what they keep and close soon. Data pointers have no alignment beyond one byte.
 * Source: huggingface/safetensors README, "Format". */
#ifndef MODEL_SAFETENSORS_H
#define MODEL_SAFETENSORS_H

#include "core/err.h"

#include <stddef.h>
#include <stdint.h>

enum {
    SAFETENSORS_MAX_DIMS = 8,
    SAFETENSORS_MAX_HEADER = 100 * 1000 * 1000 /* the format's own limit */
};

enum st_dtype {
    ST_BOOL,
    ST_U8,
    ST_I8,
    ST_F8_E4M3,
    ST_F8_E5M2,
    ST_U16,
    ST_I16,
    ST_F16,
    ST_BF16,
    ST_U32,
    ST_I32,
    ST_F32,
    ST_U64,
    ST_I64,
    ST_F64
};

struct st_tensor {
    const char *name;
    enum st_dtype dtype;
    int n_dims;
    int64_t shape[SAFETENSORS_MAX_DIMS];
    const void *data;
    size_t bytes;
};

struct safetensors;

MUST_CHECK int safetensors_open(struct safetensors **out, const char *path, struct err_msg *why);
/* `dir`/model.safetensors, or every shard that `dir`/model.safetensors.index.json lists. */
MUST_CHECK int safetensors_open_dir(struct safetensors **out, const char *dir, struct err_msg *why);
/* Bytes in memory, borrowed until close; `name` stands for the file in messages. */
MUST_CHECK int safetensors_parse(struct safetensors **out, const void *data, size_t len,
                                 const char *name, struct err_msg *why);
void safetensors_close(struct safetensors *s); /* accepts NULL */

/* Tensors in file order, shard after shard. */
size_t safetensors_count(const struct safetensors *s);
const struct st_tensor *safetensors_at(const struct safetensors *s, size_t i);
/* NULL when there is none. */
const struct st_tensor *safetensors_find(const struct safetensors *s, const char *name);
/* A string of __metadata__ (the first file's that has the key), or NULL. */
const char *safetensors_metadata(const struct safetensors *s, const char *key);

size_t st_dtype_bytes(enum st_dtype t);
const char *st_dtype_name(enum st_dtype t);
/* Writes "[a, b]" into text, for messages; returns text. */
const char *st_shape_text(char *text, size_t size, const int64_t *shape, int n_dims);

#endif
