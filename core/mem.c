#include "core/mem.h"

#include "core/err.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

void *mem_alloc(size_t bytes)
{
    void *p = malloc(bytes ? bytes : 1);
    ASSERT(p != NULL);
    return p;
}

void *mem_zalloc(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size ? size : 1);
    ASSERT(p != NULL);
    return p;
}

void *mem_realloc(void *p, size_t bytes)
{
    void *q = realloc(p, bytes ? bytes : 1);
    ASSERT(q != NULL);
    return q;
}

char *mem_strdup(const char *s)
{
    char *p = strdup(s);
    ASSERT(p != NULL);
    return p;
}

void mem_free(void *p)
{
    free(p);
}

void *mem_try_aligned(size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > SIZE_MAX - 128)
        return NULL;
    bytes = (bytes + 63) / 64 * 64;
    void *p = aligned_alloc(64, bytes ? bytes : 64);
    if (p)
        memset(p, 0, bytes);
    return p;
}
