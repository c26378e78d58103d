/* What one step sees of the schedule: plain data, no request, no queue, no clock. The other seam
 * between the folders. The scheduler fills a batch, the model runs it, the scheduler reads the
 * result. Everything a batch points to stays unchanged until the step has finished. Followers
 * (other ranks) replay the same batch without sampling. */
#ifndef MODEL_BATCH_H
#define MODEL_BATCH_H

#include <stdbool.h>
#include <stdint.h>

enum {
    BATCH_MAX_LOGPROBS = 20,
    BATCH_MAX_STOP = 16 /* stop token ids of one request */
};

enum batch_gate { BATCH_DENSE, BATCH_ABS, BATCH_REL }; /* values equal enum attn_gate's */

/* The page policy one sequence chose; the model resolves it against its threshold file. */
struct batch_policy {
    uint8_t gate;       /* enum batch_gate */
    uint8_t gate_rows;  /* 128 or 64 */
    int16_t level;      /* ABS: index into the threshold file's k list; REL, steered: its step */
    float ln_lambda;    /* REL */
    float steer, blend; /* see struct attn_choice; steer 0: gates stay where they are */
    /* Of generated rows: BATCH_DENSE or BATCH_ABS, and then an index into the file's decode_k. */
    int16_t decode_gate, decode_level;
    bool lost_mass; /* measure what prompt rows lose by the gate (attention/attn_lost.h) */
};

/* How one sequence's next token is chosen. Randomness is a pure function of (seed, position of the
 * token), so a resumed request draws the same tokens. */
struct batch_sampling {
    float temperature;                         /* 0: greedy */
    float top_p;                               /* 1: off */
    float min_p;                               /* 0: off */
    int32_t top_k;                             /* 0: off */
    float repetition_penalty;                  /* 1: off; over prompt and output tokens */
    float presence_penalty, frequency_penalty; /* 0: off; over output tokens */
    uint64_t seed;
    int32_t n_logprobs; /* 0: none; N: of the chosen token and of the N most likely */
    int32_t min_tokens; /* stop tokens are barred while fewer are generated */
    bool ignore_eos;    /* the model's EOS ids do not stop (and min_tokens does not bar them) */
    int32_t n_stop;
    int32_t stop_ids[BATCH_MAX_STOP];
};

struct batch_seq {
    uint64_t id;           /* request, for logs */
    const int32_t *tokens; /* all tokens known so far, from position 0; [start, start + n_tokens)
                              are this step's input */
    int32_t start;
    int32_t n_tokens;
    int32_t
        prompt_len; /* positions below follow the prefill policy, the others the decode policy */
    const int32_t *pages;
    int32_t n_pages;
    struct batch_policy policy;
    bool sample; /* the input reaches the last known token: draw the next one */
    const struct batch_sampling *sampling; /* not NULL when sample */
};

struct batch {
    uint64_t step_id;
    int32_t n_seqs;
    int32_t n_tokens; /* sum over sequences */
    const struct batch_seq *seqs;
    /* Compute all rows of the last layer, not only what the samples need: for its counters, to
     * calibrate or to compare. Results are the same. */
    bool all_rows;
};

struct batch_token {
    int32_t token; /* -1: not sampled */
    bool numeric;  /* logits were NaN or infinite; token is -1 */
    float logprob; /* of token, after penalties, before temperature and truncation: log softmax of
                      the processed logits */
    int32_t n_top;
    int32_t top_ids[BATCH_MAX_LOGPROBS];
    float top_logprobs[BATCH_MAX_LOGPROBS];
};

/* Pages counted over all layers and heads of the sequence in this step (see attention/policy.h); of
 * the last layer, those of the blocks whose rows are sampled, unless all rows are computed, or
 * those of the sequence for its lost mass or after a preemption. */
struct batch_counts {
    uint64_t reachable, visited, kept;
    uint64_t sampled; /* rows and heads whose lost mass was measured */
    double lost;      /* its sum over them */
};

struct batch_result {
    struct batch_token *tokens;  /* [max_seqs] */
    struct batch_counts *counts; /* [max_seqs] */
    /* The step, and within it attention, GEMMs and the sums over ranks with the wait for slower
     * ones (0 where the step is one captured graph), as rank 0 saw them; host_us of it the host
     * planned, packed and launched while the device may have worked already. */
    int64_t total_us, attention_us, gemm_us, comm_us, host_us;
};

#endif
