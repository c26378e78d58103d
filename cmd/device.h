/* The --device option: "auto", "cpu", "cuda" or "cuda:N". */
#ifndef CMD_DEVICE_H
#define CMD_DEVICE_H

#include "core/dev.h"

#define DEVICE_HELP                                                                                \
    "where the model runs: auto, cpu, cuda or cuda:N; auto is a Hopper GPU, else the CPU"

/* Choices of --dtype and --kv-dtype, in this order. */
#define DEVICE_DTYPES                                                                              \
    {                                                                                              \
        "auto", "f32", "bf16", "f16"                                                               \
    }

/* Whether the option can be understood, and this build knows the device. */
MUST_CHECK int device_check(const char *text, struct err_msg *why);
/* Opens it. A rank > 0 of a CUDA model takes the rank-th GPU after the one named. */
MUST_CHECK int device_open(struct dev **out, const char *text, int rank, int n_threads,
                           struct err_msg *why);
/* A choice of DEVICE_DTYPES as model_config wants it. */
int device_dtype(int choice);

#endif
