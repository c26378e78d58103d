#include "model/fingerprint.h"

#include "core/hash.h"

#include <stdio.h>
#include <string.h>

enum { WHOLE_BYTES = 64 * 1024, PIECE_BYTES = 1024, N_PIECES = 64 };

static uint64_t hash_content(const struct st_tensor *t)
{
    const unsigned char *p = t->data;
    uint64_t h = 0;
    if (t->bytes <= WHOLE_BYTES)
        return hash_bytes(p, t->bytes, 0);
    size_t last = t->bytes - PIECE_BYTES;
    for (size_t i = 0; i < N_PIECES; i++) {
        size_t at = last / (N_PIECES - 1) * i;
        h = hash_bytes(p + (i == N_PIECES - 1 ? last : at), PIECE_BYTES, h);
    }
    return h;
}

static uint64_t hash_tensor(const struct st_tensor *t)
{
    char shape[256];
    uint64_t h = hash_bytes(t->name, strlen(t->name), 1);
    const char *type = st_dtype_name(t->dtype);
    (void)st_shape_text(shape, sizeof shape, t->shape, t->n_dims);
    h = hash_bytes(type, strlen(type), h);
    h = hash_bytes(shape, strlen(shape), h);
    return hash_pair(h, hash_content(t));
}

static uint64_t hash_config(const struct llama_config *c)
{
    char text[512];
    const struct rope_config *r = &c->rope;
    int n = snprintf(text, sizeof text,
                     "llama %d %d %d %d %d %d %d eps %.17g rope %d %.17g %.17g %.17g %.17g %d "
                     "tied %d bias %d %d",
                     c->vocab_size, c->hidden_size, c->intermediate_size, c->n_layers, c->n_heads,
                     c->n_kv_heads, c->head_dim, c->rms_eps, (int)r->type, r->theta, r->factor,
                     r->low_freq_factor, r->high_freq_factor, r->original_max_position, c->tied,
                     c->attention_bias, c->mlp_bias);
    ASSERT(n > 0 && (size_t)n < sizeof text);
    return hash_bytes(text, (size_t)n, 0);
}

uint64_t model_fingerprint(const struct llama_config *c, const struct safetensors *st)
{
    uint64_t sum = 0; /* a sum, so that shards and their order do not matter */
    if (!st)
        return hash_pair(hash_config(c), hash_bytes("random", strlen("random"), 0));
    for (size_t i = 0; i < safetensors_count(st); i++)
        sum += hash_tensor(safetensors_at(st, i));
    return hash_pair(hash_config(c), sum);
}
