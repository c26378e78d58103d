/* One round of the demo: the eight users on eight connections under one attention mode, measured.
 * One thread and poll(2). */
#ifndef CMD_DEMO_RUN_H
#define CMD_DEMO_RUN_H

#include "cmd/demo_daemon.h"
#include "cmd/demo_plan.h"
#include "cmd/demo_stats.h"
#include "ipc/client.h"

struct demo_mode {
    char name[24];
    enum sluice_sparse sparse;
    int32_t k;
    double ln_lambda;
    int32_t gate_rows;
};

enum demo_state { DEMO_AWAY, DEMO_WAITING, DEMO_ANSWERED, DEMO_LEFT, DEMO_BROKEN };

struct demo_answer {
    enum demo_state state;
    int32_t computed, cached; /* prompt tokens so far; of which from the cache */
    int32_t tokens[DEMO_MAX_ANSWER];
    int32_t n_tokens;
    int64_t ttft_us; /* the user's clock: sent to first token */
    bool exact;
    double score;             /* RULER */
    uint64_t reachable, kept; /* pages */
    char problem[160];        /* when BROKEN */
};

struct demo_round {
    struct demo_answer users[DEMO_USERS];
    struct demo_stats before, after;
    int64_t wall_us;
    int64_t peak_pages; /* most cache pages in use at once */
    bool leaked;        /* pages in use after everybody was gone */
};

struct demo_scene {
    const struct demo_prompt *prompts; /* [DEMO_USERS] */
    struct demo_daemon *daemon;
    struct sluice_client *control; /* for STATS */
    int signal_fd;                 /* readable when the demo shall stop */
    bool progress;                 /* a live line on stderr */
    int64_t stall_us;              /* give up after so long without any event */
};

/* Fills out. Fails when the daemon ends, stalls or breaks its protocol, and with -EINTR on a
 * signal; a user's error is in its answer. */
MUST_CHECK int demo_run(struct demo_round *out, const struct demo_scene *scene,
                        const struct demo_mode *mode, struct err_msg *why);

#endif
