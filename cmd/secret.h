/* A shared secret in a file: its first line, without white space around it. */
#ifndef CMD_SECRET_H
#define CMD_SECRET_H

#include "core/err.h"

/* Longest secret is cap - 1 bytes; a longer line is an error. option names what to blame. */
MUST_CHECK int secret_read(char *buf, size_t cap, const char *option, const char *path,
                           struct err_msg *why);

#endif
