#include "model/safetensors.h"

#include "core/mem.h"
#include "model/json_read.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* One file: its bytes, and its parsed header, which owns the tensors' names. */
struct st_file {
    char *name;
    const unsigned char *bytes;
    size_t len;
    bool mapped;
    json_t *header;
};

struct safetensors {
    struct st_file *files;
    size_t n_files;
    struct st_tensor *tensors;         /* grouped by file, by offset within a file */
    const struct st_tensor **by_name;  /* sorted */
    size_t n_tensors, tensor_capacity; /* capacity: what tensors has room for */
};

static const struct {
    const char *name;
    size_t bytes;
} st_dtypes[] = {
    [ST_BOOL] = {"BOOL", 1},       [ST_U8] = {"U8", 1},           [ST_I8] = {"I8", 1},
    [ST_F8_E4M3] = {"F8_E4M3", 1}, [ST_F8_E5M2] = {"F8_E5M2", 1}, [ST_U16] = {"U16", 2},
    [ST_I16] = {"I16", 2},         [ST_F16] = {"F16", 2},         [ST_BF16] = {"BF16", 2},
    [ST_U32] = {"U32", 4},         [ST_I32] = {"I32", 4},         [ST_F32] = {"F32", 4},
    [ST_U64] = {"U64", 8},         [ST_I64] = {"I64", 8},         [ST_F64] = {"F64", 8},
};

size_t st_dtype_bytes(enum st_dtype t)
{
    return st_dtypes[t].bytes;
}

const char *st_dtype_name(enum st_dtype t)
{
    return st_dtypes[t].name;
}

const char *st_shape_text(char *text, size_t size, const int64_t *shape, int n_dims)
{
    size_t at = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < n_dims && at < size; i++)
        at += (size_t)snprintf(text + at, size - at, "%s%" PRId64, i ? ", " : "", shape[i]);
    if (at < size)
        (void)snprintf(text + at, size - at, "]");
    return text;
}

static int parse_dtype(struct st_tensor *t, const json_t *entry, const char *file,
                       struct err_msg *why)
{
    const char *name = json_string_value(json_object_get(entry, "dtype"));
    if (!name)
        return err_set(why, ERR_FORMAT, "%s: tensor '%.64s': dtype is missing", file, t->name);
    for (size_t i = 0; i < sizeof st_dtypes / sizeof *st_dtypes; i++) {
        if (strcmp(name, st_dtypes[i].name) == 0) {
            t->dtype = (enum st_dtype)i;
            return 0;
        }
    }
    return err_set(why, ERR_UNSUPPORTED, "%s: tensor '%.64s': dtype '%.32s' is unknown", file,
                   t->name, name);
}

/* The shape, and the bytes it takes. */
static int parse_shape(struct st_tensor *t, const json_t *entry, const char *file,
                       struct err_msg *why)
{
    const json_t *shape = json_object_get(entry, "shape");
    size_t bytes = st_dtype_bytes(t->dtype);
    bool empty = false;

    if (!json_is_array(shape) || json_array_size(shape) > SAFETENSORS_MAX_DIMS)
        return err_set(why, ERR_FORMAT, "%s: tensor '%.64s': shape is not a list of at most %d",
                       file, t->name, SAFETENSORS_MAX_DIMS);
    t->n_dims = (int)json_array_size(shape);
    for (int i = 0; i < t->n_dims; i++) {
        const json_t *dim = json_array_get(shape, (size_t)i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0)
            return err_set(why, ERR_FORMAT, "%s: tensor '%.64s': shape[%d] is not a size", file,
                           t->name, i);
        t->shape[i] = json_integer_value(dim);
        empty = empty || t->shape[i] == 0;
    }
    for (int i = 0; i < t->n_dims && !empty; i++) {
        if (__builtin_mul_overflow(bytes, (uint64_t)t->shape[i], &bytes) || bytes > INT64_MAX)
            return err_set(why, ERR_FORMAT, "%s: tensor '%.64s': shape overflows", file, t->name);
    }
    t->bytes = empty ? 0 : bytes;
    return 0;
}

