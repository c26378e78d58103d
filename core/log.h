/* One line a message on stderr: `2026-11-21T03:34:27.123Z info engine started pages=512`.
 * Logged once, where the outside world failed; inner layers only return codes. Thread-safe: a line
 * is one write. The level is the project's only mutable global. */
#ifndef CORE_LOG_H
#define CORE_LOG_H

#include "core/err.h"

#include <stdbool.h>

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

void log_set_level(enum log_level level);
bool log_enabled(enum log_level level);
void log_line(enum log_level level, const char *module, const char *fmt, ...) PRINTF_LIKE(3, 4);

/* Each file names itself once: #define LOG_MODULE "engine" before including this header. */
#ifdef LOG_MODULE
#    define log_error(...) log_line(LOG_ERROR, LOG_MODULE, __VA_ARGS__)
#    define log_warn(...)  log_line(LOG_WARN, LOG_MODULE, __VA_ARGS__)
#    define log_info(...)  log_line(LOG_INFO, LOG_MODULE, __VA_ARGS__)
#    define log_debug(...)                                                                         \
        do {                                                                                       \
            if (log_enabled(LOG_DEBUG))                                                            \
                log_line(LOG_DEBUG, LOG_MODULE, __VA_ARGS__);                                      \
        } while (0)
#endif

#endif
