#include "calibration/calib_state.h"

#include "core/hash.h"
#include "core/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define MAGIC "sluice-calib-1\n"

struct header {
    char magic[16];
    struct calib_state_id id;
};

struct record {
    uint64_t hash; /* of all that follows */
    int32_t index, n_tokens;
};

struct calib_state {
    int fd;
    char *path;
    size_t bytes; /* of a record's midpoints */
    int32_t n;    /* records read or written */
    off_t end;    /* behind the last good one */
};

static int failed(const struct calib_state *s, const char *what, struct err_msg *why)
{
    const int err = -errno;
    return err_set(why, err, "%s: cannot %s: %s", s->path, what, err_str(err));
}

/* Bytes read, less than len only at the end of the file; or an error code. */
static ssize_t read_at(int fd, void *data, size_t len, off_t at)
{
    size_t done = 0;
    while (done < len) {
        ssize_t n = pread(fd, (char *)data + done, len - done, at + (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            break;
        done += (size_t)n;
    }
    return (ssize_t)done;
}

static int write_at(int fd, const void *data, size_t len, off_t at)
{
    size_t done = 0;
    while (done < len) {
        ssize_t n = pwrite(fd, (const char *)data + done, len - done, at + (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        done += (size_t)n;
    }
    return 0;
}

static int compare(const char *path, const struct calib_state_id *is,
                   const struct calib_state_id *want, struct err_msg *why)
{
    const struct {
        const char *name;
        bool same;
    } fields[] = {
        {"model", is->model == want->model},
        {"samples", is->set == want->set},
        {"pass", is->policy == want->policy},
        {"device or number format", memcmp(is->numbers, want->numbers, sizeof is->numbers) == 0},
        {"gate rows", is->gate_rows == want->gate_rows},
        {"layers or heads", is->n_layers == want->n_layers && is->n_heads == want->n_heads},
        {"length", is->n_blocks == want->n_blocks},
        {"levels", is->n_levels == want->n_levels && memcmp(is->k, want->k, sizeof is->k) == 0},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        if (!fields[i].same) {
            return err_set(why, ERR_MISMATCH,
                           "%s: begun by another calibration (its %s differ): finish that one, or "
                           "remove the file",
                           path, fields[i].name);
        }
    }
    return 0;
}

/* Reads the header, or writes it to a file that is empty or was killed while it was written. */
static int begin(struct calib_state *s, const struct calib_state_id *id, struct err_msg *why)
{
    struct header is, want;
    memset(&want, 0, sizeof want);
    memcpy(want.magic, MAGIC, sizeof MAGIC);
    want.id = *id;
    s->end = sizeof want;
    if (flock(s->fd, LOCK_EX | LOCK_NB) < 0) {
        return err_set(why, ERR_MISMATCH, "%s: another calibration is writing it", s->path);
    }
    ssize_t n = read_at(s->fd, &is, sizeof is, 0);
    if (n < 0)
        return err_set(why, (int)n, "%s: cannot read: %s", s->path, err_str((int)n));
    if (n == sizeof is && memcmp(is.magic, want.magic, sizeof is.magic) == 0)
        return compare(s->path, &is.id, id, why);
    const size_t seen = (size_t)n < sizeof is.magic ? (size_t)n : sizeof is.magic;
    if (n == sizeof is || memcmp(is.magic, want.magic, seen) != 0)
        return err_set(why, ERR_FORMAT, "%s: not the state of a calibration", s->path);
    int err = write_at(s->fd, &want, sizeof want, 0);
    return err < 0 ? err_set(why, err, "%s: cannot write: %s", s->path, err_str(err)) : 0;
}

int calib_state_open(struct calib_state **out, const char *path, const struct calib_state_id *id,
                     struct err_msg *why)
{
    struct calib_state *s = mem_zalloc(1, sizeof *s);
    s->path = mem_strdup(path);
    s->bytes = sizeof(double) * (size_t)id->n_levels * (size_t)id->n_layers * (size_t)id->n_heads *
               (size_t)id->n_blocks;
    s->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    int err = s->fd < 0 ? failed(s, "write", why) : begin(s, id, why);
    if (err < 0) {
        calib_state_close(s);
        return err;
    }
    *out = s;
    return 0;
}

static uint64_t hash_of(const struct record *r, const double *sample, size_t bytes)
{
    const int32_t head[] = {r->index, r->n_tokens};
    return hash_bytes(sample, bytes, hash_bytes(head, sizeof head, 0));
}

int calib_state_next(struct calib_state *s, double *sample, int32_t *n_tokens, struct err_msg *why)
{
    struct record r;
    ssize_t head = read_at(s->fd, &r, sizeof r, s->end);
    ssize_t body = head < 0 ? head : read_at(s->fd, sample, s->bytes, s->end + (off_t)sizeof r);
    if (body < 0)
        return err_set(why, (int)body, "%s: cannot read: %s", s->path, err_str((int)body));
    if (head == sizeof r && body == (ssize_t)s->bytes && r.index == s->n && r.n_tokens > 0 &&
        r.hash == hash_of(&r, sample, s->bytes)) {
        *n_tokens = r.n_tokens;
        s->end += (off_t)(sizeof r + s->bytes);
        s->n++;
        return 1;
    }
    return ftruncate(s->fd, s->end) < 0 ? failed(s, "write", why) : 0;
}

int calib_state_append(struct calib_state *s, const double *sample, int32_t n_tokens,
                       struct err_msg *why)
{
    struct record r = {.index = s->n, .n_tokens = n_tokens};
    r.hash = hash_of(&r, sample, s->bytes);
    int err = write_at(s->fd, sample, s->bytes, s->end + (off_t)sizeof r);
    if (err == 0)
        err = write_at(s->fd, &r, sizeof r, s->end);
    if (err < 0)
        return err_set(why, err, "%s: cannot write: %s", s->path, err_str(err));
    s->end += (off_t)(sizeof r + s->bytes);
    s->n++;
    return 0;
}

void calib_state_close(struct calib_state *s)
{
    if (!s)
        return;
    if (s->fd >= 0)
        (void)close(s->fd);
    mem_free(s->path);
    mem_free(s);
}
