/* The CPU as a device: anonymous mappings for memory, memcpy for copies, a worker pool for kernels.
 * Linux grants mappings it cannot back, so an allocation is first compared with what the machine
 * has available (MemAvailable, and the cgroup's limit where there is one): a pool that does not fit
 * is an error at start, not a kill in the middle of a prompt. */
#include "core/dev.h"
#include "core/mem.h"
#include "core/pool.h"

#include <errno.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

struct dev_cpu_state {
    struct dev base;
};

static int open_cpu(struct dev **out, int index, int n_threads, struct err_msg *why)
{
    if (index != 0)
        return err_set(why, ERR_INVALID, "device cpu:%d: there is one CPU device, index 0", index);
    struct dev_cpu_state *d = mem_zalloc(1, sizeof *d);
    d->base.ops = &dev_cpu;
    int err = pool_create(&d->base.pool, n_threads);
    if (err < 0) {
        mem_free(d);
        return err_set(why, err, "device cpu: cannot start %d threads: %s", n_threads,
                       err_str(err));
    }
    *out = &d->base;
    return 0;
}

static void close_cpu(struct dev *d)
{
    pool_destroy(d->pool);
    mem_free(d);
}

static int meminfo_field(const char *name, size_t *bytes)
{
    char line[128];
    int err = -ENOENT;
    FILE *f = fopen("/proc/meminfo", "re");
    if (!f)
        return -errno;
    while (err && fgets(line, sizeof line, f)) {
        uint64_t kib;
        size_t len = strlen(name);
        if (strncmp(line, name, len) == 0 &&
            sscanf(line + len, ": %" SCNu64, &kib) == 1) { // NOLINT(cert-err34-c)
            *bytes = (size_t)kib * 1024;
            err = 0;
        }
    }
    (void)fclose(f);
    return err;
}

static size_t read_size(const char *path)
{
    uint64_t v = 0;
    FILE *f = fopen(path, "re");
    if (!f)
        return SIZE_MAX;
    int n = fscanf(f, "%" SCNu64, &v); // NOLINT(cert-err34-c): "max" leaves n == 0
    (void)fclose(f);
    return n == 1 ? (size_t)v : SIZE_MAX;
}

static int mem_info_cpu(struct dev *d, size_t *free_bytes, size_t *total_bytes)
{
    (void)d;
    TRY(meminfo_field("MemAvailable", free_bytes));
    TRY(meminfo_field("MemTotal", total_bytes));
    size_t limit = read_size("/sys/fs/cgroup/memory.max");
    if (limit < *total_bytes) {
        size_t used = read_size("/sys/fs/cgroup/memory.current");
        size_t left = used < limit ? limit - used : 0;
        *total_bytes = limit;
        if (left < *free_bytes)
            *free_bytes = left;
    }
    return 0;
}

static int alloc_cpu(struct dev *d, void **out, size_t bytes, struct err_msg *why)
{
    size_t free_bytes = 0, total_bytes = 0;
    if (mem_info_cpu(d, &free_bytes, &total_bytes) == 0 && bytes > free_bytes)
        return err_set(why, -ENOMEM, "%.1f MiB asked for, %.1f of %.1f MiB of memory available",
                       (double)bytes / 1048576.0, (double)free_bytes / 1048576.0,
                       (double)total_bytes / 1048576.0);
    void *p =
        mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return err_set(why, -errno, "%.1f MiB asked for: %s", (double)bytes / 1048576.0,
                       err_str(-errno));
    (void)madvise(p, bytes, MADV_HUGEPAGE); /* advice only */
    *out = p;
    return 0;
}

static void release_cpu(struct dev *d, void *p, size_t bytes)
{
    (void)d;
    (void)munmap(p, bytes ? bytes : 1);
}

static int copy_cpu(struct dev *d, void *dst, const void *src, size_t bytes)
{
    (void)d;
    memcpy(dst, src, bytes);
    return 0;
}

static int sync_cpu(struct dev *d)
{
    (void)d;
    return 0;
}

const struct dev_ops dev_cpu = {
    .name = "cpu",
    .open = open_cpu,
    .close = close_cpu,
    .mem_info = mem_info_cpu,
    .alloc = alloc_cpu,
    .release = release_cpu,
    .upload = copy_cpu,
    .download = copy_cpu,
    .sync = sync_cpu,
};
