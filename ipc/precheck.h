/* Judges one msgpack value before a parser that allocates may see it: that it is complete, fills
 * the payload exactly, is not nested too deep, has not too many parts, that every announced size
 * is there, that strings are UTF-8 (no overlong forms, no surrogates) and that there are no
 * extension types. Allocates nothing and looks at each byte of structure once. */
#ifndef IPC_PRECHECK_H
#define IPC_PRECHECK_H

#include "core/err.h"

#include <stddef.h>
#include <stdint.h>

/* 0 or ERR_PROTOCOL. */
MUST_CHECK int ipc_precheck(const uint8_t *p, size_t len, struct err_msg *why);

#endif
