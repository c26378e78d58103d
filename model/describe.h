/* What a model folder says of its model, without loading it. */
#ifndef MODEL_DESCRIBE_H
#define MODEL_DESCRIBE_H

#include "core/err.h"
#include "model/config.h"
#include "model/model.h"

#include <stdbool.h>

/* Everything but the number formats, which are the device's choice, as model_info would tell. With
 * random_weights config.json alone is read. */
MUST_CHECK int model_describe(struct model_info *out, const char *dir, bool random_weights,
                              struct err_msg *why);
/* The part that the configuration and the folder's name tell; inside model/ only. */
MUST_CHECK int model_describe_config(struct model_info *out, const char *dir,
                                     const struct llama_config *c, struct err_msg *why);

#endif
