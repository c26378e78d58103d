#include "cmd/daemon_options.h"

#include "cmd/device.h"

#define AT(f)   offsetof(struct daemon_options, f)
#define ONE_TIB 1099511627776.0

/* One option, two lines. */
// clang-format off
static const struct conf_opt options[] = {
    {"model", CONF_TEXT, AT(model), NULL, 0, 0, {0}, "DIR",
     "Hugging Face folder of a LlamaForCausalLM: config.json and safetensors (required)"},
    {"listen", CONF_TEXT, AT(listen), "unix:/tmp/sluice.sock", 0, 0, {0}, "ADDR",
     "where clients connect: unix:PATH or tcp:HOST:PORT, several separated by commas"},
    {"auth-token-file", CONF_TEXT, AT(auth_token_file), NULL, 0, 0, {0}, "FILE",
     "shared secret that clients must send; required to listen beyond loopback"},
    {"thresholds", CONF_TEXT, AT(thresholds), NULL, 0, 0, {0}, "FILE",
     "threshold file of sluice-calibrate; without one, ABS levels cannot be chosen"},
    {"force-thresholds", CONF_BOOL, AT(force_thresholds), "false", 0, 0, {0}, NULL,
     "use a threshold file made for another model, with a warning"},
    {"decode-density", CONF_FLOAT, AT(decode_density), "0", 0, 1, {0}, "D",
     "share of its pages that a generated token keeps where a request does not say, by thresholds "
     "of sluice-calibrate --decode-k; 0 and 1 are dense"},
    {"steer", CONF_FLOAT, AT(steer), "1", 0, 100, {0}, "X",
     "how firmly a gate is held to the density that a request names or its level has: REL's "
     "ln(lambda) rises by so much with a page kept beyond it, ABS's threshold by half of it, and at "
     "first by more; 0 trusts what was calibrated"},
    {"window", CONF_TEXT, AT(window), NULL, 0, 0, {0}, "SINK:LOCAL",
     "streaming heads visit only the first SINK and the last LOCAL pages of 64 tokens"},
    {"window-heads", CONF_TEXT, AT(window_heads), NULL, 0, 0, {0}, "FILE",
     "which heads stream: a line a layer, a number a KV or query head, below 0.5 streams "
     "(default: all)"},
    {"page-order", CONF_ENUM, AT(page_order), "diag-sink-r2l", 0, 0, {"diag-sink-r2l", "l2r"}, NULL,
     "order in which a query block walks its pages; gates depend on it, but ABS with --steer 0"},
    {"random-weights", CONF_BOOL, AT(random_weights), "false", 0, 0, {0}, NULL,
     "read config.json only and draw the weights, for benches"},
    {"device", CONF_TEXT, AT(device), "auto", 0, 0, {0}, "DEVICE",
     DEVICE_HELP},
    {"dtype", CONF_ENUM, AT(dtype), "auto", 0, 0, DEVICE_DTYPES, NULL,
     "number format of weights and activations; auto is f32 on the CPU, on a GPU f16 where the "
     "files are, else bf16"},
    {"tp", CONF_INT, AT(tp), "1", 1, 64, {0}, "N",
     "ranks the model is split over, one process each"},
    {"nnodes", CONF_INT, AT(nnodes), "1", 1, 64, {0}, "N",
     "hosts that share the model; each runs sluiced with the same options but node-rank"},
    {"node-rank", CONF_INT, AT(node_rank), "0", 0, 63, {0}, "N",
     "number of this host; 0 leads and alone has clients"},
    {"leader", CONF_TEXT, AT(leader), NULL, 0, 0, {0}, "HOST:PORT",
     "with nnodes: where host 0 listens for the others"},
    {"leader-token-file", CONF_TEXT, AT(leader_token_file), NULL, 0, 0, {0}, "FILE",
     "with nnodes: shared secret of the hosts, the same on all"},
    {"threads", CONF_INT, AT(threads), "0", 0, 1024, {0}, "N",
     "worker threads of all ranks together on the CPU; 0 is one per processor"},
    {"kv-memory", CONF_BYTES, AT(kv_memory), "0", 0, ONE_TIB, {0}, "BYTES",
     "memory for cache pages, a rank; 0 is 0.9 of what is free on a GPU, half of it on the CPU, at "
     "most what max-running full-length requests need"},
    {"kv-pages", CONF_INT, AT(kv_pages), "0", 0, 2147483646, {0}, "N",
     "cache pages of 64 tokens; overrides kv-memory"},
    {"kv-dtype", CONF_ENUM, AT(kv_dtype), "auto", 0, 0, DEVICE_DTYPES, NULL,
     "number format of the cache; auto is f32 on the CPU, on a GPU that of the model"},
    {"max-model-len", CONF_INT, AT(max_model_len), "0", 0, 16777216, {0}, "TOKENS",
     "longest prompt plus output; 0 is the model's max_position_embeddings"},
    {"max-running", CONF_INT, AT(max_running), "64", 1, 4096, {0}, "N",
     "requests in the batch at once"},
    {"token-budget", CONF_INT, AT(token_budget), "0", 0, 1048576, {0}, "TOKENS",
     "tokens a step: decodes first, the rest to prefill chunks; 0 is 2048 on the CPU, on GPUs 8192 for each rank, at most 32768"},
    {"max-step-time", CONF_MS, AT(max_step_time), "400ms", 0, 3600000, {0}, "MS",
     "a step that generates tokens takes in as much of prompts as should keep it under this, by what steps before took, but an eighth of the token budget at least; 0 is no limit"},
    {"max-partial-prefills", CONF_INT, AT(max_partial_prefills), "4", 1, 256, {0}, "N",
     "prompts in prefill at once, sharing the budget"},
    {"max-long-partial", CONF_INT, AT(max_long_partial), "2", 1, 256, {0}, "N",
     "of which long ones"},
    {"long-prefill-tokens", CONF_INT, AT(long_prefill_tokens), "4096", 128, 16777216, {0}, "TOKENS",
     "a prompt with more than this left to compute is long"},
    {"watermark", CONF_FLOAT, AT(watermark), "0.01", 0, 0.5, {0}, "SHARE",
     "share of the pages kept free when a request is admitted beside others"},
    {"max-queued-requests", CONF_INT, AT(max_queued_requests), "1024", 1, 1048576, {0}, "N",
     "waiting requests; more are refused with QUEUE_FULL"},
    {"max-queued-tokens", CONF_INT, AT(max_queued_tokens), "16777216", 128, ONE_TIB, {0}, "TOKENS",
     "sum of waiting prompts; more are refused with QUEUE_FULL"},
    {"max-tenant-requests", CONF_INT, AT(max_tenant_requests), "0", 0, 1048576, {0}, "N",
     "waiting and running requests of one tenant; 0 is no limit"},
    {"prefix-cache", CONF_BOOL, AT(prefix_cache), "true", 0, 0, {0}, NULL,
     "reuse pages of equal prompt prefixes"},
    {"share-generated", CONF_BOOL, AT(share_generated), "true", 0, 0, {0}, NULL,
     "pages holding generated tokens are reused too, for multi-turn chats"},
    {"max-connections", CONF_INT, AT(max_connections), "1024", 1, 65536, {0}, "N",
     "client connections at once"},
    {"max-frame", CONF_BYTES, AT(max_frame), "16M", 65536, 1073741824, {0}, "BYTES",
     "largest frame a client may send"},
    {"handshake-timeout", CONF_MS, AT(handshake_timeout), "5s", 10, 600000, {0}, "MS",
     "a connection that has not said HELLO by then is closed"},
    {"slow-bytes", CONF_BYTES, AT(slow_bytes), "4M", 65536, 1073741824, {0}, "BYTES",
     "unread output at which a client is dropped"},
    {"slow-timeout", CONF_MS, AT(slow_timeout), "10s", 100, 3600000, {0}, "MS",
     "a client that has taken nothing for this long while output waits is dropped"},
    {"drain-timeout", CONF_MS, AT(drain_timeout), "5m", 0, 86400000, {0}, "MS",
     "after SIGTERM, what is still running by then is ended"},
    {"step-timeout", CONF_MS, AT(step_timeout), "120s", 1000, 3600000, {0}, "MS",
     "a step that takes longer means a stuck rank: the engine fails"},
    {"comm-timeout", CONF_MS, AT(comm_timeout), "30s", 100, 3600000, {0}, "MS",
     "a rank that keeps the others waiting this long is taken for stuck"},
    {"metrics", CONF_TEXT, AT(metrics), NULL, 0, 0, {0}, "HOST:PORT",
     "serve Prometheus metrics over HTTP"},
    {"log-level", CONF_ENUM, AT(log_level), "info", 0, 0, {"error", "warn", "info", "debug"}, NULL,
     "least level logged"},
    {"rank", CONF_INT, AT(rank), "0", 0, 63, {0}, "N",
     "internal: this process's rank"},
    {"shm", CONF_TEXT, AT(shm), NULL, 0, 0, {0}, "NAME",
     "internal: shared memory of the ranks"},
};
// clang-format on

