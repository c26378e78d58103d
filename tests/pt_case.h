/* Builds .pt files byte by byte, as torch.save would or never would, for tests and fuzzing. */
#ifndef TESTS_PT_CASE_H
#define TESTS_PT_CASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pt_bytes {
    unsigned char *data; /* released with pt_bytes_free */
    size_t len, room;
};

void pt_bytes_add(struct pt_bytes *b, const void *data, size_t len);
void pt_bytes_le(struct pt_bytes *b, uint64_t v, int bytes);
void pt_bytes_free(struct pt_bytes *b);

struct pt_case_member {
    const char *name;
    const void *data;
    size_t len;
};

/* A stored archive. With zip64, sizes and offsets stand in the extra fields and the directory's in
 * a zip64 end record. */
void pt_case_zip(struct pt_bytes *out, const struct pt_case_member *m, int n, bool zip64);

/* Instructions of a pickle, from PROTO on. */
void pt_case_begin(struct pt_bytes *p); /* ... and an open dict */
void pt_case_text(struct pt_bytes *p, const char *text);
void pt_case_int(struct pt_bytes *p, int64_t v);
void pt_case_ints(struct pt_bytes *p, const int64_t *v, int n, bool tuple);
/* storage: "FloatStorage" */
void pt_case_tensor(struct pt_bytes *p, const char *storage, const char *key, int64_t n_storage,
                    int64_t offset, const int64_t *shape, const int64_t *stride, int n_dims);
void pt_case_end(struct pt_bytes *p);

#endif
