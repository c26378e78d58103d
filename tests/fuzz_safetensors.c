/* Any bytes are a sound file or an error: tensors lie inside the data, and touching every byte and
 * looking every name up is safe. */
#include "model/safetensors.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct safetensors *s;
    struct err_msg why = {{0}};
    unsigned char sum = 0;
    if (safetensors_parse(&s, data, size, "fuzz", &why) < 0) {
        if (!why.text[0])
            abort();
        return 0;
    }
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct st_tensor *t = safetensors_at(s, i);
        const unsigned char *p = t->data;
        char text[64];
        if (p < data || p + t->bytes > data + size || safetensors_find(s, t->name) != t)
            abort();
        for (size_t k = 0; k < t->bytes; k++)
            sum ^= p[k];
        (void)st_shape_text(text, sizeof text, t->shape, t->n_dims);
    }
    __asm__ volatile("" : : "r"(sum)); /* reading was the point */
    (void)safetensors_metadata(s, "format");
    safetensors_close(s);
    return 0;
}
