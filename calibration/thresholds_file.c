/* Writing a threshold file, and reading one's bytes. A file appears under its name only when it is
 * whole: it is written and synced beside its place, then renamed. */
#include "calibration/thresholds_file.h"

#include "calibration/thresholds.h"
#include "core/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const size_t max_file_bytes = (size_t)4 << 30;

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors are stored as they are");

static int read_all(int fd, char *buf, size_t len)
{
    size_t done = 0;
    while (done < len) {
        ssize_t n = read(fd, buf + done, len - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            return n < 0 ? -errno : -EIO; /* -EIO: it shrank meanwhile */
        }
        done += (size_t)n;
    }
    return 0;
}

static int read_fd(int fd, const char *path, void **data, size_t *len, struct err_msg *why)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return err_set(why, -errno, "%s: %s", path, err_str(-errno));
    if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size > max_file_bytes) {
        return err_set(why, ERR_FORMAT, "%s: not a regular file of at most %zu bytes", path,
                       max_file_bytes);
    }
    char *buf = mem_try_aligned((size_t)st.st_size, 1);
    if (!buf)
        return err_set(why, -ENOMEM, "%s: no memory for %zu bytes", path, (size_t)st.st_size);
    int err = read_all(fd, buf, (size_t)st.st_size);
    if (err < 0) {
        mem_free(buf);
        return err_set(why, err, "%s: %s", path, err_str(err));
    }
    *data = buf;
    *len = (size_t)st.st_size;
    return 0;
}

int thresholds_read_file(const char *path, void **data, size_t *len, struct err_msg *why)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return err_set(why, -errno, "%s: %s", path, err_str(-errno));
    int err = read_fd(fd, path, data, len, why);
    (void)close(fd);
    return err;
}

/* ---- writing -------------------------------------------------------------------------------- */

struct shape {
    int32_t levels, layers, heads, blocks;
};

/* NULL where the gate was not calibrated. */
static const char *rel_text(const struct thresholds_rel *r, char *text, size_t size)
{
    int at = snprintf(text, size, "%.9g %.9g %.6g %.6g %.6g", r->ln_a, r->b, r->r2, r->min, r->max);
    for (int i = 0; i < THRESHOLDS_REL_KNOTS && (size_t)at < size; i++)
        at += snprintf(text + at, size - (size_t)at, " %.6g", r->knots[i]);
    if (r->ln_tokens > 0 && (size_t)at < size)
        at += snprintf(text + at, size - (size_t)at, " %.6g", r->ln_tokens);
    for (int i = 0; i < THRESHOLDS_REL_KNOTS && r->ln_tokens > 0 && (size_t)at < size; i++)
        at += snprintf(text + at, size - (size_t)at, " %.6g", r->slopes[i]);
    return r->b > 0 ? text : NULL;
}

/* NULL where heads have no k of their own; released by mem_free. */
static char *head_k_text(const struct thresholds_meta *m, const struct shape *s)
{
    const size_t n = (size_t)s->levels * (size_t)s->layers * (size_t)s->heads, room = 12 * n;
    size_t at = 0;
    if (!m->head_k)
        return NULL;
    char *text = mem_alloc(room);
    for (size_t i = 0; i < n; i++)
        at += (size_t)snprintf(text + at, room - at, "%s%d", i ? " " : "", m->head_k[i]);
    return text;
}

