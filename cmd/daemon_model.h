/* Everything of a daemon that is not sockets: device, ranks' communicator, model, page memory,
 * policy. The leader (rank 0) and the followers build it alike. */
#ifndef CMD_DAEMON_MODEL_H
#define CMD_DAEMON_MODEL_H

#include "cmd/daemon_comm.h"
#include "cmd/daemon_options.h"
#include "cmd/daemon_policy.h"
#include "model/model.h"
#include "parallel/comm.h"

struct daemon_model {
    struct dev *dev;
    struct comm *comm;
    struct model *model;
    struct daemon_policy policy;
    int32_t max_model_len;
    int32_t n_pages;
    int32_t token_budget; /* of a step */
};

MUST_CHECK int daemon_model_open(struct daemon_model *d, const struct daemon_options *o,
                                 const struct daemon_peers *peers, struct err_msg *why);
void daemon_model_close(struct daemon_model *d);

#endif