/* Points the tensor at its bytes; `data` are the file's after the header. */
static int parse_offsets(struct st_tensor *t, const json_t *entry, const unsigned char *data,
                         size_t data_len, const char *file, struct err_msg *why)
{
    const json_t *range = json_object_get(entry, "data_offsets");
    const json_t *b = json_array_get(range, 0), *e = json_array_get(range, 1);

    if (json_array_size(range) != 2 || !json_is_integer(b) || !json_is_integer(e))
        return err_set(why, ERR_FORMAT, "%s: tensor '%.64s': data_offsets are not two integers",
                       file, t->name);
    int64_t begin = json_integer_value(b), end = json_integer_value(e);
    if (begin < 0 || end < begin || (uint64_t)end > data_len)
        return err_set(why, ERR_FORMAT,
                       "%s: tensor '%.64s': data_offsets [%" PRId64 ", %" PRId64
                       "] outside the file's %zu bytes of data (truncated?)",
                       file, t->name, begin, end, data_len);
    if ((uint64_t)(end - begin) != t->bytes)
        return err_set(why, ERR_FORMAT,
                       "%s: tensor '%.64s': data_offsets span %" PRId64
                       " bytes, type and shape need %zu",
                       file, t->name, end - begin, t->bytes);
    t->data = data + begin;
    return 0;
}

static int check_metadata(const json_t *meta, const char *file, struct err_msg *why)
{
    const char *key;
    json_t *value;
    if (!json_is_object(meta))
        return err_set(why, ERR_FORMAT, "%s: __metadata__ is not an object", file);
    json_object_foreach((json_t *)meta, key, value)
    {
        if (!json_is_string(value))
            return err_set(why, ERR_FORMAT, "%s: __metadata__.%.64s is not a string", file, key);
    }
    return 0;
}

static int by_offset(const void *a, const void *b)
{
    const struct st_tensor *x = a, *y = b;
    if (x->data != y->data)
        return (uintptr_t)x->data < (uintptr_t)y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes); /* empty ones first */
}

/* Sorts one file's tensors by place and holds that they tile its data. */
static int check_tiling(struct st_tensor *t, size_t n, const unsigned char *data, size_t data_len,
                        const char *file, struct err_msg *why)
{
    const unsigned char *at = data;
    if (n > 1)
        qsort(t, n, sizeof *t, by_offset);
    for (size_t i = 0; i < n; i++) {
        const unsigned char *p = t[i].data;
        if (p != at)
            return err_set(why, ERR_FORMAT, "%s: tensor '%.64s' %s at byte %zu of the data", file,
                           t[i].name, p < at ? "overlaps another" : "follows a hole",
                           (size_t)(p - data));
        at += t[i].bytes;
    }
    if (at != data + data_len)
        return err_set(why, ERR_FORMAT, "%s: %zu bytes after the last tensor", file,
                       (size_t)(data + data_len - at));
    return 0;
}

static int parse_entries(struct safetensors *s, const struct st_file *f, const unsigned char *data,
                         size_t data_len, struct err_msg *why)
{
    const char *key;
    json_t *entry;
    json_object_foreach(f->header, key, entry)
    {
        if (strcmp(key, "__metadata__") == 0) {
            TRY(check_metadata(entry, f->name, why));
            continue;
        }
        struct st_tensor t = {.name = key};
        TRY(parse_dtype(&t, entry, f->name, why));
        TRY(parse_shape(&t, entry, f->name, why));
        TRY(parse_offsets(&t, entry, data, data_len, f->name, why));
        s->tensors[s->n_tensors++] = t;
    }
    return 0;
}

static uint64_t load_le64(const unsigned char *p)
{
    uint64_t v = 0;
    for (int i = 7; i >= 0; i--)
        v = v << 8 | p[i];
    return v;
}

