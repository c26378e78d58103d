#include "core/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int(err_set)(struct err_msg *why, int code, const char *fmt, ...)
{
    if (why) {
        va_list ap;
        va_start(ap, fmt);
        (void)vsnprintf(why->text, sizeof why->text, fmt, ap);
        va_end(ap);
    }
    return code;
}

const char *err_str(int code)
{
    if (code >= 0)
        return "success";
    switch (code) {
#define XX(name, value, text)                                                                      \
    case value: return text;
        ERR_MAP(XX)
#undef XX
    case -4095: return "end of file";
    default: break;
    }
    const char *text = strerrordesc_np(-code);
    return text ? text : "unknown error";
}

const char *err_name(int code)
{
    if (code >= 0)
        return "OK";
    switch (code) {
#define XX(name, value, text)                                                                      \
    case value: return #name;
        ERR_MAP(XX)
#undef XX
    case -4095: return "EOF";
    default: break;
    }
    const char *name = strerrorname_np(-code);
    return name ? name : "UNKNOWN";
}

const char *err_why(const struct err_msg *why, int code)
{
    return why && why->text[0] ? why->text : err_str(code);
}

_Noreturn void assert_fail(const char *cond, const char *file, int line)
{
    (void)fprintf(stderr, "%s:%d: assertion failed: %s\n", file, line, cond);
    abort();
}
