/* 64-bit content hashes (xxHash XXH3). Not cryptographic: whoever relies on equality compares the
 * content too. */
#ifndef CORE_HASH_H
#define CORE_HASH_H

#include <stddef.h>
#include <stdint.h>

uint64_t hash_bytes(const void *data, size_t len, uint64_t seed);
/* Order-dependent mix of two hashes. */
uint64_t hash_pair(uint64_t a, uint64_t b);

#endif