/* Parses f's header and appends its tensors. */
static int parse_file(struct safetensors *s, struct st_file *f, struct err_msg *why)
{
    if (f->len < 8)
        return err_set(why, ERR_FORMAT, "%s: %zu bytes are too few for a header length", f->name,
                       f->len);
    uint64_t n = load_le64(f->bytes);
    if (n > SAFETENSORS_MAX_HEADER)
        return err_set(why, ERR_FORMAT, "%s: header length %" PRIu64 " is above %d", f->name, n,
                       SAFETENSORS_MAX_HEADER);
    if (n > f->len - 8)
        return err_set(why, ERR_FORMAT, "%s: header length %" PRIu64 " in a file of %zu bytes",
                       f->name, n, f->len);
    TRY(jread_buffer(&f->header, (const char *)f->bytes + 8, (size_t)n, f->name, why));

    size_t first = s->n_tensors, room = first + json_object_size(f->header);
    if (room > s->tensor_capacity) {
        s->tensors = mem_realloc(s->tensors, room * sizeof *s->tensors);
        s->tensor_capacity = room;
    }
    const unsigned char *data = f->bytes + 8 + n;
    size_t data_len = f->len - 8 - (size_t)n;
    TRY(parse_entries(s, f, data, data_len, why));
    if (s->n_tensors == first) /* none: an empty array has no address to start from */
        return data_len == 0 ? 0
                             : err_set(why, ERR_FORMAT, "%s: %zu bytes that no tensor uses",
                                       f->name, data_len);
    return check_tiling(s->tensors + first, s->n_tensors - first, data, data_len, f->name, why);
}

static int by_name(const void *a, const void *b)
{
    const struct st_tensor *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

/* Builds the name index once all files are in; the same name twice is an error. */
static int index_names(struct safetensors *s, struct err_msg *why)
{
    s->by_name = mem_zalloc(s->n_tensors + 1, sizeof *s->by_name);
    for (size_t i = 0; i < s->n_tensors; i++)
        s->by_name[i] = &s->tensors[i];
    if (s->n_tensors > 1)
        qsort(s->by_name, s->n_tensors, sizeof *s->by_name, by_name);
    for (size_t i = 1; i < s->n_tensors; i++) {
        if (strcmp(s->by_name[i - 1]->name, s->by_name[i]->name) == 0)
            return err_set(why, ERR_FORMAT, "tensor '%.64s' is in two shards (%s and another)",
                           s->by_name[i]->name, s->files[0].name);
    }
    return 0;
}

/* Adds an entry for a file; its bytes come next. */
static struct st_file *add_file(struct safetensors *s, const char *name)
{
    s->files = mem_realloc(s->files, (s->n_files + 1) * sizeof *s->files);
    struct st_file *f = &s->files[s->n_files++];
    *f = (struct st_file){.name = mem_strdup(name)};
    return f;
}

static int map_file(struct st_file *f, struct err_msg *why)
{
    struct stat st;
    int err = 0, fd = open(f->name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return err_set(why, -errno, "%s: %s", f->name, err_str(-errno));
    if (fstat(fd, &st) < 0) {
        err = err_set(why, -errno, "%s: %s", f->name, err_str(-errno));
    } else if (!S_ISREG(st.st_mode) || st.st_size < 8) {
        err = err_set(why, ERR_FORMAT, "%s: not a file of at least 8 bytes", f->name);
    } else {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) {
            err = err_set(why, -errno, "%s: cannot map: %s", f->name, err_str(-errno));
        } else {
            f->bytes = p;
            f->len = (size_t)st.st_size;
            f->mapped = true;
        }
    }
    (void)close(fd);
    return err;
}

static int add_path(struct safetensors *s, const char *path, struct err_msg *why)
{
    struct st_file *f = add_file(s, path);
    TRY(map_file(f, why));
    return parse_file(s, f, why);
}

int safetensors_parse(struct safetensors **out, const void *data, size_t len, const char *name,
                      struct err_msg *why)
{
    struct safetensors *s = mem_zalloc(1, sizeof *s);
    struct st_file *f = add_file(s, name);
    f->bytes = data;
    f->len = len;
    int err = parse_file(s, f, why);
    if (err == 0)
        err = index_names(s, why);
    if (err < 0) {
        safetensors_close(s);
        return err;
    }
    *out = s;
    return 0;
}

int safetensors_open(struct safetensors **out, const char *path, struct err_msg *why)
{
    struct safetensors *s = mem_zalloc(1, sizeof *s);
    int err = add_path(s, path, why);
    if (err == 0)
        err = index_names(s, why);
    if (err < 0) {
        safetensors_close(s);
        return err;
    }
    *out = s;
    return 0;
}

/* A shard is a plain file name beside the index: an index may not point elsewhere. */
static int check_shard_name(const char *index, const char *tensor, const json_t *value,
                            struct err_msg *why)
{
    const char *file = json_string_value(value);
    if (!file || !*file || strchr(file, '/') || file[0] == '.')
        return err_set(why, ERR_FORMAT, "%s: weight_map.%.64s is not a file name", index, tensor);
    return 0;
}

static bool has_file(const struct safetensors *s, const char *path)
{
    for (size_t i = 0; i < s->n_files; i++) {
        if (strcmp(s->files[i].name, path) == 0)
            return true;
    }
    return false;
}

/* Every tensor of the map must be in the shard that the map names. */
static int check_map(const struct safetensors *s, const json_t *map, const char *index,
                     struct err_msg *why)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)map, key, value)
    {
        if (!safetensors_find(s, key))
            return err_set(why, ERR_FORMAT, "%s: weight_map.%.64s: not in %.64s", index, key,
                           json_string_value(value));
    }
    return 0;
}