static json_t *make_meta(const struct thresholds_meta *m, const struct shape *s)
{
    char rel_128[512], rel_64[512], density[32], lambda[32], rows[12];
    const bool rel = m->auto_rows > 0, by_density = rel && m->auto_density > 0;
    char model[17], set[17], gate_rows[12], scale[32], n_max[12], samples[12], auto_k[12],
        auto_min[12];
    (void)snprintf(model, sizeof model, "%016" PRIx64, m->model);
    (void)snprintf(set, sizeof set, "%016" PRIx64, m->set);
    (void)snprintf(gate_rows, sizeof gate_rows, "%d", m->gate_rows);
    (void)snprintf(scale, sizeof scale, "%.9g", (double)m->softmax_scale);
    (void)snprintf(n_max, sizeof n_max, "%d", m->n_max);
    (void)snprintf(samples, sizeof samples, "%d", m->n_samples);
    (void)snprintf(auto_k, sizeof auto_k, "%d", m->auto_k);
    (void)snprintf(auto_min, sizeof auto_min, "%d", m->auto_min);
    (void)snprintf(density, sizeof density, "%.9g", m->auto_density);
    (void)snprintf(lambda, sizeof lambda, "%.9g", m->auto_ln_lambda);
    (void)snprintf(rows, sizeof rows, "%d", m->auto_rows);
    char *head_k = head_k_text(m, s);
    json_t *o = json_pack(
        "{s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:s,s:s*,s:s*,s:s*,s:s*,s:s*,s:s*,s:s*}",
        "format", THRESHOLDS_FORMAT, "version", THRESHOLDS_VERSION, "page", THRESHOLDS_PAGE,
        "model", model, "set", set, "gate_rows", gate_rows, "softmax_scale", scale, "rope", m->rope,
        "n_max", n_max, "samples", samples, "auto_k", auto_k, "auto_min", auto_min, "source",
        m->imported ? THRESHOLDS_IMPORTED : NULL, "rel_128",
        rel_text(&m->rel_128, rel_128, sizeof rel_128), "rel_64",
        rel_text(&m->rel_64, rel_64, sizeof rel_64), "auto_density", by_density ? density : NULL,
        "auto_ln_lambda", rel && !by_density ? lambda : NULL, "auto_rows", rel ? rows : NULL,
        "head_k", head_k);
    mem_free(head_k);
    return o;
}

/* A tensor of REL's densities, whose data begins at *at. */
static json_t *rel_tensor(const struct shape *s, const struct thresholds_rel_heads *r,
                          json_int_t *at)
{
    const json_int_t begin = *at;
    *at += (json_int_t)sizeof *r->t * r->n_steps * s->layers * s->heads;
    return json_pack("{s:s,s:[i,i,i],s:[I,I]}", "dtype", "F32", "shape", r->n_steps, s->layers,
                     s->heads, "data_offsets", begin, *at);
}

/* The tensors, one after the other in this order. */
static json_t *make_tensors(const struct shape *s, const struct thresholds_meta *m)
{
    const struct thresholds_decode *d = &m->decode;
    const json_int_t per_block = (json_int_t)sizeof(float) * s->layers * s->heads;
    const json_int_t t = per_block * s->levels * s->blocks;
    const json_int_t k = t + (json_int_t)sizeof(int32_t) * s->levels;
    const json_int_t decode = k + per_block * d->n_levels * d->n_blocks;
    json_int_t end = d->t ? decode + (json_int_t)sizeof(int32_t) * d->n_levels : k;
    json_t *all =
        json_pack("{s:{s:s,s:[i,i,i,i],s:[I,I]},s:{s:s,s:[i],s:[I,I]}}", "thresholds", "dtype",
                  "F32", "shape", s->levels, s->layers, s->heads, s->blocks, "data_offsets",
                  (json_int_t)0, t, "k", "dtype", "I32", "shape", s->levels, "data_offsets", t, k);
    if (all && m->rel_128_heads.t) {
        (void)json_object_set_new(all, "rel_128_heads", rel_tensor(s, &m->rel_128_heads, &end));
        (void)json_object_set_new(all, "rel_64_heads", rel_tensor(s, &m->rel_64_heads, &end));
    }
    if (!all || !d->t)
        return all;
    json_t *more =
        json_pack("{s:{s:s,s:[i,i,i,i],s:[I,I]},s:{s:s,s:[i],s:[I,I]}}", "decode", "dtype", "F32",
                  "shape", d->n_levels, s->layers, s->heads, d->n_blocks, "data_offsets", k, decode,
                  "decode_k", "dtype", "I32", "shape", d->n_levels, "data_offsets", decode,
                  decode + (json_int_t)sizeof(int32_t) * d->n_levels);
    (void)json_object_update(all, more);
    json_decref(more);
    return all;
}

