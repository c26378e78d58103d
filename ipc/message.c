/* Defaults and the checks that need more than one field. */
#include "ipc/message.h"

#include "ipc/schema.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void field_default(const struct ipc_field *f, char *body)
{
    char *at = body + f->offset;
    bool flag = f->def > 0;
    int32_t i32 = (int32_t)f->def;
    int64_t i64 = (int64_t)f->def;
    switch (f->kind) {
    case IPC_KIND_BOOL: memcpy(at, &flag, sizeof flag); break;
    case IPC_KIND_I32: memcpy(at, &i32, sizeof i32); break;
    case IPC_KIND_I64: memcpy(at, &i64, sizeof i64); break;
    case IPC_KIND_F64: memcpy(at, &f->def, sizeof f->def); break;
    default: break; /* zero: empty, none */
    }
}

static void schema_init(const struct ipc_schema *s, void *body)
{
    memset(body, 0, s->size);
    for (size_t i = 0; i < s->n_fields; i++)
        field_default(&s->fields[i], body);
}

void ipc_body_init(enum ipc_type type, void *body)
{
    const struct ipc_schema *s = ipc_schema_of(type);
    ASSERT(s != NULL);
    schema_init(s, body);
}

void ipc_msg_init(struct ipc_msg *m, enum ipc_type type)
{
    m->type = type;
    ipc_body_init(type, &m->u);
}

void ipc_buf_free(struct ipc_buf *b)
{
    free(b->data);
    *b = (struct ipc_buf){0};
}

static int sparse_check(const struct ipc_sparse *s, struct err_msg *why)
{
    if (s->gate_rows != 0 && s->gate_rows != 64 && s->gate_rows != 128)
        return err_set(why, ERR_INVALID, "sparse.gate_rows: %d, must be 0, 64 or 128",
                       s->gate_rows);
    if (s->density > 0) {
        if (s->mode != IPC_SPARSE_ABS && s->mode != IPC_SPARSE_REL)
            return err_set(why, ERR_INVALID, "sparse.density: for the modes abs and rel");
        if (s->k != 0 || fabs(s->ln_lambda) > 0)
            return err_set(why, ERR_INVALID, "sparse.density: excludes k and ln_lambda");
        return 0;
    }
    if (s->mode == IPC_SPARSE_ABS && s->k <= 0)
        return err_set(why, ERR_INVALID, "sparse.k: mode abs needs a level above 0");
    if (s->mode == IPC_SPARSE_REL && !(fabs(s->ln_lambda) > 0))
        return err_set(why, ERR_INVALID, "sparse.ln_lambda: mode rel needs a value, not 0");
    return 0;
}

static int vocab_check(const char *field, const int32_t *ids, int32_t n, int32_t vocab,
                       struct err_msg *why)
{
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0 || (vocab > 0 && ids[i] >= vocab))
            return err_set(why, ERR_INVALID, "%s[%d]: %d is no token id, the vocabulary has %d",
                           field, i, ids[i], vocab);
    return 0;
}

int ipc_submit_check(const struct ipc_submit *m, int32_t vocab, struct err_msg *why)
{
    if (m->id[0] == '\0')
        return err_set(why, ERR_INVALID, "id: empty");
    if (m->n_tokens <= 0)
        return err_set(why, ERR_INVALID, "tokens: empty");
    if (m->min_tokens > m->max_tokens)
        return err_set(why, ERR_INVALID, "min_tokens: %d is above max_tokens %d", m->min_tokens,
                       m->max_tokens);
    if (!(m->top_p > 0))
        return err_set(why, ERR_INVALID, "top_p: must be above 0");
    if (!(m->repetition_penalty > 0))
        return err_set(why, ERR_INVALID, "repetition_penalty: must be above 0");
    TRY(sparse_check(&m->sparse, why));
    TRY(vocab_check("tokens", m->tokens, m->n_tokens, vocab, why));
    return vocab_check("stop_token_ids", m->stop_token_ids, m->n_stop, vocab, why);
}
