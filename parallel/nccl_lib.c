#include "parallel/nccl_lib.h"

#include <dlfcn.h>
#include <string.h>

static int find(void *handle, const char *name, void *function, struct err_msg *why)
{
    void *p = dlsym(handle, name);
    if (!p)
        return err_set(why, ERR_UNSUPPORTED, "libnccl.so.2 has no %s", name);
    memcpy(function, &p, sizeof p); /* ISO C has no cast from an object's address to a function's */
    return 0;
}

int nccl_lib_open(struct nccl_lib *lib, struct err_msg *why)
{
    int version = 0;
    lib->handle = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!lib->handle) {
        const char *text = dlerror(); // NOLINT(concurrency-mt-unsafe): per thread in glibc
        return err_set(why, ERR_UNSUPPORTED, "several GPUs need NCCL: %.300s", text ? text : "");
    }
#define XX(name) TRY(find(lib->handle, "nccl" #name, (void *)&lib->name, why));
    NCCL_FUNCTIONS(XX)
#undef XX
    if (lib->GetVersion(&version) != ncclSuccess || version < NCCL_LEAST)
        return err_set(why, ERR_UNSUPPORTED, "NCCL %d.%d.%d is too old: 2.28 is the least",
                       version / 10000, version / 100 % 100, version % 100);
    return 0;
}
