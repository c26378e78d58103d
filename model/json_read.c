#include "model/json_read.h"

#include "core/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

int jread_buffer(json_t **out, const char *data, size_t len, const char *name, struct err_msg *why)
{
    json_error_t e;
    json_t *root = json_loadb(data, len, JSON_REJECT_DUPLICATES, &e);
    if (!root)
        return err_set(why, ERR_FORMAT, "%s: line %d column %d: %s", name, e.line, e.column,
                       e.text);
    if (!json_is_object(root)) {
        json_decref(root);
        return err_set(why, ERR_FORMAT, "%s: not a JSON object", name);
    }
    *out = root;
    return 0;
}

static int read_all(int fd, char *buf, size_t len)
{
    size_t done = 0;
    while (done < len) {
        ssize_t n = read(fd, buf + done, len - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return -EIO; /* the file shrank after fstat */
        done += (size_t)n;
    }
    return 0;
}

int jread_file(json_t **out, const char *path, size_t max_bytes, struct err_msg *why)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), err = 0;
    char *buf = NULL;

    if (fd < 0)
        return err_set(why, -errno, "%s: %s", path, err_str(-errno));
    if (fstat(fd, &st) < 0) {
        err = err_set(why, -errno, "%s: %s", path, err_str(-errno));
        goto done;
    }
    if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size > max_bytes) {
        err = err_set(why, ERR_FORMAT, "%s: not a regular file of at most %zu bytes", path,
                      max_bytes);
        goto done;
    }
    buf = mem_alloc((size_t)st.st_size + 1);
    err = read_all(fd, buf, (size_t)st.st_size);
    if (err < 0)
        (void)err_set(why, err, "%s: %s", path, err_str(err));
    else
        err = jread_buffer(out, buf, (size_t)st.st_size, path, why);
done:
    mem_free(buf);
    (void)close(fd);
    return err;
}

const json_t *jread_get(const struct jread *j, const char *field)
{
    const json_t *v = json_object_get(j->obj, field);
    return json_is_null(v) ? NULL : v;
}

int jread_require(const struct jread *j, const char *field, struct err_msg *why)
{
    if (!jread_get(j, field))
        return err_set(why, ERR_CONFIG, "%s: %s%s is missing", j->file, j->prefix, field);
    return 0;
}

int jread_int(const struct jread *j, const char *field, int64_t min, int64_t max, int64_t *out,
              struct err_msg *why)
{
    const json_t *v = jread_get(j, field);
    if (!v)
        return 0;
    if (!json_is_integer(v))
        return err_set(why, ERR_CONFIG, "%s: %s%s is not an integer", j->file, j->prefix, field);
    int64_t n = json_integer_value(v);
    if (n < min || n > max)
        return err_set(why, ERR_CONFIG,
                       "%s: %s%s is %" PRId64 ", not between %" PRId64 " and %" PRId64, j->file,
                       j->prefix, field, n, min, max);
    *out = n;
    return 0;
}

int jread_i32(const struct jread *j, const char *field, int32_t min, int32_t max, int32_t *out,
              struct err_msg *why)
{
    int64_t n = *out;
    TRY(jread_int(j, field, min, max, &n, why));
    *out = (int32_t)n;
    return 0;
}

int jread_double(const struct jread *j, const char *field, double above, double *out,
                 struct err_msg *why)
{
    const json_t *v = jread_get(j, field);
    if (!v)
        return 0;
    if (!json_is_number(v))
        return err_set(why, ERR_CONFIG, "%s: %s%s is not a number", j->file, j->prefix, field);
    double d = json_number_value(v);
    if (!isfinite(d) || !(d > above))
        return err_set(why, ERR_CONFIG, "%s: %s%s is %g, not a finite number above %g", j->file,
                       j->prefix, field, d, above);
    *out = d;
    return 0;
}

int jread_bool(const struct jread *j, const char *field, bool *out, struct err_msg *why)
{
    const json_t *v = jread_get(j, field);
    if (!v)
        return 0;
    if (!json_is_boolean(v))
        return err_set(why, ERR_CONFIG, "%s: %s%s is not true or false", j->file, j->prefix, field);
    *out = json_is_true(v);
    return 0;
}

int jread_string(const struct jread *j, const char *field, const char **out, struct err_msg *why)
{
    const json_t *v = jread_get(j, field);
    if (!v)
        return 0;
    if (!json_is_string(v))
        return err_set(why, ERR_CONFIG, "%s: %s%s is not a string", j->file, j->prefix, field);
    *out = json_string_value(v);
    return 0;
}