static int path_join(char *path, const char *dir, const char *file, struct err_msg *why)
{
    if (snprintf(path, PATH_MAX, "%s/%s", dir, file) >= PATH_MAX)
        return err_set(why, -ENAMETOOLONG, "%.200s/...: path too long", dir);
    return 0;
}

static int open_shards(struct safetensors *s, const char *dir, const char *index,
                       const json_t *root, struct err_msg *why)
{
    char path[PATH_MAX];
    const char *key;
    json_t *value;
    const json_t *map = json_object_get(root, "weight_map");

    if (json_object_size(map) == 0)
        return err_set(why, ERR_FORMAT, "%s: weight_map is missing or empty", index);
    json_object_foreach((json_t *)map, key, value)
    {
        TRY(check_shard_name(index, key, value, why));
        TRY(path_join(path, dir, json_string_value(value), why));
        if (!has_file(s, path))
            TRY(add_path(s, path, why));
    }
    TRY(index_names(s, why));
    return check_map(s, map, index, why);
}

int safetensors_open_dir(struct safetensors **out, const char *dir, struct err_msg *why)
{
    char path[PATH_MAX];
    json_t *root = NULL;

    TRY(path_join(path, dir, "model.safetensors", why));
    if (access(path, F_OK) == 0)
        return safetensors_open(out, path, why);
    TRY(path_join(path, dir, "model.safetensors.index.json", why));
    int err = jread_file(&root, path, SAFETENSORS_MAX_HEADER, why);
    if (err == -ENOENT)
        return err_set(why, err, "%.200s: neither model.safetensors nor its index.json is there",
                       dir);
    if (err < 0)
        return err;
    struct safetensors *s = mem_zalloc(1, sizeof *s);
    err = open_shards(s, dir, path, root, why);
    json_decref(root);
    if (err < 0) {
        safetensors_close(s);
        return err;
    }
    *out = s;
    return 0;
}

void safetensors_close(struct safetensors *s)
{
    if (!s)
        return;
    for (size_t i = 0; i < s->n_files; i++) {
        if (s->files[i].mapped)
            (void)munmap((void *)s->files[i].bytes, s->files[i].len);
        json_decref(s->files[i].header);
        mem_free(s->files[i].name);
    }
    mem_free(s->files);
    mem_free(s->tensors);
    mem_free(s->by_name);
    mem_free(s);
}

size_t safetensors_count(const struct safetensors *s)
{
    return s->n_tensors;
}

const struct st_tensor *safetensors_at(const struct safetensors *s, size_t i)
{
    ASSERT(i < s->n_tensors);
    return &s->tensors[i];
}

const struct st_tensor *safetensors_find(const struct safetensors *s, const char *name)
{
    size_t lo = 0, hi = s->n_tensors;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        int c = strcmp(name, s->by_name[mid]->name);
        if (c == 0)
            return s->by_name[mid];
        if (c < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return NULL;
}

const char *safetensors_metadata(const struct safetensors *s, const char *key)
{
    for (size_t i = 0; i < s->n_files; i++) {
        const json_t *meta = json_object_get(s->files[i].header, "__metadata__");
        const char *text = json_string_value(json_object_get(meta, key));
        if (text)
            return text;
    }
    return NULL;
}
