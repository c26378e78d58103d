/* A ring of slots in shared memory, each with barriers that complete once a round. */
#ifndef CORE_RING_CUH
#define CORE_RING_CUH

#include <stdint.h>

/* A place in a ring of N slots and the parity of its present round. */
template <int N>
struct ring_place {
    uint32_t slot;
    uint32_t parity;
    __device__ __forceinline__ void next(void)
    {
        slot = slot + 1 == N ? 0 : slot + 1;
        parity ^= slot == 0;
    }
};

#endif
