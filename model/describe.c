#include "model/describe.h"

#include "model/fingerprint.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int model_describe_config(struct model_info *i, const char *dir, const struct llama_config *c,
                          struct err_msg *why)
{
    char path[PATH_MAX];
    if (!realpath(dir, path))
        return err_set(why, -errno, "%s: %s", dir, err_str(-errno));
    const char *slash = strrchr(path, '/');
    (void)snprintf(i->name, sizeof i->name, "%.63s", slash ? slash + 1 : path);
    i->vocab_size = c->vocab_size;
    i->hidden_size = c->hidden_size;
    i->n_layers = c->n_layers;
    i->n_heads = c->n_heads;
    i->n_kv_heads = c->n_kv_heads;
    i->head_dim = c->head_dim;
    i->intermediate_size = c->intermediate_size;
    i->max_position = c->max_position;
    i->rms_eps = (float)c->rms_eps;
    i->softmax_scale = 1.0f / sqrtf((float)c->head_dim);
    i->n_eos = c->n_eos;
    memcpy(i->eos_ids, c->eos_ids, sizeof i->eos_ids);
    i->bos_id = c->bos_id;
    llama_rope_text(i->rope, sizeof i->rope, &c->rope);
    return 0;
}

int model_describe(struct model_info *out, const char *dir, bool random_weights,
                   struct err_msg *why)
{
    struct llama_config c;
    struct safetensors *st = NULL;
    *out = (struct model_info){0};
    TRY(llama_config_load(&c, dir, why));
    TRY(model_describe_config(out, dir, &c, why));
    if (!random_weights)
        TRY(safetensors_open_dir(&st, dir, why));
    out->fingerprint = model_fingerprint(&c, st);
    safetensors_close(st);
    return 0;
}
