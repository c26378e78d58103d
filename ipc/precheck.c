#include "ipc/precheck.h"

#include "ipc/message.h"

#include <stdbool.h>

/* One value's header: its own bytes, the raw bytes behind it, the values inside it. */
struct head {
    size_t own, raw;
    uint64_t children;
    bool is_text;
};

static uint32_t big_endian(const uint8_t *p, size_t n)
{
    uint32_t v = 0;
    for (size_t i = 0; i < n; i++)
        v = v << 8 | p[i];
    return v;
}

/* Headers 0xc0..0xdf: how many bytes of length follow, and what the length counts. */
enum shape { BAD, FIXED, BIN, STR, ARRAY, MAP };
static const struct {
    uint8_t shape, bytes;
} shapes[32] = {
    {FIXED, 0}, {BAD, 0},   {FIXED, 0}, {FIXED, 0},           /* nil, never used, false, true */
    {BIN, 1},   {BIN, 2},   {BIN, 4},                         /* bin 8, 16, 32 */
    {BAD, 0},   {BAD, 0},   {BAD, 0},                         /* ext 8, 16, 32 */
    {FIXED, 4}, {FIXED, 8},                                   /* float 32, 64 */
    {FIXED, 1}, {FIXED, 2}, {FIXED, 4}, {FIXED, 8},           /* uint */
    {FIXED, 1}, {FIXED, 2}, {FIXED, 4}, {FIXED, 8},           /* int */
    {BAD, 0},   {BAD, 0},   {BAD, 0},   {BAD, 0},   {BAD, 0}, /* fixext */
    {STR, 1},   {STR, 2},   {STR, 4},                         /* str 8, 16, 32 */
    {ARRAY, 2}, {ARRAY, 4}, {MAP, 2},   {MAP, 4},
};

static bool read_head(const uint8_t *p, size_t left, struct head *h)
{
    uint8_t b = p[0];
    *h = (struct head){.own = 1};
    if (b < 0x80 || b >= 0xe0)
        return true;
    if (b < 0xc0) {
        if (b < 0x90)
            h->children = 2 * (uint64_t)(b & 0x0f);
        else if (b < 0xa0)
            h->children = b & 0x0f;
        else {
            h->raw = b & 0x1f;
            h->is_text = true;
        }
        return true;
    }
    uint8_t shape = shapes[b - 0xc0].shape, bytes = shapes[b - 0xc0].bytes;
    if (shape == BAD)
        return false;
    h->own += bytes;
    if (shape == FIXED || h->own > left)
        return true;
    uint32_t n = big_endian(p + 1, bytes);
    h->is_text = shape == STR;
    if (shape == BIN || shape == STR)
        h->raw = n;
    else
        h->children = shape == MAP ? 2 * (uint64_t)n : n;
    return true;
}

/* Length of the UTF-8 sequence at p, 0 if it is none. */
static size_t utf8_sequence(const uint8_t *p, size_t left)
{
    if (p[0] < 0x80)
        return 1;
    size_t n = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
    if (p[0] < 0xc2 || p[0] > 0xf4 || n > left)
        return 0;
    /* The second byte's range excludes overlong forms, surrogates and values above U+10FFFF. */
    uint8_t lo = p[0] == 0xe0 ? 0xa0 : p[0] == 0xf0 ? 0x90 : 0x80;
    uint8_t hi = p[0] == 0xed ? 0x9f : p[0] == 0xf4 ? 0x8f : 0xbf;
    if (p[1] < lo || p[1] > hi)
        return 0;
    for (size_t i = 2; i < n; i++)
        if ((p[i] & 0xc0) != 0x80)
            return 0;
    return n;
}

static bool is_utf8(const uint8_t *p, size_t len)
{
    for (size_t i = 0; i < len;) {
        size_t n = utf8_sequence(p + i, len - i);
        if (n == 0)
            return false;
        i += n;
    }
    return true;
}

int ipc_precheck(const uint8_t *p, size_t len, struct err_msg *why)
{
    uint64_t open[IPC_MAX_DEPTH + 1] = {1}; /* values still to come, per level */
    size_t depth = 0, at = 0, n_values = 0;
    for (;;) {
        while (open[depth] == 0) {
            if (depth == 0) {
                if (at != len)
                    return err_set(why, ERR_PROTOCOL, "%zu bytes after the message", len - at);
                return 0;
            }
            depth--;
        }
        open[depth]--;
        struct head h;
        if (at == len)
            return err_set(why, ERR_PROTOCOL, "message is cut short at byte %zu", at);
        if (!read_head(p + at, len - at, &h))
            return err_set(why, ERR_PROTOCOL, "byte %zu: type 0x%02x is not allowed", at, p[at]);
        size_t left = len - at;
        if (h.own > left || h.raw > left - h.own || h.children > left - h.own)
            return err_set(why, ERR_PROTOCOL, "byte %zu: value is longer than the message", at);
        if (++n_values > IPC_MAX_VALUES)
            return err_set(why, ERR_PROTOCOL, "more than %d values in a message", IPC_MAX_VALUES);
        if (h.is_text && !is_utf8(p + at + h.own, h.raw))
            return err_set(why, ERR_PROTOCOL, "byte %zu: string is not UTF-8", at);
        at += h.own + h.raw;
        if (h.children > 0) {
            if (depth == IPC_MAX_DEPTH)
                return err_set(why, ERR_PROTOCOL, "nested deeper than %d", IPC_MAX_DEPTH);
            open[++depth] = h.children;
        }
    }
}
