/* The protocol as data: for every message its fields with key, name, form, place in the struct,
 * range and default. Packing, unpacking, defaults, the error texts and the check of PROTOCOL.md are
 * all driven by these tables, so they cannot disagree. */
#ifndef IPC_SCHEMA_H
#define IPC_SCHEMA_H

#include "ipc/message.h"

enum ipc_kind {
    IPC_KIND_BOOL,
    IPC_KIND_I32,
    IPC_KIND_I64,
    IPC_KIND_U64,
    IPC_KIND_SEED,     /* uint64_t that may be absent; count: bool */
    IPC_KIND_F64,      /* finite; integers are accepted */
    IPC_KIND_STR,      /* char[room + 1] */
    IPC_KIND_STR_LIST, /* char[room][IPC_CAP_BYTES + 1]; count: int32_t */
    IPC_KIND_SALT,     /* uint8_t[room]; count: int32_t */
    IPC_KIND_TOKENS,   /* const int32_t *; count: int32_t; bin of little-endian u32, or array */
    IPC_KIND_I32_LIST, /* int32_t[room]; count: int32_t */
    IPC_KIND_IDS,      /* const char *const *; count: int32_t */
    IPC_KIND_LOGPROBS, /* const struct ipc_logprob *, as many as tokens; count: int32_t */
    IPC_KIND_STATS,    /* const struct ipc_stat *; count: int32_t; map name -> number */
    IPC_KIND_SPARSE    /* struct ipc_sparse, a map with its own schema */
};

enum { IPC_MAX_KEY = 31 }; /* keys of this version; larger ones are ignored */

struct ipc_field {
    const char *name;
    uint8_t key, kind; /* kind: enum ipc_kind */
    bool required;
    uint16_t offset, count_offset, room;
    double min, max; /* numbers, and the elements of integer lists */
    double def;      /* numbers and booleans */
};

struct ipc_schema {
    const char *name;
    int type; /* enum ipc_type; 0 for the sparse map */
    size_t size;
    const struct ipc_field *fields;
    size_t n_fields;
};

const struct ipc_schema *ipc_schema_of(int type); /* NULL: unknown */
const struct ipc_schema *ipc_schema_sparse(void);

#endif
