/* Any bytes give an error or sound thresholds. The first byte chooses what the rest is: a whole
 * file, or the length of a pickle (2 bytes), the pickle and the storage data/0, which spares the
 * fuzzer the checksums and offsets of the archive. */
#include "calibration/import.h"
#include "tests/pt_case.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { LAYERS = 3, HEADS = 4 };

static void demand(int condition)
{
    if (!condition)
        abort();
}

static void check(const struct thresholds_import *t)
{
    const int64_t n = (int64_t)t->n_levels * LAYERS * HEADS * t->n_blocks;
    demand(t->n_layers == LAYERS && t->n_heads == HEADS && t->n_blocks >= 1);
    demand(t->n_levels >= 1 && t->n_levels <= IMPORT_MAX_LEVELS);
    for (int32_t i = 0; i < t->n_levels; i++)
        demand(t->k[i] > (i ? t->k[i - 1] : 0));
    for (int64_t i = 0; i < n; i++)
        demand(!isnan(t->t[i]) && t->t[i] != INFINITY);
    demand(t->n_dense >= 0 && t->n_limited >= 0 && t->n_dense + t->n_limited <= n);
}

static void parse(const uint8_t *data, size_t size)
{
    struct thresholds_import t, again;
    struct err_msg why = {""};
    if (thresholds_import_parse(&t, data, size, "input", LAYERS, HEADS, &why) < 0) {
        demand(strstr(why.text, "input") != NULL && t.t == NULL);
        for (const char *c = why.text; *c; c++)
            demand(*c >= ' ' && *c <= '~'); /* fit for a terminal, whatever the file says */
        return;
    }
    check(&t);
    demand(thresholds_import_parse(&again, data, size, "input", LAYERS, HEADS, NULL) == 0);
    demand(t.set == again.set);
    thresholds_import_free(&t);
    thresholds_import_free(&again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 3)
        return 0;
    if (data[0] & 1) {
        parse(data + 1, size - 1);
        return 0;
    }
    size_t pickle = data[1] | (size_t)data[2] << 8;
    if (pickle > size - 3)
        pickle = size - 3;
    const struct pt_case_member m[] = {{"a/data.pkl", data + 3, pickle},
                                       {"a/data/0", data + 3 + pickle, size - 3 - pickle}};
    struct pt_bytes file = {0};
    pt_case_zip(&file, m, 2, data[0] & 2);
    parse(file.data, file.len);
    pt_bytes_free(&file);
    return 0;
}
