/* The client library: connecting and submitting. Errors are returned, never fatal: this code runs
 * in other people's programs. */
#include "ipc/client_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CONNECT_MS = 5000 };

_Static_assert(SLUICE_EPROTOCOL == ERR_PROTOCOL && SLUICE_EINVALID == ERR_INVALID &&
                   SLUICE_EREFUSED == ERR_AUTH,
               "error codes");
_Static_assert((int)SLUICE_MAX_STOP == (int)IPC_MAX_STOP &&
                   (int)SLUICE_MAX_LOGPROBS == (int)IPC_MAX_LOGPROBS &&
                   (int)SLUICE_REL == (int)IPC_SPARSE_REL &&
                   (int)SLUICE_SHUTDOWN == (int)IPC_REASON_SHUTDOWN,
               "limits and numbers");

/* --- connecting --- */

static int copy_text(char *to, size_t room, const char *text, const char *what, struct err_msg *why)
{
    size_t len = text ? strlen(text) : 0;
    if (len >= room)
        return err_set(why, ERR_INVALID, "%s: longer than %zu bytes", what, room - 1);
    if (len)
        memcpy(to, text, len);
    to[len] = '\0';
    return 0;
}

static void fill_info(struct sluice_client *c)
{
    const struct ipc_hello_ok *h = &c->hello;
    c->info = (struct sluice_info){
        .proto_major = h->proto_major,
        .proto_minor = h->proto_minor,
        .version = h->version,
        .instance_id = h->instance_id,
        .model = h->model,
        .kv_dtype = h->kv_dtype,
        .device = h->device,
        .vocab = h->vocab,
        .max_model_len = h->max_model_len,
        .max_servable_tokens = h->max_servable_tokens,
        .block_size = h->block_size,
        .num_blocks = h->num_blocks,
        .tp = h->tp,
        .gate_rows = h->gate_rows,
        .n_levels = h->n_levels,
        .k_levels = h->k_levels,
        .n_decode_levels = h->n_decode_levels,
        .decode_levels = h->decode_levels,
        .max_frame = h->max_frame,
        .max_connections = h->max_connections,
        .max_queued_requests = h->max_queued_requests,
        .max_queued_tokens = h->max_queued_tokens,
    };
    for (int32_t i = 0; i < h->n_modes; i++) {
        c->info.has_dense |= h->modes[i] == IPC_SPARSE_DENSE;
        c->info.has_abs |= h->modes[i] == IPC_SPARSE_ABS;
        c->info.has_rel |= h->modes[i] == IPC_SPARSE_REL;
    }
}

static int shake(struct sluice_client *c, const struct sluice_options *o, int64_t deadline)
{
    struct ipc_hello hello;
    const uint8_t *payload = NULL;
    size_t len = 0;
    ipc_body_init(IPC_HELLO, &hello);
    hello.proto_major = IPC_PROTO_MAJOR;
    hello.proto_minor = IPC_PROTO_MINOR;
    TRY(copy_text(hello.client, sizeof hello.client, o->name ? o->name : "sluice_client", "name",
                  &c->why));
    TRY(copy_text(hello.token, sizeof hello.token, o->token, "token", &c->why));
    TRY(ipc_body_pack(&c->out, IPC_HELLO, &hello, &c->why));
    int rc = client_next_payload(c, &payload, &len, deadline);
    if (rc == 0)
        return err_set(&c->why, -ETIMEDOUT, "no answer to the handshake in time");
    TRY(rc);
    TRY(client_unpack(c, payload, len));
    if (c->msg.type == IPC_ERROR)
        return err_set(&c->why, ERR_AUTH, "the daemon refused the connection: %s: %s",
                       ipc_code_name(c->msg.u.error.code), c->msg.u.error.message);
    if (c->msg.type != IPC_HELLO_OK)
        return err_set(&c->why, ERR_PROTOCOL, "the daemon answered HELLO with %s",
                       ipc_type_name(c->msg.type));
    c->hello = c->msg.u.hello_ok;
    fill_info(c);
    return 0;
}

static int client_start(struct sluice_client *c, const char *address,
                        const struct sluice_options *o)
{
    int64_t deadline = client_deadline(o->connect_ms > 0 ? o->connect_ms : CONNECT_MS);
    c->fd = -1;
    c->last_kept = &c->first_kept;
    ipc_frame_reader_init(&c->in, IPC_FRAME_MAX);
    TRY(ipc_decoder_create(&c->decoder));
    TRY(client_connect(c, address, deadline));
    return shake(c, o, deadline);
}

