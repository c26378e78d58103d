/* The page policy of a daemon, put together from its options: threshold file, streaming window,
 * page order. */
#ifndef CMD_DAEMON_POLICY_H
#define CMD_DAEMON_POLICY_H

#include "attention/policy.h"
#include "calibration/thresholds.h"
#include "cmd/daemon_options.h"
#include "model/model.h"

struct daemon_policy {
    struct attn_policy attn;
    struct thresholds *thresholds;  /* NULL: none */
    struct attn_head_policy *heads; /* NULL: every head visits all pages */
    const char *no_decode;          /* why generated tokens cannot be gated, or NULL */
    uint64_t fingerprint; /* of the threshold file and the visit sets; 0 is dense over all pages */
};

MUST_CHECK int daemon_policy_load(struct daemon_policy *p, const struct daemon_options *o,
                                  const struct model_info *info, struct err_msg *why);
void daemon_policy_free(struct daemon_policy *p);

#endif