/* The header as safetensors wants it: JSON padded with spaces so that the data is aligned. */
static char *make_header(const struct thresholds_meta *meta, const struct shape *s, size_t *len)
{
    json_t *root = make_tensors(s, meta), *about = make_meta(meta, s);
    char *text = NULL;
    if (about && json_object_set_new(root, "__metadata__", about) == 0)
        text = json_dumps(root, JSON_COMPACT | JSON_SORT_KEYS);
    json_decref(root);
    if (!text)
        return NULL;
    size_t n = strlen(text);
    *len = (n + 7) / 8 * 8;
    text = mem_realloc(text, *len + 1);
    memset(text + n, ' ', *len - n);
    return text;
}

static int write_all(int fd, const void *data, size_t len)
{
    const char *p = data;
    while (len > 0) {
        ssize_t n = write(fd, p, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

static int write_parts(int fd, const struct file_part *parts, int n_parts)
{
    for (int i = 0; i < n_parts; i++)
        TRY(write_all(fd, parts[i].data, parts[i].len));
    return fsync(fd) < 0 ? -errno : 0;
}

int thresholds_write_file(const char *path, const struct file_part *parts, int n_parts,
                          struct err_msg *why)
{
    char temporary[PATH_MAX];
    int len = snprintf(temporary, sizeof temporary, "%s.%ld.tmp", path, (long)getpid());
    if (len < 0 || (size_t)len >= sizeof temporary)
        return err_set(why, -ENAMETOOLONG, "%.200s...: path too long", path);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    int err = fd < 0 ? -errno : write_parts(fd, parts, n_parts);
    if (fd >= 0 && close(fd) < 0 && err == 0)
        err = -errno;
    if (err == 0 && rename(temporary, path) < 0)
        err = -errno;
    if (err < 0) {
        if (fd >= 0)
            (void)unlink(temporary);
        (void)err_set(why, err, "%s: cannot write: %s", path, err_str(err));
    }
    return err;
}

// NOLINTNEXTLINE(readability-function-size): the parameters are the tensor's shape
int thresholds_save(const char *path, const struct thresholds_meta *meta, const float *t,
                    const int32_t *k, int32_t n_levels, int32_t n_layers, int32_t n_heads,
                    int32_t n_blocks, struct err_msg *why)
{
    const struct shape s = {n_levels, n_layers, n_heads, n_blocks};
    const size_t n = (size_t)n_levels * (size_t)n_layers * (size_t)n_heads * (size_t)n_blocks;
    const struct thresholds_decode *d = &meta->decode;
    const size_t n_all = (size_t)n_layers * (size_t)n_heads;
    const size_t n_decode = (size_t)d->n_levels * n_all * (size_t)d->n_blocks;
    const struct thresholds_rel_heads *rel[] = {&meta->rel_128_heads, &meta->rel_64_heads};
    unsigned char prefix[8];
    size_t header_len = 0;
    char *header = make_header(meta, &s, &header_len);
    if (!header)
        return err_set(why, ERR_INVALID, "%s: metadata rope is not UTF-8", path);
    for (int i = 0; i < 8; i++)
        prefix[i] = (unsigned char)((uint64_t)header_len >> (8 * i));
    const struct file_part parts[] = {{prefix, sizeof prefix},
                                      {header, header_len},
                                      {t, n * sizeof *t},
                                      {k, (size_t)n_levels * sizeof *k},
                                      {d->t, n_decode * sizeof *d->t},
                                      {d->k, (size_t)d->n_levels * sizeof *d->k},
                                      {rel[0]->t, (size_t)rel[0]->n_steps * n_all * sizeof *t},
                                      {rel[1]->t, (size_t)rel[1]->n_steps * n_all * sizeof *t}};
    int err = thresholds_write_file(path, parts, sizeof parts / sizeof *parts, why);
    mem_free(header);
    return err;
}
