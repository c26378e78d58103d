/* NCCL, found when it is needed: libnccl.so.2 is opened at run time, so that the same program
 * starts on machines without it and runs on the CPU or on one GPU there. The header's own
 * declarations give the types; a library older than NCCL_LEAST is refused. */
#ifndef PARALLEL_NCCL_LIB_H
#define PARALLEL_NCCL_LIB_H

#include "core/err.h"

#include <nccl.h>

#define NCCL_LEAST NCCL_VERSION(2, 28, 0)

#define NCCL_FUNCTIONS(XX)                                                                         \
    XX(GetVersion)                                                                                 \
    XX(GetUniqueId)                                                                                \
    XX(GetErrorString)                                                                             \
    XX(CommInitRankConfig)                                                                         \
    XX(CommGetAsyncError)                                                                          \
    XX(CommFinalize)                                                                               \
    XX(CommDestroy)                                                                                \
    XX(CommAbort)                                                                                  \
    XX(AllReduce)                                                                                  \
    XX(AllGather)                                                                                  \
    XX(ReduceScatter)

struct nccl_lib {
    void *handle;
#define XX(name) __typeof__(nccl##name) *name; // NOLINT(bugprone-macro-parentheses)
    NCCL_FUNCTIONS(XX)
#undef XX
};

/* ERR_UNSUPPORTED when there is no library, or it is too old. Never closed: NCCL's threads may live
 * until the process ends. */
MUST_CHECK int nccl_lib_open(struct nccl_lib *lib, struct err_msg *why);

#endif