const struct conf_program daemon_program = {
    "sluiced --model DIR [options]",
    "Serves a Llama-family model to many long-context users over msgpack. Protocol: "
    "ipc/PROTOCOL.md.",
    options,
    sizeof options / sizeof *options,
};

int daemon_options_check(const struct daemon_options *o, struct err_msg *why)
{
    if (!o->model)
        return err_set(why, ERR_CONFIG, "--model DIR is required");
    TRY(device_check(o->device, why));
    if (o->token_budget > 0 && o->token_budget < o->max_running + 128)
        return err_set(why, ERR_CONFIG,
                       "--token-budget: %lld is less than max-running + 128 = %lld",
                       (long long)o->token_budget, (long long)o->max_running + 128);
    if (o->tp % o->nnodes)
        return err_set(why, ERR_CONFIG, "--nnodes: %lld does not divide --tp %lld",
                       (long long)o->nnodes, (long long)o->tp);
    if (o->node_rank >= o->nnodes)
        return err_set(why, ERR_CONFIG, "--node-rank: %lld is not below --nnodes %lld",
                       (long long)o->node_rank, (long long)o->nnodes);
    if (o->nnodes > 1 && (!o->leader || !o->leader_token_file))
        return err_set(why, ERR_CONFIG, "--nnodes: needs --leader and --leader-token-file");
    if (o->rank >= o->tp / o->nnodes)
        return err_set(why, ERR_CONFIG, "--rank: %lld is not below --tp %lld", (long long)o->rank,
                       (long long)o->tp);
    if (o->rank > 0 && !o->shm)
        return err_set(why, ERR_CONFIG, "--rank: set by the leader only");
    if (o->window_heads && !o->window)
        return err_set(why, ERR_CONFIG, "--window-heads: needs --window SINK:LOCAL");
    return 0;
}
