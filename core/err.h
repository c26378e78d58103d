/* Errors: one int space for the whole project.
 * 0 is success. Negative errno values, and so every libuv code (UV_E* equals -errno on Unix; UV_EOF
 * is -4095), pass through unchanged; our own codes start at -5001. A function that can fail for a
 * reason a person must read also takes a struct err_msg. */
#ifndef CORE_ERR_H
#define CORE_ERR_H

#include <stddef.h>

#define ERR_MAP(XX)                                                                                \
    XX(CUDA, -5001, "CUDA error")                                                                  \
    XX(CUBLAS, -5002, "cuBLAS error")                                                              \
    XX(NCCL, -5003, "NCCL error")                                                                  \
    XX(NO_BLOCKS, -5004, "no free cache pages")                                                    \
    XX(FORMAT, -5005, "malformed data")                                                            \
    XX(VERSION, -5006, "unsupported version")                                                      \
    XX(MISMATCH, -5007, "does not belong to this model")                                           \
    XX(UNSUPPORTED, -5008, "not supported")                                                        \
    XX(INVALID, -5009, "invalid argument")                                                         \
    XX(TOO_LONG, -5010, "prompt too long")                                                         \
    XX(QUEUE_FULL, -5011, "queue is full")                                                         \
    XX(DUPLICATE, -5012, "duplicate request id")                                                   \
    XX(DRAINING, -5013, "the server is draining")                                                  \
    XX(TENANT_LIMIT, -5014, "tenant limit reached")                                                \
    XX(DEADLINE, -5015, "deadline passed")                                                         \
    XX(CANCELLED, -5016, "cancelled")                                                              \
    XX(SLOW_CONSUMER, -5017, "client reads too slowly")                                            \
    XX(NUMERIC, -5018, "the model produced NaN or infinite logits")                                \
    XX(PEER, -5019, "a peer process failed")                                                       \
    XX(PROTOCOL, -5020, "protocol violation")                                                      \
    XX(ENGINE_DEAD, -5021, "the engine has failed")                                                \
    XX(CONFIG, -5022, "bad configuration")                                                         \
    XX(AUTH, -5023, "authentication failed")                                                       \
    XX(INTERNAL, -5024, "internal error")

enum err {
#define XX(name, code, text) ERR_##name = (code),
    ERR_MAP(XX)
#undef XX
};

#define MUST_CHECK             __attribute__((warn_unused_result))
#define PRINTF_LIKE(fmt, args) __attribute__((format(printf, fmt, args)))

/* The two macro shapes: return, or jump to a cleanup label with the code in `out`. */
#define TRY(e)                                                                                     \
    do {                                                                                           \
        int try_err = (e);                                                                         \
        if (try_err < 0)                                                                           \
            return try_err;                                                                        \
    } while (0)
#define TRY_GOTO(out, e, label)                                                                    \
    do {                                                                                           \
        (out) = (e);                                                                               \
        if ((out) < 0)                                                                             \
            goto label;                                                                            \
    } while (0)

/* Room for one sentence that names the file, the field and the value. Empty text means none. */
struct err_msg {
    char text[384];
};

/* Formats into why (which may be NULL) and returns code, so that `return err_set(...)` reads well.
 */
int err_set(struct err_msg *why, int code, const char *fmt, ...) PRINTF_LIKE(3, 4);
#ifdef __clang_analyzer__ /* cannot look into it, and would assume that it may return 0 */
#    define err_set(why, code, ...) ((void)err_set(why, code, __VA_ARGS__), (code))
#endif
/* Text and symbolic name of a code; static storage, never NULL. */
const char *err_str(int code);
const char *err_name(int code);
/* The message if there is one, else err_str(code). */
const char *err_why(const struct err_msg *why, int code);

/* Programmer errors: stays in release builds, prints the place and aborts. */
#define ASSERT(cond) ((cond) ? (void)0 : assert_fail(#cond, __FILE__, __LINE__))
_Noreturn void assert_fail(const char *cond, const char *file, int line);

#endif