int sluice_connect(struct sluice_client **out, const char *address,
                   const struct sluice_options *options, char *why, size_t why_len)
{
    static const struct sluice_options none;
    struct sluice_client *c = calloc(1, sizeof *c);
    int err = c ? client_start(c, address, options ? options : &none) : -ENOMEM;
    if (why && why_len)
        (void)snprintf(why, why_len, "%s", err < 0 ? err_why(c ? &c->why : NULL, err) : "");
    if (err < 0) {
        sluice_close(c);
        c = NULL;
    }
    *out = c;
    return err;
}

void sluice_close(struct sluice_client *c)
{
    if (!c)
        return;
    if (c->fd >= 0)
        (void)close(c->fd);
    while (c->first_kept) {
        struct kept *k = c->first_kept;
        c->first_kept = k->next;
        free(k);
    }
    ipc_frame_reader_deinit(&c->in);
    ipc_buf_free(&c->out);
    ipc_decoder_destroy(c->decoder);
    free(c->logprobs);
    free(c->stats);
    free(c);
}

/* --- small things --- */

const struct sluice_info *sluice_get_info(const struct sluice_client *c)
{
    return &c->info;
}

const char *sluice_error(const struct sluice_client *c)
{
    return c->why.text;
}

const char *sluice_strerror(int err)
{
    return err_str(err);
}

const char *sluice_code_name(int code)
{
    return ipc_code_name(code);
}

const char *sluice_reason_name(int reason)
{
    return ipc_reason_name(reason);
}

bool sluice_event_is_last(const struct sluice_event *event)
{
    return event->type == SLUICE_DONE || event->type == SLUICE_FAILED;
}

/* --- requests --- */

void sluice_request_init(struct sluice_request *r)
{
    *r = (struct sluice_request){
        .max_tokens = 16,
        .temperature = 1,
        .top_p = 1,
        .repetition_penalty = 1,
        .stream = true,
    };
}

static int copy_bounded(struct ipc_submit *m, const struct sluice_request *r, struct err_msg *why)
{
    TRY(copy_text(m->id, sizeof m->id, r->id, "id", why));
    TRY(copy_text(m->tenant, sizeof m->tenant, r->tenant, "tenant", why));
    if (r->n_stop < 0 || r->n_stop > IPC_MAX_STOP)
        return err_set(why, ERR_INVALID, "stop_token_ids: %d, at most %d", r->n_stop, IPC_MAX_STOP);
    if (r->n_salt < 0 || r->n_salt > IPC_SALT_BYTES)
        return err_set(why, ERR_INVALID, "cache_salt: %d bytes, at most %d", r->n_salt,
                       IPC_SALT_BYTES);
    if (r->n_tokens < 0 || (r->n_tokens > 0 && !r->tokens))
        return err_set(why, ERR_INVALID, "tokens: missing");
    m->n_stop = r->n_stop;
    memcpy(m->stop_token_ids, r->stop_token_ids, sizeof m->stop_token_ids);
    m->n_salt = r->n_salt;
    if (r->n_salt > 0)
        memcpy(m->cache_salt, r->cache_salt, (size_t)r->n_salt);
    m->n_tokens = r->n_tokens;
    m->tokens = r->tokens;
    return 0;
}

int sluice_submit(struct sluice_client *c, const struct sluice_request *r)
{
    struct ipc_submit m;
    ipc_body_init(IPC_SUBMIT, &m);
    TRY(copy_bounded(&m, r, &c->why));
    m.max_tokens = r->max_tokens;
    m.min_tokens = r->min_tokens;
    m.temperature = r->temperature;
    m.top_k = r->top_k;
    m.top_p = r->top_p;
    m.min_p = r->min_p;
    m.repetition_penalty = r->repetition_penalty;
    m.presence_penalty = r->presence_penalty;
    m.frequency_penalty = r->frequency_penalty;
    m.has_seed = r->has_seed;
    m.seed = r->seed;
    m.ignore_eos = r->ignore_eos;
    m.logprobs = r->logprobs;
    m.priority = r->priority;
    m.deadline_ms = r->deadline_ms;
    m.queue_timeout_ms = r->queue_timeout_ms;
    m.stream = r->stream;
    m.sparse =
        (struct ipc_sparse){(int32_t)r->sparse, r->k,        r->ln_lambda, r->gate_rows, r->density,
                            r->decode_density,  r->lost_mass};
    TRY(ipc_submit_check(&m, c->info.vocab, &c->why));
    return client_queue(c, IPC_SUBMIT, &m);
}

int sluice_cancel(struct sluice_client *c, const char *id)
{
    return client_queue(c, IPC_CANCEL, &(struct ipc_cancel){1, &id});
}
