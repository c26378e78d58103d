#define LOG_MODULE "device"
#include "cmd/device.h"

#include "core/dtype.h"
#include "core/log.h"
#include "model/model.h"

#ifdef WITH_CUDA
#    include "core/dev_cuda.h"
#endif

#include <stdlib.h>
#include <string.h>

struct choice {
    bool automatic, cuda;
    int index;
};

static int parse(const char *text, struct choice *c)
{
    char *end;
    *c = (struct choice){.automatic = strcmp(text, "auto") == 0};
    if (c->automatic || strcmp(text, "cpu") == 0)
        return 0;
    c->cuda = strncmp(text, "cuda", 4) == 0;
    if (!c->cuda)
        return ERR_CONFIG;
    if (text[4] == '\0')
        return 0;
    long n = strtol(text + 5, &end, 10);
    c->index = (int)n;
    return text[4] == ':' && end != text + 5 && *end == '\0' && n >= 0 && n < 64 ? 0 : ERR_CONFIG;
}

int device_check(const char *text, struct err_msg *why)
{
    struct choice c;
    if (parse(text, &c) < 0)
        return err_set(why, ERR_CONFIG, "--device: '%.40s' is not auto, cpu, cuda or cuda:N", text);
#ifndef WITH_CUDA
    if (c.cuda)
        return err_set(why, ERR_UNSUPPORTED, "--device: this build has no CUDA device");
#endif
    return 0;
}

#ifdef WITH_CUDA
/* A GPU that the kernels do not run on is no reason for `auto` to fail. */
static int open_auto(struct dev **out, int rank, int n_threads, struct err_msg *why)
{
    struct err_msg cause = {""};
    if (dev_cuda_count() > rank) {
        int err = dev_open(out, &dev_cuda, rank, n_threads, &cause);
        if (err == 0)
            return 0;
        log_info("using the CPU: %s", err_why(&cause, err));
    }
    return dev_open(out, &dev_cpu, 0, n_threads, why);
}

int device_open(struct dev **out, const char *text, int rank, int n_threads, struct err_msg *why)
{
    struct choice c;
    TRY(parse(text, &c));
    if (c.automatic)
        return open_auto(out, rank, n_threads, why);
    if (c.cuda)
        return dev_open(out, &dev_cuda, c.index + rank, n_threads, why);
    return dev_open(out, &dev_cpu, 0, n_threads, why);
}
#else
int device_open(struct dev **out, const char *text, int rank, int n_threads, struct err_msg *why)
{
    (void)rank;
    TRY(device_check(text, why));
    return dev_open(out, &dev_cpu, 0, n_threads, why);
}
#endif

int device_dtype(int choice)
{
    static const int dtypes[] = {MODEL_DTYPE_AUTO, DTYPE_F32, DTYPE_BF16, DTYPE_F16};
    return dtypes[choice];
}
