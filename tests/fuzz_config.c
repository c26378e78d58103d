/* Any text is a configuration whose numbers hold together or an error that says something. */
#include "model/config.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct llama_config c;
    struct err_msg why = {{0}};
    char text[64];
    if (llama_config_parse(&c, (const char *)data, size, "fuzz", &why) < 0) {
        if (!why.text[0])
            abort();
        return 0;
    }
    if (c.vocab_size < 1 || c.n_heads < 1 || c.n_kv_heads < 1 || c.n_heads % c.n_kv_heads ||
        c.head_dim < 2 || c.head_dim > LLAMA_MAX_HEAD_DIM || c.head_dim % 2 || c.n_layers < 1 ||
        c.max_position < 1 || !(c.rope.theta > 0) || c.n_eos < 0 || c.n_eos > BATCH_MAX_STOP)
        abort();
    for (int32_t i = 0; i < c.n_eos; i++)
        if (c.eos_ids[i] < 0 || c.eos_ids[i] >= c.vocab_size)
            abort();
    llama_rope_text(text, sizeof text, &c.rope);
    return 0;
}
