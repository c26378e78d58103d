/* config.json (and generation_config.json) of a Hugging Face LlamaForCausalLM folder, as
 * transformers 4 and 5 write them: rope_theta with rope_scaling, or rope_parameters; torch_dtype or
 * dtype. What this engine does not compute is refused with the field named, never ignored: a field
 * that changes the arithmetic must not pass unseen. */
#ifndef MODEL_CONFIG_H
#define MODEL_CONFIG_H

#include "core/err.h"
#include "model/batch.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { LLAMA_MAX_HEAD_DIM = 256 };

enum rope_type { ROPE_DEFAULT, ROPE_LINEAR, ROPE_LLAMA3 };

/* Fields that a type does not use are 0. */
struct rope_config {
    enum rope_type type;
    double theta;
    double factor;                            /* linear and llama3 */
    double low_freq_factor, high_freq_factor; /* llama3 */
    int32_t original_max_position;            /* llama3 */
};

struct llama_config {
    int32_t vocab_size, hidden_size, intermediate_size;
    int32_t n_layers, n_heads, n_kv_heads, head_dim;
    int32_t max_position;
    double rms_eps;
    struct rope_config rope;
    bool tied; /* the output projection is the embedding table */
    bool attention_bias, mlp_bias;
    int32_t bos_id; /* -1: none */
    int32_t n_eos;  /* config.json's and generation_config.json's together, ascending */
    int32_t eos_ids[BATCH_MAX_STOP];
};

MUST_CHECK int llama_config_load(struct llama_config *out, const char *dir, struct err_msg *why);
/* One config.json in memory; `name` stands for the file in messages. */
MUST_CHECK int llama_config_parse(struct llama_config *out, const char *json, size_t len,
                                  const char *name, struct err_msg *why);
/* "default theta=1e+08", "llama3 theta=500000 factor=8". */
void llama_rope_text(char *text, size_t size, const struct rope_config *rope);

#endif
