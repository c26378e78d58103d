/* Small host allocations: they abort when the machine is out of memory, so that callers have no
 * error path. Anything whose size a user chooses (pools, weights, prompts) uses mem_try_* or the
 * device API instead. */
#ifndef CORE_MEM_H
#define CORE_MEM_H

#include <stddef.h>

void *mem_alloc(size_t bytes);               /* uninitialised */
void *mem_zalloc(size_t count, size_t size); /* zeroed, overflow-checked */
void *mem_realloc(void *p, size_t bytes);
char *mem_strdup(const char *s);
void mem_free(void *p); /* accepts NULL */

/* 64-byte aligned, zeroed, NULL on failure or overflow; release with mem_free. */
void *mem_try_aligned(size_t count, size_t size);

#endif
