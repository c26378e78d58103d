/* Identity of a model: which thresholds and which cached pages belong to it.
 * Hashes the configuration's arithmetic (sizes, rope, epsilon, biases, tying; not the token ids
 * nor the longest position, which change no K or V) and of every tensor its name, type, shape and a
 * sample of its content: all of it up to 64 KiB, else 64 pieces of 1 KiB at even distances, ends
 * included. Hashing a 16 GB model whole would cost tens of seconds at every start; a fine-tuned
 * model differs nearly everywhere, so the sample tells it apart. A tampered file is not what this
 * guards against. Independent of shards, tensor order, ranks and device. */
#ifndef MODEL_FINGERPRINT_H
#define MODEL_FINGERPRINT_H

#include "model/config.h"
#include "model/safetensors.h"

#include <stdint.h>

/* st NULL: random weights (weights.h). */
uint64_t model_fingerprint(const struct llama_config *c, const struct safetensors *st);

#endif
