/* Kernels that follow each other in a decode step begin before the one before them has ended
 * (programmatic dependent launch): launches, first instructions and reads of weights lie under its
 * tail. Such a kernel calls begin_next() first, may then read what no kernel writes, and calls
 * wait_for_inputs() in every thread before it reads anything else or writes: a kernel that ended
 * without waiting would free its successors of waiting for its predecessors. */
#ifndef CORE_EARLY_CUH
#define CORE_EARLY_CUH

#include <cuda_runtime.h>

/* Until the kernels before this one have finished and their writes can be read. Nothing where the
 * kernel was launched the ordinary way. */
__device__ __forceinline__ void wait_for_inputs(void)
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

/* Lets the next kernel take what room there is, once every thread block of this one has begun. */
__device__ __forceinline__ void begin_next(void)
{
    asm volatile("griddepcontrol.launch_dependents;");
}

struct launch {
    dim3 grid;
    unsigned threads;
    size_t smem; /* dynamic */
    bool early;  /* what precedes on the stream is a kernel */
    void *stream;
};

template <typename... P, typename... A>
static cudaError_t launch_early(void (*kernel)(P...), const struct launch &l, A... args)
{
    cudaLaunchAttribute attr = {};
    attr.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = l.grid;
    config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.smem;
    config.stream = (cudaStream_t)l.stream;
    config.attrs = &attr;
    config.numAttrs = l.early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, P(args)...);
}

#endif
